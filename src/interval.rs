//! How sure a share of examples is.

/// The 0.975 quantile of the standard normal distribution.
const Z: f64 = 1.959_963_984_540_054;

/// Wilson's 95 % interval of a share, `hits` of `all` (Journal of the American Statistical Association 22, 1927, 209–212), without
/// continuity correction: unlike p ± 1.96 √(p (1 − p) / n) it holds for few examples, and where all or none are right. `None` where
/// there are no examples.
#[must_use]
pub fn wilson(hits: usize, all: usize) -> Option<[f64; 2]> {
    if all == 0 {
        return None;
    }
    let n = all as f64;
    let p = hits as f64 / n;
    let squared = Z * Z / n;
    let centre = (p + squared / 2.0) / (1.0 + squared);
    let half = half_width(p, all);
    // Rounding must not give an interval that misses its own share.
    Some([(centre - half).clamp(0.0, p), (centre + half).clamp(p, 1.0)])
}

/// Half of [`wilson`]'s width for a share that was, or will be, measured on so many examples.
#[must_use]
pub fn half_width(share: f64, examples: usize) -> f64 {
    let n = examples as f64;
    let squared = Z * Z / n;
    Z / (1.0 + squared) * (share * (1.0 - share) / n + squared / (4.0 * n)).sqrt()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// SciPy 1.17: `binomtest(hits, all).proportion_ci(method="wilson")`.
    #[test]
    fn intervals_are_scipys() {
        let known = [
            (0, 1, 0.0, 0.793_450_685_623),
            (1, 1, 0.206_549_314_377, 1.0),
            (0, 10, 0.0, 0.277_532_799_863),
            (5, 10, 0.236_593_090_513, 0.763_406_909_487),
            (10, 10, 0.722_467_200_137, 1.0),
            (150, 160, 0.888_784_245_971, 0.965_700_333_254),
            (1, 3, 0.061_491_944_720, 0.792_340_399_198),
            (47, 1000, 0.035_527_105_106, 0.061_939_938_082),
        ];
        for (hits, all, low, high) in known {
            let found = wilson(hits, all).unwrap();
            assert!((found[0] - low).abs() < 1e-9 && (found[1] - high).abs() < 1e-9, "{hits} of {all}: {found:?}");
        }
        assert_eq!(wilson(0, 0), None);
    }
}
