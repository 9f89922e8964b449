//! What classification minimises.

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use super::weights::Weight;
use crate::error::{Error, Result};
use crate::task::matching::bce;
use crate::task::prompts;

/// What is minimised.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// −log softmax(z) of the one label.
    CrossEntropy {},
    /// −y log σ(z) − (1−y) log(1−σ(z)), the mean over all labels.
    Bce {},
    /// Binary cross-entropy in which easy negatives count next to nothing.
    Asymmetric(AsymmetricConfig),
}

/// Asymmetric loss (Ridnik et al. 2021, arXiv 2009.14119, eq. 4 to 7). With p = σ(z) and pₘ = max(p − clip, 0) it is
/// −y (1−p)^gamma_pos log p − (1−y) pₘ^gamma_neg log(1−pₘ), the mean over all labels.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AsymmetricConfig {
    /// Focusing of labels that an example has; 0 counts all of them alike.
    pub gamma_pos: f64,
    /// Focusing of labels that it has not; larger: easy ones count less.
    pub gamma_neg: f64,
    /// Labels that it has not and that are less likely than this do not count at all.
    pub clip: f64,
}

impl Default for AsymmetricConfig {
    fn default() -> Self {
        Self { gamma_pos: 0.0, gamma_neg: 4.0, clip: 0.05 }
    }
}

impl AsymmetricConfig {
    pub(super) fn validate(&self, place: &str) -> Result<()> {
        for (key, value, most) in [("gamma_pos", self.gamma_pos, 10.0), ("gamma_neg", self.gamma_neg, 10.0), ("clip", self.clip, 0.5)] {
            if !(0.0..=most).contains(&value) {
                return Err(Error::input(format!("{place}.loss.asymmetric.{key}"), format!("expected 0 to {most}, found {value}")));
            }
        }
        Ok(())
    }
}

/// A loss with its weights.
#[derive(Debug)]
pub(super) struct Criterion {
    pub(super) loss: Loss,
    pub(super) weights: Option<Vec<Weight>>,
}

impl Criterion {
    /// Whether what the sum is divided by is the batch's own: the weights of its classes.
    pub(super) fn is_over_batch(&self) -> bool {
        self.weights.is_some() && matches!(self.loss, Loss::CrossEntropy {})
    }

    /// # Shapes
    /// `logits` [B, C]; the labels of B examples → scalar
    pub(super) fn of(&self, logits: &Tensor, labels: &[&[u32]], smoothing: f64) -> Result<Tensor> {
        match self.loss {
            Loss::CrossEntropy {} => self.cross_entropy(logits, labels, smoothing),
            Loss::Bce {} => self.binary(logits, labels, smoothing, None),
            Loss::Asymmetric(config) => self.binary(logits, labels, smoothing, Some(&config)),
        }
    }

    /// As torch's `cross_entropy` with `weight` w: Σᵢ −(1−ε) w_y log p_y − ε/C Σ_c w_c log p_c, over Σᵢ w_y.
    fn cross_entropy(&self, logits: &Tensor, labels: &[&[u32]], smoothing: f64) -> Result<Tensor> {
        let own: Vec<u32> = labels.iter().map(|l| l.first().copied().unwrap_or(0)).collect();
        let Some(weights) = &self.weights else {
            return prompts::cross_entropy(logits, &Tensor::from_vec(own, labels.len(), logits.device())?, smoothing);
        };
        let logits = if logits.dtype() == DType::F64 { logits.clone() } else { logits.to_dtype(DType::F32)? };
        let (count, classes) = logits.dims2()?;
        let share = |label: u32, c: usize| smoothing / classes as f64 + if label as usize == c { 1.0 - smoothing } else { 0.0 };
        let target = own.iter().flat_map(|&y| (0..classes).map(move |c| weights[c].0 * share(y, c))).collect();
        let target = Tensor::from_vec::<_, f64>(target, (count, classes), logits.device())?.to_dtype(logits.dtype())?;
        let total: f64 = own.iter().map(|&y| weights[y as usize].0).sum();
        Ok(((candle_nn::ops::log_softmax(&logits, 1)? * target)?.sum_all()? * (-1.0 / total))?)
    }

    /// Binary cross-entropy, its asymmetric form where asked for, the mean over labels and examples. Smoothing ε moves targets
    /// from 0 and 1 to ε/2 and 1 − ε/2.
    fn binary(&self, logits: &Tensor, labels: &[&[u32]], smoothing: f64, asymmetric: Option<&AsymmetricConfig>) -> Result<Tensor> {
        let logits = if logits.dtype() == DType::F64 { logits.clone() } else { logits.to_dtype(DType::F32)? };
        let (count, classes) = logits.dims2()?;
        let constant = |of: &dyn Fn(usize, bool) -> f64| -> Result<Tensor> {
            let row = |own: &&[u32]| (0..classes).map(|c| of(c, own.contains(&(c as u32)))).collect::<Vec<f64>>();
            let values: Vec<f64> = labels.iter().flat_map(row).collect();
            Ok(Tensor::from_vec(values, (count, classes), logits.device())?.to_dtype(logits.dtype())?)
        };
        let target = constant(&|_, has| if has { 1.0 - smoothing / 2.0 } else { smoothing / 2.0 })?;
        let mut each = match asymmetric {
            None => bce(&logits, &target)?,
            Some(config) => config.each(&logits, &target)?,
        };
        if let Some(weights) = &self.weights {
            each = (each * constant(&|c, has| if has { weights[c].0 } else { weights[c].1 })?)?;
        }
        Ok(each.mean_all()?)
    }
}

impl AsymmetricConfig {
    /// Elementwise.
    fn each(&self, logits: &Tensor, target: &Tensor) -> Result<Tensor> {
        let power = |x: Tensor, gamma: f64| -> Result<Tensor> {
            // The slope of x^gamma at 0 is not finite for gamma < 1.
            if gamma == 0.0 { Ok(x.ones_like()?) } else { Ok(x.clamp(1e-12, 1.0)?.powf(gamma)?) }
        };
        let unlikely = candle_nn::ops::sigmoid(&logits.neg()?)?;
        let positive = (bce(logits, &logits.ones_like()?)? * power(unlikely, self.gamma_pos)?)?;
        let likely = (candle_nn::ops::sigmoid(logits)? - self.clip)?.relu()?;
        let log = match self.clip > 0.0 {
            true => likely.affine(-1.0, 1.0)?.log()?.neg()?,
            false => bce(logits, &logits.zeros_like()?)?,
        };
        let negative = (log * power(likely, self.gamma_neg)?)?;
        Ok(((positive * target)? + (negative * target.affine(-1.0, 1.0)?)?)?)
    }
}
