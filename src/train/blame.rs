//! After the fact: where the numbers of a step stopped being finite.

use candle_core::Tensor;
use peft_adapters::probe::{Found, Probe, non_finite_rows};
use peft_adapters::{Step, Tower};

use super::Trainer;
use super::step::{Feed, Input, Part, Scene, Stepper, listed};
use crate::clip::model::all_finite;
use crate::data::Example;
use crate::data::images::{Cached, Variation};
use crate::data::loader::load;
use crate::error::Result;

impl Stepper {
    /// What was not finite in a step, as part of a sentence: the loss of the micro-batch `lost`, or else one of `grads`.
    pub(super) fn blame(&self, trainer: &mut Trainer<'_>, lost: Option<&Part>, grads: &[Option<Tensor>]) -> Result<String> {
        match lost {
            Some(part) => Ok(format!("the loss is not finite, {}", self.first_place(trainer, part)?)),
            None => gradients(trainer, grads),
        }
    }

    /// Where the forward pass of a micro-batch stops being finite. It runs again, every value of it is read.
    fn first_place(&self, trainer: &mut Trainer<'_>, part: &Part) -> Result<String> {
        for param in trainer.adapters.params.iter() {
            if !all_finite(&param.var.as_tensor().detach())? {
                return Ok(format!("since the parameter `{}` no longer is", param.name));
            }
        }
        let Some(input) = self.again(trainer, part)? else {
            return Ok("and the batch was streamed, so that it cannot be looked at again".into());
        };
        if let Input::Pixels(pixels) = &input {
            let rows = non_finite_rows(pixels)?;
            if !rows.is_empty() {
                return Ok(format!("since pixels of {} are not", names(&rows, &part.examples)));
            }
        }
        Ok(match self.probed(trainer, input, part)? {
            Some(found) => told(trainer, &found, part),
            None => "though everything in both towers is".into(),
        })
    }

    fn probed(&self, trainer: &mut Trainer<'_>, input: Input, part: &Part) -> Result<Option<Found>> {
        let Trainer { base, adapters, task, config, features, .. } = trainer;
        let probe = Probe::default();
        adapters.patches.push(Box::new(probe.clone()));
        let passed = adapters.patches.prepare(&Step { training: true, seed: config.seed, step: part.position as u64 });
        let passed = passed.map_err(Into::into).and_then(|()| {
            let tape = config.tape();
            let constant = features.text();
            let scene = Scene { clip: &base.clip, patches: &adapters.patches, constant, tape: tape.as_ref(), config, task: &mut **task };
            self.loss(scene, input, part).map(|_| ())
        });
        adapters.patches.pop();
        passed.map(|()| probe.found())
    }

    /// The micro-batch once more.
    fn again(&self, trainer: &Trainer<'_>, part: &Part) -> Result<Option<Input>> {
        let indices = self.plan.indices(part.position);
        match &self.feed {
            Feed::Images(_) if self.examples.is_empty() => Ok(None),
            Feed::Images(_) => {
                let vary = Variation { augment: &trainer.config.augment, seed: self.plan.seed, epoch: part.epoch as u64 };
                load(&trainer.images, &self.examples, &indices, Some(&vary), &Cached::none()).map(|p| Some(Input::Pixels(p)))
            }
            _ => self.constant(&indices, &trainer.base.clip),
        }
    }
}

/// The gradient nearest to the loss that is not finite: from there it spreads.
fn gradients(trainer: &Trainer<'_>, grads: &[Option<Tensor>]) -> Result<String> {
    let params = &trainer.adapters.params;
    let mut bad = Vec::new();
    for (param, grad) in params.iter().zip(grads) {
        if let Some(grad) = grad
            && !all_finite(grad)?
        {
            bad.push(param.name.as_str());
        }
    }
    Ok(match bad.as_slice() {
        [] => "the gradients' norm is too large for a float".into(),
        [.., last] => {
            format!("the gradient of `{last}` is not finite, {} of {} parameters' are not", bad.len(), params.len())
        }
    })
}

fn told(trainer: &Trainer<'_>, found: &Found, part: &Part) -> String {
    let site = trainer.base.clip.sites().site(found.site);
    let place = format!("from the {} of `{}` on", found.what, site.path);
    // Rows of the image tower are the batch's images, unless it went through in groups.
    if site.tower != Tower::Vision || found.of != part.examples.len() || found.rows.len() == found.of {
        return format!("{place}, in {} of {} rows", found.rows.len(), found.of);
    }
    format!("{place}, for {}", names(&found.rows, &part.examples))
}

fn names(rows: &[usize], examples: &[Example]) -> String {
    let ids: Vec<String> = rows.iter().filter_map(|&r| examples.get(r)).map(|e| e.id.clone()).collect();
    listed(&ids)
}
