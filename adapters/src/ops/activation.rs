//! Non-linearities, forward and backward in one pass each.

use candle_core::{Result, Shape, Tensor};

use super::float::Float;
use super::graph::{self, Want, apply};
use super::kernels::{View, for_rows, fused, uninit};
use super::simd::vectorised;
use super::{Activation, portable};

/// See [`super::activation`].
pub(super) fn activation(x: &Tensor, act: Activation) -> Result<Tensor> {
    if act == Activation::Identity || !fused([x]) {
        return portable::activation(x, act);
    }
    apply(Op(act), [&x.contiguous()?])
}

/// A constant.
#[inline(always)]
fn c<T: Float>(value: f64) -> T {
    T::from_f64(value)
}

#[inline(always)]
fn sigmoid<T: Float>(x: T) -> T {
    T::one() / (T::one() + (-x).exponential())
}

/// A non-linearity and its derivative. A trait, because loops over closures and function
/// items do not always inline them, and calls stay at the baseline's instructions.
trait Curve {
    fn value<T: Float>(x: T) -> T;
    fn slope<T: Float>(x: T) -> T;
}

macro_rules! curve {
    ($name:ident, $x:ident => $value:expr, $slope:expr) => {
        struct $name;

        impl Curve for $name {
            #[inline(always)]
            fn value<T: Float>($x: T) -> T {
                $value
            }

            #[inline(always)]
            fn slope<T: Float>($x: T) -> T {
                $slope
            }
        }
    };
}

curve!(QuickGelu, x => x * sigmoid(c::<T>(1.702) * x), swish_slope(x, c(1.702)));
curve!(Silu, x => x * sigmoid(x), swish_slope(x, T::one()));
curve!(Gelu, x => x * normal(x), normal(x) + x * density(x));
curve!(GeluTanh, x => x * tanh_normal(x), gelu_tanh_slope(x));
curve!(Relu, x => if x < T::zero() { T::zero() } else { x }, if x > T::zero() { T::one() } else { T::zero() });
curve!(Tanh, x => x.hyperbolic_tangent(), tanh_slope(x));

/// The derivative of `x σ(k x)`.
#[inline(always)]
fn swish_slope<T: Float>(x: T, k: T) -> T {
    let s = sigmoid(k * x);
    s + k * x * s * (T::one() - s)
}

/// Φ(x), the normal distribution's.
#[inline(always)]
fn normal<T: Float>(x: T) -> T {
    c::<T>(0.5) * (T::one() + (x * c(std::f64::consts::FRAC_1_SQRT_2)).error_function())
}

/// Φ'(x).
#[inline(always)]
fn density<T: Float>(x: T) -> T {
    /// 1/√(2π).
    const SCALE: f64 = 0.398_942_280_401_432_7;
    c::<T>(SCALE) * (c::<T>(-0.5) * x * x).exponential()
}

/// √(2/π) and the cubic term's factor.
const TANH: (f64, f64) = (0.797_884_560_802_865_4, 0.044_715);

/// `(1 + tanh(√(2/π)(x + 0.044715 x³))) / 2`, as a sigmoid of twice the argument.
#[inline(always)]
fn tanh_normal<T: Float>(x: T) -> T {
    sigmoid(c::<T>(2.0 * TANH.0) * x * (T::one() + c::<T>(TANH.1) * x * x))
}

#[inline(always)]
fn gelu_tanh_slope<T: Float>(x: T) -> T {
    let s = tanh_normal(x);
    let inner = c::<T>(2.0 * TANH.0) * (T::one() + c::<T>(3.0 * TANH.1) * x * x);
    s + x * s * (T::one() - s) * inner
}

#[inline(always)]
fn tanh_slope<T: Float>(x: T) -> T {
    let t = x.hyperbolic_tangent();
    T::one() - t * t
}

#[inline(always)]
fn map<C: Curve, T: Float>(x: &[T], y: &mut [T]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = C::value(*x);
    }
}

#[inline(always)]
fn scale_by<C: Curve, T: Float>(x: &[T], dy: &[T], dx: &mut [T]) {
    for ((dx, x), dy) in dx.iter_mut().zip(x).zip(dy) {
        *dx = *dy * C::slope(*x);
    }
}

vectorised! {
    fn values<T>(x: &[T], y: &mut [T], act: Activation) {
        match act {
            Activation::QuickGelu => map::<QuickGelu, T>(x, y),
            Activation::Gelu => map::<Gelu, T>(x, y),
            Activation::GeluTanh => map::<GeluTanh, T>(x, y),
            Activation::Relu => map::<Relu, T>(x, y),
            Activation::Silu => map::<Silu, T>(x, y),
            Activation::Tanh => map::<Tanh, T>(x, y),
            Activation::Identity => y.copy_from_slice(x),
        }
    }
}

vectorised! {
    fn slopes<T>(x: &[T], dy: &[T], dx: &mut [T], act: Activation) {
        match act {
            Activation::QuickGelu => scale_by::<QuickGelu, T>(x, dy, dx),
            Activation::Gelu => scale_by::<Gelu, T>(x, dy, dx),
            Activation::GeluTanh => scale_by::<GeluTanh, T>(x, dy, dx),
            Activation::Relu => scale_by::<Relu, T>(x, dy, dx),
            Activation::Silu => scale_by::<Silu, T>(x, dy, dx),
            Activation::Tanh => scale_by::<Tanh, T>(x, dy, dx),
            Activation::Identity => dx.copy_from_slice(dy),
        }
    }
}

/// The activated values.
fn activated<T: Float>(x: &[T], act: Activation) -> Vec<T> {
    let mut y = uninit(x.len());
    for_rows(&mut y, 1, |first, y| values(&x[first..first + y.len()], y, act));
    y
}

/// The gradient of the input.
fn gradient<T: Float>(x: &[T], dy: &[T], act: Activation) -> Vec<T> {
    let mut dx = uninit(x.len());
    for_rows(&mut dx, 1, |first, dx| {
        let range = first..first + dx.len();
        slopes(&x[range.clone()], &dy[range], dx, act);
    });
    dx
}

struct Op(Activation);

impl graph::Op<1> for Op {
    const NAME: &'static str = "activation";

    fn forward<T: Float>(&self, [x]: &[View<'_>; 1]) -> Result<(Vec<T>, Shape)> {
        Ok((activated(x.slice()?, self.0), Shape::from(x.dims())))
    }

    fn backward<T: Float>(&self, [x]: &[View<'_>; 1], dy: &[T], [dx]: [Want<T>; 1]) -> Result<[Option<Vec<T>>; 1]> {
        let x = x.slice()?;
        Ok([dx.plus(|| gradient(x, dy, self.0))])
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::super::testing::{check_gradients, check_same, random};
    use super::*;

    const ALL: [Activation; 7] = [
        Activation::QuickGelu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Relu,
        Activation::Silu,
        Activation::Tanh,
        Activation::Identity,
    ];

    /// Values in -8..8.
    fn wide(dims: &[usize], seed: u64) -> Tensor {
        (random(dims, seed) * 8.0).unwrap()
    }

    #[test]
    fn gradients_match_differences() {
        for act in ALL {
            check_gradients(&[wide(&[3, 17], 1)], |t| activation(&t[0], act));
        }
    }

    #[test]
    fn matches_the_portable_composition() {
        for act in ALL {
            for x in [wide(&[1, 50, 33], 2), wide(&[70_001], 3), wide(&[5, 4, 3], 4).transpose(0, 1).unwrap()] {
                check_same(&[x], |t| activation(&t[0], act), |t| portable::activation(&t[0], act));
            }
        }
    }

    #[test]
    fn ends_are_finite() {
        for act in ALL {
            let x = Tensor::new(&[-1e9_f32, -200.0, -90.0, 0.0, 90.0, 200.0], &Device::Cpu).unwrap();
            let x = candle_core::Var::from_tensor(&x).unwrap();
            let y = activation(&x, act).unwrap();
            let grads = y.backward().unwrap();
            for t in [&y, grads.get(&x).unwrap()] {
                assert!(t.to_vec1::<f32>().unwrap().iter().all(|v| v.is_finite()), "{act:?}: {t}");
            }
        }
    }

    #[test]
    fn empty_batches_pass() {
        let x = Tensor::zeros((0, 3), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(activation(&x, Activation::Gelu).unwrap().dims(), [0, 3]);
    }
}
