//! What small sets ask of a recipe.

use crate::data::{Dataset, Example};
use crate::interval::half_width;

/// Below so many training images a class a linear probe is worth a try.
const SHOTS: usize = 20;
/// Below so many validation examples a metric is mostly luck.
const VALIDATION: usize = 50;
/// Below so many training pairs retrieval easily gets worse.
const PAIRS: usize = 1000;

/// Training images of a class, the mean over classes, where a classification has few of them.
pub(super) fn shots(data: &Dataset, task: &str) -> Option<f64> {
    let images = data.train.iter().flat_map(Example::all_labels).count();
    let mean = images as f64 / data.classes.len().max(1) as f64;
    (task == "classify" && mean < SHOTS as f64).then_some(mean)
}

/// Training pairs, where retrieval has few of them.
pub(super) fn pairs(data: &Dataset, task: &str) -> Option<usize> {
    let count = |e: &Example| e.texts.len().max(1);
    let pairs = data.train.iter().map(count).sum();
    (task == "retrieve" && pairs < PAIRS).then_some(pairs)
}

/// What a small validation split means; nothing where it is large enough.
pub(super) fn validation(count: usize) -> Option<String> {
    match count {
        0 => Some("there is no validation example: no epoch is chosen, the last one is kept".into()),
        n if n < VALIDATION => {
            let points = 100.0 * half_width(0.8, n);
            let examples = if n == 1 { "1 validation example".to_string() } else { format!("{n} validation examples") };
            Some(format!(
                "{examples}: an accuracy of 80 % measured there is known to ±{points:.0} points only (95 % interval, Wilson), so that \
                 chance has a say in which epoch is kept"
            ))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SciPy's `binomtest(0.8 n, n).proportion_ci(method="wilson")`.
    #[test]
    fn intervals_are_wilsons() {
        for (n, [low, high]) in [(10, [0.490_162_5, 0.943_317_8]), (40, [0.652_426_9, 0.895_000_1])] {
            let half = half_width(0.8, n);
            assert!((half - (high - low) / 2.0).abs() < 1e-4, "{n}: {half}");
        }
        assert!(validation(49).is_some_and(|s| s.contains("49")) && validation(50).is_none() && validation(0).is_some());
    }
}
