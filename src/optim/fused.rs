//! Updates of whole tensors in one pass over memory, in parallel: f32 on the CPU.

use candle_core::{CpuStorage, DType, InplaceOp2, InplaceOp3, Layout, Result, Tensor, bail};
use rayon::prelude::*;

/// Elements that one task takes.
const CHUNK: usize = 1 << 14;

/// Whether [`update`] and [`update2`] work on these.
pub(super) fn fused(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|t| t.device().is_cpu() && t.dtype() == DType::F32 && t.is_contiguous())
}

/// `to[i] = each(to[i], from[i])`.
pub(super) fn update(to: &Tensor, from: &Tensor, each: impl Fn(f32, f32) -> f32 + Send + Sync) -> Result<()> {
    to.inplace_op2(from, &Zip(each))
}

/// `to[i] = each(to[i], a[i], b[i])`.
pub(super) fn update2(to: &Tensor, a: &Tensor, b: &Tensor, each: impl Fn(f32, f32, f32) -> f32 + Send + Sync) -> Result<()> {
    to.inplace_op3(a, b, &Zip(each))
}

/// The sum of squares in f64, in a fixed order.
pub(super) fn sum_of_squares(t: &Tensor) -> Result<f64> {
    let (storage, layout) = t.storage_and_layout();
    let candle_core::Storage::Cpu(storage) = &*storage else { bail!("not on the CPU") };
    let parts: Vec<f64> = slice(storage, layout)?.par_chunks(CHUNK).map(squares).collect();
    Ok(parts.iter().sum())
}

/// Eight sums side by side, so that the compiler can use its vectors.
fn squares(values: &[f32]) -> f64 {
    let mut sums = [0f64; 8];
    let whole = values.chunks_exact(8);
    let rest: f64 = whole.remainder().iter().map(|v| f64::from(*v).powi(2)).sum();
    for eight in whole {
        for (sum, v) in sums.iter_mut().zip(eight) {
            *sum += f64::from(*v) * f64::from(*v);
        }
    }
    sums.iter().sum::<f64>() + rest
}

struct Zip<F>(F);

impl<F: Fn(f32, f32) -> f32 + Send + Sync> InplaceOp2 for Zip<F> {
    fn name(&self) -> &'static str {
        "update"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<()> {
        let (to, from) = (slice_mut(s1, l1)?, slice(s2, l2)?);
        to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).for_each(|(to, from)| {
            for (t, f) in to.iter_mut().zip(from) {
                *t = self.0(*t, *f);
            }
        });
        Ok(())
    }
}

impl<F: Fn(f32, f32, f32) -> f32 + Send + Sync> InplaceOp3 for Zip<F> {
    fn name(&self) -> &'static str {
        "update2"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout, s3: &CpuStorage, l3: &Layout) -> Result<()> {
        let (to, a, b) = (slice_mut(s1, l1)?, slice(s2, l2)?, slice(s3, l3)?);
        to.par_chunks_mut(CHUNK).zip(a.par_chunks(CHUNK)).zip(b.par_chunks(CHUNK)).for_each(|((to, a), b)| {
            for ((t, a), b) in to.iter_mut().zip(a).zip(b) {
                *t = self.0(*t, *a, *b);
            }
        });
        Ok(())
    }
}

fn range(layout: &Layout) -> Result<std::ops::Range<usize>> {
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(from..to),
        None => bail!("expected a contiguous tensor"),
    }
}

fn slice<'s>(storage: &'s CpuStorage, layout: &Layout) -> Result<&'s [f32]> {
    match storage {
        CpuStorage::F32(values) => Ok(&values[range(layout)?]),
        _ => bail!("expected f32"),
    }
}

fn slice_mut<'s>(storage: &'s mut CpuStorage, layout: &Layout) -> Result<&'s mut [f32]> {
    match storage {
        CpuStorage::F32(values) => Ok(&mut values[range(layout)?]),
        _ => bail!("expected f32"),
    }
}
