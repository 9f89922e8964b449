//! The text that belongs to an image and the image that belongs to a text, or images of one class.

use std::collections::{BTreeMap, HashMap, HashSet};

use candle_core::{DType, Tensor};
use peft_adapters::Params;
use serde::{Deserialize, Serialize};

use super::joint::lacks;
use super::prompts::{Pad, Prompts};
use super::texts::drawn;
use super::{Definition, Forward, Task, TaskParts, Told, metrics};
use crate::clip::Encoded;
use crate::clip::model::unit_rows;
use crate::clip::tokenizer::Tokenizer;
use crate::data::{Example, Field, Reads};
use crate::error::{Error, Result};
use crate::named;
use crate::report::{Evaluation, Prediction};

mod kin;
mod loss;

use kin::{Kin, Shown};
use loss::Criterion;
pub use loss::{InfoNceConfig, RetrieveLoss, TripletConfig};

/// Options of retrieval.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetrieveConfig {
    /// `texts`: the text of an image, and the other way round. `labels`: other images of its class.
    pub pairs: RetrievePairs,
    /// `infonce`, `sigmoid` or `triplet`, with options.
    #[serde(deserialize_with = "named::one")]
    pub loss: RetrieveLoss,
    /// `longest` or `max`: how far texts are padded. `max` is slower and changes nothing.
    pub pad: Pad,
}

/// What is sought.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RetrievePairs {
    /// Texts of images, images of texts.
    #[default]
    Texts,
    /// Images of the same class.
    Labels,
}

impl Default for RetrieveConfig {
    fn default() -> Self {
        Self { pairs: RetrievePairs::Texts, loss: RetrieveLoss::InfoNce(InfoNceConfig::default()), pad: Pad::Longest }
    }
}

impl Definition for RetrieveConfig {
    fn name(&self) -> &'static str {
        "retrieve"
    }

    fn validate(&self, place: &str) -> Result<()> {
        self.loss.validate(&format!("{place}: task.retrieve"))
    }

    /// The sigmoid loss has two numbers, which alone are nothing to train.
    fn has_own_weights(&self) -> bool {
        false
    }

    fn metric(&self) -> &'static str {
        match self.pairs {
            RetrievePairs::Texts => "recall_mean",
            RetrievePairs::Labels => "mean_average_precision",
        }
    }

    fn metrics(&self) -> &'static [&'static str] {
        match self.pairs {
            RetrievePairs::Texts => &OF_TEXTS,
            RetrievePairs::Labels => &OF_IMAGES,
        }
    }

    fn reads(&self) -> Reads {
        let needed = if self.pairs == RetrievePairs::Labels { Field::Label } else { Field::Text };
        Reads { needed: vec![needed], also: Vec::new() }
    }

    fn texts(&self, _: &[String], examples: &[Example]) -> (Vec<String>, Pad) {
        let all = if self.pairs == RetrievePairs::Texts { examples } else { &[] };
        (all.iter().flat_map(|e| e.texts.iter().cloned()).collect(), self.pad)
    }

    fn texts_per_batch(&self, _: usize, batch: usize) -> usize {
        if self.pairs == RetrievePairs::Texts { batch } else { 0 }
    }

    fn build(&self, parts: &TaskParts<'_>, params: &mut Params) -> Result<Box<dyn Task>> {
        Ok(Box::new(Retrieve {
            criterion: Criterion::new(self.loss, self.pairs == RetrievePairs::Labels, params)?,
            pairs: self.pairs,
            pad: self.pad,
            seed: parts.seed,
            classes: parts.classes.to_vec(),
            tokenizer: parts.tokenizer.clone(),
        }))
    }
}

/// What an evaluation of images and texts gives besides the loss.
const OF_TEXTS: [&str; 11] = [
    "recall_mean",
    "image_to_text_recall_at_1",
    "image_to_text_recall_at_5",
    "image_to_text_recall_at_10",
    "image_to_text_median_rank",
    "image_to_text_mean_average_precision",
    "text_to_image_recall_at_1",
    "text_to_image_recall_at_5",
    "text_to_image_recall_at_10",
    "text_to_image_median_rank",
    "text_to_image_mean_average_precision",
];

/// And of images among themselves.
const OF_IMAGES: [&str; 6] = ["recall_at_1", "recall_at_5", "recall_at_10", "median_rank", "mean_average_precision", "map_at_r"];

/// Examples that the loss of an evaluation sees at once.
const CHUNK: usize = 256;

struct Retrieve {
    pairs: RetrievePairs,
    pad: Pad,
    seed: u64,
    classes: Vec<String>,
    tokenizer: Tokenizer,
    criterion: Criterion,
}

impl Task for Retrieve {
    fn check(&self, examples: &[Example]) -> Result<()> {
        for e in examples {
            match self.pairs {
                RetrievePairs::Texts if e.texts.is_empty() || e.texts.iter().any(|t| t.trim().is_empty()) => {
                    return Err(lacks("retrieve", &e.id, "text, or an empty one").hint(
                        "data.table.text names the column; a folder of classes has no texts: pairs: labels seeks images of a class",
                    ));
                }
                RetrievePairs::Labels if e.label.is_none() => {
                    return Err(lacks("retrieve", &e.id, "label").hint("data.table.label names the column; pairs: texts needs none"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn undefined(&self, examples: &[Example]) -> Vec<&'static str> {
        let mut seen = HashSet::new();
        match self.pairs == RetrievePairs::Labels && examples.iter().all(|e| seen.insert(e.label)) {
            true => OF_IMAGES.to_vec(),
            false => Vec::new(),
        }
    }

    fn loss(&mut self, on: &Forward<'_, '_>, images: &Encoded, examples: &[&Example]) -> Result<Tensor> {
        if self.pairs == RetrievePairs::Labels {
            return self.criterion.of(on, &images.features, &images.features, &Kin::of_labels(examples));
        }
        let texts: Vec<&str> = examples.iter().map(|e| drawn(self.seed, on.epoch, e)).collect();
        let owned: Vec<String> = texts.iter().map(ToString::to_string).collect();
        let prompts = Prompts::new(&self.tokenizer, &owned, self.pad)?;
        self.criterion.of(on, &images.features, &prompts.features(on)?, &Kin::of_texts(examples, &texts))
    }

    fn evaluate(&mut self, on: &Forward<'_, '_>, features: &Tensor, examples: &[Example]) -> Result<Evaluation> {
        match self.pairs {
            RetrievePairs::Texts => self.of_texts(on, features, examples),
            RetrievePairs::Labels => self.of_images(on, features, examples),
        }
    }

    fn tell(&self, _: &Tensor, _: &[Example]) -> Result<Vec<Told>> {
        Err(Error::input("predict", "retrieval has no prediction for an image alone")
            .hint("pass --labels to rank texts, or use `peft embed`"))
    }

    fn drop_last(&self) -> bool {
        true
    }
}

impl Retrieve {
    fn of_texts(&self, on: &Forward<'_, '_>, features: &Tensor, examples: &[Example]) -> Result<Evaluation> {
        let found = Candidates::new(examples);
        let prompts = Prompts::new(&self.tokenizer, &found.texts, self.pad)?;
        let texts = unit_rows(&prompts.features(on)?)?;
        let images = unit_rows(&rows_of(features, &found.rows)?)?;
        let cosine = images.matmul(&texts.t()?)?.to_dtype(DType::F32)?;
        let by_image = cosine.to_vec2::<f32>()?;
        let mut all = found.metrics(&by_image, &cosine.t()?.contiguous()?.to_vec2::<f32>()?);
        let recalls: Vec<f64> = all.iter().filter(|(name, _)| name.contains("_recall_")).map(|(_, v)| *v).collect();
        all.insert("recall_mean".into(), recalls.iter().sum::<f64>() / recalls.len().max(1) as f64);
        let best = metrics::argmax(&by_image);
        // Of several right texts the predicted one, where it is right.
        let right = |i: usize, t: usize| if found.belongs(i, t) { Some(&found.texts[t]) } else { examples[found.rows[i]].texts.first() };
        let predictions = best.into_iter().enumerate().map(|(i, t)| Prediction {
            id: examples[found.rows[i]].id.clone(),
            label: right(i, t as usize).cloned(),
            prediction: found.texts[t as usize].clone(),
            scores: Vec::new(),
            logits: Vec::new(),
        });
        let loss = chunked(examples, |from, chunk| {
            let references: Vec<&Example> = chunk.iter().collect();
            let first: Vec<&str> = chunk.iter().map(|e| e.texts[0].as_str()).collect();
            let rows: Vec<u32> = (from..from + chunk.len()).map(|i| found.first_text[i] as u32).collect();
            let own = texts.index_select(&Tensor::from_vec(rows, chunk.len(), texts.device())?, 0)?;
            self.criterion.of(on, &features.narrow(0, from, chunk.len())?, &own, &Kin::of_texts(&references, &first))
        })?;
        Ok(evaluation(examples, loss, all, predictions.collect()))
    }

    /// Every image as a query among all others. A row that repeats an image and its class adds nothing.
    fn of_images(&self, on: &Forward<'_, '_>, features: &Tensor, all_rows: &[Example]) -> Result<Evaluation> {
        let mut seen = HashSet::new();
        let kept: Vec<usize> =
            (0..all_rows.len()).filter(|&i| all_rows[i].image_key.is_none_or(|key| seen.insert((key, all_rows[i].label)))).collect();
        let examples: Vec<&Example> = kept.iter().map(|&i| &all_rows[i]).collect();
        let images = unit_rows(&rows_of(features, &kept)?)?;
        let mut rows = images.matmul(&images.t()?)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let other = |i: usize, j: usize| i != j && !examples[i].same_image(examples[j]);
        let relation = |i: usize, j: usize| other(i, j).then(|| examples[i].label == examples[j].label);
        let mut all = BTreeMap::new();
        metrics::retrieval("", &rows, relation, &mut all);
        all.extend(metrics::map_at_r(&rows, relation).map(|value| ("map_at_r".to_string(), value)));
        for (i, row) in rows.iter_mut().enumerate() {
            row.iter_mut().enumerate().filter(|(j, _)| !other(i, *j)).for_each(|(_, score)| *score = f32::NEG_INFINITY);
        }
        let name = |label: Option<u32>| label.and_then(|l| self.classes.get(l as usize)).cloned();
        // The nearest one's class.
        let predictions = examples.iter().zip(metrics::argmax(&rows)).map(|(e, nearest)| Prediction {
            id: e.id.clone(),
            label: name(e.label),
            prediction: name(examples[nearest as usize].label).unwrap_or_default(),
            scores: Vec::new(),
            logits: Vec::new(),
        });
        let loss = chunked(all_rows, |from, chunk| {
            let own = features.narrow(0, from, chunk.len())?;
            self.criterion.of(on, &own, &own, &Kin::of_labels(&chunk.iter().collect::<Vec<_>>()))
        })?;
        Ok(evaluation(all_rows, loss, all, predictions.collect()))
    }
}

fn evaluation(examples: &[Example], loss: f64, metrics: BTreeMap<String, f64>, predictions: Vec<Prediction>) -> Evaluation {
    Evaluation { examples: examples.len(), loss, metrics, predictions, classification: None }
}

/// # Shapes
/// `features` [N, P] → [rows, P]
fn rows_of(features: &Tensor, rows: &[usize]) -> Result<Tensor> {
    if rows.len() == features.dim(0)? {
        return Ok(features.clone());
    }
    let index = Tensor::from_vec(rows.iter().map(|&r| r as u32).collect(), rows.len(), features.device())?;
    Ok(features.index_select(&index, 0)?)
}

/// The mean of a loss over chunks of a split.
fn chunked(examples: &[Example], loss: impl Fn(usize, &[Example]) -> Result<Tensor>) -> Result<f64> {
    let (mut sum, mut from) = (0.0, 0);
    for chunk in examples.chunks(CHUNK) {
        let own = loss(from, chunk)?.to_dtype(DType::F32)?.to_scalar::<f32>()?;
        sum += f64::from(own) * chunk.len() as f64;
        from += chunk.len();
    }
    Ok(sum / examples.len().max(1) as f64)
}

/// All different images and texts of a split, and what belongs to what. An image that several rows show is one candidate, and all
/// captions of these rows are its own.
struct Candidates {
    texts: Vec<String>,
    /// The first row of each image.
    rows: Vec<usize>,
    /// The first text of each row.
    first_text: Vec<usize>,
    /// The group (or itself) of each image.
    shown: Vec<Shown>,
    /// What each text belongs to.
    of_text: Vec<Vec<Shown>>,
}

impl Candidates {
    fn new(examples: &[Example]) -> Self {
        let mut index: HashMap<&str, usize> = HashMap::new();
        let mut images = HashSet::new();
        let mut found = Self { texts: Vec::new(), rows: Vec::new(), first_text: Vec::new(), shown: Vec::new(), of_text: Vec::new() };
        for (row, e) in examples.iter().enumerate() {
            let shown = Shown::of(e);
            let mut first = None;
            for text in &e.texts {
                let at = *index.entry(text).or_insert_with(|| {
                    found.texts.push(text.clone());
                    found.of_text.push(Vec::new());
                    found.texts.len() - 1
                });
                if !found.of_text[at].contains(&shown) {
                    found.of_text[at].push(shown);
                }
                first = first.or(Some(at));
            }
            found.first_text.push(first.unwrap_or(0));
            if e.image_key.is_none_or(|key| images.insert(key)) {
                found.rows.push(row);
                found.shown.push(shown);
            }
        }
        found
    }

    /// Both ways: a row for each image and one for each text.
    fn metrics(&self, by_image: &[Vec<f32>], by_text: &[Vec<f32>]) -> BTreeMap<String, f64> {
        let mut all = BTreeMap::new();
        metrics::retrieval("image_to_text_", by_image, |i, t| Some(self.belongs(i, t)), &mut all);
        metrics::retrieval("text_to_image_", by_text, |t, i| Some(self.belongs(i, t)), &mut all);
        all
    }

    fn belongs(&self, image: usize, text: usize) -> bool {
        self.of_text[text].iter().any(|of| of.belongs(&self.shown[image]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 20 images with five captions each, one a row: as numpy counts it over the same features (`np.argsort(-scores)[:k]`, a hit where any
    /// caption of the image, or the caption's one image, is among them). With a gallery row for each caption, and the own row as the
    /// only right one, text to image at 5 would be 0.4.
    #[test]
    fn an_image_of_several_rows_is_one_candidate() {
        const WIDTH: usize = 8;
        let image = |i: usize| (0..WIDTH).map(move |j| ((1 + 7 * i + 3 * j + i * j) as f64).sin());
        let text = |k: usize| image(k / 5).enumerate().map(move |(j, v)| v + 1.2 * ((2 + 5 * k + 11 * j + k * j) as f64).cos());
        let unit = |v: Vec<f64>| {
            let norm = v.iter().map(|x| x * x).sum::<f64>().sqrt();
            v.into_iter().map(|x| x / norm).collect::<Vec<_>>()
        };
        let row = |k: usize| Example {
            id: format!("{}.png", k / 5),
            texts: vec![format!("caption {k}")],
            image_key: Some((k / 5) as u128),
            ..Example::default()
        };
        let found = Candidates::new(&(0..100).map(row).collect::<Vec<_>>());
        assert_eq!((found.rows.len(), found.texts.len()), (20, 100));
        let images: Vec<Vec<f64>> = found.rows.iter().map(|&r| unit(image(r / 5).collect())).collect();
        let texts: Vec<Vec<f64>> = (0..100).map(|k| unit(text(k).collect())).collect();
        let product = |a: &[Vec<f64>], b: &[Vec<f64>]| -> Vec<Vec<f32>> {
            let dot = |x: &Vec<f64>, y: &Vec<f64>| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>() as f32;
            a.iter().map(|x| b.iter().map(|y| dot(x, y)).collect()).collect()
        };
        let all = found.metrics(&product(&images, &texts), &product(&texts, &images));
        for (name, expected) in [
            ("image_to_text_recall_at_1", 0.45),
            ("image_to_text_recall_at_5", 0.9),
            ("image_to_text_recall_at_10", 0.95),
            ("image_to_text_median_rank", 2.0),
            ("text_to_image_recall_at_1", 0.4),
            ("text_to_image_recall_at_5", 0.94),
            ("text_to_image_recall_at_10", 0.98),
            ("text_to_image_median_rank", 2.0),
        ] {
            assert!((all[name] - expected).abs() < 1e-9, "{name}: {} {expected}", all[name]);
        }
    }
}
