//! Scaled dot-product attention over heads that lie side by side in the width.
//!
//! Each head of each example is one task of small products and a softmax; nothing is
//! transposed and no probabilities are kept: the backward pass computes them again.

#[allow(unsafe_code, reason = "heads write to disjoint columns of one buffer")]
mod kernels;
#[cfg(test)]
mod tests;

use std::ops::Range;

use candle_core::{Device, Result, Shape, Tensor, bail};

use self::kernels::{backward, forward};
use super::float::Float;
use super::graph::{self, Want, apply};
use super::kernels::{View, fused};
use super::{AttentionShape, portable};

/// See [`super::attention`].
pub(super) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, shape: &AttentionShape, key_mask: Option<&Tensor>) -> Result<Tensor> {
    if !fused([q, k, v]) {
        return portable::attention(q, k, v, shape, key_mask);
    }
    let geometry = Geometry::new(q, k, v, shape)?;
    let op = Op { mask: mask(key_mask, &geometry)?, geometry };
    apply(op, [&q.contiguous()?, &k.contiguous()?, &v.contiguous()?])
}

/// The visible keys, or nothing where all are.
fn mask(key_mask: Option<&Tensor>, g: &Geometry) -> Result<Option<Vec<u8>>> {
    let Some(mask) = key_mask else { return Ok(None) };
    if mask.dims() != [g.batch, g.keys] {
        bail!("a key mask {:?} does not fit {} rows of {} keys", mask.shape(), g.batch, g.keys);
    }
    let mask: Vec<u8> = mask.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
    Ok(mask.contains(&0).then_some(mask))
}

/// The sizes, and which keys a query sees.
#[derive(Debug, Clone, Copy)]
struct Geometry {
    batch: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    /// The width of a head.
    head: usize,
    causal: bool,
    prefix: usize,
}

impl Geometry {
    fn new(q: &Tensor, k: &Tensor, v: &Tensor, shape: &AttentionShape) -> Result<Self> {
        let (batch, queries, width) = q.dims3()?;
        let keys = k.dims3()?.1;
        if k.dims() != [batch, keys, width] || v.dims() != k.dims() {
            bail!("queries {:?}, keys {:?} and values {:?} do not fit", q.shape(), k.shape(), v.shape());
        }
        if shape.heads == 0 || width % shape.heads != 0 {
            bail!("a width of {width} does not split into {} heads", shape.heads);
        }
        Ok(Self { batch, queries, keys, heads: shape.heads, head: width / shape.heads, causal: shape.causal, prefix: shape.prefix })
    }

    fn width(&self) -> usize {
        self.heads * self.head
    }

    /// How many leading keys a query sees.
    fn seen(&self, query: usize) -> usize {
        if self.causal { self.prefix.saturating_add(query + 1).min(self.keys) } else { self.keys }
    }

    /// How many leading keys some query sees.
    fn covered(&self) -> usize {
        self.seen(self.queries.saturating_sub(1))
    }

    /// Whether there is nothing to compute.
    fn is_empty(&self) -> bool {
        self.batch * self.queries * self.keys * self.width() == 0
    }

    /// Runs of queries that are worked on together; short ones skip much of the hidden triangle.
    fn blocks(&self) -> impl DoubleEndedIterator<Item = Range<usize>> + use<> {
        let longest = if self.causal { 64 } else { 256 };
        let queries = self.queries;
        let step = queries.div_ceil(queries.div_ceil(longest).max(1)).max(1);
        (0..queries.div_ceil(step)).map(move |i| i * step..queries.min((i + 1) * step))
    }
}

struct Op {
    geometry: Geometry,
    mask: Option<Vec<u8>>,
}

impl graph::Op<3> for Op {
    const NAME: &'static str = "attention";

    fn forward<T: Float>(&self, [q, k, v]: &[View<'_>; 3]) -> Result<(Vec<T>, Shape)> {
        let out = forward(&self.geometry, [q.slice::<T>()?, k.slice()?, v.slice()?], self.mask.as_deref());
        Ok((out, Shape::from(q.dims())))
    }

    fn backward<T: Float>(&self, [q, k, v]: &[View<'_>; 3], dy: &[T], want: [Want<T>; 3]) -> Result<[Option<Vec<T>>; 3]> {
        let qkv = [q.slice::<T>()?, k.slice()?, v.slice()?];
        let wanted = want.each_ref().map(Want::any);
        let [dq, dk, dv] = backward(&self.geometry, qkv, dy, self.mask.as_deref(), wanted);
        let [q, k, v] = want;
        let added = |want: Want<T>, d: Option<Vec<T>>| want.plus(|| d.unwrap_or_default());
        Ok([added(q, dq), added(k, dk), added(v, dv)])
    }
}
