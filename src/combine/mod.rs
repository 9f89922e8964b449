//! Several LoRA, or several IA³, as one, weighted: HF PEFT's `add_weighted_adapter`.

use std::collections::BTreeSet;
use std::path::PathBuf;

use candle_core::{DType, Device};
use peft_adapters::low_rank::LoraConfig;
use peft_adapters::{MethodConfig, rng};
use rand::Rng as _;
use serde::{Deserialize, Serialize};

use crate::clip::base::Base;
use crate::clip::model::all_finite;
use crate::delta::{self, BaseRef, Delta, Manifest, locate, same_classes};
use crate::error::{Error, Result};

mod arithmetic;
mod factors;
mod join;

pub use arithmetic::MajoritySign;
use arithmetic::{Rule, Thin};
pub use join::{Joined, join};

/// How adapters become one; HF PEFT's `combination_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Combine {
    /// A and B each added, weighted by √|w·s|. Equal ranks; cross terms B₁A₂ come in. The one mode for IA³: Σ w·l.
    Linear,
    /// Factors side by side: exactly Σ w·s·BA, of the sum of the ranks.
    Cat,
    /// Σ w·s·BA of any ranks, cut to a rank again.
    Svd,
    /// TIES (Yadav et al. 2023, arXiv 2306.01708) on A and B.
    Ties,
    /// TIES on s·BA, cut to a rank.
    TiesSvd,
    /// DARE (Yu et al. 2023, arXiv 2311.03099) on A and B, then added.
    DareLinear,
    /// DARE on s·BA, then added and cut to a rank.
    DareLinearSvd,
    /// DARE in place of TIES' thinning, on A and B.
    DareTies,
    /// DARE in place of TIES' thinning, on s·BA, cut to a rank.
    DareTiesSvd,
    /// The largest entries of A and B, then added.
    MagnitudePrune,
    /// The largest entries of s·BA, then added and cut to a rank.
    MagnitudePruneSvd,
}

impl Combine {
    /// Whether whole updates are combined and decomposed again.
    #[must_use]
    pub fn decomposes(self) -> bool {
        matches!(self, Self::Svd | Self::TiesSvd | Self::DareLinearSvd | Self::DareTiesSvd | Self::MagnitudePruneSvd)
    }

    /// Whether entries are thinned out, so that a density is needed.
    #[must_use]
    pub fn thins(self) -> bool {
        self.thin() != Thin::Keep
    }

    fn thin(self) -> Thin {
        match self {
            Self::Linear | Self::Cat | Self::Svd => Thin::Keep,
            Self::Ties | Self::TiesSvd | Self::MagnitudePrune | Self::MagnitudePruneSvd => Thin::Magnitude,
            Self::DareLinear | Self::DareLinearSvd | Self::DareTies | Self::DareTiesSvd => Thin::Random,
        }
    }

    /// Whether signs are elected.
    #[must_use]
    pub fn elects(self) -> bool {
        matches!(self, Self::Ties | Self::TiesSvd | Self::DareTies | Self::DareTiesSvd)
    }
}

/// How to combine.
#[derive(Debug, Clone, Copy)]
pub struct How {
    /// The mode.
    pub combine: Combine,
    /// The share of entries that stay, in (0, 1].
    pub density: Option<f64>,
    /// How signs are elected.
    pub majority_sign: MajoritySign,
    /// The rank after a decomposition; the largest of the adapters' when left out.
    pub svd_rank: Option<usize>,
}

impl How {
    fn rule(&self) -> Rule {
        let elect = self.combine.elects().then_some(self.majority_sign);
        Rule { thin: self.combine.thin(), density: self.density.unwrap_or(1.0), elect }
    }

    fn check(&self) -> Result<()> {
        match self.density {
            Some(d) if !self.combine.thins() => {
                Err(Error::input("--density", format!("{d} means nothing here: this mode keeps everything")))
            }
            Some(d) if !(d > 0.0 && d <= 1.0) => {
                Err(Error::input("--density", format!("expected a share above 0 and at most 1, found {d}")))
            }
            None if self.combine.thins() => {
                Err(Error::input("--density", "this mode keeps a share of the entries, and needs to know which share")
                    .hint("for example --density 0.5"))
            }
            _ if self.svd_rank.is_some() && !self.combine.decomposes() => {
                Err(Error::input("--svd-rank", "means nothing here: only svd and the modes that end in _svd choose a rank"))
            }
            _ if self.svd_rank == Some(0) => Err(Error::input("--svd-rank", "expected at least 1, found 0")),
            _ => Ok(()),
        }
    }
}

/// Which entries of a tensor stay, by its name, the adapter's place in the list and the number of entries.
///
/// The name is that of the tensor in the adapter's file; where whole updates are thinned out, `base_model.model.<path>.weight`.
pub type Masks<'a> = dyn Fn(&str, usize, usize) -> Result<Vec<bool>> + Sync + 'a;

/// Masks that are a function of `seed`, the tensor and the adapter.
pub fn seeded(seed: u64, density: f64) -> impl Fn(&str, usize, usize) -> Result<Vec<bool>> {
    move |name, adapter, count| {
        let mut rng = rng::rng(seed, &[rng::name_key("dare"), rng::name_key(name), adapter as u64]);
        Ok((0..count).map(|_| rng.random::<f64>() < density).collect())
    }
}

/// What to combine.
#[derive(Debug, Clone)]
pub struct CombineOptions {
    /// The base that the adapters are for.
    pub model: String,
    /// Adapter directories and their weights.
    pub adapters: Vec<(PathBuf, f64)>,
    /// How.
    pub how: How,
    /// Of the masks.
    pub seed: u64,
    /// Where the new adapter goes.
    pub output: PathBuf,
    /// Replace an adapter that exists.
    pub force: bool,
    /// Accept adapters of another base.
    pub allow_base_mismatch: bool,
}

/// What was combined.
#[derive(Debug, Clone, Serialize)]
pub struct Combined {
    /// Where.
    pub output: PathBuf,
    /// The mode.
    pub combine: Combine,
    /// The new adapter's rank; some modules may have less. Nothing for IA³.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// How many modules it changes.
    pub modules: usize,
    /// The share of Σσ² that a decomposition has kept; nothing where none was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub energy: Option<f64>,
    /// Bytes of all files.
    pub adapter_bytes: u64,
    /// What is worth knowing.
    pub notes: Vec<String>,
}

/// `peft merge --combine`: writes a new adapter directory.
///
/// # Errors
/// When an adapter is neither plain LoRA nor IA³, does not fit the base, or cannot be combined with the others in this mode.
pub fn combine(options: &CombineOptions) -> Result<Combined> {
    delta::check_output(&options.output, options.force)?;
    let inside = |dir: &PathBuf| dir.canonicalize().ok().zip(options.output.canonicalize().ok()).is_some_and(|(a, b)| a == b);
    if options.adapters.iter().any(|(dir, _)| inside(dir)) {
        return Err(Error::input(options.output.display(), "is one of the adapters").hint("choose another --output"));
    }
    let base = Base::load(&options.model, DType::F32, &Device::Cpu)?;
    let mut notes = Vec::new();
    let mut all = Vec::new();
    for (dir, weight) in &options.adapters {
        let delta = Delta::read(&locate(dir)?)?;
        notes.extend(delta.check_base(&base, options.allow_base_mismatch)?);
        all.push((delta, *weight));
    }
    let joined = join(&base.clip, &all, &options.how, &seeded(options.seed, options.how.density.unwrap_or(1.0)))?;
    notes.extend_from_slice(joined.adapters.params.notes());
    for param in joined.adapters.params.iter() {
        if !all_finite(param.var.as_tensor())? {
            let weights: Vec<String> = all.iter().map(|(_, weight)| format!("{weight:?}")).collect();
            return Err(Error::input(&param.name, format!("is not finite with the weights {}", weights.join(", ")))
                .hint("choose other weights (--adapter DIR=WEIGHT)"));
        }
    }
    notes.extend(disagreement(&all));
    let manifest = manifest(&base, options, &all);
    let adapter_bytes = delta::save(&options.output, &joined.adapters, base.clip.sites(), &manifest)?;
    let rank = joined.adapters.methods.first().and_then(lora).map(|c| c.rank);
    Ok(Combined {
        output: options.output.clone(),
        combine: options.how.combine,
        rank,
        modules: joined.modules,
        energy: joined.energy,
        adapter_bytes,
        notes,
    })
}

/// Plain LoRA's options.
fn lora(method: &MethodConfig) -> Option<&LoraConfig> {
    match method {
        MethodConfig::Lora(config) => Some(config),
        _ => None,
    }
}

/// What the new adapter does not say, since the adapters say different things.
fn disagreement(all: &[(Delta, f64)]) -> Vec<String> {
    let each: Vec<&Manifest> = all.iter().filter_map(|(d, _)| d.manifest.as_ref()).collect();
    let Some(first) = each.first() else { return Vec::new() };
    let differs = |says: &dyn Fn(&Manifest) -> bool, same: &dyn Fn(&Manifest) -> bool| {
        each.iter().any(|m| !same(m)) || each.len() < all.len() && each.iter().any(|m| says(m))
    };
    let parts = [
        ("classes", differs(&|m| !m.classes.is_empty(), &|m| same_classes(&m.classes, &first.classes))),
        ("templates", differs(&|m| !m.templates.is_empty(), &|m| m.templates == first.templates)),
        ("task", differs(&|m| !m.task.is_null(), &|m| m.task == first.task)),
    ];
    let parts: Vec<&str> = parts.into_iter().filter_map(|(part, differs)| differs.then_some(part)).collect();
    let mut notes = Vec::new();
    if !parts.is_empty() {
        // They hold together or not at all.
        notes.push(format!(
            "not all adapters have the same {}: the new one has neither classes nor templates, so labels have to be named",
            parts.join(" and ")
        ));
    }
    if differs(&|_| false, &|m| m.pixels() == first.pixels()) {
        let told = each.iter().filter_map(|m| m.pixels()).map(|p| p.to_string()).collect::<BTreeSet<_>>();
        let told = told.into_iter().collect::<Vec<_>>().join("; ");
        notes.push(format!("the adapters were trained on images read in different ways ({told}): the new one does not say how"));
    }
    notes
}

/// What all adapters say of themselves holds for the new one.
fn manifest(base: &Base, options: &CombineOptions, all: &[(Delta, f64)]) -> Manifest {
    let each: Vec<&Manifest> = all.iter().filter_map(|(d, _)| d.manifest.as_ref()).collect();
    let agreed = each.first().filter(|m| {
        each.len() == all.len()
            && each.iter().all(|o| (&o.templates, &o.task) == (&m.templates, &m.task) && same_classes(&o.classes, &m.classes))
    });
    let name = each.first().map_or(options.model.as_str(), |m| m.base.name.as_str());
    Manifest {
        version: env!("CARGO_PKG_VERSION").into(),
        base: BaseRef::of(base, name),
        task: agreed.map(|m| m.task.clone()).unwrap_or_default(),
        classes: agreed.map(|m| m.classes.clone()).unwrap_or_default(),
        templates: agreed.map(|m| m.templates.clone()).unwrap_or_default(),
        images: each.first().and_then(|m| m.pixels()).filter(|first| each.iter().all(|m| m.pixels() == Some(*first))),
        ..Manifest::default()
    }
}
