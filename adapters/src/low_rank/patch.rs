//! The hooks of plain low-rank updates.

use candle_core::{Result as TensorResult, Tensor};

use super::{Factors, LoraConfig, dropout_mask};
use crate::Result;
use crate::flow::LinearOut;
use crate::method::{Fold, Inverse, Patch, Step};
use crate::params::Params;
use crate::saved::Saved;
use crate::sites::{SiteId, Sites, WeightId};

/// `h = W x + s B A x` at every factor, and the weights that are trained beside them.
#[derive(Debug)]
pub struct LowRankPatch {
    factors: Factors,
    saved: Saved,
    dropout: f64,
    step: Step,
}

impl LowRankPatch {
    /// Hooks for planned factors.
    ///
    /// # Errors
    /// When a module to save does not exist.
    pub fn new(config: &LoraConfig, factors: Factors, sites: &Sites, params: &mut Params) -> Result<Self> {
        let saved = Saved::plan(&config.modules_to_save, config.bias, &factors.paths(sites), sites, params)?;
        Ok(Self { factors, saved, dropout: config.dropout, step: Step::eval() })
    }
}

impl Patch for LowRankPatch {
    fn prepare(&mut self, step: &Step) -> TensorResult<()> {
        self.step = *step;
        Ok(())
    }

    fn weight(&self, id: WeightId, value: Tensor) -> TensorResult<Tensor> {
        self.saved.weight(id, value)
    }

    fn linear(&self, at: SiteId, y: LinearOut) -> TensorResult<LinearOut> {
        let Some(factor) = self.factors.at(at) else { return Ok(y) };
        let dropout = dropout_mask(&self.step, self.dropout, at, "lora", y.x())?;
        let term = factor.term(y.x(), dropout)?;
        y.low_rank(term)
    }

    fn embedding(&self, at: SiteId, ids: Option<&Tensor>, rows: Tensor) -> TensorResult<Tensor> {
        match self.factors.at(at) {
            Some(factor) => &rows + factor.rows(ids, &rows)?,
            None => Ok(rows),
        }
    }

    fn inverse(&self) -> Inverse {
        Inverse::Subtract
    }

    fn fold(&self, id: WeightId, value: &Tensor) -> TensorResult<Fold> {
        match self.factors.of(id) {
            Some((_, factor)) => Ok(Fold::Replace((value + factor.delta()?.to_dtype(value.dtype())?)?)),
            None => Ok(Fold::Unchanged),
        }
    }
}
