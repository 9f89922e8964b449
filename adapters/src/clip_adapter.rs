//! CLIP-Adapter: a small MLP behind a tower's features, mixed with them.

use std::collections::HashMap;

use candle_core::{Result as TensorResult, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::method::{Fold, Init, Method, Patch};
use crate::ops::{self, Activation};
use crate::params::{Params, Spec, Start};
use crate::sites::{SiteId, SiteKind, Sites, WeightId};
use crate::targets::{Selection, Towers};
use crate::{Error, Result};

/// See [`ClipAdapterConfig`].
#[derive(Debug)]
pub struct ClipAdapter;

/// Options of CLIP-Adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClipAdapterConfig {
    /// The adapter's share of the result, above 0 up to 1. Higher: further from the base, for data unlike its own.
    pub ratio: f64,
    /// The hidden width is the features' width divided by this, at least 1. Higher: fewer parameters.
    pub reduction: usize,
    /// `vision`: the authors' best. `text`, `both`: list the method twice for a ratio of its own on each side.
    pub towers: Towers,
}

impl Default for ClipAdapterConfig {
    fn default() -> Self {
        Self { ratio: 0.2, reduction: 4, towers: Towers::Vision }
    }
}

struct ClipAdapterPatch {
    adapters: HashMap<SiteId, [Tensor; 2]>,
    ratio: f64,
}

impl Method for ClipAdapter {
    const NAME: &'static str = "clip_adapter";
    const SOURCE: &'static str = "Gao et al. 2021 (arXiv 2110.04544), eq. 4 to 6: f* = α·relu(relu(f W₁) W₂) + (1 − α)·f";
    const INIT: Init = Init::Changes;
    type Config = ClipAdapterConfig;

    fn examples() -> Vec<ClipAdapterConfig> {
        vec![
            ClipAdapterConfig { reduction: 2, ..Default::default() },
            ClipAdapterConfig { ratio: 0.6, reduction: 1, towers: Towers::Both },
            ClipAdapterConfig { ratio: 1.0, reduction: 2, towers: Towers::Text },
        ]
    }

    fn plan(config: &ClipAdapterConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        if !(config.ratio > 0.0 && config.ratio <= 1.0) {
            return Err(Error::config("ratio", format!("expected a number above 0, at most 1, found {}", config.ratio)));
        }
        let selection = Selection { targets: None, towers: config.towers, layers: None };
        let mut adapters = HashMap::new();
        for (id, site) in selection.sites(sites, |k| matches!(k, SiteKind::Features { .. }))? {
            let SiteKind::Features { dim } = site.kind else { continue };
            if !(1..=dim).contains(&config.reduction) {
                let message = format!("expected 1 to {dim} (the features' width), found {}", config.reduction);
                return Err(Error::config("reduction", message));
            }
            let hidden = dim / config.reduction;
            let mut declare = |part: &str, shape: (usize, usize)| {
                let name = format!("base_model.model.{}.feature_adapter.{part}.weight", site.path);
                params.declare(Spec::new(name, shape, Start::KaimingUniform { fan_in: shape.1 }))
            };
            adapters.insert(id, [declare("down", (hidden, dim))?, declare("up", (dim, hidden))?]);
        }
        Ok(Box::new(ClipAdapterPatch { adapters, ratio: config.ratio }))
    }

    fn to_adapter_config(config: &ClipAdapterConfig, _sites: &Sites) -> Result<Value> {
        Ok(json!({ "peft_type": "CLIP_ADAPTER", "base_model_name_or_path": null, "config": config }))
    }

    fn from_adapter_config(value: &Value) -> Result<ClipAdapterConfig> {
        serde_json::from_value(value["config"].clone()).map_err(|e| Error::config("config", crate::wording::plain(&e.to_string())))
    }
}

impl Patch for ClipAdapterPatch {
    fn features(&self, at: SiteId, features: Tensor) -> TensorResult<Tensor> {
        let Some([down, up]) = self.adapters.get(&at) else { return Ok(features) };
        let dtype = features.dtype();
        let relu = |x: &Tensor, w: &Tensor| ops::activation(&ops::linear(x, &w.to_dtype(dtype)?, None)?, Activation::Relu);
        let adapted = relu(&relu(&features, down)?, up)?;
        (adapted * self.ratio)? + (features * (1.0 - self.ratio))?
    }

    fn unfoldable(&self) -> Option<&'static str> {
        Some("plain CLIP has no layers behind its projections")
    }

    fn fold(&self, _id: WeightId, _value: &Tensor) -> TensorResult<Fold> {
        Ok(Fold::Unchanged)
    }
}
