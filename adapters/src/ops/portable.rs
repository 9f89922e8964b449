//! The operations as compositions of candle's own differentiable ones: any device, any float.

use std::ops::Range;

use candle_core::{D, DType, Result, Tensor};

use super::{Activation, AttentionShape, LowRank};

/// See [`super::linear`].
pub(super) fn linear(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let (out, input) = w.dims2()?;
    let mut dims = x.dims().to_vec();
    let rows = x.elem_count() / input.max(1);
    let y = x.reshape((rows, input))?.matmul(&w.t()?)?;
    let y = match b {
        Some(b) => y.broadcast_add(b)?,
        None => y,
    };
    if let Some(last) = dims.last_mut() {
        *last = out;
    }
    y.reshape(dims)
}

/// See [`super::lora_linear`].
pub(super) fn lora_linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>, lora: &LowRank<'_>) -> Result<Tensor> {
    let base = super::linear(x, w, bias)?;
    let x = match lora.dropout {
        Some(mask) => (x * mask)?,
        None => x.clone(),
    };
    let down = super::linear(&x, lora.a, None)?;
    base + (super::linear(&down, lora.b, None)? * lora.scale)?
}

/// See [`super::scale`].
pub(super) fn scale(x: &Tensor, scale: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let y = x.broadcast_mul(scale)?;
    b.map_or(Ok(y.clone()), |b| y.broadcast_add(b))
}

/// The dtype sums are taken in: f32 for half floats.
fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// See [`super::layer_norm`].
pub(super) fn layer_norm(x: &Tensor, w: &Tensor, b: &Tensor, eps: f64) -> Result<Tensor> {
    let wide_x = x.to_dtype(wide(x.dtype()))?;
    let centred = wide_x.broadcast_sub(&wide_x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let deviation = (variance + eps)?.sqrt()?;
    // 0 for what is finite; a deviation that overflowed becomes NaN, since a division by it would look like a result.
    let deviation = (&deviation + (&deviation * 0.0)?)?;
    let normed = centred.broadcast_div(&deviation)?;
    normed.to_dtype(x.dtype())?.broadcast_mul(w)?.broadcast_add(b)
}

/// [B, T, H·d] → [B, H, T, d].
fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, len, dim) = x.dims3()?;
    x.reshape((batch, len, heads, dim / heads.max(1)))?.transpose(1, 2)?.contiguous()
}

/// See [`super::attention`].
pub(super) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, shape: &AttentionShape, key_mask: Option<&Tensor>) -> Result<Tensor> {
    let (batch, queries, dim) = q.dims3()?;
    let keys = k.dim(1)?;
    let scale = ((dim / shape.heads.max(1)) as f64).powf(-0.5);
    let (q, k, v) = (split_heads(q, shape.heads)?, split_heads(k, shape.heads)?, split_heads(v, shape.heads)?);
    let scores = (q.matmul(&k.t()?.contiguous()?)? * scale)?;
    let scores = scores.to_dtype(wide(scores.dtype()))?;
    let probabilities = match visible(batch, queries, keys, shape, key_mask)? {
        None => softmax(&scores)?,
        Some(visible) => {
            let visible = visible.to_device(q.device())?.to_dtype(scores.dtype())?;
            // Hidden scores are pushed down before the maximum is taken and zeroed after.
            let hidden = visible.affine(1e9, -1e9)?;
            softmax(&scores.broadcast_add(&hidden)?)?.broadcast_mul(&visible)?
        }
    };
    let out = probabilities.to_dtype(v.dtype())?.matmul(&v)?;
    out.transpose(1, 2)?.reshape((batch, queries, dim))
}

fn softmax(x: &Tensor) -> Result<Tensor> {
    let max = x.max_keepdim(D::Minus1)?.detach();
    let exp = x.broadcast_sub(&max)?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)
}

/// [B or 1, 1, Tq or 1, Tk] of 0 and 1 (u8), or nothing where all keys are visible.
fn visible(batch: usize, queries: usize, keys: usize, shape: &AttentionShape, key_mask: Option<&Tensor>) -> Result<Option<Tensor>> {
    let cpu = candle_core::Device::Cpu;
    let mask = match key_mask {
        Some(m) => Some(m.to_device(&cpu)?.reshape((batch, 1, 1, keys))?),
        None => None,
    };
    if !shape.causal {
        return Ok(mask);
    }
    let causal: Vec<u8> = (0..queries).flat_map(|i| (0..keys).map(move |j| u8::from(j <= i + shape.prefix))).collect();
    let causal = Tensor::from_vec(causal, (1, 1, queries, keys), &cpu)?;
    Ok(Some(match mask {
        Some(m) => m.broadcast_mul(&causal)?,
        None => causal,
    }))
}

/// See [`super::activation`].
pub(super) fn activation(x: &Tensor, act: Activation) -> Result<Tensor> {
    match act {
        Activation::QuickGelu => x * sigmoid(&(x * 1.702)?)?,
        Activation::Gelu => x.gelu_erf(),
        Activation::GeluTanh => x.gelu(),
        Activation::Relu => x.relu(),
        Activation::Silu => x * sigmoid(x)?,
        Activation::Tanh => x.tanh(),
        Activation::Identity => Ok(x.clone()),
    }
}

/// `(1 + tanh(x / 2)) / 2`, which neither overflows nor loses its gradient.
fn sigmoid(x: &Tensor) -> Result<Tensor> {
    (x * 0.5)?.tanh()?.affine(0.5, 0.5)
}

/// See [`super::splice`].
pub(super) fn splice(x: &Tensor, rows: &Tensor, at: Range<usize>) -> Result<Tensor> {
    let (batch, len, dim) = x.dims3()?;
    let rows = rows.unsqueeze(0)?.broadcast_as((batch, rows.dim(0)?, dim))?;
    Tensor::cat(&[&x.narrow(1, 0, at.start)?, &rows, &x.narrow(1, at.end, len - at.end)?], 1)
}

/// See [`super::embedding`].
pub(super) fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let mut dims = ids.dims().to_vec();
    dims.push(table.dim(1)?);
    table.index_select(&ids.flatten_all()?, 0)?.reshape(dims)
}
