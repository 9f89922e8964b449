//! LoRA: low-rank updates of linear layers, in HF PEFT's terms and file format.

use std::collections::HashMap;

use candle_core::{Result as TensorResult, Tensor};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::flow::{LinearOut, LowRankTerm};
use crate::method::{Fold, Init, Method, Patch, Step};
use crate::params::{Params, Spec, Start};
use crate::rng;
use crate::sites::{Site, SiteId, SiteKind, Sites, Tower, WeightId};
use crate::targets::{Layers, Selection, Targets, Towers, full_regex, is_suffix, matches_whole};
use crate::{Error, Result};

/// See [`LoraConfig`].
#[derive(Debug)]
pub struct Lora;

/// Options of LoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// Rank r, from 1 to the smaller dimension of every target. Higher: more accurate, more memory, larger file.
    pub rank: usize,
    /// α: the update is scaled by α/r (α/√r under rsLoRA). Higher: acts like a higher learning rate.
    pub alpha: f64,
    /// Probability in [0, 1) with which inputs of A are dropped in training. Higher: more regularised.
    pub dropout: f64,
    /// Linear sites: a list of names or a regex over the whole path. More targets: more capacity, slower steps.
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
    /// Modules whose own weights are trained and saved beside the update, such as `visual_projection`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub modules_to_save: Vec<String>,
    /// Modules to leave out of the targets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude: Option<Targets>,
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
            modules_to_save: Vec::new(),
            exclude: None,
        }
    }
}

/// Beyond any use, and far from what overflows.
const MAX_ALPHA: f64 = 1e9;

/// HF PEFT's rule: the key, as a regex, matches the whole path or what follows a dot.
fn pattern_value<T: Copy>(key: &str, patterns: &IndexMap<String, T>, path: &str) -> Result<Option<T>> {
    for (pattern, value) in patterns {
        if matches_whole(key, &full_regex(key, &format!("(?:.*\\.)?(?:{pattern})"))?, path)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

impl LoraConfig {
    fn check(&self) -> Result<()> {
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::config("dropout", format!("expected a probability in [0, 1), found {}", self.dropout)));
        }
        let alphas = self.alpha_pattern.iter().map(|(k, a)| (format!("alpha_pattern.{k}"), *a));
        for (key, alpha) in std::iter::once(("alpha".to_string(), self.alpha)).chain(alphas) {
            if !(alpha > 0.0 && alpha <= MAX_ALPHA) {
                return Err(Error::config(key, format!("expected a number above 0 and at most {MAX_ALPHA}, found {alpha}")));
            }
        }
        Ok(())
    }

    /// The rank and the scale at a site.
    fn rank_and_scale(&self, site: &Site, input: usize, output: usize) -> Result<(usize, f64)> {
        let rank = pattern_value("rank_pattern", &self.rank_pattern, &site.path)?.unwrap_or(self.rank);
        let alpha = pattern_value("alpha_pattern", &self.alpha_pattern, &site.path)?.unwrap_or(self.alpha);
        if rank == 0 || rank > input.min(output) {
            return Err(Error::config(
                "rank",
                format!("expected 1 to {} at {} [{output}, {input}], found {rank}", input.min(output), site.path),
            ));
        }
        let divisor = if self.rslora { (rank as f64).sqrt() } else { rank as f64 };
        Ok((rank, alpha / divisor))
    }

    fn targets<'s>(&self, sites: &'s Sites) -> Result<Vec<(SiteId, &'s Site)>> {
        let selection = Selection { targets: Some(&self.targets), towers: self.towers, layers: self.layers.as_ref() };
        let mut found = selection.sites(sites, |k| matches!(k, SiteKind::Linear { .. }))?;
        if let Some(exclude) = &self.exclude {
            let excluded = exclude.matcher("exclude")?;
            let mut kept = Vec::with_capacity(found.len());
            for target in found {
                if !excluded(&target.1.path)? {
                    kept.push(target);
                }
            }
            found = kept;
        }
        // A module that is trained whole needs no update as well, nor what is inside it; HF PEFT does the same.
        found.retain(|(_, s)| !self.modules_to_save.iter().any(|m| is_inside(&s.path, m)));
        if found.is_empty() {
            return Err(Error::config("exclude", "`exclude` and `modules_to_save` leave no target"));
        }
        Ok(found)
    }
}

impl Method for Lora {
    const NAME: &'static str = "lora";
    const SOURCE: &'static str = "Hu et al. 2021 (arXiv 2106.09685), eq. 3: h = W₀x + (α/r)·BAx";
    const INIT: Init = Init::Identity;
    type Config = LoraConfig;

    fn examples() -> Vec<LoraConfig> {
        let base = LoraConfig { rank: 4, alpha: 8.0, ..Default::default() };
        vec![
            base.clone(),
            LoraConfig {
                targets: Targets::Pattern(r".*\.(fc1|fc2|out_proj)".into()),
                rslora: true,
                towers: Towers::Vision,
                layers: Some(Layers::List(vec![1])),
                ..base.clone()
            },
            LoraConfig {
                targets: Targets::names(&["q_proj", "fc1", "visual_projection", "text_projection"]),
                rank_pattern: IndexMap::from([("fc1".into(), 2)]),
                alpha_pattern: IndexMap::from([("layers.0.self_attn.q_proj".into(), 3.0)]),
                ..base.clone()
            },
            LoraConfig { modules_to_save: vec!["visual_projection".into(), "post_layernorm".into()], ..base },
        ]
    }

    fn plan(config: &LoraConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        config.check()?;
        let mut patch = LoraPatch {
            terms: HashMap::new(),
            by_weight: HashMap::new(),
            saved: HashMap::new(),
            dropout: config.dropout,
            step: Step::eval(),
        };
        for (id, site) in config.targets(sites)? {
            let SiteKind::Linear { input, output } = site.kind else { continue };
            let (rank, scale) = config.rank_and_scale(site, input, output)?;
            let name = |part: &str| format!("base_model.model.{}.{part}.weight", site.path);
            let a = params.declare(Spec::new(name("lora_A"), (rank, input), Start::KaimingUniform { fan_in: input }))?;
            let b = params.declare(Spec::new(name("lora_B"), (output, rank), Start::Zeros))?;
            if let Some((weight, _)) = sites.weight(&format!("{}.weight", site.path)) {
                patch.by_weight.insert(weight, id);
            }
            patch.terms.insert(id, Term { a, b, scale });
        }
        for module in &config.modules_to_save {
            patch.save_module(module, sites, params)?;
        }
        Ok(Box::new(patch))
    }

    fn to_adapter_config(config: &LoraConfig, sites: &Sites) -> Result<Value> {
        // HF PEFT knows no towers and counts layers across both, so the targets are
        // written out wherever names alone would hit more than what was trained.
        let chosen: Vec<_> = config.targets(sites)?.into_iter().map(|(_, s)| s.path.clone()).collect();
        let targets = match &config.targets {
            Targets::Names(names) if names_select(names, sites, &chosen) => json!(names),
            _ => json!(chosen),
        };
        Ok(json!({
            "alpha_pattern": config.alpha_pattern,
            "auto_mapping": {
                "base_model_class": "CLIPModel",
                "parent_library": "transformers.models.clip.modeling_clip",
            },
            "base_model_name_or_path": null,
            "bias": "none",
            "exclude_modules": null,
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_to_transform": null,
            "lora_alpha": number(config.alpha),
            "lora_dropout": config.dropout,
            "modules_to_save": if config.modules_to_save.is_empty() { Value::Null } else { json!(config.modules_to_save) },
            "peft_type": "LORA",
            "r": config.rank,
            "rank_pattern": config.rank_pattern,
            "revision": null,
            "target_modules": targets,
            "task_type": null,
            "use_dora": false,
            "use_rslora": config.rslora,
        }))
    }

    fn from_adapter_config(value: &Value) -> Result<LoraConfig> {
        let object = value.as_object().ok_or_else(|| Error::config("adapter_config.json", "expected an object"))?;
        refuse_unimplemented(object)?;
        let optional = |key: &str| object.get(key).filter(|v| !v.is_null());
        Ok(LoraConfig {
            rank: field(object, "r")?.unwrap_or(8),
            alpha: field(object, "lora_alpha")?.unwrap_or(8.0),
            dropout: field(object, "lora_dropout")?.unwrap_or(0.0),
            targets: field(object, "target_modules")?
                .ok_or_else(|| Error::config("target_modules", "expected a list of names or a regex"))?,
            towers: Towers::Both,
            layers: match optional("layers_to_transform") {
                Some(Value::Number(n)) => {
                    let layer =
                        n.as_u64().ok_or_else(|| Error::config("layers_to_transform", format!("expected a layer from 0, found {n}")))?;
                    Some(Layers::List(vec![layer as usize]))
                }
                Some(_) => field(object, "layers_to_transform")?.map(Layers::List),
                None => None,
            },
            rank_pattern: field(object, "rank_pattern")?.unwrap_or_default(),
            alpha_pattern: field(object, "alpha_pattern")?.unwrap_or_default(),
            rslora: field(object, "use_rslora")?.unwrap_or(false),
            modules_to_save: field(object, "modules_to_save")?.unwrap_or_default(),
            exclude: field(object, "exclude_modules")?,
        })
    }
}

/// Whether HF PEFT, given these names, would pick exactly the chosen sites.
fn names_select(names: &[String], sites: &Sites, chosen: &[String]) -> bool {
    sites
        .iter()
        .filter(|(_, s)| matches!(s.kind, SiteKind::Linear { .. }))
        .all(|(_, s)| names.iter().any(|n| is_suffix(&s.path, n)) == chosen.contains(&s.path))
}

/// Whether `path` is the module or lies inside it.
fn is_inside(path: &str, module: &str) -> bool {
    path.match_indices('.').map(|(at, _)| &path[..at]).chain([path]).any(|p| is_suffix(p, module))
}

/// Whole numbers are written without a fraction, as HF PEFT does.
fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}

fn field<T: serde::de::DeserializeOwned>(object: &Map<String, Value>, key: &str) -> Result<Option<T>> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(v) => serde_json::from_value(v.clone()).map(Some).map_err(|e| Error::config(key, e.to_string())),
    }
}

/// Fields that change the result and that are not implemented here.
fn refuse_unimplemented(object: &Map<String, Value>) -> Result<()> {
    const HONOURED: &[&str] = &[
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "layers_to_transform",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "modules_to_save",
        "exclude_modules",
        "peft_type",
        // These describe provenance, initialisation or the runtime; they do not change the result.
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "peft_version",
        "runtime_config",
        "ephemeral_gpu_offload",
        "loftq_config",
        "eva_config",
        "megatron_core",
        "qalora_group_size",
        "ensure_weight_tying",
    ];
    check_init(object.get("init_lora_weights"))?;
    check_layers_pattern(object.get("layers_pattern"))?;
    for (key, value) in object.iter().filter(|(k, _)| !["init_lora_weights", "layers_pattern"].contains(&k.as_str())) {
        let is_default = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Object(o) => o.is_empty(),
            Value::Array(a) => a.is_empty(),
            Value::String(s) => s.is_empty() || (key == "bias" && s == "none") || (key == "megatron_core"),
            _ => false,
        };
        if !is_default && !HONOURED.contains(&key.as_str()) {
            return Err(Error::config(key, format!("{value} is not implemented here; expected the default")));
        }
    }
    Ok(())
}

/// Some initialisations change the base's weights too, which the adapter's files do not hold.
fn check_init(value: Option<&Value>) -> Result<()> {
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

/// CLIP's blocks stand in `layers`.
fn check_layers_pattern(value: Option<&Value>) -> Result<()> {
    let fits = |v: &Value| v.as_str().is_some_and(|s| s.is_empty() || s == "layers");
    match value {
        None | Some(Value::Null) => Ok(()),
        Some(Value::Array(all)) if all.iter().all(fits) => Ok(()),
        Some(v) if fits(v) => Ok(()),
        Some(other) => Err(Error::config("layers_pattern", format!("expected `layers`, found {other}"))),
    }
}

struct Term {
    a: Tensor,
    b: Tensor,
    scale: f64,
}

struct LoraPatch {
    terms: HashMap<SiteId, Term>,
    by_weight: HashMap<WeightId, SiteId>,
    saved: HashMap<WeightId, Tensor>,
    dropout: f64,
    step: Step,
}

impl LoraPatch {
    /// HF PEFT's `modules_to_save`: every weight of the modules that end in `module`.
    fn save_module(&mut self, module: &str, sites: &Sites, params: &mut Params) -> Result<()> {
        let mut any = false;
        for (id, weight) in sites.weights() {
            let owner = weight.name.rsplit_once('.').map_or("", |(owner, _)| owner);
            // A module above the owner counts too: `mlp` saves `mlp.fc1.weight`.
            let inside = is_inside(owner, module);
            if inside && !self.saved.contains_key(&id) {
                let name = format!("base_model.model.{}", weight.name);
                let spec = Spec::new(name, weight.tensor.shape(), Start::Value(weight.tensor.clone()));
                self.saved.insert(id, params.declare(spec)?);
            }
            any |= inside;
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

    fn mask(&self, at: SiteId, x: &Tensor) -> TensorResult<Option<Tensor>> {
        if !self.step.training || self.dropout == 0.0 {
            return Ok(None);
        }
        let mut rng = rng::rng(self.step.seed, &[self.step.step, at.index() as u64, rng::name_key("lora")]);
        rng::dropout_mask(&mut rng, self.dropout, x.shape(), x.dtype(), x.device()).map(Some)
    }
}

impl Patch for LoraPatch {
    fn prepare(&mut self, step: &Step) -> TensorResult<()> {
        self.step = *step;
        Ok(())
    }

    fn weight(&self, id: WeightId, value: Tensor) -> TensorResult<Tensor> {
        match self.saved.get(&id) {
            Some(w) => w.to_dtype(value.dtype()),
            None => Ok(value),
        }
    }

    fn linear(&self, at: SiteId, y: LinearOut) -> TensorResult<LinearOut> {
        let Some(term) = self.terms.get(&at) else { return Ok(y) };
        let dtype = y.x().dtype();
        let dropout = self.mask(at, y.x())?;
        y.low_rank(LowRankTerm { a: term.a.to_dtype(dtype)?, b: term.b.to_dtype(dtype)?, scale: term.scale, dropout })
    }

    fn fold(&self, id: WeightId, value: &Tensor) -> TensorResult<Fold> {
        let Some(term) = self.by_weight.get(&id).and_then(|site| self.terms.get(site)) else {
            return Ok(Fold::Unchanged);
        };
        let delta = (term.b.detach().matmul(&term.a.detach())? * term.scale)?;
        Ok(Fold::Replace((value + delta.to_dtype(value.dtype())?)?))
    }
}
