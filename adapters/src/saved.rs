//! Base weights that are trained beside an update: HF PEFT's `modules_to_save` and `bias`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use candle_core::{Result as TensorResult, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::params::{Params, Spec, Start};
use crate::sites::{BaseWeight, Sites, Tower, WeightId};
use crate::{Error, Result, hf};

/// Which biases are trained beside an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bias {
    /// None: the base stays as it is where the adapter is taken off.
    #[default]
    None,
    /// All of the model's, layer norms' included.
    All,
    /// Those of the layers that have an update; HF PEFT's `lora_only`.
    #[serde(alias = "vera_only")]
    LoraOnly,
}

impl Bias {
    /// HF PEFT's value, where `method` is `lora` or `vera`.
    #[must_use]
    pub fn to_json(self, method: &str) -> Value {
        match self {
            Self::None => "none".into(),
            Self::All => "all".into(),
            Self::LoraOnly => format!("{method}_only").into(),
        }
    }

    /// Reads HF PEFT's field.
    ///
    /// # Errors
    /// When the value is another.
    pub fn read(object: &Map<String, Value>) -> Result<Self> {
        Ok(hf::field(object, "bias")?.unwrap_or_default())
    }
}

/// The values that stand for base weights.
#[derive(Debug, Default)]
pub struct Saved {
    trained: HashMap<WeightId, (String, Tensor)>,
}

impl Saved {
    /// Declares every weight of the modules that end in one of `modules`, then biases; `adapted` are the paths with updates.
    ///
    /// # Errors
    /// When a name matches no module, or another method trains the same.
    pub fn plan(modules: &[String], bias: Bias, adapted: &[&str], sites: &Sites, params: &mut Params) -> Result<Self> {
        let mut saved = Self::default();
        for module in modules {
            saved.module(module, sites, params)?;
        }
        for (id, weight) in sites.weights() {
            let Some(owner) = weight.name.strip_suffix(".bias") else { continue };
            let updated = adapted.contains(&owner);
            if bias == Bias::All || (bias == Bias::LoraOnly && updated) {
                // HF PEFT wraps a layer that has an update; the bias then stands inside.
                let inside = if updated { ".base_layer" } else { "" };
                saved.declare(id, weight, format!("base_model.model.{owner}{inside}.bias"), params)?;
            }
        }
        Ok(saved)
    }

    /// Trains one more weight, saved as `name`.
    ///
    /// # Errors
    /// When another method trains the same.
    pub fn declare(&mut self, id: WeightId, weight: &BaseWeight, name: String, params: &mut Params) -> Result<()> {
        if let Entry::Vacant(free) = self.trained.entry(id) {
            let spec = Spec::new(name.clone(), weight.tensor.shape(), Start::Value(weight.tensor.clone()));
            free.insert((name, params.declare(spec)?));
        }
        Ok(())
    }

    fn module(&mut self, module: &str, sites: &Sites, params: &mut Params) -> Result<()> {
        let mut any = false;
        for (id, weight) in sites.weights() {
            let owner = weight.name.rsplit_once('.').map_or("", |(owner, _)| owner);
            // A module above the owner counts too: `mlp` saves `mlp.fc1.weight`. HF PEFT compares ends of paths and not of words:
            // `projection` means `visual_projection` and `text_projection`.
            if ends_of(owner).any(|path| path.ends_with(module)) {
                any = true;
                self.declare(id, weight, format!("base_model.model.{}", weight.name), params)?;
            }
        }
        if any {
            return Ok(());
        }
        Err(Error::NoSites {
            key: "modules_to_save".into(),
            message: format!("`{module}` matches no module"),
            sites: sites.summary(|s| s.tower != Tower::Shared),
        })
    }

    /// The tensors for [`crate::Patch::export`].
    pub fn export(&self) -> impl Iterator<Item = (String, Tensor)> {
        self.trained.values().cloned()
    }

    /// For [`crate::Patch::weight`].
    ///
    /// # Errors
    /// When the dtype cannot be converted.
    pub fn weight(&self, id: WeightId, value: Tensor) -> TensorResult<Tensor> {
        match self.trained.get(&id) {
            Some((_, w)) => w.to_dtype(value.dtype()),
            None => Ok(value),
        }
    }
}

/// A module's path and those of all that it lies in.
fn ends_of(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('.').map(|(at, _)| &path[..at]).chain([path])
}

/// The base weight that a parameter of an adapter file stands for, if it stands for one.
#[must_use]
pub fn base_name(parameter: &str) -> String {
    let name = parameter.strip_prefix("base_model.model.").unwrap_or(parameter);
    [".base_layer", ".ln_tuning_layers"].iter().fold(name.to_string(), |name, part| name.replace(part, ""))
}
