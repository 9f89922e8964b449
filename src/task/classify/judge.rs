//! From logits to verdicts: temperature, thresholds, metrics.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};

use super::Thresholds;
use super::loss::Criterion;
use crate::data::Example;
use crate::error::Result;
use crate::report::{Classification, Evaluation, Prediction};
use crate::task::threshold::{self, sigmoid};
use crate::task::{Told, metrics};

/// What an evaluation gives besides the loss where an example has one class.
pub(super) const OF_ONE: [&str; 6] =
    ["accuracy", "top5_accuracy", "macro_f1", "mean_average_precision", "calibration_error", "calibration_error_fitted"];

/// And where it may have several; accuracy is then the share of examples all of whose labels are right.
pub(super) const OF_SEVERAL: [&str; 6] =
    ["accuracy", "micro_f1", "macro_f1", "mean_average_precision", "calibration_error", "calibration_error_fitted"];

/// Key in `peft.json`.
const TEMPERATURE: &str = "temperature";

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
    /// A logit for each class, before the temperature, where there may be several.
    thresholds: Vec<f64>,
}

impl Judge {
    pub(super) fn new(classes: &[String], several: bool, choice: Thresholds) -> Self {
        Self { classes: classes.to_vec(), several, choice, temperature: 1.0, thresholds: vec![0.0; classes.len()] }
    }

    pub(super) fn evaluate(&self, logits: &Tensor, examples: &[Example], criterion: &Criterion) -> Result<Evaluation> {
        let logits = logits.to_dtype(DType::F32)?;
        let labels: Vec<&[u32]> = examples.iter().map(Example::all_labels).collect();
        let loss = f64::from(criterion.of(&logits, &labels, 0.0)?.to_scalar::<f32>()?);
        let (metrics, classification, predictions) = match self.several {
            true => self.of_several(&logits.to_vec2()?, &labels),
            false => self.of_one(&logits, &labels)?,
        };
        let metrics = metrics.into_iter().filter_map(|(name, value)| Some((name.to_string(), value?))).collect();
        let predictions = examples.iter().zip(predictions).map(|(e, p)| Prediction { id: e.id.clone(), ..p }).collect();
        Ok(Evaluation { examples: examples.len(), loss, metrics, predictions, classification: Some(classification) })
    }

    fn of_one(&self, logits: &Tensor, labels: &[&[u32]]) -> Result<Found> {
        let labels: Vec<u32> = labels.iter().map(|l| l.first().copied().unwrap_or(0)).collect();
        let plain = candle_nn::ops::softmax(logits, 1)?.to_vec2::<f32>()?;
        let fitted = self.probabilities(logits)?;
        let raw = logits.to_vec2::<f32>()?;
        let predicted = metrics::argmax(&raw);
        let odds: Vec<Vec<f32>> = raw.iter().map(|row| log_odds(row)).collect();
        let classification = Classification::new(&self.classes, &labels, &predicted);
        let metrics = vec![
            ("accuracy", Some(classification.accuracy())),
            ("top5_accuracy", Some(metrics::top_k(&raw, &labels, 5))),
            ("macro_f1", Some(classification.macro_f1())),
            // Of log-odds: probabilities near 0 and 1 are equal in f32.
            ("mean_average_precision", metrics::mean_average_precision(&odds, self.classes.len(), |i, c| labels[i] == c as u32)),
            ("calibration_error", Some(metrics::calibration_error(&plain, &labels))),
            ("calibration_error_fitted", Some(metrics::calibration_error(&fitted, &labels))),
        ];
        let scores = fitted.into_iter().zip(raw);
        let names = labels.iter().zip(&predicted).map(|(&label, &p)| (self.name(label), self.name(p)));
        let predictions = names.zip(scores).map(|((label, predicted), scores)| prediction(label, predicted, scores)).collect();
        Ok((metrics, classification, predictions))
    }

    fn of_several(&self, logits: &[Vec<f32>], labels: &[&[u32]]) -> Found {
        let count = self.classes.len();
        let truth: Vec<Vec<bool>> = labels.iter().map(|own| (0..count).map(|c| own.contains(&(c as u32))).collect()).collect();
        let fitted: Vec<Vec<f32>> = logits.iter().map(|row| self.each(row)).collect();
        let predicted: Vec<Vec<bool>> = logits.iter().map(|row| self.chosen(row)).collect();
        let classification = Classification::of_several(&self.classes, &truth, &predicted);
        let all: Vec<bool> = truth.concat();
        let plain: Vec<f32> = logits.iter().flatten().map(|&z| sigmoid(z)).collect();
        let right = truth.iter().zip(&predicted).filter(|(t, p)| t == p).count();
        let f1 = |name: &str| classification.averages.iter().find(|a| a.name == name).map_or(0.0, |a| a.f1);
        let metrics = vec![
            ("accuracy", Some(right as f64 / truth.len().max(1) as f64)),
            ("micro_f1", Some(f1("micro avg"))),
            ("macro_f1", Some(f1("macro avg"))),
            // Of logits: probabilities near 1 are equal in f32.
            ("mean_average_precision", metrics::mean_average_precision(logits, count, |i, c| truth[i][c])),
            ("calibration_error", Some(metrics::binary_calibration_error(&plain, &all))),
            ("calibration_error_fitted", Some(metrics::binary_calibration_error(&fitted.concat(), &all))),
        ];
        let scores = fitted.into_iter().zip(logits.iter().cloned());
        let names = truth.iter().zip(&predicted).map(|(t, p)| (self.names(t), self.names(p)));
        let predictions = names.zip(scores).map(|((labels, predicted), scores)| prediction(labels, predicted, scores)).collect();
        (metrics, classification, predictions)
    }

    /// The temperature, which moves no example past another, and thresholds of logits.
    pub(super) fn calibrate(&mut self, logits: &Tensor, examples: &[Example]) -> Result<()> {
        let logits = logits.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        if !self.several {
            let labels: Vec<u32> = examples.iter().map(|e| e.label.unwrap_or(0)).collect();
            let fitted = metrics::temperature(&logits, &labels);
            // Where all are right, the lower the likelier: that says how few they are, not how sure to be.
            let all_right = metrics::argmax(&logits) == labels;
            self.temperature = if all_right { fitted.max(1.0) } else { fitted };
            return Ok(());
        }
        let count = self.classes.len();
        let has = |c: usize| examples.iter().map(move |e| e.all_labels().contains(&(c as u32)));
        let truth: Vec<bool> = examples.iter().flat_map(|e| (0..count).map(|c| e.all_labels().contains(&(c as u32)))).collect();
        self.temperature = metrics::binary_temperature(&logits.concat(), &truth);
        match self.choice {
            Thresholds::Global => {
                if let Some(best) = metrics::best_threshold(&logits.concat(), &truth) {
                    self.thresholds.fill(best);
                }
            }
            Thresholds::Each => {
                for (c, own) in self.thresholds.iter_mut().enumerate() {
                    let scores: Vec<f32> = logits.iter().map(|row| row[c]).collect();
                    *own = metrics::best_threshold(&scores, &has(c).collect::<Vec<_>>()).unwrap_or(0.0);
                }
            }
        }
        Ok(())
    }

    pub(super) fn tell(&self, logits: &Tensor) -> Result<Vec<Told>> {
        let logits = logits.to_dtype(DType::F32)?;
        let raw = logits.to_vec2::<f32>()?;
        let rows = match self.several {
            true => raw.iter().map(|row| self.each(row)).collect(),
            false => self.probabilities(&logits)?,
        };
        let one = |(row, logits): (Vec<f32>, Vec<f32>)| {
            let chosen = if self.several { self.chosen(&logits) } else { Vec::new() };
            let prediction = match self.several {
                true => self.names(&chosen),
                false => self.name(metrics::argmax(std::slice::from_ref(&logits))[0]),
            };
            Told { prediction, scores: self.classes.iter().cloned().zip(row).collect(), logits, chosen }
        };
        Ok(rows.into_iter().zip(raw).map(one).collect())
    }

    pub(super) fn scalars(&self) -> BTreeMap<String, f64> {
        let mut all = BTreeMap::from([(TEMPERATURE.to_string(), self.temperature)]);
        match (self.several, self.choice) {
            (false, _) => {}
            (true, Thresholds::Global) => all.extend(self.thresholds.first().map(|t| (threshold::KEY.to_string(), *t))),
            (true, Thresholds::Each) => {
                all.extend(self.classes.iter().map(|class| threshold::key(class)).zip(self.thresholds.iter().copied()))
            }
        }
        all
    }

    pub(super) fn set_scalars(&mut self, scalars: &BTreeMap<String, f64>) {
        self.temperature = scalars.get(TEMPERATURE).copied().unwrap_or(self.temperature);
        for (class, own) in self.classes.iter().zip(&mut self.thresholds) {
            *own = threshold::stored_for(scalars, class, self.temperature).unwrap_or(*own);
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
        row.iter().zip(&self.thresholds).map(|(&z, &t)| f64::from(z) >= t).collect()
    }

    fn name(&self, label: u32) -> String {
        self.classes.get(label as usize).cloned().unwrap_or_default()
    }

    fn names(&self, has: &[bool]) -> String {
        let own: Vec<&str> = self.classes.iter().zip(has).filter(|(_, has)| **has).map(|(name, _)| name.as_str()).collect();
        own.join(SEPARATOR)
    }
}

/// log p/(1−p) of each class under softmax: z less the log-sum-exp of the others. It orders examples as p does, and does not
/// saturate.
fn log_odds(row: &[f32]) -> Vec<f32> {
    let first = metrics::argmax(&[row.to_vec()])[0] as usize;
    let log_sum = |without: usize| {
        let others = || row.iter().enumerate().filter(|(i, _)| *i != without).map(|(_, &z)| f64::from(z));
        let most = others().fold(f64::NEG_INFINITY, f64::max);
        most + others().map(|z| (z - most).exp()).sum::<f64>().ln()
    };
    if row.len() < 2 {
        return vec![f32::INFINITY; row.len()];
    }
    // The sum of all, less one that is not the largest, loses no digits.
    let most = f64::from(row[first]);
    let total: f64 = row.iter().map(|&z| (f64::from(z) - most).exp()).sum();
    let beside = |c: usize, z: f64| if c == first { log_sum(first) } else { most + (total - (z - most).exp()).ln() };
    row.iter().enumerate().map(|(c, &z)| (f64::from(z) - beside(c, f64::from(z))) as f32).collect()
}

type Found = (Vec<(&'static str, Option<f64>)>, Classification, Vec<Prediction>);

/// The example's name is filled in later.
fn prediction(label: String, prediction: String, (scores, logits): (Vec<f32>, Vec<f32>)) -> Prediction {
    Prediction { id: String::new(), label: Some(label), prediction, scores, logits }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::task::classify::loss::Loss;

    fn examples(labels: &[&[u32]]) -> Vec<Example> {
        labels.iter().map(|own| Example { label: own.first().copied(), labels: Some(own.to_vec()), ..Example::default() }).collect()
    }

    /// Above a logit of 17 every probability is 1 in f32; scikit-learn's `precision_recall_curve` of these logits in f64 has a
    /// threshold with F1 of 1.
    #[test]
    fn thresholds_part_logits_whose_probabilities_are_equal() {
        let logits = Tensor::new(&[[30f32, -40.0], [31.0, -41.0], [32.0, -42.0], [33.0, -43.0]], &Device::Cpu).unwrap();
        let examples = examples(&[&[1], &[1], &[0], &[0]]);
        let classes = ["a".to_string(), "b".to_string()];
        for choice in [Thresholds::Each, Thresholds::Global] {
            let mut judge = Judge::new(&classes, true, choice);
            judge.calibrate(&logits, &examples).unwrap();
            let told = judge.tell(&logits).unwrap();
            if matches!(choice, Thresholds::Each) {
                assert_eq!(told.iter().map(|t| t.prediction.as_str()).collect::<Vec<_>>(), ["b", "b", "a", "a"]);
            }
            let mut again = Judge::new(&classes, true, choice);
            again.set_scalars(&judge.scalars());
            assert_eq!(again.tell(&logits).unwrap(), told);
        }
    }

    /// scikit-learn 1.9, macro `average_precision_score` of the log-odds in f64: class 1 is ranked right though its probabilities
    /// are all 1 in f32.
    #[test]
    fn ranks_of_one_class_do_not_tie() {
        let logits = Tensor::new(&[[0f32, 40.0], [0.0, 41.0], [0.0, 42.0], [0.0, 43.0]], &Device::Cpu).unwrap();
        let examples = examples(&[&[0], &[0], &[1], &[1]]);
        let judge = Judge::new(&["a".to_string(), "b".to_string()], false, Thresholds::Global);
        let found = judge.evaluate(&logits, &examples, &Criterion { loss: Loss::CrossEntropy {}, weights: None }).unwrap();
        assert!((found.metrics["mean_average_precision"] - 1.0).abs() < 1e-12, "{:?}", found.metrics);
    }

    #[test]
    fn log_odds_are_those_of_softmax() {
        let found = log_odds(&[1.0, 3.0, -2.0]);
        // scipy.special.logit(scipy.special.softmax([1, 3, -2]))
        for (ours, theirs) in found.iter().zip([-2.006_715_348_489_118, 1.951_412_648_412_578, -5.126_928_011_042_972]) {
            assert!((f64::from(*ours) - theirs).abs() < 1e-5, "{found:?}");
        }
        assert_eq!(log_odds(&[100.0, 0.0]), [100.0, -100.0]);
    }
}
