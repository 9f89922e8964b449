//! Thresholds of yes and no. They are logits: in f32 every probability above a logit of 17 is 1, so that ranks would tie and a
//! threshold between two of them could not be expressed.

use std::collections::BTreeMap;

/// Key in `peft.json` of a threshold that is a logit before the temperature. A threshold of a single label follows `/` and the label.
pub(crate) const KEY: &str = "logit_threshold";

/// The key of adapters up to 0.1, whose thresholds were probabilities after the temperature.
const PROBABILITY: &str = "threshold";

/// Above this logit the probabilities of those adapters were 1: 1 + exp(−z) rounds to 1 in f32 from 24 ln 2 on.
const CERTAIN: f64 = 24.0 * std::f64::consts::LN_2;

/// σ(z) as f32; computed in f64, so that small probabilities keep their digits.
pub(super) fn sigmoid(logit: f32) -> f32 {
    (1.0 / (1.0 + (-f64::from(logit)).exp())) as f32
}

/// The threshold of all labels, as a logit before `temperature`.
pub(super) fn stored(scalars: &BTreeMap<String, f64>, temperature: f64) -> Option<f64> {
    of(scalars, "", temperature)
}

/// The threshold of one label, or else that of all.
pub(super) fn stored_for(scalars: &BTreeMap<String, f64>, label: &str, temperature: f64) -> Option<f64> {
    of(scalars, &format!("/{label}"), temperature).or_else(|| stored(scalars, temperature))
}

/// The key of a label's own threshold.
pub(super) fn key(label: &str) -> String {
    format!("{KEY}/{label}")
}

fn of(scalars: &BTreeMap<String, f64>, suffix: &str, temperature: f64) -> Option<f64> {
    let get = |key: &str| scalars.get(&format!("{key}{suffix}")).copied();
    get(KEY).or_else(|| get(PROBABILITY).map(|p| logit(p) * temperature))
}

/// The logit at which a probability in f32 reached `p`; every one does where `p` is 0, none where it is more than 1.
fn logit(p: f64) -> f64 {
    match p {
        p if p > 1.0 => f64::INFINITY,
        p if p <= 0.0 => f64::NEG_INFINITY,
        p => (p / (1.0 - p)).ln().min(CERTAIN),
    }
    .clamp(-LARGEST, LARGEST)
}

/// Beyond every logit in f32, and still a number that JSON can hold after a temperature of 20.
const LARGEST: f64 = 1e300;

#[cfg(test)]
mod tests {
    use super::*;

    /// `scipy.special.logit` of probabilities that older adapters hold.
    #[test]
    fn probabilities_of_older_adapters_become_logits() {
        for (p, expected) in [(0.5, 0.0), (0.9, 2.197_224_577_336_219_6), (0.01, -4.595_119_850_134_59)] {
            let old = BTreeMap::from([("threshold".to_string(), p)]);
            assert!((stored(&old, 1.0).unwrap_or(f64::NAN) - expected).abs() < 1e-12);
            assert!((stored_for(&old, "cat", 2.0).unwrap_or(f64::NAN) - 2.0 * expected).abs() < 1e-12);
        }
    }

    /// In f32 a pair far above was "1", and reached a threshold of 1; each reached 0, none 2.
    #[test]
    fn the_ends_of_probability_keep_their_meaning() {
        let at = |p: f64| stored(&BTreeMap::from([("threshold".to_string(), p)]), 20.0).unwrap_or(f64::NAN);
        assert!((at(1.0) / 20.0 - 16.6).abs() < 0.1);
        assert!(f64::from(f32::MIN) >= at(0.0) && f64::from(f32::MAX) < at(2.0));
        assert!(at(0.0).is_finite() && at(2.0).is_finite());
    }

    #[test]
    fn a_labels_own_threshold_comes_first() {
        let all = BTreeMap::from([(KEY.to_string(), 1.0), (key("cat"), -3.0), ("threshold".to_string(), 0.5)]);
        assert_eq!((stored_for(&all, "cat", 9.0), stored_for(&all, "dog", 9.0)), (Some(-3.0), Some(1.0)));
    }
}
