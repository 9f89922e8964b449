//! Errors and correlations of numbers.

/// Mean absolute error.
#[must_use]
pub fn mae(found: &[f64], right: &[f64]) -> f64 {
    mean(found.iter().zip(right).map(|(a, b)| (a - b).abs()))
}

/// Root of the mean squared error.
#[must_use]
pub fn rmse(found: &[f64], right: &[f64]) -> f64 {
    mean(found.iter().zip(right).map(|(a, b)| (a - b) * (a - b))).sqrt()
}

/// Pearson's correlation; `None` where one side does not vary.
#[must_use]
pub fn pearson(a: &[f64], b: &[f64]) -> Option<f64> {
    // Of equal values the mean is rounded, and what is left of them would be correlated.
    if !varies(a) || !varies(b) {
        return None;
    }
    let (mean_a, mean_b) = (mean(a.iter().copied()), mean(b.iter().copied()));
    let (mut both, mut of_a, mut of_b) = (0.0, 0.0, 0.0);
    for (x, y) in a.iter().zip(b).map(|(x, y)| (x - mean_a, y - mean_b)) {
        both += x * y;
        of_a += x * x;
        of_b += y * y;
    }
    (of_a > 0.0 && of_b > 0.0).then(|| (both / (of_a.sqrt() * of_b.sqrt())).clamp(-1.0, 1.0))
}

/// Whether there are different values.
#[must_use]
pub fn varies(values: &[f64]) -> bool {
    values.iter().any(|v| *v != values[0])
}

/// Spearman's correlation: Pearson's of ranks, equal values sharing their mean rank; `None` where one side does not vary.
#[must_use]
pub fn spearman(a: &[f64], b: &[f64]) -> Option<f64> {
    pearson(&ranks(a), &ranks(b))
}

fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    let mut ranks = vec![0.0; values.len()];
    let mut from = 0;
    for group in order.chunk_by(|&i, &j| values[i] == values[j]) {
        let shared = from as f64 + (group.len() + 1) as f64 / 2.0;
        group.iter().for_each(|&i| ranks[i] = shared);
        from += group.len();
    }
    ranks
}

/// The middle value, or the mean of the two; 0 of none.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.len(), sorted.len() / 2) {
        (0, _) => 0.0,
        (n, middle) if n % 2 == 1 => sorted[middle],
        (_, middle) => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len().max(1) as f64;
    values.sum::<f64>() / count
}

#[cfg(test)]
mod tests {
    use super::*;

    /// scikit-learn 1.9: `mean_absolute_error`, `root_mean_squared_error`; scipy 1.17: `pearsonr`, `spearmanr`, ties on both sides.
    #[test]
    fn numbers_are_scikit_learns_and_scipys() {
        let found = [2.5, 0.0, 2.0, 8.0, 2.0, -1.5, 4.0];
        let right = [3.0, -0.5, 2.0, 7.0, 3.0, 3.0, 4.5];
        let ours = [Some(mae(&found, &right)), Some(rmse(&found, &right)), pearson(&found, &right), spearman(&found, &right)];
        for (ours, theirs) in ours.into_iter().zip(EXPECTED) {
            assert!((ours.unwrap_or(f64::NAN) - theirs).abs() < 1e-12, "{ours:?} {theirs}");
        }
        // scipy gives nan for these; the mean of the last is not 0.1.
        for constant in [[1.0; 3], [0.1; 3]] {
            assert_eq!((pearson(&constant, &[0.0, 1.0, 3.0]), spearman(&[0.0, 1.0, 3.0], &constant)), (None, None));
        }
        assert_eq!((pearson(&[], &[]), spearman(&[1.0], &[2.0])), (None, None));
        assert_eq!((median(&[3.0, 1.0, 2.0]), median(&[4.0, 1.0, 2.0, 3.0])), (2.0, 2.5));
    }

    const EXPECTED: [f64; 4] = [1.142_857_142_857_142_8, 1.812_653_934_349_931_5, 0.806_818_505_602_208_2, 0.747_957_592_006_765_8];
}
