//! Numbers over whole splits.

use std::collections::BTreeMap;

use rayon::prelude::*;

/// Indices of the largest value of each row.
///
/// # Panics
/// Never: empty rows give 0.
#[must_use]
pub fn argmax(rows: &[Vec<f32>]) -> Vec<u32> {
    let best = |row: &Vec<f32>| {
        row.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (i, &v)| if v > best.1 { (i, v) } else { best }).0 as u32
    };
    rows.iter().map(best).collect()
}

/// The share of rows whose label is among the `k` largest values.
#[must_use]
pub fn top_k(rows: &[Vec<f32>], labels: &[u32], k: usize) -> f64 {
    let hit = |(row, &label): (&Vec<f32>, &u32)| {
        let own = row[label as usize];
        row.iter().filter(|v| **v > own).count() < k
    };
    rows.iter().zip(labels).filter(|pair| hit(*pair)).count() as f64 / rows.len().max(1) as f64
}

/// Expected calibration error over 15 equal bins of confidence (Guo et al. 2017).
#[must_use]
pub fn calibration_error(rows: &[Vec<f32>], labels: &[u32]) -> f64 {
    const BINS: usize = 15;
    let mut bins = [(0usize, 0f64, 0f64); BINS];
    for ((row, &label), guess) in rows.iter().zip(labels).zip(argmax(rows)) {
        let confidence = f64::from(row[guess as usize]);
        // Bins are open below and closed above.
        let bin = ((confidence * BINS as f64).ceil() as usize).clamp(1, BINS) - 1;
        bins[bin].0 += 1;
        bins[bin].1 += confidence;
        bins[bin].2 += f64::from(u8::from(guess == label));
    }
    bins.iter().map(|(_, confidence, hits)| (confidence - hits).abs()).sum::<f64>() / rows.len().max(1) as f64
}

/// Recall at 1, 5 and 10 and the median rank of the best positive.
///
/// `positive(query, candidate)` says what counts as found. A candidate that scores the same as the
/// best positive does not push it down.
pub fn recall(prefix: &str, scores: &[Vec<f32>], positive: impl Fn(usize, usize) -> bool + Sync, into: &mut BTreeMap<String, f64>) {
    let mut ranks: Vec<usize> = scores
        .par_iter()
        .enumerate()
        .filter_map(|(query, row)| {
            let best = (0..row.len()).filter(|&c| positive(query, c)).map(|c| row[c]).fold(f32::NEG_INFINITY, f32::max);
            (best > f32::NEG_INFINITY).then(|| row.iter().enumerate().filter(|(c, v)| **v > best && !positive(query, *c)).count())
        })
        .collect();
    ranks.sort_unstable();
    let count = ranks.len().max(1) as f64;
    for k in [1, 5, 10] {
        let hits = ranks.iter().filter(|r| **r < k).count();
        into.insert(format!("{prefix}_recall_at_{k}"), hits as f64 / count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recall_counts_the_best_positive() {
        let scores = vec![vec![0.9, 0.1, 0.5], vec![0.9, 0.1, 0.5]];
        let mut out = BTreeMap::new();
        recall("t", &scores, |q, c| q == c, &mut out);
        assert_eq!((out["t_recall_at_1"], out["t_recall_at_5"]), (0.5, 1.0));
    }

    #[test]
    fn calibration_is_the_gap_between_confidence_and_hits() {
        let rows = vec![vec![0.8f32, 0.2], vec![0.8, 0.2]];
        assert!((calibration_error(&rows, &[0, 1]) - 0.3).abs() < 1e-6);
        assert!((top_k(&rows, &[0, 1], 1) - 0.5).abs() < 1e-12);
        assert_eq!(argmax(&rows), [0, 0]);
    }
}
