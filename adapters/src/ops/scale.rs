//! A factor for each column, and a bias.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::float::Float;
use super::kernels::{View, by_float, for_rows, fused, result, rows, slice, sum_rows, tensor, uninit};
use super::portable;
use super::simd::vectorised;

/// See [`super::scale`].
pub(super) fn scale(x: &Tensor, scale: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    if !fused([x, scale].into_iter().chain(b)) || b.is_some_and(Tensor::track_op) {
        return portable::scale(x, scale, b);
    }
    let dim = x.dims().last().copied().unwrap_or(0);
    if scale.dims() != [dim] || b.is_some_and(|b| b.dims() != [dim]) {
        bail!("a scale {:?} does not fit {:?}", scale.shape(), x.shape());
    }
    let (x, scale) = (x.contiguous()?, scale.contiguous()?);
    let op = Op { bias: b.map(Tensor::contiguous).transpose()? };
    if x.track_op() || scale.track_op() { x.apply_op2(&scale, op) } else { x.apply_op2_no_bwd(&scale, &op) }
}

vectorised! {
    fn scale_rows<T>(x: &[T], scale: &[T], y: &mut [T]) {
        for (x, y) in x.chunks_exact(scale.len()).zip(y.chunks_exact_mut(scale.len())) {
            for ((y, x), s) in y.iter_mut().zip(x).zip(scale) {
                *y = *x * *s;
            }
        }
    }
}

vectorised! {
    fn scale_rows_with<T>(x: &[T], scale: &[T], b: &[T], y: &mut [T]) {
        for (x, y) in x.chunks_exact(scale.len()).zip(y.chunks_exact_mut(scale.len())) {
            for (((y, x), s), b) in y.iter_mut().zip(x).zip(scale).zip(b) {
                *y = *x * *s + *b;
            }
        }
    }
}

vectorised! {
    /// Adds the rows of `x ∘ dy` to `sums`.
    fn add_products<T>(x: &[T], dy: &[T], sums: &mut [T]) {
        for (x, dy) in x.chunks_exact(sums.len()).zip(dy.chunks_exact(sums.len())) {
            for ((s, x), dy) in sums.iter_mut().zip(x).zip(dy) {
                *s += *x * *dy;
            }
        }
    }
}

fn forward<T: Float>(x: &[T], scale: &[T], bias: Option<&[T]>) -> Vec<T> {
    let mut y = uninit(x.len());
    for_rows(&mut y, scale.len(), |first, piece| {
        let x = &x[first * scale.len()..][..piece.len()];
        match bias {
            Some(b) => scale_rows_with(x, scale, b, piece),
            None => scale_rows(x, scale, piece),
        }
    });
    y
}

struct Op {
    bias: Option<Tensor>,
}

impl CustomOp2 for Op {
    fn name(&self) -> &'static str {
        "scale"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let bias = self.bias.as_ref().map(View::new);
        by_float!(s1.dtype(), T => {
            let bias = bias.as_ref().map(View::slice::<T>).transpose()?;
            Ok(result(forward::<T>(slice(s1, l1)?, slice(s2, l2)?, bias), l1.shape()))
        })
    }

    fn bwd(&self, x: &Tensor, scale: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let [xs, scales, dys] = [x, scale, &dy].map(View::new);
        by_float!(x.dtype(), T => {
            let (factors, dy) = (scales.slice::<T>()?, dys.slice::<T>()?);
            let dx = x.track_op().then(|| tensor(forward(dy, factors, None), x)).transpose()?;
            let ds = match scale.track_op() {
                false => None,
                true => {
                    let (x, dim) = (xs.slice::<T>()?, factors.len());
                    let sums = sum_rows(rows(x.len(), dim), dim, &mut [], |range, sums, _| {
                        let range = range.start * dim..range.end * dim;
                        add_products(&x[range.clone()], &dy[range], sums);
                    });
                    Some(tensor(sums, scale)?)
                }
            };
            Ok((dx, ds))
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::testing::{check_gradients, check_same, frozen_is_absent, random};
    use super::*;

    fn run(t: &[Tensor]) -> Result<Tensor> {
        super::scale(&t[0], &t[1], Some(&random(&[7], 3).to_dtype(t[0].dtype())?))
    }

    fn reference(t: &[Tensor]) -> Result<Tensor> {
        portable::scale(&t[0], &t[1], Some(&random(&[7], 3).to_dtype(t[0].dtype())?))
    }

    #[test]
    fn gradients_match_differences_and_the_composition() {
        let operands = [random(&[2, 3, 7], 1), random(&[7], 2)];
        check_gradients(&operands, run);
        check_gradients(&operands, |t| super::scale(&t[0], &t[1], None));
        check_same(&operands, run, reference);
        check_same(&[random(&[40, 200, 7], 1), random(&[7], 2)], run, reference);
        frozen_is_absent(&operands, run);
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        assert!(super::scale(&random(&[2, 3], 1), &random(&[2], 2), None).is_err());
    }
}
