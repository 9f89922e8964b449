//! Whether a text fits an image.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{DType, Tensor};
use peft_adapters::{Params, rng};
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::joint::{Joint, JointParts, lacks};
use super::prompts::Pad;
use super::texts::{belongs, drawn};
use super::threshold::{self, sigmoid};
use super::{Definition, Forward, Needs, Task, TaskParts, Told, metrics};
use crate::clip::Encoded;
use crate::clip::model::unit_rows;
use crate::data::{Example, Field, Reads};
use crate::error::{Error, Result};
use crate::fusion::{CosineConfig, FusionConfig, Inputs};
use crate::named;
use crate::report::{Classification, Evaluation, Prediction};

/// Options of matching.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MatchConfig {
    /// `image`, `text` or `both`: what is looked at. One alone shows what the other is worth.
    pub inputs: Inputs,
    /// Where pairs that do not fit come from.
    #[serde(deserialize_with = "named::one")]
    pub negatives: Negatives,
    /// Weight of pairs that fit; more than 1 finds more of them.
    pub positive_weight: f64,
    /// Focal loss: a pair counts (1−p)^gamma of its loss, p being the probability of the truth. 0 is cross-entropy; 2 lets
    /// easy pairs count next to nothing.
    pub gamma: f64,
    /// `longest` or `max`: how far texts are padded. `max` is slower and changes nothing.
    pub pad: Pad,
}

impl Default for MatchConfig {
    fn default() -> Self {
        Self { inputs: Inputs::Both, negatives: Negatives::Given {}, positive_weight: 1.0, gamma: 0.0, pad: Pad::Longest }
    }
}

/// Where pairs that do not fit come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Negatives {
    /// The data says of each pair whether it fits.
    Given {},
    /// Every pair of the data fits; texts of other examples of the batch do not. In evaluation, texts of the split, always the
    /// same ones.
    Random(Count),
    /// As `random`; while training those texts of the batch that are most similar to the image (ALBEF, Li et al. 2021,
    /// arXiv 2107.07651, section 3.2).
    Hardest(Count),
}

/// How many negatives an image gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Count {
    /// Texts that do not fit, for each that does.
    pub count: usize,
}

impl Default for Count {
    fn default() -> Self {
        Self { count: 1 }
    }
}

/// What an evaluation gives besides the loss. The ranking metrics are missing where a split has one kind of pair only.
const METRICS: [&str; 6] = ["accuracy", "precision", "recall", "f1", "roc_auc", "average_precision"];

/// The two verdicts, in label order.
const VERDICTS: [&str; 2] = ["does not fit", "fits"];

impl Definition for MatchConfig {
    fn name(&self) -> &'static str {
        "match"
    }

    fn validate(&self, place: &str) -> Result<()> {
        let bad = |key: &str, message: String| Err(Error::input(format!("{place}: task.match.{key}"), message));
        if let Negatives::Random(Count { count: 0 }) | Negatives::Hardest(Count { count: 0 }) = self.negatives {
            return bad("negatives", "expected a count of at least 1, found 0".into());
        }
        if !(self.positive_weight > 0.0 && self.positive_weight.is_finite()) {
            return bad("positive_weight", format!("expected more than 0, found {}", self.positive_weight));
        }
        match (0.0..=10.0).contains(&self.gamma) {
            true => Ok(()),
            false => bad("gamma", format!("expected 0 to 10, found {}", self.gamma)),
        }
    }

    fn has_own_weights(&self) -> bool {
        true
    }

    fn metric(&self) -> &'static str {
        "roc_auc"
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
        let text = (self.inputs.text() || self.negatives != Negatives::Given {}).then_some(Field::Text);
        let fits = (self.negatives == Negatives::Given {}).then_some(Field::Fits);
        Reads { needed: text.into_iter().chain(fits).collect(), also: vec![Field::Fits] }
    }

    fn texts(&self, _: &[String], examples: &[Example]) -> (Vec<String>, Pad) {
        let all = if self.inputs.text() { examples } else { &[] };
        (all.iter().flat_map(|e| e.texts.iter().cloned()).collect(), self.pad)
    }

    fn build(&self, parts: &TaskParts<'_>, params: &mut Params) -> Result<Box<dyn Task>> {
        let default = FusionConfig::Cosine(CosineConfig {});
        let joint = JointParts { inputs: self.inputs, default, outputs: 1, pad: self.pad, task: parts };
        Ok(Box::new(Match {
            joint: Joint::new(&joint, params)?,
            verdicts: VERDICTS.map(String::from),
            config: self.clone(),
            smoothing: parts.label_smoothing,
            seed: parts.seed,
            threshold: 0.0,
        }))
    }
}

struct Match {
    config: MatchConfig,
    joint: Joint,
    verdicts: [String; 2],
    smoothing: f64,
    seed: u64,
    /// A logit: pairs that score at least as much fit.
    threshold: f64,
}

/// Pairs as indices of images and texts.
#[derive(Debug, Default)]
struct Pairs {
    images: Vec<u32>,
    texts: Vec<u32>,
    fits: Vec<bool>,
}

impl Pairs {
    fn push(&mut self, image: usize, text: usize, fits: bool) {
        self.images.push(image as u32);
        self.texts.push(text as u32);
        self.fits.push(fits);
    }
}

impl Match {
    fn count(&self) -> usize {
        match self.config.negatives {
            Negatives::Given {} => 0,
            Negatives::Random(c) | Negatives::Hardest(c) => c.count,
        }
    }

    /// The pairs of a training batch.
    fn pairs(&self, examples: &[&Example], texts: &[&str], epoch: usize, similar: Option<&[Vec<f32>]>) -> Pairs {
        let mut pairs = Pairs::default();
        for (i, example) in examples.iter().enumerate() {
            pairs.push(i, i, example.fits.unwrap_or(true));
            if self.count() == 0 {
                continue;
            }
            let mut others: Vec<usize> = (0..examples.len()).filter(|&j| !belongs(example, examples[j], texts[j])).collect();
            match similar {
                Some(rows) => others.sort_by(|&a, &b| rows[i][b].total_cmp(&rows[i][a])),
                None => {
                    let key = [rng::name_key("negative"), epoch as u64, rng::name_key(&example.id)];
                    others.partial_shuffle(&mut rng::rng(self.seed, &key), self.count());
                    // What was shuffled stands at the end.
                    others.reverse();
                }
            }
            others.into_iter().take(self.count()).for_each(|j| pairs.push(i, j, false));
        }
        pairs
    }

    /// Whether a pair with this logit counts as one that fits.
    fn fits(&self, logit: f32) -> bool {
        f64::from(logit) >= self.threshold
    }

    /// The texts that one example of a split is judged with: its own first, then others of the split.
    fn candidates<'e>(&self, all: &'e [Example], at: usize) -> Vec<&'e str> {
        let own = &all[at];
        let mut texts = vec![own.texts[0].as_str()];
        let mut rng = rng::rng(0, &[rng::name_key("negatives"), rng::name_key(&own.id)]);
        let wanted = self.count().min(all.len().saturating_sub(1));
        for other in sampled(&mut rng, all.len()) {
            if texts.len() > wanted {
                break;
            }
            let text = all[other].texts[0].as_str();
            if !belongs(own, &all[other], text) && !texts.contains(&text) {
                texts.push(text);
            }
        }
        texts
    }

    /// Binary cross-entropy on logits \[M\], weighted; focal where `gamma` is above 0 (Lin et al. 2017, eq. 4).
    fn criterion(&self, logits: &Tensor, fits: &[bool]) -> Result<Tensor> {
        let constant = |of: &dyn Fn(bool) -> f64| -> Result<Tensor> {
            let values: Vec<f64> = fits.iter().map(|&f| of(f)).collect();
            Ok(Tensor::from_vec(values, fits.len(), logits.device())?.to_dtype(logits.dtype())?)
        };
        let (smooth, weight) = (self.smoothing, self.config.positive_weight);
        let target = constant(&|f| f64::from(u8::from(f)) * (1.0 - smooth) + smooth / 2.0)?;
        let weights = constant(&|f| if f { weight } else { 1.0 })?;
        let mut each = bce(logits, &target)?;
        if self.config.gamma > 0.0 {
            // −log p of the truth.
            let sure = bce(logits, &constant(&|f| f64::from(u8::from(f)))?)?.neg()?.exp()?;
            each = (each * sure.affine(-1.0, 1.0)?.clamp(1e-12, 1.0)?.powf(self.config.gamma)?)?;
        }
        Ok(((each * &weights)?.sum_all()? / weights.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?)?)
    }

    /// Which pairs a split has: for each row of outputs, the example and whether it fits. What is missing has no output.
    fn judged(&self, outputs: &Tensor, examples: &[Example]) -> Result<Vec<(usize, usize, f32, bool)>> {
        let rows = outputs.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let one = |(i, row): (usize, &Vec<f32>)| {
            let fits = |k: usize| k == 0 && examples[i].fits.unwrap_or(true);
            let there = row.iter().enumerate().filter(|(_, logit)| !logit.is_nan());
            there.map(|(k, &logit)| (i, k, logit, fits(k))).collect::<Vec<_>>()
        };
        Ok(rows.iter().enumerate().flat_map(one).collect())
    }
}

/// Of both verdicts. 1 − p would be 0 long before the pair is certain to fit.
fn probabilities(logit: f32) -> [f32; 2] {
    [sigmoid(-logit), sigmoid(logit)]
}

/// 0..count in a random order, drawn as it is read.
fn sampled(rng: &mut ChaCha8Rng, count: usize) -> impl Iterator<Item = usize> {
    use rand::Rng as _;
    // With many examples the first few draws are enough; repeated ones are left out by whoever reads.
    let all: Option<Vec<usize>> = (count <= 64).then(|| {
        let mut all: Vec<usize> = (0..count).collect();
        all.shuffle(rng);
        all
    });
    let drawn: Vec<usize> = match all {
        Some(all) => all,
        None => (0..4096).map(|_| rng.random_range(0..count)).collect(),
    };
    drawn.into_iter()
}

/// max(x, 0) − x·t + log(1 + exp(−|x|)), elementwise.
pub(super) fn bce(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    let tail = (logits.abs()?.neg()?.exp()? + 1.0)?.log()?;
    Ok(((logits.relu()? - (logits * target)?)? + tail)?)
}

impl Task for Match {
    fn over_batch(&self) -> bool {
        self.count() > 0
    }

    fn check(&self, examples: &[Example]) -> Result<()> {
        let texts = self.config.inputs.text() || self.count() > 0;
        for e in examples {
            if texts && (e.texts.is_empty() || e.texts.iter().any(|t| t.trim().is_empty())) {
                return Err(lacks("match", &e.id, "text, or an empty one").hint("data.table.text names the column"));
            }
            match (self.count(), e.fits) {
                (0, None) => {
                    return Err(lacks("match", &e.id, "word on whether it fits")
                        .hint("data.table.fits names the column; where every pair fits, set task: { match: { negatives: random } }"));
                }
                (1.., Some(false)) => {
                    return Err(Error::input("task.match.negatives", format!("`{}` does not fit, and negatives are drawn", e.id))
                        .hint("negatives: given uses the pairs as they are"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn check_query(&self, example: &Example) -> Result<()> {
        match self.config.inputs.text() && example.texts.is_empty() {
            true => Err(Error::input(&example.id, "has no text to be matched with").hint("--text, or \"text\" in a line of --jsonl")),
            false => Ok(()),
        }
    }

    fn needs(&self) -> Needs {
        self.joint.needs()
    }

    fn loss(&mut self, on: &Forward<'_, '_>, images: &Encoded, examples: &[&Example]) -> Result<Tensor> {
        let texts: Vec<&str> = examples.iter().map(|e| if e.texts.is_empty() { "" } else { drawn(self.seed, on.epoch, e) }).collect();
        let encoded = self.joint.encode(on, &texts)?;
        let hardest = matches!(self.config.negatives, Negatives::Hardest(_)) && self.config.inputs == Inputs::Both;
        let similar = match hardest {
            true => {
                let (u, v) = (unit_rows(&images.features.detach())?, unit_rows(&encoded.features.detach())?);
                Some(u.matmul(&v.t()?)?.to_dtype(DType::F32)?.to_vec2::<f32>()?)
            }
            false => None,
        };
        let pairs = self.pairs(examples, &texts, on.epoch, similar.as_deref());
        let (images, texts) = match self.count() {
            0 => (images.clone(), encoded),
            _ => (images.select(&pairs.images)?, encoded.select(&pairs.texts)?),
        };
        let logits = self.joint.outputs(on, &images, &texts)?.squeeze(1)?;
        self.criterion(&logits, &pairs.fits)
    }

    /// [B, 1 + negatives]: logits of the own text and of others; NaN where there are not enough others.
    fn outputs(&mut self, on: &Forward<'_, '_>, images: &Encoded, all: &[Example], rows: Range<usize>) -> Result<Tensor> {
        let (count, width) = (rows.len(), 1 + self.count());
        let mut pairs: (Vec<u32>, Vec<&str>, Vec<usize>) = Default::default();
        for (i, at) in rows.enumerate() {
            let texts = if all[at].texts.is_empty() { vec![""] } else { self.candidates(all, at) };
            for (k, text) in texts.into_iter().enumerate() {
                pairs.0.push(i as u32);
                pairs.1.push(text);
                pairs.2.push(i * width + k);
            }
        }
        let texts = self.joint.encode(on, &pairs.1)?;
        let logits = self.joint.outputs(on, &images.select(&pairs.0)?, &texts)?.squeeze(1)?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        let mut table = vec![f32::NAN; count * width];
        pairs.2.iter().zip(logits).for_each(|(&at, logit)| table[at] = logit);
        Ok(Tensor::from_vec(table, (count, width), &candle_core::Device::Cpu)?)
    }

    fn evaluate(&mut self, _: &Forward<'_, '_>, outputs: &Tensor, examples: &[Example]) -> Result<Evaluation> {
        let judged = self.judged(outputs, examples)?;
        let fits: Vec<bool> = judged.iter().map(|j| j.3).collect();
        let logits: Vec<f32> = judged.iter().map(|j| j.2).collect();
        let loss = self.criterion(&Tensor::from_vec(logits.clone(), logits.len(), &candle_core::Device::Cpu)?, &fits)?;
        let labels: Vec<u32> = fits.iter().map(|&f| u32::from(f)).collect();
        let predicted: Vec<u32> = logits.iter().map(|&z| u32::from(self.fits(z))).collect();
        let classification = Classification::new(&self.verdicts, &labels, &predicted);
        let of = &classification.classes[1];
        let fixed = [("accuracy", classification.accuracy()), ("precision", of.precision), ("recall", of.recall), ("f1", of.f1)];
        // Of logits: probabilities near 1 are equal in f32.
        let ranking = [("roc_auc", metrics::roc_auc(&logits, &fits)), ("average_precision", metrics::average_precision(&logits, &fits))];
        let ranking = ranking.into_iter().filter_map(|(name, value)| Some((name, value?)));
        let metrics: BTreeMap<String, f64> = fixed.into_iter().chain(ranking).map(|(n, v)| (n.to_string(), v)).collect();
        let predictions = judged.iter().zip(labels.iter().zip(&predicted)).map(|(&(i, k, z, _), (&label, &guess))| {
            let id = &examples[i].id;
            Prediction {
                id: if self.count() == 0 { id.clone() } else { format!("{id} with \"{}\"", self.candidates(examples, i)[k]) },
                label: Some(self.verdicts[label as usize].clone()),
                prediction: self.verdicts[guess as usize].clone(),
                scores: probabilities(z).to_vec(),
                logits: vec![-z, z],
            }
        });
        Ok(Evaluation {
            examples: judged.len(),
            loss: f64::from(loss.to_dtype(DType::F32)?.to_scalar::<f32>()?),
            metrics,
            predictions: predictions.collect(),
            classification: Some(classification),
        })
    }

    fn undefined(&self, examples: &[Example]) -> Vec<&'static str> {
        let fits = |e: &Example| e.fits.unwrap_or(true);
        let others = |i: usize| self.count() > 0 && !examples[i].texts.is_empty() && self.candidates(examples, i).len() > 1;
        let (some, all) = (examples.iter().any(fits), examples.iter().all(fits) && !(0..examples.len()).any(others));
        match (some, all) {
            (false, _) => METRICS[4..].to_vec(),
            (true, true) => vec!["roc_auc"],
            (true, false) => Vec::new(),
        }
    }

    fn calibrates(&self) -> bool {
        true
    }

    fn calibrate(&mut self, outputs: &Tensor, examples: &[Example]) -> Result<()> {
        let (logits, fits): (Vec<f32>, Vec<bool>) = self.judged(outputs, examples)?.iter().map(|j| (j.2, j.3)).unzip();
        if let Some(threshold) = metrics::best_threshold(&logits, &fits) {
            self.threshold = threshold;
        }
        Ok(())
    }

    fn scalars(&self) -> BTreeMap<String, f64> {
        BTreeMap::from([(threshold::KEY.to_string(), self.threshold)])
    }

    fn set_scalars(&mut self, scalars: &BTreeMap<String, f64>) {
        self.threshold = threshold::stored(scalars, 1.0).unwrap_or(self.threshold);
    }

    fn tell(&self, outputs: &Tensor, _: &[Example]) -> Result<Vec<Told>> {
        let own = outputs.to_dtype(DType::F32)?.narrow(1, 0, 1)?.squeeze(1)?.to_vec1::<f32>()?;
        let one = |z: f32| Told {
            prediction: self.verdicts[usize::from(self.fits(z))].clone(),
            scores: self.verdicts.iter().cloned().zip(probabilities(z)).collect(),
            logits: vec![-z, z],
            chosen: Vec::new(),
        };
        Ok(own.into_iter().map(one).collect())
    }

    fn classes(&self) -> Option<&[String]> {
        Some(&self.verdicts)
    }
}
