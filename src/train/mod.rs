//! The training loop: step, validation, best epoch, checkpoints.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Tensor};
use peft_adapters::{Grads, Params, Step};

use crate::clip::base::Base;
use crate::clip::{Clip, Encoded};
use crate::data::{Dataset, Example, Images, Plan, Split};
use crate::delta::Adapters;
use crate::error::{Error, Result};
use crate::optim::{Ema, Optimizer};
use crate::provenance::Provenance;
use crate::report::Evaluation;
use crate::task::{Forward, Needs, Task};

mod activations;
mod blame;
pub mod checkpoint;
mod config;
mod course;
mod features;
mod fit;
mod health;
mod idle;
mod micro;
pub mod observer;
mod pace;
mod step;

pub use activations::{Bank, CacheConfig};
pub use checkpoint::{Best, State};
pub use config::{Dtype, EarlyStopping, PatchDropout, Sampling, TrainConfig};
pub use features::{FeatureSource, Features};
pub use health::{Followed, Health, LossScale, OnNonFinite};
pub use micro::Micro;
pub use observer::{Event, Observer, Silent, StepRecord};
pub use step::Stepper;

/// Texts that are judged at once where images are not looked at.
const TEXTS: usize = 256;

/// What a run is made of.
pub struct Trainer<'a> {
    /// The frozen model.
    pub base: &'a Base,
    /// What is trained.
    pub adapters: &'a mut Adapters,
    /// What for.
    pub task: Box<dyn Task>,
    /// On what.
    pub data: &'a Dataset,
    /// How images are read.
    pub images: Arc<Images>,
    /// How.
    pub config: &'a TrainConfig,
    /// What goes through the model at once.
    pub micro: Micro,
    /// The number that chooses the best epoch.
    pub metric: String,
    /// Image features.
    pub features: Features,
}

/// Where a run stands and what a checkpoint holds besides parameters.
pub struct Run {
    state: State,
    optimizer: Box<dyn Optimizer>,
    ema: Option<Ema>,
    best: Option<Vec<Tensor>>,
    started: Instant,
    /// Whether numbers ended it.
    lost: bool,
}

impl Run {
    /// Where it stands.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Whether the run ended because its numbers are not finite.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.lost
    }

    /// Notes micro-batches that differ from the recipe's.
    pub fn set_micro(&mut self, micro: Micro) {
        self.state.micro = Some(micro);
    }

    /// Notes what it is made of.
    ///
    /// # Errors
    /// When the checkpoint is of a run that was made of something else.
    pub fn set_made_of(&mut self, place: &Path, made_of: Provenance) -> Result<()> {
        match self.state.made_of.differing(&made_of).as_slice() {
            [] => self.state.made_of = made_of,
            other => {
                let message = format!("the checkpoint is of another run: {} differ", other.join(" and "));
                return Err(Error::input(place.display(), message).hint("start anew with --force"));
            }
        }
        Ok(())
    }

    /// Notes the evaluation before training.
    pub fn set_before(&mut self, evaluation: Evaluation) {
        self.state.before = Some(evaluation);
    }

    /// Seconds of training, earlier sessions included.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.state.seconds + self.started.elapsed().as_secs_f64()
    }
}

impl<'a> Trainer<'a> {
    /// The order of batches.
    #[must_use]
    pub fn plan(&self) -> Plan {
        Plan {
            examples: self.data.count(Split::Train),
            batch: self.micro.batch,
            shuffle: self.config.shuffle,
            drop_last: self.task.drop_last(),
            seed: self.config.seed,
            balanced: (self.config.sampling == Sampling::Balanced).then(|| Arc::new(by_class(&self.data.train))),
        }
    }

    /// Optimiser steps in all; none where nothing is trained (Tip-Adapter).
    #[must_use]
    pub fn total_steps(&self) -> usize {
        if self.adapters.params.count() == 0 {
            return 0;
        }
        self.config.total_steps(self.micro.steps(self.plan().per_epoch()))
    }

    /// A run before its first step.
    ///
    /// # Errors
    /// When state cannot be allocated.
    pub fn begin(&self) -> Result<Run> {
        let params = &self.adapters.params;
        Ok(Run {
            state: State { health: Health::new(self.config.dtype), ..State::default() },
            optimizer: self.config.optimizer.build(params)?,
            ema: self.config.ema.map(|decay| Ema::new(decay, params)).transpose()?,
            best: None,
            started: Instant::now(),
            lost: false,
        })
    }

    /// Puts a checkpoint back; nothing happens where none was written yet.
    ///
    /// # Errors
    /// When the checkpoint is broken or belongs to another recipe.
    pub fn resume(&mut self, run: &mut Run, dir: &Path) -> Result<()> {
        let Some((mut tensors, state)) = checkpoint::load(dir)? else { return Ok(()) };
        let mut take = |name: &str| {
            tensors
                .remove(name)
                .ok_or_else(|| Error::input(dir.display(), format!("the checkpoint lacks `{name}`")).hint("start anew with --force"))
        };
        let params = &self.adapters.params;
        let mut named = |prefix: &str| -> Result<Vec<Tensor>> {
            let one = |p: &peft_adapters::Param| {
                let value = take(&format!("{prefix}.{}", p.name))?;
                checkpoint::check_shape(dir, &format!("{prefix}.{}", p.name), &value, p.var.shape())?;
                Ok(value.to_device(params.device())?)
            };
            params.iter().map(one).collect()
        };
        assign(params, &named("param")?)?;
        run.best = state.best.as_ref().map(|_| named("best")).transpose()?;
        run.optimizer.restore(&mut take)?;
        if let Some(ema) = &mut run.ema {
            ema.restore(params, &mut take)?;
        }
        // A run that never halved its batches goes on so, whatever memory there is now.
        self.micro = state.micro.unwrap_or(Micro::of(self.config));
        checkpoint::check_step(dir, state.step, self.total_steps())?;
        run.state = state;
        for (index, patch) in self.adapters.patches.iter_mut().enumerate() {
            let prefix = format!("patch.{index}.");
            let own = tensors.iter().filter_map(|(name, t)| Some((name.strip_prefix(&prefix)?.to_string(), t.clone())));
            patch.restore(&own.collect())?;
        }
        Ok(())
    }

    /// Writes a checkpoint.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn save(&self, run: &mut Run, dir: &Path) -> Result<()> {
        let params = &self.adapters.params;
        let named = |prefix: &str, values: &[Tensor]| -> Vec<(String, Tensor)> {
            params.iter().zip(values).map(|(p, v)| (format!("{prefix}.{}", p.name), v.clone())).collect()
        };
        let mut tensors = named("param", &snapshot(params)?);
        tensors.extend(run.best.iter().flat_map(|best| named("best", best)));
        tensors.extend(run.optimizer.state());
        tensors.extend(run.ema.iter().flat_map(|ema| ema.state(params)));
        for (index, patch) in self.adapters.patches.iter().enumerate() {
            tensors.extend(patch.state().into_iter().map(|(name, t)| (format!("patch.{index}.{name}"), t)));
        }
        run.state.seconds = run.seconds();
        run.started = Instant::now();
        checkpoint::save(dir, &tensors, &run.state)
    }

    /// Trains to the end, or to a signal. Afterwards the parameters are those of the best epoch.
    ///
    /// `checkpoints` is where checkpoints go; none are written without.
    ///
    /// # Errors
    /// When a step fails, a number is not finite, or a signal came.
    pub fn train(&mut self, run: &mut Run, checkpoints: Option<&Path>, observer: &mut dyn Observer) -> Result<()> {
        self.choose_metric(observer)?;
        let total = self.total_steps();
        // An adapter that training starts from has its cache already.
        if run.state.step == 0 && self.config.init_adapter.is_none() {
            self.fit(run, observer)?;
        }
        if total > 0 {
            self.steps(run, total, checkpoints, observer)?;
        }
        self.finish(run)?;
        self.tune(observer)?;
        self.calibrate(observer)
    }

    /// Evaluates a split with the parameters as they are.
    ///
    /// # Errors
    /// When an image cannot be read or a tensor operation fails.
    pub fn evaluate(&mut self, split: Split, observer: &mut dyn Observer) -> Result<Evaluation> {
        let examples = self.listed(split, observer)?;
        let outputs = self.outputs(split, &examples, observer)?;
        if split == Split::Val {
            self.task.calibrate(&outputs, &examples)?;
        }
        let on = Forward::eval(&self.base.clip, &self.adapters.view);
        self.task.evaluate(&on, &outputs, &examples)
    }

    /// [`Trainer::evaluate`] before the first or after the last step, which a signal ends.
    ///
    /// # Errors
    /// As [`Trainer::evaluate`], and [`Error::Interrupted`].
    pub fn evaluate_unless_stopped(&mut self, split: Split, observer: &mut dyn Observer) -> Result<Evaluation> {
        self.features.heed(true);
        let found = self.evaluate(split, observer);
        self.features.heed(false);
        found
    }

    /// Chooses what the task chooses on validation, with the parameters as they are.
    ///
    /// # Errors
    /// As [`Trainer::evaluate`].
    pub fn calibrate(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let examples = &self.data.val;
        if !self.task.calibrates() || examples.is_empty() {
            return Ok(());
        }
        observer.event(Event::Phase("calibrate", Some(examples.len())));
        let outputs = self.outputs(Split::Val, examples, observer)?;
        self.task.calibrate(&outputs, examples)
    }

    /// What the task says of every example of a split.
    fn outputs(&mut self, split: Split, examples: &[Example], observer: &mut dyn Observer) -> Result<Tensor> {
        let (clip, Adapters { view, .. }) = (&self.base.clip, &mut *self.adapters);
        let mut parts = Vec::new();
        match self.task.needs() {
            Needs::Features => {
                let images = Encoded::pooled(self.features.of(split, examples, clip, view, observer)?);
                return self.task.outputs(&Forward::eval(clip, view), &images, examples, 0..examples.len());
            }
            Needs::Nothing => {
                view.prepare(&Step::eval())?;
                for from in (0..examples.len()).step_by(TEXTS) {
                    let rows = from..examples.len().min(from + TEXTS);
                    let nothing = Encoded::pooled(Tensor::zeros((rows.len(), 1), DType::F32, clip.device())?);
                    parts.push(self.task.outputs(&Forward::eval(clip, view), &nothing, examples, rows)?);
                }
            }
            Needs::Tokens => {
                let task = &mut self.task;
                self.features.each((split, examples), clip, view, observer, |view, images, rows| {
                    parts.push(task.outputs(&Forward::eval(clip, view), &images, examples, rows)?);
                    Ok(())
                })?;
            }
        }
        Ok(Tensor::cat(&parts, 0)?)
    }

    /// Whether image features, once computed, would serve every epoch, or are not wanted.
    fn can_keep_features(&self) -> bool {
        self.task.needs() == Needs::Nothing || self.features.kept() && self.config.augment.is_none() && self.config.patch_dropout.is_none()
    }

    /// The examples of a split, streamed ones as a list; says so where there is something to say.
    fn listed(&self, split: Split, observer: &mut dyn Observer) -> Result<Cow<'a, [Example]>> {
        if split == Split::Train && self.data.stream.is_some() {
            observer.event(Event::Note("the training rows are listed, without their images: their features are computed once".into()));
        }
        self.data.listed(split)
    }

    fn clip(&self) -> &'a Clip {
        &self.base.clip
    }
}

/// The examples of each class that occurs, and those of none; one with several classes is in each of them.
fn by_class(examples: &[Example]) -> Vec<Vec<usize>> {
    let mut classes: BTreeMap<Option<u32>, Vec<usize>> = BTreeMap::new();
    for (i, e) in examples.iter().enumerate() {
        let own = e.all_labels();
        own.iter().for_each(|&label| classes.entry(Some(label)).or_default().push(i));
        if own.is_empty() {
            classes.entry(None).or_default().push(i);
        }
    }
    classes.into_values().collect()
}

fn snapshot(params: &Params) -> Result<Vec<Tensor>> {
    params.iter().map(|p| Ok(p.var.as_tensor().detach().copy()?)).collect()
}

fn assign(params: &Params, values: &[Tensor]) -> Result<()> {
    params.iter().zip(values).try_for_each(|(p, v)| Ok(p.var.set(v)?))
}

/// Refuses a split whose loss is not finite: nothing could be chosen by it, and JSON could not hold it.
///
/// # Errors
/// When it is not.
pub fn check_finite(what: &str, found: &Evaluation) -> Result<()> {
    if found.loss.is_finite() || found.examples == 0 {
        return Ok(());
    }
    Err(Error::fault(what, "the loss is not finite").hint("lower train.lr; with `train.dtype: f16` try bf16, whose range is that of f32"))
}

/// Gradients by name, for patches that want to see them.
fn by_name(params: &Params, grads: &[Option<Tensor>], scale: f64) -> Grads {
    let named: HashMap<_, _> = params.iter().zip(grads).filter_map(|(p, g)| g.clone().map(|g| (p.name.clone(), g))).collect();
    Grads::new(named, scale)
}
