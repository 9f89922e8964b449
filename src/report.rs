//! What a run found out: the schema of `report.json`, read by everything that compares or draws.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::interval::wilson;
use crate::provenance::Provenance;

/// Metrics of one split: fractions from 0 to 1, but for those that [`is_fraction`] names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Examples evaluated.
    pub examples: usize,
    /// Mean loss; NaN, as JSON null, of no examples.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// By name: `accuracy`, `macro_f1`, `image_to_text_recall_at_1`, …
    pub metrics: BTreeMap<String, f64>,
    /// Per-class figures, for classification.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub classification: Option<Classification>,
    /// One line for each example; written to `predictions.jsonl`, not to the report.
    #[serde(skip)]
    pub predictions: Vec<Prediction>,
}

/// What was predicted for one example.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// The example.
    pub id: String,
    /// The right class, or a right text, where there is one.
    pub label: Option<String>,
    /// The predicted class or text.
    pub prediction: String,
    /// Probabilities in the order of the report's classes.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub scores: Vec<f32>,
    /// What these are made of, before the temperature: verdicts and ranks are taken from here, since large probabilities are
    /// equal in f32.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub logits: Vec<f32>,
}

/// Per-class figures and the confusion matrix.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Classification {
    /// In label order.
    pub classes: Vec<ClassRow>,
    /// Rows: true class; columns: predicted class. Empty where an example may have several classes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub confusion: Vec<Vec<usize>>,
    /// Means over classes and examples where an example may have several classes; empty otherwise, as they follow from `confusion`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub averages: Vec<ClassRow>,
    /// Wilson's 95 % interval of the accuracy; none where an example may have several classes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy_interval: Option<[f64; 2]>,
}

/// One class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassRow {
    /// Its name.
    pub name: String,
    /// Right among those predicted as it.
    pub precision: f64,
    /// Right among those that are it.
    pub recall: f64,
    /// Harmonic mean of both.
    pub f1: f64,
    /// Examples of it.
    pub support: usize,
}

/// The end of an epoch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// From 1.
    pub epoch: usize,
    /// Optimiser steps so far.
    pub step: usize,
    /// Mean training loss over the epoch's steps; NaN, as JSON null, where every one of them was left out.
    #[serde(deserialize_with = "number")]
    pub train_loss: f64,
    /// The validation split.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub val: Option<Evaluation>,
}

/// JSON has no NaN; serde writes null.
pub(crate) fn number<'de, D: serde::Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(from)?.unwrap_or(f64::NAN))
}

/// How the numbers of a run behaved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Numbers {
    /// Steps left out because loss or gradients were not finite.
    pub skipped_steps: usize,
    /// With f16: steps left out because the scaled loss overflowed.
    pub overflowed_steps: usize,
    /// With f16: what the loss was multiplied by in the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// The step at which the training loss was seen to have diverged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diverged_at: Option<usize>,
}

/// `report.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainReport {
    /// Version of this program.
    pub version: String,
    /// The recipe's name.
    pub recipe: String,
    /// `lora`, `lora+bottleneck`, `none`.
    pub method: String,
    /// `classify`, `retrieve`.
    pub task: String,
    /// The base as the recipe names it.
    pub base: String,
    /// Digest of the base.
    pub base_digest: String,
    /// Digests of all that the run was made of.
    #[serde(default)]
    pub made_of: Provenance,
    /// Class names in label order.
    pub classes: Vec<String>,
    /// The number that chose the best epoch.
    pub metric: String,
    /// The split of `before` and `after`.
    pub split: String,
    /// Before training.
    pub before: Option<Evaluation>,
    /// After training, at the best epoch.
    pub after: Option<Evaluation>,
    /// Each epoch.
    pub epochs: Vec<EpochRecord>,
    /// The epoch that was chosen, from 1.
    pub best_epoch: Option<usize>,
    /// Optimiser steps done.
    pub steps: usize,
    /// Whether early stopping ended the run.
    pub stopped_early: bool,
    /// Numbers that were trained.
    pub trainable_parameters: usize,
    /// Numbers of the base and of what was added to it.
    pub total_parameters: usize,
    /// All files of the adapter's weights and configuration.
    pub adapter_bytes: u64,
    /// Wall-clock time of training, evaluation included.
    pub seconds: f64,
    /// Wall-clock time of the steps alone, waiting for images included.
    #[serde(default)]
    pub step_seconds: f64,
    /// Images that the steps saw, one that came again counted again.
    #[serde(default)]
    pub images: usize,
    /// Largest resident set, where the system tells.
    pub peak_rss_mib: Option<f64>,
    /// Examples in train, val and test.
    pub examples: [usize; 3],
    /// Images that could not be read and were left out.
    pub skipped_images: usize,
    /// How the numbers behaved.
    #[serde(default)]
    pub numbers: Numbers,
    /// Examples that went through the model at once, and how often in a step, where `train.auto_batch` chose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro: Option<[usize; 2]>,
    /// The device.
    pub device: String,
    /// The run directory.
    pub run: PathBuf,
}

impl TrainReport {
    /// Images a second while training, evaluation apart; `None` where nothing was measured.
    #[must_use]
    pub fn images_per_second(&self) -> Option<f64> {
        (self.step_seconds > 0.0 && self.images > 0).then(|| self.images as f64 / self.step_seconds)
    }
}

/// Whether less of a metric is better.
#[must_use]
pub fn lower_is_better(metric: &str) -> bool {
    ["loss", "mae", "rmse"].contains(&metric) || metric.starts_with("calibration_error") || metric.ends_with("median_rank")
}

/// Whether a metric is a share, and reads well in per cent.
#[must_use]
pub fn is_fraction(metric: &str) -> bool {
    !["loss", "mae", "rmse", "pearson", "spearman"].contains(&metric) && !metric.ends_with("median_rank")
}

impl Evaluation {
    /// A metric by name; the loss as well.
    #[must_use]
    pub fn metric(&self, name: &str) -> Option<f64> {
        match name {
            "loss" => Some(self.loss),
            name => self.metrics.get(name).copied(),
        }
    }

    /// Wilson's 95 % interval of the metric `accuracy` and the number of examples that it is a share of, also of reports that were
    /// written without it; `None` where `accuracy` is no plain share of examples.
    #[must_use]
    pub fn accuracy_interval(&self) -> Option<([f64; 2], usize)> {
        let found = self.classification.as_ref()?;
        let (hits, all) = hits(&found.confusion);
        let same = (self.metric("accuracy")? - hits as f64 / all.max(1) as f64).abs() < 1e-9;
        wilson(hits, all).filter(|_| same).map(|interval| (interval, all))
    }
}

/// Right predictions in a confusion matrix, and all of them.
fn hits(confusion: &[Vec<usize>]) -> (usize, usize) {
    (confusion.iter().enumerate().map(|(i, row)| row[i]).sum(), confusion.iter().flatten().sum())
}

/// True positives, true and predicted ones.
#[derive(Debug, Clone, Copy, Default)]
struct Counts(usize, usize, usize);

impl Counts {
    fn of(pairs: impl Iterator<Item = (bool, bool)>) -> Self {
        let one = |sum: Self, (t, p): (bool, bool)| Self(sum.0 + usize::from(t && p), sum.1 + usize::from(t), sum.2 + usize::from(p));
        pairs.fold(Self::default(), one)
    }

    fn row(self, name: &str) -> ClassRow {
        let Self(hits, support, guessed) = self;
        let ratio = |a: usize, b: usize| if b == 0 { 0.0 } else { a as f64 / b as f64 };
        let f1 = ratio(2 * hits, support + guessed);
        ClassRow { name: name.into(), precision: ratio(hits, guessed), recall: ratio(hits, support), f1, support }
    }
}

/// Weighted means; the support is all of theirs.
fn mean(name: &str, rows: &[ClassRow], weight: impl Fn(&ClassRow) -> f64) -> ClassRow {
    let total: f64 = rows.iter().map(&weight).sum();
    let of = |pick: fn(&ClassRow) -> f64| if total == 0.0 { 0.0 } else { rows.iter().map(|r| weight(r) * pick(r)).sum::<f64>() / total };
    let support = rows.iter().map(|r| r.support).sum();
    ClassRow { name: name.into(), precision: of(|r| r.precision), recall: of(|r| r.recall), f1: of(|r| r.f1), support }
}

impl Classification {
    /// From true and predicted labels.
    #[must_use]
    pub fn new(names: &[String], labels: &[u32], predicted: &[u32]) -> Self {
        let mut confusion = vec![vec![0usize; names.len()]; names.len()];
        for (&t, &p) in labels.iter().zip(predicted) {
            confusion[t as usize][p as usize] += 1;
        }
        let row = |(i, name): (usize, &String)| {
            Counts(confusion[i][i], confusion[i].iter().sum(), confusion.iter().map(|r| r[i]).sum()).row(name)
        };
        let classes = names.iter().enumerate().map(row).collect();
        let (hits, all) = hits(&confusion);
        Self { classes, confusion, averages: Vec::new(), accuracy_interval: wilson(hits, all) }
    }

    /// Of examples with any number of classes each, from what is true and what is predicted of each class.
    ///
    /// # Shapes
    /// `labels` and `predicted`: N rows of a yes or no for each of the `names`
    #[must_use]
    pub fn of_several(names: &[String], labels: &[Vec<bool>], predicted: &[Vec<bool>]) -> Self {
        let pairs = || labels.iter().zip(predicted);
        let of_class = |c: usize| Counts::of(pairs().map(|(t, p)| (t[c], p[c])));
        let counts: Vec<Counts> = (0..names.len()).map(of_class).collect();
        let classes: Vec<ClassRow> = names.iter().zip(&counts).map(|(name, n)| n.row(name)).collect();
        let all = counts.iter().fold(Counts::default(), |sum, n| Counts(sum.0 + n.0, sum.1 + n.1, sum.2 + n.2));
        let of_example = |(t, p): (&Vec<bool>, &Vec<bool>)| Counts::of(t.iter().copied().zip(p.iter().copied())).row("");
        let examples: Vec<ClassRow> = pairs().map(of_example).collect();
        let averages = vec![
            all.row("micro avg"),
            mean("macro avg", &classes, |_| 1.0),
            mean("weighted avg", &classes, |row| row.support as f64),
            mean("samples avg", &examples, |_| 1.0),
        ];
        Self { classes, confusion: Vec::new(), averages, accuracy_interval: None }
    }

    /// Right predictions among all.
    #[must_use]
    pub fn accuracy(&self) -> f64 {
        let (hits, all) = hits(&self.confusion);
        if all == 0 { 0.0 } else { hits as f64 / all as f64 }
    }

    /// Mean F1 over the classes that occur.
    #[must_use]
    pub fn macro_f1(&self) -> f64 {
        self.averages(false).2
    }

    /// Precision, recall and F1 over classes that occur (as scikit-learn's label set), equal weights or by support.
    fn averages(&self, weighted: bool) -> (f64, f64, f64) {
        let (mut sum, mut total) = ((0.0, 0.0, 0.0), 0.0);
        for row in self.rows() {
            let w = if weighted { row.support as f64 } else { 1.0 };
            sum = (sum.0 + w * row.precision, sum.1 + w * row.recall, sum.2 + w * row.f1);
            total += w;
        }
        if total == 0.0 { (0.0, 0.0, 0.0) } else { (sum.0 / total, sum.1 / total, sum.2 / total) }
    }

    /// scikit-learn leaves out labels that are neither true nor predicted, but for several labels an example.
    fn rows(&self) -> impl Iterator<Item = &ClassRow> {
        let occurs = |i: usize, row: &ClassRow| row.support > 0 || self.confusion.iter().any(|r| r[i] > 0);
        let all = !self.averages.is_empty();
        self.classes.iter().enumerate().filter(move |(i, row)| all || occurs(*i, row)).map(|(_, row)| row)
    }

    /// The table that scikit-learn's `classification_report` prints, letter by letter.
    #[must_use]
    pub fn text(&self) -> String {
        let width = self.rows().map(|r| r.name.chars().count()).max().unwrap_or(0).max("weighted avg".len());
        let total: usize = self.rows().map(|r| r.support).sum();
        // Not by `{:>width$}`, whose widths end at 65535.
        let room = |name: &str| " ".repeat(width.saturating_sub(name.chars().count()));
        let mut out = format!("{}  {:>9} {:>9} {:>9} {:>9}\n\n", room(""), "precision", "recall", "f1-score", "support");
        let line = |out: &mut String, name: &str, p: f64, r: f64, f: f64, n: usize| {
            let _ = writeln!(out, "{}{name}  {p:>9.2} {r:>9.2} {f:>9.2} {n:>9}", room(name));
        };
        for row in self.rows() {
            line(&mut out, &row.name, row.precision, row.recall, row.f1, row.support);
        }
        if !self.averages.is_empty() {
            out.push('\n');
            self.averages.iter().for_each(|row| line(&mut out, &row.name, row.precision, row.recall, row.f1, row.support));
            return out;
        }
        let _ = writeln!(out, "\n{}accuracy  {:>9} {:>9} {:>9.2} {total:>9}", room("accuracy"), "", "", self.accuracy());
        for (name, weighted) in [("macro avg", false), ("weighted avg", true)] {
            let (p, r, f) = self.averages(weighted);
            let _ = writeln!(out, "{}{name}  {p:>9.2} {r:>9.2} {f:>9.2} {total:>9}", room(name));
        }
        out
    }
}

/// The largest resident set of this process in MiB, where the system tells.
#[must_use]
pub fn peak_rss_mib() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    let kib: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// scikit-learn 1.9: `classification_report([0,1,2,2,2], [0,0,2,2,1], target_names=["class 0", "class 1", "class 2"])`.
    #[test]
    fn the_table_is_scikit_learns() {
        let names = ["class 0", "class 1", "class 2"].map(String::from);
        let text = Classification::new(&names, &[0, 1, 2, 2, 2], &[0, 0, 2, 2, 1]).text();
        assert_eq!(text, SKLEARN);
    }

    /// scikit-learn 1.9: `classification_report(truth, predicted, target_names=["face", "hand", "cat"], zero_division=0)`; the
    /// fourth example is of no class.
    #[test]
    fn several_labels_are_scikit_learns() {
        let names = ["face", "hand", "cat"].map(String::from);
        let truth = [[1, 0, 0], [1, 0, 1], [0, 0, 1], [0, 0, 0], [1, 0, 1]].map(|r| r.map(|v| v == 1).to_vec());
        let found = [[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 1]].map(|r| r.map(|v| v == 1).to_vec());
        assert_eq!(Classification::of_several(&names, &truth, &found).text(), SEVERAL);
    }

    #[test]
    fn a_long_name_is_only_wide() {
        let names = ["c".repeat(70_000), "dog".into()];
        assert_eq!(Classification::new(&names, &[0, 1], &[0, 1]).text().lines().count(), 8);
    }

    const SEVERAL: &str = "              precision    recall  f1-score   support

        face       1.00      1.00      1.00         3
        hand       0.00      0.00      0.00         0
         cat       1.00      0.67      0.80         3

   micro avg       0.83      0.83      0.83         6
   macro avg       0.67      0.56      0.60         6
weighted avg       1.00      0.83      0.90         6
 samples avg       0.70      0.70      0.70         6
";

    const SKLEARN: &str = "              precision    recall  f1-score   support

     class 0       0.50      1.00      0.67         1
     class 1       0.00      0.00      0.00         1
     class 2       1.00      0.67      0.80         3

    accuracy                           0.60         5
   macro avg       0.50      0.56      0.49         5
weighted avg       0.70      0.60      0.61         5
";
}
