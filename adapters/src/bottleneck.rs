//! Bottleneck adapters: a narrow MLP beside or behind a block's branches.

use std::collections::HashMap;

use candle_core::{Result as TensorResult, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::flow::Branch;
use crate::method::{Fold, Init, Method, Patch};
use crate::ops::{self, Activation};
use crate::params::{Params, Spec, Start};
use crate::sites::{SiteId, SiteKind, Sites, WeightId};
use crate::targets::{Layers, Selection, Towers};
use crate::{Error, Result};

/// See [`BottleneckConfig`].
#[derive(Debug)]
pub struct Bottleneck;

/// Options of bottleneck adapters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BottleneckConfig {
    /// `houlsby`: behind attention and MLP. `pfeiffer`: behind the MLP only, half the parameters.
    /// `parallel`: beside the MLP, from its normed input.
    pub placement: Placement,
    /// The hidden width is the model's width divided by this, at least 1. Higher: fewer parameters.
    pub reduction: usize,
    /// `relu`, `gelu`, `quick_gelu`, `gelu_tanh`, `silu`, `tanh` or `identity`.
    pub activation: Activation,
    /// Multiplies the adapter's output. Higher: acts like a higher learning rate.
    pub scale: f64,
    /// `vision`, `text` or `both`. `vision` keeps class prompts fixed.
    pub towers: Towers,
    /// Blocks: `[10, 11]`, `"6..12"` or `{ last: 2 }`; all when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
}

/// Where the adapters sit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// Houlsby et al. 2019.
    Houlsby,
    /// Pfeiffer et al. 2020.
    Pfeiffer,
    /// He et al. 2021.
    Parallel,
}

impl Default for BottleneckConfig {
    fn default() -> Self {
        Self { placement: Placement::Pfeiffer, reduction: 16, activation: Activation::Relu, scale: 1.0, towers: Towers::Both, layers: None }
    }
}

struct Narrow {
    down: (Tensor, Tensor),
    up: (Tensor, Tensor),
}

struct BottleneckPatch {
    adapters: HashMap<SiteId, Narrow>,
    parallel: bool,
    activation: Activation,
    scale: f64,
}

impl Method for Bottleneck {
    const NAME: &'static str = "bottleneck";
    const SOURCE: &'static str =
        "Houlsby et al. 2019 (arXiv 1902.00751), h + s·U f(D h); parallel: He et al. 2021 (arXiv 2110.04366), h + s·U f(D x)";
    const INIT: Init = Init::Identity;
    type Config = BottleneckConfig;

    fn examples() -> Vec<BottleneckConfig> {
        let base = BottleneckConfig { reduction: 4, ..Default::default() };
        vec![
            base.clone(),
            BottleneckConfig { placement: Placement::Houlsby, activation: Activation::Gelu, ..base.clone() },
            BottleneckConfig {
                placement: Placement::Parallel,
                scale: 4.0,
                activation: Activation::Silu,
                layers: Some(Layers::List(vec![0])),
                ..base
            },
        ]
    }

    fn plan(config: &BottleneckConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        if config.reduction == 0 {
            return Err(Error::config("reduction", "expected at least 1, found 0"));
        }
        if !config.scale.is_finite() || config.scale == 0.0 {
            return Err(Error::config("scale", format!("expected a number other than 0, found {}", config.scale)));
        }
        let both = config.placement == Placement::Houlsby;
        let selection = Selection { targets: None, towers: config.towers, layers: config.layers.as_ref() };
        let found = selection.sites(sites, |k| matches!(k, SiteKind::Branch { mlp, .. } if *mlp || both))?;
        let mut adapters = HashMap::new();
        for (id, site) in found {
            let SiteKind::Branch { dim, .. } = site.kind else { continue };
            if config.reduction > dim {
                return Err(Error::config(
                    "reduction",
                    format!("expected 1 to {dim} at {} (its width), found {}", site.path, config.reduction),
                ));
            }
            let hidden = dim / config.reduction;
            let mut declare = |part: &str, shape: &[usize], start| {
                params.declare(Spec::new(format!("base_model.model.{}.{part}", site.path), shape, start))
            };
            let down = Start::KaimingUniform { fan_in: dim };
            adapters.insert(
                id,
                Narrow {
                    down: (declare("adapter_down.weight", &[hidden, dim], down)?, declare("adapter_down.bias", &[hidden], Start::Zeros)?),
                    up: (declare("adapter_up.weight", &[dim, hidden], Start::Zeros)?, declare("adapter_up.bias", &[dim], Start::Zeros)?),
                },
            );
        }
        let parallel = config.placement == Placement::Parallel;
        Ok(Box::new(BottleneckPatch { adapters, parallel, activation: config.activation, scale: config.scale }))
    }

    fn to_adapter_config(config: &BottleneckConfig, _sites: &Sites) -> Result<Value> {
        Ok(json!({ "peft_type": "BOTTLENECK", "base_model_name_or_path": null, "config": config }))
    }

    fn from_adapter_config(value: &Value) -> Result<BottleneckConfig> {
        serde_json::from_value(value["config"].clone()).map_err(|e| Error::config("config", e.to_string()))
    }
}

impl Patch for BottleneckPatch {
    fn branch(&self, at: SiteId, branch: Branch<'_>) -> TensorResult<Tensor> {
        let Some(Narrow { down, up }) = self.adapters.get(&at) else { return Ok(branch.output) };
        let x = if self.parallel { branch.input } else { &branch.output };
        let dtype = x.dtype();
        let cast = |t: &Tensor| t.to_dtype(dtype);
        let h = ops::linear(x, &cast(&down.0)?, Some(&cast(&down.1)?))?;
        let h = ops::activation(&h, self.activation)?;
        let y = ops::linear(&h, &cast(&up.0)?, Some(&cast(&up.1)?))?;
        let y = if self.scale == 1.0 { y } else { (y * self.scale)? };
        branch.output + y
    }

    fn unfoldable(&self) -> Option<&'static str> {
        Some("a bottleneck's non-linearity cannot be folded into plain CLIP's weights")
    }

    fn fold(&self, _id: WeightId, _value: &Tensor) -> TensorResult<Fold> {
        Ok(Fold::Unchanged)
    }
}
