//! A factor for each column, and a bias.

use candle_core::{Result, Shape, Tensor, bail};

use super::float::Float;
use super::graph::{self, Want, apply};
use super::kernels::{View, for_rows, fused, rows, sum_rows, uninit};
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
    apply(Op { bias: b.map(Tensor::contiguous).transpose()? }, [&x.contiguous()?, &scale.contiguous()?])
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

impl graph::Op<2> for Op {
    const NAME: &'static str = "scale";

    fn forward<T: Float>(&self, [x, scale]: &[View<'_>; 2]) -> Result<(Vec<T>, Shape)> {
        let bias = self.bias.as_ref().map(View::new);
        let bias = bias.as_ref().map(View::slice::<T>).transpose()?;
        Ok((forward(x.slice()?, scale.slice()?, bias), Shape::from(x.dims())))
    }

    fn backward<T: Float>(&self, [x, scale]: &[View<'_>; 2], dy: &[T], [dx, ds]: [Want<T>; 2]) -> Result<[Option<Vec<T>>; 2]> {
        let (x, factors) = (x.slice::<T>()?, scale.slice::<T>()?);
        let dim = factors.len();
        let dx = dx.plus(|| forward(dy, factors, None));
        let ds = ds.plus(|| {
            sum_rows(rows(x.len(), dim), dim, &mut [], |range, sums, _| {
                let range = range.start * dim..range.end * dim;
                add_products(&x[range.clone()], &dy[range], sums);
            })
        });
        Ok([dx, ds])
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
