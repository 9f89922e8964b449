//! One of the classes for each image.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use peft_adapters::{ClassFeatures, Params, Spec, Start};
use serde::{Deserialize, Serialize};

use super::prompts::{self, Pad, Prompts, cross_entropy};
use super::{Forward, Task, TaskParts, metrics};
use crate::clip::model::{class_logits, unit_rows};
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

impl Default for ClassifyConfig {
    fn default() -> Self {
        Self { templates: vec![prompts::DEFAULT_TEMPLATE.into()], head: Head::Prompts, pad: Pad::Longest }
    }
}

impl ClassifyConfig {
    pub(super) fn validate(&self, place: &str) -> Result<()> {
        let place = format!("{place}: task.classify.templates");
        if self.templates.is_empty() {
            return Err(Error::input(place, "expected at least one template"));
        }
        self.templates.iter().try_for_each(|t| prompts::check_template(&place, t))
    }
}

/// What an evaluation gives besides the loss.
pub(super) const METRICS: [&str; 4] = ["accuracy", "top5_accuracy", "macro_f1", "calibration_error"];

/// Names of the head's weights in `task.safetensors`: [C, P] and [C].
pub(crate) const HEAD: [&str; 2] = ["head.weight", "head.bias"];

pub(super) struct Classify {
    classes: Vec<String>,
    prompts: Prompts,
    head: Option<[Tensor; 2]>,
    smoothing: f64,
    /// Class features, kept while no patch reaches the text tower.
    frozen: Option<Tensor>,
}

impl Classify {
    pub(super) fn new(config: &ClassifyConfig, parts: &TaskParts<'_>, params: &mut Params) -> Result<Self> {
        let count = parts.classes.len();
        if count < 2 {
            return Err(Error::input("task.classify", format!("expected at least two classes, found {count}"))
                .hint("a classifier chooses; check `data`"));
        }
        let head = match config.head {
            Head::Prompts => None,
            Head::Linear => {
                let dim = parts.clip.config().projection_dim;
                let declare = |params: &mut Params, spec| params.declare(spec).map_err(|e| Error::input("task.classify.head", e));
                Some([
                    declare(params, Spec::new(HEAD[0], (count, dim), Start::Zeros))?,
                    declare(params, Spec::new(HEAD[1], count, Start::Zeros))?,
                ])
            }
        };
        Ok(Self {
            classes: parts.classes.to_vec(),
            prompts: Prompts::of_classes(parts.tokenizer, parts.classes, &config.templates, config.pad)?,
            head,
            smoothing: parts.label_smoothing,
            frozen: None,
        })
    }

    fn class_features(&mut self, on: &Forward<'_, '_>) -> Result<Tensor> {
        if let Some(kept) = &self.frozen {
            return Ok(kept.clone());
        }
        self.prompts.keep_constant(on)?;
        let features = self.prompts.class_features(on)?;
        if on.training && !features.track_op() {
            self.frozen = Some(features.clone());
        }
        Ok(features)
    }

    /// [B, C]
    fn logits(&mut self, on: &Forward<'_, '_>, features: &Tensor, classes: Option<&Tensor>) -> Result<Tensor> {
        if let Some([weight, bias]) = &self.head {
            let (weight, bias) = if on.training { (weight.clone(), bias.clone()) } else { (weight.detach(), bias.detach()) };
            let x = unit_rows(features)?.to_dtype(weight.dtype())?;
            return Ok(x.matmul(&weight.t()?)?.broadcast_add(&bias)?);
        }
        let classes = match classes {
            Some(c) => c.clone(),
            None => self.class_features(on)?,
        };
        let classes = on.patches.class_features(ClassFeatures::Shared(classes), features)?;
        Ok(class_logits(on.clip, features, &classes, on.patches)?)
    }
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

    fn loss(&mut self, on: &Forward<'_, '_>, features: &Tensor, examples: &[&Example]) -> Result<Tensor> {
        let logits = self.logits(on, features, None)?;
        cross_entropy(&logits, &labels(examples, &logits)?, self.smoothing)
    }

    fn evaluate(&mut self, on: &Forward<'_, '_>, features: &Tensor, examples: &[Example]) -> Result<Evaluation> {
        let classes = match &self.head {
            Some(_) => None,
            None => Some(self.class_features(on)?),
        };
        let logits = self.logits(on, features, classes.as_ref())?.to_dtype(DType::F32)?;
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

    fn warnings(&self) -> Vec<String> {
        match self.prompts.truncated {
            0 => Vec::new(),
            n => vec![format!("{n} class prompts are longer than the model's context and were cut")],
        }
    }
}
