//! Trained layers with torch's names and initial values, for heads and fusions.

use candle_core::{DType, Device, Tensor};
use peft_adapters::ops::{self, Activation, AttentionShape};
use peft_adapters::{Params, Spec, Start};

use super::Pass;
use crate::clip::Tokens;
use crate::error::{Error, Result};

/// torch's default of `nn.LayerNorm`.
const EPS: f64 = 1e-5;

/// A weight of the task's own. Without gradients its value is read, and no graph is made.
#[derive(Debug)]
pub struct Weight(Tensor);

impl Weight {
    /// Declares `name`.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn declare(params: &mut Params, name: &str, shape: impl Into<candle_core::Shape>, start: Start) -> Result<Self> {
        params.declare(Spec::new(name, shape, start)).map(Self).map_err(|e| Error::input("task", e))
    }

    /// As this pass needs it.
    #[must_use]
    pub fn on(&self, pass: &Pass) -> Tensor {
        if pass.training { self.0.clone() } else { self.0.detach() }
    }

    /// What weights are in.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.0.dtype()
    }
}

/// `nn.Linear`: x Wᵀ + b, `name.weight` [out, in] and `name.bias` \[out\].
#[derive(Debug)]
pub struct Linear {
    weight: Weight,
    bias: Weight,
}

impl Linear {
    /// Initial values uniform in ±1/√in, as torch draws them.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn declare(params: &mut Params, name: &str, input: usize, output: usize) -> Result<Self> {
        let start = Start::KaimingUniform { fan_in: input };
        Ok(Self {
            weight: Weight::declare(params, &format!("{name}.weight"), (output, input), start.clone())?,
            bias: Weight::declare(params, &format!("{name}.bias"), output, start)?,
        })
    }

    /// Initial values as given; the bias is 0.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn starting(params: &mut Params, name: &str, (input, output): (usize, usize), start: Start) -> Result<Self> {
        Ok(Self {
            weight: Weight::declare(params, &format!("{name}.weight"), (output, input), start)?,
            bias: Weight::declare(params, &format!("{name}.bias"), output, Start::Zeros)?,
        })
    }

    /// # Shapes
    /// `x` [..., in] → [..., out]
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        Ok(ops::linear(&x.to_dtype(self.weight.dtype())?, &self.weight.on(pass), Some(&self.bias.on(pass)))?)
    }
}

/// `nn.LayerNorm`.
#[derive(Debug)]
pub struct Norm {
    weight: Weight,
    bias: Weight,
}

impl Norm {
    /// # Errors
    /// When the name is taken.
    pub fn declare(params: &mut Params, name: &str, dim: usize) -> Result<Self> {
        Ok(Self {
            weight: Weight::declare(params, &format!("{name}.weight"), dim, Start::Constant(1.0))?,
            bias: Weight::declare(params, &format!("{name}.bias"), dim, Start::Zeros)?,
        })
    }

    /// # Shapes
    /// `x` [..., D] → [..., D]
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        Ok(ops::layer_norm(x, &self.weight.on(pass), &self.bias.on(pass), EPS)?)
    }
}

/// `nn.MultiheadAttention` (Vaswani et al. 2017, section 3.2), `batch_first`: `in_proj_weight` [3D, D], `in_proj_bias` [3D],
/// `out_proj.weight`, `out_proj.bias`.
#[derive(Debug)]
pub struct Attention {
    weight: Weight,
    bias: Weight,
    out: Linear,
    dim: usize,
    heads: usize,
}

impl Attention {
    /// Initial values as torch draws them: Xavier for the input projection.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn declare(params: &mut Params, name: &str, dim: usize, heads: usize) -> Result<Self> {
        let bound = (6.0 / (4 * dim) as f64).sqrt();
        Ok(Self {
            weight: Weight::declare(params, &format!("{name}.in_proj_weight"), (3 * dim, dim), Start::Uniform { bound })?,
            bias: Weight::declare(params, &format!("{name}.in_proj_bias"), 3 * dim, Start::Zeros)?,
            out: Linear::starting(params, &format!("{name}.out_proj"), (dim, dim), Start::KaimingUniform { fan_in: dim })?,
            dim,
            heads,
        })
    }

    /// # Shapes
    /// `query` [B, Tq, D], `context` [B, Tk, D], `mask` [B, Tk] u8 with 1 for visible → [B, Tq, D]
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(&self, query: &Tensor, context: &Tensor, mask: Option<&Tensor>, pass: &Pass) -> Result<Tensor> {
        let (weight, bias) = (self.weight.on(pass), self.bias.on(pass));
        let project = |x: &Tensor, part: usize| -> Result<Tensor> {
            let weight = weight.narrow(0, part * self.dim, self.dim)?.contiguous()?;
            Ok(ops::linear(x, &weight, Some(&bias.narrow(0, part * self.dim, self.dim)?.contiguous()?))?)
        };
        let shape = AttentionShape { heads: self.heads, causal: false, prefix: 0 };
        let a = ops::attention(&project(query, 0)?, &project(context, 1)?, &project(context, 2)?, &shape, mask)?;
        self.out.forward(&a, pass)
    }
}

/// linear2(dropout(gelu(linear1(x)))), as inside `nn.TransformerEncoderLayer`.
#[derive(Debug)]
pub struct FeedForward {
    up: Linear,
    down: Linear,
    dropout: f64,
    name: String,
}

impl FeedForward {
    /// # Errors
    /// When the name is taken.
    pub fn declare(params: &mut Params, name: &str, (dim, hidden): (usize, usize), dropout: f64) -> Result<Self> {
        Ok(Self {
            up: Linear::declare(params, &format!("{name}.linear1"), dim, hidden)?,
            down: Linear::declare(params, &format!("{name}.linear2"), hidden, dim)?,
            dropout,
            name: format!("{name}.feedforward"),
        })
    }

    /// # Shapes
    /// `x` [..., D] → [..., D]
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let hidden = ops::activation(&self.up.forward(x, pass)?, Activation::Gelu)?;
        self.down.forward(&pass.dropout(hidden, self.dropout, &self.name)?, pass)
    }
}

/// Which tokens of a row are words: those up to the pooled one, which is the last. [B, T] u8.
///
/// # Errors
/// When the tensor cannot be made.
pub fn visible(tokens: &Tokens) -> Result<Tensor> {
    let (batch, len, _) = tokens.x.dims3()?;
    let row = |b: usize| {
        let last = tokens.pool.get(b).map_or(len - 1, |&p| p as usize);
        (0..len).map(move |t| u8::from(t <= last))
    };
    let all: Vec<u8> = (0..batch).flat_map(row).collect();
    Ok(Tensor::from_vec(all, (batch, len), tokens.x.device())?)
}

/// One token of each row, [B, D]: `at`, or the first where it is empty; `offset` is added.
///
/// # Errors
/// When a position is outside.
pub fn pick(x: &Tensor, at: &[u32], offset: usize) -> Result<Tensor> {
    let (batch, len, dim) = x.dims3()?;
    let rows: Vec<u32> = (0..batch).map(|b| (b * len + offset) as u32 + at.get(b).copied().unwrap_or(0)).collect();
    Ok(ops::embedding(&x.reshape((batch * len, dim))?, &Tensor::from_vec(rows, batch, &device(x))?)?)
}

fn device(x: &Tensor) -> Device {
    x.device().clone()
}
