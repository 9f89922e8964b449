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

/// Scores in descending order with how many of each kind come up to and with each different score: (score, true
/// positives, false positives).
fn ranked(scores: &[f32], positive: &[bool]) -> Vec<(f32, usize, usize)> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    let (mut tp, mut fp) = (0, 0);
    let mut steps: Vec<(f32, usize, usize)> = Vec::new();
    for i in order {
        if positive[i] {
            tp += 1
        } else {
            fp += 1
        }
        match steps.last_mut().filter(|last| last.0 == scores[i]) {
            Some(last) => (last.1, last.2) = (tp, fp),
            None => steps.push((scores[i], tp, fp)),
        }
    }
    steps
}

/// Area under the receiver operating characteristic; `None` where one kind is missing.
#[must_use]
pub fn roc_auc(scores: &[f32], positive: &[bool]) -> Option<f64> {
    let steps = ranked(scores, positive);
    let &(_, positives, negatives) = steps.last()?;
    if positives == 0 || negatives == 0 {
        return None;
    }
    let mut before = (0, 0);
    let mut area = 0.0;
    for (_, tp, fp) in steps {
        area += (fp - before.1) as f64 * (tp + before.0) as f64 / 2.0;
        before = (tp, fp);
    }
    Some(area / (positives as f64 * negatives as f64))
}

/// Average precision, Σ (Rₙ − Rₙ₋₁) Pₙ as scikit-learn has it; `None` where nothing is positive.
#[must_use]
pub fn average_precision(scores: &[f32], positive: &[bool]) -> Option<f64> {
    let steps = ranked(scores, positive);
    let positives = steps.last().filter(|s| s.1 > 0)?.1 as f64;
    let mut before = 0;
    let mut sum = 0.0;
    for (_, tp, fp) in steps {
        sum += (tp - before) as f64 / positives * tp as f64 / (tp + fp) as f64;
        before = tp;
    }
    Some(sum)
}

/// The threshold with the largest F1: what scores at least as much is positive. It lies midway between two scores, so that
/// rounding does not move anything across; `None` where nothing is positive.
#[must_use]
pub fn best_threshold(scores: &[f32], positive: &[bool]) -> Option<f64> {
    let steps = ranked(scores, positive);
    let positives = steps.last().filter(|s| s.1 > 0)?.1;
    let f1 = |&(_, tp, fp): &(f32, usize, usize)| 2.0 * tp as f64 / (tp + fp + positives) as f64;
    let mut best = 0;
    for i in 1..steps.len() {
        if f1(&steps[i]) > f1(&steps[best]) {
            best = i;
        }
    }
    let here = f64::from(steps[best].0);
    Some(steps.get(best + 1).map_or(here.min(0.0), |next| f64::midpoint(here, f64::from(next.0))))
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

    /// scikit-learn 1.9: `roc_auc_score`, `average_precision_score` and the best of `precision_recall_curve`, ties included.
    #[test]
    fn ranking_is_scikit_learns() {
        let scores = [0.1f32, 0.4, 0.35, 0.8, 0.4, 0.7, 0.2, 0.4];
        let positive = [false, false, true, true, true, false, false, true];
        let near = |a: Option<f64>, b: f64| assert!((a.unwrap_or(f64::NAN) - b).abs() < 1e-12, "{a:?} {b}");
        near(roc_auc(&scores, &positive), 0.6875);
        near(average_precision(&scores, &positive), 0.716_666_666_666_666_7);
        near(best_threshold(&scores, &positive), f64::midpoint(f64::from(0.35f32), f64::from(0.2f32)));
        assert_eq!((roc_auc(&scores, &[true; 8]), average_precision(&scores, &[false; 8])), (None, None));
    }

    #[test]
    fn calibration_is_the_gap_between_confidence_and_hits() {
        let rows = vec![vec![0.8f32, 0.2], vec![0.8, 0.2]];
        assert!((calibration_error(&rows, &[0, 1]) - 0.3).abs() < 1e-6);
        assert!((top_k(&rows, &[0, 1], 1) - 0.5).abs() < 1e-12);
        assert_eq!(argmax(&rows), [0, 0]);
    }
}
