//! The text that belongs to an image, and the image that belongs to a text.

use std::collections::{BTreeMap, HashMap, HashSet};

use candle_core::{D, DType, Tensor};
use peft_adapters::{Params, rng};
use serde::{Deserialize, Serialize};

use super::prompts::{Pad, Prompts};
use super::texts::drawn;
use super::{Definition, Forward, Task, TaskParts, Told, metrics};
use crate::clip::Encoded;
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

impl Definition for RetrieveConfig {
    fn name(&self) -> &'static str {
        "retrieve"
    }

    fn validate(&self, _: &str) -> Result<()> {
        Ok(())
    }

    fn has_own_weights(&self) -> bool {
        false
    }

    fn metric(&self) -> &'static str {
        "recall_mean"
    }

    fn metrics(&self) -> &'static [&'static str] {
        &METRICS
    }

    fn texts(&self, _: &[String], examples: &[Example]) -> (Vec<String>, Pad) {
        (examples.iter().flat_map(|e| e.texts.iter().cloned()).collect(), self.pad)
    }

    fn build(&self, parts: &TaskParts<'_>, _: &mut Params) -> Result<Box<dyn Task>> {
        Ok(Box::new(Retrieve::new(self, parts)))
    }
}

/// What an evaluation gives besides the loss.
const METRICS: [&str; 7] = [
    "recall_mean",
    "image_to_text_recall_at_1",
    "image_to_text_recall_at_5",
    "image_to_text_recall_at_10",
    "text_to_image_recall_at_1",
    "text_to_image_recall_at_5",
    "text_to_image_recall_at_10",
];

struct Retrieve {
    pad: Pad,
    seed: u64,
    tokenizer: Tokenizer,
    truncated: usize,
}

impl Retrieve {
    fn new(config: &RetrieveConfig, parts: &TaskParts<'_>) -> Self {
        Self { pad: config.pad, seed: parts.seed, tokenizer: parts.tokenizer.clone(), truncated: 0 }
    }
}

/// Which texts belong to which images: the example's own, those of its group, and whatever else is one of its captions
/// ("an icon of a mammal", drawn for another mammal).
struct Pairs {
    count: usize,
    belongs: Vec<bool>,
}

impl Pairs {
    fn new(examples: &[&Example], texts: &[&str]) -> Self {
        let group = |e: &Example| rng::name_key(e.group.as_deref().unwrap_or(&e.id));
        let drawn: Vec<(u64, u64)> = examples.iter().zip(texts).map(|(e, t)| (group(e), rng::name_key(t))).collect();
        let of_image = |(at, image): (usize, &&Example)| {
            let captions: HashSet<u64> = image.texts.iter().map(|t| rng::name_key(t)).collect();
            let own = drawn[at];
            let belongs = |&(group, text): &(u64, u64)| group == own.0 || text == own.1 || captions.contains(&text);
            drawn.iter().map(belongs).collect::<Vec<_>>()
        };
        Self { count: examples.len(), belongs: examples.iter().enumerate().flat_map(of_image).collect() }
    }

    /// [B, B]: row i spreads 1 over the texts of image i, or, the other way round, over the images of text i.
    fn targets(&self, of_text: bool) -> Vec<f32> {
        let n = self.count;
        let at = |i: usize, j: usize| self.belongs[if of_text { j * n + i } else { i * n + j }];
        let row = |i: usize| {
            let share = 1.0 / (0..n).filter(|&j| at(i, j)).count().max(1) as f32;
            (0..n).map(move |j| if at(i, j) { share } else { 0.0 })
        };
        (0..n).flat_map(row).collect()
    }
}

/// Symmetric InfoNCE with soft targets: ½ Σ −t log softmax(rows) + ½ Σ −t log softmax(columns), per row.
///
/// # Shapes
/// `logits` [B, B], images by texts → scalar
fn info_nce(logits: &Tensor, pairs: &Pairs) -> Result<Tensor> {
    let one_way = |logits: &Tensor, of_text: bool| -> Result<Tensor> {
        let targets = Tensor::from_vec(pairs.targets(of_text), logits.shape(), logits.device())?.to_dtype(logits.dtype())?;
        let log_p = candle_nn::ops::log_softmax(logits, D::Minus1)?;
        Ok((log_p * targets)?.sum(D::Minus1)?.mean_all()?.neg()?)
    };
    let both = (one_way(logits, false)? + one_way(&logits.t()?.contiguous()?, true)?)?;
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

    fn loss(&mut self, on: &Forward<'_, '_>, images: &Encoded, examples: &[&Example]) -> Result<Tensor> {
        let texts: Vec<&str> = examples.iter().map(|e| drawn(self.seed, on.epoch, e)).collect();
        let owned: Vec<String> = texts.iter().map(ToString::to_string).collect();
        let prompts = Prompts::new(&self.tokenizer, &owned, self.pad)?;
        self.truncated += prompts.truncated;
        let logits = on.clip.logits(&images.features, &prompts.features(on)?, on.patches)?;
        info_nce(&logits, &Pairs::new(examples, &texts))
    }

    fn evaluate(&mut self, on: &Forward<'_, '_>, features: &Tensor, examples: &[Example]) -> Result<Evaluation> {
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
        let mean = recalls.iter().sum::<f64>() / recalls.len().max(1) as f64;
        all.insert("recall_mean".into(), mean);
        let best = metrics::argmax(&by_image);
        // Of several right texts the predicted one, where it is right.
        let right = |i: usize, t: usize| if found.belongs(i, t) { Some(&found.texts[t]) } else { examples[i].texts.first() };
        let predictions = examples.iter().zip(best).enumerate().map(|(i, (e, t))| Prediction {
            id: e.id.clone(),
            label: right(i, t as usize).cloned(),
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
    /// The training loss over chunks of at most 256 examples, with each example's first text.
    fn evaluation_loss(
        &self,
        on: &Forward<'_, '_>,
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
            let loss = info_nce(&logits.to_dtype(DType::F32)?, &Pairs::new(&references, &first))?.to_scalar::<f32>()?;
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

    fn example(id: &str, group: Option<&str>, texts: &[&str]) -> Example {
        let texts = texts.iter().map(ToString::to_string).collect();
        Example { id: id.into(), texts, group: group.map(Into::into), ..Default::default() }
    }

    #[test]
    fn groups_and_equal_texts_are_no_negatives() {
        let all = [example("a", Some("g"), &[]), example("b", Some("g"), &[]), example("c", None, &[]), example("d", None, &[])];
        let references: Vec<&Example> = all.iter().collect();
        let t = Pairs::new(&references, &["one", "two", "same", "same"]).targets(false);
        assert_eq!(&t[0..4], &[0.5, 0.5, 0.0, 0.0]);
        assert_eq!(&t[8..12], &[0.0, 0.0, 0.5, 0.5]);
    }

    /// The cat's caption "a mammal" is also one of the dog's, which drew "a dog" this time.
    #[test]
    fn a_text_that_is_also_anothers_caption_is_no_negative_of_it() {
        let all = [example("cat", None, &["a cat", "a mammal"]), example("dog", None, &["a dog", "a mammal"])];
        let references: Vec<&Example> = all.iter().collect();
        let pairs = Pairs::new(&references, &["a mammal", "a dog"]);
        assert_eq!(pairs.targets(false), [1.0, 0.0, 0.5, 0.5]);
        assert_eq!(pairs.targets(true), [0.5, 0.5, 0.0, 1.0]);
    }
}
