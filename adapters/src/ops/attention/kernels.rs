//! The loops of attention.

use std::ops::Range;

use rayon::prelude::*;

use super::super::float::Float;
use super::super::gemm::{Mat, MatMut, Old, Shared, Threads, gemm};
use super::super::kernels::{LANES, fold, uninit};
use super::super::simd::vectorised;
use super::Geometry;

/// Fewer multiplications than this are done by one thread.
const PARALLEL_FROM: usize = 64 * 1024;

/// Calls `f` with the example and the head of every task, and with buffers that it may grow.
fn for_heads<T: Float>(g: &Geometry, f: impl Fn(&mut [Vec<T>; 2], usize, usize) + Sync) {
    let tasks = g.batch * g.heads;
    let run = |buffers: &mut [Vec<T>; 2], task: usize| f(buffers, task / g.heads, task % g.heads);
    let buffers = || [Vec::new(), Vec::new()];
    if tasks * g.queries * g.keys * g.head < PARALLEL_FROM {
        let mut buffers = buffers();
        (0..tasks).for_each(|task| run(&mut buffers, task));
    } else {
        (0..tasks).into_par_iter().for_each_init(buffers, run);
    }
}

/// One head of one example: where it lies in queries and keys.
#[derive(Clone, Copy)]
struct Head<'a> {
    g: &'a Geometry,
    queries: usize,
    keys: usize,
    mask: Option<&'a [u8]>,
}

impl<'a> Head<'a> {
    fn new(g: &'a Geometry, mask: Option<&'a [u8]>, example: usize, head: usize) -> Self {
        Self {
            g,
            queries: example * g.queries * g.width() + head * g.head,
            keys: example * g.keys * g.width() + head * g.head,
            mask: mask.map(|m| &m[example * g.keys..][..g.keys]),
        }
    }

    fn first_query(&self, block: &Range<usize>) -> usize {
        self.queries + block.start * self.g.width()
    }

    /// These queries, or what has their shape.
    fn queries<'t, T>(&self, data: &'t [T], block: &Range<usize>) -> Mat<'t, T> {
        Mat::strided(&data[self.first_query(block)..], block.len(), self.g.head, self.g.width())
    }

    /// The first `seen` keys, or what has their shape.
    fn keys<'t, T>(&self, data: &'t [T], seen: usize) -> Mat<'t, T> {
        Mat::strided(&data[self.keys..], seen, self.g.head, self.g.width())
    }

    /// Where to write these queries' rows.
    fn query_block<'s, T>(&self, out: &Shared<'s, T>, block: &Range<usize>) -> MatMut<'s, T> {
        // SAFETY: only this task has this head's columns of this example's rows, and it makes
        // one block of a buffer at a time.
        unsafe { out.block(self.first_query(block), block.len(), self.g.head, self.g.width()) }
    }

    /// Where to write these keys' rows.
    fn key_block<'s, T>(&self, out: &Shared<'s, T>, keys: Range<usize>) -> MatMut<'s, T> {
        // SAFETY: as above.
        unsafe { out.block(self.keys + keys.start * self.g.width(), keys.len(), self.g.head, self.g.width()) }
    }

    fn scale<T: Float>(&self) -> T {
        T::from_f64((self.g.head as f64).powf(-0.5))
    }

    /// Softmax of the block's scores, rows of `stride`; what is hidden and the padding are zero.
    fn probabilities<T: Float>(&self, q: &[T], k: &[T], block: &Range<usize>, out: &mut [T], stride: usize) {
        let seen = self.g.seen(block.end - 1);
        let scores = MatMut::strided(out, block.len(), seen, stride);
        gemm(scores, Old::Overwrite, self.scale(), self.queries(q, block), self.keys(k, seen).t(), Threads::One);
        softmax_rows(out, stride, self.g, block.start, self.mask);
    }
}

/// The length of a padded row, so that loops over it have no remainder.
fn padded(seen: usize) -> usize {
    seen.max(1).next_multiple_of(LANES)
}

/// `len` elements that are written before they are read.
fn buffer<T: Float>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        *buffer = uninit(len);
    }
    &mut buffer[..len]
}

/// `softmax(q kᵀ / √d) v`.
pub(super) fn forward<T: Float>(g: &Geometry, [q, k, v]: [&[T]; 3], mask: Option<&[u8]>) -> Vec<T> {
    if g.is_empty() {
        return vec![T::zero(); q.len()];
    }
    let mut out = uninit(q.len());
    let shared = Shared::new(&mut out);
    for_heads(g, |buffers, example, head| {
        let at = Head::new(g, mask, example, head);
        for block in g.blocks() {
            let seen = g.seen(block.end - 1);
            let stride = padded(seen);
            let p = buffer(&mut buffers[0], block.len() * stride);
            at.probabilities(q, k, &block, p, stride);
            let y = at.query_block(&shared, &block);
            let p = Mat::strided(p, block.len(), seen, stride);
            gemm(y, Old::Overwrite, T::one(), p, at.keys(v, seen), Threads::One);
        }
    });
    out
}

/// The gradients of queries, keys and values that are wanted.
pub(super) fn backward<T: Float>(g: &Geometry, qkv: [&[T]; 3], dy: &[T], mask: Option<&[u8]>, wanted: [bool; 3]) -> [Option<Vec<T>>; 3] {
    if g.is_empty() {
        return [0, 1, 2].map(|i| wanted[i].then(|| vec![T::zero(); qkv[i].len()]));
    }
    let mut gradients = [0, 1, 2].map(|i| wanted[i].then(|| uninit::<T>(qkv[i].len())));
    let shared = gradients.each_mut().map(|d| d.as_deref_mut().map(Shared::new));
    for_heads(g, |buffers, example, head| {
        head_backward(&Head::new(g, mask, example, head), qkv, dy, &shared, buffers);
    });
    gradients
}

/// The gradients of one head.
fn head_backward<T: Float>(
    at: &Head<'_>,
    [q, k, v]: [&[T]; 3],
    dy: &[T],
    [dq, dk, dv]: &[Option<Shared<'_, T>>; 3],
    [p, ds]: &mut [Vec<T>; 2],
) {
    let g = at.g;
    let unseen = g.covered() < g.keys;
    for d in [dk, dv].into_iter().flatten().filter(|_| unseen) {
        at.key_block(d, g.covered()..g.keys).zero();
    }
    // The last block sees the most keys: it writes, the others add.
    let mut old = Old::Overwrite;
    for block in g.blocks().rev() {
        let seen = g.seen(block.end - 1);
        let stride = padded(seen);
        let p = buffer(p, block.len() * stride);
        at.probabilities(q, k, &block, p, stride);
        let rows = |values| Mat::strided(values, block.len(), seen, stride);
        if let Some(d) = dv {
            gemm(at.key_block(d, 0..seen), old, T::one(), rows(p).t(), at.queries(dy, &block), Threads::One);
        }
        if dq.is_some() || dk.is_some() {
            let ds = buffer(ds, block.len() * stride);
            let dp = MatMut::strided(ds, block.len(), seen, stride);
            gemm(dp, Old::Overwrite, T::one(), at.queries(dy, &block), at.keys(v, seen).t(), Threads::One);
            score_gradient(p, ds, stride, seen, at.scale());
            if let Some(d) = dq {
                gemm(at.query_block(d, &block), Old::Overwrite, T::one(), rows(ds), at.keys(k, seen), Threads::One);
            }
            if let Some(d) = dk {
                gemm(at.key_block(d, 0..seen), old, T::one(), rows(ds).t(), at.queries(q, &block), Threads::One);
            }
        }
        old = Old::Add;
    }
}

vectorised! {
    /// Softmax of padded rows, the first of which is query `first`.
    fn softmax_rows<T>(scores: &mut [T], stride: usize, g: &Geometry, first: usize, mask: Option<&[u8]>) {
        for (i, row) in scores.chunks_exact_mut(stride).enumerate() {
            row[g.seen(first + i)..].fill(T::LOWEST);
            if let Some(mask) = mask {
                for (score, visible) in row.iter_mut().zip(mask) {
                    *score = if *visible == 0 { T::LOWEST } else { *score };
                }
            }
            softmax(row);
        }
    }
}

#[inline(always)]
fn softmax<T: Float>(row: &mut [T]) {
    let mut lanes = [T::LOWEST; LANES];
    for chunk in row.chunks_exact(LANES) {
        for (lane, s) in lanes.iter_mut().zip(chunk) {
            *lane = if *s > *lane { *s } else { *lane };
        }
    }
    let max = lanes.into_iter().fold(T::LOWEST, |m, v| if v > m { v } else { m });
    if max == T::LOWEST {
        // All hidden; only NaN stays.
        for s in row {
            *s = if *s == T::LOWEST { T::zero() } else { *s };
        }
        return;
    }
    let mut sums = [T::zero(); LANES];
    for chunk in row.chunks_exact_mut(LANES) {
        for (sum, s) in sums.iter_mut().zip(chunk) {
            *s = (*s - max).exponential();
            *sum += *s;
        }
    }
    let scale = T::one() / fold(sums);
    for s in row {
        *s *= scale;
    }
}

vectorised! {
    /// Turns gradients of probabilities into those of the products before they are scaled.
    fn score_gradient<T>(p: &[T], ds: &mut [T], stride: usize, seen: usize, scale: T) {
        for (p, ds) in p.chunks_exact(stride).zip(ds.chunks_exact_mut(stride)) {
            ds[seen..].fill(T::zero());
            let mut lanes = [T::zero(); LANES];
            for (p, ds) in p.chunks_exact(LANES).zip(ds.chunks_exact(LANES)) {
                for ((lane, p), d) in lanes.iter_mut().zip(p).zip(ds) {
                    *lane += *p * *d;
                }
            }
            let along = fold(lanes);
            for (d, p) in ds.iter_mut().zip(p) {
                *d = *p * (*d - along) * scale;
            }
        }
    }
}
