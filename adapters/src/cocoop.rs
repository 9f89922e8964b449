//! CoCoOp: learnt vectors in place of the words in front of class names, which each image shifts.

use candle_core::{Result as TensorResult, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::context::{self, ClassPosition, Layout, Replaced};
use crate::flow::Embedded;
use crate::method::{Fold, Init, Method, Patch};
use crate::ops::{self, Activation};
use crate::params::{Params, Spec, Start};
use crate::sites::{SiteId, SiteKind, Sites, Tower, WeightId};
use crate::{Error, Result};

/// See [`CocoopConfig`].
#[derive(Debug)]
pub struct Cocoop;

/// Options of CoCoOp. Every class prompt is encoded for every image, B × C texts a batch: small batches, as the authors' 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CocoopConfig {
    /// Learnt vectors, from 1 to what the context has room for. Higher: more capacity, longer texts. Words in `init` take its place.
    pub n_ctx: usize,
    /// Words to start from, such as the authors' "a photo of a". Random when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<String>,
    /// Standard deviation of a random start.
    pub init_std: f64,
    /// The meta-net's hidden width is the feature's width divided by this, at least 1. Higher: fewer parameters.
    pub reduction: usize,
}

impl Default for CocoopConfig {
    fn default() -> Self {
        Self { n_ctx: 4, init: None, init_std: 0.02, reduction: 16 }
    }
}

struct CocoopPatch {
    at: SiteId,
    /// [n, D].
    context: Tensor,
    /// h(x): two layers with biases.
    meta: [(Tensor, Tensor); 2],
    layout: Layout,
}

impl Method for Cocoop {
    const NAME: &'static str = "cocoop";
    const SOURCE: &'static str = "Zhou et al. 2022 (arXiv 2203.05557), eq. 3: vₘ(x) = vₘ + h(x)";
    const INIT: Init = Init::Changes;
    type Config = CocoopConfig;

    fn examples() -> Vec<CocoopConfig> {
        let base = CocoopConfig { n_ctx: 2, reduction: 4, ..Default::default() };
        vec![base.clone(), CocoopConfig { n_ctx: 3, reduction: 2, ..base }]
    }

    fn plan(config: &CocoopConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        if !(config.init_std >= 0.0 && config.init_std.is_finite()) {
            return Err(Error::config("init_std", format!("expected a number from 0, found {}", config.init_std)));
        }
        let width = sites.iter().find_map(|(_, s)| match s.kind {
            SiteKind::Features { dim } if s.tower == Tower::Vision => Some(dim),
            _ => None,
        });
        let width = width.ok_or_else(|| Error::config("method", "context that follows the image needs an image tower"))?;
        if !(1..=width).contains(&config.reduction) {
            return Err(Error::config("reduction", format!("expected 1 to {width} (the features' width), found {}", config.reduction)));
        }
        let (at, dim, limit) = context::text_entrance(sites)?;
        let (count, start) = context::start(sites, config.n_ctx, config.init.as_deref(), config.init_std, false)?;
        let hidden = width / config.reduction;
        let mut declare = |part: &str, shape: &[usize], start| {
            params.declare(Spec::new(format!("base_model.model.text_model.embeddings.cocoop.{part}"), shape, start))
        };
        let uniform = |fan_in| Start::KaimingUniform { fan_in };
        Ok(Box::new(CocoopPatch {
            at,
            context: declare("ctx", &[count, dim], start)?,
            meta: [
                (
                    declare("meta_net.linear1.weight", &[hidden, width], uniform(width))?,
                    declare("meta_net.linear1.bias", &[hidden], uniform(width))?,
                ),
                (
                    declare("meta_net.linear2.weight", &[dim, hidden], uniform(hidden))?,
                    declare("meta_net.linear2.bias", &[dim], uniform(hidden))?,
                ),
            ],
            layout: Layout { count, position: ClassPosition::End, replaced: Replaced::All, limit },
        }))
    }

    fn to_adapter_config(config: &CocoopConfig, sites: &Sites) -> Result<Value> {
        let (n_ctx, _) = context::start(sites, config.n_ctx, config.init.as_deref(), 0.0, false)?;
        let saved = CocoopConfig { n_ctx, init: None, ..config.clone() };
        Ok(json!({ "peft_type": "COCOOP", "base_model_name_or_path": null, "config": saved }))
    }

    fn from_adapter_config(value: &Value) -> Result<CocoopConfig> {
        serde_json::from_value(value["config"].clone()).map_err(|e| Error::config("config", crate::wording::plain(&e.to_string())))
    }
}

impl Patch for CocoopPatch {
    fn embed(&self, at: SiteId, texts: Embedded) -> TensorResult<Embedded> {
        if at != self.at {
            return Ok(texts);
        }
        // Without an image (a probe of what is constant) the context stands as it is.
        let Some(images) = texts.images.clone() else { return context::insert(texts, &self.context, |_| 0, &self.layout) };
        let [(down, a), (up, b)] = &self.meta;
        let h = ops::linear(&images.to_dtype(down.dtype())?, down, Some(a))?;
        let shift = ops::linear(&ops::activation(&h, Activation::Relu)?, up, Some(b))?;
        let (count, dim) = self.context.dims2()?;
        let shifted = self.context.unsqueeze(0)?.broadcast_add(&shift.unsqueeze(1)?)?;
        let rows = shifted.dim(0)?;
        context::insert(texts, &shifted.reshape((rows * count, dim))?, |b| b * count, &self.layout)
    }

    fn per_image(&self) -> bool {
        true
    }

    fn unfoldable(&self) -> Option<&'static str> {
        Some("plain CLIP's texts do not depend on the image")
    }

    fn fold(&self, _id: WeightId, _value: &Tensor) -> TensorResult<Fold> {
        Ok(Fold::Unchanged)
    }
}
