//! What the fused operations share: access to tensors, buffers, loops over rows.

use std::ops::Range;

use candle_core::{CpuStorage, DType, Device, Layout, Result, Storage, StorageRef, Tensor, bail};
use rayon::prelude::*;

use super::float::Float;

/// Buffers shorter than this are worked on by one thread.
const PARALLEL_FROM: usize = 32 * 1024;

/// Evaluates an expression with a type name standing for the float of a dtype.
macro_rules! by_float {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $t = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $t = f64;
                $body
            }
            other => candle_core::bail!("fused operations take f32 and f64, found {other:?}"),
        }
    };
}
pub(super) use by_float;

/// Whether the fused operations can run on these: on CPU, all f32 or all f64.
pub(super) fn fused<'a>(operands: impl IntoIterator<Item = &'a Tensor>) -> bool {
    let mut dtype = None;
    let fits = operands
        .into_iter()
        .all(|t| t.device().is_cpu() && matches!(t.dtype(), DType::F32 | DType::F64) && *dtype.get_or_insert(t.dtype()) == t.dtype());
    fits && !super::portable()
}

/// The values of a contiguous tensor.
pub(super) fn slice<'a, T: Float>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let all = T::cpu_storage_as_slice(storage)?;
    match layout.contiguous_offsets().map(|(start, end)| all.get(start..end)) {
        Some(Some(values)) => Ok(values),
        Some(None) => bail!("the tensor's memory was released"),
        None => bail!("fused operations take contiguous operands"),
    }
}

/// A contiguous tensor on CPU, held for reading.
pub(super) struct View<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> View<'a> {
    pub(super) fn new(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { storage, layout }
    }

    /// Of the tensor; also where its memory was released.
    pub(super) fn dims(&self) -> &[usize] {
        self.layout.dims()
    }

    pub(super) fn slice<T: Float>(&self) -> Result<&[T]> {
        match &*self.storage {
            Storage::Cpu(storage) => slice(storage, self.layout),
            _ => bail!("fused operations run on the CPU only"),
        }
    }
}

/// A tensor of these values.
pub(super) fn tensor<T: Float>(values: Vec<T>, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(values, like.shape(), &Device::Cpu)
}

/// A buffer that is written before it is read: zeroing costs as much as many of the operations.
#[allow(unsafe_code, reason = "a vector without a pass that clears it")]
pub(super) fn uninit<T: Float>(len: usize) -> Vec<T> {
    let mut buffer = Vec::with_capacity(len);
    // SAFETY: every bit pattern is a float, the capacity is `len`, and callers write
    // all elements before they read any.
    #[allow(clippy::uninit_vec)]
    unsafe {
        buffer.set_len(len);
    }
    buffer
}

/// The rows of a matrix whose last dimension is `width`.
pub(super) fn rows(elements: usize, width: usize) -> usize {
    elements.checked_div(width).unwrap_or(0)
}

/// How many rows one task takes, so that there are a few tasks for each thread.
fn rows_per_task(elements: usize, width: usize) -> usize {
    let tasks = (4 * rayon::current_num_threads()).min(elements / (PARALLEL_FROM / 8)).max(1);
    rows(elements, width).div_ceil(tasks).max(1)
}

/// Calls `f` with the first row's index and a piece of whole rows, until all of `out` is done.
pub(super) fn for_rows<T: Float>(out: &mut [T], width: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    if out.is_empty() {
        return;
    }
    if out.len() < PARALLEL_FROM {
        return f(0, out);
    }
    let step = rows_per_task(out.len(), width);
    out.par_chunks_mut(step * width).enumerate().for_each(|(i, piece)| f(i * step, piece));
}

/// Sums of columns over rows, in pieces that do not depend on the number of threads.
///
/// `f` gets a range of rows, the piece's own sums, zero at first, and its rows of `out`, which
/// may be empty.
pub(super) fn sum_rows<T: Float>(
    rows: usize,
    columns: usize,
    out: &mut [T],
    f: impl Fn(Range<usize>, &mut [T], &mut [T]) + Sync,
) -> Vec<T> {
    const PIECES: usize = 32;
    if rows == 0 || columns == 0 {
        return vec![T::zero(); columns];
    }
    let step = rows.div_ceil(PIECES).max((PARALLEL_FROM / 8).div_ceil(columns));
    let width = out.len() / rows;
    let mut partial = vec![T::zero(); rows.div_ceil(step) * columns];
    let mut pieces = Vec::with_capacity(PIECES);
    let mut rest = out;
    for (i, sums) in partial.chunks_exact_mut(columns).enumerate() {
        let range = i * step..rows.min((i + 1) * step);
        let (piece, after) = rest.split_at_mut(range.len() * width);
        pieces.push((range, sums, piece));
        rest = after;
    }
    if pieces.len() == 1 {
        pieces.into_iter().for_each(|(range, sums, out)| f(range, sums, out));
    } else {
        pieces.into_par_iter().for_each(|(range, sums, out)| f(range, sums, out));
    }
    let (sums, others) = partial.split_at_mut(columns);
    for piece in others.chunks_exact(columns) {
        add(sums, piece);
    }
    partial.truncate(columns);
    partial
}

super::simd::vectorised! {
    /// `sums += values`.
    pub(super) fn add<T>(sums: &mut [T], values: &[T]) {
        for (s, v) in sums.iter_mut().zip(values) {
            *s += *v;
        }
    }
}

super::simd::vectorised! {
    /// Adds the rows of a matrix to `sums`.
    pub(super) fn add_rows<T>(sums: &mut [T], matrix: &[T]) {
        for row in matrix.chunks_exact(sums.len().max(1)) {
            for (s, v) in sums.iter_mut().zip(row) {
                *s += *v;
            }
        }
    }
}

/// Independent sums, so that a reduction vectorises and its order is the same everywhere.
pub(super) const LANES: usize = 16;

/// The sum of `f(x)`.
#[inline(always)]
pub(super) fn sum<T: Float>(x: &[T], f: impl Fn(T) -> T) -> T {
    let mut lanes = [T::zero(); LANES];
    let mut chunks = x.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += f(*v);
        }
    }
    for (lane, v) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane += f(*v);
    }
    fold(lanes)
}

/// The sums of both values of `f(x, y, w)`.
#[inline(always)]
pub(super) fn sum_three<T: Float>(x: &[T], y: &[T], w: &[T], f: impl Fn(T, T, T) -> (T, T)) -> (T, T) {
    let (mut first, mut second) = ([T::zero(); LANES], [T::zero(); LANES]);
    let mut add = |x: &[T], y: &[T], w: &[T]| {
        for ((((a, b), x), y), w) in first.iter_mut().zip(&mut second).zip(x).zip(y).zip(w) {
            let (u, v) = f(*x, *y, *w);
            *a += u;
            *b += v;
        }
    };
    let (mut xs, mut ys, mut ws) = (x.chunks_exact(LANES), y.chunks_exact(LANES), w.chunks_exact(LANES));
    for ((x, y), w) in (&mut xs).zip(&mut ys).zip(&mut ws) {
        add(x, y, w);
    }
    add(xs.remainder(), ys.remainder(), ws.remainder());
    (fold(first), fold(second))
}

/// Adds the lanes up in pairs.
#[inline(always)]
pub(super) fn fold<T: Float>(mut lanes: [T; LANES]) -> T {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            let upper = lanes[i + half];
            lanes[i] += upper;
        }
        half /= 2;
    }
    lanes[0]
}
