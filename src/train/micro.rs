//! What of a batch goes through the model at once.

use serde::{Deserialize, Serialize};

use super::TrainConfig;

/// Micro-batches of an optimiser step. Splitting keeps their product and the order of examples, so the step stays the mean
/// over the same examples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Micro {
    /// Examples in each.
    pub batch: usize,
    /// How many there are.
    pub accumulate: usize,
}

impl Micro {
    /// As the recipe says.
    #[must_use]
    pub fn of(config: &TrainConfig) -> Self {
        Self { batch: config.batch, accumulate: config.accumulate }
    }

    /// Optimiser steps of an epoch of so many micro-batches; a step never crosses an epoch's end.
    #[must_use]
    pub fn steps(self, per_epoch: usize) -> usize {
        per_epoch.div_ceil(self.accumulate).max(1)
    }

    /// Half the examples at a time; where they are odd in number, the next smaller equal part. Nothing is left to split at one.
    #[must_use]
    pub fn split(self) -> Option<Self> {
        let parts = (2..=self.batch).find(|p| self.batch.is_multiple_of(*p))?;
        Some(Self { batch: self.batch / parts, accumulate: self.accumulate * parts })
    }

    /// The largest micro-batch for which `fits`, or the smallest there is.
    #[must_use]
    pub fn fitting(self, fits: impl Fn(Self) -> bool) -> Self {
        let mut now = self;
        while !fits(now)
            && let Some(smaller) = now.split()
        {
            now = smaller;
        }
        now
    }
}

impl std::fmt::Display for Micro {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "batch {}, accumulate {}", self.batch, self.accumulate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_keeps_its_examples() {
        let sizes = |batch| {
            let mut all = vec![Micro { batch, accumulate: 1 }];
            while let Some(next) = all[all.len() - 1].split() {
                all.push(next);
            }
            assert!(all.iter().all(|m| m.batch * m.accumulate == batch));
            all.iter().map(|m| m.batch).collect::<Vec<_>>()
        };
        assert_eq!(sizes(32), [32, 16, 8, 4, 2, 1]);
        assert_eq!(sizes(30), [30, 15, 5, 1]);
        assert_eq!(sizes(1), [1]);
        let micro = Micro { batch: 32, accumulate: 2 };
        assert_eq!(micro.fitting(|m| m.batch <= 10), Micro { batch: 8, accumulate: 8 });
        assert_eq!(micro.fitting(|_| true), micro);
        assert_eq!(micro.fitting(|_| false), Micro { batch: 1, accumulate: 64 });
    }
}
