//! How far probabilities are from frequencies, and the temperature that brings them closer.

use rayon::prelude::*;

use super::argmax;

const BINS: usize = 15;

/// Expected calibration error over 15 equal bins of confidence (Guo et al. 2017).
#[must_use]
pub fn calibration_error(rows: &[Vec<f32>], labels: &[u32]) -> f64 {
    let guesses = rows.iter().zip(labels).zip(argmax(rows));
    gap(guesses.map(|((row, &label), guess)| (row[guess as usize], guess == label)))
}

/// The same for yes and no: probabilities of yes against how often it is yes, every example and label one case.
#[must_use]
pub fn binary_calibration_error(probabilities: &[f32], positive: &[bool]) -> f64 {
    gap(probabilities.iter().copied().zip(positive.iter().copied()))
}

/// Σ over bins of |Σ probability − hits|, over all cases.
fn gap(cases: impl Iterator<Item = (f32, bool)>) -> f64 {
    let mut bins = [(0f64, 0f64); BINS];
    let mut count = 0usize;
    for (probability, hit) in cases {
        let confidence = f64::from(probability);
        // Bins are open below and closed above.
        let bin = ((confidence * BINS as f64).ceil() as usize).clamp(1, BINS) - 1;
        bins[bin].0 += confidence;
        bins[bin].1 += f64::from(u8::from(hit));
        count += 1;
    }
    bins.iter().map(|(confidence, hits)| (confidence - hits).abs()).sum::<f64>() / count.max(1) as f64
}

/// Temperatures are sought from its inverse to this.
const HOTTEST: f64 = 20.0;

/// Halvings of the interval; its logarithm is 6 wide at first.
const HALVINGS: usize = 30;

/// The temperature T that minimises the negative log-likelihood of softmax(z/T) (Guo et al. 2017, section 4.2), between 1/20 and
/// 20. It is convex in 1/T, so its slope changes sign once and is found by bisection. 1 where there are no examples, and where it
/// falls all the way to 1/20: examples that are all right would ask for 0, and say nothing of how sure to be.
///
/// # Shapes
/// `logits` [N, C], `labels` N of them
#[must_use]
pub fn temperature(logits: &[Vec<f32>], labels: &[u32]) -> f64 {
    let slope = |beta: f64, (row, &label): (&Vec<f32>, &u32)| {
        let most = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let (mut sum, mut weighted) = (0.0, 0.0);
        for &z in row {
            let p = (beta * (f64::from(z) - most)).exp();
            sum += p;
            weighted += p * f64::from(z);
        }
        weighted / sum - f64::from(row[label as usize])
    };
    // Collected before it is added up, so that threads do not change the sum.
    let total = |beta| logits.par_iter().zip(labels).map(|pair| slope(beta, pair)).collect::<Vec<f64>>().iter().sum();
    coldest(logits.len(), total)
}

/// [`temperature`] of independent yes and no: σ(z/T), every example and label one case.
#[must_use]
pub fn binary_temperature(logits: &[f32], positive: &[bool]) -> f64 {
    let slope = |beta: f64, (z, &hit): (&f32, &bool)| {
        let z = f64::from(*z);
        (1.0 / (1.0 + (-beta * z).exp()) - f64::from(u8::from(hit))) * z
    };
    let total = |beta| logits.par_iter().zip(positive).map(|pair| slope(beta, pair)).collect::<Vec<f64>>().iter().sum();
    coldest(logits.len(), total)
}

/// 1/β where the slope, which grows with β, is 0.
fn coldest(count: usize, slope: impl Fn(f64) -> f64) -> f64 {
    let (mut low, mut high) = (-HOTTEST.ln(), HOTTEST.ln());
    if count == 0 || slope(HOTTEST) < 0.0 {
        return 1.0;
    }
    for _ in 0..HALVINGS {
        let middle = f64::midpoint(low, high);
        match slope(middle.exp()) < 0.0 {
            true => low = middle,
            false => high = middle,
        }
    }
    (-f64::midpoint(low, high)).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calibration_is_the_gap_between_confidence_and_hits() {
        let rows = vec![vec![0.8f32, 0.2], vec![0.8, 0.2]];
        assert!((calibration_error(&rows, &[0, 1]) - 0.3).abs() < 1e-6);
    }

    const LOGITS: [[f32; 3]; 6] = [[4.0, 1.0, 0.5], [0.2, 3.0, -1.0], [2.0, 2.5, 0.0], [-1.0, 0.3, 3.5], [3.0, 0.0, 2.0], [0.1, 0.2, 0.3]];
    const LABELS: [u32; 6] = [0, 1, 0, 2, 2, 1];
    const YES: [bool; 6] = [true, false, true, true, false, false];

    /// scipy 1.17: `minimize_scalar` of scikit-learn 1.9's `log_loss(y, softmax(z/T))` and `log_loss(y, expit(z/T))`.
    #[test]
    fn temperatures_are_scipys() {
        let rows = LOGITS.map(Vec::from);
        let found = [temperature(&rows, &LABELS), binary_temperature(&LOGITS.map(|r| r[0]), &YES)];
        for (ours, theirs) in found.into_iter().zip(TEMPERATURES) {
            assert!((ours / theirs - 1.0).abs() < 1e-5, "{ours} {theirs}");
        }
    }

    const TEMPERATURES: [f64; 2] = [1.075_479_2, 8.726_321_3];

    /// torchmetrics 1.9: `multiclass_calibration_error(softmax(z), y, 3, n_bins=15)`, `binary_calibration_error(σ(z₀), y)`.
    #[test]
    fn errors_are_torchmetrics() {
        let softmax = |row: &[f32; 3]| {
            let sum: f32 = row.iter().map(|z| z.exp()).sum();
            row.iter().map(|z| z.exp() / sum).collect::<Vec<f32>>()
        };
        let rows: Vec<Vec<f32>> = LOGITS.iter().map(softmax).collect();
        let yes: Vec<f32> = LOGITS.iter().map(|r| 1.0 / (1.0 + (-r[0]).exp())).collect();
        let found = [calibration_error(&rows, &LABELS), binary_calibration_error(&yes, &YES)];
        for (ours, theirs) in found.into_iter().zip(ERRORS) {
            assert!((ours - theirs).abs() < 1e-6, "{ours} {theirs}");
        }
    }

    const ERRORS: [f64; 2] = [0.3102415, 0.4766105];

    /// Where every answer is right, colder is always better; where every one is wrong, hotter, up to the bound.
    #[test]
    fn certainty_is_not_fitted() {
        let rows = vec![vec![1.0f32, 0.0], vec![0.0, 1.0]];
        assert_eq!(temperature(&rows, &[0, 1]).to_bits(), 1f64.to_bits());
        assert!((temperature(&rows, &[1, 0]) / HOTTEST - 1.0).abs() < 1e-6);
        assert_eq!(temperature(&[], &[]).to_bits(), 1f64.to_bits());
    }
}
