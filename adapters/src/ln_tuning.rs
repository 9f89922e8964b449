//! Layer-norm tuning: the norms' own weights and biases.

use std::collections::HashSet;

use candle_core::{Result as TensorResult, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::method::{Fold, Init, Method, Patch};
use crate::params::Params;
use crate::saved::{Bias, Saved};
use crate::scope::{is_inside, target_modules};
use crate::sites::{Sites, WeightId};
use crate::targets::{Layers, Targets, Towers};
use crate::{Error, Result, hf};

/// See [`LnTuningConfig`].
#[derive(Debug)]
pub struct LnTuning;

/// Options of layer-norm tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LnTuningConfig {
    /// Modules whose weight and bias are trained: names or a regex over the whole path. The default is every layer norm.
    pub targets: Targets,
    /// `vision`, `text` or `both`. `vision` keeps class prompts fixed.
    pub towers: Towers,
    /// Blocks: `[10, 11]`, `"6..12"` or `{ last: 2 }`; everything when left out. Only late blocks: faster, less capacity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
    /// Further modules that are trained and saved, such as `visual_projection`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub modules_to_save: Vec<String>,
    /// Modules to leave out of the targets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude: Option<Targets>,
}

impl Default for LnTuningConfig {
    fn default() -> Self {
        Self {
            targets: Targets::names(&["layer_norm1", "layer_norm2", "pre_layrnorm", "post_layernorm", "final_layer_norm"]),
            towers: Towers::Both,
            layers: None,
            modules_to_save: Vec::new(),
            exclude: None,
        }
    }
}

/// Every module with a weight, in model order.
fn modules(sites: &Sites) -> Vec<&str> {
    sites.weights().filter_map(|(_, w)| w.name.strip_suffix(".weight")).collect()
}

impl LnTuningConfig {
    /// The chosen modules.
    fn chosen(&self, sites: &Sites) -> Result<Vec<String>> {
        let matches = self.targets.matcher("targets")?;
        let excluded = self.exclude.as_ref().map(|e| e.matcher("exclude")).transpose()?;
        let mut found = Vec::new();
        for (_, weight) in sites.weights() {
            let Some(module) = weight.name.strip_suffix(".weight") else { continue };
            let layers = self.layers.as_ref().map(|l| l.resolve("layers", sites.depth(weight.tower))).transpose()?;
            let in_layers = layers.is_none_or(|list| weight.layer.is_some_and(|l| list.contains(&l)));
            let left_out = excluded.as_ref().map_or(Ok(false), |e| e(module))?;
            let whole = self.modules_to_save.iter().any(|m| is_inside(module, m));
            if self.towers.contains(weight.tower) && in_layers && matches(module)? && !left_out && !whole {
                found.push(module.to_string());
            }
        }
        if found.is_empty() {
            let norms = modules(sites).into_iter().filter(|m| m.contains("norm")).map(ToString::to_string).collect();
            return Err(Error::NoSites { key: "targets".into(), message: format!("{} matches no module", self.targets), sites: norms });
        }
        Ok(found)
    }
}

impl Method for LnTuning {
    const NAME: &'static str = "ln_tuning";
    const SOURCE: &'static str = "Zhao et al. 2023 (arXiv 2312.11420): γ and β of (x − μ)/σ ∘ γ + β";
    const INIT: Init = Init::Identity;
    type Config = LnTuningConfig;

    fn examples() -> Vec<LnTuningConfig> {
        vec![
            LnTuningConfig::default(),
            LnTuningConfig {
                targets: Targets::Pattern(r".*layer_norm[12]".into()),
                towers: Towers::Vision,
                layers: Some(Layers::List(vec![1])),
                modules_to_save: vec!["visual_projection".into()],
                ..Default::default()
            },
        ]
    }

    fn plan(config: &LnTuningConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        let chosen: HashSet<String> = config.chosen(sites)?.into_iter().collect();
        let mut saved = Saved::plan(&config.modules_to_save, Bias::None, &[], sites, params)?;
        for (id, weight) in sites.weights() {
            let Some((module, part)) = weight.name.rsplit_once('.').filter(|(module, _)| chosen.contains(*module)) else { continue };
            saved.declare(id, weight, format!("base_model.model.{module}.ln_tuning_layers.{part}"), params)?;
        }
        Ok(Box::new(LnTuningPatch { saved }))
    }

    fn to_adapter_config(config: &LnTuningConfig, sites: &Sites) -> Result<Value> {
        let chosen = config.chosen(sites)?;
        Ok(hf::config(
            "LN_TUNING",
            json!({
                "exclude_modules": null,
                "modules_to_save": hf::list_or_null(&config.modules_to_save),
                "target_modules": target_modules(&config.targets, modules(sites).into_iter(), &chosen),
            }),
        ))
    }

    fn from_adapter_config(value: &Value) -> Result<LnTuningConfig> {
        let object = hf::object(value)?;
        hf::refuse_others(object, hf::ScopeFields::KEYS)?;
        let scope = hf::ScopeFields::read(object)?;
        Ok(LnTuningConfig {
            targets: scope.targets,
            towers: scope.towers,
            layers: scope.layers,
            modules_to_save: scope.modules_to_save,
            exclude: scope.exclude,
        })
    }
}

struct LnTuningPatch {
    saved: Saved,
}

impl Patch for LnTuningPatch {
    fn weight(&self, id: WeightId, value: Tensor) -> TensorResult<Tensor> {
        self.saved.weight(id, value)
    }

    fn fold(&self, _id: WeightId, _value: &Tensor) -> TensorResult<Fold> {
        // `weight` says it all.
        Ok(Fold::Unchanged)
    }
}
