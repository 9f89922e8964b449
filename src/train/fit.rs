//! Methods that look at data: filled before the first step, tuned after the last, on training and validation examples.

use candle_core::Tensor;
use peft_adapters::{Labelled, Patch, Step};

use super::observer::{Event, Observer};
use super::{Run, Trainer};
use crate::data::images::{Cached, Variation};
use crate::data::loader::load;
use crate::data::{Example, Split};
use crate::delta::Adapters;
use crate::error::{Error, Result};
use crate::optim::Ema;
use crate::task::Forward;

/// Augmented images that a training example's feature is the mean of, as many as Tip-Adapter's authors take.
const VIEWS: u64 = 10;

impl Trainer<'_> {
    /// Hands the training examples to the methods that want to see them; the test split is never shown.
    ///
    /// # Errors
    /// When the task has no classes, an image cannot be read, or a tensor operation fails.
    pub fn fit(&mut self, run: &mut Run, observer: &mut dyn Observer) -> Result<()> {
        self.look(Split::Train, observer, |patch, examples| patch.fit(examples))?;
        // An average that began before would remember the empty cache.
        run.ema = self.config.ema.map(|decay| Ema::new(decay, &self.adapters.params)).transpose()?;
        Ok(())
    }

    /// Hands the validation examples to the methods that choose hyper-parameters by them.
    ///
    /// # Errors
    /// As [`Trainer::fit`].
    pub fn tune(&mut self, observer: &mut dyn Observer) -> Result<()> {
        if self.data.val.is_empty() {
            if self.adapters.view.iter().skip(self.adapters.beneath).any(Patch::fits) {
                observer.event(Event::Note("there is no validation split, so nothing is searched on it".into()));
            }
            return Ok(());
        }
        self.look(Split::Val, observer, |patch, examples| patch.tune(examples))
    }

    /// Mean features of several augmented images of each training example, [N, P].
    fn views(&mut self, examples: &[Example], observer: &mut dyn Observer) -> Result<Tensor> {
        self.adapters.view.prepare(&Step::eval())?;
        let all: Vec<usize> = (0..examples.len()).collect();
        let mut parts = Vec::new();
        for indices in all.chunks(self.config.batch.max(64)) {
            let mut sum: Option<Tensor> = None;
            for epoch in 0..VIEWS {
                let vary = Variation { augment: &self.config.augment, seed: self.config.seed, epoch };
                let pixels = load(&self.images, examples, indices, Some(&vary), &Cached::none())?;
                let features = self.base.clip.image_features(&pixels, &self.adapters.view)?;
                sum = Some(match sum {
                    Some(sum) => (sum + features)?,
                    None => features,
                });
            }
            parts.extend(sum);
            observer.event(Event::Advance(indices.len()));
        }
        Ok((Tensor::cat(&parts, 0)? / VIEWS as f64)?)
    }

    fn look(
        &mut self,
        split: Split,
        observer: &mut dyn Observer,
        learn: impl Fn(&dyn Patch, &Labelled) -> candle_core::Result<Vec<(String, Tensor)>>,
    ) -> Result<()> {
        // What a bundle brought has looked before.
        let beneath = self.adapters.beneath;
        if !self.adapters.view.iter().skip(beneath).any(Patch::fits) {
            return Ok(());
        }
        let listed = self.listed(split, observer)?;
        let examples = &*listed;
        observer.event(Event::Phase("look", Some(examples.len())));
        let features = match split == Split::Train && !self.config.augment.is_none() {
            true => self.views(examples, observer)?,
            false => self.features.of(split, examples, &self.base.clip, &mut self.adapters.view, observer)?,
        };
        let Adapters { view, params, .. } = &mut *self.adapters;
        let on = Forward::eval(&self.base.clip, view);
        let labelled = self.task.labelled(&on, &features, examples)?.ok_or_else(|| {
            Error::input("method", "a method that looks at labelled examples needs class prompts that are the same for all images")
                .hint("task: { classify: { head: prompts } }, and no cocoop beside it")
        })?;
        for patch in view.iter().skip(beneath).filter(|p| p.fits()) {
            for (name, value) in learn(patch, &labelled)? {
                let param = params.get(&name).ok_or_else(|| Error::fault(&name, "is not among the planned parameters"))?;
                param.var.set(&value.to_dtype(param.var.dtype())?.to_device(param.var.device())?.contiguous()?)?;
            }
        }
        Ok(())
    }
}
