//! `peft inspect`: what is in a base, an adapter, a run or a recipe.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use serde::Serialize;
use serde_json::{Value, json};

use crate::clip::base::Base;
use crate::clip::spec::Spec;
use crate::delta::{Delta, Manifest, bundled, is_clip_lora, locate};
use crate::error::{Error, Result};
use crate::files;
use crate::hub;
use crate::recipe::Recipe;
use crate::run;
use crate::sign;

/// One row of a listing.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Tensor or site, layers collapsed to `{i}`.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// How many there are.
    pub count: usize,
}

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub struct Inspected {
    /// `base`, `adapter`, `run`, `recipe`.
    pub kind: &'static str,
    /// What there is to say, in order.
    pub facts: serde_json::Map<String, Value>,
    /// Tensors.
    pub tensors: Vec<Row>,
}

/// Finds out what `path` is and describes it.
///
/// # Errors
/// When it is none of the four kinds, or broken.
pub fn inspect(path: &str) -> Result<Inspected> {
    let spec = Spec::parse(path)?;
    let place = Path::new(&spec.name);
    if place.join("adapter_config.json").exists() || place.join("peft.json").exists() || (place.is_file() && is_clip_lora(place)) {
        return adapter(place);
    }
    let holds = |name: &str| place.join(name).exists();
    let checkpoint = place.is_file() && place.extension().is_some_and(|e| CHECKPOINTS.iter().any(|c| e == *c));
    if path.starts_with("builtin:") || holds("config.json") || holds("open_clip_config.json") || checkpoint {
        return base(path);
    }
    if !place.exists()
        && let Some(repo) = hub::Repo::parse(&spec.name)
    {
        let is_adapter = hub::Snapshot::open(&repo)?.get("adapter_config.json", &mut |_| Ok(()))?.is_some();
        return if is_adapter { adapter(place) } else { base(path) };
    }
    if place.is_dir() && place.join("recipe.yaml").exists() {
        return run_dir(place);
    }
    if place.is_file() && place.extension().is_some_and(|e| e == "yaml" || e == "yml") {
        return recipe(place);
    }
    match place.exists() {
        true => Err(Error::input(path, "is neither a base, an adapter, a run nor a recipe")),
        false => Err(Error::input(path, "no such file or directory").hint("name a base, an adapter, a run directory or a recipe")),
    }
}

/// Computes every digest anew: an adapter's or a run's files are compared with `B3SUMS` where there is one, and with `keys` its
/// signature is checked; a bundle's adapters with `bundle.json`. Says what was checked.
///
/// # Errors
/// When something has changed, or is not signed by one of the keys.
pub fn verify(path: &str, keys: &[sign::PublicKey]) -> Result<Vec<String>> {
    let mut checked = Vec::new();
    let place = locate(Path::new(path)).unwrap_or_else(|_| PathBuf::from(path));
    let place = if place.join("recipe.yaml").exists() { place.join("adapter") } else { place };
    let adapter = place.join("peft.json").exists() || place.join("adapter_config.json").exists();
    if adapter && (place.join(sign::SUMS).exists() || !keys.is_empty()) {
        let count = sign::verify(&place, keys)?;
        let signed =
            if keys.is_empty() { "; the signature was not checked, which takes --trusted-key" } else { ", signed by a trusted key" };
        checked.push(format!("{count} files are what {} says{signed}", sign::SUMS));
    }
    if adapter {
        let delta = Delta::read(&place)?;
        let digests = delta.manifest.as_ref().map_or(0, |m| m.methods.len());
        checked.push(format!("{} tensors are finite; {digests} digests in peft.json hold", delta.check_finite()?));
    } else {
        let adapters = bundled(path)?;
        for dir in &adapters {
            if !keys.is_empty() {
                sign::verify(dir, keys)?;
            }
        }
        checked.push(format!("the weights were read and hashed; {} bundled adapters are what bundle.json says", adapters.len()));
    }
    Ok(checked)
}

/// What checkpoint files are called.
const CHECKPOINTS: [&str; 5] = ["pt", "pth", "bin", "ckpt", "safetensors"];

fn facts(pairs: &[(&str, Value)]) -> serde_json::Map<String, Value> {
    pairs.iter().map(|(k, v)| ((*k).to_string(), v.clone())).collect()
}

/// Rows in order, equal names and shapes counted.
fn rows<'t>(tensors: impl Iterator<Item = (&'t str, &'t [usize])>) -> Vec<Row> {
    let mut all: Vec<Row> = Vec::new();
    for (name, shape) in tensors {
        let name = name.split('.').map(|p| if p.bytes().all(|b| b.is_ascii_digit()) { "{i}" } else { p }).collect::<Vec<_>>().join(".");
        match all.iter_mut().find(|r| r.name == name && r.shape == shape) {
            Some(row) => row.count += 1,
            None => all.push(Row { name, shape: shape.to_vec(), count: 1 }),
        }
    }
    all
}

fn base(spec: &str) -> Result<Inspected> {
    let base = Base::load(spec, DType::F32, &Device::Cpu)?;
    let (config, sites) = (base.clip.config(), base.clip.sites());
    let (v, t) = (&config.vision, &config.text);
    let tower = |dim: usize, depth: usize, heads: usize| format!("{depth} blocks, width {dim}, {heads} heads");
    let adapters: Vec<Value> = bundled(spec)?.iter().map(|dir| Ok(json!(adapter(dir)?.facts))).collect::<Result<_>>()?;
    let linear = sites.summary(|s| matches!(s.kind, peft_adapters::SiteKind::Linear { .. }));
    Ok(Inspected {
        kind: "base",
        facts: facts(&[
            ("parameters", json!(sites.count())),
            ("dtype", json!(base.file_dtype.as_str())),
            ("digest", json!(base.digest)),
            ("tokenizer", json!(base.tokenizer.digest())),
            (
                "vision",
                json!(format!(
                    "{}, {} px in patches of {}",
                    tower(v.hidden_size, v.num_hidden_layers, v.num_attention_heads),
                    v.image_size,
                    v.patch_size
                )),
            ),
            (
                "text",
                json!(format!(
                    "{}, {} tokens of {}",
                    tower(t.hidden_size, t.num_hidden_layers, t.num_attention_heads),
                    t.max_position_embeddings,
                    t.vocab_size
                )),
            ),
            ("projection", json!(config.projection_dim)),
            ("linear_sites", json!(linear)),
        ])
        .into_iter()
        .chain((!adapters.is_empty()).then(|| ("adapters".to_string(), json!(adapters))))
        .collect(),
        tensors: rows(sites.weights().map(|(_, w)| (w.name.as_str(), w.tensor.dims()))),
    })
}

fn adapter(dir: &Path) -> Result<Inspected> {
    let delta = Delta::read(&locate(dir)?)?;
    let methods: Vec<&str> = delta.methods.iter().map(|(m, _)| m.name()).collect();
    let tensors: Vec<_> = delta.methods.iter().flat_map(|(_, t)| t).chain(&delta.own).collect();
    let manifest = delta.manifest.clone().unwrap_or_default();
    let Manifest { base, task, classes, templates, metrics, version, .. } = manifest;
    let configs: Vec<_> = delta.methods.iter().map(|(m, _)| json!(m)).collect();
    Ok(Inspected {
        kind: "adapter",
        facts: facts(&[
            ("methods", json!(methods)),
            ("parameters", json!(tensors.iter().map(|(_, t)| t.elem_count()).sum::<usize>())),
            ("bytes", json!(files::dir_size(dir))),
            ("config", json!(configs)),
            ("base", json!(base.name)),
            ("base_digest", json!(base.digest)),
            ("task", task),
            ("classes", json!(classes)),
            ("templates", json!(templates)),
            ("metrics", metrics),
            ("written_by", json!(version)),
        ]),
        tensors: rows(tensors.iter().map(|(n, t)| (n.as_str(), t.dims()))),
    })
}

fn run_dir(dir: &Path) -> Result<Inspected> {
    let recipe = run::read_recipe(dir)?;
    let mut all = facts(&[("recipe", json!(recipe))]);
    match run::read_report(dir)? {
        None => {
            all.insert("state".into(), json!("unfinished"));
        }
        Some(report) => {
            all.insert("state".into(), json!("finished"));
            for (key, e) in [("before", &report.before), ("after", &report.after)] {
                all.insert(key.into(), json!(e.as_ref().map(|e| &e.metrics)));
            }
            all.insert("seconds".into(), json!(report.seconds));
            all.insert("trainable_parameters".into(), json!(report.trainable_parameters));
            all.insert("adapter_bytes".into(), json!(report.adapter_bytes));
        }
    }
    Ok(Inspected { kind: "run", facts: all, tensors: Vec::new() })
}

fn recipe(path: &Path) -> Result<Inspected> {
    let recipe = Recipe::load(path, &[])?;
    Ok(Inspected { kind: "recipe", facts: facts(&[("recipe", json!(recipe))]), tensors: Vec::new() })
}
