//! The sum of two tensors, whose gradient goes to both without a copy.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp2, DType, Device, Layout, Result, Shape, Tensor, WithDType as _};

use super::float::Float;
use super::kernels::{View, by_float, for_rows, fused, uninit};
use super::simd::vectorised;
use super::slot::{Edge, Slot, token, value};

/// See [`super::add`].
pub(super) fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.dims() != b.dims() || !fused([a, b]) {
        return a + b;
    }
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    let (dtype, tracked) = (a.dtype(), a.track_op() || b.track_op());
    let storage = by_float!(dtype, T => {
        let values = sum::<T>(View::new(&a).slice()?, View::new(&b).slice()?);
        if !tracked {
            return Tensor::from_vec(values, a.shape(), &Device::Cpu);
        }
        T::to_cpu_storage_owned(values)
    });
    let (shape, slot) = (a.shape().clone(), Arc::<Slot>::default());
    let ((first, token_a), (second, token_b)) = (Edge::to(&a), Edge::to(&b));
    let op = Op { edges: [first, second], slot: slot.clone(), dtype };
    value(token_a.apply_op2(&token_b, op)?, slot, storage, shape)
}

vectorised! {
    fn sum_into<T>(a: &[T], b: &[T], y: &mut [T]) {
        for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
            *y = *a + *b;
        }
    }
}

fn sum<T: Float>(a: &[T], b: &[T]) -> Vec<T> {
    let mut y = uninit(a.len());
    for_rows(&mut y, 1, |first, y| {
        let range = first..first + y.len();
        sum_into(&a[range.clone()], &b[range], y);
    });
    y
}

struct Op {
    edges: [Edge; 2],
    slot: Arc<Slot>,
    dtype: DType,
}

impl CustomOp2 for Op {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        token(self.dtype)
    }

    fn bwd(&self, a: &Tensor, b: &Tensor, _: &Tensor, _: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [to_a, to_b] = &self.edges;
        match self.slot.take() {
            Some(dy) => Ok((to_a.send(dy.clone(), a)?, to_b.send(dy, b)?)),
            None => Ok((to_a.nothing(a)?, to_b.nothing(b)?)),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::testing::{check_gradients, check_same, frozen_is_absent, random};
    use super::*;

    fn run(t: &[Tensor]) -> Result<Tensor> {
        add(&t[0], &t[1])
    }

    #[test]
    fn gradients_match_differences_and_the_composition() {
        let operands = [random(&[2, 3, 7], 1), random(&[2, 3, 7], 2)];
        check_gradients(&operands, run);
        check_same(&operands, run, |t| &t[0] + &t[1]);
        check_same(&[random(&[41, 1000], 1), random(&[41, 1000], 2)], run, |t| &t[0] + &t[1]);
        check_same(&[random(&[4, 6], 1).t().unwrap(), random(&[6, 4], 2)], run, |t| &t[0] + &t[1]);
        frozen_is_absent(&operands, run);
    }

    #[test]
    fn twice_the_same_has_twice_the_gradient() {
        check_gradients(&[random(&[2, 3], 1)], |t| add(&t[0], &t[0]));
    }

    #[test]
    fn other_shapes_are_errors() {
        assert!(add(&random(&[2, 3], 1), &random(&[3], 2)).is_err());
    }
}
