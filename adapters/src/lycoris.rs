//! What LoHa and LoKr share: options of HF PEFT's LyCORIS methods and their dropout.

use indexmap::IndexMap;
use serde_json::{Map, Value, json};

use candle_core::{Result as TensorResult, Tensor};
use rand::Rng;

use crate::hf;
use crate::low_rank::{check_dropout, check_positive, idle_patterns, pattern_value};
use crate::method::Step;
use crate::scope::{self, Scope};
use crate::sites::{Site, SiteId, Sites};
use crate::{Error, Params, Result, rng};

/// A view of the options that both have.
#[derive(Debug, Clone, Copy)]
pub struct Options<'a> {
    /// Rank.
    pub rank: usize,
    /// α; the update is scaled by α/r.
    pub alpha: f64,
    /// Other ranks for some sites.
    pub rank_pattern: &'a IndexMap<String, usize>,
    /// Other alphas for some sites.
    pub alpha_pattern: &'a IndexMap<String, f64>,
    /// Probability with which a row of the update is dropped.
    pub rank_dropout: f64,
    /// Probability with which the update of a layer is dropped.
    pub module_dropout: f64,
    /// Where.
    pub scope: Scope<'a>,
}

/// Beyond any use.
const MAX_RANK: usize = 4096;

impl Options<'_> {
    /// The names of the fields that [`Options::fields`] writes, the scope's apart.
    pub const KEYS: &'static [&'static str] =
        &["r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "module_dropout", "init_weights"];

    /// The targets, after ranges are checked.
    ///
    /// # Errors
    /// When a value is outside its range or nothing is selected.
    pub fn targets<'s>(&self, sites: &'s Sites, params: &mut Params) -> Result<Vec<(SiteId, &'s Site)>> {
        check_dropout("rank_dropout", self.rank_dropout)?;
        check_dropout("module_dropout", self.module_dropout)?;
        check_positive("alpha", self.alpha)?;
        self.alpha_pattern.iter().try_for_each(|(k, a)| check_positive(&format!("alpha_pattern.{k}"), *a))?;
        let targets = self.scope.sites(sites, scope::linear)?;
        let mut notes = idle_patterns("rank_pattern", self.rank_pattern, &targets)?;
        notes.extend(idle_patterns("alpha_pattern", self.alpha_pattern, &targets)?);
        notes.into_iter().for_each(|note| params.note(note));
        Ok(targets)
    }

    /// The rank and α/r at a site.
    ///
    /// # Errors
    /// When the rank is outside 1 to 4096.
    pub fn rank_and_scale(&self, site: &Site) -> Result<(usize, f64)> {
        let rank = pattern_value("rank_pattern", self.rank_pattern, &site.path)?.unwrap_or(self.rank);
        let alpha = pattern_value("alpha_pattern", self.alpha_pattern, &site.path)?.unwrap_or(self.alpha);
        match (1..=MAX_RANK).contains(&rank) {
            true => Ok((rank, alpha / rank as f64)),
            false => Err(Error::config("rank", format!("expected 1 to {MAX_RANK} at {}, found {rank}", site.path))),
        }
    }

    /// HF PEFT's fields.
    ///
    /// # Errors
    /// When nothing is selected.
    pub fn fields(&self, sites: &Sites) -> Result<Map<String, Value>> {
        let own = json!({
            "alpha": hf::number(self.alpha),
            "alpha_pattern": self.alpha_pattern.iter().map(|(k, a)| (k.clone(), hf::number(*a))).collect::<Map<_, _>>(),
            "init_weights": true,
            "module_dropout": self.module_dropout,
            "r": self.rank,
            "rank_dropout": self.rank_dropout,
            "rank_pattern": self.rank_pattern,
            "use_effective_conv2d": false,
        });
        let mut all = Map::new();
        for part in [self.scope.fields(sites, scope::linear)?, own] {
            if let Value::Object(part) = part {
                all.extend(part);
            }
        }
        Ok(all)
    }
}

/// What is left of an update in one training step.
#[derive(Debug)]
pub enum Kept {
    /// All of it.
    All,
    /// Nothing.
    Nothing,
    /// These rows, [out]; 0 where dropped.
    Rows(Tensor),
}

/// Draws what `module_dropout` and `rank_dropout` leave; with `scaled`, rows keep their sum in expectation.
///
/// # Errors
/// When the mask cannot be made.
pub fn kept(step: &Step, (rank, module): (f64, f64), scaled: bool, at: SiteId, like: &Tensor) -> TensorResult<Kept> {
    if !step.training || (rank == 0.0 && module == 0.0) {
        return Ok(Kept::All);
    }
    let mut rng = rng::rng(step.seed, &[step.step, at.index() as u64, rng::name_key("lycoris")]);
    if rng.random::<f64>() < module {
        return Ok(Kept::Nothing);
    }
    if rank == 0.0 {
        return Ok(Kept::All);
    }
    let rows = like.dim(0)?;
    let mut mask: Vec<f64> = (0..rows).map(|_| f64::from(u8::from(rng.random::<f64>() >= rank))).collect();
    let mean = mask.iter().sum::<f64>() / rows.max(1) as f64;
    if scaled && mean > 0.0 {
        mask.iter_mut().for_each(|m| *m /= mean);
    }
    Ok(Kept::Rows(Tensor::from_vec(mask, rows, like.device())?.to_dtype(like.dtype())?))
}
