//! A LoRA of a fully fine-tuned checkpoint: what a rank can hold of the difference to its base.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use indexmap::IndexMap;
use peft_adapters::full::FullConfig;
use peft_adapters::low_rank::{LoraConfig, factor_names};
use peft_adapters::targets::Targets;
use peft_adapters::{MethodConfig, Patches, Site, SiteId, Step, linalg, scope};
use rayon::prelude::*;
use serde::Serialize;

use crate::clip::base::Base;
use crate::clip::method_error;
use crate::delta::{self, Adapters, BaseRef, Delta, Manifest};
use crate::error::{Error, Result};
use crate::merge::{max_abs, probe};

/// What to extract.
#[derive(Debug, Clone)]
pub struct ExtractOptions {
    /// What the checkpoint was before.
    pub base: String,
    /// What it has become.
    pub tuned: String,
    /// The rank; layers whose smaller dimension is less get that.
    pub rank: usize,
    /// Linear layers to look at; all when left out.
    pub targets: Option<Targets>,
    /// Whether every other tensor that has changed is saved whole, as `full` saves it.
    pub rest: bool,
    /// Where the adapter goes.
    pub output: PathBuf,
    /// Replace an adapter that exists.
    pub force: bool,
}

/// A linear layer that has changed.
#[derive(Debug, Clone, Serialize)]
pub struct Layer {
    /// Its path.
    pub path: String,
    /// The rank that it got.
    pub rank: usize,
    /// The share of the difference's Σσ² that this rank holds, from 0 to 1.
    pub energy: f64,
    /// The difference's Frobenius norm over the base weight's.
    pub change: f64,
}

/// A tensor that has changed and is no target.
#[derive(Debug, Clone, Serialize)]
pub struct Other {
    /// Its name.
    pub name: String,
    /// The difference's Frobenius norm over the base tensor's.
    pub change: f64,
}

/// What was extracted.
#[derive(Debug, Clone, Serialize)]
pub struct Extracted {
    /// Where.
    pub output: PathBuf,
    /// The rank.
    pub rank: usize,
    /// The layers in model order.
    pub layers: Vec<Layer>,
    /// The share that is held of all layers' differences together.
    pub energy: f64,
    /// What else has changed.
    pub rest: Vec<Other>,
    /// Whether the rest is in the adapter; it is lost otherwise.
    pub rest_saved: bool,
    /// Largest difference of a logit between base and checkpoint, relative to the largest logit.
    pub before: f64,
    /// The same between base + adapter, read back, and checkpoint.
    pub after: f64,
    /// Bytes of all files.
    pub adapter_bytes: u64,
}

/// A changed layer with its factors.
struct Cut {
    layer: Layer,
    a: Tensor,
    b: Tensor,
    kept: f64,
    whole: f64,
}

/// `peft extract`: B A is the nearest matrix of the rank to W_tuned − W_base (Eckart & Young 1936), B = U√σ, A = √σVᵀ, α = r.
///
/// # Errors
/// When the two are not of one shape, no target has changed, or the rank is 0.
pub fn extract(options: &ExtractOptions) -> Result<Extracted> {
    if options.rank == 0 {
        return Err(Error::input("--rank", "expected at least 1, found 0"));
    }
    delta::check_output(&options.output, options.force)?;
    let base = Base::load(&options.base, DType::F32, &Device::Cpu)?;
    let tuned = Base::load(&options.tuned, DType::F32, &Device::Cpu)?;
    check_shapes(options, &base, &tuned)?;
    let targets = options.targets.clone().unwrap_or_else(|| Targets::Pattern(Targets::ALL_LINEAR.into()));
    let wanted = LoraConfig { rank: options.rank, alpha: options.rank as f64, targets, ..LoraConfig::default() };
    let sites = wanted.scope().sites(base.clip.sites(), scope::linear).map_err(method_error)?;
    let cuts = sites.par_iter().map(|(_, site)| cut(&base, &tuned, site, options.rank)).collect::<Result<Vec<_>>>()?;
    let found: Vec<(SiteId, &Site, Cut)> = sites.iter().zip(cuts).filter_map(|((id, site), c)| Some((*id, *site, c?))).collect();
    if found.is_empty() {
        return Err(Error::input(&options.tuned, format!("none of the {} target layers differs from {}", sites.len(), options.base)));
    }
    let rest = rest(&base, &tuned, &found)?;
    let adapters = adapters(&base, &tuned, &wanted, &found, if options.rest { &rest } else { &[] }, found.len() == sites.len())?;
    let manifest = Manifest { version: env!("CARGO_PKG_VERSION").into(), base: BaseRef::of(&base, &options.base), ..Manifest::default() };
    let adapter_bytes = delta::save(&options.output, &adapters, base.clip.sites(), &manifest)?;
    let [before, after] = distances(&base, &tuned, &options.output)?;
    let (kept, whole) = found.iter().fold((0.0, 0.0), |(k, w), (_, _, c)| (k + c.kept, w + c.whole));
    Ok(Extracted {
        output: options.output.clone(),
        rank: options.rank,
        layers: found.into_iter().map(|(_, _, c)| c.layer).collect(),
        energy: kept / whole,
        rest,
        rest_saved: options.rest,
        before,
        after,
        adapter_bytes,
    })
}

/// One error for all tensors that are not in both, or not of one shape.
fn check_shapes(options: &ExtractOptions, base: &Base, tuned: &Base) -> Result<()> {
    let shapes = |b: &Base| b.clip.sites().weights().map(|(_, w)| (w.name.clone(), w.tensor.dims().to_vec())).collect::<IndexMap<_, _>>();
    let (ours, theirs) = (shapes(base), shapes(tuned));
    let wrong: Vec<String> = ours
        .iter()
        .filter(|(n, shape)| theirs.get(*n) != Some(*shape))
        .map(|(n, shape)| format!("{n}: {shape:?} in the base, {}", theirs.get(n).map_or("missing".into(), |s| format!("{s:?}"))))
        .collect();
    match wrong.first() {
        None if ours.len() == theirs.len() => Ok(()),
        None => Err(Error::input(&options.tuned, format!("has {} tensors, {} has {}", theirs.len(), options.base, ours.len()))),
        Some(first) => {
            Err(Error::input(&options.tuned, format!("{} tensors are not shaped as in {}, the first: {first}", wrong.len(), options.base))
                .hint("a LoRA is extracted from a checkpoint and the base that it was trained from"))
        }
    }
}

fn norm(t: &Tensor) -> Result<f64> {
    Ok(f64::from(t.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt())
}

/// W_base and W_tuned − W_base; nothing where they are the same.
fn difference(base: &Base, tuned: &Base, name: &str) -> Result<Option<(Tensor, Tensor)>> {
    let (Some((_, w)), Some((_, new))) = (base.clip.sites().weight(name), tuned.clip.sites().weight(name)) else { return Ok(None) };
    let change = (&new.tensor - &w.tensor)?;
    Ok((max_abs(&change)? > 0.0).then(|| (w.tensor.clone(), change)))
}

fn cut(base: &Base, tuned: &Base, site: &Site, rank: usize) -> Result<Option<Cut>> {
    let Some((w, change)) = difference(base, tuned, &format!("{}.weight", site.path))? else { return Ok(None) };
    let cut = linalg::cut(&change, rank).map_err(method_error)?;
    let root = cut.svd.s.sqrt()?;
    let (a, b) = (cut.svd.vt.broadcast_mul(&root.unsqueeze(1)?)?, cut.svd.u.broadcast_mul(&root)?);
    let change = cut.whole.sqrt() / norm(&w)?.max(1e-30);
    let layer = Layer { path: site.path.clone(), rank: a.dim(0)?, energy: cut.kept / cut.whole.max(1e-300), change };
    Ok(Some(Cut { layer, a, b, kept: cut.kept, whole: cut.whole }))
}

/// What has changed besides the layers.
fn rest(base: &Base, tuned: &Base, found: &[(SiteId, &Site, Cut)]) -> Result<Vec<Other>> {
    let held: std::collections::HashSet<String> = found.iter().map(|(_, site, _)| format!("{}.weight", site.path)).collect();
    let mut all = Vec::new();
    for (_, weight) in base.clip.sites().weights().filter(|(_, w)| !held.contains(&w.name)) {
        if let Some((w, change)) = difference(base, tuned, &weight.name)? {
            all.push(Other { name: weight.name.clone(), change: norm(&change)? / norm(&w)?.max(1e-30) });
        }
    }
    Ok(all)
}

/// The planned and filled adapter: a LoRA, and whole tensors beside it.
fn adapters(
    base: &Base,
    tuned: &Base,
    wanted: &LoraConfig,
    found: &[(SiteId, &Site, Cut)],
    rest: &[Other],
    every: bool,
) -> Result<Adapters> {
    let mut config = wanted.clone();
    if !every {
        config.targets = Targets::Names(found.iter().map(|(_, site, _)| site.path.clone()).collect());
    }
    for (_, site, cut) in found.iter().filter(|(_, _, c)| c.layer.rank != wanted.rank) {
        config.rank_pattern.insert(site.path.clone(), cut.layer.rank);
        config.alpha_pattern.insert(site.path.clone(), cut.layer.rank as f64);
    }
    let mut methods = vec![MethodConfig::Lora(config)];
    if !rest.is_empty() {
        let names = Targets::Names(rest.iter().map(|o| o.name.clone()).collect());
        methods.push(MethodConfig::Full(FullConfig { targets: Some(names), ..FullConfig::default() }));
    }
    let adapters = Adapters::plan(&methods, base.clip.sites(), 0, &Device::Cpu)?;
    let mut values: IndexMap<String, &Tensor> =
        found.iter().flat_map(|(_, site, c)| factor_names(site).into_iter().zip([&c.a, &c.b])).collect();
    for other in rest {
        values.extend(tuned.clip.sites().weight(&other.name).map(|(_, w)| (other.name.clone(), &w.tensor)));
    }
    for param in adapters.params.iter() {
        let value = values.get(&param.name).ok_or_else(|| Error::fault(&param.name, "a parameter without a value"))?;
        param.var.set(value)?;
    }
    Ok(adapters)
}

/// How far logits of the base, and of the base with the adapter as it was written, are from the checkpoint's.
fn distances(base: &Base, tuned: &Base, adapter: &Path) -> Result<[f64; 2]> {
    let mut loaded = Delta::read(adapter)?.apply(&base.clip)?;
    loaded.view.prepare(&Step::eval())?;
    let expected = probe(&tuned.clip, &tuned.tokenizer, &Patches::none())?;
    let off = |patches: &Patches| -> Result<f64> {
        Ok(max_abs(&(probe(&base.clip, &base.tokenizer, patches)? - &expected)?)? / max_abs(&expected)?.max(1e-12))
    };
    Ok([off(&Patches::none())?, off(&loaded.view)?])
}
