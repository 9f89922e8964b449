//! Answers of tasks that judge an image and a text together.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor};
use peft_adapters::Params;

use super::Model;
use crate::clip::Encoded;
use crate::clip::base::Base;
use crate::data::{Example, ImageRef};
use crate::delta::{Delta, Manifest, class_order};
use crate::error::{Error, Result};
use crate::fusion::FusionConfig;
use crate::task::{Definition, Forward, Needs, Task, TaskConfig, TaskParts, Told};

/// What is to be judged.
#[derive(Debug, Clone, Default)]
pub struct Query {
    /// An image file.
    pub image: Option<PathBuf>,
    /// The text that may fit, or the post.
    pub text: Option<String>,
    /// What is asked about the image.
    pub question: Option<String>,
    /// What there is to choose from, where the question has its own choices.
    pub choices: Vec<String>,
}

impl Query {
    fn example(&self, index: usize) -> Example {
        Example {
            id: self.image.as_ref().map_or_else(|| format!("query {}", index + 1), |p| p.display().to_string()),
            image: self.image.clone().map_or(ImageRef::Missing, ImageRef::File),
            texts: self.text.clone().into_iter().collect(),
            question: self.question.clone(),
            choices: self.choices.clone(),
            ..Example::default()
        }
    }
}

/// A trained task: its head, its fusion, its thresholds.
#[derive(Clone)]
pub(super) struct Teller {
    needs: Needs,
    /// Tasks keep encoded texts, so they change while they answer.
    task: Arc<Mutex<Box<dyn Task>>>,
}

impl std::fmt::Debug for Teller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Teller({:?})", self.needs)
    }
}

/// The task that an adapter was trained for, where it answers by itself.
fn told(manifest: Option<&Manifest>) -> Option<TaskConfig> {
    let task: TaskConfig = serde_json::from_value(manifest?.task.clone()).ok()?;
    task.definition().tells().then_some(task)
}

impl Teller {
    /// The task of an adapter with the adapter's weights; `None` where it ranks labels.
    pub(super) fn of(delta: &Delta, base: &Base) -> Result<Option<Self>> {
        let Some((task, manifest)) = told(delta.manifest.as_ref()).zip(delta.manifest.as_ref()) else { return Ok(None) };
        let place = delta.dir.display();
        let fusion: Option<FusionConfig> = match &manifest.fusion {
            serde_json::Value::Null => None,
            value => Some(
                serde_json::from_value(value.clone())
                    .map_err(|e| Error::input(&place, format!("fusion in peft.json: {}", peft_adapters::wording::plain(&e.to_string()))))?,
            ),
        };
        let parts = TaskParts {
            clip: &base.clip,
            tokenizer: &base.tokenizer,
            classes: &manifest.classes,
            train: None,
            fusion: fusion.as_ref(),
            label_smoothing: 0.0,
            seed: 0,
        };
        if let Some(fusion) = &fusion {
            fusion.validate(&format!("{place}: fusion in peft.json"))?;
        }
        let mut params = Params::new(0, base.clip.device()).limited(delta.room());
        let definition: &dyn Definition = task.definition();
        let mut task = definition.build(&parts, &mut params).map_err(|e| delta.placed(e))?;
        delta.fill_own(&params)?;
        task.set_scalars(&manifest.scalars);
        Ok(Some(Self { needs: task.needs(), task: Arc::new(Mutex::new(task)) }))
    }

    fn with<R>(&self, run: impl FnOnce(&mut dyn Task) -> Result<R>) -> Result<R> {
        let mut task = self.task.lock().map_err(|_| Error::fault("predict", "another thread failed while it answered"))?;
        run(&mut **task)
    }
}

impl Model {
    /// Whether the adapter's task answers queries by itself ([`Model::tell`]) and does not rank labels.
    #[must_use]
    pub fn tells(&self) -> bool {
        self.teller.is_some()
    }

    /// Whether a query has what the adapter's task looks at besides an image.
    ///
    /// # Errors
    /// When it lacks something, or the task ranks labels.
    pub fn check_query(&self, query: &Query) -> Result<()> {
        self.teller()?.with(|task| task.check_query(&query.example(0)))
    }

    /// What the adapter's task says of each query: whether a text fits an image, the answer to a question, a number.
    ///
    /// # Errors
    /// When the task ranks labels, a query lacks what the task looks at, or an image cannot be read.
    pub fn tell(&self, queries: &[Query]) -> Result<Vec<Told>> {
        let teller = self.teller()?;
        let examples: Vec<Example> = queries.iter().enumerate().map(|(i, q)| q.example(i)).collect();
        let mut told = Vec::new();
        for chunk in examples.chunks(super::BATCH) {
            teller.with(|task| chunk.iter().try_for_each(|e| task.check_query(e)))?;
            let images = match teller.needs {
                Needs::Nothing => self.blind(chunk.len())?,
                needs => {
                    let read = |e: &Example| match &e.image {
                        ImageRef::File(path) => self.pixels_of(path),
                        _ => Err(Error::input(&e.id, "has no image").hint("this adapter looks at an image and a text")),
                    };
                    self.encode(chunk, read, needs)?
                }
            };
            told.extend(self.told(teller, &images, chunk)?);
        }
        Ok(told)
    }

    /// [`Model::tell`] for images in memory, one for each query.
    ///
    /// # Errors
    /// As [`Model::tell`].
    pub fn tell_pixels(&self, images: &[image::RgbImage], queries: &[Query]) -> Result<Vec<Told>> {
        let teller = self.teller()?;
        if images.len() != queries.len() {
            return Err(Error::input("queries", format!("expected one for each image, found {} for {}", queries.len(), images.len())));
        }
        let examples: Vec<Example> = queries.iter().enumerate().map(|(i, q)| q.example(i)).collect();
        teller.with(|task| examples.iter().try_for_each(|e| task.check_query(e)))?;
        let mut told = Vec::new();
        for (images, examples) in images.chunks(super::BATCH).zip(examples.chunks(super::BATCH)) {
            let encoded = match teller.needs {
                Needs::Nothing => self.blind(images.len())?,
                needs => self.encode(images, |image| self.base.preprocess.apply(image), needs)?,
            };
            told.extend(self.told(teller, &encoded, examples)?);
        }
        Ok(told)
    }

    /// The task's outputs for `pixels` [N, 3, H, W] and a text each: what can be compared with another model's.
    ///
    /// # Errors
    /// When the task ranks labels, or a tensor operation fails.
    pub fn outputs(&self, pixels: &Tensor, texts: &[String]) -> Result<Tensor> {
        let teller = self.teller()?;
        let one =
            |text: &String| Example { id: text.clone(), texts: vec![text.clone()], question: Some(text.clone()), ..Example::default() };
        let examples: Vec<Example> = texts.iter().map(one).collect();
        let images = match teller.needs {
            Needs::Nothing => self.blind(examples.len())?,
            needs => self.through(pixels, needs)?,
        };
        let on = Forward::eval(&self.base.clip, &self.patches);
        let outputs = teller.with(|task| task.outputs(&on, &images, &examples, 0..examples.len()))?;
        // Of what an example is compared with besides its own text there is nothing here.
        Ok(outputs.narrow(1, 0, outputs.dim(1)?)?.to_dtype(DType::F32)?)
    }

    /// Labels for a task that answers by itself, whose answers are for all of its classes: these, in any order, or none.
    ///
    /// # Errors
    /// When they are others, or the task has none.
    pub fn check_labels(&self, labels: &[String]) -> Result<()> {
        let ranks = self.manifest.as_ref().filter(|m| !m.classes.is_empty() && m.task.get("classify").is_some());
        let Some(known) = ranks.map(|m| &m.classes) else {
            return Err(Error::input("labels", "this adapter does not rank labels: it judges an image with a text")
                .hint("pass --text or --question, or requests with --jsonl"));
        };
        class_order(known, labels).map(drop).map_err(|differ| {
            Error::input("labels", format!("this adapter's task knows only its own classes ({differ})"))
                .hint("leave the labels out, or name all of its classes, in any order")
        })
    }

    fn teller(&self) -> Result<&Teller> {
        self.teller.as_ref().ok_or_else(|| {
            Error::input("predict", "this adapter ranks labels, and has no answer to a text or a question")
                .hint("pass --labels, or an adapter that was trained to match, answer or regress")
        })
    }

    fn told(&self, teller: &Teller, images: &Encoded, examples: &[Example]) -> Result<Vec<Told>> {
        let on = Forward::eval(&self.base.clip, &self.patches);
        teller.with(|task| {
            let outputs = task.outputs(&on, images, examples, 0..examples.len())?;
            task.tell(&outputs, examples)
        })
    }

    /// No images.
    fn blind(&self, count: usize) -> Result<Encoded> {
        Ok(Encoded::pooled(Tensor::zeros((count, 1), DType::F32, self.base.clip.device())?))
    }

    fn encode<T: Sync>(&self, images: &[T], pixels: impl Fn(&T) -> Result<Vec<f32>> + Sync, needs: Needs) -> Result<Encoded> {
        use rayon::prelude::*;
        let (height, width) = self.base.preprocess.output_size();
        let pixels: Vec<Vec<f32>> = images.par_iter().map(&pixels).collect::<Result<_>>()?;
        self.through(&Tensor::from_vec(pixels.concat(), (images.len(), 3, height, width), &Device::Cpu)?, needs)
    }

    fn through(&self, pixels: &Tensor, needs: Needs) -> Result<Encoded> {
        let clip = &self.base.clip;
        let encoded = match needs {
            Needs::Tokens => clip.image_tokens_from(&clip.image_entrance(pixels.clone(), None, &self.patches)?, &self.patches, None)?,
            _ => Encoded::pooled(clip.image_features(pixels, &self.patches)?),
        };
        self.finite("image", encoded.features.clone())?;
        Ok(encoded)
    }
}
