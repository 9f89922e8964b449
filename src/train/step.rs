//! One optimiser step: batches, loss, gradients, update.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use peft_adapters::{Patches, Step, Tape, rng};
use rand::seq::SliceRandom;

use super::observer::{Event, Observer, StepRecord};
use super::{Bank, Run, Trainer, by_name};
use crate::clip::{Clip, Encoded, Trunk};
use crate::data::loader::LoaderConfig;
use crate::data::{Batch, Example, Loader, Plan, Split};
use crate::error::{Error, Result};
use crate::fusion::Pass;
use crate::optim::{Accumulated, clip_factor, global_norm};
use crate::task::{Forward, Needs};

/// CLIP's bound on the logit scale's logarithm, ln 100 (Radford et al. 2021, section 2.5).
const MAX_LOGIT_SCALE: f64 = 4.605_170_185_988_092;

/// Where batches come from.
enum Feed {
    /// Images, decoded ahead.
    Images(Loader),
    /// Features that never change, [N, P].
    Bank(Tensor),
    /// What enters the first trained block, where that never changes.
    Trunk(Arc<Bank>),
}

/// What a batch holds, [B, …].
enum Input {
    Pixels(Tensor),
    Trunk(Trunk),
    Features(Tensor),
}

impl Input {
    /// Through what is left of the image tower.
    fn encode<'a>(
        self,
        clip: &'a Clip,
        keep: Option<&Tensor>,
        patches: &'a Patches,
        tape: Option<&Tape<'a>>,
        tokens: bool,
    ) -> Result<Encoded> {
        if let Self::Features(features) = self {
            return Ok(Encoded::pooled(features));
        }
        if tokens {
            let trunk = match self {
                Self::Pixels(pixels) => clip.image_entrance(pixels, keep, patches)?,
                Self::Trunk(trunk) => trunk,
                Self::Features(_) => return Err(Error::fault("step", "features have no tokens")),
            };
            return Ok(clip.image_tokens_from(&trunk, patches, tape)?);
        }
        Ok(Encoded::pooled(match self {
            Self::Pixels(pixels) => clip.image_features_on(pixels, keep, patches, tape)?,
            Self::Trunk(trunk) => clip.image_features_from(&trunk, patches, tape)?,
            Self::Features(features) => features,
        }))
    }
}

/// The part of a step that goes forward and backward at once.
struct MicroBatch {
    input: Input,
    examples: Vec<Example>,
    epoch: usize,
    /// Counts micro-batches from the start of training.
    position: usize,
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
    /// Why images were left out, from batches of epoch 0, which sees each image once.
    skipped: Vec<String>,
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
        let stream = trainer.data.stream.clone().filter(|s| s.is_fixed() || !trainer.can_keep_features());
        let examples = Arc::new(match &stream {
            Some(_) => Vec::new(),
            None => trainer.listed(Split::Train, observer)?.into_owned(),
        });
        let mut stepper = Self {
            feed: Feed::Bank(Tensor::zeros(0, DType::F32, &candle_core::Device::Cpu)?),
            total,
            steps_per_epoch,
            accumulate: config.accumulate,
            examples: examples.clone(),
            plan: plan.clone(),
            waited: 0.0,
            skipped: Vec::new(),
        };
        let constant = if stream.is_none() { constant(trainer, &examples, observer)? } else { None };
        stepper.feed = match constant {
            Some(feed) => feed,
            None => {
                let loader = LoaderConfig { examples, images: trainer.images.clone(), augment: config.augment.clone(), plan, stream };
                Feed::Images(Loader::start(loader, stepper.position(done), stepper.position(total)))
            }
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

    /// Why images were left out since the last call.
    pub fn take_skipped(&mut self) -> Vec<String> {
        std::mem::take(&mut self.skipped)
    }

    /// The first micro-batch of a step, counted from the start of training.
    fn position(&self, step: usize) -> usize {
        let (epoch, at) = (step / self.steps_per_epoch, step % self.steps_per_epoch);
        epoch * self.plan.per_epoch() + at * self.accumulate
    }

    fn next(&mut self, position: usize, trainer: &Trainer<'_>) -> Result<MicroBatch> {
        let start = std::time::Instant::now();
        let next = self.fetch(position, trainer);
        self.waited += start.elapsed().as_secs_f64();
        next
    }

    fn fetch(&mut self, position: usize, trainer: &Trainer<'_>) -> Result<MicroBatch> {
        let plan = &self.plan;
        let clip = trainer.clip();
        let (input, indices) = match &mut self.feed {
            Feed::Images(loader) => {
                let batch = loader.next_batch()?.ok_or_else(|| Error::fault("loader", "ended before the last step"))?;
                let Batch { pixels, examples, epoch, skipped } = batch;
                if epoch == 0 {
                    self.skipped.extend(skipped);
                }
                return Ok(MicroBatch { input: Input::Pixels(pixels), examples, epoch, position });
            }
            Feed::Bank(bank) => {
                let indices = plan.indices(position);
                let rows: Vec<u32> = indices.iter().map(|&i| i as u32).collect();
                let rows = Tensor::from_vec(rows, indices.len(), bank.device())?;
                (Input::Features(bank.index_select(&rows, 0)?), indices)
            }
            Feed::Trunk(bank) => {
                let indices = plan.indices(position);
                (Input::Trunk(bank.trunk(&indices, clip)?), indices)
            }
        };
        let examples = indices.iter().map(|&i| self.examples[i].clone()).collect();
        Ok(MicroBatch { input, examples, epoch: position / plan.per_epoch().max(1), position })
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
        let sizes: usize = positions.iter().map(|&p| self.plan.size(p)).sum();
        let mut sums = Accumulated::default();
        let (mut loss, mut epoch, mut seen) = (0.0, 0, Vec::new());
        for position in positions {
            let batch = self.next(position, trainer)?;
            // Of what it was meant to have: images that were left out change no other batch's weight.
            let weight = self.plan.size(position) as f64 / sizes as f64;
            epoch = batch.epoch;
            seen.extend(batch.examples.iter().map(|e| e.id.clone()));
            let value = self.backward(trainer, batch, weight, &mut sums)?;
            if !value.is_finite() {
                return Err(non_finite("loss", step + 1, &seen));
            }
            loss += value * weight;
        }
        let grads = sums.take();
        let norm = global_norm(&grads)?;
        if !norm.is_finite() {
            return Err(non_finite("gradient", step + 1, &seen));
        }
        let scale = trainer.config.clip_norm.map_or(1.0, |max| clip_factor(norm, max));
        let lr = trainer.config.schedule.lr(trainer.config.lr, step, self.total);
        self.update(trainer, run, &grads, lr, scale)?;
        run.state.step += 1;
        run.state.epoch_loss = (run.state.epoch_loss.0 + loss, run.state.epoch_loss.1 + 1);
        Ok(StepRecord { step: step + 1, epoch: epoch + 1, loss, lr, grad_norm: norm, images: sizes })
    }

    /// Forward and backward of a micro-batch; `weight` times its gradients are added to `sums`.
    fn backward(&self, trainer: &mut Trainer<'_>, batch: MicroBatch, weight: f64, sums: &mut Accumulated) -> Result<f64> {
        let MicroBatch { input, examples, epoch, position } = batch;
        let clip = trainer.clip();
        let seed = trainer.config.seed;
        trainer.adapters.patches.prepare(&Step { training: true, seed, step: position as u64 })?;
        let patches = &trainer.adapters.patches;
        let tape = trainer.config.tape();
        let keep = match input {
            Input::Pixels(_) => self.kept_patches(trainer, examples.len(), position)?,
            _ => None,
        };
        let images = input.encode(clip, keep.as_ref(), patches, tape.as_ref(), trainer.task.needs() == Needs::Tokens)?;
        let pass = Pass { training: true, seed, position: position as u64 };
        let on = Forward { clip, patches, epoch, pass, tape: tape.as_ref() };
        let mut loss = trainer.task.loss(&on, &images, &examples.iter().collect::<Vec<_>>())?;
        if let Some(term) = patches.regulariser()? {
            loss = (loss + term.to_dtype(DType::F32)?)?;
        }
        let value = f64::from(loss.to_dtype(DType::F32)?.to_scalar::<f32>()?);
        if value.is_finite() {
            let params = &trainer.adapters.params;
            tape.unwrap_or_default().backward(&loss, |grads| sums.add(params, grads, weight))?;
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

    fn update(&self, trainer: &mut Trainer<'_>, run: &mut Run, grads: &[Option<Tensor>], lr: f64, scale: f64) -> Result<()> {
        let params = &trainer.adapters.params;
        run.optimizer.step(params, grads, lr, scale)?;
        if let Some(scale) = params.get("logit_scale") {
            scale.var.set(&scale.var.as_tensor().detach().clamp(0.0, MAX_LOGIT_SCALE)?)?;
        }
        if let Some(ema) = &mut run.ema {
            ema.update(params, run.state.step)?;
        }
        let named = by_name(params, grads, scale);
        for patch in trainer.adapters.patches.iter_mut().skip(trainer.adapters.beneath) {
            patch.after_backward(run.state.step + 1, self.total, &named)?;
        }
        Ok(())
    }
}

/// What stands in for images, where something before the trained part is the same in every epoch.
fn constant(trainer: &mut Trainer<'_>, examples: &[Example], observer: &mut dyn Observer) -> Result<Option<Feed>> {
    if trainer.task.needs() == Needs::Nothing {
        let device = trainer.base.clip.device();
        return Ok(Some(Feed::Bank(Tensor::zeros((examples.len(), 1), DType::F32, device)?)));
    }
    if !trainer.config.augment.is_none() || trainer.config.patch_dropout.is_some() {
        return Ok(None);
    }
    let (clip, view) = (&trainer.base.clip, &mut trainer.adapters.view);
    if trainer.features.kept() {
        observer.event(Event::Phase("features", Some(examples.len())));
        return Ok(Some(Feed::Bank(trainer.features.of(Split::Train, examples, clip, view, observer)?)));
    }
    Ok(trainer.features.trunk(Split::Train, examples, clip, view, observer)?.map(Feed::Trunk))
}

fn non_finite(what: &str, step: usize, examples: &[String]) -> Error {
    const SHOWN: usize = 8;
    let mut ids: Vec<&str> = examples.iter().take(SHOWN).map(String::as_str).collect();
    if examples.len() > SHOWN {
        ids.push("…");
    }
    Error::fault(format!("step {step}"), format!("the {what} is not finite; the batch holds {}", ids.join(", ")))
        .hint("the last checkpoint is kept; lower train.lr, set train.clip_norm, or look at these files")
}
