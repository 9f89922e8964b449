//! Full fine-tuning: base weights themselves are trained, all or some of them.

use std::collections::HashMap;

use candle_core::{Result as TensorResult, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::method::{Fold, Init, Method, Patch};
use crate::params::{Params, Spec, Start};
use crate::sites::{BaseWeight, Sites, Tower, WeightId};
use crate::targets::{Layers, Matcher, Targets, Towers};
use crate::{Error, Result};

/// See [`FullConfig`].
#[derive(Debug)]
pub struct Full;

/// Options of full fine-tuning.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FullConfig {
    /// Modules or tensors by name (list of suffixes, or a regex over the whole name); all when left out. Bare parameters too:
    /// `[logit_scale]`, `[class_embedding]`; beside another method, `full` with such a list trains them along.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub targets: Option<Targets>,
    /// `vision`, `text` or `both`; `both` includes projections and logit scale.
    pub towers: Towers,
    /// Blocks: `[10, 11]`, `"6..12"` or `{ last: 2 }`. Weights outside blocks are then left frozen,
    /// but for `last`, which also trains what comes after the blocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
}

impl FullConfig {
    fn selects(&self, sites: &Sites) -> Result<Vec<WeightId>> {
        let matches = match &self.targets {
            Some(t) => t.matcher("targets")?,
            None => Box::new(|_: &str| Ok(true)) as Matcher,
        };
        let layers = |tower| self.layers.as_ref().map(|l| l.resolve("layers", sites.depth(tower))).transpose();
        let (vision, text) = (layers(Tower::Vision)?, layers(Tower::Text)?);
        let in_layers = |w: &BaseWeight| {
            let wanted = if w.tower == Tower::Text { &text } else { &vision };
            match (wanted, w.layer) {
                (None, _) => true,
                (Some(list), Some(layer)) => list.contains(&layer),
                (Some(_), None) => matches!(self.layers, Some(Layers::Last(_))) && is_after_blocks(&w.name),
            }
        };
        let mut found = Vec::new();
        for (id, w) in sites.weights().filter(|(_, w)| self.towers.contains(w.tower) && in_layers(w)) {
            if matches(&w.name)? || matches(module_of(&w.name))? {
                found.push(id);
            }
        }
        if found.is_empty() {
            return Err(Error::NoSites {
                key: "targets".into(),
                message: format!(
                    "{} matches no weight (towers: {}{})",
                    self.targets.as_ref().map_or("the selection".into(), ToString::to_string),
                    self.towers,
                    self.layers.as_ref().map(|l| format!(", layers: {l}")).unwrap_or_default()
                ),
                sites: sites.summary(|_| true),
            });
        }
        Ok(found)
    }
}

/// What follows the blocks on the way to the features.
fn is_after_blocks(name: &str) -> bool {
    ["post_layernorm", "final_layer_norm", "visual_projection", "text_projection", "logit_scale"].iter().any(|part| name.contains(part))
}

fn module_of(name: &str) -> &str {
    name.strip_suffix(".weight").or_else(|| name.strip_suffix(".bias")).unwrap_or(name)
}

impl Method for Full {
    const NAME: &'static str = "full";
    const SOURCE: &'static str = "W' = W + ΔW with ΔW unconstrained";
    const INIT: Init = Init::Identity;
    type Config = FullConfig;

    fn examples() -> Vec<FullConfig> {
        vec![
            FullConfig::default(),
            FullConfig { layers: Some(Layers::Last(crate::targets::Last { last: 1 })), ..Default::default() },
            FullConfig { targets: Some(Targets::names(&["visual_projection", "mlp.fc1"])), ..Default::default() },
            FullConfig { targets: Some(Targets::names(&["logit_scale", "class_embedding"])), ..Default::default() },
        ]
    }

    fn plan(config: &FullConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        let selected = config.selects(sites)?;
        let all: Vec<_> = sites.weights().collect();
        let mut trained = HashMap::new();
        for id in selected {
            let weight = all[id.index()].1;
            let spec = Spec::new(&weight.name, weight.tensor.shape(), Start::Value(weight.tensor.clone()));
            trained.insert(id, params.declare(spec)?);
        }
        Ok(Box::new(FullPatch { trained }))
    }

    fn to_adapter_config(config: &FullConfig, _sites: &Sites) -> Result<Value> {
        Ok(json!({ "peft_type": "FULL", "config": config }))
    }

    fn from_adapter_config(value: &Value) -> Result<FullConfig> {
        serde_json::from_value(value["config"].clone()).map_err(|e| Error::config("config", crate::wording::plain(&e.to_string())))
    }
}

struct FullPatch {
    trained: HashMap<WeightId, Tensor>,
}

impl Patch for FullPatch {
    fn weight(&self, id: WeightId, value: Tensor) -> TensorResult<Tensor> {
        match self.trained.get(&id) {
            Some(w) => w.to_dtype(value.dtype()),
            None => Ok(value),
        }
    }

    fn replaces(&self, id: WeightId) -> bool {
        self.trained.contains_key(&id)
    }

    fn fold(&self, _id: WeightId, _value: &Tensor) -> TensorResult<Fold> {
        // `weight` says it all.
        Ok(Fold::Unchanged)
    }
}
