//! A number that belongs to an image, a text, or both.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{DType, Tensor};
use peft_adapters::Params;
use serde::{Deserialize, Serialize};

use super::joint::{Joint, JointParts, lacks};
use super::prompts::Pad;
use super::texts::drawn;
use super::{Definition, Forward, Needs, Task, TaskParts, Told, metrics};
use crate::clip::Encoded;
use crate::data::{Example, Field, Reads};
use crate::error::{Error, Result};
use crate::fusion::{ConcatConfig, FusionConfig, Inputs};
use crate::named;
use crate::report::{Evaluation, Prediction};

mod loss;

use loss::Criterion;
pub use loss::{HuberConfig, OrdinalConfig, RegressLoss};

/// Options of regression.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RegressConfig {
    /// `image`, `text` or `both`: what is looked at.
    pub inputs: Inputs,
    /// `mse`, `huber` or `ordinal`, with options.
    #[serde(deserialize_with = "named::one")]
    pub loss: RegressLoss,
    /// `longest` or `max`: how far texts are padded. `max` is slower and changes nothing.
    pub pad: Pad,
}

impl Default for RegressConfig {
    fn default() -> Self {
        Self { inputs: Inputs::Image, loss: RegressLoss::Mse {}, pad: Pad::Longest }
    }
}

/// What an evaluation gives besides the loss; the last two are missing where values, or predictions, are all the same.
const METRICS: [&str; 4] = ["mae", "rmse", "pearson", "spearman"];

/// Keys of the training values' mean and standard deviation in `peft.json`.
const SCALARS: [&str; 2] = ["target_mean", "target_sd"];

impl Definition for RegressConfig {
    fn name(&self) -> &'static str {
        "regress"
    }

    fn validate(&self, place: &str) -> Result<()> {
        self.loss.validate(&format!("{place}: task.regress"))
    }

    fn has_own_weights(&self) -> bool {
        true
    }

    fn metric(&self) -> &'static str {
        "mae"
    }

    fn metrics(&self) -> &'static [&'static str] {
        &METRICS
    }

    fn tells(&self) -> bool {
        true
    }

    fn reads_images(&self) -> bool {
        self.inputs.image()
    }

    fn fuses(&self) -> bool {
        true
    }

    fn reads(&self) -> Reads {
        let text = self.inputs.text().then_some(Field::Text);
        Reads { needed: [Field::Value].into_iter().chain(text).collect(), also: Vec::new() }
    }

    fn texts(&self, _: &[String], examples: &[Example]) -> (Vec<String>, Pad) {
        let all = if self.inputs.text() { examples } else { &[] };
        (all.iter().flat_map(|e| e.texts.iter().cloned()).collect(), self.pad)
    }

    fn texts_per_batch(&self, _: usize, batch: usize) -> usize {
        if self.inputs.text() { batch } else { 0 }
    }

    fn build(&self, parts: &TaskParts<'_>, params: &mut Params) -> Result<Box<dyn Task>> {
        let default = FusionConfig::Concat(ConcatConfig::default());
        let joint = JointParts { inputs: self.inputs, default, outputs: 1, pad: self.pad, task: parts };
        let [mean, sd] = spread(parts)?;
        Ok(Box::new(Regress {
            joint: Joint::new(&joint, params)?,
            criterion: Criterion::new(self.loss, params)?,
            inputs: self.inputs,
            seed: parts.seed,
            mean,
            sd,
        }))
    }
}

/// Mean and standard deviation of the training values, as scikit-learn's `StandardScaler` has them; 0 and 1 where there are none.
fn spread(parts: &TaskParts<'_>) -> Result<[f64; 2]> {
    // Welford's way: one pass over a stream, and nothing lost where the mean is large.
    let (mut count, mut mean, mut squares) = (0.0, 0.0, 0.0);
    parts.visit(&mut |examples| {
        for value in examples.iter().filter_map(|e| e.value) {
            count += 1.0;
            let apart = value - mean;
            mean += apart / count;
            squares += apart * (value - mean);
        }
        Ok(())
    })?;
    let sd = if count > 0.0 { (squares / count).sqrt() } else { 0.0 };
    // Values that are all the same are learnt as such.
    Ok([mean, if sd > 0.0 { sd } else { 1.0 }])
}

struct Regress {
    joint: Joint,
    criterion: Criterion,
    inputs: Inputs,
    seed: u64,
    mean: f64,
    sd: f64,
}

impl Regress {
    fn criterion(&self, outputs: &Tensor, values: &[f64]) -> Result<Tensor> {
        self.criterion.of(outputs, values, |v| (v - self.mean) / self.sd)
    }

    /// In the values' own unit.
    fn numbers(&self, outputs: &Tensor) -> Result<Vec<f64>> {
        let one = |row: Vec<f32>| match &self.criterion {
            Criterion::Ordinal(ordinal) => ordinal.scale.lowest as f64 + row.iter().filter(|z| **z > 0.0).count() as f64,
            _ => self.mean + self.sd * f64::from(row[0]),
        };
        Ok(outputs.to_dtype(DType::F32)?.to_vec2::<f32>()?.into_iter().map(one).collect())
    }
}

fn values(examples: &[Example]) -> Vec<f64> {
    examples.iter().map(|e| e.value.unwrap_or(f64::NAN)).collect()
}

impl Task for Regress {
    fn check(&self, examples: &[Example]) -> Result<()> {
        for e in examples {
            let Some(value) = e.value else {
                return Err(lacks("regress", &e.id, "number").hint("data.table.value names the column"));
            };
            let wrong = |expected: &str| Err(Error::input("task.regress", format!("`{}`: expected {expected}, found {value}", e.id)));
            match &self.criterion {
                _ if !value.is_finite() => return wrong("a finite number"),
                Criterion::Ordinal(o) if value.fract() != 0.0 => {
                    return wrong(&format!("a whole number from {} to {}", o.scale.lowest, o.scale.highest));
                }
                Criterion::Ordinal(o) if value < o.scale.lowest as f64 || value > o.scale.highest as f64 => {
                    return wrong(&format!("{} to {}, as task.regress.loss.ordinal says", o.scale.lowest, o.scale.highest));
                }
                _ => self.check_query(e)?,
            }
        }
        Ok(())
    }

    fn undefined(&self, examples: &[Example]) -> Vec<&'static str> {
        if metrics::varies(&values(examples)) { Vec::new() } else { METRICS[2..].to_vec() }
    }

    fn check_query(&self, e: &Example) -> Result<()> {
        match self.inputs.text() && (e.texts.is_empty() || e.texts.iter().any(|t| t.trim().is_empty())) {
            true => Err(lacks("regress", &e.id, "text, or an empty one").hint("data.table.text names the column; --text gives it")),
            false => Ok(()),
        }
    }

    fn needs(&self) -> Needs {
        self.joint.needs()
    }

    fn loss(&mut self, on: &Forward<'_, '_>, images: &Encoded, examples: &[&Example]) -> Result<Tensor> {
        let seed = self.seed;
        let texts: Vec<&str> = examples.iter().map(|e| if e.texts.is_empty() { "" } else { drawn(seed, on.epoch, e) }).collect();
        let texts = self.joint.encode(on, &texts)?;
        let outputs = self.criterion.outputs(self.joint.outputs(on, images, &texts)?, &on.pass)?;
        let values: Vec<f64> = examples.iter().map(|e| e.value.unwrap_or(f64::NAN)).collect();
        self.criterion(&outputs, &values)
    }

    /// Standardised numbers [B, 1], or logits of each step of a scale, [B, steps].
    fn outputs(&mut self, on: &Forward<'_, '_>, images: &Encoded, split: &[Example], rows: Range<usize>) -> Result<Tensor> {
        let texts: Vec<&str> = split[rows].iter().map(|e| e.texts.first().map_or("", String::as_str)).collect();
        let texts = self.joint.encode(on, &texts)?;
        self.criterion.outputs(self.joint.outputs(on, images, &texts)?, &on.pass)
    }

    fn evaluate(&mut self, _: &Forward<'_, '_>, outputs: &Tensor, examples: &[Example]) -> Result<Evaluation> {
        let (found, right) = (self.numbers(outputs)?, values(examples));
        let loss = self.criterion(&outputs.to_dtype(DType::F32)?, &right)?.to_scalar::<f32>()?;
        let numbers = [
            Some(metrics::mae(&found, &right)),
            Some(metrics::rmse(&found, &right)),
            metrics::pearson(&found, &right),
            metrics::spearman(&found, &right),
        ];
        let one = |(e, number): (&Example, &f64)| Prediction {
            id: e.id.clone(),
            label: e.value.map(|v| v.to_string()),
            prediction: number.to_string(),
            scores: Vec::new(),
            logits: Vec::new(),
        };
        Ok(Evaluation {
            examples: examples.len(),
            loss: f64::from(loss),
            metrics: METRICS.iter().zip(numbers).filter_map(|(name, number)| Some((name.to_string(), number?))).collect(),
            predictions: examples.iter().zip(&found).map(one).collect(),
            classification: None,
        })
    }

    fn scalars(&self) -> BTreeMap<String, f64> {
        SCALARS.iter().map(ToString::to_string).zip([self.mean, self.sd]).collect()
    }

    fn set_scalars(&mut self, scalars: &BTreeMap<String, f64>) {
        if let (Some(mean), Some(sd)) = (scalars.get(SCALARS[0]), scalars.get(SCALARS[1]).filter(|sd| **sd > 0.0)) {
            (self.mean, self.sd) = (*mean, *sd);
        }
    }

    fn tell(&self, outputs: &Tensor, _: &[Example]) -> Result<Vec<Told>> {
        let one =
            |number: f64| Told { prediction: format!("{}", number as f32), scores: Vec::new(), logits: Vec::new(), chosen: Vec::new() };
        Ok(self.numbers(outputs)?.into_iter().map(one).collect())
    }
}
