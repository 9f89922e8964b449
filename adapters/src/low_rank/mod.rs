//! What LoRA and its relatives share: options, factors, hooks and HF PEFT's file format.

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::saved::Bias;
use crate::scope::Scope;
use crate::sites::{Site, SiteId, SiteKind, Sites};
use crate::targets::{Layers, Targets, Towers, full_regex, matches_whole};
use crate::{Error, Result, hf};

mod factors;
mod patch;
mod residual;

pub use factors::{Factor, Factors, dropout_mask, factor_names, matrix};
pub use patch::LowRankPatch;
pub use residual::ResidualPatch;

/// Options of LoRA and its relatives.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// Rank r, from 1 to the smaller dimension of every target. Higher: more accurate, more memory, larger file.
    pub rank: usize,
    /// α: the update is scaled by α/r (α/√r under rsLoRA). Higher: acts like a higher learning rate.
    pub alpha: f64,
    /// Probability in [0, 1) with which inputs of A are dropped in training. Higher: more regularised.
    pub dropout: f64,
    /// Linear layers, `patch_embedding`, `token_embedding` or `position_embedding`: a list of names, a regex over the whole
    /// path, or `all-linear`. More targets: more capacity, slower steps.
    pub targets: Targets,
    /// `vision`, `text` or `both`. One tower alone is faster; `vision` keeps class prompts fixed.
    pub towers: Towers,
    /// Blocks: `[10, 11]`, `"6..12"` or `{ last: 2 }`; all when left out. Only late blocks: faster, less capacity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
    /// Other ranks for some sites: a key matches a path's end (or is a regex for it), the first match wins.
    #[serde(skip_serializing_if = "IndexMap::is_empty")]
    pub rank_pattern: IndexMap<String, usize>,
    /// Other alphas for some sites.
    #[serde(skip_serializing_if = "IndexMap::is_empty")]
    pub alpha_pattern: IndexMap<String, f64>,
    /// Scale by α/√r (Kalajdzievski 2023): keeps the update's size independent of the rank.
    pub rslora: bool,
    /// B's learning rate over A's, above 0 (LoRA+, Hayou et al. 2024). Left out: 1, and 16 for `lora_plus`. Higher: B learns
    /// faster, often in fewer steps; lower `train.lr` with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_ratio: Option<f64>,
    /// `none`, `all` or `lora_only`: biases that are trained too, all of the model's or those of the targets.
    #[serde(skip_serializing_if = "is_default")]
    pub bias: Bias,
    /// Modules whose own weights are trained and saved beside the update, such as `visual_projection`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub modules_to_save: Vec<String>,
    /// Modules to leave out of the targets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude: Option<Targets>,
}

/// For `skip_serializing_if`.
pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 16.0,
            dropout: 0.0,
            targets: Targets::names(&["q_proj", "k_proj", "v_proj"]),
            towers: Towers::Both,
            layers: None,
            rank_pattern: IndexMap::new(),
            alpha_pattern: IndexMap::new(),
            rslora: false,
            lr_ratio: None,
            bias: Bias::None,
            modules_to_save: Vec::new(),
            exclude: None,
        }
    }
}

/// Beyond any use, and far from what overflows.
const MAX_ALPHA: f64 = 1e9;

/// Checks a probability of dropping.
///
/// # Errors
/// When it is outside [0, 1).
pub fn check_dropout(key: &str, dropout: f64) -> Result<()> {
    match (0.0..1.0).contains(&dropout) {
        true => Ok(()),
        false => Err(Error::config(key, format!("expected a probability in [0, 1), found {dropout}"))),
    }
}

/// Checks a number that has to be above 0.
///
/// # Errors
/// When it is not.
pub fn check_positive(key: &str, value: f64) -> Result<()> {
    match value > 0.0 && value <= MAX_ALPHA {
        true => Ok(()),
        false => Err(Error::config(key, format!("expected a number above 0 and at most {MAX_ALPHA}, found {value}"))),
    }
}

/// HF PEFT's rule: the key, as a regex, matches the whole path or what follows a dot; the first match wins.
///
/// # Errors
/// When a key is no regex.
pub fn pattern_value<T: Copy>(key: &str, patterns: &IndexMap<String, T>, path: &str) -> Result<Option<T>> {
    for (pattern, value) in patterns {
        if matches_whole(key, &full_regex(key, &format!("(?:.*\\.)?(?:{pattern})"))?, path)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

/// A note for each key of a pattern that none of `targets` answers to: HF PEFT ignores it without a word.
///
/// # Errors
/// When a key is no regex.
pub fn idle_patterns<T: Copy>(key: &str, patterns: &IndexMap<String, T>, targets: &[(SiteId, &Site)]) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    for (pattern, value) in patterns {
        let one = IndexMap::from([(pattern.clone(), *value)]);
        let mut used = false;
        for (_, site) in targets {
            used |= pattern_value(key, &one, &site.path)?.is_some();
        }
        if !used {
            notes.push(format!("{key}: `{pattern}` matches no target and changes nothing"));
        }
    }
    Ok(notes)
}

/// Whether LoRA can sit here.
#[must_use]
pub fn takes(kind: &SiteKind) -> bool {
    matches!(kind, SiteKind::Linear { .. } | SiteKind::Conv { .. } | SiteKind::Embedding { .. })
}

impl LoraConfig {
    /// Ranges that need no model.
    ///
    /// # Errors
    /// With the first value that is outside.
    pub fn check(&self) -> Result<()> {
        check_dropout("dropout", self.dropout)?;
        check_positive("alpha", self.alpha)?;
        self.alpha_pattern.iter().try_for_each(|(k, a)| check_positive(&format!("alpha_pattern.{k}"), *a))?;
        self.lr_ratio.map_or(Ok(()), |ratio| check_positive("lr_ratio", ratio))
    }

    /// Where the updates go.
    #[must_use]
    pub fn scope(&self) -> Scope<'_> {
        Scope {
            targets: &self.targets,
            towers: self.towers,
            layers: self.layers.as_ref(),
            exclude: self.exclude.as_ref(),
            modules_to_save: &self.modules_to_save,
        }
    }

    /// The rank and the scale at a site whose matrix is [output, input].
    ///
    /// # Errors
    /// When the rank is 0 or above `most` of the matrix.
    pub fn rank_and_scale(&self, site: &Site, input: usize, output: usize, most: usize) -> Result<(usize, f64)> {
        let rank = pattern_value("rank_pattern", &self.rank_pattern, &site.path)?.unwrap_or(self.rank);
        let alpha = pattern_value("alpha_pattern", &self.alpha_pattern, &site.path)?.unwrap_or(self.alpha);
        if rank == 0 || rank > most {
            return Err(Error::config("rank", format!("expected 1 to {most} at {} [{output}, {input}], found {rank}", site.path)));
        }
        let divisor = if self.rslora { (rank as f64).sqrt() } else { rank as f64 };
        Ok((rank, alpha / divisor))
    }

    /// `adapter_config.json` of HF PEFT's LORA.
    ///
    /// # Errors
    /// When nothing is selected.
    pub fn to_adapter_config(&self, sites: &Sites, dora: bool) -> Result<Value> {
        let mut fields = self.scope().fields(sites, takes)?;
        let own = json!({
            "alpha_pattern": self.alpha_pattern.iter().map(|(k, a)| (k.clone(), hf::number(*a))).collect::<Map<_, _>>(),
            "bias": self.bias.to_json("lora"),
            "fan_in_fan_out": false,
            "init_lora_weights": true,
            "lora_alpha": hf::number(self.alpha),
            "lora_dropout": self.dropout,
            "r": self.rank,
            "rank_pattern": self.rank_pattern,
            "use_dora": dora,
            "use_rslora": self.rslora,
        });
        if let (Value::Object(fields), Value::Object(own)) = (&mut fields, own) {
            fields.extend(own);
        }
        Ok(hf::config("LORA", fields))
    }

    /// Reads HF PEFT's LORA back; `use_dora` is the caller's.
    ///
    /// # Errors
    /// When a field is malformed or asks for what is not implemented.
    pub fn from_adapter_config(value: &Value) -> Result<Self> {
        const OWN: &[&str] = &[
            "r",
            "lora_alpha",
            "lora_dropout",
            "rank_pattern",
            "alpha_pattern",
            "use_rslora",
            "use_dora",
            "bias",
            "init_lora_weights",
            "loftq_config",
            "eva_config",
        ];
        let object = hf::object(value)?;
        check_init(object.get("init_lora_weights"))?;
        hf::refuse_others(object, &[OWN, hf::ScopeFields::KEYS].concat())?;
        let scope = hf::ScopeFields::read(object)?;
        Ok(Self {
            rank: hf::field(object, "r")?.unwrap_or(8),
            alpha: hf::field(object, "lora_alpha")?.unwrap_or(8.0),
            dropout: hf::field(object, "lora_dropout")?.unwrap_or(0.0),
            targets: scope.targets,
            towers: scope.towers,
            layers: scope.layers,
            rank_pattern: hf::field(object, "rank_pattern")?.unwrap_or_default(),
            alpha_pattern: hf::field(object, "alpha_pattern")?.unwrap_or_default(),
            rslora: hf::field(object, "use_rslora")?.unwrap_or(false),
            lr_ratio: None,
            bias: Bias::read(object)?,
            modules_to_save: scope.modules_to_save,
            exclude: scope.exclude,
        })
    }
}

/// Whether a configuration is HF PEFT's LORA, with or without DoRA.
#[must_use]
pub fn is_lora(config: &Value, dora: bool) -> bool {
    let kind = config.get("peft_type").and_then(Value::as_str).unwrap_or_default();
    kind.eq_ignore_ascii_case("LORA") && config.get("use_dora").and_then(Value::as_bool).unwrap_or(false) == dora
}

/// Some initialisations change the base's weights too, which the adapter's files do not hold.
pub(crate) fn check_init(value: Option<&Value>) -> Result<()> {
    match value {
        None | Some(Value::Null | Value::Bool(_)) => Ok(()),
        Some(Value::String(s)) if ["gaussian", "eva", "orthogonal"].contains(&s.as_str()) => Ok(()),
        Some(other) => Err(Error::config(
            "init_lora_weights",
            format!(
                "expected true, false, gaussian, eva or orthogonal, found {other}: such adapters belong to changed base weights; \
                 save them in HF PEFT with path_initial_model_for_weight_conversion, which makes plain LoRA of them"
            ),
        )),
    }
}
