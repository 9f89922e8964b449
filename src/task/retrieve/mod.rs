//! The text that belongs to an image and the image that belongs to a text, or images of one class.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Tensor};
use peft_adapters::{Params, rng};
use serde::{Deserialize, Serialize};

use super::joint::lacks;
use super::prompts::{Pad, Prompts};
use super::texts::drawn;
use super::{Definition, Forward, Task, TaskParts, Told, metrics};
use crate::clip::Encoded;
use crate::clip::model::unit_rows;
use crate::clip::tokenizer::Tokenizer;
use crate::data::Example;
use crate::error::{Error, Result};
use crate::named;
use crate::report::{Evaluation, Prediction};

mod kin;
mod loss;

use kin::Kin;
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
            truncated: 0,
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
    truncated: usize,
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

    fn loss(&mut self, on: &Forward<'_, '_>, images: &Encoded, examples: &[&Example]) -> Result<Tensor> {
        if self.pairs == RetrievePairs::Labels {
            return self.criterion.of(on, &images.features, &images.features, &Kin::of_labels(examples));
        }
        let texts: Vec<&str> = examples.iter().map(|e| drawn(self.seed, on.epoch, e)).collect();
        let owned: Vec<String> = texts.iter().map(ToString::to_string).collect();
        let prompts = Prompts::new(&self.tokenizer, &owned, self.pad)?;
        self.truncated += prompts.truncated;
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

    fn warnings(&self) -> Vec<String> {
        match self.truncated {
            0 => Vec::new(),
            n => vec![format!("{n} texts were longer than the model's context and were cut")],
        }
    }
}

impl Retrieve {
    fn of_texts(&self, on: &Forward<'_, '_>, features: &Tensor, examples: &[Example]) -> Result<Evaluation> {
        let found = Candidates::new(examples);
        let prompts = Prompts::new(&self.tokenizer, &found.texts, self.pad)?;
        let texts = unit_rows(&prompts.features(on)?)?;
        let images = unit_rows(features)?;
        let cosine = images.matmul(&texts.t()?)?.to_dtype(DType::F32)?;
        let by_image = cosine.to_vec2::<f32>()?;
        let mut all = BTreeMap::new();
        metrics::retrieval("image_to_text_", &by_image, |i, t| Some(found.belongs(i, t)), &mut all);
        let by_text = cosine.t()?.contiguous()?.to_vec2::<f32>()?;
        metrics::retrieval("text_to_image_", &by_text, |t, i| Some(found.belongs(i, t)), &mut all);
        let recalls: Vec<f64> = all.iter().filter(|(name, _)| name.contains("_recall_")).map(|(_, v)| *v).collect();
        all.insert("recall_mean".into(), recalls.iter().sum::<f64>() / recalls.len().max(1) as f64);
        let best = metrics::argmax(&by_image);
        // Of several right texts the predicted one, where it is right.
        let right = |i: usize, t: usize| if found.belongs(i, t) { Some(&found.texts[t]) } else { examples[i].texts.first() };
        let predictions = examples.iter().zip(best).enumerate().map(|(i, (e, t))| Prediction {
            id: e.id.clone(),
            label: right(i, t as usize).cloned(),
            prediction: found.texts[t as usize].clone(),
            scores: Vec::new(),
        });
        let loss = chunked(examples, |from, chunk| {
            let references: Vec<&Example> = chunk.iter().collect();
            let first: Vec<&str> = chunk.iter().map(|e| e.texts[0].as_str()).collect();
            let rows: Vec<u32> = (from..from + chunk.len()).map(|i| found.of_image[i][0] as u32).collect();
            let own = texts.index_select(&Tensor::from_vec(rows, chunk.len(), texts.device())?, 0)?;
            self.criterion.of(on, &features.narrow(0, from, chunk.len())?, &own, &Kin::of_texts(&references, &first))
        })?;
        Ok(evaluation(examples, loss, all, predictions.collect()))
    }

    /// Every image as a query among all others.
    fn of_images(&self, on: &Forward<'_, '_>, features: &Tensor, examples: &[Example]) -> Result<Evaluation> {
        let images = unit_rows(features)?;
        let mut rows = images.matmul(&images.t()?)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let relation = |i: usize, j: usize| (i != j).then(|| examples[i].label == examples[j].label);
        let mut all = BTreeMap::new();
        metrics::retrieval("", &rows, relation, &mut all);
        all.insert("map_at_r".into(), metrics::map_at_r(&rows, relation));
        rows.iter_mut().enumerate().for_each(|(i, row)| row[i] = f32::NEG_INFINITY);
        let name = |label: Option<u32>| label.and_then(|l| self.classes.get(l as usize)).cloned();
        // The nearest one's class.
        let predictions = examples.iter().zip(metrics::argmax(&rows)).map(|(e, nearest)| Prediction {
            id: e.id.clone(),
            label: name(e.label),
            prediction: name(examples[nearest as usize].label).unwrap_or_default(),
            scores: Vec::new(),
        });
        let loss = chunked(examples, |from, chunk| {
            let own = features.narrow(0, from, chunk.len())?;
            self.criterion.of(on, &own, &own, &Kin::of_labels(&chunk.iter().collect::<Vec<_>>()))
        })?;
        Ok(evaluation(examples, loss, all, predictions.collect()))
    }
}

fn evaluation(examples: &[Example], loss: f64, metrics: BTreeMap<String, f64>, predictions: Vec<Prediction>) -> Evaluation {
    Evaluation { examples: examples.len(), loss, metrics, predictions, classification: None }
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

/// All different texts of a split and whose they are.
struct Candidates {
    texts: Vec<String>,
    /// Texts of each image.
    of_image: Vec<Vec<usize>>,
    /// The group (or itself) of each image.
    group: Vec<u64>,
    /// The groups that each text belongs to.
    groups_of_text: Vec<Vec<u64>>,
}

impl Candidates {
    fn new(examples: &[Example]) -> Self {
        let mut index: HashMap<&str, usize> = HashMap::new();
        let mut found = Self { texts: Vec::new(), of_image: Vec::new(), group: Vec::new(), groups_of_text: Vec::new() };
        for e in examples {
            let group = rng::name_key(e.group.as_deref().unwrap_or(&e.id));
            let mut own = Vec::new();
            for text in &e.texts {
                let at = *index.entry(text).or_insert_with(|| {
                    found.texts.push(text.clone());
                    found.groups_of_text.push(Vec::new());
                    found.texts.len() - 1
                });
                if !found.groups_of_text[at].contains(&group) {
                    found.groups_of_text[at].push(group);
                }
                own.push(at);
            }
            found.of_image.push(own);
            found.group.push(group);
        }
        found
    }

    fn belongs(&self, image: usize, text: usize) -> bool {
        self.groups_of_text[text].contains(&self.group[image])
    }
}
