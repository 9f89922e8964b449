//! `peft train --check`: what a run would take, before it starts.

use candle_core::{DType, Device, Tensor};
use peft_adapters::{ClassName, Step};

use super::Session;
use crate::clip::TextBatch;
use crate::data::{Dataset, Split};
use crate::delta::Adapters;
use crate::error::Result;
use crate::estimate::{Estimate, Load, estimate};
use crate::recipe::Recipe;
use crate::task::{Definition, Pad};
use crate::train::Observer;

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
}

/// `peft train --check`: everything that needs no training; nothing is written.
///
/// # Errors
/// As [`train`].
pub fn check(recipe: Recipe, device: &Device, observer: &mut dyn Observer) -> Result<Checked> {
    let session = Session::open(recipe, device, observer)?;
    let (mut adapters, task) = session.plan()?;
    let total_parameters = session.total_parameters(&adapters);
    let trainable_parameters = adapters.params.count();
    let train = &session.recipe.train;
    let texts = session.recipe.task.definition().texts_per_batch(session.data.classes.len(), train.batch)
        * if adapters.view.per_image() { train.batch } else { 1 };
    let load = session.load(&mut adapters, texts)?;
    let memory = estimate(session.base.clip.config(), &adapters, &session.recipe.train, load);
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
        texts_per_step: texts,
        memory,
        recipe: session.recipe,
    })
}

impl Session {
    /// What there is of everything while training, learnt tokens included.
    fn load(&self, adapters: &mut Adapters, texts: usize) -> Result<Load> {
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
            texts,
            tokens: clip.text_trunk(&text.with_names(vec![name]), 0, view)?.x.dim(1)?,
            image_tokens: clip.image_trunk(&blank, 1, view)?.x.dim(1)?,
            images: self.data.count(Split::Train) + self.data.val.len(),
            replaced,
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
