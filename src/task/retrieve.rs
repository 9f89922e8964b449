//! The text that belongs to an image, and the image that belongs to a text.

use std::collections::{BTreeMap, HashMap};

use candle_core::{D, DType, Tensor};
use peft_adapters::rng;
use rand::Rng;
use serde::{Deserialize, Serialize};

use super::prompts::{Pad, Prompts};
use super::{Forward, Task, TaskParts, metrics};
use crate::clip::model::unit_rows;
use crate::clip::tokenizer::Tokenizer;
use crate::data::Example;
use crate::error::{Error, Result};
use crate::report::{Evaluation, Prediction};

/// Options of retrieval.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetrieveConfig {
    /// `longest` or `max`: how far texts are padded. `max` is slower and changes nothing.
    pub pad: Pad,
}

/// What an evaluation gives besides the loss.
pub(super) const METRICS: [&str; 7] = [
    "recall_mean",
    "image_to_text_recall_at_1",
    "image_to_text_recall_at_5",
    "image_to_text_recall_at_10",
    "text_to_image_recall_at_1",
    "text_to_image_recall_at_5",
    "text_to_image_recall_at_10",
];

pub(super) struct Retrieve {
    pad: Pad,
    seed: u64,
    tokenizer: Tokenizer,
    truncated: usize,
}

impl Retrieve {
    pub(super) fn new(config: &RetrieveConfig, parts: &TaskParts<'_>) -> Self {
        Self { pad: config.pad, seed: parts.seed, tokenizer: parts.tokenizer.clone(), truncated: 0 }
    }

    /// One text of each example, another one each epoch.
    fn draw<'e>(&self, epoch: usize, examples: &[&'e Example]) -> Vec<&'e str> {
        let one = |e: &&'e Example| {
            let mut rng = rng::rng(self.seed, &[rng::name_key("text"), epoch as u64, rng::name_key(&e.id)]);
            e.texts[rng.random_range(0..e.texts.len())].as_str()
        };
        examples.iter().map(one).collect()
    }
}

/// [B, B]: rows sum to 1 over what belongs together: the same example, group or text.
fn targets(examples: &[&Example], texts: &[&str]) -> Vec<f32> {
    let count = examples.len();
    let key = |e: &Example| rng::name_key(e.group.as_deref().unwrap_or(&e.id));
    let keys: Vec<(u64, u64)> = examples.iter().zip(texts).map(|(e, t)| (key(e), rng::name_key(t))).collect();
    let mut all = vec![0f32; count * count];
    for (row, own) in all.chunks_exact_mut(count).zip(&keys) {
        let same: Vec<usize> = (0..count).filter(|&j| keys[j].0 == own.0 || keys[j].1 == own.1).collect();
        for &j in &same {
            row[j] = 1.0 / same.len() as f32;
        }
    }
    all
}

/// Symmetric InfoNCE with soft targets: ½ Σ −t log softmax(rows) + ½ Σ −t log softmax(columns), per row.
///
/// `targets` is symmetric in what belongs together, so it serves both directions.
fn info_nce(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let one_way = |logits: &Tensor| -> Result<Tensor> {
        let log_p = candle_nn::ops::log_softmax(logits, D::Minus1)?;
        Ok((log_p * targets)?.sum(D::Minus1)?.mean_all()?.neg()?)
    };
    let both = (one_way(logits)? + one_way(&logits.t()?.contiguous()?)?)?;
    Ok((both * 0.5)?)
}

impl Task for Retrieve {
    fn check(&self, examples: &[Example]) -> Result<()> {
        match examples.iter().find(|e| e.texts.is_empty() || e.texts.iter().any(|t| t.trim().is_empty())) {
            Some(e) => Err(Error::input("task.retrieve", format!("`{}` has no text, or an empty one", e.id))
                .hint("data.table.text names the column; a folder of classes has no texts")),
            None => Ok(()),
        }
    }

    fn loss(&mut self, on: &Forward<'_>, features: &Tensor, examples: &[&Example]) -> Result<Tensor> {
        let texts = self.draw(on.epoch, examples);
        let owned: Vec<String> = texts.iter().map(ToString::to_string).collect();
        let prompts = Prompts::new(&self.tokenizer, &owned, self.pad)?;
        self.truncated += prompts.truncated;
        let logits = on.clip.logits(features, &prompts.features(on.clip, on.patches)?, on.patches)?;
        let targets = Tensor::from_vec(targets(examples, &texts), logits.shape(), logits.device())?.to_dtype(logits.dtype())?;
        info_nce(&logits, &targets)
    }

    fn evaluate(&mut self, on: &Forward<'_>, features: &Tensor, examples: &[Example]) -> Result<Evaluation> {
        let found = Candidates::new(examples);
        let prompts = Prompts::new(&self.tokenizer, &found.texts, self.pad)?;
        let texts = unit_rows(&prompts.features(on.clip, on.patches)?)?;
        let images = unit_rows(features)?;
        let cosine = images.matmul(&texts.t()?)?.to_dtype(DType::F32)?;
        let by_image = cosine.to_vec2::<f32>()?;
        let mut all = BTreeMap::new();
        metrics::recall("image_to_text", &by_image, |i, t| found.belongs(i, t), &mut all);
        let by_text = cosine.t()?.contiguous()?.to_vec2::<f32>()?;
        metrics::recall("text_to_image", &by_text, |t, i| found.belongs(i, t), &mut all);
        let mean = all.values().sum::<f64>() / all.len().max(1) as f64;
        all.insert("recall_mean".into(), mean);
        let best = metrics::argmax(&by_image);
        let predictions = examples.iter().zip(best).map(|(e, t)| Prediction {
            id: e.id.clone(),
            label: e.texts.first().cloned(),
            prediction: found.texts[t as usize].clone(),
            scores: Vec::new(),
        });
        Ok(Evaluation {
            examples: examples.len(),
            loss: self.evaluation_loss(on, features, examples, &found, &texts)?,
            metrics: all,
            predictions: predictions.collect(),
            classification: None,
        })
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
    /// The training loss over chunks of at most 256 examples, with each example's first text.
    fn evaluation_loss(
        &self,
        on: &Forward<'_>,
        features: &Tensor,
        examples: &[Example],
        found: &Candidates,
        texts: &Tensor,
    ) -> Result<f64> {
        const CHUNK: usize = 256;
        let (mut sum, mut from) = (0.0, 0);
        for chunk in examples.chunks(CHUNK) {
            let references: Vec<&Example> = chunk.iter().collect();
            let first: Vec<&str> = chunk.iter().map(|e| e.texts[0].as_str()).collect();
            let rows: Vec<u32> = (from..from + chunk.len()).map(|i| found.of_image[i][0] as u32).collect();
            let rows = Tensor::from_vec(rows, chunk.len(), texts.device())?;
            let own = texts.index_select(&rows, 0)?;
            let logits = on.clip.logits(&features.narrow(0, from, chunk.len())?, &own, on.patches)?;
            let targets = Tensor::from_vec(targets(&references, &first), logits.shape(), logits.device())?;
            let loss = info_nce(&logits.to_dtype(DType::F32)?, &targets)?.to_scalar::<f32>()?;
            sum += f64::from(loss) * chunk.len() as f64;
            from += chunk.len();
        }
        Ok(sum / examples.len().max(1) as f64)
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::ImageRef;

    fn example(id: &str, group: Option<&str>) -> Example {
        Example { id: id.into(), image: ImageRef::Embedded(b""), texts: vec![], label: None, group: group.map(Into::into) }
    }

    #[test]
    fn groups_and_equal_texts_are_no_negatives() {
        let all = [example("a", Some("g")), example("b", Some("g")), example("c", None), example("d", None)];
        let references: Vec<&Example> = all.iter().collect();
        let t = targets(&references, &["one", "two", "same", "same"]);
        assert_eq!(&t[0..4], &[0.5, 0.5, 0.0, 0.0]);
        assert_eq!(&t[8..12], &[0.0, 0.0, 0.5, 0.5]);
    }
}
