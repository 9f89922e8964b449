//! HF PEFT's `adapter_config.json`: what its methods' files have in common.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::targets::{Layers, Targets, Towers};
use crate::{Error, Result};

/// Fields of every method that describe provenance or the runtime; they do not change the result.
const PROVENANCE: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "ephemeral_gpu_offload",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

/// The configuration as an object.
///
/// # Errors
/// When it is none.
pub fn object(value: &Value) -> Result<&Map<String, Value>> {
    value.as_object().ok_or_else(|| Error::config("adapter_config.json", "expected an object"))
}

/// A field that may be missing or null.
///
/// # Errors
/// When it is of another type.
pub fn field<T: DeserializeOwned>(object: &Map<String, Value>, key: &str) -> Result<Option<T>> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(v) => serde_json::from_value(v.clone()).map(Some).map_err(|e| Error::config(key, crate::wording::plain(&e.to_string()))),
    }
}

/// Whole numbers are written without a fraction, as HF PEFT does.
#[must_use]
pub fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}

/// `null` for what is empty, as HF PEFT has it.
#[must_use]
pub fn list_or_null(list: &[String]) -> Value {
    if list.is_empty() { Value::Null } else { json!(list) }
}

/// A configuration of `peft_type` with `fields` and what every configuration holds, sorted as HF PEFT sorts it.
#[must_use]
pub fn config(peft_type: &str, fields: Value) -> Value {
    let mut all = json!({
        "auto_mapping": { "base_model_class": "CLIPModel", "parent_library": "transformers.models.clip.modeling_clip" },
        "base_model_name_or_path": null,
        "inference_mode": true,
        "peft_type": peft_type,
        "revision": null,
        "task_type": null,
    });
    if let (Value::Object(all), Value::Object(fields)) = (&mut all, fields) {
        all.extend(fields);
        all.sort_keys();
    }
    all
}

/// Refuses fields that change the result and are not among those that a method honours, unless they hold their default.
///
/// # Errors
/// With the first such field.
pub fn refuse_others(object: &Map<String, Value>, honoured: &[&str]) -> Result<()> {
    for (key, value) in object {
        let is_default = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Object(o) => o.is_empty(),
            Value::Array(a) => a.is_empty(),
            Value::String(s) => s.is_empty(),
            Value::Number(_) | Value::Bool(true) => false,
        };
        if !is_default && !honoured.contains(&key.as_str()) && !PROVENANCE.contains(&key.as_str()) {
            return Err(Error::config(key, format!("{value} is not implemented here; expected the default")));
        }
    }
    Ok(())
}

/// The fields that say where a method works.
#[derive(Debug)]
pub struct ScopeFields {
    /// `target_modules`.
    pub targets: Targets,
    /// `layers_to_transform`.
    pub layers: Option<Layers>,
    /// `exclude_modules`.
    pub exclude: Option<Targets>,
    /// `modules_to_save`.
    pub modules_to_save: Vec<String>,
    /// HF PEFT knows no towers, but the class of the model that was adapted.
    pub towers: Towers,
}

impl ScopeFields {
    /// The names of the fields.
    pub const KEYS: &'static [&'static str] =
        &["target_modules", "layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save"];

    /// Reads them.
    ///
    /// # Errors
    /// When one is malformed or `target_modules` is missing.
    pub fn read(object: &Map<String, Value>) -> Result<Self> {
        check_layers_pattern(object.get("layers_pattern"))?;
        let layers = match object.get("layers_to_transform") {
            Some(Value::Number(n)) => {
                let layer =
                    n.as_u64().ok_or_else(|| Error::config("layers_to_transform", format!("expected a layer from 0, found {n}")))?;
                Some(Layers::List(vec![layer as usize]))
            }
            _ => field(object, "layers_to_transform")?.map(Layers::List),
        };
        Ok(Self {
            targets: field(object, "target_modules")?
                .ok_or_else(|| Error::config("target_modules", "expected a list of names or a regex"))?,
            layers,
            exclude: field(object, "exclude_modules")?,
            modules_to_save: field(object, "modules_to_save")?.unwrap_or_default(),
            towers: towers(object),
        })
    }
}

/// HF PEFT notes the class of the model that was adapted: where it is one of CLIP's encoders alone, the other one stays as it is.
#[must_use]
pub fn towers(object: &Map<String, Value>) -> Towers {
    let class = object.get("auto_mapping").and_then(|m| m.get("base_model_class")).and_then(Value::as_str).unwrap_or_default();
    match class {
        c if c.starts_with("CLIPVision") => Towers::Vision,
        c if c.starts_with("CLIPText") => Towers::Text,
        _ => Towers::Both,
    }
}

/// CLIP's blocks stand in `encoder.layers`; HF PEFT takes any end of that path, or several, of which one has to match.
fn check_layers_pattern(value: Option<&Value>) -> Result<()> {
    let fits = |v: &Value| v.as_str().is_some_and(|s| matches!(s, "" | "layers" | "encoder.layers"));
    match value {
        None | Some(Value::Null) => Ok(()),
        Some(Value::Array(all)) if all.is_empty() || all.iter().any(fits) && all.iter().all(Value::is_string) => Ok(()),
        Some(v) if fits(v) => Ok(()),
        Some(other) => Err(Error::config("layers_pattern", format!("expected `layers` or `encoder.layers`, found {other}"))),
    }
}
