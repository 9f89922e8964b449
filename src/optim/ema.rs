//! An exponential moving average of the parameters, which evaluates better than the last step.

use candle_core::Tensor;
use peft_adapters::Params;

use super::fused::{fused, update};
use super::restored;
use crate::error::Result;

/// The average and, while it stands in for the parameters, what it replaced.
#[derive(Debug)]
pub struct Ema {
    decay: f64,
    average: Vec<Tensor>,
    raw: Option<Vec<Tensor>>,
}

fn values(params: &Params) -> Result<Vec<Tensor>> {
    params.iter().map(|p| Ok(p.var.as_tensor().detach().copy()?)).collect()
}

fn assign(params: &Params, values: &[Tensor]) -> Result<()> {
    params.iter().zip(values).try_for_each(|(p, v)| Ok(p.var.set(v)?))
}

impl Ema {
    /// Starts at the parameters' values.
    ///
    /// # Errors
    /// When a copy cannot be made.
    pub fn new(decay: f64, params: &Params) -> Result<Self> {
        Ok(Self { decay, average: values(params)?, raw: None })
    }

    /// Takes one step's parameters in. Early on the decay is lower, (1 + n) / (10 + n), so that the
    /// random start is forgotten.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn update(&mut self, params: &Params, step: usize) -> Result<()> {
        let decay = self.decay.min((1 + step) as f64 / (10 + step) as f64);
        for (average, param) in self.average.iter_mut().zip(params.iter()) {
            let value = param.var.as_tensor();
            if fused(&[average, value]) {
                let (kept, new) = (decay as f32, (1.0 - decay) as f32);
                update(average, value, |a, v| a * kept + v * new)?;
            } else {
                *average = ((&*average * decay)? + (value.detach() * (1.0 - decay))?)?;
            }
        }
        Ok(())
    }

    /// Puts the average in the parameters' place.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn swap_in(&mut self, params: &Params) -> Result<()> {
        self.raw = Some(values(params)?);
        assign(params, &self.average)
    }

    /// Undoes [`Ema::swap_in`].
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn swap_out(&mut self, params: &Params) -> Result<()> {
        match self.raw.take() {
            Some(raw) => assign(params, &raw),
            None => Ok(()),
        }
    }

    /// Named state, for a checkpoint.
    #[must_use]
    pub fn state(&self, params: &Params) -> Vec<(String, Tensor)> {
        params.iter().zip(&self.average).map(|(p, a)| (format!("ema.{}", p.name), a.clone())).collect()
    }

    /// Puts state back.
    ///
    /// # Errors
    /// When a tensor is missing or misshapen.
    pub fn restore(&mut self, params: &Params, take: &mut dyn FnMut(&str) -> Result<Tensor>) -> Result<()> {
        self.average = params.iter().map(|p| restored("ema", p, take)).collect::<Result<_>>()?;
        Ok(())
    }
}
