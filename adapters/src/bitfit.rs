//! BitFit: the biases alone.

use std::collections::HashMap;

use candle_core::{Result as TensorResult, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::method::{Fold, Init, Method, Patch};
use crate::params::{Params, Spec, Start};
use crate::sites::{BaseWeight, Sites, WeightId};
use crate::targets::{Layers, Matcher, Targets, Towers};
use crate::{Error, Result};

/// See [`BitfitConfig`].
#[derive(Debug)]
pub struct Bitfit;

/// Options of BitFit.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BitfitConfig {
    /// Modules whose biases are trained: names or a regex over the whole path; all when left out, layer norms too. The paper's
    /// cheaper half is `[q_proj, fc1]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub targets: Option<Targets>,
    /// `vision`, `text` or `both`. `vision` keeps class prompts fixed.
    pub towers: Towers,
    /// Blocks: `[10, 11]`, `"6..12"` or `{ last: 2 }`; everything when left out. Only late blocks: faster, less capacity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
}

impl BitfitConfig {
    fn biases<'s>(&self, sites: &'s Sites) -> Result<Vec<(WeightId, &'s BaseWeight)>> {
        let matches = match &self.targets {
            Some(t) => t.matcher("targets")?,
            None => Box::new(|_: &str| Ok(true)) as Matcher,
        };
        let mut found = Vec::new();
        for (id, weight) in sites.weights() {
            let Some(module) = weight.name.strip_suffix(".bias") else { continue };
            let layers = self.layers.as_ref().map(|l| l.resolve("layers", sites.depth(weight.tower))).transpose()?;
            let in_layers = layers.is_none_or(|list| weight.layer.is_some_and(|l| list.contains(&l)));
            if self.towers.contains(weight.tower) && in_layers && matches(module)? {
                found.push((id, weight));
            }
        }
        if found.is_empty() {
            let asked = self.targets.as_ref().map_or("the selection".into(), ToString::to_string);
            let message = format!("{asked} matches no bias (towers: {})", self.towers);
            return Err(Error::NoSites { key: "targets".into(), message, sites: sites.summary(|s| crate::scope::linear(&s.kind)) });
        }
        Ok(found)
    }
}

impl Method for Bitfit {
    const NAME: &'static str = "bitfit";
    const SOURCE: &'static str = "Ben Zaken et al. 2022 (arXiv 2106.10199), section 3: b of Wx + b";
    const INIT: Init = Init::Identity;
    type Config = BitfitConfig;

    fn examples() -> Vec<BitfitConfig> {
        vec![
            BitfitConfig::default(),
            BitfitConfig { targets: Some(Targets::names(&["q_proj", "fc1"])), towers: Towers::Vision, layers: Some(Layers::List(vec![1])) },
        ]
    }

    fn plan(config: &BitfitConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        let mut trained = HashMap::new();
        for (id, weight) in config.biases(sites)? {
            let name = format!("base_model.model.{}", weight.name);
            trained.insert(id, params.declare(Spec::new(name, weight.tensor.shape(), Start::Value(weight.tensor.clone())))?);
        }
        Ok(Box::new(BitfitPatch { trained }))
    }

    fn to_adapter_config(config: &BitfitConfig, _sites: &Sites) -> Result<Value> {
        Ok(json!({ "peft_type": "BITFIT", "base_model_name_or_path": null, "config": config }))
    }

    fn from_adapter_config(value: &Value) -> Result<BitfitConfig> {
        serde_json::from_value(value["config"].clone()).map_err(|e| Error::config("config", crate::wording::plain(&e.to_string())))
    }
}

struct BitfitPatch {
    trained: HashMap<WeightId, Tensor>,
}

impl Patch for BitfitPatch {
    fn weight(&self, id: WeightId, value: Tensor) -> TensorResult<Tensor> {
        match self.trained.get(&id) {
            Some(bias) => bias.to_dtype(value.dtype()),
            None => Ok(value),
        }
    }

    fn fold(&self, _id: WeightId, _value: &Tensor) -> TensorResult<Fold> {
        // `weight` says it all.
        Ok(Fold::Unchanged)
    }
}
