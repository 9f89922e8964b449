//! CoOp: learnt vectors in place of the words around class names.

use candle_core::{Result as TensorResult, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::context::{self, ClassPosition, Layout, Replaced};
use crate::flow::Embedded;
use crate::method::{Fold, Init, Method, Patch};
use crate::params::{Params, Spec, Start};
use crate::sites::{SiteId, Sites, WeightId};
use crate::{Error, Result};

/// See [`CoopConfig`].
#[derive(Debug)]
pub struct Coop;

/// Options of CoOp. The vectors stand in place of the template's words in front of the class name; what follows the name stays.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CoopConfig {
    /// Learnt vectors, from 1 to what the context has room for. 4: better on classes that were not trained. 16: better on
    /// those that were, given examples enough. Words in `init` take its place.
    pub n_ctx: usize,
    /// Words to start from, such as "a photo of a": steadier with few examples. Random when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<String>,
    /// Standard deviation of a random start.
    pub init_std: f64,
    /// Vectors of its own for each class: more capacity, for specialised classes; other classes cannot be asked for later.
    pub class_specific: bool,
    /// Where the class name stands: `end`, `middle` (between the halves) or `front`.
    pub position: ClassPosition,
    /// The classes of a class-specific context. The task's when left out; a saved adapter says how many it holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classes: Option<usize>,
}

impl Default for CoopConfig {
    fn default() -> Self {
        Self { n_ctx: 16, init: None, init_std: 0.02, class_specific: false, position: ClassPosition::End, classes: None }
    }
}

struct CoopPatch {
    at: SiteId,
    /// [n, D], or [C, n, D] where each class has its own.
    context: Tensor,
    layout: Layout,
}

impl CoopConfig {
    /// `Some(count)` where each class has its own vectors.
    fn class_count(&self, sites: &Sites) -> Result<Option<usize>> {
        if !self.class_specific {
            return Ok(None);
        }
        match (self.classes.unwrap_or(0), sites.task().classes) {
            (0, 0) => Err(Error::config("class_specific", "needs a task with classes")),
            (held, asked) if held != 0 && asked != 0 && held != asked => {
                Err(Error::config("classes", format!("holds vectors for {held} classes, the task has {asked}")))
            }
            (held, asked) => Ok(Some(held.max(asked))),
        }
    }
}

impl Method for Coop {
    const NAME: &'static str = "coop";
    const SOURCE: &'static str = "Zhou et al. 2022 (arXiv 2109.01134), eq. 2: [V]₁ … [V]ₘ [CLASS]; eq. 3 in the middle";
    const INIT: Init = Init::Changes;
    type Config = CoopConfig;

    fn examples() -> Vec<CoopConfig> {
        let base = CoopConfig { n_ctx: 2, ..Default::default() };
        vec![
            base.clone(),
            CoopConfig { class_specific: true, classes: Some(3), position: ClassPosition::Middle, n_ctx: 3, ..base.clone() },
            CoopConfig { position: ClassPosition::Front, init_std: 0.2, ..base },
        ]
    }

    fn plan(config: &CoopConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        if !(config.init_std >= 0.0 && config.init_std.is_finite()) {
            return Err(Error::config("init_std", format!("expected a number from 0, found {}", config.init_std)));
        }
        let (at, dim, limit) = context::text_entrance(sites)?;
        let (count, start) = context::start(sites, config.n_ctx, config.init.as_deref(), config.init_std, false)?;
        let name = "base_model.model.text_model.embeddings.coop.ctx";
        let spec = match (config.class_count(sites)?, start) {
            (None, start) => Spec::new(name, (count, dim), start),
            (Some(classes), Start::Value(words)) => {
                let each = words.unsqueeze(0)?.broadcast_as((classes, count, dim))?.contiguous()?;
                Spec::new(name, (classes, count, dim), Start::Value(each))
            }
            (Some(classes), start) => Spec::new(name, (classes, count, dim), start),
        };
        let layout = Layout { count, position: config.position, replaced: Replaced::All, limit };
        Ok(Box::new(CoopPatch { at, context: params.declare(spec)?, layout }))
    }

    fn to_adapter_config(config: &CoopConfig, sites: &Sites) -> Result<Value> {
        let (n_ctx, _) = context::start(sites, config.n_ctx, config.init.as_deref(), 0.0, false)?;
        let saved = CoopConfig { n_ctx, init: None, classes: config.class_count(sites)?, ..config.clone() };
        Ok(json!({ "peft_type": "COOP", "base_model_name_or_path": null, "config": saved }))
    }

    fn from_adapter_config(value: &Value) -> Result<CoopConfig> {
        serde_json::from_value(value["config"].clone()).map_err(|e| Error::config("config", crate::wording::plain(&e.to_string())))
    }
}

impl Patch for CoopPatch {
    fn embed(&self, at: SiteId, texts: Embedded) -> TensorResult<Embedded> {
        if at != self.at {
            return Ok(texts);
        }
        let count = self.layout.count;
        if self.context.rank() == 2 {
            return context::insert(texts, &self.context, |_| 0, &self.layout);
        }
        let (classes, _, dim) = self.context.dims3()?;
        let owner: Vec<usize> = texts.names.iter().map(|n| n.class as usize).collect();
        if owner.len() != texts.x.dim(0)? || owner.iter().any(|c| *c >= classes) {
            candle_core::bail!("class-specific context knows its {classes} classes only");
        }
        context::insert(texts, &self.context.reshape((classes * count, dim))?, |b| owner[b] * count, &self.layout)
    }

    fn class_bound(&self) -> bool {
        self.context.rank() == 3
    }

    fn reorder_classes(&self, _name: &str, tensor: &Tensor, order: &[u32]) -> TensorResult<Option<Tensor>> {
        if !self.class_bound() || tensor.rank() != 3 {
            return Ok(None);
        }
        tensor.index_select(&Tensor::new(order, tensor.device())?, 0).map(Some)
    }

    fn unfoldable(&self) -> Option<&'static str> {
        Some("context vectors are not words of plain CLIP's vocabulary")
    }

    fn fold(&self, _id: WeightId, _value: &Tensor) -> TensorResult<Fold> {
        Ok(Fold::Unchanged)
    }
}
