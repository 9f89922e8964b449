//! One of the classes for each image.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use peft_adapters::{ClassFeatures, Labelled, Params, Patches, Spec, Start};
use serde::{Deserialize, Serialize};

use super::joint::HEAD;
use super::prompts::{self, Pad, Prompts, cross_entropy};
use super::{Definition, Forward, Task, TaskParts, Told, metrics};
use crate::clip::Encoded;
use crate::clip::model::{class_logits, cosine_logits, unit_rows};
use crate::data::Example;
use crate::error::{Error, Result};
use crate::report::{Classification, Evaluation, Prediction};

/// Options of classification.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClassifyConfig {
    /// Prompts around the class name, `{}`; features of several are averaged.
    pub templates: Vec<String>,
    /// `prompts`: scaled cosine with the class prompts. `linear`: a trained matrix over image features.
    pub head: Head,
    /// Where a linear head starts. `zero`: all classes alike. `text`: at the base's own logits, weights exp(logit scale) times
    /// the class prompts' features; better with few examples.
    pub head_init: HeadInit,
    /// `longest` or `max`: how far prompts are padded. `max` is slower and changes nothing.
    pub pad: Pad,
}

/// Where the logits come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Head {
    /// exp(logit scale) · cos(image, class prompt).
    #[default]
    Prompts,
    /// W · image/‖image‖ + b; with `method: none` the linear probe.
    Linear,
}

/// Where a linear head starts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HeadInit {
    /// W = 0, b = 0.
    #[default]
    Zero,
    /// W = exp(logit scale) · prompts/‖prompts‖, b = 0.
    Text,
}

impl Default for ClassifyConfig {
    fn default() -> Self {
        Self { templates: vec![prompts::DEFAULT_TEMPLATE.into()], head: Head::Prompts, head_init: HeadInit::Zero, pad: Pad::Longest }
    }
}

impl Definition for ClassifyConfig {
    fn name(&self) -> &'static str {
        "classify"
    }

    fn validate(&self, place: &str) -> Result<()> {
        let place = format!("{place}: task.classify.templates");
        if self.templates.is_empty() {
            return Err(Error::input(place, "expected at least one template"));
        }
        self.templates.iter().try_for_each(|t| prompts::check_template(&place, t))
    }

    fn has_own_weights(&self) -> bool {
        self.head == Head::Linear
    }

    fn metric(&self) -> &'static str {
        "accuracy"
    }

    fn metrics(&self) -> &'static [&'static str] {
        &METRICS
    }

    fn templates(&self) -> &[String] {
        &self.templates
    }

    fn texts(&self, classes: &[String], _: &[Example]) -> (Vec<String>, Pad) {
        (prompts::fill(classes, &self.templates), self.pad)
    }

    fn texts_per_batch(&self, classes: usize, _: usize) -> usize {
        classes * self.templates.len()
    }

    fn build(&self, parts: &TaskParts<'_>, params: &mut Params) -> Result<Box<dyn Task>> {
        Ok(Box::new(Classify::new(self, parts, params)?))
    }
}

/// What an evaluation gives besides the loss.
const METRICS: [&str; 4] = ["accuracy", "top5_accuracy", "macro_f1", "calibration_error"];

struct Classify {
    classes: Vec<String>,
    prompts: Prompts,
    head: Option<[Tensor; 2]>,
    smoothing: f64,
    /// Class features, kept while no patch reaches the text tower.
    frozen: Option<Tensor>,
}

impl Classify {
    fn new(config: &ClassifyConfig, parts: &TaskParts<'_>, params: &mut Params) -> Result<Self> {
        let count = parts.classes.len();
        if count < 2 {
            return Err(Error::input("task.classify", format!("expected at least two classes, found {count}"))
                .hint("a classifier chooses; check `data`"));
        }
        let prompts = Prompts::of_classes(parts.tokenizer, parts.classes, &config.templates, config.pad)?;
        let head = match config.head {
            Head::Prompts => None,
            Head::Linear => {
                let dim = parts.clip.config().projection_dim;
                let start = match config.head_init {
                    HeadInit::Zero => Start::Zeros,
                    HeadInit::Text => Start::Value(text_weights(parts.clip, &prompts)?),
                };
                let declare = |params: &mut Params, spec| params.declare(spec).map_err(|e| Error::input("task.classify.head", e));
                Some([declare(params, Spec::new(HEAD[0], (count, dim), start))?, declare(params, Spec::new(HEAD[1], count, Start::Zeros))?])
            }
        };
        Ok(Self { classes: parts.classes.to_vec(), prompts, head, smoothing: parts.label_smoothing, frozen: None })
    }

    fn class_features(&mut self, on: &Forward<'_, '_>) -> Result<Tensor> {
        if let Some(kept) = &self.frozen {
            return Ok(kept.clone());
        }
        self.prompts.keep_constant(on)?;
        let features = self.prompts.class_features(on)?;
        if on.training() && !features.track_op() {
            self.frozen = Some(features.clone());
        }
        Ok(features)
    }

    /// [B, C]
    fn logits(&mut self, on: &Forward<'_, '_>, features: &Tensor, classes: Option<&Tensor>) -> Result<Tensor> {
        if let Some([weight, bias]) = &self.head {
            let (weight, bias) = if on.training() { (weight.clone(), bias.clone()) } else { (weight.detach(), bias.detach()) };
            let x = unit_rows(features)?.to_dtype(weight.dtype())?;
            return Ok(x.matmul(&weight.t()?)?.broadcast_add(&bias)?);
        }
        let classes = match classes {
            Some(c) => ClassFeatures::Shared(c.clone()),
            None if on.patches.per_image() => self.prompts.classes(on, features)?,
            None => ClassFeatures::Shared(self.class_features(on)?),
        };
        let classes = on.patches.class_features(classes, features)?;
        Ok(class_logits(on.clip, features, &classes, on.patches)?)
    }
}

/// A zero-shot classifier of the bare base as the weights of a linear one, [C, P].
fn text_weights(clip: &crate::clip::Clip, prompts: &Prompts) -> Result<Tensor> {
    let none = Patches::none();
    let features = unit_rows(&prompts.class_features(&Forward::eval(clip, &none))?)?;
    Ok(features.broadcast_mul(&clip.logit_scale(&none)?)?)
}

fn labels(examples: &[&Example], like: &Tensor) -> Result<Tensor> {
    let labels: Vec<u32> = examples.iter().map(|e| e.label.unwrap_or(0)).collect();
    Ok(Tensor::from_vec(labels, examples.len(), like.device())?)
}

impl Task for Classify {
    fn check(&self, examples: &[Example]) -> Result<()> {
        match examples.iter().find(|e| e.label.is_none()) {
            Some(e) => Err(Error::input("task.classify", format!("`{}` has no label", e.id)).hint("data.table.label names the column")),
            None => Ok(()),
        }
    }

    fn loss(&mut self, on: &Forward<'_, '_>, images: &Encoded, examples: &[&Example]) -> Result<Tensor> {
        let logits = self.logits(on, &images.features, None)?;
        cross_entropy(&logits, &labels(examples, &logits)?, self.smoothing)
    }

    fn evaluate(&mut self, on: &Forward<'_, '_>, features: &Tensor, examples: &[Example]) -> Result<Evaluation> {
        let logits = match &self.head {
            None if on.patches.per_image() => self.prompts.logits(on, features)?,
            None => {
                let classes = self.class_features(on)?;
                self.logits(on, features, Some(&classes))?
            }
            Some(_) => self.logits(on, features, None)?,
        };
        let logits = logits.to_dtype(DType::F32)?;
        let references: Vec<&Example> = examples.iter().collect();
        let loss = cross_entropy(&logits, &labels(&references, &logits)?, 0.0)?.to_scalar::<f32>()?;
        let rows = candle_nn::ops::softmax(&logits, 1)?.to_vec2::<f32>()?;
        let labels: Vec<u32> = examples.iter().filter_map(|e| e.label).collect();
        let predicted = metrics::argmax(&rows);
        let classification = Classification::new(&self.classes, &labels, &predicted);
        let metrics = BTreeMap::from([
            ("accuracy".to_string(), classification.accuracy()),
            ("top5_accuracy".to_string(), metrics::top_k(&rows, &labels, 5)),
            ("macro_f1".to_string(), classification.macro_f1()),
            ("calibration_error".to_string(), metrics::calibration_error(&rows, &labels)),
        ]);
        let name = |label: u32| self.classes[label as usize].clone();
        let predictions = examples.iter().zip(rows).zip(&predicted).map(|((e, scores), &p)| Prediction {
            id: e.id.clone(),
            label: e.label.map(name),
            prediction: name(p),
            scores,
        });
        Ok(Evaluation {
            examples: examples.len(),
            loss: f64::from(loss),
            metrics,
            predictions: predictions.collect(),
            classification: Some(classification),
        })
    }

    fn tell(&self, _: &Tensor, _: &[Example]) -> Result<Vec<Told>> {
        Err(Error::fault("classify", "labels are ranked by a scorer"))
    }

    fn labelled(&mut self, on: &Forward<'_, '_>, features: &Tensor, examples: &[Example]) -> Result<Option<Labelled>> {
        if self.head.is_some() || on.patches.per_image() {
            return Ok(None);
        }
        let classes = on.patches.class_features(ClassFeatures::Shared(self.class_features(on)?), features)?;
        let logits = cosine_logits(on.clip, features, &classes, on.patches)?;
        let references: Vec<&Example> = examples.iter().collect();
        Ok(Some(Labelled { features: unit_rows(features)?, labels: labels(&references, &logits)?, logits }))
    }

    fn warnings(&self) -> Vec<String> {
        match self.prompts.truncated {
            0 => Vec::new(),
            n => vec![format!("{n} class prompts are longer than the model's context and were cut")],
        }
    }
}
