//! The answer to a question about an image.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use candle_core::{D, DType, Device, Tensor};
use peft_adapters::Params;
use serde::{Deserialize, Serialize};

use super::joint::{Joint, JointParts, lacks};
use super::matching::bce;
use super::prompts::Pad;
use super::threshold::sigmoid;
use super::vqa::{accuracy, normalise, usual};
use super::{Definition, Forward, Needs, Task, TaskParts, Told};
use crate::clip::Encoded;
use crate::data::{Example, Field, Reads};
use crate::error::{Error, Result};
use crate::fusion::{ConcatConfig, CosineConfig, FusionConfig, Inputs};
use crate::report::{Evaluation, Prediction};

/// Options of answering.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AnswerConfig {
    /// `image`, `text` or `both`: what is looked at. One alone shows what the other is worth.
    pub inputs: Inputs,
    /// `known`: one of the training set's answers. `given`: one of the question's own choices, each read behind the question.
    pub choose: Choose,
    /// With `known`: how many of the most frequent training answers there are to choose from.
    pub answers: usize,
    /// With `known`: `bce` has a yes or no for each answer, which suits questions with several right ones; `softmax` one choice.
    pub loss: AnswerLoss,
    /// `longest` or `max`: how far texts are padded. `max` is slower and changes nothing.
    pub pad: Pad,
}

impl Default for AnswerConfig {
    fn default() -> Self {
        Self { inputs: Inputs::Both, choose: Choose::Known, answers: 3129, loss: AnswerLoss::Bce, pad: Pad::Longest }
    }
}

/// What there is to choose from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Choose {
    /// The training set's answers.
    #[default]
    Known,
    /// Each question's own choices.
    Given,
}

/// How answers are learnt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AnswerLoss {
    /// Binary cross-entropy with soft targets, summed over answers (Teney et al. 2018, arXiv 1708.02711, eq. 1).
    #[default]
    Bce,
    /// Cross-entropy with the soft targets as shares.
    Softmax,
}

/// What an evaluation gives besides the loss: the share of questions whose most frequent answer was given, the VQA accuracy,
/// and the best that can be had with the answers that are known.
const METRICS: [&str; 3] = ["accuracy", "vqa_accuracy", "answerable"];

/// Probabilities go to `predictions.jsonl` up to so many answers.
const WRITTEN: usize = 256;

impl Definition for AnswerConfig {
    fn name(&self) -> &'static str {
        "answer"
    }

    fn validate(&self, place: &str) -> Result<()> {
        match self.answers {
            0 | 1 => Err(Error::input(format!("{place}: task.answer.answers"), format!("expected at least 2, found {}", self.answers))),
            _ => Ok(()),
        }
    }

    fn has_own_weights(&self) -> bool {
        true
    }

    fn metric(&self) -> &'static str {
        "vqa_accuracy"
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

    fn own_classes(&self) -> bool {
        self.choose == Choose::Known
    }

    fn fuses(&self) -> bool {
        true
    }

    fn reads(&self) -> Reads {
        let question = self.inputs.text().then_some(Field::Question);
        let choices = (self.choose == Choose::Given).then_some(Field::Choices);
        Reads { needed: [Field::Answer].into_iter().chain(question).chain(choices).collect(), also: Vec::new() }
    }

    fn texts(&self, _: &[String], examples: &[Example]) -> (Vec<String>, Pad) {
        let all = if self.inputs.text() { examples } else { &[] };
        let one = |e: &Example| match self.choose {
            Choose::Known => e.question.iter().cloned().collect(),
            Choose::Given => e.choices.iter().map(|c| with_choice(e, c)).collect::<Vec<_>>(),
        };
        (all.iter().flat_map(one).collect(), self.pad)
    }

    fn build(&self, parts: &TaskParts<'_>, params: &mut Params) -> Result<Box<dyn Task>> {
        let vocabulary = match (self.choose, parts.train.is_none()) {
            (Choose::Given, _) => Vec::new(),
            (Choose::Known, true) => parts.classes.to_vec(),
            (Choose::Known, false) => vocabulary(parts, self.answers)?,
        };
        let (outputs, default) = match self.choose {
            Choose::Known => (vocabulary.len(), FusionConfig::Concat(ConcatConfig::default())),
            Choose::Given => (1, FusionConfig::Cosine(CosineConfig {})),
        };
        let joint = JointParts { inputs: self.inputs, default, outputs, pad: self.pad, task: parts };
        let index = vocabulary.iter().enumerate().map(|(i, a)| (a.clone(), i)).collect();
        Ok(Box::new(Answer { joint: Joint::new(&joint, params)?, config: self.clone(), vocabulary, index }))
    }
}

/// The most frequent answers in training, the most frequent one first.
fn vocabulary(parts: &TaskParts<'_>, most: usize) -> Result<Vec<String>> {
    let mut counts: HashMap<String, usize> = HashMap::new();
    parts.visit(&mut |examples| {
        for answer in examples.iter().flat_map(|e| &e.answers) {
            *counts.entry(normalise(answer)).or_default() += 1;
        }
        Ok(())
    })?;
    let mut all: Vec<(String, usize)> = counts.into_iter().filter(|(a, _)| !a.is_empty()).collect();
    all.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    all.truncate(most);
    match all.len() {
        0 | 1 => {
            Err(Error::input("task.answer", format!("expected at least two different answers in the training split, found {}", all.len()))
                .hint("data.table.answer names the column"))
        }
        _ => Ok(all.into_iter().map(|(a, _)| a).collect()),
    }
}

/// What the text tower reads of a question with one of its choices.
fn with_choice(e: &Example, choice: &str) -> String {
    format!("{} {choice}", e.question.as_deref().unwrap_or_default())
}

struct Answer {
    config: AnswerConfig,
    joint: Joint,
    /// Normalised.
    vocabulary: Vec<String>,
    index: HashMap<String, usize>,
}

impl Answer {
    /// Whether each answer is a yes or no of its own.
    fn each(&self) -> bool {
        self.config.choose == Choose::Known && self.config.loss == AnswerLoss::Bce
    }

    /// How right each answer of the vocabulary is, from 0 to 1.
    fn targets(&self, e: &Example) -> Vec<(usize, f64)> {
        let given: Vec<String> = e.answers.iter().map(|a| normalise(a)).collect();
        let mut all: Vec<(usize, f64)> = given.iter().filter_map(|a| Some((*self.index.get(a)?, accuracy(a, &given)))).collect();
        all.sort_by_key(|t| t.0);
        all.dedup_by_key(|t| t.0);
        all
    }

    /// How right each choice of an example is.
    fn choice_targets(e: &Example) -> Vec<f64> {
        let given: Vec<String> = e.answers.iter().map(|a| normalise(a)).collect();
        e.choices.iter().map(|c| accuracy(&normalise(c), &given)).collect()
    }

    /// Logits for the answers of the vocabulary, [B, V].
    fn known(&mut self, on: &Forward<'_, '_>, images: &Encoded, examples: &[&Example]) -> Result<Tensor> {
        let questions: Vec<&str> = examples.iter().map(|e| e.question.as_deref().unwrap_or_default()).collect();
        let texts = self.joint.encode(on, &questions)?;
        self.joint.outputs(on, images, &texts)
    }

    /// Logits for each example's own choices, one after the other, \[Σ choices\], and how many each has.
    fn given(&mut self, on: &Forward<'_, '_>, images: &Encoded, examples: &[&Example]) -> Result<(Tensor, Vec<usize>)> {
        let texts: Vec<String> = examples.iter().flat_map(|e| e.choices.iter().map(|c| with_choice(e, c))).collect();
        let rows: Vec<u32> = examples.iter().enumerate().flat_map(|(i, e)| e.choices.iter().map(move |_| i as u32)).collect();
        let texts = self.joint.encode(on, &texts.iter().map(String::as_str).collect::<Vec<_>>())?;
        let logits = self.joint.outputs(on, &images.select(&rows)?, &texts)?.squeeze(1)?;
        Ok((logits, examples.iter().map(|e| e.choices.len()).collect()))
    }

    /// The criterion over rows of logits [B, V] with soft targets of the same shape.
    fn criterion(&self, logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
        if self.each() {
            return Ok(bce(logits, targets)?.sum(D::Minus1)?.mean_all()?);
        }
        let log_p = candle_nn::ops::log_softmax(logits, D::Minus1)?;
        let total = (targets.sum_keepdim(D::Minus1)? + 1e-12)?;
        Ok((log_p * targets.broadcast_div(&total)?)?.sum(D::Minus1)?.mean_all()?.neg()?)
    }

    /// Soft targets as a tensor [B, V].
    fn table(&self, examples: &[&Example], like: &Tensor) -> Result<Tensor> {
        let width = self.vocabulary.len();
        let mut values = vec![0f64; examples.len() * width];
        for (row, e) in values.chunks_exact_mut(width.max(1)).zip(examples) {
            self.targets(e).into_iter().for_each(|(at, value)| row[at] = value);
        }
        Ok(Tensor::from_vec(values, (examples.len(), width), like.device())?.to_dtype(like.dtype())?)
    }

    /// Rows of at most as many logits as there are choices; what is missing is −∞ and NaN tells so.
    fn padded(logits: &Tensor, counts: &[usize], missing: f32) -> Result<Tensor> {
        let flat = logits.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        let width = counts.iter().copied().max().unwrap_or(1);
        let mut table = vec![missing; counts.len() * width];
        let mut from = 0;
        for (row, &count) in table.chunks_exact_mut(width).zip(counts) {
            row[..count].copy_from_slice(&flat[from..from + count]);
            from += count;
        }
        Ok(Tensor::from_vec(table, (counts.len(), width), &Device::Cpu)?)
    }

    /// Each example's answers to choose from.
    fn scored(&self, outputs: &Tensor, examples: &[Example]) -> Result<Vec<Scored>> {
        let rows = outputs.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let one = |(mut logits, e): (Vec<f32>, &Example)| {
            let names = if self.config.choose == Choose::Known { &self.vocabulary } else { &e.choices };
            logits.truncate(names.len());
            let probabilities = if self.each() { logits.iter().map(|&x| sigmoid(x)).collect() } else { softmax(&logits) };
            Scored { best: best(names, &logits), scores: names.iter().cloned().zip(probabilities).collect(), logits }
        };
        Ok(rows.into_iter().zip(examples).map(one).collect())
    }
}

/// What an example's answer is chosen from.
struct Scored {
    best: String,
    /// Each with a probability.
    scores: Vec<(String, f32)>,
    logits: Vec<f32>,
}

/// Shares that add up to 1.
fn softmax(logits: &[f32]) -> Vec<f32> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|x| (x - most).exp()).sum();
    logits.iter().map(|x| (x - most).exp() / sum).collect()
}

/// The answer with the largest logit: large probabilities are equal in f32.
fn best(names: &[String], logits: &[f32]) -> String {
    let largest = logits.iter().enumerate().fold(None::<(usize, f32)>, |best, (i, &z)| match best {
        Some((_, most)) if z <= most => best,
        _ => Some((i, z)),
    });
    largest.and_then(|(i, _)| names.get(i).cloned()).unwrap_or_default()
}

impl Task for Answer {
    fn check(&self, examples: &[Example]) -> Result<()> {
        for e in examples {
            self.check_query(e)?;
            if e.answers.is_empty() {
                return Err(lacks("answer", &e.id, "answer").hint("data.table.answer names the column"));
            }
            if self.config.choose == Choose::Given && Self::choice_targets(e).iter().all(|t| *t == 0.0) {
                return Err(Error::input("task.answer", format!("`{}`: none of its choices is an answer", e.id)));
            }
        }
        Ok(())
    }

    fn check_query(&self, e: &Example) -> Result<()> {
        if self.config.inputs.text() && e.question.as_ref().is_none_or(|q| q.trim().is_empty()) {
            return Err(lacks("answer", &e.id, "question").hint("data.table.question names the column; --question asks"));
        }
        match self.config.choose == Choose::Given && e.choices.is_empty() {
            true => Err(lacks("answer", &e.id, "choices").hint("data.table.choices names the column; `choose: known` needs none")),
            false => Ok(()),
        }
    }

    fn needs(&self) -> Needs {
        self.joint.needs()
    }

    fn loss(&mut self, on: &Forward<'_, '_>, images: &Encoded, examples: &[&Example]) -> Result<Tensor> {
        if self.config.choose == Choose::Known {
            let logits = self.known(on, images, examples)?;
            let targets = self.table(examples, &logits)?;
            return self.criterion(&logits, &targets);
        }
        let (logits, counts) = self.given(on, images, examples)?;
        let mut sum: Option<Tensor> = None;
        let mut from = 0;
        for (e, count) in examples.iter().zip(counts) {
            let targets = Tensor::new(Self::choice_targets(e), logits.device())?.to_dtype(logits.dtype())?;
            let one = self.criterion(&logits.narrow(0, from, count)?.unsqueeze(0)?, &targets.unsqueeze(0)?)?;
            sum = Some(match sum {
                Some(sum) => (sum + one)?,
                None => one,
            });
            from += count;
        }
        let sum = sum.ok_or_else(|| Error::fault("task.answer", "an empty batch"))?;
        Ok((sum / examples.len() as f64)?)
    }

    fn outputs(&mut self, on: &Forward<'_, '_>, images: &Encoded, all: &[Example], rows: Range<usize>) -> Result<Tensor> {
        // Every part is as wide as the whole split needs it.
        let most = all.iter().map(|e| e.choices.len()).max().unwrap_or(0);
        let examples: Vec<&Example> = all[rows].iter().collect();
        if self.config.choose == Choose::Known {
            return Ok(self.known(on, images, &examples)?.to_device(&Device::Cpu)?);
        }
        let (logits, counts) = self.given(on, images, &examples)?;
        let table = Self::padded(&logits, &counts, f32::NAN)?;
        let lack = most - table.dim(1)?;
        Ok(if lack == 0 { table } else { Tensor::cat(&[&table, &Tensor::full(f32::NAN, (examples.len(), lack), &Device::Cpu)?], 1)? })
    }

    fn evaluate(&mut self, _: &Forward<'_, '_>, outputs: &Tensor, examples: &[Example]) -> Result<Evaluation> {
        let scored = self.scored(outputs, examples)?;
        let (mut right, mut vqa, mut possible, mut loss) = (0.0, 0.0, 0.0, 0.0);
        let mut predictions = Vec::with_capacity(examples.len());
        for (i, (e, Scored { best: prediction, scores, logits })) in examples.iter().zip(scored).enumerate() {
            let given: Vec<String> = e.answers.iter().map(|a| normalise(a)).collect();
            let label = usual(&given);
            right += f64::from(u8::from(normalise(&prediction) == label));
            vqa += accuracy(&normalise(&prediction), &given);
            possible += scores.iter().map(|(a, _)| accuracy(&normalise(a), &given)).fold(0.0, f64::max);
            let row = outputs.narrow(0, i, 1)?.narrow(1, 0, scores.len())?.to_dtype(DType::F32)?;
            let targets = match self.config.choose {
                Choose::Known => self.table(&[e], &row)?,
                Choose::Given => Tensor::new(Self::choice_targets(e), row.device())?.to_dtype(DType::F32)?.unsqueeze(0)?,
            };
            loss += f64::from(self.criterion(&row, &targets)?.to_scalar::<f32>()?);
            let (scores, logits) =
                if scores.len() <= WRITTEN { (scores.into_iter().map(|s| s.1).collect(), logits) } else { Default::default() };
            predictions.push(Prediction { id: e.id.clone(), label: Some(label), prediction, scores, logits });
        }
        let count = examples.len().max(1) as f64;
        let metrics = METRICS.into_iter().map(String::from).zip([right / count, vqa / count, possible / count]).collect::<BTreeMap<_, _>>();
        Ok(Evaluation { examples: examples.len(), loss: loss / count, metrics, predictions, classification: None })
    }

    fn tell(&self, outputs: &Tensor, examples: &[Example]) -> Result<Vec<Told>> {
        let told = |scored: Scored| Told { prediction: scored.best, scores: scored.scores, logits: scored.logits, chosen: Vec::new() };
        Ok(self.scored(outputs, examples)?.into_iter().map(told).collect())
    }

    fn classes(&self) -> Option<&[String]> {
        Some(&self.vocabulary)
    }
}
