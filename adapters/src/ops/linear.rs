//! `x Wᵀ + b` with the gradients that somebody asks for.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};

use super::float::Float;
use super::gemm::{Mat, MatMut, Old, Threads, gemm};
use super::kernels::{View, add_rows, by_float, for_rows, fused, result, slice, sum_rows, tensor, uninit};
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
        Some(b) if b.track_op() => x.apply_op3(&w, &b, Trained { bias: None }),
        bias if w.track_op() => x.apply_op2(&w, Trained { bias }),
        bias => {
            let op = Frozen { weight: w, bias, read: true };
            if x.track_op() { x.apply_op1(op) } else { x.apply_op1_no_bwd(&op) }
        }
    }
}

/// See [`super::linear_unread`].
pub(super) fn linear_unread(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let frozen = !w.track_op() && b.is_none_or(|b| !b.track_op());
    if !frozen || !x.track_op() || !fused([x, w].into_iter().chain(b)) {
        return linear(x, w, b);
    }
    check(x, w, b)?;
    x.contiguous()?.apply_op1(Frozen { weight: w.contiguous()?, bias: None, read: false })
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

/// `dy W`, the gradient of the input.
pub(super) fn input_gradient<T: Float>(dy: &[T], w: &[T], size: Size) -> Vec<T> {
    let Size { rows, out, input } = size;
    let mut dx = uninit(rows * input);
    let (dy, w) = (Mat::new(dy, rows, out), Mat::new(w, out, input));
    gemm(MatMut::new(&mut dx, rows, input), Old::Overwrite, T::one(), dy, w, Threads::All);
    dx
}

/// `dyᵀ x`, the gradient of the weight.
fn weight_gradient<T: Float>(dy: &[T], x: &[T], size: Size) -> Vec<T> {
    let Size { rows, out, input } = size;
    let mut dw = uninit(out * input);
    let (dy, x) = (Mat::new(dy, rows, out), Mat::new(x, rows, input));
    gemm(MatMut::new(&mut dw, out, input), Old::Overwrite, T::one(), dy.t(), x, Threads::All);
    dw
}

/// The sums of the columns of `dy`, the gradient of the bias.
fn bias_gradient<T: Float>(dy: &[T], rows: usize, out: usize) -> Vec<T> {
    sum_rows(rows, out, &mut [], |range, sums, _| add_rows(sums, &dy[range.start * out..range.end * out]))
}

/// The product on its way into a graph.
fn forward<T: Float>(s: &CpuStorage, l: &Layout, w: &[T], b: Option<&[T]>, out: usize) -> Result<(CpuStorage, Shape)> {
    let size = Size::new(l.dims(), &[out, l.dims().last().copied().unwrap_or(0)]);
    let y = product(slice::<T>(s, l)?, w, b, size);
    Ok(result(y, with_last(l.dims(), out)))
}

/// A weight and a bias without gradients; only the input gets one.
struct Frozen {
    weight: Tensor,
    bias: Option<Tensor>,
    /// Whether anybody reads the product; if not, zeros stand for it.
    read: bool,
}

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "linear-frozen"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (w, b) = (View::new(&self.weight), self.bias.as_ref().map(View::new));
        by_float!(self.weight.dtype(), T => {
            if !self.read {
                let shape = with_last(l.dims(), self.weight.dims()[0]);
                return Ok(result(vec![T::default(); shape.elem_count()], shape));
            }
            let b = b.as_ref().map(View::slice::<T>).transpose()?;
            forward(s, l, w.slice::<T>()?, b, self.weight.dims()[0])
        })
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let (w, dy) = (View::new(&self.weight), View::new(&dy));
        let size = Size::new(x.dims(), self.weight.dims());
        by_float!(x.dtype(), T => {
            let dx = input_gradient(dy.slice::<T>()?, w.slice::<T>()?, size);
            Ok(Some(tensor(dx, x)?))
        })
    }
}

/// A weight or a bias with a gradient. Operands that nothing is asked of get none.
struct Trained {
    /// Without a gradient, where the weight alone has one.
    bias: Option<Tensor>,
}

impl Trained {
    /// The gradients of the input, the weight and the bias, where they are tracked.
    fn gradients(&self, x: &Tensor, w: &Tensor, b: Option<&Tensor>, dy: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let dy = dy.contiguous()?;
        let size = Size::new(x.dims(), w.dims());
        let (xs, ws, dys) = (View::new(x), View::new(w), View::new(&dy));
        by_float!(x.dtype(), T => {
            let (xs, ws, dys) = (xs.slice::<T>()?, ws.slice::<T>()?, dys.slice::<T>()?);
            let dx = x.track_op().then(|| tensor(input_gradient(dys, ws, size), x)).transpose()?;
            let dw = w.track_op().then(|| tensor(weight_gradient(dys, xs, size), w)).transpose()?;
            let db = b.map(|b| tensor(bias_gradient(dys, size.rows, size.out), b)).transpose()?;
            Ok([dx, dw, db])
        })
    }
}

impl CustomOp2 for Trained {
    fn name(&self) -> &'static str {
        "linear-weight"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let b = self.bias.as_ref().map(View::new);
        by_float!(s1.dtype(), T => {
            let b = b.as_ref().map(View::slice::<T>).transpose()?;
            forward(s1, l1, slice::<T>(s2, l2)?, b, l2.dims()[0])
        })
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, _] = self.gradients(x, w, None, dy)?;
        Ok((dx, dw))
    }
}

impl CustomOp3 for Trained {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        by_float!(s1.dtype(), T => {
            forward(s1, l1, slice::<T>(s2, l2)?, Some(slice(s3, l3)?), l2.dims()[0])
        })
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, b: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, db] = self.gradients(x, w, Some(b), dy)?;
        Ok((dx, dw, db))
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
