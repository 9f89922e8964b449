//! Rows that come into the sequences of a batch, the same for each.

use std::ops::Range;

use candle_core::{Result, Shape, Tensor, bail};

use super::float::Float;
use super::gemm::Old;
use super::graph::{self, Want, apply};
use super::kernels::{View, add, add_rows, for_rows, fused, sum_rows, uninit};
use super::portable;

/// See [`super::splice`].
pub(super) fn splice(x: &Tensor, rows: &Tensor, at: Range<usize>) -> Result<Tensor> {
    let ((_, len, dim), (_, width)) = (x.dims3()?, rows.dims2()?);
    if width != dim || at.start > at.end || at.end > len {
        bail!("rows {:?} do not go in place of {at:?} of {:?}", rows.shape(), x.shape());
    }
    if !fused([x, rows]) || x.elem_count() == 0 {
        return portable::splice(x, rows, at);
    }
    apply(Op { at }, [&x.contiguous()?, &rows.contiguous()?])
}

/// The range of the sequence that gives way.
struct Op {
    at: Range<usize>,
}

/// Lengths in numbers: of a sequence before and after, of what comes in, and what gives way to it.
struct Sizes {
    before: usize,
    after: usize,
    inserted: usize,
    out: Range<usize>,
}

impl Op {
    fn sizes(&self, x: &[usize], rows: &[usize]) -> Sizes {
        let (len, dim) = (x[1], x[2]);
        let out = self.at.start * dim..self.at.end * dim;
        Sizes { before: len * dim, after: (len - self.at.len() + rows[0]) * dim, inserted: rows[0] * dim, out }
    }
}

impl graph::Op<2> for Op {
    const NAME: &'static str = "splice";

    fn forward<T: Float>(&self, [x, rows]: &[View<'_>; 2]) -> Result<(Vec<T>, Shape)> {
        let Sizes { before, after, inserted, out } = self.sizes(x.dims(), rows.dims());
        let shape = Shape::from((x.dims()[0], after / x.dims()[2], x.dims()[2]));
        let (x, rows) = (x.slice::<T>()?, rows.slice::<T>()?);
        let mut y = uninit(shape.elem_count());
        for_rows(&mut y, after, |first, piece| {
            for (y, x) in piece.chunks_exact_mut(after).zip(x[first * before..].chunks_exact(before)) {
                y[..out.start].copy_from_slice(&x[..out.start]);
                y[out.start..][..inserted].copy_from_slice(rows);
                y[out.start + inserted..].copy_from_slice(&x[out.end..]);
            }
        });
        Ok((y, shape))
    }

    fn backward<T: Float>(&self, [x, rows]: &[View<'_>; 2], dy: &[T], [dx, drows]: [Want<T>; 2]) -> Result<[Option<Vec<T>>; 2]> {
        let Sizes { before, after, inserted, out } = self.sizes(x.dims(), rows.dims());
        let batch = x.dims()[0];
        let dx = dx.start(batch * before).map(|(mut dx, old)| {
            for_rows(&mut dx, before, |first, piece| {
                for (dx, dy) in piece.chunks_exact_mut(before).zip(dy[first * after..].chunks_exact(after)) {
                    let (head, tail) = (&dy[..out.start], &dy[out.start + inserted..]);
                    if old == Old::Add {
                        add(&mut dx[..out.start], head);
                        add(&mut dx[out.end..], tail);
                    } else {
                        dx[..out.start].copy_from_slice(head);
                        dx[out.clone()].fill(T::zero());
                        dx[out.end..].copy_from_slice(tail);
                    }
                }
            });
            dx
        });
        let drows = drows.plus(|| {
            sum_rows(batch, inserted, &mut [], |range, sums, _| {
                range.for_each(|i| add_rows(sums, &dy[i * after + out.start..][..inserted]));
            })
        });
        Ok([dx, drows])
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::testing::{check_gradients, check_same, frozen_is_absent, random};
    use super::*;

    fn same(batch: usize, len: usize, rows: usize, at: Range<usize>) {
        let t = [random(&[batch, len, 33], 1), random(&[rows, 33], 2)];
        check_same(&t, |t| splice(&t[0], &t[1], at.clone()), |t| portable::splice(&t[0], &t[1], at.clone()));
    }

    #[test]
    fn gradients_match_differences() {
        for at in [0..0, 1..1, 1..3, 3..3, 0..3] {
            check_gradients(&[random(&[2, 3, 5], 1), random(&[2, 5], 2)], |t| splice(&t[0], &t[1], at.clone()));
        }
    }

    #[test]
    fn matches_the_portable_composition() {
        same(1, 4, 1, 0..0);
        same(3, 5, 2, 1..4);
        same(2, 5, 7, 5..5);
        // Long enough for several threads.
        same(40, 50, 8, 1..9);
    }

    #[test]
    fn what_several_read_is_added_up() {
        check_gradients(&[random(&[2, 3, 5], 1), random(&[2, 5], 2)], |t| {
            let x = super::super::add(&t[0], &t[0])?;
            splice(&x, &t[1], 0..0)?.narrow(1, 0, 3)? + splice(&x, &t[1], 1..3)?
        });
    }

    #[test]
    fn takes_strided_operands_and_empty_batches() {
        let t = [random(&[4, 3, 5], 1).transpose(0, 1).unwrap(), random(&[2, 5], 2)];
        check_same(&t, |t| splice(&t[0], &t[1], 1..2), |t| portable::splice(&t[0], &t[1], 1..2));
        assert_eq!(splice(&random(&[0, 3, 5], 1), &t[1], 1..2).unwrap().dims(), [0, 4, 5]);
        frozen_is_absent(&t, |t| splice(&t[0], &t[1], 1..2));
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let x = random(&[2, 3, 5], 1);
        assert!(splice(&x, &random(&[2, 4], 2), 0..0).is_err());
        assert!(splice(&x, &random(&[2, 5], 2), 2..4).is_err());
    }
}
