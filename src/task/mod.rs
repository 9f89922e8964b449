//! What is learnt: a loss, metrics and a way to predict, one file each.
//!
//! A task is one file and one line in [`TaskConfig`].

use candle_core::Tensor;
use peft_adapters::{Labelled, Params, Patches, Tape};
use serde::{Deserialize, Serialize};

use crate::clip::Clip;
use crate::clip::tokenizer::Tokenizer;
use crate::data::Example;
use crate::error::Result;
use crate::report::Evaluation;

mod classify;
pub mod metrics;
pub mod prompts;
mod retrieve;

pub(crate) use classify::HEAD;
pub use classify::{ClassifyConfig, Head, HeadInit};
pub use prompts::Pad;
pub use retrieve::RetrieveConfig;

/// Which task: `classify`, or `classify: { templates: […] }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskConfig {
    /// One of the classes for each image.
    Classify(ClassifyConfig),
    /// The text that belongs to an image and the other way round.
    Retrieve(RetrieveConfig),
}

/// What a task is built from.
#[derive(Debug)]
pub struct TaskParts<'a> {
    /// The base.
    pub clip: &'a Clip,
    /// Its tokeniser.
    pub tokenizer: &'a Tokenizer,
    /// Class names in label order.
    pub classes: &'a [String],
    /// Spreads the target over all classes: 0 is off.
    pub label_smoothing: f64,
    /// The run's seed.
    pub seed: u64,
}

impl TaskConfig {
    /// The recipe key.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Classify(_) => "classify",
            Self::Retrieve(_) => "retrieve",
        }
    }

    /// What can be checked without data.
    ///
    /// # Errors
    /// When an option is out of range.
    pub fn validate(&self, place: &str) -> Result<()> {
        match self {
            Self::Classify(c) => c.validate(place),
            Self::Retrieve(_) => Ok(()),
        }
    }

    /// Whether the task trains weights of its own, so that `method: none` makes sense.
    #[must_use]
    pub fn has_own_weights(&self) -> bool {
        matches!(self, Self::Classify(c) if c.head == Head::Linear)
    }

    /// The number that early stopping follows unless told otherwise.
    #[must_use]
    pub fn metric(&self) -> &'static str {
        match self {
            Self::Classify(_) => "accuracy",
            Self::Retrieve(_) => "recall_mean",
        }
    }

    /// The numbers that an evaluation gives, `loss` apart.
    #[must_use]
    pub fn metrics(&self) -> &'static [&'static str] {
        match self {
            Self::Classify(_) => &classify::METRICS,
            Self::Retrieve(_) => &retrieve::METRICS,
        }
    }

    /// Builds the task and declares its own weights.
    ///
    /// # Errors
    /// When it does not fit the data or the model.
    pub fn build(&self, parts: &TaskParts<'_>, params: &mut Params) -> Result<Box<dyn Task>> {
        Ok(match self {
            Self::Classify(c) => Box::new(classify::Classify::new(c, parts, params)?),
            Self::Retrieve(c) => Box::new(retrieve::Retrieve::new(c, parts)),
        })
    }
}

/// The model as a task sees it during one forward pass.
#[derive(Debug, Clone, Copy)]
pub struct Forward<'a, 't> {
    /// The base.
    pub clip: &'a Clip,
    /// What changes it.
    pub patches: &'a Patches,
    /// Whether gradients are wanted.
    pub training: bool,
    /// The epoch, which varies the texts that are drawn.
    pub epoch: usize,
    /// Where what is computed twice to save memory is noted.
    pub tape: Option<&'t Tape<'a>>,
}

impl<'a> Forward<'a, '_> {
    /// A pass without gradients.
    #[must_use]
    pub fn eval(clip: &'a Clip, patches: &'a Patches) -> Self {
        Self { clip, patches, training: false, epoch: 0, tape: None }
    }
}

/// A loss and its metrics.
pub trait Task {
    /// Checks that examples have what the task needs.
    ///
    /// # Errors
    /// When one has no label or no text.
    fn check(&self, examples: &[Example]) -> Result<()>;

    /// The loss of a batch, a scalar.
    ///
    /// # Shapes
    /// `features` [B, P], unnormalised; `examples` B of them.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn loss(&mut self, on: &Forward<'_, '_>, features: &Tensor, examples: &[&Example]) -> Result<Tensor>;

    /// Metrics over a whole split.
    ///
    /// # Shapes
    /// `features` [N, P], unnormalised; `examples` N of them.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn evaluate(&mut self, on: &Forward<'_, '_>, features: &Tensor, examples: &[Example]) -> Result<Evaluation>;

    /// A split as methods see it that look at data; nothing where the task does not compare images with class prompts.
    ///
    /// # Shapes
    /// `features` [N, P], unnormalised; `examples` N of them.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn labelled(&mut self, _on: &Forward<'_, '_>, _features: &Tensor, _examples: &[Example]) -> Result<Option<Labelled>> {
        Ok(None)
    }

    /// Whether batches should all have the same size.
    fn drop_last(&self) -> bool {
        false
    }

    /// What is worth a warning: texts that were cut.
    fn warnings(&self) -> Vec<String> {
        Vec::new()
    }
}
