//! Parameterised hypercomplex layers (Zhang et al. 2021, arXiv 2102.08597): a matrix as a sum of Kronecker products, whose small
//! factors all layers share and whose large ones are low-rank (Compacter, Karimi Mahabadi et al. 2021, arXiv 2106.04647, eq. 6).

use candle_core::{Result as TensorResult, Tensor};
use serde::{Deserialize, Serialize};

use crate::params::{Params, Spec, Start};
use crate::{Error, Result};

/// Options of hypercomplex layers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PhmConfig {
    /// How many products are summed, at least 1; divides widths. Higher: fewer parameters.
    pub n: usize,
    /// Rank of the large factors, at least 1. Higher: more capacity.
    pub rank: usize,
    /// Whether all layers share the small factors. `false`: more parameters, layers learn apart.
    pub shared: bool,
}

impl Default for PhmConfig {
    fn default() -> Self {
        Self { n: 4, rank: 1, shared: true }
    }
}

impl PhmConfig {
    /// Checks the ranges that need no model.
    ///
    /// # Errors
    /// When a value is 0.
    pub fn check(&self) -> Result<()> {
        match (self.n, self.rank) {
            (0, _) => Err(Error::config("hypercomplex.n", "expected at least 1, found 0")),
            (_, 0) => Err(Error::config("hypercomplex.rank", "expected at least 1, found 0")),
            _ => Ok(()),
        }
    }

    /// The small factors, [n, n, n], as `name`.
    ///
    /// # Errors
    /// When another method has the name.
    pub fn rule(&self, name: String, params: &mut Params) -> Result<Tensor> {
        // Near the size at which a product keeps the scale of its input.
        let start = Start::Normal { std: 1.0 / self.n as f64 };
        params.declare(Spec { decay: Some(false), ..Spec::new(name, (self.n, self.n, self.n), start) })
    }
}

/// `W = Σₖ (ruleₖ ⊗ leftₖ rightₖ)ᵀ`.
#[derive(Debug)]
pub struct Phm {
    /// [n, n, n].
    rule: Tensor,
    /// [n, in/n, r].
    left: Tensor,
    /// [n, r, out/n].
    right: Tensor,
}

impl Phm {
    /// Declares the large factors as `name.phm_left` and `name.phm_right`; with `zero` the matrix starts at 0.
    ///
    /// # Errors
    /// When n does not divide a width.
    pub fn plan(
        config: &PhmConfig,
        rule: Tensor,
        name: &str,
        (output, input): (usize, usize),
        zero: bool,
        params: &mut Params,
    ) -> Result<Self> {
        let n = config.n;
        if !input.is_multiple_of(n) || !output.is_multiple_of(n) {
            return Err(Error::config("hypercomplex.n", format!("expected a divisor of {input} and {output} at {name}, found {n}")));
        }
        let mut declare = |part: &str, shape, start| params.declare(Spec::new(format!("{name}.phm_{part}"), shape, start));
        let end = if zero { Start::Zeros } else { Start::KaimingUniform { fan_in: config.rank } };
        Ok(Self {
            rule,
            left: declare("left", (n, input / n, config.rank), Start::KaimingUniform { fan_in: input / n })?,
            right: declare("right", (n, config.rank, output / n), end)?,
        })
    }

    /// The matrix.
    ///
    /// # Shapes
    /// [out, in]
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn weight(&self) -> TensorResult<Tensor> {
        let large = self.left.matmul(&self.right)?;
        let (n, input, output) = large.dims3()?;
        // All n products at once: the small factors' entries against the large ones.
        let sum = self.rule.reshape((n, n * n))?.t()?.matmul(&large.reshape((n, input * output))?)?;
        sum.reshape((n, n, input, output))?.permute((1, 3, 0, 2))?.contiguous()?.reshape((n * output, n * input))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// `sum(torch.kron(rule[k], left[k] @ right[k]) for k in range(2)).t()`.
    #[test]
    fn weights_are_torchs_sums_of_kronecker_products() {
        let tensor = |values: &[f32], dims: (usize, usize, usize)| Tensor::from_slice(values, dims, &Device::Cpu).unwrap();
        let phm = Phm {
            rule: tensor(&[1.0, 0.0, -3.0, -1.0, -2.0, -1.0, 3.0, 0.0], (2, 2, 2)),
            left: tensor(&[1.0, 2.0, -1.0, -3.0], (2, 2, 1)),
            right: tensor(&[-2.0, 2.0, -1.0, 1.0, 1.0, -1.0], (2, 1, 3)),
        };
        let expected = [
            [0.0, 2.0, 3.0, 3.0],
            [4.0, 10.0, -9.0, -21.0],
            [-3.0, -8.0, 6.0, 15.0],
            [1.0, 3.0, 2.0, 4.0],
            [1.0, 3.0, -2.0, -4.0],
            [-1.0, -3.0, 1.0, 2.0],
        ];
        assert_eq!(phm.weight().unwrap().to_vec2::<f32>().unwrap(), expected);
    }
}
