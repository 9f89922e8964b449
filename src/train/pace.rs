//! When the state of a run is saved: so rarely that it takes at most a hundredth of the time.

use std::time::{Duration, Instant};

/// A checkpoint comes no earlier than so many times its own duration after the last one.
const SHARE: u32 = 100;

/// Within an epoch, not only at its end, after this time.
const WITHIN: Duration = Duration::from_secs(60);

/// What is known of checkpoints so far.
#[derive(Debug)]
pub(super) struct Pace {
    last: Instant,
    took: Duration,
}

impl Pace {
    /// Before the first one of a session: what it takes is not known yet.
    pub(super) fn new(now: Instant) -> Self {
        Self { last: now, took: Duration::ZERO }
    }

    /// Whether a checkpoint may be written after a step.
    pub(super) fn due(&self, epoch_done: bool, now: Instant) -> bool {
        let wait = self.took * SHARE;
        let wait = if epoch_done { wait } else { wait.max(WITHIN) };
        now.saturating_duration_since(self.last) >= wait
    }

    /// One was written.
    pub(super) fn wrote(&mut self, from: Instant, to: Instant) {
        (self.last, self.took) = (to, to.saturating_duration_since(from));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seconds in all, seconds of checkpoints, and how many there were, for steps and checkpoints of given lengths.
    fn run(steps: usize, per_epoch: usize, step: f64, write: f64) -> (f64, f64, usize) {
        let start = Instant::now();
        let (mut now, mut count) = (start, 0);
        let mut pace = Pace::new(now);
        for i in 1..=steps {
            now += Duration::from_secs_f64(step);
            if pace.due(i % per_epoch == 0, now) {
                let from = now;
                now += Duration::from_secs_f64(write);
                pace.wrote(from, now);
                count += 1;
            }
        }
        ((now - start).as_secs_f64(), count as f64 * write, count)
    }

    #[test]
    fn checkpoints_take_a_hundredth_of_the_time_at_most() {
        for (step, write) in [(0.01, 0.005), (0.1, 0.5), (1.0, 1.0), (0.5, 30.0), (10.0, 0.01)] {
            for per_epoch in [1, 7, 1000, 1_000_000] {
                let (all, writing, count) = run(200_000, per_epoch, step, write);
                // The first is not known before it is written.
                assert!(writing - write <= 0.01 * all, "{step} {write} {per_epoch}: {writing} of {all}");
                assert!(count > 0, "{step} {write} {per_epoch}");
            }
        }
    }

    #[test]
    fn cheap_ones_come_at_each_epochs_end_and_each_minute() {
        assert_eq!(run(100, 10, 1.0, 0.01).2, 10);
        assert_eq!(run(630, 1_000_000, 1.0, 0.01).2, 10);
    }
}
