//! What is learnt: a loss, metrics and a way to predict, one file each.
//!
//! A task is one file with a [`Definition`] and one line in [`TaskConfig`].

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use candle_core::Tensor;
use peft_adapters::{Labelled, Params, Patches, Tape};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::clip::tokenizer::Tokenizer;
use crate::clip::{Clip, ConstantText, Encoded};
use crate::data::{Dataset, Example, Field, Reads, Split};
use crate::error::Result;
use crate::fusion::{FusionConfig, Pass};
use crate::report::Evaluation;

mod answer;
mod classify;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod goldens;
mod joint;
mod matching;
pub mod metrics;
pub mod prompts;
mod regress;
mod retrieve;
mod texts;
mod threshold;
mod vqa;

pub use answer::{AnswerConfig, AnswerLoss, Choose};
pub use classify::{AsymmetricConfig, ClassWeights, ClassifyConfig, Head, HeadInit, Labels, Loss, Thresholds};
pub(crate) use joint::HEAD;
pub use matching::{MatchConfig, Negatives};
pub use prompts::Pad;
pub use regress::{HuberConfig, OrdinalConfig, RegressConfig, RegressLoss};
pub use retrieve::{InfoNceConfig, RetrieveConfig, RetrieveLoss, RetrievePairs, TripletConfig};
pub(crate) use threshold::KEY as LOGIT_THRESHOLD;
pub(crate) use vqa::normalise;

macro_rules! tasks {
    ($($(#[$doc:meta])* $name:ident($config:ty)),* $(,)?) => {
        /// Which task: `classify`, or `classify: { templates: […] }`.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(rename_all = "lowercase")]
        pub enum TaskConfig {
            $($(#[$doc])* $name($config)),*
        }

        impl TaskConfig {
            /// What the task is.
            #[must_use]
            pub fn definition(&self) -> &dyn Definition {
                match self { $(Self::$name(c) => c),* }
            }
        }
    };
}

tasks! {
    /// Classes of an image, a text, or both: one of them, or any number.
    Classify(ClassifyConfig),
    /// The text that belongs to an image and the other way round, or images of one class.
    Retrieve(RetrieveConfig),
    /// Whether a text fits an image.
    Match(MatchConfig),
    /// The answer to a question about an image.
    Answer(AnswerConfig),
    /// A number that belongs to an image, a text, or both.
    Regress(RegressConfig),
}

/// What a recipe's `task` says, before there is a model.
pub trait Definition {
    /// The recipe key.
    fn name(&self) -> &'static str;

    /// What can be checked without data.
    ///
    /// # Errors
    /// When an option is out of range.
    fn validate(&self, place: &str) -> Result<()>;

    /// Whether the task trains weights of its own, so that `method: none` makes sense.
    fn has_own_weights(&self) -> bool;

    /// The number that early stopping follows unless told otherwise.
    fn metric(&self) -> &'static str;

    /// The numbers that an evaluation gives, `loss` apart.
    fn metrics(&self) -> &'static [&'static str];

    /// Prompts around class names, where images are compared with such.
    fn templates(&self) -> &[String] {
        &[]
    }

    /// Whether predictions come from [`Task::tell`]; otherwise labels are ranked.
    fn tells(&self) -> bool {
        false
    }

    /// Whether images are looked at.
    fn reads_images(&self) -> bool {
        true
    }

    /// What is read of an example, so that nothing else of it has to be right.
    fn reads(&self) -> Reads;

    /// [`Definition::reads`] with the image, where images are read.
    fn needs_of_rows(&self) -> Reads {
        let mut reads = self.reads();
        reads.needed.extend(self.reads_images().then_some(Field::Image));
        reads
    }

    /// What is set and changes nothing, a line for each.
    fn unused(&self) -> Vec<String> {
        Vec::new()
    }

    /// Whether the classes are the task's own and come from the training examples: known answers.
    fn own_classes(&self) -> bool {
        false
    }

    /// Whether a recipe's `fusion` is of use.
    fn fuses(&self) -> bool {
        false
    }

    /// Class prompts, or the texts of some examples, and how far they are padded; `--check` prices them.
    fn texts(&self, classes: &[String], examples: &[Example]) -> (Vec<String>, Pad);

    /// How many texts a batch encodes.
    fn texts_per_batch(&self, classes: usize, batch: usize) -> usize {
        let _ = classes;
        batch
    }

    /// Builds the task and declares its own weights.
    ///
    /// # Errors
    /// When it does not fit the data or the model.
    fn build(&self, parts: &TaskParts<'_>, params: &mut Params) -> Result<Box<dyn Task>>;
}

/// What a task is built from.
#[derive(Debug, Clone, Copy)]
pub struct TaskParts<'a> {
    /// The base.
    pub clip: &'a Clip,
    /// Its tokeniser.
    pub tokenizer: &'a Tokenizer,
    /// Class names in label order.
    pub classes: &'a [String],
    /// What is trained on, which may be a stream; none where a trained task is put together again.
    pub train: Option<&'a Dataset>,
    /// How image and text become one; the task's own way where nothing is said.
    pub fusion: Option<&'a FusionConfig>,
    /// Spreads the target over all classes: 0 is off.
    pub label_smoothing: f64,
    /// The run's seed.
    pub seed: u64,
}

impl TaskParts<'_> {
    /// Every training example, a part at a time.
    ///
    /// # Errors
    /// What `each` returns, or when a shard cannot be read.
    pub fn visit(&self, each: &mut dyn FnMut(&[Example]) -> Result<()>) -> Result<()> {
        self.train.map_or(Ok(()), |data| data.visit(Split::Train, each))
    }
}

impl TaskConfig {
    /// The recipe key.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.definition().name()
    }
}

/// The model as a task sees it during one forward pass.
#[derive(Debug, Clone, Copy)]
pub struct Forward<'a, 't> {
    /// The base.
    pub clip: &'a Clip,
    /// What changes it.
    pub patches: &'a Patches,
    /// The epoch, which varies the texts that are drawn.
    pub epoch: usize,
    /// Whether gradients are wanted, and what varies from batch to batch.
    pub pass: Pass,
    /// What of the text tower is the same in every training step.
    pub constant: ConstantText,
    /// Where what is computed twice to save memory is noted.
    pub tape: Option<&'t Tape<'a>>,
}

impl<'a> Forward<'a, '_> {
    /// A pass without gradients.
    #[must_use]
    pub fn eval(clip: &'a Clip, patches: &'a Patches) -> Self {
        Self { clip, patches, epoch: 0, pass: Pass::eval(), constant: ConstantText::default(), tape: None }
    }

    /// Whether gradients are wanted.
    #[must_use]
    pub fn training(&self) -> bool {
        self.pass.training
    }
}

/// What a task wants of the image tower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Nothing: images are not read.
    Nothing,
    /// Pooled, projected features.
    Features,
    /// These and every token.
    Tokens,
}

/// How many different texts of a set the task cuts to the model's context: its class prompts, or texts, questions and choices of all
/// examples, each counted once however often it is encoded.
///
/// # Errors
/// When a shard cannot be read or the tokeniser fails.
pub fn cut_texts(task: &dyn Definition, tokenizer: &Tokenizer, data: &Dataset) -> Result<usize> {
    let mut cut = HashSet::new();
    for split in [Split::Train, Split::Val, Split::Test] {
        data.visit(split, &mut |part| {
            longer_than_context(tokenizer, task.texts(&data.classes, part).0, &mut cut)?;
            Ok(())
        })?;
    }
    Ok(cut.len())
}

/// Adds texts that have more tokens than the context to those that are known.
///
/// # Errors
/// When the tokeniser fails.
pub(crate) fn longer_than_context(tokenizer: &Tokenizer, texts: Vec<String>, cut: &mut HashSet<String>) -> Result<()> {
    let context = tokenizer.context();
    // Each token has at least one byte.
    let new: HashSet<String> = texts.into_iter().filter(|t| !(cut.contains(t) || t.is_ascii() && t.len() + 2 <= context)).collect();
    let long: Vec<Option<String>> =
        new.into_par_iter().map(|t| Ok((tokenizer.count(&t)? > context).then_some(t))).collect::<Result<_>>()?;
    cut.extend(long.into_iter().flatten());
    Ok(())
}

/// What is said about one example.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Told {
    /// The class, the answer, the number.
    pub prediction: String,
    /// What it was chosen from, each with a probability, in the task's order; empty for numbers.
    pub scores: Vec<(String, f32)>,
    /// The logit of each, before the temperature.
    pub logits: Vec<f32>,
    /// Which of `scores` pass their threshold, where there may be any number; empty elsewhere.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub chosen: Vec<bool>,
}

/// A loss and its metrics.
pub trait Task: Send {
    /// Checks that examples have what the task needs.
    ///
    /// # Errors
    /// When one has no label or no text.
    fn check(&self, examples: &[Example]) -> Result<()>;

    /// Checks that an example can be judged; it needs no label.
    ///
    /// # Errors
    /// When it lacks what the task looks at, images apart.
    fn check_query(&self, _example: &Example) -> Result<()> {
        Ok(())
    }

    /// The metrics that these examples do not define, whatever is predicted: a ranking of pairs that all fit.
    fn undefined(&self, _examples: &[Example]) -> Vec<&'static str> {
        Vec::new()
    }

    /// What is wanted of the image tower.
    fn needs(&self) -> Needs {
        Needs::Features
    }

    /// The loss of a batch, a scalar.
    ///
    /// # Shapes
    /// `images` [B, …]; `examples` B of them.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn loss(&mut self, on: &Forward<'_, '_>, images: &Encoded, examples: &[&Example]) -> Result<Tensor>;

    /// What [`Task::evaluate`] wants to know of some examples: image features, unless the task says otherwise.
    ///
    /// # Shapes
    /// `images` [B, …] of the B `rows` of a split → [B, …]
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn outputs(&mut self, _on: &Forward<'_, '_>, images: &Encoded, _split: &[Example], _rows: Range<usize>) -> Result<Tensor> {
        Ok(images.features.clone())
    }

    /// Metrics over a whole split.
    ///
    /// # Shapes
    /// `outputs` [N, …]; `examples` N of them.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn evaluate(&mut self, on: &Forward<'_, '_>, outputs: &Tensor, examples: &[Example]) -> Result<Evaluation>;

    /// Whether [`Task::calibrate`] chooses anything.
    fn calibrates(&self) -> bool {
        false
    }

    /// Chooses what is chosen on validation: a threshold, a temperature.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn calibrate(&mut self, _outputs: &Tensor, _examples: &[Example]) -> Result<()> {
        Ok(())
    }

    /// What was chosen, by name; stored in `peft.json`.
    fn scalars(&self) -> BTreeMap<String, f64> {
        BTreeMap::new()
    }

    /// Puts back what [`Task::scalars`] gave.
    fn set_scalars(&mut self, _scalars: &BTreeMap<String, f64>) {}

    /// What is predicted for examples that need no label.
    ///
    /// # Shapes
    /// `outputs` as [`Task::outputs`] gives them.
    ///
    /// # Errors
    /// When the task has no prediction for an example by itself.
    fn tell(&self, outputs: &Tensor, examples: &[Example]) -> Result<Vec<Told>>;

    /// A vocabulary of the task's own that replaces the data's classes: known answers.
    fn classes(&self) -> Option<&[String]> {
        None
    }

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

    /// Whether an example's part of the loss depends on the others of its batch, so that splitting the batch changes it.
    fn over_batch(&self) -> bool {
        self.drop_last()
    }
}
