//! Layer norm in two passes over rows that stay in the cache.

use candle_core::{Result, Shape, Tensor, bail};

use super::float::Float;
use super::gemm::Old;
use super::graph::{Op, Want, apply};
use super::kernels::{View, for_rows, fused, sum, sum_rows, sum_three, uninit};
use super::portable;
use super::simd::vectorised;

/// See [`super::layer_norm`].
pub(super) fn layer_norm(x: &Tensor, w: &Tensor, b: &Tensor, eps: f64) -> Result<Tensor> {
    if !fused([x, w, b]) {
        return portable::layer_norm(x, w, b, eps);
    }
    let dim = x.dims().last().copied().unwrap_or(0);
    if w.dims() != [dim] || b.dims() != [dim] {
        bail!("a norm's weight {:?} and bias {:?} do not fit {:?}", w.shape(), b.shape(), x.shape());
    }
    let (x, weight, bias) = (x.contiguous()?, w.contiguous()?, b.contiguous()?);
    if weight.track_op() || bias.track_op() {
        return apply(Trained { eps }, [&x, &weight, &bias]);
    }
    apply(Frozen { weight, bias, eps }, [&x])
}

/// A row's mean and 1/√(variance + ε).
#[inline(always)]
fn moments<T: Float>(row: &[T], eps: T) -> (T, T) {
    let n = T::from_f64(row.len() as f64);
    let mean = sum(row, |v| v) / n;
    let variance = sum(row, |v| (v - mean) * (v - mean)) / n;
    let scale = T::one() / (variance + eps).root();
    // A variance that overflowed would make the row zero, which looks like a result; NaN does not.
    (mean, if scale == T::zero() { T::from_f64(f64::NAN) } else { scale })
}

vectorised! {
    /// Norms the rows of `x` into `y`.
    fn norm_rows<T>(x: &[T], y: &mut [T], w: &[T], b: &[T], eps: T) {
        for (x, y) in x.chunks_exact(w.len()).zip(y.chunks_exact_mut(w.len())) {
            let (mean, scale) = moments(x, eps);
            for (((y, x), w), b) in y.iter_mut().zip(x).zip(w).zip(b) {
                *y = (*x - mean) * scale * *w + *b;
            }
        }
    }
}

/// The gradient of an input's row, written or added.
#[inline(always)]
fn input_row<T: Float>(x: &[T], dy: &[T], dx: &mut [T], w: &[T], (mean, scale): (T, T), old: Old) {
    let n = T::from_f64(w.len() as f64);
    let (along, total) = sum_three(x, dy, w, |x, dy, w| (dy * w * ((x - mean) * scale), dy * w));
    let (along, total) = (along / n, total / n);
    let gradient = |x: T, dy: T, w: T| scale * (dy * w - total - (x - mean) * scale * along);
    let rows = dx.iter_mut().zip(x).zip(dy).zip(w);
    match old {
        Old::Overwrite => rows.for_each(|(((dx, x), dy), w)| *dx = gradient(*x, *dy, *w)),
        Old::Add => rows.for_each(|(((dx, x), dy), w)| *dx += gradient(*x, *dy, *w)),
    }
}

/// Adds a row's gradients of the weight and, in the second half of `sums`, of the bias.
#[inline(always)]
fn parameter_row<T: Float>(x: &[T], dy: &[T], sums: &mut [T], (mean, scale): (T, T)) {
    let (dw, db) = sums.split_at_mut(x.len());
    for (((dw, db), x), dy) in dw.iter_mut().zip(db).zip(x).zip(dy) {
        *dw += *dy * ((*x - mean) * scale);
        *db += *dy;
    }
}

vectorised! {
    /// The gradients of rows; of the input where there is `dx`, of the parameters where there are `sums`.
    fn gradient_rows<T>(x: &[T], dy: &[T], dx: &mut [T], old: Old, sums: &mut [T], w: &[T], eps: T) {
        let mut dx = dx.chunks_exact_mut(w.len());
        for (x, dy) in x.chunks_exact(w.len()).zip(dy.chunks_exact(w.len())) {
            let moments = moments(x, eps);
            if let Some(dx) = dx.next() {
                input_row(x, dy, dx, w, moments, old);
            }
            if !sums.is_empty() {
                parameter_row(x, dy, sums, moments);
            }
        }
    }
}

/// The normed rows.
fn norm<T: Float>(x: &[T], w: &[T], b: &[T], eps: f64) -> Vec<T> {
    let (dim, eps) = (w.len(), T::from_f64(eps));
    let mut y = uninit(x.len());
    for_rows(&mut y, dim, |first, y| norm_rows(&x[first * dim..][..y.len()], y, w, b, eps));
    y
}

/// The gradient of the input, if it is wanted.
fn input_gradient<T: Float>(x: &[T], dy: &[T], w: &[T], eps: f64, want: Want<T>) -> Option<Vec<T>> {
    let (dim, eps) = (w.len(), T::from_f64(eps));
    let (mut dx, old) = want.start(x.len())?;
    for_rows(&mut dx, dim, |first, dx| {
        let range = first * dim..first * dim + dx.len();
        gradient_rows(&x[range.clone()], &dy[range], dx, old, &mut [], w, eps);
    });
    Some(dx)
}

/// The gradients of the input, if it is wanted, the weight and the bias.
fn gradients<T: Float>(x: &[T], dy: &[T], w: &[T], eps: f64, want: Want<T>) -> (Option<Vec<T>>, Vec<T>, Vec<T>) {
    let (dim, eps) = (w.len(), T::from_f64(eps));
    let wanted = want.any();
    let (mut dx, old) = want.start(x.len()).unwrap_or((Vec::new(), Old::Overwrite));
    let rows = x.len().checked_div(dim).unwrap_or(0);
    let mut dw = sum_rows(rows, 2 * dim, &mut dx, |range, sums, dx| {
        let range = range.start * dim..range.end * dim;
        gradient_rows(&x[range.clone()], &dy[range], dx, old, sums, w, eps);
    });
    let db = dw.split_off(dim);
    (wanted.then_some(dx), dw, db)
}

fn forward<T: Float>(x: &View<'_>, w: &View<'_>, b: &View<'_>, eps: f64) -> Result<(Vec<T>, Shape)> {
    Ok((norm(x.slice()?, w.slice()?, b.slice()?, eps), Shape::from(x.dims())))
}

/// A norm whose weight and bias have no gradients.
struct Frozen {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl Op<1> for Frozen {
    const NAME: &'static str = "layer-norm-frozen";

    fn forward<T: Float>(&self, [x]: &[View<'_>; 1]) -> Result<(Vec<T>, Shape)> {
        forward(x, &View::new(&self.weight), &View::new(&self.bias), self.eps)
    }

    fn backward<T: Float>(&self, [x]: &[View<'_>; 1], dy: &[T], [dx]: [Want<T>; 1]) -> Result<[Option<Vec<T>>; 1]> {
        Ok([input_gradient(x.slice()?, dy, View::new(&self.weight).slice()?, self.eps, dx)])
    }
}

/// A norm whose weight or bias has a gradient.
struct Trained {
    eps: f64,
}

impl Op<3> for Trained {
    const NAME: &'static str = "layer-norm";

    fn forward<T: Float>(&self, [x, w, b]: &[View<'_>; 3]) -> Result<(Vec<T>, Shape)> {
        forward(x, w, b, self.eps)
    }

    fn backward<T: Float>(
        &self,
        [x, w, _]: &[View<'_>; 3],
        dy: &[T],
        [want_x, want_w, want_b]: [Want<T>; 3],
    ) -> Result<[Option<Vec<T>>; 3]> {
        let (dx, dw, db) = gradients(x.slice()?, dy, w.slice()?, self.eps, want_x);
        Ok([dx, want_w.plus(|| dw), want_b.plus(|| db)])
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::{DType, Tensor};

    use super::super::testing::{check_gradients, check_same, frozen_is_absent, leaves, random};
    use super::*;

    fn run(t: &[Tensor]) -> Result<Tensor> {
        layer_norm(&t[0], &t[1], &t[2], 1e-5)
    }

    fn reference(t: &[Tensor]) -> Result<Tensor> {
        portable::layer_norm(&t[0], &t[1], &t[2], 1e-5)
    }

    fn operands(dims: &[usize]) -> [Tensor; 3] {
        let dim = [dims[dims.len() - 1]];
        [random(dims, 1), random(&dim, 2), random(&dim, 3)]
    }

    #[test]
    fn gradients_match_differences() {
        check_gradients(&operands(&[2, 3, 7]), run);
        check_gradients(&operands(&[3, 33]), run);
    }

    #[test]
    fn matches_the_portable_composition() {
        for dims in [vec![1, 50, 192], vec![3, 5, 33], vec![16], vec![401, 128], vec![2, 1]] {
            check_same(&operands(&dims), run, reference);
        }
    }

    #[test]
    fn takes_strided_operands() {
        let mut t = operands(&[4, 6, 20]);
        t[0] = random(&[6, 4, 20], 4).transpose(0, 1).unwrap();
        check_same(&t, run, reference);
    }

    #[test]
    fn a_large_mean_costs_no_precision() {
        let x = (random(&[4, 768], 1) + 1000.0).unwrap();
        let [_, w, b] = operands(&[4, 768]);
        let exact = run(&[x.to_dtype(DType::F32).unwrap().to_dtype(DType::F64).unwrap(), w.clone(), b.clone()]).unwrap();
        let found = run(&leaves(&[x, w, b], DType::F32, 0)).unwrap().to_dtype(DType::F64).unwrap();
        let worst = (exact - found).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
        assert!(worst < 1e-3, "{worst}");
    }

    #[test]
    fn frozen_operands_get_no_gradient() {
        frozen_is_absent(&operands(&[2, 5]), run);
    }

    #[test]
    fn empty_batches_pass() {
        let t = leaves(&operands(&[0, 5, 8]), DType::F32, 7);
        assert_eq!(run(&t).unwrap().dims(), [0, 5, 8]);
        run(&t).unwrap().sum_all().unwrap().backward().unwrap();
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        assert!(run(&[random(&[2, 3], 1), random(&[4], 2), random(&[4], 3)]).is_err());
    }
}
