//! A frozen linear layer and its low-rank update in one operation.
//!
//! For many rows `W + s B A` is formed and used like a weight, which costs one product the
//! size of the weight; for few rows, or with dropout, the update goes through the rank.

use candle_core::{Result, Shape, Tensor, bail};

use super::float::Float;
use super::gemm::{Mat, MatMut, Old, Threads, gemm};
use super::graph::{self, Want, apply};
use super::kernels::{View, for_rows, fused, uninit};
use super::linear::{self, Size, with_last};
use super::simd::vectorised;
use super::{LowRank, portable};

/// See [`super::lora_linear`].
pub(super) fn lora_linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>, lora: &LowRank<'_>) -> Result<Tensor> {
    let operands = [x, w, lora.a, lora.b].into_iter().chain(bias).chain(lora.dropout);
    let frozen = !w.track_op() && bias.is_none_or(|b| !b.track_op());
    if !frozen || lora.dropout.is_some_and(Tensor::track_op) || !fused(operands) {
        return portable::lora_linear(x, w, bias, lora);
    }
    check(x, w, bias, lora)?;
    let op = Op {
        weight: w.contiguous()?,
        bias: bias.map(Tensor::contiguous).transpose()?,
        mask: lora.dropout.map(Tensor::contiguous).transpose()?,
        rank: lora.a.dims()[0],
        scale: lora.scale,
    };
    apply(op, [&x.contiguous()?, &lora.a.contiguous()?, &lora.b.contiguous()?])
}

/// That the shapes fit.
fn check(x: &Tensor, w: &Tensor, bias: Option<&Tensor>, lora: &LowRank<'_>) -> Result<()> {
    linear::check(x, w, bias)?;
    let (out, input) = w.dims2()?;
    let (rank, _) = lora.a.dims2()?;
    if lora.a.dims() != [rank, input] || lora.b.dims() != [out, rank] {
        bail!("low-rank factors {:?} and {:?} do not fit a weight {:?}", lora.a.shape(), lora.b.shape(), w.shape());
    }
    match lora.dropout {
        Some(m) if m.dims() != x.dims() => bail!("a mask {:?} does not fit an input {:?}", m.shape(), x.shape()),
        _ => Ok(()),
    }
}

struct Op {
    weight: Tensor,
    bias: Option<Tensor>,
    mask: Option<Tensor>,
    rank: usize,
    scale: f64,
}

/// `Op` and its operands as values.
struct Values<'a, T> {
    x: &'a [T],
    w: &'a [T],
    a: &'a [T],
    b: &'a [T],
    bias: Option<&'a [T]>,
    mask: Option<&'a [T]>,
    size: Size,
    rank: usize,
    scale: T,
}

impl<T: Float> Values<'_, T> {
    /// Whether forming the sum of the weights is cheaper than going through the rank.
    fn merges(&self) -> bool {
        let Size { rows, out, input } = self.size;
        self.mask.is_none() && rows * (out + input) > 2 * out * input
    }

    /// `W + s B A`.
    fn merged(&self) -> Vec<T> {
        let Size { out, input, .. } = self.size;
        let mut sum = uninit(out * input);
        for_rows(&mut sum, 1, |first, piece| piece.copy_from_slice(&self.w[first..first + piece.len()]));
        let (a, b) = (Mat::new(self.a, self.rank, input), Mat::new(self.b, out, self.rank));
        gemm(MatMut::new(&mut sum, out, input), Old::Add, self.scale, b, a, Threads::All);
        sum
    }

    /// The input of A, where it is not `x` itself.
    fn dropped(&self) -> Option<Vec<T>> {
        self.mask.map(|mask| {
            let mut x = uninit(self.x.len());
            for_rows(&mut x, 1, |first, piece| {
                let range = first..first + piece.len();
                multiply(&self.x[range.clone()], &mask[range], piece);
            });
            x
        })
    }

    /// `x Aᵀ`, [rows, rank].
    fn down(&self, x: &[T]) -> Vec<T> {
        linear::product(x, self.a, None, Size { out: self.rank, ..self.size })
    }

    fn forward(&self) -> Vec<T> {
        if self.merges() {
            return linear::product(self.x, &self.merged(), self.bias, self.size);
        }
        let Size { rows, out, .. } = self.size;
        let mut y = linear::product(self.x, self.w, self.bias, self.size);
        let dropped = self.dropped();
        let down = self.down(dropped.as_deref().unwrap_or(self.x));
        let (down, b) = (Mat::new(&down, rows, self.rank), Mat::new(self.b, out, self.rank));
        gemm(MatMut::new(&mut y, rows, out), Old::Add, self.scale, down, b.t(), Threads::All);
        y
    }

    /// The gradient of the input, if it is wanted; `up` is `dy B`.
    fn input_gradient(&self, dy: &[T], up: &[T], want: Want<T>) -> Option<Vec<T>> {
        if self.merges() && want.any() {
            return linear::input_gradient(dy, &self.merged(), self.size, want);
        }
        let Size { rows, input, .. } = self.size;
        let mut dx = linear::input_gradient(dy, self.w, self.size, want)?;
        let (up, a) = (Mat::new(up, rows, self.rank), Mat::new(self.a, self.rank, input));
        let Some(mask) = self.mask else {
            gemm(MatMut::new(&mut dx, rows, input), Old::Add, self.scale, up, a, Threads::All);
            return Some(dx);
        };
        let mut through = uninit(rows * input);
        gemm(MatMut::new(&mut through, rows, input), Old::Overwrite, self.scale, up, a, Threads::All);
        for_rows(&mut dx, 1, |first, piece| {
            let range = first..first + piece.len();
            add_product(&through[range.clone()], &mask[range], piece);
        });
        Some(dx)
    }

    /// The gradients of the input, A and B that are wanted.
    fn backward(&self, dy: &[T], [dx, da, db]: [Want<T>; 3]) -> [Option<Vec<T>>; 3] {
        let Size { rows, out, input } = self.size;
        let mut up = Vec::new();
        if da.any() || (dx.any() && !self.merges()) {
            up = linear::input_gradient(dy, self.b, Size { input: self.rank, ..self.size }, Want::Fresh).unwrap_or_default();
        }
        let dx = self.input_gradient(dy, &up, dx);
        let dropped = if da.any() || db.any() { self.dropped() } else { None };
        let x = dropped.as_deref().unwrap_or(self.x);
        let da = da.start(self.rank * input).map(|(mut da, old)| {
            let (up, x) = (Mat::new(&up, rows, self.rank), Mat::new(x, rows, input));
            gemm(MatMut::new(&mut da, self.rank, input), old, self.scale, up.t(), x, Threads::All);
            da
        });
        let db = db.plus(|| {
            let down = self.down(x);
            let mut db = uninit(self.rank * out);
            let (down, dy) = (Mat::new(&down, rows, self.rank), Mat::new(dy, rows, out));
            // Transposed, because the product reads `dy` row by row then.
            gemm(MatMut::new(&mut db, self.rank, out), Old::Overwrite, self.scale, down.t(), dy, Threads::All);
            transpose(&db, self.rank, out)
        });
        [dx, da, db]
    }
}

/// The transpose of a matrix of a few rows.
fn transpose<T: Float>(m: &[T], rows: usize, cols: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(rows * cols);
    for col in 0..cols {
        out.extend((0..rows).map(|row| m[row * cols + col]));
    }
    out
}

vectorised! {
    fn multiply<T>(x: &[T], mask: &[T], out: &mut [T]) {
        for ((out, x), m) in out.iter_mut().zip(x).zip(mask) {
            *out = *x * *m;
        }
    }
}

vectorised! {
    fn add_product<T>(x: &[T], mask: &[T], out: &mut [T]) {
        for ((out, x), m) in out.iter_mut().zip(x).zip(mask) {
            *out += *x * *m;
        }
    }
}

/// What an operation captured, held for reading.
struct Captured<'a> {
    weight: View<'a>,
    bias: Option<View<'a>>,
    mask: Option<View<'a>>,
}

impl Op {
    fn captured(&self) -> Captured<'_> {
        Captured { weight: View::new(&self.weight), bias: self.bias.as_ref().map(View::new), mask: self.mask.as_ref().map(View::new) }
    }

    fn values<'a, T: Float>(&self, captured: &'a Captured<'_>, [x, a, b]: &'a [View<'_>; 3]) -> Result<Values<'a, T>> {
        Ok(Values {
            x: x.slice()?,
            w: captured.weight.slice()?,
            a: a.slice()?,
            b: b.slice()?,
            bias: captured.bias.as_ref().map(View::slice::<T>).transpose()?,
            mask: captured.mask.as_ref().map(View::slice::<T>).transpose()?,
            size: Size::new(x.dims(), self.weight.dims()),
            rank: self.rank,
            scale: T::from_f64(self.scale),
        })
    }
}

impl graph::Op<3> for Op {
    const NAME: &'static str = "lora-linear";

    fn forward<T: Float>(&self, operands: &[View<'_>; 3]) -> Result<(Vec<T>, Shape)> {
        let captured = self.captured();
        let values = self.values::<T>(&captured, operands)?;
        Ok((values.forward(), with_last(operands[0].dims(), values.size.out)))
    }

    fn backward<T: Float>(&self, operands: &[View<'_>; 3], dy: &[T], want: [Want<T>; 3]) -> Result<[Option<Vec<T>>; 3]> {
        let captured = self.captured();
        Ok(self.values::<T>(&captured, operands)?.backward(dy, want))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::{DType, Tensor};

    use super::super::testing::{check_gradients, check_same, frozen_is_absent, leaves, random};
    use super::*;

    const SCALE: f64 = 0.75;

    /// x, A, B; then what stays frozen.
    struct Case {
        trained: [Tensor; 3],
        w: Tensor,
        bias: Option<Tensor>,
        mask: Option<Tensor>,
    }

    fn case(dims: &[usize], out: usize, rank: usize, masked: bool) -> Case {
        let input = dims[dims.len() - 1];
        let mask = random(dims, 6).ge(-0.5).unwrap().to_dtype(DType::F64).unwrap();
        Case {
            trained: [random(dims, 1), random(&[rank, input], 2), random(&[out, rank], 3)],
            w: random(&[out, input], 4),
            bias: out.is_multiple_of(2).then(|| random(&[out], 5)),
            mask: masked.then(|| (mask / 0.75).unwrap()),
        }
    }

    impl Case {
        fn like(&self, t: &Tensor) -> (Tensor, Option<Tensor>, Option<Tensor>) {
            let to = |o: &Tensor| o.to_dtype(t.dtype()).unwrap();
            (to(&self.w), self.bias.as_ref().map(to), self.mask.as_ref().map(to))
        }

        fn run(&self, t: &[Tensor]) -> Result<Tensor> {
            let (w, bias, mask) = self.like(&t[0]);
            let lora = LowRank { a: &t[1], b: &t[2], scale: SCALE, dropout: mask.as_ref() };
            lora_linear(&t[0], &w, bias.as_ref(), &lora)
        }

        fn reference(&self, t: &[Tensor]) -> Result<Tensor> {
            let (w, bias, mask) = self.like(&t[0]);
            let x = match mask {
                Some(m) => (&t[0] * m)?,
                None => t[0].clone(),
            };
            let up = portable::linear(&portable::linear(&x, &t[1], None)?, &t[2], None)?;
            portable::linear(&t[0], &w, bias.as_ref())? + (up * SCALE)?
        }
    }

    /// Few rows go through the rank, many are merged, masks go through the rank.
    fn cases() -> [Case; 5] {
        [
            case(&[1, 2, 7], 6, 2, false),
            case(&[4, 9, 5], 3, 2, false),
            case(&[4, 9, 5], 4, 2, true),
            case(&[3], 3, 1, true),
            case(&[3, 50, 33], 65, 4, false),
        ]
    }

    #[test]
    fn gradients_match_differences() {
        for case in &cases()[..4] {
            check_gradients(&case.trained, |t| case.run(t));
        }
    }

    #[test]
    fn matches_the_portable_composition() {
        for case in &cases() {
            check_same(&case.trained, |t| case.run(t), |t| case.reference(t));
        }
    }

    #[test]
    fn takes_strided_operands() {
        let mut case = case(&[6, 4, 5], 4, 2, true);
        case.trained[0] = random(&[4, 6, 5], 1).transpose(0, 1).unwrap();
        case.w = random(&[5, 4], 4).t().unwrap();
        check_same(&case.trained, |t| case.run(t), |t| case.reference(t));
    }

    #[test]
    fn frozen_operands_get_no_gradient() {
        for case in &cases() {
            frozen_is_absent(&case.trained, |t| case.run(t));
        }
    }

    #[test]
    fn a_trained_weight_falls_back_on_the_composition() {
        let case = case(&[2, 3], 4, 2, false);
        let mut operands = case.trained.to_vec();
        operands.push(case.w.clone());
        check_gradients(&operands, |t| {
            let lora = LowRank { a: &t[1], b: &t[2], scale: SCALE, dropout: None };
            lora_linear(&t[0], &t[3], None, &lora)
        });
    }

    #[test]
    fn empty_batches_pass() {
        let case = case(&[0, 5, 8], 4, 2, false);
        let t = leaves(&case.trained, DType::F32, 7);
        let y = case.run(&t).unwrap();
        assert_eq!(y.dims(), [0, 5, 4]);
        y.sum_all().unwrap().backward().unwrap();
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let good = case(&[2, 3], 4, 2, false);
        let [x, a, b] = &good.trained;
        assert!(good.run(&[x.clone(), b.clone(), a.clone()]).is_err());
        assert!(good.run(&[x.clone(), a.t().unwrap(), b.clone()]).is_err());
    }
}
