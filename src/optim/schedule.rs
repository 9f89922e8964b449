//! Learning rates over time.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How the learning rate moves: `constant`, `linear`, `cosine`, each with options.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleConfig {
    /// The learning rate itself, after the warm-up.
    Constant(Warmup),
    /// Down to the floor in a straight line.
    Linear(Linear),
    /// Down to the floor along half a cosine.
    Cosine(Cosine),
}

/// Options of `constant`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Warmup {
    /// Fraction of all steps over which the rate rises from 0.
    pub warmup: f64,
}

/// Options of `linear`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Linear {
    /// Fraction of all steps over which the rate rises from 0.
    pub warmup: f64,
    /// The rate at the end.
    pub floor: f64,
}

/// Options of `cosine`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cosine {
    /// Fraction of all steps over which the rate rises from 0.
    pub warmup: f64,
    /// The rate at the end.
    pub floor: f64,
}

impl Default for Cosine {
    fn default() -> Self {
        Self { warmup: 0.05, floor: 0.0 }
    }
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self::Cosine(Cosine::default())
    }
}

impl ScheduleConfig {
    fn warmup_and_floor(&self) -> (f64, Option<f64>) {
        match self {
            Self::Constant(c) => (c.warmup, None),
            Self::Linear(c) => (c.warmup, Some(c.floor)),
            Self::Cosine(c) => (c.warmup, Some(c.floor)),
        }
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// When a value is out of range.
    pub fn validate(&self, place: &str, lr: f64) -> Result<()> {
        let (warmup, floor) = self.warmup_and_floor();
        if !(0.0..=1.0).contains(&warmup) {
            return Err(Error::input(
                format!("{place}: train.schedule"),
                format!("warmup: expected a fraction from 0 to 1, found {warmup}"),
            ));
        }
        match floor {
            Some(f) if !(0.0..=lr).contains(&f) => {
                Err(Error::input(format!("{place}: train.schedule"), format!("floor: expected 0 to lr ({lr}), found {f}")))
            }
            _ => Ok(()),
        }
    }

    /// The learning rate at `step` (from 0) of `total`.
    #[must_use]
    pub fn lr(&self, peak: f64, step: usize, total: usize) -> f64 {
        let (warmup, floor) = self.warmup_and_floor();
        let rising = (warmup * total as f64).round();
        let at = step as f64;
        if at < rising {
            return peak * (at + 1.0) / rising;
        }
        let Some(floor) = floor else { return peak };
        let progress = ((at - rising) / (total as f64 - rising).max(1.0)).min(1.0);
        let share = match self {
            Self::Cosine(_) => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            _ => 1.0 - progress,
        };
        floor + (peak - floor) * share
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_then_falls_to_the_floor() {
        let s = ScheduleConfig::Cosine(Cosine { warmup: 0.1, floor: 0.01 });
        let rates: Vec<f64> = (0..100).map(|i| s.lr(1.0, i, 100)).collect();
        assert!((rates[0] - 0.1).abs() < 1e-12);
        assert!((rates[10] - 1.0).abs() < 1e-12);
        assert!(rates[11..].windows(2).all(|w| w[1] < w[0]));
        assert!(rates[99] < 0.011 && s.lr(1.0, 100, 100) == 0.01);
    }

    #[test]
    fn a_single_step_trains_at_the_full_rate() {
        for s in [ScheduleConfig::default(), ScheduleConfig::Linear(Linear::default()), ScheduleConfig::Constant(Warmup::default())] {
            assert!(s.lr(0.5, 0, 1) > 0.49);
        }
    }
}
