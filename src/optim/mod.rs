//! Optimisers, schedules, clipping and weight averaging.

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor};
use peft_adapters::{Param, Params};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

mod adamw;
mod ema;
mod fused;
mod schedule;
mod sgd;

pub use adamw::AdamWConfig;
pub use ema::Ema;
pub use schedule::{Cosine, Linear, ScheduleConfig, Warmup};
pub use sgd::SgdConfig;

/// Which optimiser: `adamw`, or `adamw: { weight_decay: 0.01 }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerConfig {
    /// Loshchilov & Hutter 2019.
    AdamW(AdamWConfig),
    /// Stochastic gradient descent with momentum.
    Sgd(SgdConfig),
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self::AdamW(AdamWConfig::default())
    }
}

impl OptimizerConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// When a value is out of range.
    pub fn validate(&self, place: &str) -> Result<()> {
        match self {
            Self::AdamW(c) => c.validate(place),
            Self::Sgd(c) => c.validate(place),
        }
    }

    /// Numbers that it remembers for each parameter.
    #[must_use]
    pub fn moments(&self) -> u64 {
        match self {
            Self::AdamW(_) => 2,
            Self::Sgd(_) => 1,
        }
    }

    /// The optimiser with empty state for `params`.
    ///
    /// # Errors
    /// When state cannot be allocated.
    pub fn build(&self, params: &Params) -> Result<Box<dyn Optimizer>> {
        Ok(match self {
            Self::AdamW(c) => Box::new(adamw::AdamW::new(c.clone(), params)?),
            Self::Sgd(c) => Box::new(sgd::Sgd::new(c.clone(), params)?),
        })
    }
}

/// Updates parameters in place.
pub trait Optimizer {
    /// One step. `grads` runs parallel to the parameters; those without a gradient stay as they are.
    /// `scale` multiplies every gradient (clipping).
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn step(&mut self, params: &Params, grads: &[Option<Tensor>], lr: f64, scale: f64) -> Result<()>;

    /// Named state, for a checkpoint.
    fn state(&self) -> Vec<(String, Tensor)>;

    /// Puts state back that [`Optimizer::state`] gave; `take` hands a tensor out by name.
    ///
    /// # Errors
    /// When a tensor is missing or misshapen.
    fn restore(&mut self, take: &mut dyn FnMut(&str) -> Result<Tensor>) -> Result<()>;
}

/// The step counter as a tensor, since checkpoints hold tensors.
fn counter(step: usize) -> Result<Tensor> {
    Ok(Tensor::new(&[step as i64], &candle_core::Device::Cpu)?)
}

fn read_counter(t: &Tensor) -> Result<usize> {
    Ok(t.to_vec1::<i64>()?.first().copied().unwrap_or(0).max(0) as usize)
}

/// A zero tensor like each parameter.
fn zeros(params: &Params) -> Result<Vec<Tensor>> {
    params.iter().map(|p| Ok(p.var.zeros_like()?)).collect()
}

fn restored(what: &str, param: &Param, take: &mut dyn FnMut(&str) -> Result<Tensor>) -> Result<Tensor> {
    let name = format!("{what}.{}", param.name);
    let t = take(&name)?;
    if t.shape() != param.var.shape() {
        return Err(Error::input("checkpoint", format!("`{name}` has shape {:?}, expected {:?}", t.dims(), param.var.dims())));
    }
    Ok(t.to_device(param.var.device())?.to_dtype(param.var.dtype())?)
}

/// Gradients that several micro-batches add up to, detached from their graphs.
#[derive(Debug, Default)]
pub struct Accumulated {
    sums: Vec<Option<Tensor>>,
}

impl Accumulated {
    /// Adds `weight` times the gradients of one backward pass.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn add(&mut self, params: &Params, grads: &GradStore, weight: f64) -> Result<()> {
        self.sums.resize(params.len(), None);
        for (sum, param) in self.sums.iter_mut().zip(params.iter()) {
            let Some(grad) = grads.get(&param.var) else { continue };
            let grad = grad.detach().contiguous()?;
            match sum {
                // The sum is ours alone: backward makes a new tensor for every gradient.
                Some(sum) if fused::fused(&[sum, &grad]) => {
                    let weight = weight as f32;
                    fused::update(sum, &grad, |s, g| s + g * weight)?;
                }
                Some(sum) => *sum = (&*sum + (grad * weight)?)?,
                None if weight == 1.0 => *sum = Some(grad),
                None => *sum = Some((grad * weight)?),
            }
        }
        Ok(())
    }

    /// Hands the sums out and starts anew.
    pub fn take(&mut self) -> Vec<Option<Tensor>> {
        std::mem::take(&mut self.sums)
    }
}

/// The Euclidean norm over all gradients.
///
/// # Errors
/// When a tensor operation fails.
pub fn global_norm(grads: &[Option<Tensor>]) -> Result<f64> {
    let mut sum = 0.0;
    for grad in grads.iter().flatten() {
        sum += if fused::fused(&[grad]) {
            fused::sum_of_squares(grad)?
        } else {
            f64::from(grad.to_dtype(DType::F32)?.sqr()?.sum_all()?.to_scalar::<f32>()?)
        };
    }
    Ok(sum.sqrt())
}

/// What gradients are multiplied by so that their global norm is at most `max` (as torch's `clip_grad_norm_`).
#[must_use]
pub fn clip_factor(norm: f64, max: f64) -> f64 {
    (max / (norm + 1e-6)).min(1.0)
}
