#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Result, Tensor};

use super::super::testing::{check_gradients, check_same, frozen_is_absent, leaves, random};
use super::super::{AttentionShape, portable};
use super::attention;

const PLAIN: AttentionShape = AttentionShape { heads: 2, causal: false, prefix: 0 };
const CAUSAL: AttentionShape = AttentionShape { heads: 2, causal: true, prefix: 0 };

fn operands(batch: usize, queries: usize, keys: usize, width: usize) -> [Tensor; 3] {
    let wide = |t: Tensor| (t * 3.0).unwrap();
    [wide(random(&[batch, queries, width], 1)), wide(random(&[batch, keys, width], 2)), random(&[batch, keys, width], 3)]
}

/// A mask that hides different keys of each example; the last example's are all hidden.
fn mask(batch: usize, keys: usize) -> Tensor {
    let visible = |b, j| u8::from((b + 2 * j) % 3 != 0 && b + 1 != batch);
    let mask: Vec<u8> = (0..batch).flat_map(|b| (0..keys).map(move |j| visible(b, j))).collect();
    Tensor::from_vec(mask, (batch, keys), &Device::Cpu).unwrap()
}

fn run<'a>(shape: AttentionShape, mask: Option<&'a Tensor>) -> impl Fn(&[Tensor]) -> Result<Tensor> + 'a {
    move |t| attention(&t[0], &t[1], &t[2], &shape, mask)
}

fn reference<'a>(shape: AttentionShape, mask: Option<&'a Tensor>) -> impl Fn(&[Tensor]) -> Result<Tensor> + 'a {
    move |t| portable::attention(&t[0], &t[1], &t[2], &shape, mask)
}

#[test]
fn gradients_match_differences() {
    let prefixed = AttentionShape { prefix: 2, ..CAUSAL };
    let hidden = mask(2, 5);
    for (shape, keys) in [(PLAIN, 5), (CAUSAL, 4), (prefixed, 6)] {
        check_gradients(&operands(2, 4, keys, 6), run(shape, None));
    }
    check_gradients(&operands(2, 3, 5, 6), run(PLAIN, Some(&hidden)));
    check_gradients(&operands(2, 5, 5, 6), run(CAUSAL, Some(&hidden)));
}

#[test]
fn gradients_match_differences_over_several_blocks() {
    check_gradients(&operands(1, 67, 68, 2), run(AttentionShape { heads: 1, causal: true, prefix: 1 }, None));
}

#[test]
fn matches_the_portable_composition() {
    for (batch, queries, width, heads) in [(2, 1, 16, 1), (3, 50, 128, 2), (2, 65, 48, 3), (1, 131, 32, 2), (1, 300, 16, 1)] {
        for prefix in [0, 4] {
            let keys = queries + prefix;
            let mask = mask(batch, keys);
            for mask in [None, Some(&mask)] {
                for causal in [false, true] {
                    let shape = AttentionShape { heads, causal, prefix };
                    check_same(&operands(batch, queries, keys, width), run(shape, mask), reference(shape, mask));
                }
            }
        }
    }
}

#[test]
fn takes_strided_operands_and_keys_of_another_length() {
    let t = [(2, 5, 1), (2, 9, 2), (2, 9, 3)].map(|(batch, len, seed)| random(&[len, batch, 16], seed).transpose(0, 1).unwrap());
    check_same(&t, run(PLAIN, None), reference(PLAIN, None));
    // Causal: the last keys are seen by nobody and get zeros.
    check_same(&t, run(CAUSAL, None), reference(CAUSAL, None));
}

#[test]
fn large_scores_do_not_overflow() {
    let [q, k, v] = operands(1, 4, 4, 8);
    let t = leaves(&[(q * 1e4).unwrap(), k, v], DType::F32, 7);
    let y = run(PLAIN, None)(&t).unwrap();
    let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    for t in [&y, grads.get(&t[0]).unwrap(), grads.get(&t[1]).unwrap(), grads.get(&t[2]).unwrap()] {
        assert!(t.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|v| v.is_finite()));
    }
}

#[test]
fn a_query_that_sees_nothing_gives_zeros() {
    let mask = Tensor::zeros((2, 5), DType::U8, &Device::Cpu).unwrap();
    let y = run(PLAIN, Some(&mask))(&leaves(&operands(2, 3, 5, 8), DType::F32, 0)).unwrap();
    assert!(y.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|v| *v == 0.0));
}

#[test]
fn frozen_operands_get_no_gradient() {
    frozen_is_absent(&operands(2, 3, 4, 8), run(PLAIN, None));
}

#[test]
fn empty_operands_pass() {
    for (batch, queries, keys) in [(0, 3, 3), (2, 0, 3), (2, 3, 0)] {
        for shape in [PLAIN, CAUSAL] {
            let t = leaves(&operands(batch, queries, keys, 8), DType::F32, 7);
            let y = run(shape, None)(&t).unwrap();
            assert_eq!(y.dims(), [batch, queries, 8]);
            let grads = y.sum_all().unwrap().backward().unwrap();
            let dk = grads.get(&t[1]).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(dk.iter().all(|v| *v == 0.0));
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_errors() {
    let [q, k, v] = operands(2, 3, 4, 8);
    let three = AttentionShape { heads: 3, ..PLAIN };
    assert!(attention(&q, &k, &v, &three, None).is_err());
    assert!(attention(&q, &k, &v, &AttentionShape { heads: 0, ..PLAIN }, None).is_err());
    assert!(attention(&q, &k, &q, &PLAIN, None).is_err());
    assert!(attention(&q, &k, &v, &PLAIN, Some(&mask(2, 3))).is_err());
}
