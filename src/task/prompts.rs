//! Texts through the text tower: class prompts, templates, batches of captions.

use candle_core::{DType, Result as TensorResult, Tensor};
use serde::{Deserialize, Serialize};

use super::Forward;
use crate::clip::model::unit_rows;
use crate::clip::tokenizer::Tokenizer;
use crate::clip::{Clip, TextBatch, Trunk};
use crate::error::{Error, Result};

/// The template where a recipe names none.
pub const DEFAULT_TEMPLATE: &str = "a photo of a {}.";

/// Texts that go through the tower at once.
const CHUNK: usize = 256;

/// Fewer texts than this are not worth a pass of their own.
const ALIKE: usize = 64;

/// How far texts are padded. The result is the same; `max` takes longer and serves comparisons.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pad {
    /// To the longest text of the batch.
    #[default]
    Longest,
    /// To the model's context length.
    Max,
}

/// Checks a template.
///
/// # Errors
/// When the place of the class name, `{}`, is missing.
pub fn check_template(place: &str, template: &str) -> Result<()> {
    match template.matches("{}").count() {
        1 => Ok(()),
        found => Err(Error::input(place, format!("template \"{template}\": expected one `{{}}` for the class name, found {found}"))
            .hint("for example \"a photo of a {}.\"")),
    }
}

/// Each class in each template, classes outermost. Underscores of directory names become spaces.
#[must_use]
pub fn fill(classes: &[String], templates: &[String]) -> Vec<String> {
    let filled = |class: &String| {
        let name = class.replace('_', " ");
        templates.iter().map(move |t| t.replacen("{}", name.trim(), 1)).collect::<Vec<_>>()
    };
    classes.iter().flat_map(filled).collect()
}

/// Texts as token ids, to be encoded as often as weights change.
#[derive(Debug, Clone)]
pub struct Prompts {
    /// Sorted by length, so that few are padded to the longest of their pass.
    ids: Vec<Vec<u32>>,
    /// Where each text stands in `ids`, if they were moved.
    back: Option<Vec<u32>>,
    templates: usize,
    pad: Pad,
    /// What enters the first trained block, if that comes later than the first.
    trunks: Option<Vec<Trunk>>,
    /// Whether it is known how far that goes.
    probed: bool,
    /// How many texts were cut to the context length.
    pub truncated: usize,
}

impl Prompts {
    /// Tokenises texts.
    ///
    /// # Errors
    /// When the tokeniser fails.
    pub fn new(tokenizer: &Tokenizer, texts: &[String], pad: Pad) -> Result<Self> {
        let (ids, truncated) = tokenizer.encode_all(texts)?;
        let sort = pad == Pad::Longest && ids.len() >= 2 * ALIKE;
        let (ids, back) = if sort { by_length(ids) } else { (ids, None) };
        Ok(Self { ids, back, templates: 1, pad, trunks: None, probed: false, truncated })
    }

    /// Tokenises every class in every template.
    ///
    /// # Errors
    /// When the tokeniser fails.
    pub fn of_classes(tokenizer: &Tokenizer, classes: &[String], templates: &[String], pad: Pad) -> Result<Self> {
        let all = Self::new(tokenizer, &fill(classes, templates), pad)?;
        Ok(Self { templates: templates.len(), ..all })
    }

    /// Features of every text, unnormalised, [N, P].
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn features(&self, on: &Forward<'_, '_>) -> Result<Tensor> {
        let parts: Vec<Tensor> = match &self.trunks {
            Some(trunks) => {
                let one = |trunk| on.clip.text_features_from(trunk, on.patches, on.tape);
                trunks.iter().map(one).collect::<TensorResult<_>>()?
            }
            None => {
                let one = |batch| on.clip.text_features_on(&batch, on.patches, on.tape);
                self.batches(on.clip)?.into_iter().map(one).collect::<TensorResult<_>>()?
            }
        };
        let all = match parts.as_slice() {
            [one] => one.clone(),
            parts => Tensor::cat(parts, 0)?,
        };
        match &self.back {
            Some(back) => Ok(all.index_select(&Tensor::new(back.as_slice(), all.device())?, 0)?),
            None => Ok(all),
        }
    }

    /// Keeps what no training changes, for texts that are encoded again in every step.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn keep_constant(&mut self, on: &Forward<'_, '_>) -> Result<()> {
        if !on.training || std::mem::replace(&mut self.probed, true) {
            return Ok(());
        }
        let [_, depth] = on.clip.constant_blocks(on.patches)?;
        if depth > 0 {
            let one = |batch| on.clip.text_trunk(&batch, depth, on.patches);
            self.trunks = Some(self.batches(on.clip)?.into_iter().map(one).collect::<TensorResult<_>>()?);
        }
        Ok(())
    }

    /// The texts in groups that go through the tower at once.
    fn batches(&self, clip: &Clip) -> Result<Vec<TextBatch>> {
        let config = &clip.config().text;
        let to = (self.pad == Pad::Max).then_some(config.max_position_embeddings);
        let each = if self.back.is_some() { self.ids.len().div_ceil(4).clamp(ALIKE, CHUNK) } else { CHUNK };
        Ok(self.ids.chunks(each).map(|chunk| TextBatch::new(chunk, to, config, clip.device())).collect::<TensorResult<_>>()?)
    }

    /// One feature for each class, [C, P]: with several templates the mean of the normalised ones
    /// (Radford et al. 2021, section 3.1.4).
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn class_features(&self, on: &Forward<'_, '_>) -> Result<Tensor> {
        let features = self.features(on)?;
        if self.templates == 1 {
            return Ok(features);
        }
        let (count, dim) = features.dims2()?;
        let unit = unit_rows(&features)?.reshape((count / self.templates, self.templates, dim))?;
        Ok(unit.mean(1)?)
    }
}

/// Sorted ids, and where each text went.
fn by_length(ids: Vec<Vec<u32>>) -> (Vec<Vec<u32>>, Option<Vec<u32>>) {
    let mut order: Vec<(usize, Vec<u32>)> = ids.into_iter().enumerate().collect();
    order.sort_by_key(|(_, ids)| ids.len());
    let mut back = vec![0; order.len()];
    for (to, (from, _)) in order.iter().enumerate() {
        back[*from] = to as u32;
    }
    (order.into_iter().map(|(_, ids)| ids).collect(), Some(back))
}

/// Row-wise cross-entropy with label smoothing, averaged: −(1−ε) log p(label) − ε · mean log p.
///
/// # Shapes
/// `logits` [B, C], `labels` u32 \[B\] → scalar
///
/// # Errors
/// When shapes do not fit.
pub fn cross_entropy(logits: &Tensor, labels: &Tensor, smoothing: f64) -> Result<Tensor> {
    let logits = if logits.dtype() == DType::F64 { logits.clone() } else { logits.to_dtype(DType::F32)? };
    let log_p = candle_nn::ops::log_softmax(&logits, 1)?;
    let picked = log_p.gather(&labels.unsqueeze(1)?, 1)?.mean_all()?;
    if smoothing == 0.0 {
        return Ok(picked.neg()?);
    }
    let spread = log_p.mean_all()?;
    Ok(((picked * (1.0 - smoothing))? + (spread * smoothing)?)?.neg()?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn templates_fill_in_class_order() {
        let texts = fill(&["sea_lion".into(), "cat".into()], &["a {}.".into(), "the {}".into()]);
        assert_eq!(texts, ["a sea lion.", "the sea lion", "a cat.", "the cat"]);
        assert!(check_template("t", "a photo").is_err() && check_template("t", "{} {}").is_err());
    }

    /// torch 2: `F.cross_entropy([[1, 2, 3], [0, 0, 4]], [2, 0], label_smoothing=0.1)`.
    #[test]
    fn smoothing_equals_torch() {
        let logits = Tensor::new(&[[1f32, 2.0, 3.0], [0.0, 0.0, 4.0]], &Device::Cpu).unwrap();
        let labels = Tensor::new(&[2u32, 0], &Device::Cpu).unwrap();
        let plain = cross_entropy(&logits, &labels, 0.0).unwrap().to_scalar::<f32>().unwrap();
        let smooth = cross_entropy(&logits, &labels, 0.1).unwrap().to_scalar::<f32>().unwrap();
        assert!((plain - 2.221_789).abs() < 1e-5, "{plain}");
        assert!((smooth - 2.205_122_5).abs() < 1e-5, "{smooth}");
    }
}
