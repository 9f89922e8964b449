//! How a run is watched and stopped. The library itself prints nothing.

use crate::error::Result;
use crate::report::{EpochRecord, Evaluation, number};

/// What happens during a run.
#[derive(Debug)]
pub enum Event<'a> {
    /// Something worth knowing.
    Note(String),
    /// Something that may be a mistake.
    Warning(String),
    /// A part of the work begins; `None` when its length is not known.
    Phase(&'a str, Option<usize>),
    /// The part went on by so many.
    Advance(usize),
    /// Training begins.
    Started {
        /// Steps in all.
        steps: usize,
        /// Steps that an earlier session did.
        done: usize,
        /// Numbers that are trained.
        trainable: usize,
        /// Numbers in all.
        total: usize,
    },
    /// A split was evaluated before training.
    Before(&'a Evaluation),
    /// An optimiser step is done.
    Step(&'a StepRecord),
    /// An epoch is done.
    Epoch(&'a EpochRecord),
}

/// One line of `metrics.jsonl`.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct StepRecord {
    /// From 1.
    pub step: usize,
    /// From 1.
    pub epoch: usize,
    /// Mean over the step's examples; NaN, as JSON null, where it is not finite.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Global gradient norm before clipping; as `loss`.
    #[serde(deserialize_with = "number")]
    pub grad_norm: f64,
    /// Whether nothing was updated, since a number was not finite.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
    /// Images of the step.
    #[serde(skip)]
    pub images: usize,
}

/// Watches a run.
pub trait Observer {
    /// Is told of everything.
    fn event(&mut self, event: Event<'_>);

    /// What the watcher failed at, such as a full disk; it ends the run.
    ///
    /// # Errors
    /// That failure.
    fn failed(&mut self) -> Result<()> {
        Ok(())
    }

    /// The state is about to be saved: what was told so far has to be safe, too.
    ///
    /// # Errors
    /// When it cannot be made safe.
    fn saving(&mut self) -> Result<()> {
        Ok(())
    }

    /// The number of a signal that asks to stop after the current step.
    fn stop(&self) -> Option<i32> {
        None
    }
}

/// Watches nothing.
#[derive(Debug, Default)]
pub struct Silent;

impl Observer for Silent {
    fn event(&mut self, _event: Event<'_>) {}
}
