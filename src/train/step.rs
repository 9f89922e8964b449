//! One optimiser step: batches, loss, gradients, update.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use peft_adapters::{Step, rng};
use rand::seq::SliceRandom;

use super::observer::{Event, Observer, StepRecord};
use super::{Run, Trainer, by_name};
use crate::data::loader::LoaderConfig;
use crate::data::{Batch, Example, Loader, Plan, Split};
use crate::error::{Error, Result};
use crate::optim::{Accumulated, clip, global_norm};
use crate::task::Forward;

/// CLIP's bound on the logit scale's logarithm, ln 100 (Radford et al. 2021, section 2.5).
const MAX_LOGIT_SCALE: f64 = 4.605_170_185_988_092;

/// Where batches come from.
enum Feed {
    /// Images, decoded ahead.
    Images(Loader),
    /// Features that never change, [N, P].
    Bank(Tensor),
}

/// Makes steps.
pub struct Stepper {
    plan: Plan,
    feed: Feed,
    total: usize,
    steps_per_epoch: usize,
    accumulate: usize,
    examples: Arc<Vec<Example>>,
    waited: f64,
}

impl Stepper {
    /// Starts after `done` of `total` steps.
    ///
    /// # Errors
    /// When features cannot be computed.
    pub fn new(trainer: &mut Trainer<'_>, done: usize, total: usize, observer: &mut dyn Observer) -> Result<Self> {
        let plan = trainer.plan();
        let config = trainer.config;
        let steps_per_epoch = config.steps_per_epoch(plan.per_epoch());
        let examples = Arc::new(trainer.data.train.clone());
        let mut stepper = Self {
            feed: Feed::Bank(Tensor::zeros(0, DType::F32, &candle_core::Device::Cpu)?),
            total,
            steps_per_epoch,
            accumulate: config.accumulate,
            examples: examples.clone(),
            plan: plan.clone(),
            waited: 0.0,
        };
        let constant = trainer.features.frozen() && config.augment.is_none() && config.patch_dropout.is_none();
        stepper.feed = if constant {
            observer.event(Event::Phase("features", Some(examples.len())));
            let view = &mut trainer.adapters.view;
            Feed::Bank(trainer.features.of(Split::Train, &examples, &trainer.base.clip, view, observer)?)
        } else {
            let loader = LoaderConfig { examples, images: trainer.images.clone(), augment: config.augment.clone(), plan };
            Feed::Images(Loader::start(loader, stepper.position(done), stepper.position(total)))
        };
        Ok(stepper)
    }

    /// Optimiser steps of an epoch.
    #[must_use]
    pub fn steps_per_epoch(&self) -> usize {
        self.steps_per_epoch
    }

    /// Seconds spent waiting for batches since the last call.
    pub fn reset_clock(&mut self) -> f64 {
        std::mem::take(&mut self.waited)
    }

    /// The first micro-batch of a step, counted from the start of training.
    fn position(&self, step: usize) -> usize {
        let (epoch, at) = (step / self.steps_per_epoch, step % self.steps_per_epoch);
        epoch * self.plan.per_epoch() + at * self.accumulate
    }

    fn next(&mut self, position: usize) -> Result<(Batch, bool)> {
        let start = std::time::Instant::now();
        let next = self.fetch(position);
        self.waited += start.elapsed().as_secs_f64();
        next
    }

    /// The batch at `position` and whether it holds features in place of pixels.
    fn fetch(&mut self, position: usize) -> Result<(Batch, bool)> {
        match &mut self.feed {
            Feed::Images(loader) => match loader.next_batch()? {
                Some(batch) => Ok((batch, false)),
                None => Err(Error::fault("loader", "ended before the last step")),
            },
            Feed::Bank(bank) => {
                let indices = self.plan.indices(position);
                let rows: Vec<u32> = indices.iter().map(|&i| i as u32).collect();
                let rows = Tensor::from_vec(rows, indices.len(), bank.device())?;
                let epoch = position / self.plan.per_epoch().max(1);
                Ok((Batch { pixels: bank.index_select(&rows, 0)?, indices, epoch }, true))
            }
        }
    }

    /// One optimiser step.
    ///
    /// # Errors
    /// When an image cannot be read, an operation fails, or loss or gradients are not finite.
    pub fn step(&mut self, trainer: &mut Trainer<'_>, run: &mut Run) -> Result<StepRecord> {
        let step = run.state.step;
        let end = match (step + 1) % self.steps_per_epoch {
            0 => (step / self.steps_per_epoch + 1) * self.plan.per_epoch(),
            _ => self.position(step + 1),
        };
        let positions: Vec<usize> = (self.position(step)..end).collect();
        let sizes: usize = positions.iter().map(|&p| self.plan.indices(p).len()).sum();
        let mut sums = Accumulated::default();
        let (mut loss, mut epoch) = (0.0, 0);
        for position in positions {
            let (batch, features) = self.next(position)?;
            let weight = batch.indices.len() as f64 / sizes as f64;
            let references: Vec<&Example> = batch.indices.iter().map(|&i| &self.examples[i]).collect();
            let value = self.backward(trainer, &batch, features, &references, position, weight, &mut sums)?;
            if !value.is_finite() {
                return Err(non_finite("loss", step + 1, &references));
            }
            (loss, epoch) = (loss + value * weight, batch.epoch);
        }
        let mut grads = sums.take();
        let norm = global_norm(&grads)?;
        if !norm.is_finite() {
            let batch = self.plan.indices(self.position(step));
            return Err(non_finite("gradient", step + 1, &batch.iter().map(|&i| &self.examples[i]).collect::<Vec<_>>()));
        }
        if let Some(max) = trainer.config.clip_norm {
            clip(&mut grads, norm, max)?;
        }
        let lr = trainer.config.schedule.lr(trainer.config.lr, step, self.total);
        self.update(trainer, run, &grads, lr)?;
        run.state.step += 1;
        run.state.epoch_loss = (run.state.epoch_loss.0 + loss, run.state.epoch_loss.1 + 1);
        Ok(StepRecord { step: step + 1, epoch: epoch + 1, loss, lr, grad_norm: norm, images: sizes })
    }

    /// Forward and backward of a micro-batch; its gradients are added to `sums`.
    #[allow(clippy::too_many_arguments)]
    fn backward(
        &self,
        trainer: &mut Trainer<'_>,
        batch: &Batch,
        is_features: bool,
        examples: &[&Example],
        position: usize,
        weight: f64,
        sums: &mut Accumulated,
    ) -> Result<f64> {
        let clip = trainer.clip();
        let seed = trainer.config.seed;
        trainer.adapters.patches.prepare(&Step { training: true, seed, step: position as u64 })?;
        let patches = &trainer.adapters.patches;
        let features = if is_features {
            batch.pixels.clone()
        } else {
            let pixels = batch.pixels.to_device(clip.device())?.to_dtype(clip.dtype())?;
            let keep = self.kept_patches(trainer, batch.indices.len(), position)?;
            clip.vision().forward(&pixels, keep.as_ref(), patches)?
        };
        let on = Forward { clip, patches, training: true, epoch: batch.epoch };
        let mut loss = trainer.task.loss(&on, &features, examples)?;
        if let Some(term) = patches.regulariser()? {
            loss = (loss + term.to_dtype(DType::F32)?)?;
        }
        let value = f64::from(loss.to_dtype(DType::F32)?.to_scalar::<f32>()?);
        if value.is_finite() {
            sums.add(&trainer.adapters.params, &loss.backward()?, weight)?;
        }
        Ok(value)
    }

    /// [B, K] u32: the patches that stay, sorted, drawn anew for each image.
    fn kept_patches(&self, trainer: &Trainer<'_>, count: usize, position: usize) -> Result<Option<Tensor>> {
        let Some(dropout) = &trainer.config.patch_dropout else { return Ok(None) };
        let until = dropout.until * self.position(self.total) as f64;
        let patches = trainer.clip().vision().patch_count();
        let keep = ((patches as f64 * (1.0 - dropout.fraction)).round() as usize).max(1);
        if position as f64 >= until || keep == patches {
            return Ok(None);
        }
        let mut rng = rng::rng(trainer.config.seed, &[rng::name_key("patches"), position as u64]);
        let mut all: Vec<u32> = (0..patches as u32).collect();
        let mut kept = Vec::with_capacity(count * keep);
        for _ in 0..count {
            let (chosen, _) = all.partial_shuffle(&mut rng, keep);
            chosen.sort_unstable();
            kept.extend_from_slice(chosen);
        }
        Ok(Some(Tensor::from_vec(kept, (count, keep), trainer.clip().device())?))
    }

    fn update(&self, trainer: &mut Trainer<'_>, run: &mut Run, grads: &[Option<Tensor>], lr: f64) -> Result<()> {
        let params = &trainer.adapters.params;
        run.optimizer.step(params, grads, lr)?;
        if let Some(scale) = params.get("logit_scale") {
            scale.var.set(&scale.var.as_tensor().detach().clamp(0.0, MAX_LOGIT_SCALE)?)?;
        }
        if let Some(ema) = &mut run.ema {
            ema.update(params, run.state.step)?;
        }
        let named = by_name(params, grads);
        for patch in trainer.adapters.patches.iter_mut() {
            patch.after_backward(run.state.step, self.total, &named)?;
        }
        Ok(())
    }
}

fn non_finite(what: &str, step: usize, examples: &[&Example]) -> Error {
    const SHOWN: usize = 8;
    let mut ids: Vec<&str> = examples.iter().take(SHOWN).map(|e| e.id.as_str()).collect();
    if examples.len() > SHOWN {
        ids.push("…");
    }
    Error::fault(format!("step {step}"), format!("the {what} is not finite; the batch holds {}", ids.join(", ")))
        .hint("the last checkpoint is kept; lower train.lr, set train.clip_norm, or look at these files")
}
