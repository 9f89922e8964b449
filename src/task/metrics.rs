//! Numbers over whole splits.

use std::collections::BTreeMap;

use rayon::prelude::*;

mod calibration;
mod regression;

pub use calibration::{binary_calibration_error, binary_temperature, calibration_error, temperature};
pub use regression::{mae, median, pearson, rmse, spearman, varies};

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

/// Recall at 1, 5 and 10, the median rank of the best positive, from 1, and mean average precision as [`average_precision`] has it.
///
/// `relation(query, candidate)` says what counts as found; `None` is not among the candidates. Queries without a positive do not
/// count, and where no query has one there is nothing to say. A candidate that scores the same as the best positive does not push it
/// down.
pub fn retrieval(
    prefix: &str,
    scores: &[Vec<f32>],
    relation: impl Fn(usize, usize) -> Option<bool> + Sync,
    into: &mut BTreeMap<String, f64>,
) {
    let one = |(query, row): (usize, &Vec<f32>)| ranking(row, |c| relation(query, c));
    let found: Vec<(usize, f64)> = scores.par_iter().enumerate().filter_map(one).collect();
    if found.is_empty() {
        return;
    }
    let count = found.len() as f64;
    for k in [1, 5, 10] {
        let hits = found.iter().filter(|(rank, _)| *rank <= k).count();
        into.insert(format!("{prefix}recall_at_{k}"), hits as f64 / count);
    }
    into.insert(format!("{prefix}median_rank"), median(&found.iter().map(|f| f.0 as f64).collect::<Vec<_>>()));
    into.insert(format!("{prefix}mean_average_precision"), found.iter().map(|f| f.1).sum::<f64>() / count);
}

/// The best positive's rank, from 1, and the average precision of one query; `None` where nothing is positive.
fn ranking(row: &[f32], relation: impl Fn(usize) -> Option<bool>) -> Option<(usize, f64)> {
    let (scores, positive): (Vec<f32>, Vec<bool>) = row.iter().enumerate().filter_map(|(c, &v)| Some((v, relation(c)?))).unzip();
    let steps = ranked(&scores, &positive);
    let first = steps.iter().position(|step| step.1 > 0)?;
    let above = if first == 0 { 0 } else { steps[first - 1].2 };
    Some((1 + above, precision_of(&steps)?))
}

/// Mean average precision at R over queries with R > 0 positives (Musgrave et al. 2020, arXiv 2003.08505, section 3.2):
/// Σ P(i)·rel(i) / R over the R nearest. Of equal scores the earlier candidate comes first; `None` where no query has a positive.
pub fn map_at_r(scores: &[Vec<f32>], relation: impl Fn(usize, usize) -> Option<bool> + Sync) -> Option<f64> {
    let one = |(query, row): (usize, &Vec<f32>)| {
        let mut all: Vec<(f32, bool)> = row.iter().enumerate().filter_map(|(c, &v)| Some((v, relation(query, c)?))).collect();
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        let r = all.iter().filter(|c| c.1).count();
        let mut hits = 0;
        let gained = all.iter().take(r).enumerate().filter(|(_, c)| c.1).map(|(i, _)| {
            hits += 1;
            f64::from(hits) / (i + 1) as f64
        });
        (r > 0).then(|| gained.sum::<f64>() / r as f64)
    };
    mean_of(&scores.par_iter().enumerate().filter_map(one).collect::<Vec<f64>>())
}

/// Nothing of none.
fn mean_of(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Mean of [`average_precision`] over the classes that something belongs to; `None` where nothing belongs to any.
pub fn mean_average_precision(rows: &[Vec<f32>], classes: usize, positive: impl Fn(usize, usize) -> bool + Sync) -> Option<f64> {
    let one = |class: usize| {
        let scores: Vec<f32> = rows.iter().map(|row| row[class]).collect();
        let truth: Vec<bool> = (0..rows.len()).map(|i| positive(i, class)).collect();
        average_precision(&scores, &truth)
    };
    mean_of(&(0..classes).into_par_iter().filter_map(one).collect::<Vec<f64>>())
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
    precision_of(&ranked(scores, positive))
}

fn precision_of(steps: &[(f32, usize, usize)]) -> Option<f64> {
    let positives = steps.last().filter(|s| s.1 > 0)?.1 as f64;
    let mut before = 0;
    let mut sum = 0.0;
    for &(_, tp, fp) in steps {
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
        retrieval("t_", &scores, |q, c| Some(q == c), &mut out);
        assert_eq!((out["t_recall_at_1"], out["t_recall_at_5"], out["t_median_rank"]), (0.5, 1.0, 2.0));
    }

    /// torchmetrics 1.9: `retrieval_average_precision` and `retrieval_reciprocal_rank` of each query, their mean, `np.median`;
    /// the third query has no positive. One candidate of the first query is left out.
    #[test]
    fn retrieval_is_torchmetrics() {
        let scores = vec![
            vec![0.9, 0.8, 0.7, 0.6, 0.5, 0.95],
            vec![0.1, 0.4, 0.2, 0.9, 0.3, 0.0],
            vec![0.5, 0.4, 0.3, 0.2, 0.1, 0.0],
            vec![0.3, 0.2, 0.6, 0.1, 0.5, 0.4],
        ];
        let positive = [[1, 0, 1, 0, 0, 2], [0, 1, 1, 0, 0, 1], [0; 6], [1, 0, 0, 1, 0, 0]];
        let relation = |q: usize, c: usize| (positive[q][c] != 2).then_some(positive[q][c] == 1);
        let mut out = BTreeMap::new();
        retrieval("", &scores, relation, &mut out);
        let near = |name: &str, b: f64| assert!((out[name] - b).abs() < 1e-9, "{name} {} {b}", out[name]);
        near("mean_average_precision", RETRIEVAL[0]);
        near("recall_at_1", RETRIEVAL[1]);
        near("median_rank", RETRIEVAL[2]);
        assert!((map_at_r(&scores, relation).unwrap_or(f64::NAN) - RETRIEVAL[3]).abs() < 1e-9);
        // Where nothing belongs to anything there is nothing to say.
        let (mut none, alone) = (BTreeMap::new(), |_: usize, _: usize| Some(false));
        retrieval("", &scores, alone, &mut none);
        assert!(none.is_empty() && map_at_r(&scores, alone).is_none() && mean_average_precision(&scores, 6, |_, _| false).is_none());
    }

    /// Means over the other three; the last by hand: (1/2 + 1/6 + 0) / 3.
    const RETRIEVAL: [f64; 4] = [0.541_666_666_666_666_6, 1.0 / 3.0, 2.0, 0.222_222_222_222_222_2];

    /// scikit-learn 1.9: `average_precision_score(truth[:, [0, 2]], scores[:, [0, 2]], average="macro")`; nothing is of class 1.
    #[test]
    fn the_mean_is_over_classes_that_occur() {
        let rows = [[0.1f32, 0.9, 0.4], [0.8, 0.1, 0.4], [0.3, 0.3, 0.2], [0.9, 0.2, 0.7]].map(Vec::from);
        let truth = [[true, false, false], [true, false, true], [false, false, true], [true, false, false]];
        let found = mean_average_precision(&rows, 3, |i, c| truth[i][c]).unwrap_or(f64::NAN);
        assert!((found - 2.0 / 3.0).abs() < 1e-9, "{found}");
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

    /// `scripts/goldens/matching.py`: scores at CLIP's logit scale, whose probabilities in f32 are 1 and would tie.
    #[test]
    fn scores_whose_probabilities_are_equal_rank_as_scikit_learns() {
        let golden: serde_json::Value = serde_json::from_str(include_str!("../../tests/data/matching.json")).unwrap_or_default();
        let cases = golden.as_array().map_or(&[][..], Vec::as_slice);
        assert_eq!(cases.len(), 4);
        for case in cases {
            let list = |key: &str| case[key].as_array().cloned().unwrap_or_default();
            let logits: Vec<f32> = list("logits").iter().filter_map(|z| Some(z.as_f64()? as f32)).collect();
            let fits: Vec<bool> = list("fits").iter().filter_map(serde_json::Value::as_bool).collect();
            let number = |key: &str| case[key].as_f64().unwrap_or(f64::NAN);
            let near = |a: Option<f64>, b: f64| assert!((a.unwrap_or(f64::NAN) - b).abs() < 1e-12, "{a:?} {b}");
            near(roc_auc(&logits, &fits), number("roc_auc"));
            near(average_precision(&logits, &fits), number("average_precision"));
            let threshold = best_threshold(&logits, &fits).unwrap_or(f64::NAN);
            let chosen: Vec<bool> = logits.iter().map(|z| f64::from(*z) >= threshold).collect();
            let theirs: Vec<bool> = logits.iter().map(|z| f64::from(*z) >= f64::from(number("threshold") as f32)).collect();
            assert_eq!(chosen, theirs, "{threshold} {}", number("threshold"));
            let right = chosen.iter().zip(&fits).filter(|(a, b)| a == b).count();
            near(Some(right as f64 / fits.len() as f64), number("accuracy"));
        }
    }

    #[test]
    fn the_largest_come_first() {
        let rows = vec![vec![0.8f32, 0.2], vec![0.8, 0.2]];
        assert!((top_k(&rows, &[0, 1], 1) - 0.5).abs() < 1e-12);
        assert_eq!(argmax(&rows), [0, 0]);
    }
}
