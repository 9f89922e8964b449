//! Classes of an image, a text, or both: one of them, or any number.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::Tensor;
use peft_adapters::{ClassFeatures, Labelled, Params};
use serde::{Deserialize, Serialize};

use super::joint::lacks;
use super::prompts::{self, Pad};
use super::texts::drawn;
use super::{Definition, Forward, Needs, Task, TaskParts, Told};
use crate::clip::Encoded;
use crate::clip::model::{cosine_logits, unit_rows};
use crate::data::{Example, Field, Reads};
use crate::error::{Error, Result};
use crate::fusion::Inputs;
use crate::named;
use crate::report::Evaluation;

mod judge;
mod loss;
#[cfg(test)]
mod reference;
mod source;
mod weights;

use judge::Judge;
use loss::Criterion;
pub use loss::{AsymmetricConfig, Loss};
use source::Source;
pub use weights::ClassWeights;

/// Options of classification.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClassifyConfig {
    /// `image`, `text` or `both`: what is looked at. Texts and both have a trained head over a fusion, images what `head` says.
    pub inputs: Inputs,
    /// `single`: each example has one class. `multi`: any number, or none; each class is a yes or no by itself.
    pub labels: Labels,
    /// Prompts around the class name, `{}`; features of several are averaged.
    pub templates: Vec<String>,
    /// `prompts`: scaled cosine with the class prompts; with `labels: multi` less a trained threshold for each class. `linear`: a
    /// trained matrix over image features.
    pub head: Head,
    /// Where a linear head starts. `zero`: all classes alike. `text`: at the base's own logits, weights exp(logit scale) times
    /// the class prompts' features; better with few examples.
    pub head_init: HeadInit,
    /// `cross_entropy` for one label; `bce` or `asymmetric` for several. The first that fits when left out.
    #[serde(deserialize_with = "named::maybe", skip_serializing_if = "Option::is_none")]
    pub loss: Option<Loss>,
    /// `none`, `balanced`, numbers by class name (`{ cat: 2 }`; the others count 1), or a number for each class in the order in which
    /// `peft data` shows them: how much a class counts in the loss. Rare ones more: more of them are found, and more is taken for them.
    pub class_weights: ClassWeights,
    /// With `labels: multi` from which probability on a label is predicted, chosen on validation. `global`: one for all, with the
    /// best micro F1. `each`: one for each label with its best F1; needs more validation examples.
    pub threshold: Thresholds,
    /// `longest` or `max`: how far prompts are padded. `max` is slower and changes nothing.
    pub pad: Pad,
}

/// How many classes an example has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Labels {
    /// One; classes exclude each other.
    #[default]
    Single,
    /// Any number.
    Multi,
}

/// From which probability on labels are predicted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Thresholds {
    /// One for all labels.
    #[default]
    Global,
    /// One for each.
    Each,
}

/// Where the logits of images come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Head {
    /// exp(logit scale) · cos(image, class prompt).
    #[default]
    Prompts,
    /// W · image/‖image‖ + b; with `method: none` the linear probe.
    Linear,
}

/// Where a linear head starts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HeadInit {
    /// W = 0, b = 0.
    #[default]
    Zero,
    /// W = exp(logit scale) · prompts/‖prompts‖, b = 0.
    Text,
}

impl Default for ClassifyConfig {
    fn default() -> Self {
        Self {
            inputs: Inputs::Image,
            labels: Labels::Single,
            templates: vec![prompts::DEFAULT_TEMPLATE.into()],
            head: Head::Prompts,
            head_init: HeadInit::Zero,
            loss: None,
            class_weights: ClassWeights::None,
            threshold: Thresholds::Global,
            pad: Pad::Longest,
        }
    }
}

impl ClassifyConfig {
    fn several(&self) -> bool {
        self.labels == Labels::Multi
    }

    fn loss(&self) -> Loss {
        self.loss.unwrap_or(if self.several() { Loss::Bce {} } else { Loss::CrossEntropy {} })
    }
}

impl Definition for ClassifyConfig {
    fn name(&self) -> &'static str {
        "classify"
    }

    fn validate(&self, place: &str) -> Result<()> {
        let place = format!("{place}: task.classify");
        match (self.loss(), self.several()) {
            (Loss::CrossEntropy {}, true) => {
                return Err(Error::input(format!("{place}.loss"), "cross_entropy wants one label for each example")
                    .hint("with labels: multi, bce or asymmetric"));
            }
            (Loss::Bce {} | Loss::Asymmetric(_), false) => {
                return Err(Error::input(format!("{place}.loss"), "bce and asymmetric are for any number of labels")
                    .hint("labels: multi, or loss: cross_entropy"));
            }
            (Loss::Asymmetric(config), true) => config.validate(&place)?,
            _ => {}
        }
        if self.inputs != Inputs::Image {
            return match self.head_init {
                HeadInit::Zero => Ok(()),
                HeadInit::Text => Err(Error::input(format!("{place}.head_init"), "text starts a head on images alone")
                    .hint("leave it out: a head over a fusion starts at random")),
            };
        }
        if self.templates.is_empty() {
            return Err(Error::input(format!("{place}.templates"), "expected at least one template"));
        }
        self.templates.iter().try_for_each(|t| prompts::check_template(&format!("{place}.templates"), t))
    }

    fn unused(&self) -> Vec<String> {
        let default = Self::default();
        let reads_prompts = self.inputs == Inputs::Image && (self.head == Head::Prompts || self.head_init == HeadInit::Text);
        let set = [
            ("templates", self.templates != default.templates && !reads_prompts, "there are no class prompts"),
            ("head_init", self.head_init != default.head_init && self.head == Head::Prompts, "there is no linear head"),
            ("head", self.head != default.head && self.inputs != Inputs::Image, "texts always have a head over the fusion"),
            ("threshold", self.threshold != default.threshold && !self.several(), "one label needs no threshold"),
        ];
        let told = set.iter().filter(|(_, idle, _)| *idle);
        told.map(|(key, _, why)| format!("task.classify.{key} changes nothing here: {why}")).collect()
    }

    fn has_own_weights(&self) -> bool {
        self.head == Head::Linear || self.inputs != Inputs::Image || self.several()
    }

    fn metric(&self) -> &'static str {
        if self.several() { "mean_average_precision" } else { "accuracy" }
    }

    fn metrics(&self) -> &'static [&'static str] {
        if self.several() { &judge::OF_SEVERAL } else { &judge::OF_ONE }
    }

    fn templates(&self) -> &[String] {
        if self.inputs == Inputs::Image { &self.templates } else { &[] }
    }

    fn tells(&self) -> bool {
        self.inputs != Inputs::Image || self.several()
    }

    fn reads_images(&self) -> bool {
        self.inputs.image()
    }

    fn fuses(&self) -> bool {
        // A linear head on images is what a fusion is compared with.
        self.inputs != Inputs::Image || self.head == Head::Linear
    }

    fn reads(&self) -> Reads {
        let text = self.inputs.text().then_some(Field::Text);
        // One class is a list of one.
        let (label, also) = if self.several() { (Field::Labels, vec![Field::Label]) } else { (Field::Label, Vec::new()) };
        Reads { needed: [label].into_iter().chain(text).collect(), also }
    }

    fn texts(&self, classes: &[String], examples: &[Example]) -> (Vec<String>, Pad) {
        match self.inputs {
            Inputs::Image => (prompts::fill(classes, &self.templates), self.pad),
            _ => (examples.iter().flat_map(|e| e.texts.iter().cloned()).collect(), self.pad),
        }
    }

    fn texts_per_batch(&self, classes: usize, batch: usize) -> usize {
        if self.inputs == Inputs::Image { classes * self.templates.len() } else { batch }
    }

    fn build(&self, parts: &TaskParts<'_>, params: &mut Params) -> Result<Box<dyn Task>> {
        let count = parts.classes.len();
        if count < 2 && !(self.several() && count == 1) {
            return Err(Error::input("task.classify", format!("expected at least two classes, found {count}"))
                .hint("a classifier chooses: of a folder each directory is a class; data.table.label, or data.table.labels with `labels: multi`, names a table's column"));
        }
        let weights = self.class_weights.of(parts, self.several())?;
        Ok(Box::new(Classify {
            source: Source::new(self, parts, params)?,
            judge: Judge::new(parts.classes, self.several(), self.threshold),
            criterion: Criterion { loss: self.loss(), weights },
            config: self.clone(),
            smoothing: parts.label_smoothing,
            seed: parts.seed,
        }))
    }
}

struct Classify {
    config: ClassifyConfig,
    source: Source,
    criterion: Criterion,
    judge: Judge,
    smoothing: f64,
    seed: u64,
}

impl Task for Classify {
    fn over_batch(&self) -> bool {
        self.criterion.is_over_batch()
    }

    fn check(&self, examples: &[Example]) -> Result<()> {
        for e in examples {
            match (self.config.several(), e.label, &e.labels) {
                (false, None, None) => {
                    return Err(lacks("classify", &e.id, "label").hint("data.table.label names the column"));
                }
                (false, None, Some(_)) => {
                    return Err(lacks("classify", &e.id, "single label, but a list of them").hint("task: { classify: { labels: multi } }"));
                }
                (true, None, None) => {
                    return Err(lacks("classify", &e.id, "list of labels")
                        .hint("data.table.labels names the column: a|b, or an empty list where nothing applies"));
                }
                _ => {}
            }
            self.check_query(e)?;
        }
        Ok(())
    }

    fn check_query(&self, e: &Example) -> Result<()> {
        match self.config.inputs.text() && (e.texts.is_empty() || e.texts.iter().any(|t| t.trim().is_empty())) {
            true => Err(lacks("classify", &e.id, "text, or an empty one").hint("data.table.text names the column; --text gives it")),
            false => Ok(()),
        }
    }

    fn needs(&self) -> Needs {
        self.source.needs()
    }

    fn loss(&mut self, on: &Forward<'_, '_>, images: &Encoded, examples: &[&Example]) -> Result<Tensor> {
        let seed = self.seed;
        let logits = self.source.train(on, images, examples, |e| drawn(seed, on.epoch, e))?;
        let labels: Vec<&[u32]> = examples.iter().map(|e| e.all_labels()).collect();
        self.criterion.of(&logits, &labels, self.smoothing)
    }

    /// Logits, [B, C].
    fn outputs(&mut self, on: &Forward<'_, '_>, images: &Encoded, split: &[Example], rows: Range<usize>) -> Result<Tensor> {
        self.source.read(on, images, &split[rows])
    }

    fn evaluate(&mut self, _: &Forward<'_, '_>, outputs: &Tensor, examples: &[Example]) -> Result<Evaluation> {
        self.judge.evaluate(outputs, examples, &self.criterion)
    }

    fn undefined(&self, examples: &[Example]) -> Vec<&'static str> {
        match examples.iter().all(|e| e.all_labels().is_empty()) {
            true => vec!["mean_average_precision"],
            false => Vec::new(),
        }
    }

    fn calibrates(&self) -> bool {
        true
    }

    fn calibrate(&mut self, outputs: &Tensor, examples: &[Example]) -> Result<()> {
        self.judge.calibrate(outputs, examples)
    }

    fn scalars(&self) -> BTreeMap<String, f64> {
        self.judge.scalars()
    }

    fn set_scalars(&mut self, scalars: &BTreeMap<String, f64>) {
        self.judge.set_scalars(scalars);
    }

    fn tell(&self, outputs: &Tensor, _: &[Example]) -> Result<Vec<Told>> {
        self.judge.tell(outputs)
    }

    fn labelled(&mut self, on: &Forward<'_, '_>, features: &Tensor, examples: &[Example]) -> Result<Option<Labelled>> {
        let Source::Images(source) = &mut self.source else { return Ok(None) };
        if !source.compares() || on.patches.per_image() {
            return Ok(None);
        }
        let classes = on.patches.class_features(ClassFeatures::Shared(source.class_features(on)?), features)?;
        let logits = cosine_logits(on.clip, features, &classes, on.patches)?;
        let labels: Vec<u32> = examples.iter().map(|e| e.label.unwrap_or(0)).collect();
        let labels = Tensor::from_vec(labels, examples.len(), logits.device())?;
        Ok(Some(Labelled { features: unit_rows(features)?, labels, logits }))
    }
}
