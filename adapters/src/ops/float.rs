//! The floats that fused operations run on, and their elementary functions.

use std::ops::Neg;

use candle_core::WithDType;

/// f32, with functions that vectorise, or f64, with exact ones.
pub(super) trait Float: WithDType + Neg<Output = Self> {
    /// -∞.
    const LOWEST: Self;
    /// eˣ.
    fn exponential(self) -> Self;
    /// The hyperbolic tangent.
    fn hyperbolic_tangent(self) -> Self;
    /// The error function.
    fn error_function(self) -> Self;
    /// √x.
    fn root(self) -> Self;
}

impl Float for f64 {
    const LOWEST: Self = Self::NEG_INFINITY;

    #[inline(always)]
    fn exponential(self) -> Self {
        self.exp()
    }

    #[inline(always)]
    fn hyperbolic_tangent(self) -> Self {
        self.tanh()
    }

    #[inline(always)]
    fn error_function(self) -> Self {
        libm::erf(self)
    }

    #[inline(always)]
    fn root(self) -> Self {
        self.sqrt()
    }
}

/// Horner's scheme, the highest coefficient first; a loop might not be unrolled in time to vectorise.
macro_rules! polynomial {
    ($x:expr, [$first:expr $(, $next:expr)* $(,)?] $(,)?) => {{
        let sum: f32 = $first;
        $(let sum = sum * $x + $next;)*
        sum
    }};
}

impl Float for f32 {
    const LOWEST: Self = Self::NEG_INFINITY;

    /// Cody and Waite's reduction to ±ln 2 / 2, then Cephes' polynomial; within 2 ulp.
    #[inline(always)]
    #[allow(clippy::excessive_precision)]
    fn exponential(self) -> Self {
        // 1.5 · 2²³: adding it rounds to an integer, which the low bits then hold.
        const ROUND: f32 = 12_582_912.0;
        // Beyond these the result is 0 or ∞ anyway; NaN passes both tests.
        let x = if self < -105.0 { -105.0 } else { self };
        let x = if x > 89.0 { 89.0 } else { x };
        let shifted = x * std::f32::consts::LOG2_E + ROUND;
        let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
        let whole = shifted - ROUND;
        let r = (x - whole * 0.693_359_375) - whole * -2.121_944_4e-4;
        let p = polynomial!(r, [1.987_569_15e-4, 1.398_199_95e-3, 8.333_451_9e-3, 4.166_579_6e-2, 1.666_666_55e-1, 0.5, 1.0, 1.0],);
        // 2ⁿ in two factors, because n reaches below and above the exponents of f32.
        let half = n >> 1;
        p * power_of_two(half) * power_of_two(n.wrapping_sub(half))
    }

    #[inline(always)]
    #[allow(clippy::excessive_precision)]
    fn hyperbolic_tangent(self) -> Self {
        let size = self.abs();
        let square = self * self;
        let small =
            polynomial!(square, [-5.704_988_7e-3, 2.063_908_9e-2, -5.373_971_6e-2, 1.333_144_22e-1, -3.333_328_19e-1],) * square * self
                + self;
        let large = 1.0 - 2.0 / ((size + size).exponential() + 1.0);
        let large = if self < 0.0 { -large } else { large };
        choose(size > 0.625, large, small)
    }

    /// Two polynomials, one under an exponential: Juffa's `erff`.
    #[inline(always)]
    #[allow(clippy::excessive_precision)]
    fn error_function(self) -> Self {
        let size = self.abs();
        let square = self * self;
        let small =
            polynomial!(square, [-5.967_617_03e-4, 4.991_194_23e-3, -2.676_813_49e-2, 1.128_199_25e-1, -3.761_253_36e-1, 1.283_791_66e-1],)
                * self
                + self;
        let exponent = polynomial!(
            size,
            [-1.728_534_7e-5, 3.831_971_26e-4, -3.883_964_38e-3, 2.425_462_19e-2, -1.067_778_77e-1, -6.348_466_87e-1, -1.287_175_12e-1,],
        ) * size
            - size;
        let large = 1.0 - exponent.exponential();
        let large = if self < 0.0 { -large } else { large };
        choose(size > 0.927_734_375, large, small)
    }

    #[inline(always)]
    fn root(self) -> Self {
        self.sqrt()
    }
}

/// Both values are computed: a branch between them would keep loops from vectorising.
#[inline(always)]
fn choose(condition: bool, yes: f32, no: f32) -> f32 {
    std::hint::select_unpredictable(condition, yes, no)
}

/// 2ⁿ for n in -126..=127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

#[cfg(test)]
mod tests {
    use super::Float;

    fn grid(from: f32, to: f32) -> impl Iterator<Item = f32> {
        let n = 400_000;
        (0..=n).map(move |i| from + (to - from) * i as f32 / n as f32)
    }

    /// The distance in units of the last place of the exact value.
    fn ulps(found: f32, exact: f64) -> f64 {
        let near = exact as f32;
        let ulp = f64::from(f32::from_bits(near.abs().to_bits() + 1)) - f64::from(near.abs());
        (f64::from(found) - exact).abs() / ulp
    }

    #[test]
    fn exponential_is_within_two_ulp() {
        let worst = grid(-103.0, 88.7).map(|x| ulps(x.exponential(), f64::from(x).exp())).fold(0.0, f64::max);
        assert!(worst < 2.0, "{worst}");
    }

    #[test]
    fn exponential_at_its_ends() {
        assert_eq!(f32::NEG_INFINITY.exponential(), 0.0);
        assert_eq!((-1e30_f32).exponential(), 0.0);
        assert_eq!(f32::INFINITY.exponential(), f32::INFINITY);
        assert_eq!(89.0_f32.exponential(), f32::INFINITY);
        assert_eq!(0.0_f32.exponential(), 1.0);
        assert!(f32::NAN.exponential().is_nan());
    }

    #[test]
    fn error_function_is_exact_to_a_unit_of_f32() {
        let worst = grid(-6.0, 6.0).map(|x| (f64::from(x.error_function()) - libm::erf(f64::from(x))).abs()).fold(0.0, f64::max);
        assert!(worst < 1e-7, "{worst}");
        assert_eq!(f32::INFINITY.error_function(), 1.0);
        assert_eq!(f32::NEG_INFINITY.error_function(), -1.0);
        assert!(f32::NAN.error_function().is_nan());
    }

    #[test]
    fn tangent_is_within_three_ulp() {
        let worst = grid(-12.0, 12.0).map(|x| ulps(x.hyperbolic_tangent(), f64::from(x).tanh())).fold(0.0, f64::max);
        assert!(worst < 3.0, "{worst}");
        assert_eq!(f32::INFINITY.hyperbolic_tangent(), 1.0);
        assert!(f32::NAN.hyperbolic_tangent().is_nan());
    }
}
