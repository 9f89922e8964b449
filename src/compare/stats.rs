//! Paired differences and their intervals.

use std::collections::HashMap;

use peft_adapters::rng;
use rand::Rng as _;

use crate::comparison::{Difference, Row, SeedDifference};
use crate::report::Prediction;

/// Bootstrap samples.
const RESAMPLES: usize = 10_000;

/// Whether each test example was right, by its id; `None` where an example has no right answer.
pub(super) type Hits = HashMap<String, bool>;

/// What was right.
pub(super) fn hits(predictions: &[Prediction]) -> Option<Hits> {
    predictions.iter().map(|p| Some((p.id.clone(), *p.label.as_ref()? == p.prediction))).collect()
}

/// `ours` minus `reference` over the seeds that both have, `None` without one or where test examples differ.
pub(super) fn difference(ours: &[(u64, Hits)], reference: &[(u64, Hits)]) -> Option<Difference> {
    let mut pairs: Vec<(u64, Vec<(&str, f64)>)> = Vec::new();
    for (seed, own) in ours {
        let Some((_, other)) = reference.iter().find(|(s, _)| s == seed) else { continue };
        if own.len() != other.len() {
            return None;
        }
        let mut all = Vec::with_capacity(own.len());
        for (id, hit) in own {
            all.push((id.as_str(), f64::from(u8::from(*hit)) - f64::from(u8::from(*other.get(id)?))));
        }
        // A hash map has no order, and a bootstrap is to give the same numbers each time.
        all.sort_by(|a, b| a.0.cmp(b.0));
        pairs.push((*seed, all));
    }
    let first = &pairs.first()?.1;
    let same = pairs.iter().all(|(_, p)| p.len() == first.len() && p.iter().zip(first).all(|(a, b)| a.0 == b.0));
    if first.is_empty() || !same {
        return None;
    }
    let seeds = pairs.len() as f64;
    let means: Vec<f64> = (0..first.len()).map(|i| pairs.iter().map(|(_, p)| p[i].1).sum::<f64>() / seeds).collect();
    let alone = |(seed, pairs): &(u64, Vec<(&str, f64)>)| {
        let values: Vec<f64> = pairs.iter().map(|p| p.1).collect();
        SeedDifference { seed: *seed, mean: mean(&values), interval: bootstrap(&values) }
    };
    Some(Difference {
        of: "share of examples that are right".into(),
        mean: mean(&means),
        interval: bootstrap(&means),
        resamples: RESAMPLES,
        examples: means.len(),
        seeds: pairs.iter().map(alone).collect(),
    })
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Efron & Tibshirani 1993, ch. 13: percentiles 2.5 and 97.5 of the mean over resampled values.
fn bootstrap(values: &[f64]) -> [f64; 2] {
    let mut rng = rng::rng(0, &[rng::name_key("bootstrap")]);
    let n = values.len();
    let mut means: Vec<f64> = (0..RESAMPLES).map(|_| (0..n).map(|_| values[rng.random_range(0..n)]).sum::<f64>() / n as f64).collect();
    means.sort_by(f64::total_cmp);
    // Linear interpolation between order statistics, as NumPy's `quantile`.
    let at = |q: f64| {
        let place = q * (RESAMPLES - 1) as f64;
        let (low, share) = (place.floor() as usize, place.fract());
        means[low] + share * (means[(low + 1).min(RESAMPLES - 1)] - means[low])
    };
    [at(0.025), at(0.975)]
}

/// Marks the rows that no other beats with as few parameters.
pub(super) fn mark_pareto(rows: &mut [Row]) {
    let points: Vec<Option<(usize, f64)>> = rows.iter().map(|r| Some((r.trainable_parameters?, r.test.as_ref()?.mean))).collect();
    for (row, own) in rows.iter_mut().zip(&points) {
        let beaten = |(n, v): (usize, f64)| points.iter().flatten().any(|&(m, w)| m <= n && w >= v && (m < n || w > v));
        row.pareto = own.is_some_and(|p| !beaten(p));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::comparison::Spread;

    fn hits_of(right: &[usize]) -> Hits {
        (0..100).map(|i| (format!("{i:03}"), right.contains(&i))).collect()
    }

    #[test]
    fn differences_are_paired_by_example_and_seed() {
        let (few, many): (Vec<usize>, Vec<usize>) = ((0..40).collect(), (0..60).collect());
        let found =
            difference(&[(0, hits_of(&many)), (1, hits_of(&many)), (7, hits_of(&few))], &[(1, hits_of(&few)), (0, hits_of(&few))]).unwrap();
        assert_eq!((found.seeds.len(), found.examples), (2, 100), "seed 7 has no counterpart");
        assert!((found.mean - 0.2).abs() < 1e-12);
        // 20 of 100 differ: sd of the mean is √(0.2·0.8/100) = 0.04.
        assert!((found.interval[0] - 0.12).abs() < 0.015 && (found.interval[1] - 0.28).abs() < 0.015, "{:?}", found.interval);
        assert_eq!(found, difference(&[(0, hits_of(&many)), (1, hits_of(&many))], &[(0, hits_of(&few)), (1, hits_of(&few))]).unwrap());
        assert!(difference(&[(0, hits_of(&many))], &[(0, HashMap::from([("x".into(), true)]))]).is_none());
    }

    #[test]
    fn the_front_is_what_nothing_beats() {
        let row = |n, v| Row { trainable_parameters: Some(n), test: Spread::new(vec![v]), ..Row::default() };
        let mut rows = vec![row(10, 0.5), row(20, 0.4), row(30, 0.6), row(30, 0.6), Row::default(), row(40, 0.6)];
        mark_pareto(&mut rows);
        assert_eq!(rows.iter().map(|r| r.pareto).collect::<Vec<_>>(), [true, false, true, true, false, false]);
    }
}
