//! What flows through the hooks.

use candle_core::{Result, Tensor};

use crate::ops;

/// The low-rank term of a linear layer.
#[derive(Debug, Clone)]
pub struct LowRankTerm {
    /// `[r, in]`.
    pub a: Tensor,
    /// `[out, r]`.
    pub b: Tensor,
    /// α/r or α/√r.
    pub scale: f64,
    /// A mask over `x`, already divided by the keep probability.
    pub dropout: Option<Tensor>,
}

/// The output of a linear layer, not computed until somebody asks.
///
/// A patch describes what it adds; the product with the frozen weight, the bias and the
/// first low-rank term then run as one fused operation.
#[derive(Debug)]
pub struct LinearOut {
    x: Tensor,
    weight: Tensor,
    bias: Option<Tensor>,
    term: Option<LowRankTerm>,
    value: Option<Tensor>,
}

impl LinearOut {
    /// `x` [..., in], `weight` [out, in], `bias` [out].
    #[must_use]
    pub fn new(x: Tensor, weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { x, weight, bias, term: None, value: None }
    }

    /// The layer's input, [..., in].
    #[must_use]
    pub fn x(&self) -> &Tensor {
        &self.x
    }

    /// Adds `scale · (x ∘ dropout) Aᵀ Bᵀ`. The first term fuses with the frozen product.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn low_rank(mut self, term: LowRankTerm) -> Result<Self> {
        if self.value.is_none() && self.term.is_none() {
            self.term = Some(term);
            return Ok(self);
        }
        let x = match &term.dropout {
            Some(mask) => (&self.x * mask)?,
            None => self.x.clone(),
        };
        let down = ops::linear(&x, &term.a, None)?;
        let up = (ops::linear(&down, &term.b, None)? * term.scale)?;
        self.map(|y| ops::add(&y, &up))
    }

    /// Multiplies the input by `scale` [in], that of a low-rank term too.
    ///
    /// # Errors
    /// When shapes do not fit, or an earlier patch has already computed something of the input.
    pub fn scale_input(mut self, scale: &Tensor) -> Result<Self> {
        if self.value.is_some() {
            candle_core::bail!("a method that scales this layer's input has to stand before those that change its output in the recipe");
        }
        self.x = ops::scale(&self.x, scale, None)?;
        Ok(self)
    }

    /// Multiplies each output row of the product by `scale` [out], before the bias is added (DoRA).
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn scale_rows(mut self, scale: &Tensor) -> Result<Self> {
        let bias = self.bias.take();
        let product = match self.value.take() {
            // Already forced: take the bias out again.
            Some(y) => match &bias {
                Some(b) => y.broadcast_sub(b)?,
                None => y,
            },
            None => self.compute()?,
        };
        self.value = Some(ops::scale(&product, scale, bias.as_ref())?);
        self.bias = bias;
        Ok(self)
    }

    /// Adds a low-rank term and multiplies each row of the sum of the weights by `scale` [out] (DoRA): `scale ∘ (W + s B A) x`.
    /// As in HF PEFT, dropout is of the whole change: `W x + (scale ∘ (W + s B A) − W) (x ∘ dropout)`.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn decomposed(mut self, mut term: LowRankTerm, scale: &Tensor) -> Result<Self> {
        let Some(mask) = term.dropout.take() else { return self.low_rank(term)?.scale_rows(scale) };
        let kept = (&self.x * mask)?;
        let lora = ops::LowRank { a: &term.a, b: &term.b, scale: term.scale, dropout: None };
        let changed = ops::scale(&ops::lora_linear(&kept, &self.weight, None, &lora)?, scale, None)?;
        let rest = match (self.value.take(), self.term.is_some()) {
            // W (x − kept): what is dropped goes through the frozen weight alone.
            (None, false) => ops::linear(&(&self.x - &kept)?, &self.weight, self.bias.as_ref())?,
            (value, _) => {
                let before = value.map_or_else(|| self.compute(), Ok)?;
                (before - ops::linear(&kept, &self.weight, None)?)?
            }
        };
        self.value = Some(ops::add(&rest, &changed)?);
        Ok(self)
    }

    /// Changes the computed output.
    ///
    /// # Errors
    /// What `f` returns, or when shapes do not fit.
    pub fn map(mut self, f: impl FnOnce(Tensor) -> Result<Tensor>) -> Result<Self> {
        let y = match self.value.take() {
            Some(y) => y,
            None => self.compute()?,
        };
        self.value = Some(f(y)?);
        Ok(self)
    }

    /// Whether the backward pass will not read `x`: nothing but the product with frozen weights is made of it.
    #[must_use]
    pub fn spares(&self, x: &Tensor) -> bool {
        let frozen = !self.weight.track_op() && self.bias.as_ref().is_none_or(|b| !b.track_op());
        frozen && self.value.is_none() && self.term.is_none() && self.x.id() == x.id()
    }

    /// The output, [..., out].
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn value(self) -> Result<Tensor> {
        match self.value {
            Some(y) => Ok(y),
            None => self.compute(),
        }
    }

    /// The output for the sake of its gradient: its values may be wrong.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn unread(self) -> Result<Tensor> {
        match (&self.value, &self.term) {
            (None, None) => ops::linear_unread(&self.x, &self.weight, self.bias.as_ref()),
            _ => self.value(),
        }
    }

    fn compute(&self) -> Result<Tensor> {
        match &self.term {
            None => ops::linear(&self.x, &self.weight, self.bias.as_ref()),
            Some(t) => {
                let lora = ops::LowRank { a: &t.a, b: &t.b, scale: t.scale, dropout: t.dropout.as_ref() };
                ops::lora_linear(&self.x, &self.weight, self.bias.as_ref(), &lora)
            }
        }
    }
}

/// Queries, keys and values on their way into attention.
#[derive(Debug, Clone)]
pub struct Qkv {
    /// [B, Tq, D].
    pub q: Tensor,
    /// [B, prefix + Tk, D].
    pub k: Tensor,
    /// [B, prefix + Tk, D].
    pub v: Tensor,
    /// How many leading keys every query may see, whatever the causal mask says.
    pub prefix: usize,
}

/// A token sequence.
#[derive(Debug, Clone)]
pub struct Sequence {
    /// [B, T, D].
    pub x: Tensor,
    /// The position whose output is pooled, one for each row; empty where the first token is.
    pub pool: Vec<u32>,
}

/// Tokens on their way into a tower: texts before positions are added, images after that and before the first norm.
#[derive(Debug, Clone)]
pub struct Embedded {
    /// [B, T, D].
    pub x: Tensor,
    /// Texts: the end of each, whose output is pooled. Empty for images.
    pub pool: Vec<u32>,
    /// Texts: the class name of each. Empty for images and for captions, which count as names from begin to end.
    pub names: Vec<ClassName>,
    /// Texts that are encoded for one image each: its normalised feature, [B, P].
    pub images: Option<Tensor>,
}

/// Where the class name stands in a tokenised text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClassName {
    /// Which class it is.
    pub class: u32,
    /// Its first token, counted from the begin token.
    pub start: u32,
    /// How many tokens it has.
    pub len: u32,
}

/// A residual branch that has been computed.
#[derive(Debug)]
pub struct Branch<'a> {
    /// What entered the block's norm, [B, T, D].
    pub residual: &'a Tensor,
    /// What the norm gave to the branch, [B, T, D].
    pub input: &'a Tensor,
    /// What the branch gave, before it is added to the residual, [B, T, D].
    pub output: Tensor,
}

/// The text side of a classifier.
#[derive(Debug, Clone)]
pub enum ClassFeatures {
    /// The same for every image, [C, D].
    Shared(Tensor),
    /// One set for each image, [B, C, D] (CoCoOp).
    PerImage(Tensor),
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::ops::testing::random;

    /// HF PEFT, `DoraLinearLayer.forward`: base + (m − 1)·W x' + m·s·B A x', x' the input after dropout.
    #[test]
    fn dropout_of_a_decomposed_weight_is_hf_pefts() {
        let [x, w, b, a, up, m] =
            [(&[3, 5][..], 1), (&[4, 5], 2), (&[4], 3), (&[2, 5], 4), (&[4, 2], 5), (&[4], 6)].map(|(d, s)| random(d, s));
        let mask = (random(&[3, 5], 7).ge(0.0).unwrap().to_dtype(x.dtype()).unwrap() * 2.0).unwrap();
        let kept = (&x * &mask).unwrap();
        let product = |x: &Tensor, w: &Tensor| x.matmul(&w.t().unwrap()).unwrap();
        let base = product(&x, &w).broadcast_add(&b).unwrap();
        let change = product(&kept, &w).broadcast_mul(&(&m - 1.0).unwrap()).unwrap();
        let low = (product(&product(&kept, &a), &up) * 0.5).unwrap().broadcast_mul(&m).unwrap();
        let expected = ((&base + change).unwrap() + low).unwrap();
        let term = || LowRankTerm { a: a.clone(), b: up.clone(), scale: 0.5, dropout: Some(mask.clone()) };
        let fresh = LinearOut::new(x.clone(), w.clone(), Some(b.clone())).decomposed(term(), &m).unwrap();
        let touched = LinearOut::new(x, w, Some(b)).map(Ok).unwrap().decomposed(term(), &m).unwrap();
        for found in [fresh.value().unwrap(), touched.value().unwrap()] {
            let off = (found - &expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
            assert!(off < 1e-12, "{off}");
        }
    }
}
