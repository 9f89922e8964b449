//! Checks that every fused operation has to pass.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Result, Tensor, Var};

/// Pseudo-random values in -1..1, the same each time.
pub(crate) fn random(dims: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let n: usize = dims.iter().product();
    let values: Vec<f64> = (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
        })
        .collect();
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

/// The operands as leaves: those in `tracked` (a bit each) get gradients. Strides stay.
pub(super) fn leaves(operands: &[Tensor], dtype: DType, tracked: usize) -> Vec<Tensor> {
    let leaf = |(i, t): (usize, &Tensor)| {
        if tracked >> i & 1 == 0 {
            // `to_dtype` makes it contiguous, so strides are restored.
            return restride(&t.contiguous().unwrap().to_dtype(dtype).unwrap(), t);
        }
        let var = Var::from_tensor(&t.contiguous().unwrap().to_dtype(dtype).unwrap()).unwrap();
        var.as_tensor().clone()
    };
    operands.iter().enumerate().map(leaf).collect()
}

fn restride(t: &Tensor, like: &Tensor) -> Tensor {
    if like.is_contiguous() {
        return t.clone();
    }
    t.transpose(0, 1).unwrap().contiguous().unwrap().transpose(0, 1).unwrap()
}

/// A scalar that depends on every element in its own way.
fn loss(y: &Tensor) -> Result<Tensor> {
    (y * random(y.dims(), 99).to_dtype(y.dtype())?)?.sum_all()
}

fn values(t: &Tensor) -> Vec<f64> {
    t.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

/// The operands with one element moved.
fn moved(operands: &[Tensor], which: usize, element: usize, by: f64) -> Vec<Tensor> {
    let mut operands = operands.to_vec();
    let mut v = values(&operands[which]);
    v[element] += by;
    operands[which] = Tensor::from_vec(v, operands[which].shape(), &Device::Cpu).unwrap();
    operands
}

/// Central differences in f64, for every combination of operands that are tracked.
pub(super) fn check_gradients(operands: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    const STEP: f64 = 1e-5;
    let at = |operands: &[Tensor]| -> f64 { loss(&f(operands).unwrap()).unwrap().to_scalar().unwrap() };
    let expected: Vec<Vec<f64>> = (0..operands.len())
        .map(|i| {
            let difference = |e| (at(&moved(operands, i, e, STEP)) - at(&moved(operands, i, e, -STEP))) / (2.0 * STEP);
            (0..operands[i].elem_count()).map(difference).collect()
        })
        .collect();
    for tracked in 1..1 << operands.len() {
        let leaves = leaves(operands, DType::F64, tracked);
        let grads = loss(&f(&leaves).unwrap()).unwrap().backward().unwrap();
        for (i, leaf) in leaves.iter().enumerate() {
            let Some(found) = grads.get(leaf) else {
                assert_eq!(tracked >> i & 1, 0, "operand {i} of {tracked:b} has no gradient");
                continue;
            };
            assert_eq!(tracked >> i & 1, 1, "operand {i} of {tracked:b} is frozen");
            close(&values(found), &expected[i], 1e-6);
        }
    }
}

/// Differences relative to the largest value.
pub(super) fn close(found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    let size = expected.iter().fold(1e-3, |m: f64, v| m.max(v.abs()));
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= tolerance * size, "element {i}: found {f}, expected {e}");
    }
}

/// That results and gradients equal the portable composition's in f32, and repeat bit for bit.
pub(super) fn check_same(operands: &[Tensor], fused: impl Fn(&[Tensor]) -> Result<Tensor>, portable: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let all = (1 << operands.len()) - 1;
    for tracked in [0, 1, all] {
        let leaves = leaves(operands, DType::F32, tracked);
        let (found, expected) = (fused(&leaves).unwrap(), portable(&leaves).unwrap());
        assert_eq!(found.dims(), expected.dims());
        close(&values(&found), &values(&expected), 1e-5);
        assert_eq!(values(&found), values(&fused(&leaves).unwrap()));
        if tracked == 0 {
            continue;
        }
        let grads = loss(&found).unwrap().backward().unwrap();
        let again = loss(&fused(&leaves).unwrap()).unwrap().backward().unwrap();
        let expected = loss(&expected).unwrap().backward().unwrap();
        for leaf in leaves.iter().filter(|l| l.is_variable()) {
            let found = values(grads.get(leaf).unwrap());
            close(&found, &values(expected.get(leaf).unwrap()), 1e-5);
            assert_eq!(found, values(again.get(leaf).unwrap()));
        }
    }
}

/// That operands which are not tracked are not in the gradient store.
pub(super) fn frozen_is_absent(operands: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    for tracked in 1..1 << operands.len() {
        let leaves = leaves(operands, DType::F32, tracked);
        let grads = f(&leaves).unwrap().sum_all().unwrap().backward().unwrap();
        for (i, leaf) in leaves.iter().enumerate() {
            assert_eq!(grads.get(leaf).is_some(), tracked >> i & 1 == 1, "operand {i} of {tracked:b}");
        }
    }
}
