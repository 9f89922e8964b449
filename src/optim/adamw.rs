//! AdamW (Loshchilov & Hutter 2019, algorithm 2) with torch's order of operations.

use candle_core::Tensor;
use peft_adapters::Params;
use serde::{Deserialize, Serialize};

use super::{Optimizer, counter, read_counter, restored, zeros};
use crate::error::{Error, Result};

/// Options of AdamW.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamWConfig {
    /// Decoupled decay towards zero, times the learning rate; tensors below 2-D are spared. Higher: more regularised.
    pub weight_decay: f64,
    /// Decay rates of the first and second moment, in [0, 1).
    pub betas: [f64; 2],
    /// Added to the denominator.
    pub eps: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { weight_decay: 0.01, betas: [0.9, 0.999], eps: 1e-8 }
    }
}

impl AdamWConfig {
    pub(super) fn validate(&self, place: &str) -> Result<()> {
        let wrong = |key: &str, expected: &str, found: f64| {
            Err(Error::input(format!("{place}: train.optimizer.adamw.{key}"), format!("expected {expected}, found {found}")))
        };
        if !(self.weight_decay >= 0.0 && self.weight_decay.is_finite()) {
            return wrong("weight_decay", "a number from 0", self.weight_decay);
        }
        if let Some(beta) = self.betas.iter().find(|b| !(0.0..1.0).contains(*b)) {
            return wrong("betas", "numbers in [0, 1)", *beta);
        }
        if !(self.eps > 0.0 && self.eps.is_finite()) {
            return wrong("eps", "a number above 0", self.eps);
        }
        Ok(())
    }
}

pub(super) struct AdamW {
    config: AdamWConfig,
    step: usize,
    first: Vec<Tensor>,
    second: Vec<Tensor>,
    names: Vec<String>,
    params: Vec<peft_adapters::Param>,
}

impl AdamW {
    pub(super) fn new(config: AdamWConfig, params: &Params) -> Result<Self> {
        Ok(Self {
            config,
            step: 0,
            first: zeros(params)?,
            second: zeros(params)?,
            names: params.iter().map(|p| p.name.clone()).collect(),
            params: params.iter().cloned().collect(),
        })
    }
}

impl Optimizer for AdamW {
    fn step(&mut self, params: &Params, grads: &[Option<Tensor>], lr: f64) -> Result<()> {
        self.step += 1;
        let [b1, b2] = self.config.betas;
        let correction1 = 1.0 - b1.powi(self.step as i32);
        let correction2 = (1.0 - b2.powi(self.step as i32)).sqrt();
        for (i, (param, grad)) in params.iter().zip(grads).enumerate() {
            let Some(grad) = grad else { continue };
            let lr = lr * param.lr_factor;
            let grad = grad.to_dtype(param.var.dtype())?;
            let first = ((&self.first[i] * b1)? + (&grad * (1.0 - b1))?)?;
            let second = ((&self.second[i] * b2)? + (grad.sqr()? * (1.0 - b2))?)?;
            let denominator = ((second.sqrt()? / correction2)? + self.config.eps)?;
            let update = ((&first / denominator)? * (lr / correction1))?;
            let decay = if param.decay { 1.0 - lr * self.config.weight_decay } else { 1.0 };
            let value = param.var.as_tensor().detach();
            let value = if decay == 1.0 { value } else { (value * decay)? };
            param.var.set(&(value - update)?)?;
            (self.first[i], self.second[i]) = (first, second);
        }
        Ok(())
    }

    fn state(&self) -> Vec<(String, Tensor)> {
        let mut all: Vec<_> = counter(self.step).ok().map(|t| ("optimizer.step".to_string(), t)).into_iter().collect();
        for (i, name) in self.names.iter().enumerate() {
            all.push((format!("adamw.first.{name}"), self.first[i].clone()));
            all.push((format!("adamw.second.{name}"), self.second[i].clone()));
        }
        all
    }

    fn restore(&mut self, take: &mut dyn FnMut(&str) -> Result<Tensor>) -> Result<()> {
        self.step = read_counter(&take("optimizer.step")?)?;
        for (i, param) in self.params.iter().enumerate() {
            self.first[i] = restored("adamw.first", param, take)?;
            self.second[i] = restored("adamw.second", param, take)?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};
    use peft_adapters::{Spec, Start};

    /// torch 2: p = [[1, -2], [0.5, 3]], three steps of `AdamW(lr=0.1, weight_decay=0.1)` with gradient p·(step).
    #[test]
    fn three_steps_equal_torch() {
        let mut params = Params::new(0, &Device::Cpu);
        let start = Tensor::new(&[[1f32, -2.0], [0.5, 3.0]], &Device::Cpu).unwrap();
        params.declare(Spec::new("p", (2, 2), Start::Value(start))).unwrap();
        let mut adam = AdamW::new(AdamWConfig { weight_decay: 0.1, ..Default::default() }, &params).unwrap();
        for step in 1..=3 {
            let grad = (params.get("p").unwrap().var.as_tensor().detach() * f64::from(step)).unwrap();
            adam.step(&params, &[Some(grad)], 0.1).unwrap();
        }
        let got = params.get("p").unwrap().var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (g, w) in got.iter().zip(TORCH) {
            assert!((g - w).abs() < 1e-6, "{got:?}");
        }
    }

    const TORCH: [f32; 4] = [0.677_83, -1.649_551_4, 0.190_064_85, 2.620_322_7];
}
