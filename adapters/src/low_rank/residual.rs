//! Low-rank updates that start from a part of the weight itself and train against what is left of it.

use candle_core::{Result as TensorResult, Tensor};

use super::{Factor, Factors, LoraConfig, dropout_mask};
use crate::flow::{LinearOut, LowRankTerm};
use crate::method::{Fold, Patch, Step};
use crate::params::Params;
use crate::saved::Saved;
use crate::scope;
use crate::sites::{SiteId, SiteKind, Sites, WeightId};
use crate::{Error, Result};

/// `h = (W − s B₀A₀) x + s B A x`. The residual is never formed: it is the frozen half `[A; A₀]`, `[B, −B₀]` of a LoRA of
/// twice the rank, which is also what the file holds. So the base is shared and untouched.
#[derive(Debug)]
pub struct ResidualPatch {
    factors: Factors,
    /// A₀ and −B₀ by site.
    frozen: std::collections::HashMap<SiteId, (Tensor, Tensor)>,
    saved: Saved,
    names: Vec<(SiteId, String)>,
    dropout: f64,
    step: Step,
}

impl LoraConfig {
    /// The LoRA that holds an adapter with a residual: twice the rank at the same scale.
    #[must_use]
    pub fn doubled(&self) -> Self {
        let factor = if self.rslora { std::f64::consts::SQRT_2 } else { 2.0 };
        let mut config = Self { rank: 2 * self.rank, alpha: factor * self.alpha, ..self.clone() };
        config.rank_pattern.values_mut().for_each(|rank| *rank *= 2);
        // α is that of a site: a rank that is doubled alone would halve the scale.
        config.alpha_pattern.values_mut().for_each(|alpha| *alpha *= factor);
        config
    }
}

impl ResidualPatch {
    /// Declares the factors; `start` gives A₀ [r, in] and B₀ [out, r] of a weight [out, in] for a rank and a scale.
    ///
    /// # Errors
    /// When the configuration does not fit the model.
    pub fn plan(
        config: &LoraConfig,
        sites: &Sites,
        params: &mut Params,
        start: impl Fn(WeightId, &Tensor, usize, f64) -> Result<(Tensor, Tensor)>,
    ) -> Result<Self> {
        config.check()?;
        let (mut factors, mut frozen, mut names) = (Factors::default(), std::collections::HashMap::new(), Vec::new());
        let doubled = config.doubled();
        for (id, site) in config.scope().sites(sites, scope::linear)? {
            let (SiteKind::Linear { input, output }, Some((weight, base))) = (site.kind, sites.weight(&format!("{}.weight", site.path)))
            else {
                return Err(Error::config("targets", format!("{} has no weight", site.path)));
            };
            let (rank, _) = config.rank_and_scale(site, input, output, input.min(output) / 2)?;
            // The file's scale, to the last bit.
            let (_, scale) = doubled.rank_and_scale(site, input, output, usize::MAX)?;
            let (a, b) = start(weight, &base.tensor, rank, scale)?;
            factors.declare(id, site, (rank, scale), config.lr_ratio.unwrap_or(1.0), (Some((a.clone(), b.clone())), sites, params))?;
            frozen.insert(id, (a.to_dtype(params.dtype())?, b.to_dtype(params.dtype())?.neg()?));
            names.push((id, format!("base_model.model.{}", site.path)));
        }
        let saved = Saved::plan(&config.modules_to_save, config.bias, &factors.paths(sites), sites, params)?;
        Ok(Self { factors, frozen, saved, names, dropout: config.dropout, step: Step::eval() })
    }

    /// A and B of the LoRA of twice the rank.
    fn whole(&self, at: SiteId) -> TensorResult<Option<Factor>> {
        let (Some(factor), Some((a, b))) = (self.factors.at(at), self.frozen.get(&at)) else { return Ok(None) };
        Ok(Some(Factor { a: Tensor::cat(&[&factor.a, a], 0)?, b: Tensor::cat(&[&factor.b, b], 1)?, ..factor.clone() }))
    }
}

impl Patch for ResidualPatch {
    fn prepare(&mut self, step: &Step) -> TensorResult<()> {
        self.step = *step;
        Ok(())
    }

    fn weight(&self, id: WeightId, value: Tensor) -> TensorResult<Tensor> {
        self.saved.weight(id, value)
    }

    fn linear(&self, at: SiteId, y: LinearOut) -> TensorResult<LinearOut> {
        let (Some(factor), Some(mask)) = (self.factors.at(at), dropout_mask(&self.step, self.dropout, at, "lora", y.x())?) else {
            return match self.whole(at)? {
                Some(whole) => {
                    let term = whole.term(y.x(), None)?;
                    y.low_rank(term)
                }
                None => Ok(y),
            };
        };
        // Dropout is of the trained half; the residual is a weight.
        let dtype = y.x().dtype();
        let term = factor.term(y.x(), Some(mask))?;
        let y = match self.frozen.get(&at) {
            Some((a, b)) => y.low_rank(LowRankTerm { a: a.to_dtype(dtype)?, b: b.to_dtype(dtype)?, scale: factor.scale, dropout: None })?,
            None => y,
        };
        y.low_rank(term)
    }

    fn fold(&self, id: WeightId, value: &Tensor) -> TensorResult<Fold> {
        let Some((site, _)) = self.factors.of(id) else { return Ok(Fold::Unchanged) };
        match self.whole(site)? {
            Some(whole) => Ok(Fold::Replace((value + whole.delta()?.to_dtype(value.dtype())?)?)),
            None => Ok(Fold::Unchanged),
        }
    }

    fn export(&self) -> TensorResult<Option<Vec<(String, Tensor)>>> {
        let mut all = Vec::new();
        for (id, name) in &self.names {
            if let Some(whole) = self.whole(*id)? {
                all.extend([(format!("{name}.lora_A.weight"), whole.a), (format!("{name}.lora_B.weight"), whole.b)]);
            }
        }
        all.extend(self.saved.export());
        Ok(Some(all))
    }
}
