//! The recipe's `train` section.

use std::path::PathBuf;

use candle_core::DType;
use peft_adapters::Tape;
use serde::{Deserialize, Serialize};

use super::activations::CacheConfig;
use super::health::OnNonFinite;
use crate::data::AugmentConfig;
use crate::error::{Error, Result};
use crate::named;
use crate::optim::{OptimizerConfig, ScheduleConfig};

/// How it is learnt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Passes over the training split. Excludes `steps`; 10 where neither is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<usize>,
    /// Optimiser steps. Excludes `epochs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<usize>,
    /// Examples in a micro-batch. Higher: faster for each example, more memory.
    pub batch: usize,
    /// Micro-batches in an optimiser step.
    pub accumulate: usize,
    /// Where memory runs out, halve `batch` and double `accumulate` until it suffices. Steps stay means over the same
    /// examples, equal up to rounding but for what is drawn for each micro-batch (dropout). Not for losses over the batch.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub auto_batch: bool,
    /// Peak learning rate.
    pub lr: f64,
    /// `adamw` or `sgd`, with options.
    #[serde(deserialize_with = "named::one")]
    pub optimizer: OptimizerConfig,
    /// `constant`, `linear` or `cosine`, with options.
    #[serde(deserialize_with = "named::one")]
    pub schedule: ScheduleConfig,
    /// Largest global gradient norm; off when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f64>,
    /// Stop when validation has not improved for a while.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_stopping: Option<EarlyStopping>,
    /// Epochs between validations; the last epoch is always validated.
    pub evaluate_every: usize,
    /// Start from this adapter's weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_adapter: Option<PathBuf>,
    /// A new order of examples each epoch.
    pub shuffle: bool,
    /// `natural`: an epoch shows each example once. `balanced`: as many examples, of each class equally many; those of rare
    /// classes come several times. An example of several classes may be drawn for each of them, those of none are a class.
    #[serde(skip_serializing_if = "is_natural")]
    pub sampling: Sampling,
    /// Random transforms of training images.
    pub augment: AugmentConfig,
    /// What the frozen model computes in: f32, bf16 or f16. Adapter weights stay f32. With f16 the loss is scaled.
    pub dtype: Dtype,
    /// `stop`: a loss or a gradient that is not finite ends the run. `skip`: that step is left out and counted, up to ten
    /// in a row.
    #[serde(skip_serializing_if = "stops")]
    pub on_nonfinite: OnNonFinite,
    /// Draws initial weights, order, shots, augmentation and dropout.
    pub seed: u64,
    /// Decay of an average of the weights that is evaluated and saved in their place; off when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ema: Option<f64>,
    /// Leave patches of training images out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patch_dropout: Option<PatchDropout>,
    /// Keep only each block's input for the backward pass and compute the rest again: less memory, slower steps.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub checkpointing: bool,
    /// Examples that go through the towers together while the loss is over the whole batch (GradCache): a contrastive batch
    /// is then not bound by memory. Lower: less memory. Off when left out; excludes `checkpointing`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grad_cache: Option<usize>,
    /// Where activations below the first trained block are kept between epochs, if transforms do not change them.
    #[serde(skip_serializing_if = "is_default")]
    pub activation_cache: CacheConfig,
    /// Share of the target that is spread over all classes, in [0, 1).
    pub label_smoothing: f64,
    /// Optimiser steps between checkpoints, whatever they cost. Besides these, and when left out, the state is saved at the end
    /// of an epoch and each minute within one, if the last checkpoint took less than a hundredth of the time since.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_steps: Option<usize>,
    /// Whether TensorBoard's event file is written; it grows by some 150 bytes a step.
    #[serde(skip_serializing_if = "is_true")]
    pub tensorboard: bool,
}

/// `early_stopping: { metric: accuracy, patience: 5 }`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EarlyStopping {
    /// A validation metric, or `loss`; the task's own when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metric: Option<String>,
    /// Validations without improvement before the run ends; 0 never ends it but still names the metric.
    pub patience: usize,
}

/// Li et al. 2023 (FLIP): fewer patches make cheaper steps and regularise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PatchDropout {
    /// Share of the patches that is left out, in [0, 1).
    pub fraction: f64,
    /// Share of the steps during which it happens; the rest sees whole images.
    #[serde(default = "one")]
    pub until: f64,
}

/// How often the examples of a class are shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sampling {
    /// As often as they occur.
    #[default]
    Natural,
    /// As often as those of any other class.
    Balanced,
}

// serde hands out references.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_natural(sampling: &Sampling) -> bool {
    *sampling == Sampling::Natural
}

// serde hands out references.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn stops(what: &OnNonFinite) -> bool {
    *what == OnNonFinite::Stop
}

fn is_default(cache: &CacheConfig) -> bool {
    *cache == CacheConfig::default()
}

// serde hands out references.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_true(value: &bool) -> bool {
    *value
}

fn one() -> f64 {
    1.0
}

/// A floating-point format.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// Single precision.
    #[default]
    F32,
    /// Half precision with f32's range.
    Bf16,
    /// Half precision.
    F16,
}

impl From<Dtype> for DType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::BF16,
            Dtype::F16 => Self::F16,
        }
    }
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            epochs: None,
            steps: None,
            batch: 32,
            accumulate: 1,
            auto_batch: false,
            lr: 1e-3,
            optimizer: OptimizerConfig::default(),
            schedule: ScheduleConfig::default(),
            clip_norm: None,
            early_stopping: None,
            evaluate_every: 1,
            init_adapter: None,
            shuffle: true,
            sampling: Sampling::Natural,
            augment: AugmentConfig::default(),
            dtype: Dtype::F32,
            on_nonfinite: OnNonFinite::Stop,
            seed: 0,
            ema: None,
            patch_dropout: None,
            checkpointing: false,
            grad_cache: None,
            activation_cache: CacheConfig::default(),
            label_smoothing: 0.0,
            checkpoint_steps: None,
            tensorboard: true,
        }
    }
}

/// Epochs where a recipe names neither `epochs` nor `steps`.
const DEFAULT_EPOCHS: usize = 10;

impl TrainConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// When a value is out of range or two exclude each other.
    pub fn validate(&self, place: &str) -> Result<()> {
        let wrong = |key: &str, expected: &str, found: &dyn std::fmt::Display| {
            Err(Error::input(format!("{place}: train.{key}"), format!("expected {expected}, found {found}")))
        };
        if self.epochs.is_some() && self.steps.is_some() {
            return Err(Error::input(format!("{place}: train"), "`epochs` and `steps` exclude each other").hint("keep one of them"));
        }
        if self.sampling == Sampling::Balanced && !self.shuffle {
            return Err(Error::input(
                format!("{place}: train"),
                "`sampling: balanced` draws examples, and `shuffle: false` keeps their order",
            )
            .hint("leave one of them out"));
        }
        if self.checkpointing && self.grad_cache.is_some() {
            return Err(Error::input(format!("{place}: train"), "`checkpointing` and `grad_cache` exclude each other")
                .hint("grad_cache computes whole towers again, a few examples at a time; keep one of them"));
        }
        let steps =
            [("epochs", self.epochs), ("steps", self.steps), ("checkpoint_steps", self.checkpoint_steps), ("grad_cache", self.grad_cache)];
        for (key, value) in steps {
            if value == Some(0) || value.is_some_and(|v| v > 1_000_000_000) {
                return wrong(key, "1 to 1000000000", &value.unwrap_or(0));
            }
        }
        for (key, value) in [("batch", self.batch), ("accumulate", self.accumulate), ("evaluate_every", self.evaluate_every)] {
            if value == 0 || value > 1_000_000 {
                return wrong(key, "1 to 1000000", &value);
            }
        }
        if !(self.lr > 0.0 && self.lr.is_finite()) {
            return wrong("lr", "a number above 0", &self.lr);
        }
        if let Some(clip) = self.clip_norm.filter(|c| !(*c > 0.0 && c.is_finite())) {
            return wrong("clip_norm", "a number above 0", &clip);
        }
        if !(0.0..1.0).contains(&self.label_smoothing) {
            return wrong("label_smoothing", "a number in [0, 1)", &self.label_smoothing);
        }
        if let Some(ema) = self.ema.filter(|e| !(0.0..1.0).contains(e)) {
            return wrong("ema", "a decay in [0, 1)", &ema);
        }
        if let Some(p) = &self.patch_dropout {
            if !(0.0..1.0).contains(&p.fraction) {
                return wrong("patch_dropout.fraction", "a number in [0, 1)", &p.fraction);
            }
            if !(0.0..=1.0).contains(&p.until) {
                return wrong("patch_dropout.until", "a number from 0 to 1", &p.until);
            }
        }
        self.augment.validate(place)?;
        self.optimizer.validate(place)?;
        self.schedule.validate(place, self.lr)
    }

    /// Epochs where no steps are given.
    #[must_use]
    pub fn epochs(&self) -> usize {
        self.epochs.unwrap_or(DEFAULT_EPOCHS)
    }

    /// Optimiser steps in all, given those of an epoch.
    #[must_use]
    pub fn total_steps(&self, steps_per_epoch: usize) -> usize {
        self.steps.unwrap_or(self.epochs() * steps_per_epoch)
    }

    /// What a step computes twice to save memory, if anything.
    #[must_use]
    pub fn tape<'a>(&self) -> Option<Tape<'a>> {
        match self.grad_cache {
            Some(rows) => Some(Tape::by_rows(rows)),
            None => self.checkpointing.then(Tape::by_blocks),
        }
    }
}
