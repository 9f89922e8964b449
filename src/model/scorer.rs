//! Labels with their text side, ready for many images.

use candle_core::{DType, Tensor};
use peft_adapters::ClassFeatures;

use super::Model;
use crate::clip::model::{class_logits, unit_rows};
use crate::delta::same_classes;
use crate::error::{Error, Result};
use crate::task::Forward;
use crate::task::prompts::Prompts;

/// A class and how likely it is.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Ranked {
    /// The class.
    pub label: String,
    /// From 0 to 1; all classes add up to 1.
    pub probability: f32,
    /// What the probability is made of, before the temperature; where ranks come from, since small and large probabilities are
    /// equal in f32.
    pub logit: f32,
    /// Whether it passes its threshold, where an example may have any number of classes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chosen: Option<bool>,
}

impl Ranked {
    /// Most likely first.
    pub(crate) fn sort(all: &mut [Self]) {
        all.sort_by(|a, b| b.logit.total_cmp(&a.logit));
    }
}

/// Labels whose text side is computed.
#[derive(Debug)]
pub struct Scorer {
    pub(super) labels: Vec<String>,
    /// Where each label stands among the classes that the model holds something for, when that is another order.
    pub(super) order: Option<Vec<u32>>,
    pub(super) templates: Vec<String>,
    pub(super) classes: Classes,
}

/// Where logits come from.
#[derive(Debug)]
pub(super) enum Classes {
    /// The adapter's linear head.
    Head,
    /// Class features, [C, P].
    Shared(Tensor),
    /// Class prompts that are encoded for each image.
    PerImage(Box<Prompts>),
}

impl Scorer {
    /// The labels in order.
    #[must_use]
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// The prompts around them; none with a linear head.
    #[must_use]
    pub fn templates(&self) -> &[String] {
        &self.templates
    }

    /// What image features are multiplied with: class features [C, P], or a linear head's weights and bias; nothing where
    /// classes look different to each image.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn matrix(&self, model: &Model) -> Result<Option<(Tensor, Option<Tensor>)>> {
        match (&self.classes, &model.head) {
            (Classes::Head, Some([weight, bias])) => Ok(Some((self.in_order(weight.clone(), 0)?, Some(self.in_order(bias.clone(), 0)?)))),
            (Classes::Shared(classes), _) => Ok(Some((self.in_order(classes.clone(), 0)?, None))),
            _ => Ok(None),
        }
    }

    /// All labels for each row of `features` [N, P], most likely first.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn rank(&self, model: &Model, features: &Tensor) -> Result<Vec<Vec<Ranked>>> {
        if features.dim(0)? == 0 {
            return Ok(Vec::new());
        }
        let logits = self.logits(model, features)?.to_dtype(DType::F32)?;
        let rows = candle_nn::ops::softmax(&(&logits / self.temperature(model))?, 1)?.to_vec2::<f32>()?;
        if let Some(row) = rows.iter().position(|row| row.iter().any(|p| !p.is_finite())) {
            return Err(Error::input(format!("image {}", row + 1), "has scores that are not finite with this model")
                .hint("see the weights of the adapter and the base, logit_scale among them"));
        }
        Ok(rows.into_iter().zip(logits.to_vec2::<f32>()?).map(|(row, logits)| self.ranked(row, logits)).collect())
    }

    /// Logits of `features` [N, P], unnormalised, for the labels: [N, C].
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn logits(&self, model: &Model, features: &Tensor) -> Result<Tensor> {
        let clip = &model.base.clip;
        let logits = match (&self.classes, &model.head) {
            (Classes::Head, Some([weight, bias])) => unit_rows(features)?.matmul(&weight.t()?)?.broadcast_add(bias)?,
            (Classes::PerImage(prompts), _) => prompts.logits(&Forward::eval(clip, &model.patches), features)?,
            (Classes::Shared(classes), _) => {
                let classes = model.patches.class_features(ClassFeatures::Shared(classes.clone()), features)?;
                class_logits(clip, features, &classes, &model.patches).map_err(|e| model.of_classes(e.into()))?
            }
            (Classes::Head, None) => return Err(Error::fault("predict", "no head")),
        };
        self.in_order(logits, 1)
    }

    /// What is held in the model's order of classes along `dim`, in the order of the labels.
    fn in_order(&self, held: Tensor, dim: usize) -> Result<Tensor> {
        let Some(order) = &self.order else { return Ok(held) };
        Ok(held.index_select(&Tensor::new(order.as_slice(), held.device())?, dim)?)
    }

    /// What logits are divided by before they become probabilities: fitted on validation for the adapter's own classes, 1 for any
    /// others.
    #[must_use]
    pub fn temperature(&self, model: &Model) -> f64 {
        let own = model.manifest.as_ref().filter(|m| same_classes(&m.classes, &self.labels) && model.adapters.len() == 1);
        own.and_then(|m| m.scalars.get("temperature")).copied().unwrap_or(1.0)
    }

    fn ranked(&self, row: Vec<f32>, logits: Vec<f32>) -> Vec<Ranked> {
        let one = |((probability, logit), label): ((f32, f32), &String)| Ranked { label: label.clone(), probability, logit, chosen: None };
        let mut all: Vec<Ranked> = row.into_iter().zip(logits).zip(&self.labels).map(one).collect();
        Ranked::sort(&mut all);
        all
    }
}
