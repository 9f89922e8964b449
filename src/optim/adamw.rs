//! AdamW (Loshchilov & Hutter 2019, algorithm 2) with torch's order of operations.

use candle_core::Tensor;
use peft_adapters::Params;
use serde::{Deserialize, Serialize};

use super::fused::{fused, update, update2};
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

/// The numbers of one parameter's step.
struct Rates {
    betas: [f64; 2],
    /// What the gradient is multiplied by.
    scale: f64,
    /// Learning rate over the first moment's bias correction.
    lr: f64,
    /// The second moment's bias correction, under the root.
    correction: f64,
    eps: f64,
    decay: f64,
}

impl AdamW {
    fn rates(&self, param: &peft_adapters::Param, lr: f64, scale: f64) -> Rates {
        let betas = self.config.betas;
        let [first, second] = betas.map(|b| 1.0 - b.powi(self.step as i32));
        let lr = lr * param.lr_factor;
        let decay = if param.decay { 1.0 - lr * self.config.weight_decay } else { 1.0 };
        Rates { betas, scale, lr: lr / first, correction: second.sqrt(), eps: self.config.eps, decay }
    }
}

impl Rates {
    /// One pass over each of the three tensors.
    fn in_place(&self, param: &peft_adapters::Param, grad: &Tensor, first: &Tensor, second: &Tensor) -> Result<()> {
        let (scale, [b1, b2]) = (self.scale as f32, self.betas.map(|b| b as f32));
        let [c1, c2] = self.betas.map(|b| (1.0 - b) as f32);
        update(first, grad, |m, g| m * b1 + g * scale * c1)?;
        update(second, grad, |v, g| v * b2 + (g * scale) * (g * scale) * c2)?;
        let (lr, correction, eps, decay) = (self.lr as f32, self.correction as f32, self.eps as f32, self.decay as f32);
        update2(param.var.as_tensor(), first, second, |p, m, v| p * decay - m / (v.sqrt() / correction + eps) * lr)?;
        Ok(())
    }

    /// The same in candle's operations, for every device and dtype; returns the new moments.
    fn composed(&self, param: &peft_adapters::Param, grad: &Tensor, first: &Tensor, second: &Tensor) -> Result<(Tensor, Tensor)> {
        let [b1, b2] = self.betas;
        let grad = (grad * self.scale)?;
        let first = ((first * b1)? + (&grad * (1.0 - b1))?)?;
        let second = ((second * b2)? + (grad.sqr()? * (1.0 - b2))?)?;
        let denominator = ((second.sqrt()? / self.correction)? + self.eps)?;
        let update = ((&first / denominator)? * self.lr)?;
        param.var.set(&((param.var.as_tensor().detach() * self.decay)? - update)?)?;
        Ok((first, second))
    }
}

impl Optimizer for AdamW {
    fn step(&mut self, params: &Params, grads: &[Option<Tensor>], lr: f64, scale: f64) -> Result<()> {
        self.step += 1;
        for (i, (param, grad)) in params.iter().zip(grads).enumerate() {
            let Some(grad) = grad else { continue };
            let grad = grad.to_dtype(param.var.dtype())?.contiguous()?;
            let rates = self.rates(param, lr, scale);
            if fused(&[param.var.as_tensor(), &grad, &self.first[i], &self.second[i]]) {
                rates.in_place(param, &grad, &self.first[i], &self.second[i])?;
            } else {
                (self.first[i], self.second[i]) = rates.composed(param, &grad, &self.first[i], &self.second[i])?;
            }
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
            // Half the gradient, scaled by two: what clipping does.
            adam.step(&params, &[Some((grad * 0.5).unwrap())], 0.1, 2.0).unwrap();
        }
        let got = params.get("p").unwrap().var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (g, w) in got.iter().zip(TORCH) {
            assert!((g - w).abs() < 1e-6, "{got:?}");
        }
    }

    /// f64 parameters take the composition, f32 the single pass.
    #[test]
    fn one_pass_equals_the_composition() {
        let run = |dtype| {
            let mut params = Params::with_dtype(0, dtype, &Device::Cpu);
            let start = Tensor::arange(0f64, 40_000.0, &Device::Cpu).unwrap();
            let start = ((start * 0.37).unwrap().sin().unwrap()).reshape((200, 200)).unwrap();
            params.declare(Spec::new("p", (200, 200), Start::Value(start))).unwrap();
            let mut adam = AdamW::new(AdamWConfig { weight_decay: 0.1, ..Default::default() }, &params).unwrap();
            for step in 1..=3 {
                let value = params.get("p").unwrap().var.as_tensor().detach();
                adam.step(&params, &[Some((value.cos().unwrap() * f64::from(step)).unwrap())], 0.01, 0.7).unwrap();
            }
            params.get("p").unwrap().var.to_dtype(candle_core::DType::F64).unwrap()
        };
        let off = (run(candle_core::DType::F32) - run(candle_core::DType::F64)).unwrap();
        let off = off.abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
        assert!(off < 1e-6, "{off}");
    }

    const TORCH: [f32; 4] = [0.677_83, -1.649_551_4, 0.190_064_85, 2.620_322_7];
}
