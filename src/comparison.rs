//! What a comparison found out: the schema of `compare.json`, from which the tables and the page are made.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::figures::{metric, number};
use crate::report::is_fraction;

/// `compare.json`. Metrics are fractions from 0 to 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Version of this program.
    pub version: String,
    /// The row that others are compared with, as it was asked for; that of the first group where nobody asked.
    pub reference: String,
    /// One for each set of runs with the same base, splits and budget.
    pub groups: Vec<Group>,
    /// What a reader should know.
    pub notes: Vec<String>,
}

/// Rows that can be compared: same base, splits and budget.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// What it is called: the recipe, and the shots where they vary.
    pub name: String,
    /// The recipe.
    pub recipe: String,
    /// Training examples for each class; all where there is none.
    pub shots: Option<usize>,
    /// The base as the recipe names it.
    pub base: String,
    /// Digest of the base.
    pub base_digest: String,
    /// `classify`, `retrieve`.
    pub task: String,
    /// The metric that is compared.
    pub metric: String,
    /// The split that it is measured on.
    pub split: String,
    /// Class names in label order.
    pub classes: Vec<String>,
    /// Examples in train, val and test.
    pub examples: [usize; 3],
    /// How long each run may take.
    pub budget: Budget,
    /// The base without training: metrics of the test split, zero-shot; none where it has random weights.
    pub zero_shot: Option<BTreeMap<String, f64>>,
    /// The second set, and the base on it.
    pub forget: Option<Forget>,
    /// The row that the others of this group are compared with; none where the one that was asked for is missing.
    #[serde(default)]
    pub reference: Option<String>,
    /// Milliseconds an image of the bare base: the least that was measured in turn with the rows.
    pub base_ms: Option<f64>,
    /// In the order of `--methods`.
    pub rows: Vec<Row>,
}

/// How long a run may take.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Budget {
    /// In what it is counted.
    pub unit: Unit,
    /// How many; for seconds each row's steps follow from a measured step.
    pub amount: f64,
    /// Whether early stopping may end a run before.
    pub early_stopping: bool,
}

/// What a budget is counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    /// Passes over the training split.
    Epochs,
    /// Optimiser steps.
    Steps,
    /// Seconds of steps, evaluation apart.
    Seconds,
}

/// Zero-shot classification of a second set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Forget {
    /// Its `data` section.
    pub data: serde_json::Value,
    /// Prompts.
    pub templates: Vec<String>,
    /// Examples evaluated.
    pub examples: usize,
    /// Accuracy of the base.
    pub before: f64,
}

/// A method.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Its name in the comparison.
    pub method: String,
    /// Its options.
    pub options: serde_json::Value,
    /// Peak learning rate.
    pub lr: f64,
    /// How the learning rate was found; none where it was given.
    pub search: Option<Vec<Trial>>,
    /// One for each seed.
    pub runs: Vec<RunRow>,
    /// The group's metric on the test split.
    pub test: Option<Spread>,
    /// All metrics and the loss on the test split.
    pub metrics: BTreeMap<String, Spread>,
    /// Against the reference.
    pub difference: Option<Difference>,
    /// Numbers that are trained.
    pub trainable_parameters: Option<usize>,
    /// All files of the adapter.
    pub delta_bytes: Option<u64>,
    /// Training, evaluation included.
    pub seconds: Option<Spread>,
    /// Images a second, evaluation apart.
    pub images_per_second: Option<Spread>,
    /// The largest resident set of any of its runs, each a process of its own.
    pub peak_rss_mib: Option<f64>,
    /// How fast it predicts.
    pub inference: Option<Inference>,
    /// Accuracy on the second set afterwards.
    pub forget: Option<Spread>,
    /// Why there is none.
    pub forget_failed: Option<String>,
    /// Whether no other row has as few parameters and a better metric.
    pub pareto: bool,
}

/// A learning rate that was tried.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// The learning rate.
    pub lr: f64,
    /// Mean over seeds of the metric on the validation split, at each run's best epoch.
    pub validation: Option<f64>,
    /// Mean over seeds of the loss there, which breaks ties.
    pub loss: Option<f64>,
    /// Why it is out.
    pub failed: Option<String>,
    /// Whether it was chosen.
    pub chosen: bool,
}

/// One run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunRow {
    /// Its seed.
    pub seed: u64,
    /// Its directory.
    pub run: PathBuf,
    /// Why it has no figures.
    pub failed: Option<String>,
    /// The group's metric on the test split.
    pub test: Option<f64>,
    /// The same on the validation split, at the best epoch.
    pub validation: Option<f64>,
    /// Optimiser steps done.
    pub steps: Option<usize>,
    /// The epoch that was chosen.
    pub best_epoch: Option<usize>,
    /// Training, evaluation included.
    pub seconds: Option<f64>,
    /// Accuracy on the second set afterwards.
    pub forget: Option<f64>,
}

/// A figure over seeds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The mean.
    pub mean: f64,
    /// Standard deviation of a sample (n − 1); none of one run.
    pub sd: Option<f64>,
    /// In the order of the finished runs.
    pub values: Vec<f64>,
}

/// This row minus the reference, paired: the same seeds, the same test examples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// What is averaged over examples: `accuracy`, or `image_to_text_recall_at_1`.
    pub of: String,
    /// Mean over seeds and examples.
    pub mean: f64,
    /// Bootstrap percentiles 2.5 and 97.5 over test examples; an example is drawn with all its seeds.
    pub interval: [f64; 2],
    /// Bootstrap samples.
    pub resamples: usize,
    /// Test examples.
    pub examples: usize,
    /// Each seed alone.
    pub seeds: Vec<SeedDifference>,
}

/// The difference of one pair of runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SeedDifference {
    /// The seed.
    pub seed: u64,
    /// Mean over examples.
    pub mean: f64,
    /// Bootstrap percentiles 2.5 and 97.5 over test examples.
    pub interval: [f64; 2],
}

/// Image tower and class scores, the text side encoded before; medians, taken in turn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Inference {
    /// Images at once.
    pub batch: usize,
    /// Milliseconds an image of the bare base.
    pub base_ms: f64,
    /// Milliseconds an image with the adapter beside the base.
    pub unmerged_ms: f64,
    /// Milliseconds an image with the adapter folded into the base.
    pub merged_ms: Option<f64>,
    /// Why it does not fold.
    pub unfoldable: Option<String>,
}

impl Spread {
    /// Of some values; `None` of none.
    #[must_use]
    pub fn new(values: Vec<f64>) -> Option<Self> {
        let n = values.len() as f64;
        if values.is_empty() {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n;
        let sd = (values.len() > 1).then(|| (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt());
        Some(Self { mean, sd, values })
    }
}

impl Inference {
    /// `1.93`, `×1.02`: milliseconds an image, and how many times the base's, for the adapter beside the base and folded into it.
    #[must_use]
    pub fn texts(&self) -> [Option<[String; 2]>; 2] {
        let text = |ms: f64| [number(ms), format!("×{:.2}", ms / self.base_ms.max(1e-12))];
        [Some(text(self.unmerged_ms)), self.merged_ms.map(text)]
    }
}

impl Row {
    /// The peak learning rate; none where nothing is trained.
    #[must_use]
    pub fn trained_lr(&self) -> Option<f64> {
        (self.trainable_parameters != Some(0)).then_some(self.lr)
    }

    /// Why it has fewer runs than seeds, one line for each reason.
    #[must_use]
    pub fn failures(&self) -> Vec<String> {
        let mut all: Vec<String> = Vec::new();
        for run in &self.runs {
            if let Some(why) = &run.failed {
                let line = why.lines().next().unwrap_or_default().to_string();
                match all.iter_mut().find(|l| l.ends_with(&line)) {
                    Some(_) => {}
                    None => all.push(format!("seed {}: {line}", run.seed)),
                }
            }
        }
        all
    }
}

impl Budget {
    /// `20 epochs, less where early stopping ends a run`.
    #[must_use]
    pub fn text(&self) -> String {
        let unit = match self.unit {
            Unit::Epochs => "epochs",
            Unit::Steps => "steps",
            Unit::Seconds => "seconds of training steps",
        };
        format!("{} {unit}{}", self.amount, if self.early_stopping { ", less where early stopping ends a run" } else { "" })
    }
}

/// 47.2 ± 2.2 %.
#[must_use]
pub fn spread(name: &str, s: &Spread) -> String {
    match (s.sd, is_fraction(name)) {
        (None, _) => metric(name, s.mean),
        (Some(sd), false) => format!("{} ± {}", number(s.mean), number(sd)),
        (Some(sd), true) => format!("{:.1} ± {:.1} %", 100.0 * s.mean, 100.0 * sd),
    }
}

/// A difference in percentage points.
#[must_use]
pub fn points(v: f64) -> String {
    // A rounded zero has no sign.
    let v = if (100.0 * v).abs() < 0.05 { 0.0 } else { 100.0 * v };
    format!(
        "{}{:.1}",
        if v > 0.0 {
            "+"
        } else if v < 0.0 {
            "−"
        } else {
            ""
        },
        v.abs()
    )
}

/// What stands above and below the table.
#[must_use]
pub fn remarks(group: &Group) -> Vec<String> {
    let [train, val, test] = group.examples;
    let seeds = group.rows.iter().map(|r| r.runs.len()).max().unwrap_or(0);
    let mut all = vec![format!(
        "{}: {train} training, {val} validation, {test} test examples; budget of each run: {}; {seeds} seed{}.",
        group.base,
        group.budget.text(),
        if seeds == 1 { "" } else { "s" },
    )];
    let mut trials = group.rows.iter().filter_map(|r| r.search.as_ref()).map(Vec::len);
    all.push(match trials.next() {
        Some(n) => format!("Learning rates: best of {n} by the mean validation {} over all seeds.", group.metric.replace('_', " ")),
        None => "Learning rates: as given by the recipe, not searched.".into(),
    });
    if let Some(first) = group.reference.as_ref().filter(|_| group.rows.iter().all(|r| r.method != "full") && group.rows.len() > 1) {
        all.push(format!("Differences are to {first}, since there is no row `full`."));
    }
    all.push("Speed: milliseconds an image, image tower and class scores, and how many times the bare base's, measured in turn.".into());
    if let Some(f) = &group.forget {
        let set = f.data.get("builtin").and_then(|b| b.as_str()).map_or_else(|| f.data.to_string(), ToString::to_string);
        all.push(format!(
            "Second set: zero-shot accuracy on {} examples of {set}, {} before training.",
            f.examples,
            metric("accuracy", f.before)
        ));
    }
    for row in &group.rows {
        all.extend(row.failures().iter().map(|f| format!("{} failed: {f}", row.method)));
        all.extend(row.inference.iter().filter_map(|i| i.unfoldable.as_ref()).map(|why| format!("{} does not merge: {why}.", row.method)));
        let why = row.forget_failed.as_ref().filter(|_| group.forget.is_some()).and_then(|why| why.lines().next());
        all.extend(why.map(|why| format!("{}: the second set could not be measured: {why}", row.method)));
    }
    all
}
