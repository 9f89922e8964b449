//! Stochastic gradient descent with momentum, as torch computes it.

use candle_core::Tensor;
use peft_adapters::Params;
use serde::{Deserialize, Serialize};

use super::{Optimizer, restored, zeros};
use crate::error::{Error, Result};

/// Options of SGD.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SgdConfig {
    /// Share of the previous update that is kept, in [0, 1).
    pub momentum: f64,
    /// Look ahead along the momentum.
    pub nesterov: bool,
    /// Added to the gradient as `weight_decay · p`; tensors below 2-D are spared.
    pub weight_decay: f64,
}

impl Default for SgdConfig {
    fn default() -> Self {
        Self { momentum: 0.9, nesterov: false, weight_decay: 0.0 }
    }
}

impl SgdConfig {
    pub(super) fn validate(&self, place: &str) -> Result<()> {
        if !(0.0..1.0).contains(&self.momentum) {
            return Err(Error::input(
                format!("{place}: train.optimizer.sgd.momentum"),
                format!("expected a number in [0, 1), found {}", self.momentum),
            ));
        }
        if !(self.weight_decay >= 0.0 && self.weight_decay.is_finite()) {
            return Err(Error::input(
                format!("{place}: train.optimizer.sgd.weight_decay"),
                format!("expected a number from 0, found {}", self.weight_decay),
            ));
        }
        Ok(())
    }
}

pub(super) struct Sgd {
    config: SgdConfig,
    velocity: Vec<Tensor>,
    params: Vec<peft_adapters::Param>,
}

impl Sgd {
    pub(super) fn new(config: SgdConfig, params: &Params) -> Result<Self> {
        Ok(Self { config, velocity: zeros(params)?, params: params.iter().cloned().collect() })
    }
}

impl Optimizer for Sgd {
    fn step(&mut self, params: &Params, grads: &[Option<Tensor>], lr: f64, scale: f64) -> Result<()> {
        let SgdConfig { momentum, nesterov, weight_decay } = self.config;
        for (i, (param, grad)) in params.iter().zip(grads).enumerate() {
            let Some(grad) = grad else { continue };
            let value = param.var.as_tensor().detach();
            let mut grad = (grad.to_dtype(value.dtype())? * scale)?;
            if weight_decay > 0.0 && param.decay {
                grad = (grad + (&value * weight_decay)?)?;
            }
            // From zero velocity this is torch's first step, which takes the gradient itself.
            let velocity = ((&self.velocity[i] * momentum)? + &grad)?;
            let update = if nesterov { (grad + (&velocity * momentum)?)? } else { velocity.clone() };
            param.var.set(&(value - (update * (lr * param.lr_factor))?)?)?;
            self.velocity[i] = velocity;
        }
        Ok(())
    }

    fn state(&self) -> Vec<(String, Tensor)> {
        let named = self.params.iter().zip(&self.velocity);
        named.map(|(p, v)| (format!("sgd.velocity.{}", p.name), v.clone())).collect()
    }

    fn restore(&mut self, take: &mut dyn FnMut(&str) -> Result<Tensor>) -> Result<()> {
        for (i, param) in self.params.iter().enumerate() {
            self.velocity[i] = restored("sgd.velocity", param, take)?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::Device;
    use peft_adapters::{Spec, Start};

    /// torch 2: `SGD(lr=0.1, momentum=0.9, nesterov=True)`, three steps with gradient p·(step).
    #[test]
    fn three_steps_equal_torch() {
        let mut params = Params::new(0, &Device::Cpu);
        let start = Tensor::new(&[[1f32, -2.0], [0.5, 3.0]], &Device::Cpu).unwrap();
        params.declare(Spec::new("p", (2, 2), Start::Value(start))).unwrap();
        let mut sgd = Sgd::new(SgdConfig { nesterov: true, ..Default::default() }, &params).unwrap();
        for step in 1..=3 {
            let grad = (params.get("p").unwrap().var.as_tensor().detach() * f64::from(step)).unwrap();
            sgd.step(&params, &[Some(grad)], 0.1, 1.0).unwrap();
        }
        let got = params.get("p").unwrap().var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (g, w) in got.iter().zip([-0.023_003_995f32, 0.046_007_99, -0.011_501_998, -0.069_011_95]) {
            assert!((g - w).abs() < 1e-6, "{got:?}");
        }
    }
}
