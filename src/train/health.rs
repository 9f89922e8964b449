//! What becomes of a step whose numbers are not finite, of gradients too large for half precision, and of a loss that runs away.

use serde::{Deserialize, Serialize};

use super::config::Dtype;
use crate::report::Numbers;

/// Steps in a row that `on_nonfinite: skip` leaves out before the run counts as lost.
pub(super) const MOST_IN_A_ROW: usize = 10;

/// What to do at a step whose loss or gradients are not finite.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnNonFinite {
    /// End the run with an error.
    #[default]
    Stop,
    /// Leave the step out: weights, optimiser and averages stay as they are, the schedule goes on.
    Skip,
}

/// What a step's numbers are good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// An update.
    Sound,
    /// Nothing, but only because the loss was scaled too much.
    Overflow,
    /// Nothing.
    NonFinite,
}

/// Gradients of half floats underflow; those of a loss that is multiplied beforehand do not (Micikevicius et al. 2018,
/// arXiv 1710.03740, section 3.2). The factor is the largest power of two that works, found as torch's `GradScaler` finds it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    /// The factor.
    pub factor: f64,
    /// Steps without overflow since it was last changed.
    pub sound: usize,
}

impl LossScale {
    /// Steps without overflow after which the factor is doubled.
    const INTERVAL: usize = 2000;

    fn new() -> Self {
        Self { factor: 65536.0, sound: 0 }
    }

    fn grow(&mut self) {
        self.sound += 1;
        if self.sound == Self::INTERVAL {
            (self.factor, self.sound) = (self.factor * 2.0, 0);
        }
    }

    /// Whether a smaller factor is left to try. Below 1 it is no longer the scaling that overflows.
    fn back_off(&mut self) -> bool {
        if self.factor <= 1.0 {
            return false;
        }
        (self.factor, self.sound) = (self.factor / 2.0, 0);
        true
    }
}

/// How a run's numbers behave: part of the checkpoint, so that a resumed run judges as the whole one would.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Health {
    /// What the report says.
    pub numbers: Numbers,
    /// Steps left out since the last sound one.
    pub in_a_row: usize,
    /// Where gradients are of half floats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<LossScale>,
    /// The losses of sound steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<Followed>,
}

/// A loss over time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Followed {
    /// What it began with.
    pub first: f64,
    /// Which of the last twenty were far beyond that, a bit each, the last one the lowest.
    pub beyond: u32,
}

impl Health {
    /// Before the first step of a model that computes in `dtype`.
    #[must_use]
    pub fn new(dtype: Dtype) -> Self {
        Self { scale: (dtype == Dtype::F16).then(LossScale::new), ..Self::default() }
    }

    /// What the loss is multiplied by before the backward pass.
    #[must_use]
    pub fn factor(&self) -> f64 {
        self.scale.map_or(1.0, |s| s.factor)
    }

    /// Judges a step by its loss and its gradients' norm, and counts it.
    pub(super) fn judge(&mut self, loss: f64, norm: f64) -> Verdict {
        if loss.is_finite() && norm.is_finite() {
            self.in_a_row = 0;
            self.scale.iter_mut().for_each(LossScale::grow);
            self.numbers.loss_scale = self.scale.map(|s| s.factor);
            return Verdict::Sound;
        }
        if loss.is_finite() && self.scale.as_mut().is_some_and(LossScale::back_off) {
            self.numbers.overflowed_steps += 1;
            self.numbers.loss_scale = self.scale.map(|s| s.factor);
            return Verdict::Overflow;
        }
        self.in_a_row += 1;
        self.numbers.skipped_steps += 1;
        Verdict::NonFinite
    }

    /// Follows the loss of sound steps. It has diverged where half of the last twenty are beyond twice what it began with,
    /// and one more: single spikes and fluctuations of a small loss are no divergence. Says so once.
    pub(super) fn follow(&mut self, step: usize, loss: f64) -> Option<String> {
        const LAST: u32 = 20;
        let followed = self.loss.get_or_insert(Followed { first: loss, beyond: 0 });
        let limit = 2.0 * followed.first.abs() + 1.0;
        followed.beyond = (followed.beyond << 1 | u32::from(loss > limit)) & ((1 << LAST) - 1);
        if self.numbers.diverged_at.is_some() || followed.beyond.count_ones() < LAST / 2 {
            return None;
        }
        self.numbers.diverged_at = Some(step);
        let first = followed.first;
        Some(format!(
            "the loss has diverged: {first:.4} at first, {loss:.4} at step {step} and beyond {limit:.4} in half of the last {LAST}; \
             lower train.lr, lengthen the warm-up or set train.clip_norm. The best epoch is what will be kept"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loss_scale_moves_as_grad_scaler_does() {
        let mut health = Health::new(Dtype::F16);
        assert_eq!((health.factor(), Health::new(Dtype::Bf16).factor()), (65536.0, 1.0));
        assert_eq!(health.judge(1.0, f64::INFINITY), Verdict::Overflow);
        assert_eq!(health.factor(), 32768.0);
        assert!((0..1999).all(|_| health.judge(1.0, 1.0) == Verdict::Sound));
        assert_eq!(health.factor(), 32768.0);
        health.judge(1.0, 1.0);
        assert_eq!(health.factor(), 65536.0);
        // An overflow starts the count anew; a loss that is not finite is nobody's scaling.
        assert_eq!(health.judge(f64::NAN, 1.0), Verdict::NonFinite);
        assert_eq!((health.factor(), health.numbers.overflowed_steps, health.numbers.skipped_steps), (65536.0, 1, 1));
        let tries = (0..100).take_while(|_| health.judge(1.0, f64::NAN) == Verdict::Overflow).count();
        assert_eq!((tries, health.factor()), (16, 1.0));
    }

    #[test]
    fn a_loss_that_runs_away_is_told_from_one_that_fluctuates() {
        let told = |losses: &mut dyn Iterator<Item = f64>| {
            let mut health = Health::default();
            let said = losses.enumerate().filter_map(|(i, l)| health.follow(i + 1, l)).count();
            (said, health.numbers.diverged_at)
        };
        assert_eq!(told(&mut (0..200).map(|i| 1.1 + f64::from(i % 7) / 2.0)), (0, None));
        assert_eq!(told(&mut (0..200).map(|i| 0.01 + f64::from(i % 2))), (0, None), "small and restless");
        assert_eq!(told(&mut (0..50).map(|i| if i % 20 == 10 { 1e6 } else { 1.0 })), (0, None), "spikes");
        let (said, at) = told(&mut (0..200).map(|i| 1.1 + f64::from(i)));
        assert!(said == 1 && at.is_some_and(|at| at < 15), "{at:?}");
    }
}
