//! One optimiser step: batches, loss, gradients, update.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use peft_adapters::{Patches, Step, Tape, rng};
use rand::seq::SliceRandom;

use super::health::{Health, MOST_IN_A_ROW, OnNonFinite, Verdict};
use super::idle;
use super::observer::{Event, Observer, StepRecord};
use super::{Bank, Run, TrainConfig, Trainer, by_name};
use crate::clip::{Clip, ConstantText, Encoded, Trunk};
use crate::data::loader::LoaderConfig;
use crate::data::{Batch, Example, Loader, Plan, Split};
use crate::error::{Error, Result};
use crate::fusion::Pass;
use crate::optim::{Accumulated, clip_factor, global_norm};
use crate::task::{Forward, Needs, Task};

/// CLIP's bound on the logit scale's logarithm, ln 100 (Radford et al. 2021, section 2.5).
const MAX_LOGIT_SCALE: f64 = 4.605_170_185_988_092;

/// Steps that were left out are told one by one up to this number.
const SHOWN: usize = 5;

/// Where batches come from.
pub(super) enum Feed {
    /// Images, decoded ahead.
    Images(Loader),
    /// Features that never change, [N, P].
    Bank(Tensor),
    /// What enters the first trained block, where that never changes.
    Trunk(Arc<Bank>),
}

/// What a batch holds, [B, …].
pub(super) enum Input {
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
    part: Part,
}

/// Which part it is.
pub(super) struct Part {
    pub(super) examples: Vec<Example>,
    pub(super) epoch: usize,
    /// Counts micro-batches from the start of training.
    pub(super) position: usize,
}

/// What a forward pass needs of a trainer.
pub(super) struct Scene<'t, 'p> {
    pub(super) clip: &'t Clip,
    pub(super) patches: &'t Patches,
    pub(super) constant: ConstantText,
    pub(super) tape: Option<&'p Tape<'t>>,
    pub(super) config: &'p TrainConfig,
    pub(super) task: &'p mut dyn Task,
}

/// What the forward and backward passes of a step give.
struct Passed {
    loss: f64,
    epoch: usize,
    images: usize,
    sums: Accumulated,
    ids: Vec<String>,
    /// The first micro-batch whose loss is not finite.
    lost: Option<Part>,
}

/// Makes steps.
pub struct Stepper {
    pub(super) plan: Plan,
    pub(super) feed: Feed,
    total: usize,
    steps_per_epoch: usize,
    accumulate: usize,
    /// Of the split; none where it is streamed.
    pub(super) examples: Arc<Vec<Example>>,
    waited: f64,
    /// Why images were left out, from batches of epoch 0, which sees each image once.
    skipped: Vec<String>,
    /// What a watcher should know.
    warnings: Vec<String>,
    /// Whether the step under way has begun to change weights.
    updating: bool,
}

impl Stepper {
    /// Starts after `done` of `total` steps.
    ///
    /// # Errors
    /// When features cannot be computed.
    pub fn new(trainer: &mut Trainer<'_>, done: usize, total: usize, observer: &mut dyn Observer) -> Result<Self> {
        let plan = trainer.plan();
        let config = trainer.config;
        let steps_per_epoch = trainer.micro.steps(plan.per_epoch());
        let stream = trainer.data.stream.clone().filter(|s| s.is_fixed() || !trainer.can_keep_features());
        let examples = Arc::new(match &stream {
            Some(_) => Vec::new(),
            None => trainer.listed(Split::Train, observer)?.into_owned(),
        });
        let mut stepper = Self {
            feed: Feed::Bank(Tensor::zeros(0, DType::F32, &candle_core::Device::Cpu)?),
            total,
            steps_per_epoch,
            accumulate: trainer.micro.accumulate,
            examples: examples.clone(),
            plan: plan.clone(),
            waited: 0.0,
            skipped: Vec::new(),
            warnings: Vec::new(),
            updating: false,
        };
        let constant = if stream.is_none() { constant(trainer, &examples, observer)? } else { None };
        stepper.feed = match constant {
            Some(feed) => feed,
            None => {
                let loader = LoaderConfig { examples, images: trainer.images.clone(), augment: config.augment.clone(), plan, stream };
                Feed::Images(Loader::start(loader, stepper.position(done), stepper.position(total))?)
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

    /// What is worth a warning since the last call.
    pub fn take_warnings(&mut self) -> Vec<String> {
        std::mem::take(&mut self.warnings)
    }

    /// Whether a step that failed has left everything as it was.
    pub(super) fn untouched(&self) -> bool {
        !self.updating
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
        if let Feed::Images(loader) = &mut self.feed {
            let batch = loader.next_batch()?.ok_or_else(|| Error::fault("loader", "ended before the last step"))?;
            let Batch { pixels, examples, epoch, skipped } = batch;
            if epoch == 0 {
                self.skipped.extend(skipped);
            }
            return Ok(MicroBatch { input: Input::Pixels(pixels), part: Part { examples, epoch, position } });
        }
        let indices = self.plan.indices(position);
        let input = self.constant(&indices, trainer.clip())?.ok_or_else(|| Error::fault("step", "nothing is kept of images"))?;
        let examples = indices.iter().map(|&i| self.examples[i].clone()).collect();
        Ok(MicroBatch { input, part: Part { examples, epoch: position / self.plan.per_epoch().max(1), position } })
    }

    /// What is kept of these examples between epochs, if anything is.
    pub(super) fn constant(&self, indices: &[usize], clip: &Clip) -> Result<Option<Input>> {
        Ok(match &self.feed {
            Feed::Images(_) => None,
            Feed::Bank(bank) => {
                let rows: Vec<u32> = indices.iter().map(|&i| i as u32).collect();
                let rows = Tensor::from_vec(rows, indices.len(), bank.device())?;
                Some(Input::Features(bank.index_select(&rows, 0)?))
            }
            Feed::Trunk(bank) => Some(Input::Trunk(bank.trunk(indices, clip)?)),
        })
    }

    /// One optimiser step.
    ///
    /// # Errors
    /// When an image cannot be read, an operation fails, or loss or gradients are not finite and the recipe does not say that
    /// such steps are left out.
    pub fn step(&mut self, trainer: &mut Trainer<'_>, run: &mut Run) -> Result<StepRecord> {
        let step = run.state.step;
        let factor = run.state.health.factor();
        let Passed { loss, epoch, images, mut sums, ids, lost } = self.passes(trainer, step, factor)?;
        let grads = sums.take();
        if step == 0 && lost.is_none() {
            self.warnings.extend(idle::warning(&trainer.adapters.params, &grads));
        }
        let norm = if lost.is_some() { f64::NAN } else { global_norm(&grads)? };
        let lr = trainer.config.schedule.lr(trainer.config.lr, step, self.total);
        let health = &mut run.state.health;
        let verdict = health.judge(loss, norm);
        match verdict {
            Verdict::Sound => {
                self.warnings.extend(health.follow(step + 1, loss));
                let scale = trainer.config.clip_norm.map_or(1.0, |max| clip_factor(norm, max));
                self.updating = true;
                self.update(trainer, run, &grads, lr, scale)?;
                self.updating = false;
            }
            Verdict::Overflow => {}
            Verdict::NonFinite => {
                let why = self.blame(trainer, lost.as_ref(), &grads)?;
                self.leave_out(trainer.config, run, &why, &ids)?;
            }
        }
        run.state.step += 1;
        if loss.is_finite() {
            run.state.epoch_loss = (run.state.epoch_loss.0 + loss, run.state.epoch_loss.1 + 1);
        }
        Ok(StepRecord { step: step + 1, epoch: epoch + 1, loss, lr, grad_norm: norm, skipped: verdict != Verdict::Sound, images })
    }

    /// Forward and backward through all micro-batches of a step; after a loss that is not finite they are only passed over.
    fn passes(&mut self, trainer: &mut Trainer<'_>, step: usize, factor: f64) -> Result<Passed> {
        let end = match (step + 1) % self.steps_per_epoch {
            0 => (step / self.steps_per_epoch + 1) * self.plan.per_epoch(),
            _ => self.position(step + 1),
        };
        let positions: Vec<usize> = (self.position(step)..end).collect();
        let images: usize = positions.iter().map(|&p| self.plan.size(p)).sum();
        let mut all = Passed { loss: 0.0, epoch: 0, images, sums: Accumulated::default(), ids: Vec::new(), lost: None };
        for position in positions {
            let MicroBatch { input, part } = self.next(position, trainer)?;
            all.epoch = part.epoch;
            all.ids.extend(part.examples.iter().map(|e| e.id.clone()));
            if all.lost.is_some() {
                continue;
            }
            // Of what it was meant to have: images that were left out change no other batch's weight.
            let weight = self.plan.size(position) as f64 / images as f64;
            let value = self.backward(trainer, input, &part, (weight, factor), &mut all.sums)?;
            all.loss += value * weight;
            all.lost = (!value.is_finite()).then_some(part);
        }
        Ok(all)
    }

    /// Forward and backward of a micro-batch; `weight` times its gradients are added to `sums`. The loss is multiplied by
    /// `factor` on the way back.
    fn backward(
        &self,
        trainer: &mut Trainer<'_>,
        input: Input,
        part: &Part,
        (weight, factor): (f64, f64),
        sums: &mut Accumulated,
    ) -> Result<f64> {
        let Trainer { base, adapters, task, config, features, .. } = trainer;
        adapters.patches.prepare(&Step { training: true, seed: config.seed, step: part.position as u64 })?;
        let tape = config.tape();
        let constant = features.text();
        let scene = Scene { clip: &base.clip, patches: &adapters.patches, constant, tape: tape.as_ref(), config, task: &mut **task };
        let loss = self.loss(scene, input, part)?;
        let value = f64::from(loss.to_scalar::<f32>()?);
        if value.is_finite() {
            let loss = if factor == 1.0 { loss } else { (loss * factor)? };
            tape.unwrap_or_default().backward(&loss, |grads| sums.add(&adapters.params, grads, weight / factor))?;
        }
        Ok(value)
    }

    /// The loss of a micro-batch with what methods add to it, f32.
    pub(super) fn loss(&self, scene: Scene<'_, '_>, input: Input, part: &Part) -> Result<Tensor> {
        let Scene { clip, patches, constant, tape, config, task } = scene;
        let Part { examples, epoch, position } = part;
        let keep = match input {
            Input::Pixels(_) => self.kept_patches(config, clip, examples.len(), *position)?,
            _ => None,
        };
        let images = input.encode(clip, keep.as_ref(), patches, tape, task.needs() == Needs::Tokens)?;
        let pass = Pass { training: true, seed: config.seed, position: *position as u64 };
        let on = Forward { clip, patches, epoch: *epoch, pass, constant, tape };
        let loss = task.loss(&on, &images, &examples.iter().collect::<Vec<_>>())?.to_dtype(DType::F32)?;
        Ok(match patches.regulariser()? {
            Some(term) => (loss + term.to_dtype(DType::F32)?)?,
            None => loss,
        })
    }

    /// Goes on without a step, where the recipe says so and not too many in a row went the same way.
    fn leave_out(&mut self, config: &TrainConfig, run: &mut Run, why: &str, ids: &[String]) -> Result<()> {
        let (step, Health { in_a_row, numbers, .. }) = (run.state.step + 1, &run.state.health);
        let files = listed(ids);
        if config.on_nonfinite == OnNonFinite::Skip && *in_a_row < MOST_IN_A_ROW {
            if numbers.skipped_steps <= SHOWN {
                self.warnings.push(format!("step {step} is left out: {why}; the batch holds {files}"));
            }
            return Ok(());
        }
        let again = match *in_a_row {
            0 | 1 => String::new(),
            n => format!(", as in the {} steps before", n - 1),
        };
        run.lost = true;
        Err(Error::fault(format!("step {step}"), format!("{why}{again}; the batch holds {files}")).hint(
            "lower train.lr, set train.clip_norm, look at these files, or leave such steps out with `train.on_nonfinite: skip`; \
             `--resume` would come here again, but train.init_adapter can start from the run's adapter/",
        ))
    }

    /// [B, K] u32: the patches that stay, sorted, drawn anew for each image.
    fn kept_patches(&self, config: &TrainConfig, clip: &Clip, count: usize, position: usize) -> Result<Option<Tensor>> {
        let Some(dropout) = &config.patch_dropout else { return Ok(None) };
        let until = dropout.until * self.position(self.total) as f64;
        let patches = clip.vision().patch_count();
        let keep = ((patches as f64 * (1.0 - dropout.fraction)).round() as usize).max(1);
        if position as f64 >= until || keep == patches {
            return Ok(None);
        }
        let mut rng = rng::rng(config.seed, &[rng::name_key("patches"), position as u64]);
        let mut all: Vec<u32> = (0..patches as u32).collect();
        let mut kept = Vec::with_capacity(count * keep);
        for _ in 0..count {
            let (chosen, _) = all.partial_shuffle(&mut rng, keep);
            chosen.sort_unstable();
            kept.extend_from_slice(chosen);
        }
        Ok(Some(Tensor::from_vec(kept, (count, keep), clip.device())?))
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

/// The first few of these.
pub(super) fn listed(ids: &[String]) -> String {
    const SHOWN: usize = 8;
    let mut shown: Vec<&str> = ids.iter().take(SHOWN).map(String::as_str).collect();
    if ids.len() > SHOWN {
        shown.push("…");
    }
    shown.join(", ")
}
