//! `x Wᵀ + b` with the gradients that somebody asks for.

use candle_core::{Result, Shape, Tensor, bail};

use super::float::Float;
use super::gemm::{Mat, MatMut, Old, Threads, gemm};
use super::graph::{Op, Want, apply};
use super::kernels::{View, add_rows, for_rows, fused, sum_rows, uninit};
use super::portable;

/// See [`super::linear`].
pub(super) fn linear(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    if !fused([x, w].into_iter().chain(b)) {
        return portable::linear(x, w, b);
    }
    check(x, w, b)?;
    let (x, w) = (x.contiguous()?, w.contiguous()?);
    let b = b.map(Tensor::contiguous).transpose()?;
    match b {
        Some(b) if b.track_op() => apply(Trained { bias: None }, [&x, &w, &b]),
        bias if w.track_op() => apply(Trained { bias }, [&x, &w]),
        bias => apply(Frozen { weight: w, bias, read: true }, [&x]),
    }
}

/// See [`super::linear_unread`].
pub(super) fn linear_unread(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let frozen = !w.track_op() && b.is_none_or(|b| !b.track_op());
    if !frozen || !x.track_op() || !fused([x, w].into_iter().chain(b)) {
        return linear(x, w, b);
    }
    check(x, w, b)?;
    apply(Frozen { weight: w.contiguous()?, bias: None, read: false }, [&x.contiguous()?])
}

/// That the shapes fit.
pub(super) fn check(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<()> {
    let (out, input) = w.dims2()?;
    if x.dims().last() != Some(&input) {
        bail!("a weight {:?} does not fit an input {:?}", w.shape(), x.shape());
    }
    match b {
        Some(b) if b.dims() != [out] => bail!("a bias {:?} does not fit a weight {:?}", b.shape(), w.shape()),
        _ => Ok(()),
    }
}

/// The shape of the input with another last dimension.
pub(super) fn with_last(dims: &[usize], last: usize) -> Shape {
    let mut dims = dims.to_vec();
    if let Some(d) = dims.last_mut() {
        *d = last;
    }
    Shape::from(dims)
}

/// How many rows a tensor has whose last dimension is a row.
pub(super) fn leading(dims: &[usize]) -> usize {
    dims.iter().rev().skip(1).product()
}

/// `rows`, `out` and `input` of a product.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    pub(super) rows: usize,
    pub(super) out: usize,
    pub(super) input: usize,
}

impl Size {
    pub(super) fn new(x: &[usize], w: &[usize]) -> Self {
        Self { rows: leading(x), out: w[0], input: w[1] }
    }
}

/// `x Wᵀ + b` for a weight [out, in].
pub(super) fn product<T: Float>(x: &[T], w: &[T], b: Option<&[T]>, size: Size) -> Vec<T> {
    let Size { rows, out, input } = size;
    let mut y = uninit(rows * out);
    if let Some(b) = b {
        for_rows(&mut y, out, |_, piece| piece.chunks_exact_mut(out).for_each(|row| row.copy_from_slice(b)));
    }
    let old = if b.is_some() { Old::Add } else { Old::Overwrite };
    let (x, w) = (Mat::new(x, rows, input), Mat::new(w, out, input));
    gemm(MatMut::new(&mut y, rows, out), old, T::one(), x, w.t(), Threads::All);
    y
}

/// `dy W`, the gradient of the input, if it is wanted.
pub(super) fn input_gradient<T: Float>(dy: &[T], w: &[T], size: Size, want: Want<T>) -> Option<Vec<T>> {
    let Size { rows, out, input } = size;
    let (mut dx, old) = want.start(rows * input)?;
    let (dy, w) = (Mat::new(dy, rows, out), Mat::new(w, out, input));
    gemm(MatMut::new(&mut dx, rows, input), old, T::one(), dy, w, Threads::All);
    Some(dx)
}

/// `dyᵀ x`, the gradient of the weight, if it is wanted.
fn weight_gradient<T: Float>(dy: &[T], x: &View<'_>, size: Size, want: Want<T>) -> Result<Option<Vec<T>>> {
    let Size { rows, out, input } = size;
    let Some((mut dw, old)) = want.start(out * input) else { return Ok(None) };
    let (dy, x) = (Mat::new(dy, rows, out), Mat::new(x.slice()?, rows, input));
    gemm(MatMut::new(&mut dw, out, input), old, T::one(), dy.t(), x, Threads::All);
    Ok(Some(dw))
}

/// The sums of the columns of `dy`, the gradient of the bias.
fn bias_gradient<T: Float>(dy: &[T], rows: usize, out: usize) -> Vec<T> {
    sum_rows(rows, out, &mut [], |range, sums, _| add_rows(sums, &dy[range.start * out..range.end * out]))
}

/// The product on its way into a graph.
fn forward<T: Float>(x: &View<'_>, w: &View<'_>, b: Option<&View<'_>>) -> Result<(Vec<T>, Shape)> {
    let size = Size::new(x.dims(), w.dims());
    let y = product(x.slice()?, w.slice()?, b.map(View::slice::<T>).transpose()?, size);
    Ok((y, with_last(x.dims(), size.out)))
}

/// A weight and a bias without gradients; only the input gets one.
struct Frozen {
    weight: Tensor,
    bias: Option<Tensor>,
    /// Whether anybody reads the product; if not, zeros stand for it.
    read: bool,
}

impl Op<1> for Frozen {
    const NAME: &'static str = "linear-frozen";

    fn forward<T: Float>(&self, [x]: &[View<'_>; 1]) -> Result<(Vec<T>, Shape)> {
        if !self.read {
            let shape = with_last(x.dims(), self.weight.dims()[0]);
            return Ok((vec![T::zero(); shape.elem_count()], shape));
        }
        forward(x, &View::new(&self.weight), self.bias.as_ref().map(View::new).as_ref())
    }

    fn backward<T: Float>(&self, [x]: &[View<'_>; 1], dy: &[T], [dx]: [Want<T>; 1]) -> Result<[Option<Vec<T>>; 1]> {
        let size = Size::new(x.dims(), self.weight.dims());
        Ok([input_gradient(dy, View::new(&self.weight).slice()?, size, dx)])
    }
}

/// A weight or a bias with a gradient. Operands that nothing is asked of get none.
struct Trained {
    /// Without a gradient, where the weight alone has one.
    bias: Option<Tensor>,
}

impl Op<2> for Trained {
    const NAME: &'static str = "linear-weight";

    fn forward<T: Float>(&self, [x, w]: &[View<'_>; 2]) -> Result<(Vec<T>, Shape)> {
        forward(x, w, self.bias.as_ref().map(View::new).as_ref())
    }

    fn backward<T: Float>(&self, [x, w]: &[View<'_>; 2], dy: &[T], [dx, dw]: [Want<T>; 2]) -> Result<[Option<Vec<T>>; 2]> {
        let size = Size::new(x.dims(), w.dims());
        Ok([input_gradient(dy, w.slice()?, size, dx), weight_gradient(dy, x, size, dw)?])
    }
}

impl Op<3> for Trained {
    const NAME: &'static str = "linear";

    fn forward<T: Float>(&self, [x, w, b]: &[View<'_>; 3]) -> Result<(Vec<T>, Shape)> {
        forward(x, w, Some(b))
    }

    fn backward<T: Float>(&self, [x, w, _]: &[View<'_>; 3], dy: &[T], [dx, dw, db]: [Want<T>; 3]) -> Result<[Option<Vec<T>>; 3]> {
        let size = Size::new(x.dims(), w.dims());
        let dx = input_gradient(dy, w.slice()?, size, dx);
        Ok([dx, weight_gradient(dy, x, size, dw)?, db.plus(|| bias_gradient(dy, size.rows, size.out))])
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::{DType, Tensor};

    use super::super::testing::{check_gradients, check_same, frozen_is_absent, leaves, random};
    use super::*;

    fn run(t: &[Tensor]) -> Result<Tensor> {
        linear(&t[0], &t[1], t.get(2))
    }

    fn reference(t: &[Tensor]) -> Result<Tensor> {
        portable::linear(&t[0], &t[1], t.get(2))
    }

    #[test]
    fn gradients_match_differences() {
        let with_bias = [random(&[3, 5, 7], 1), random(&[4, 7], 2), random(&[4], 3)];
        check_gradients(&with_bias, run);
        check_gradients(&with_bias[..2], run);
    }

    #[test]
    fn matches_the_portable_composition() {
        for dims in [vec![1, 50, 33], vec![7, 33], vec![33], vec![130, 1, 33]] {
            let t = [random(&dims, 4), random(&[65, 33], 5), random(&[65], 6)];
            check_same(&t, run, reference);
            check_same(&t[..2], run, reference);
        }
    }

    #[test]
    fn takes_strided_operands() {
        let t = [random(&[6, 3, 10], 7).transpose(0, 1).unwrap(), random(&[10, 8], 8).t().unwrap(), random(&[8], 9)];
        check_same(&t, run, reference);
    }

    #[test]
    fn frozen_operands_get_no_gradient() {
        frozen_is_absent(&[random(&[2, 3], 1), random(&[4, 3], 2), random(&[4], 3)], run);
    }

    #[test]
    fn empty_batches_pass() {
        let t = leaves(&[random(&[0, 5, 3], 1), random(&[4, 3], 2), random(&[4], 3)], DType::F32, 7);
        let y = run(&t).unwrap();
        assert_eq!(y.dims(), [0, 5, 4]);
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert_eq!(grads.get(&t[1]).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap(), 0.0);
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        assert!(run(&[random(&[2, 3], 1), random(&[4, 5], 2)]).is_err());
        assert!(run(&[random(&[2, 3], 1), random(&[4, 3], 2), random(&[3], 2)]).is_err());
        assert!(run(&[random(&[], 1), random(&[4, 3], 2)]).is_err());
    }
}
