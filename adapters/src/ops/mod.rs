//! Differentiable operations of a transformer, each with a portable composition.
//!
//! On CPU in f32 and f64 the fused versions run; everywhere else, and where
//! [`set_portable`] says so, the compositions of [`portable`](mod@portable) do.
//!
//! Gradients between fused operations do not pass through candle's store (`ops/slot.rs` says how and why). Two backward passes
//! through the same values must therefore not run at the same time.

use std::cell::Cell;
use std::ops::Range;

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

mod activation;
mod add;
mod attention;
mod embedding;
mod float;
pub mod floor;
#[allow(unsafe_code, reason = "matrices as pointers, which gemm takes")]
mod gemm;
pub(crate) mod graph;
mod kernels;
mod linear;
mod lora;
mod norm;
pub mod portable;
mod release;
mod scale;
mod simd;
mod slot;
mod splice;
#[cfg(test)]
pub(crate) mod testing;

thread_local! {
    static PORTABLE: Cell<bool> = const { Cell::new(false) };
}

/// Forces the portable compositions in whatever this thread computes, for comparison in tests.
pub fn set_portable(on: bool) {
    PORTABLE.set(on);
}

/// Whether the portable compositions are forced on this thread.
#[must_use]
pub fn portable() -> bool {
    PORTABLE.get()
}

/// An elementwise non-linearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x · σ(1.702 x)`, OpenAI's CLIP.
    QuickGelu,
    /// `x · Φ(x)` with the error function.
    Gelu,
    /// The tanh approximation of [`Activation::Gelu`].
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `x · σ(x)`.
    Silu,
    /// `tanh(x)`.
    Tanh,
    /// `x`.
    Identity,
}

/// The low-rank part of a [`lora_linear`].
#[derive(Debug, Clone, Copy)]
pub struct LowRank<'a> {
    /// `[r, in]`.
    pub a: &'a Tensor,
    /// `[out, r]`.
    pub b: &'a Tensor,
    /// α/r or α/√r.
    pub scale: f64,
    /// A mask over the input, already divided by the keep probability.
    pub dropout: Option<&'a Tensor>,
}

/// What [`attention`] needs to know besides its operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// Number of heads; divides the width.
    pub heads: usize,
    /// Whether query `i` sees keys up to `i` only (prefix keys not counted).
    pub causal: bool,
    /// How many leading keys every query sees.
    pub prefix: usize,
}

/// `x Wᵀ + b`.
///
/// # Shapes
/// `x` [..., in], `w` [out, in], `b` [out] → [..., out]
///
/// # Errors
/// When shapes do not fit.
pub fn linear(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    linear::linear(x, w, b)
}

/// [`linear`] for the sake of its gradient: where weight and bias are frozen the product is not made and zeros stand for it.
///
/// # Shapes
/// `x` [..., in], `w` [out, in], `b` [out] → [..., out]
///
/// # Errors
/// When shapes do not fit.
pub fn linear_unread(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    linear::linear_unread(x, w, b)
}

/// `x Wᵀ + b + s (x ∘ dropout) Aᵀ Bᵀ`, Hu et al. 2021, eq. 3.
///
/// # Shapes
/// `x` [..., in], `w` [out, in], `bias` [out] → [..., out]
///
/// # Errors
/// When shapes do not fit.
pub fn lora_linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>, lora: &LowRank<'_>) -> Result<Tensor> {
    lora::lora_linear(x, w, bias, lora)
}

/// `a + b`, elementwise.
///
/// # Errors
/// When the shapes differ.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    add::add(a, b)
}

/// `x ∘ scale + b` over the last dimension.
///
/// # Shapes
/// `x` [..., D], `scale` and `b` [D] → [..., D]
///
/// # Errors
/// When shapes do not fit.
pub fn scale(x: &Tensor, scale: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    scale::scale(x, scale, b)
}

/// Layer norm over the last dimension, biased variance.
///
/// # Shapes
/// `x` [..., D], `w` and `b` [D] → [..., D]
///
/// # Errors
/// When shapes do not fit.
pub fn layer_norm(x: &Tensor, w: &Tensor, b: &Tensor, eps: f64) -> Result<Tensor> {
    norm::layer_norm(x, w, b, eps)
}

/// Multi-head scaled dot-product attention.
///
/// A query that sees no key gives zeros.
///
/// # Shapes
/// `q` [B, Tq, D], `k` and `v` [B, Tk, D], `key_mask` [B, Tk] u8 with 1 for visible → [B, Tq, D]
///
/// # Errors
/// When shapes do not fit.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, shape: &AttentionShape, key_mask: Option<&Tensor>) -> Result<Tensor> {
    attention::attention(q, k, v, shape, key_mask)
}

/// The non-linearity, elementwise.
///
/// # Errors
/// When the dtype is no float.
pub fn activation(x: &Tensor, act: Activation) -> Result<Tensor> {
    activation::activation(x, act)
}

/// Rows of a table.
///
/// # Shapes
/// `table` [N, D], `ids` u32 [...] → [..., D]
///
/// # Errors
/// When an id is outside the table.
pub fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    embedding::embedding(table, ids)
}

/// Sequences with `rows` in place of their tokens in `at`, the same rows for each.
///
/// # Shapes
/// `x` [B, T, D], `rows` [L, D] → [B, T - |at| + L, D]
///
/// # Errors
/// When shapes do not fit or the range is outside.
pub fn splice(x: &Tensor, rows: &Tensor, at: Range<usize>) -> Result<Tensor> {
    splice::splice(x, rows, at)
}

/// Gives back the memory of a constant that nobody will read again; nothing happens where other tensors share it.
///
/// # Errors
/// When another thread failed while it held the memory.
pub fn discard(t: &Tensor) -> Result<()> {
    release::discard(t)
}

/// Gives back the memory of a value that its graph holds but that no backward pass will read, such as the input of a
/// [`linear`] whose weight and bias are frozen. Nothing happens to constants, nor where the portable compositions run:
/// their backward passes read everything.
///
/// The tensor, and every view of it, has no values afterwards.
///
/// # Errors
/// When another thread failed while it held the memory.
pub fn release(t: &Tensor) -> Result<()> {
    release::release(t)
}
