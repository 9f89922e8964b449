//! From logits to verdicts: temperature, thresholds, metrics.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};

use super::Thresholds;
use super::loss::Criterion;
use crate::data::Example;
use crate::error::Result;
use crate::report::{Classification, Evaluation, Prediction};
use crate::task::matching::sigmoid;
use crate::task::{Told, metrics};

/// What an evaluation gives besides the loss where an example has one class.
pub(super) const OF_ONE: [&str; 6] =
    ["accuracy", "top5_accuracy", "macro_f1", "mean_average_precision", "calibration_error", "calibration_error_fitted"];

/// And where it may have several; accuracy is then the share of examples all of whose labels are right.
pub(super) const OF_SEVERAL: [&str; 6] =
    ["accuracy", "micro_f1", "macro_f1", "mean_average_precision", "calibration_error", "calibration_error_fitted"];

/// Keys in `peft.json`. Thresholds of single labels are followed by `/` and the label.
const TEMPERATURE: &str = "temperature";
const THRESHOLD: &str = "threshold";

/// Between labels of one example, as in tables.
const SEPARATOR: &str = "|";

/// What was chosen on validation, and how it is applied.
#[derive(Debug)]
pub(super) struct Judge {
    classes: Vec<String>,
    several: bool,
    choice: Thresholds,
    /// Divides logits before they become probabilities.
    temperature: f64,
    /// A probability for each class, where there may be several.
    thresholds: Vec<f64>,
}

impl Judge {
    pub(super) fn new(classes: &[String], several: bool, choice: Thresholds) -> Self {
        Self { classes: classes.to_vec(), several, choice, temperature: 1.0, thresholds: vec![0.5; classes.len()] }
    }

    pub(super) fn evaluate(&self, logits: &Tensor, examples: &[Example], criterion: &Criterion) -> Result<Evaluation> {
        let logits = logits.to_dtype(DType::F32)?;
        let labels: Vec<&[u32]> = examples.iter().map(Example::all_labels).collect();
        let loss = f64::from(criterion.of(&logits, &labels, 0.0)?.to_scalar::<f32>()?);
        let (metrics, classification, predictions) = match self.several {
            true => self.of_several(&logits.to_vec2()?, &labels),
            false => self.of_one(&logits, &labels)?,
        };
        let metrics = metrics.into_iter().map(|(name, value)| (name.to_string(), value)).collect();
        let predictions = examples.iter().zip(predictions).map(|(e, p)| Prediction { id: e.id.clone(), ..p }).collect();
        Ok(Evaluation { examples: examples.len(), loss, metrics, predictions, classification: Some(classification) })
    }

    fn of_one(&self, logits: &Tensor, labels: &[&[u32]]) -> Result<Found> {
        let labels: Vec<u32> = labels.iter().map(|l| l.first().copied().unwrap_or(0)).collect();
        let plain = candle_nn::ops::softmax(logits, 1)?.to_vec2::<f32>()?;
        let fitted = self.probabilities(logits)?;
        let predicted = metrics::argmax(&plain);
        let classification = Classification::new(&self.classes, &labels, &predicted);
        let metrics = vec![
            ("accuracy", classification.accuracy()),
            ("top5_accuracy", metrics::top_k(&plain, &labels, 5)),
            ("macro_f1", classification.macro_f1()),
            ("mean_average_precision", metrics::mean_average_precision(&plain, self.classes.len(), |i, c| labels[i] == c as u32)),
            ("calibration_error", metrics::calibration_error(&plain, &labels)),
            ("calibration_error_fitted", metrics::calibration_error(&fitted, &labels)),
        ];
        let one = |((scores, &label), &p): ((Vec<f32>, &u32), &u32)| prediction(self.name(label), self.name(p), scores);
        let predictions = fitted.into_iter().zip(&labels).zip(&predicted).map(one).collect();
        Ok((metrics, classification, predictions))
    }

    fn of_several(&self, logits: &[Vec<f32>], labels: &[&[u32]]) -> Found {
        let count = self.classes.len();
        let truth: Vec<Vec<bool>> = labels.iter().map(|own| (0..count).map(|c| own.contains(&(c as u32))).collect()).collect();
        let fitted: Vec<Vec<f32>> = logits.iter().map(|row| self.each(row)).collect();
        let predicted: Vec<Vec<bool>> = fitted.iter().map(|row| self.chosen(row)).collect();
        let classification = Classification::of_several(&self.classes, &truth, &predicted);
        let all: Vec<bool> = truth.concat();
        let plain: Vec<f32> = logits.iter().flatten().map(|&z| sigmoid(z)).collect();
        let right = truth.iter().zip(&predicted).filter(|(t, p)| t == p).count();
        let f1 = |name: &str| classification.averages.iter().find(|a| a.name == name).map_or(0.0, |a| a.f1);
        let metrics = vec![
            ("accuracy", right as f64 / truth.len().max(1) as f64),
            ("micro_f1", f1("micro avg")),
            ("macro_f1", f1("macro avg")),
            // Of logits: probabilities near 1 are equal in f32.
            ("mean_average_precision", metrics::mean_average_precision(logits, count, |i, c| truth[i][c])),
            ("calibration_error", metrics::binary_calibration_error(&plain, &all)),
            ("calibration_error_fitted", metrics::binary_calibration_error(&fitted.concat(), &all)),
        ];
        let one = |((scores, t), p): ((Vec<f32>, &Vec<bool>), &Vec<bool>)| prediction(self.names(t), self.names(p), scores);
        let predictions = fitted.into_iter().zip(&truth).zip(&predicted).map(one).collect();
        (metrics, classification, predictions)
    }

    /// Temperature first, then thresholds of the probabilities that it makes.
    pub(super) fn calibrate(&mut self, logits: &Tensor, examples: &[Example]) -> Result<()> {
        let logits = logits.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        if !self.several {
            let labels: Vec<u32> = examples.iter().map(|e| e.label.unwrap_or(0)).collect();
            self.temperature = metrics::temperature(&logits, &labels);
            return Ok(());
        }
        let count = self.classes.len();
        let has = |c: usize| examples.iter().map(move |e| e.all_labels().contains(&(c as u32)));
        let truth: Vec<bool> = examples.iter().flat_map(|e| (0..count).map(|c| e.all_labels().contains(&(c as u32)))).collect();
        self.temperature = metrics::binary_temperature(&logits.concat(), &truth);
        let rows: Vec<Vec<f32>> = logits.iter().map(|row| self.each(row)).collect();
        match self.choice {
            Thresholds::Global => {
                if let Some(best) = metrics::best_threshold(&rows.concat(), &truth) {
                    self.thresholds.fill(best);
                }
            }
            Thresholds::Each => {
                for (c, own) in self.thresholds.iter_mut().enumerate() {
                    let scores: Vec<f32> = rows.iter().map(|row| row[c]).collect();
                    *own = metrics::best_threshold(&scores, &has(c).collect::<Vec<_>>()).unwrap_or(0.5);
                }
            }
        }
        Ok(())
    }

    pub(super) fn tell(&self, logits: &Tensor) -> Result<Vec<Told>> {
        let logits = logits.to_dtype(DType::F32)?;
        let rows = match self.several {
            true => logits.to_vec2()?.iter().map(|row: &Vec<f32>| self.each(row)).collect(),
            false => self.probabilities(&logits)?,
        };
        let one = |row: Vec<f32>| {
            let prediction = match self.several {
                true => self.names(&self.chosen(&row)),
                false => self.name(metrics::argmax(std::slice::from_ref(&row))[0]),
            };
            Told { prediction, scores: self.classes.iter().cloned().zip(row).collect() }
        };
        Ok(rows.into_iter().map(one).collect())
    }

    pub(super) fn scalars(&self) -> BTreeMap<String, f64> {
        let mut all = BTreeMap::from([(TEMPERATURE.to_string(), self.temperature)]);
        match (self.several, self.choice) {
            (false, _) => {}
            (true, Thresholds::Global) => all.extend(self.thresholds.first().map(|t| (THRESHOLD.to_string(), *t))),
            (true, Thresholds::Each) => all.extend(self.classes.iter().map(key).zip(self.thresholds.iter().copied())),
        }
        all
    }

    pub(super) fn set_scalars(&mut self, scalars: &BTreeMap<String, f64>) {
        self.temperature = scalars.get(TEMPERATURE).copied().unwrap_or(self.temperature);
        for (class, own) in self.classes.iter().zip(&mut self.thresholds) {
            *own = scalars.get(&key(class)).or(scalars.get(THRESHOLD)).copied().unwrap_or(*own);
        }
    }

    /// softmax(z/T)
    fn probabilities(&self, logits: &Tensor) -> Result<Vec<Vec<f32>>> {
        Ok(candle_nn::ops::softmax(&(logits / self.temperature)?, 1)?.to_vec2()?)
    }

    /// σ(z/T)
    fn each(&self, row: &[f32]) -> Vec<f32> {
        row.iter().map(|z| sigmoid(z / self.temperature as f32)).collect()
    }

    fn chosen(&self, row: &[f32]) -> Vec<bool> {
        row.iter().zip(&self.thresholds).map(|(&p, &t)| f64::from(p) >= t).collect()
    }

    fn name(&self, label: u32) -> String {
        self.classes.get(label as usize).cloned().unwrap_or_default()
    }

    fn names(&self, has: &[bool]) -> String {
        let own: Vec<&str> = self.classes.iter().zip(has).filter(|(_, has)| **has).map(|(name, _)| name.as_str()).collect();
        own.join(SEPARATOR)
    }
}

fn key(class: &String) -> String {
    format!("{THRESHOLD}/{class}")
}

type Found = (Vec<(&'static str, f64)>, Classification, Vec<Prediction>);

/// The example's name is filled in later.
fn prediction(label: String, prediction: String, scores: Vec<f32>) -> Prediction {
    Prediction { id: String::new(), label: Some(label), prediction, scores }
}
