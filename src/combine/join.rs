//! From factors of several adapters to those of one.

use std::collections::BTreeSet;

use candle_core::{Device, Tensor};
use indexmap::IndexMap;
use peft_adapters::low_rank::{Factor, LoraConfig, factor_names, matrix, takes};
use peft_adapters::targets::{Targets, Towers};
use peft_adapters::{MethodConfig, Site, SiteId, SiteKind, linalg};
use rayon::prelude::*;

use super::arithmetic::Task;
use super::{Combine, How, Masks, factors, lora};
use crate::clip::Clip;
use crate::delta::{Adapters, Delta};
use crate::error::{Error, Result};

/// One adapter made of several, planned for a model.
#[derive(Debug)]
pub struct Joined {
    /// A LoRA whose scale is 1 everywhere, or an IA³.
    pub adapters: Adapters,
    /// How many modules it changes.
    pub modules: usize,
    /// The share of Σσ² that decompositions have kept.
    pub energy: Option<f64>,
}

/// An adapter's factors by module.
struct Update<'a> {
    config: &'a LoraConfig,
    weight: f64,
    factors: IndexMap<SiteId, Factor>,
}

/// What a module gets: A [r, in], B [out, r], and what a decomposition kept of the whole.
struct Pair {
    a: Tensor,
    b: Tensor,
    kept: Option<(f64, f64)>,
}

/// HF PEFT's `add_weighted_adapter`: adapters with their weights as one LoRA of scale 1, or IA³ as one IA³. Modules that some
/// adapters leave alone get what the others say. One LoRA alone is scaled, whatever the mode.
///
/// # Errors
/// When an adapter is no plain LoRA (or not all are IA³) or holds more than its factors, ranks do not fit the mode, or a tensor
/// does not fit.
pub fn join(clip: &Clip, all: &[(Delta, f64)], how: &How, masks: &Masks<'_>) -> Result<Joined> {
    how.check()?;
    if let Some((_, weight)) = all.iter().find(|(_, w)| !w.is_finite()) {
        return Err(Error::input("--adapter", format!("expected a finite weight, found {weight}")));
    }
    if let Some(ia3) = factors::all_ia3(all) {
        return factors::sum(clip, &ia3, how.combine);
    }
    let updates = all.iter().map(|(delta, weight)| read(clip, delta, *weight)).collect::<Result<Vec<_>>>()?;
    let Some(first) = updates.first() else {
        return Err(Error::input("--combine", "expected at least one --adapter"));
    };
    let how = How { combine: if updates.len() == 1 { Combine::Linear } else { how.combine }, ..*how };
    let rank = rank(&updates, &how)?;
    let sites: Vec<(SiteId, &Site)> = clip.sites().iter().filter(|(id, _)| updates.iter().any(|u| u.factors.contains_key(id))).collect();
    // Decompositions take their time, and do not know each other.
    let made = sites.par_iter().map(|(id, site)| pair(&updates, *id, site, rank, &how, masks));
    let pairs: Vec<Pair> = made.collect::<Result<_>>()?;
    let config = config(first.config, &updates, &sites, &pairs, rank, clip)?;
    let adapters = Adapters::plan(&[MethodConfig::Lora(config)], clip.sites(), 0, &Device::Cpu)?;
    let named: IndexMap<String, &Tensor> =
        sites.iter().zip(&pairs).flat_map(|((_, site), p)| factor_names(site).into_iter().zip([&p.a, &p.b])).collect();
    for param in adapters.params.iter() {
        if let Some(value) = named.get(&param.name) {
            param.var.set(&value.reshape(param.var.shape())?)?;
        }
    }
    let (kept, whole) = pairs.iter().filter_map(|p| p.kept).fold((0.0, 0.0), |(k, w), (kept, all)| (k + kept, w + all));
    Ok(Joined { adapters, modules: sites.len(), energy: (whole > 0.0).then(|| kept / whole) })
}

/// The factors of a plain LoRA, which has to fit the model in every way.
fn read<'a>(clip: &Clip, delta: &'a Delta, weight: f64) -> Result<Update<'a>> {
    let place = delta.dir.display();
    let fold = "LoRA combines with LoRA, and IA³ with IA³; fold others with `peft merge`, which takes weights too";
    if let Some((name, _)) = delta.own.first() {
        return Err(Error::input(place, format!("has a task head ({name}), which cannot be combined")));
    }
    let [(method, _)] = delta.methods.as_slice() else {
        return Err(Error::input(place, format!("expected one LoRA, found {} methods", delta.methods.len())).hint(fold));
    };
    let Some(config) = lora(method) else {
        return Err(Error::input(place, format!("expected a LoRA, found {}", method.name())).hint(fold));
    };
    let adapters = delta.apply(clip)?;
    let named: IndexMap<&str, &Tensor> = adapters.params.iter().map(|p| (p.name.as_str(), p.var.as_tensor())).collect();
    let mut factors = IndexMap::new();
    for (id, site) in config.scope().sites(clip.sites(), takes).map_err(crate::clip::method_error)? {
        let [a, b] = factor_names(site);
        let (Some((input, output)), Some((weight, base)), Some(a), Some(b)) =
            (matrix(&site.kind), clip.sites().weight(&format!("{}.weight", site.path)), named.get(a.as_str()), named.get(b.as_str()))
        else {
            return Err(Error::fault(&site.path, "an update without factors"));
        };
        let (rank, scale) = config.rank_and_scale(site, input, output, input.min(output)).map_err(crate::clip::method_error)?;
        let (a, b) = (a.detach().reshape((rank, input))?, b.detach().reshape((output, rank))?);
        let embedding = matches!(site.kind, SiteKind::Embedding { .. });
        factors.insert(id, Factor { a, b, scale, weight, base: base.tensor.clone(), embedding });
    }
    if adapters.params.len() > 2 * factors.len() {
        let extra = adapters.params.iter().find(|p| !p.name.contains(".lora_")).map_or("", |p| p.name.as_str());
        let message = format!("holds more than low-rank factors (`{extra}`), and whole weights have no sum here");
        return Err(Error::input(place, message).hint(fold));
    }
    Ok(Update { config, weight, factors })
}

/// The new adapter's rank, as HF PEFT chooses it.
fn rank(updates: &[Update<'_>], how: &How) -> Result<usize> {
    let ranks: Vec<usize> = updates.iter().map(|u| u.config.rank_pattern.values().copied().fold(u.config.rank, usize::max)).collect();
    let most = ranks.iter().copied().max().unwrap_or_default();
    match how.combine {
        Combine::Cat => Ok(ranks.iter().sum()),
        mode if mode.decomposes() => Ok(how.svd_rank.unwrap_or(most)),
        _ if ranks.iter().all(|r| *r == most) => Ok(most),
        _ => Err(Error::input("--combine", format!("this mode adds factors, which takes equal ranks; found {ranks:?}"))
            .hint("cat and svd, and the modes that end in _svd, take any ranks")),
    }
}

fn pair(updates: &[Update<'_>], id: SiteId, site: &Site, rank: usize, how: &How, masks: &Masks<'_>) -> Result<Pair> {
    let mine: Vec<(usize, f64, &Factor)> =
        updates.iter().enumerate().filter_map(|(i, u)| Some((i, u.weight, u.factors.get(&id)?))).collect();
    match how.combine {
        Combine::Cat => beside(&mine, site, rank),
        mode if mode.decomposes() => decomposed(&mine, site, rank, how, masks),
        _ => added(&mine, site, how, masks),
    }
}

/// A = [w₁s₁A₁; w₂s₂A₂; 0], B = [B₁, B₂, 0].
fn beside(mine: &[(usize, f64, &Factor)], site: &Site, rank: usize) -> Result<Pair> {
    let mut down = mine.iter().map(|(_, w, f)| Ok((&f.a * (w * f.scale))?)).collect::<Result<Vec<_>>>()?;
    let mut up: Vec<Tensor> = mine.iter().map(|(_, _, f)| f.b.clone()).collect();
    let [input, output] = [down[0].dim(1)?, up[0].dim(0)?];
    if rank > input.min(output) {
        let message = format!("side by side the ranks come to {rank}, more than its smaller dimension {}", input.min(output));
        return Err(Error::input(&site.path, message).hint("use --combine svd"));
    }
    let held = mine.iter().map(|(_, _, f)| f.a.dim(0)).sum::<candle_core::Result<usize>>()?;
    if held < rank {
        down.push(down[0].zeros_like()?.narrow(0, 0, 1)?.repeat((rank - held, 1))?);
        up.push(up[0].zeros_like()?.narrow(1, 0, 1)?.repeat((1, rank - held))?);
    }
    Ok(Pair { a: Tensor::cat(&down, 0)?, b: Tensor::cat(&up, 1)?, kept: None })
}

/// A and B each by themselves, weighted by √|w·s|; A takes the sign.
fn added(mine: &[(usize, f64, &Factor)], site: &Site, how: &How, masks: &Masks<'_>) -> Result<Pair> {
    let rule = how.rule();
    let join = |name: &str, of: &dyn Fn(&Factor) -> &Tensor, signed: bool| -> Result<Tensor> {
        let shape = of(mine[0].2).shape();
        if let Some((_, _, other)) = mine.iter().find(|(_, _, f)| of(f).shape() != shape) {
            let message = format!("this mode adds factors, which takes equal ranks; found {:?} and {shape:?}", of(other).shape());
            return Err(Error::input(&site.path, message).hint("cat and svd, and the modes that end in _svd, take any ranks"));
        }
        let task = |(i, w, f): &(usize, f64, &Factor)| -> Result<Task> {
            let strength = w * f.scale;
            let weight = strength.abs().sqrt() * if signed && strength < 0.0 { -1.0 } else { 1.0 };
            task(of(f), weight, *i, name, how, masks)
        };
        let values = rule.apply(mine.iter().map(task).collect::<Result<_>>()?);
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    };
    let [a, b] = factor_names(site);
    Ok(Pair { a: join(&a, &|f| &f.a, true)?, b: join(&b, &|f| &f.b, false)?, kept: None })
}

/// Whole updates together, and of that the largest singular values: A = Vᵀ, B = U diag(σ).
fn decomposed(mine: &[(usize, f64, &Factor)], site: &Site, rank: usize, how: &How, masks: &Masks<'_>) -> Result<Pair> {
    let name = format!("base_model.model.{}.weight", site.path);
    let tasks = mine.iter().map(|(i, w, f)| task(&f.delta()?, *w, *i, &name, how, masks)).collect::<Result<_>>()?;
    let whole = Tensor::from_vec(how.rule().apply(tasks), mine[0].2.base.shape(), &Device::Cpu)?;
    let whole = if mine[0].2.embedding { whole.t()?.contiguous()? } else { whole.flatten_from(1)? };
    let cut = linalg::cut(&whole, rank).map_err(crate::clip::method_error)?;
    Ok(Pair { b: cut.svd.u.broadcast_mul(&cut.svd.s)?, a: cut.svd.vt, kept: Some((cut.kept, cut.whole)) })
}

fn task(t: &Tensor, weight: f64, adapter: usize, name: &str, how: &How, masks: &Masks<'_>) -> Result<Task> {
    let rule = how.rule();
    let values = t.flatten_all()?.to_vec1::<f32>()?;
    let drops = rule.thin == super::Thin::Random && rule.density < 1.0;
    let mask = drops.then(|| masks(name, adapter, values.len())).transpose()?;
    Ok(Task { values, weight: weight as f32, mask })
}

/// A LoRA of scale 1 on exactly these modules, other options as the first adapter has them.
fn config(
    first: &LoraConfig,
    updates: &[Update<'_>],
    sites: &[(SiteId, &Site)],
    pairs: &[Pair],
    rank: usize,
    clip: &Clip,
) -> Result<LoraConfig> {
    let mut rank_pattern = IndexMap::new();
    for ((_, site), pair) in sites.iter().zip(pairs) {
        let own = pair.a.dim(0)?;
        if own != rank {
            rank_pattern.insert(site.path.clone(), own);
        }
    }
    let config = LoraConfig {
        rank,
        alpha: rank as f64,
        dropout: first.dropout,
        alpha_pattern: rank_pattern.iter().map(|(path, r)| (path.clone(), *r as f64)).collect(),
        rank_pattern,
        targets: targets(updates),
        towers: Towers::Both,
        ..LoraConfig::default()
    };
    let chosen =
        |c: &LoraConfig| c.scope().sites(clip.sites(), takes).map(|all| all.into_iter().map(|(id, _)| id).collect::<BTreeSet<_>>());
    match chosen(&config) {
        Ok(found) if found == sites.iter().map(|(id, _)| *id).collect() => Ok(config),
        // Names alone would hit more or less than what there is.
        _ => Ok(LoraConfig { targets: Targets::Names(sites.iter().map(|(_, s)| s.path.clone()).collect()), ..config }),
    }
}

/// The names of all adapters, where they have names.
fn targets(updates: &[Update<'_>]) -> Targets {
    let mut all: Vec<String> = Vec::new();
    for update in updates {
        match &update.config.targets {
            Targets::Names(names) => names.iter().for_each(|n| {
                if !all.contains(n) {
                    all.push(n.clone())
                }
            }),
            Targets::Pattern(_) => return Targets::Names(Vec::new()),
        }
    }
    Targets::Names(all)
}
