//! What regression minimises.

use candle_core::{Device, Tensor};
use peft_adapters::{Params, Start};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::fusion::Pass;
use crate::fusion::nn::Weight;
use crate::task::matching::bce;

/// What is minimised. Targets are standardised: (value − mean) / sd of the training split.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RegressLoss {
    /// Squared error.
    Mse {},
    /// Squared error where it is small, absolute error beyond; outliers count less.
    Huber(HuberConfig),
    /// A yes or no for each step of a scale of whole numbers.
    Ordinal(OrdinalConfig),
}

/// Huber 1964: ½d² up to `delta`, delta (|d| − ½ delta) beyond.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HuberConfig {
    /// In standard deviations of the training values.
    pub delta: f64,
}

impl Default for HuberConfig {
    fn default() -> Self {
        Self { delta: 1.0 }
    }
}

/// CORAL (Cao et al. 2020, arXiv 1901.07884, eq. 4 and 5): P(value > rₖ) = σ(f + bₖ), one score f of what is looked at and a bias for
/// each step; their cross-entropy is summed, and the value is `lowest` plus the number of steps that are more likely than not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OrdinalConfig {
    /// The least value there is.
    pub lowest: i64,
    /// The largest.
    pub highest: i64,
}

/// Steps of a scale; more are better regressed.
const MAX_STEPS: i64 = 1000;

impl OrdinalConfig {
    pub(super) fn steps(&self) -> usize {
        usize::try_from(self.highest.saturating_sub(self.lowest)).unwrap_or(0)
    }
}

impl RegressLoss {
    pub(super) fn validate(&self, place: &str) -> Result<()> {
        match self {
            Self::Huber(HuberConfig { delta }) if !(*delta > 0.0 && delta.is_finite()) => {
                Err(Error::input(format!("{place}.loss.huber.delta"), format!("expected more than 0, found {delta}")))
            }
            Self::Ordinal(OrdinalConfig { lowest, highest }) if !(1..=MAX_STEPS).contains(&highest.saturating_sub(*lowest)) => {
                Err(Error::input(format!("{place}.loss.ordinal"), format!("expected 1 to {MAX_STEPS} steps, found {lowest} to {highest}"))
                    .hint("huber or mse take any numbers"))
            }
            _ => Ok(()),
        }
    }
}

/// A loss with its own weights.
#[derive(Debug)]
pub(super) enum Criterion {
    Mse,
    Huber(f64),
    Ordinal(Ordinal),
}

/// A scale and a bias for each of its steps.
#[derive(Debug)]
pub(super) struct Ordinal {
    pub(super) scale: OrdinalConfig,
    bias: Weight,
}

impl Criterion {
    pub(super) fn new(loss: RegressLoss, params: &mut Params) -> Result<Self> {
        Ok(match loss {
            RegressLoss::Mse {} => Self::Mse,
            RegressLoss::Huber(config) => Self::Huber(config.delta),
            RegressLoss::Ordinal(scale) => {
                // Descending from 1, as coral-pytorch starts them.
                let steps = scale.steps();
                let start: Vec<f32> = (0..steps).map(|k| (steps - k) as f32 / steps as f32).collect();
                let start = Start::Value(Tensor::from_vec(start, steps, &Device::Cpu)?);
                Self::Ordinal(Ordinal { scale, bias: Weight::declare(params, "ordinal.bias", steps, start)? })
            }
        })
    }

    /// Scores as they are, or logits of each step.
    ///
    /// # Shapes
    /// `scores` [B, 1] → [B, 1] or [B, steps]
    pub(super) fn outputs(&self, scores: Tensor, pass: &Pass) -> Result<Tensor> {
        match self {
            Self::Ordinal(ordinal) => Ok(scores.broadcast_add(&ordinal.bias.on(pass).to_dtype(scores.dtype())?)?),
            _ => Ok(scores),
        }
    }

    /// # Shapes
    /// `outputs` as [`Criterion::outputs`] gives them; B `values` in their own unit, `standardised` what makes them comparable →
    /// scalar
    pub(super) fn of(&self, outputs: &Tensor, values: &[f64], standardised: impl Fn(f64) -> f64) -> Result<Tensor> {
        let constant = |all: Vec<f64>| Ok::<_, Error>(Tensor::from_vec(all, outputs.shape(), outputs.device())?.to_dtype(outputs.dtype())?);
        let apart = || Ok::<_, Error>((outputs - constant(values.iter().map(|v| standardised(*v)).collect())?)?);
        match self {
            Self::Mse => Ok(apart()?.sqr()?.mean_all()?),
            Self::Huber(delta) => huber(&apart()?, *delta),
            Self::Ordinal(ordinal) => {
                let (lowest, steps) = (ordinal.scale.lowest as f64, ordinal.scale.steps());
                let above = |v: &f64| (0..steps).map(|k| f64::from(u8::from(*v > lowest + k as f64))).collect::<Vec<_>>();
                cumulative(outputs, &constant(values.iter().flat_map(above).collect())?)
            }
        }
    }
}

/// With a = min(|d|, δ) it is a (|d| − ½a).
fn huber(apart: &Tensor, delta: f64) -> Result<Tensor> {
    let size = apart.abs()?;
    let small = size.minimum(&size.ones_like()?.affine(delta, 0.0)?)?;
    Ok((&small * (&size - (&small * 0.5)?)?)?.mean_all()?)
}

/// Summed over the steps, averaged over the batch.
fn cumulative(logits: &Tensor, above: &Tensor) -> Result<Tensor> {
    Ok(bce(logits, above)?.sum(1)?.mean_all()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::goldens::check;

    const VALUES: [f64; 7] = [0.3, -1.2, 2.5, 0.0, -0.4, 3.1, -2.2];

    #[test]
    fn losses_are_torchs() {
        check("mse", |z| Criterion::Mse.of(&z[0], &VALUES, |v| v));
        check("huber", |z| Criterion::Huber(0.7).of(&z[0], &VALUES, |v| v));
    }

    #[test]
    fn cumulative_logits_are_corals() {
        let mut params = Params::new(0, &Device::Cpu);
        let criterion = Criterion::new(RegressLoss::Ordinal(OrdinalConfig { lowest: 2, highest: 6 }), &mut params);
        check("coral", |z| {
            criterion.as_ref().map_or_else(|e| Err(Error::fault("test", e)), |c| c.of(&z[0], &[4.0, 2.0, 6.0, 3.0, 5.0], |v| v))
        });
        let start = params.iter().next().and_then(|p| p.var.to_vec1::<f32>().ok());
        assert_eq!(start, Some(vec![1.0, 0.75, 0.5, 0.25]));
    }
}
