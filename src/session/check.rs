//! `peft train --check`: what a run would take, before it starts.

use candle_core::{DType, Device, Tensor};
use peft_adapters::{ClassName, Step};

use super::{Session, tell};
use crate::clip::TextBatch;
use crate::data::{Dataset, Split};
use crate::delta::Adapters;
use crate::error::{Error, Result};
use crate::estimate::{Estimate, Load, estimate};
use crate::memory::{Available, available};
use crate::recipe::Recipe;
use crate::task::{Definition, Pad, Task};
use crate::train::{Dtype, Event, Micro, Observer, TrainConfig};

/// What `peft train --check` finds.
#[derive(Debug, serde::Serialize)]
pub struct Checked {
    /// The recipe with every default written out.
    pub recipe: Recipe,
    /// Examples in train, val and test.
    pub examples: [usize; 3],
    /// Whether the training rows are streamed.
    pub streamed: bool,
    /// Class names in label order.
    pub classes: Vec<String>,
    /// Numbers that would be trained.
    pub trainable_parameters: usize,
    /// Numbers of the base and of what is added to it.
    pub total_parameters: usize,
    /// Optimiser steps.
    pub steps: usize,
    /// Texts that go through the text tower in a training step: the class prompts, and with `cocoop` all of them for each image.
    pub texts_per_step: usize,
    /// Bytes of memory by what they are for.
    pub memory: Estimate,
    /// What the machine, its control groups and limits leave; not told on every system.
    pub available: Option<Available>,
    /// Whether it suffices.
    pub verdict: Verdict,
    /// What `train.auto_batch` would make of batch and accumulate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro: Option<Micro>,
}

/// Whether a run's memory is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It is.
    Fits,
    /// Less than an estimate's error is left.
    Tight,
    /// It is not.
    TooLarge,
    /// The system does not say, or the activations are on a device.
    Unknown,
}

impl Verdict {
    /// How far estimates may be off, as a share of what a run takes.
    const ERROR: f64 = 0.15;

    fn of(memory: &Estimate, available: Option<&Available>, device: &Device) -> Self {
        let Some(available) = available.filter(|_| device.is_cpu()) else { return Self::Unknown };
        let (needed, there) = (memory.total() as f64, available.bytes as f64);
        match () {
            () if needed > there => Self::TooLarge,
            () if needed * (1.0 + Self::ERROR) > there => Self::Tight,
            () => Self::Fits,
        }
    }
}

/// `peft train --check`: everything that needs no training; nothing is written.
///
/// # Errors
/// As [`train`].
pub fn check(recipe: Recipe, device: &Device, observer: &mut dyn Observer) -> Result<Checked> {
    let session = Session::to_train(recipe, device, observer)?;
    let (mut adapters, task) = session.plan()?;
    tell(&adapters, observer);
    let total_parameters = session.total_parameters(&adapters);
    let trainable_parameters = adapters.params.count();
    let micro = session.fitting(&mut adapters, &*task, observer)?;
    let load = session.load(&mut adapters)?;
    let memory = session.memory(&adapters, load, micro);
    let available = available();
    let texts_per_step = session.texts(&adapters, micro.batch);
    let steps = session.trainer(&mut adapters, task)?.total_steps();
    adapters.check_steps(steps)?;
    let data = &session.data;
    Ok(Checked {
        examples: [Split::Train, Split::Val, Split::Test].map(|s| data.count(s)),
        streamed: data.stream.is_some(),
        classes: data.classes.clone(),
        trainable_parameters,
        total_parameters,
        steps,
        texts_per_step,
        memory,
        verdict: Verdict::of(&memory, available.as_ref(), device),
        available,
        micro: (micro != Micro::of(&session.recipe.train)).then_some(micro),
        recipe: session.recipe,
    })
}

impl Session {
    /// Texts that go through the text tower with a micro-batch.
    fn texts(&self, adapters: &Adapters, batch: usize) -> usize {
        let each = self.recipe.task.definition().texts_per_batch(self.data.classes.len(), batch);
        each * if adapters.view.per_image() { batch } else { 1 }
    }

    /// What a run with these micro-batches takes.
    fn memory(&self, adapters: &Adapters, load: Load, micro: Micro) -> Estimate {
        let train = TrainConfig { batch: micro.batch, accumulate: micro.accumulate, ..self.recipe.train.clone() };
        estimate(self.base.clip.config(), adapters, &train, Load { texts: self.texts(adapters, micro.batch), ..load })
    }

    /// The recipe's micro-batches, or with `train.auto_batch` the largest that memory suffices for: on a CPU there is no
    /// error to come back from, so it has to be known beforehand.
    ///
    /// # Errors
    /// When the loss is over the whole batch, so that splitting would change it.
    pub fn fitting(&self, adapters: &mut Adapters, task: &dyn Task, observer: &mut dyn Observer) -> Result<Micro> {
        let wanted = Micro::of(&self.recipe.train);
        if !self.recipe.train.auto_batch {
            return Ok(wanted);
        }
        if task.over_batch() {
            return Err(Error::input("train.auto_batch", "would change the loss, in which the examples of a batch depend on each other")
                .hint("leave it out; train.grad_cache and train.checkpointing bound memory and leave the loss as it is"));
        }
        let device = self.base.clip.device();
        let Some(there) = available().filter(|_| device.is_cpu()) else { return Ok(wanted) };
        let load = self.load(adapters)?;
        let suffices = |m: Micro| Verdict::of(&self.memory(adapters, load, m), Some(&there), device) == Verdict::Fits;
        let micro = wanted.fitting(suffices);
        if micro != wanted {
            let mib = there.bytes >> 20;
            observer.event(Event::Warning(format!("{mib} MiB of memory are left ({}), too few for {wanted}; now {micro}", there.bound)));
        }
        Ok(micro)
    }

    /// What there is of everything while training, learnt tokens included.
    fn load(&self, adapters: &mut Adapters) -> Result<Load> {
        let replaced = self.replaced(adapters).iter().map(|t| t.elem_count()).sum();
        let (clip, view) = (&self.base.clip, &mut adapters.view);
        view.prepare(&Step::eval())?;
        let (height, width) = self.images.size();
        let blank = Tensor::zeros((1, 3, height, width), DType::F32, &Device::Cpu)?;
        let longest = self.longest_text(self.base.tokenizer.context())?;
        // Of the longest text: how many tokens a method makes of it.
        let (words, config) = (longest.saturating_sub(1).max(1), &clip.config().text);
        let mut ids = vec![config.pad_token_id; words];
        ids.push(config.eos_token_id);
        let name = ClassName { class: 0, start: 1.min(words as u32), len: words as u32 - 1 };
        let text = TextBatch { pool: vec![words as u32], ..TextBatch::new(&[ids], None, config, clip.device())? };
        Ok(Load {
            texts: 0,
            tokens: clip.text_trunk(&text.with_names(vec![name]), 0, view)?.x.dim(1)?,
            image_tokens: clip.image_trunk(&blank, 1, view)?.x.dim(1)?,
            images: self.data.count(Split::Train) + self.data.val.len(),
            constant: self.data.stream.is_none() && self.recipe.train.augment.is_none() && self.recipe.train.patch_dropout.is_none(),
            replaced,
            mapped: crate::alloc::mapped() as u64,
            composed: !clip.device().is_cpu() || self.recipe.train.dtype != Dtype::F32,
        })
    }

    /// Tokens of the longest text, at most `context`.
    fn longest_text(&self, context: usize) -> Result<usize> {
        let definition = self.recipe.task.definition();
        let (mut texts, pad) = definition.texts(&self.data.classes, &[]);
        if texts.is_empty() {
            texts = longest(&self.data, definition)?;
        }
        if pad == Pad::Max {
            return Ok(context);
        }
        let (ids, _) = self.base.tokenizer.encode_all(&texts)?;
        Ok(ids.iter().map(Vec::len).max().unwrap_or(0))
    }
}

/// Texts of the training split, one of which is the longest.
fn longest(data: &Dataset, task: &dyn Definition) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    data.visit(Split::Train, &mut |part| {
        texts.extend(task.texts(&[], part).0);
        // Of a stream only those that may be the longest are kept: a token has at least a byte, and seldom more than eight.
        if data.stream.is_some() {
            let most = texts.iter().map(String::len).max().unwrap_or(0);
            texts.retain(|t| t.len() * 8 >= most);
            texts.sort_by_key(|t| std::cmp::Reverse(t.len()));
            texts.truncate(1024);
        }
        Ok(())
    })?;
    Ok(texts)
}
