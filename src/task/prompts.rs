//! Texts through the text tower: class prompts, templates, batches of captions.

use std::ops::Range;

use candle_core::{DType, Result as TensorResult, Tensor};
use peft_adapters::{ClassFeatures, ClassName};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::Forward;
use crate::clip::model::{class_logits, unit_rows};
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
    filled(classes, templates).map(|(text, _)| text).collect()
}

/// [`fill`], and where the class name stands, in bytes.
fn filled<'a>(classes: &'a [String], templates: &'a [String]) -> impl Iterator<Item = (String, Range<usize>)> + 'a {
    classes.iter().flat_map(move |class| {
        let name = class.replace('_', " ").trim().to_string();
        templates.iter().map(move |t| {
            let start = t.find("{}").unwrap_or(t.len());
            (t.replacen("{}", &name, 1), start..start + name.len())
        })
    })
}

/// Texts as token ids, to be encoded as often as weights change.
#[derive(Debug, Clone)]
pub struct Prompts {
    /// Sorted by length, so that few are padded to the longest of their pass.
    ids: Vec<Vec<u32>>,
    /// The class name of each, in the order of `ids`; empty where they are no class prompts.
    names: Vec<ClassName>,
    /// Where each text stands in `ids`, if they were moved.
    back: Option<Vec<u32>>,
    templates: usize,
    pad: Pad,
    /// What enters the first trained block, if that comes later than the first.
    trunks: Option<Vec<Trunk>>,
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
        Ok(Self::of(ids, Vec::new(), 1, pad, truncated))
    }

    fn of(ids: Vec<Vec<u32>>, names: Vec<ClassName>, templates: usize, pad: Pad, truncated: usize) -> Self {
        let sort = pad == Pad::Longest && ids.len() >= 2 * ALIKE;
        let (ids, names, back) = if sort { by_length(ids, &names) } else { (ids, names, None) };
        Self { ids, names, back, templates, pad, trunks: None, truncated }
    }

    /// Tokenises every class in every template.
    ///
    /// # Errors
    /// When the tokeniser fails.
    pub fn of_classes(tokenizer: &Tokenizer, classes: &[String], templates: &[String], pad: Pad) -> Result<Self> {
        let texts: Vec<(String, Range<usize>)> = filled(classes, templates).collect();
        let encoded = texts.par_iter().map(|(text, name)| tokenizer.encode_part(text, name));
        let encoded: Vec<(Vec<u32>, bool, Range<usize>)> = encoded.collect::<Result<_>>()?;
        let truncated = encoded.iter().filter(|(_, cut, _)| *cut).count();
        let one = |(i, (ids, _, name)): (usize, (Vec<u32>, bool, Range<usize>))| {
            let class = (i / templates.len().max(1)) as u32;
            (ids, ClassName { class, start: name.start as u32, len: name.len() as u32 })
        };
        let (ids, names) = encoded.into_iter().enumerate().map(one).unzip();
        Ok(Self::of(ids, names, templates.len(), pad, truncated))
    }

    /// The classes as `images` [B, P] see them: the same for all, or encoded anew for each where a patch asks for it.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn classes(&self, on: &Forward<'_, '_>, images: &Tensor) -> Result<ClassFeatures> {
        if !on.patches.per_image() {
            return Ok(ClassFeatures::Shared(self.class_features(on)?));
        }
        let images = unit_rows(images)?;
        let (count, each) = (images.dim(0)?, (CHUNK / self.ids.len().max(1)).max(1));
        let mut parts = Vec::new();
        for from in (0..count).step_by(each) {
            parts.push(self.for_images(on, &images.narrow(0, from, each.min(count - from))?)?);
        }
        Ok(ClassFeatures::PerImage(Tensor::cat(&parts, 0)?))
    }

    /// Class features for each of a few images, [B, P] → [B, C, P].
    fn for_images(&self, on: &Forward<'_, '_>, images: &Tensor) -> Result<Tensor> {
        let (count, width) = images.dims2()?;
        let mut parts = Vec::new();
        for (ids, names) in self.groups() {
            let texts = ids.len();
            let all: Vec<Vec<u32>> = (0..count).flat_map(|_| ids.iter().cloned()).collect();
            let names = (0..count).flat_map(|_| names.iter().copied()).collect();
            let own = images.unsqueeze(1)?.broadcast_as((count, texts, width))?.reshape((count * texts, width))?;
            let batch = self.batch(on.clip, &all)?.with_names(names).with_images(own);
            let features = on.clip.text_features_on(&batch, on.patches, on.tape)?;
            parts.push(features.reshape((count, texts, ()))?);
        }
        let all = Tensor::cat(&parts, 1)?;
        let all = match &self.back {
            Some(back) => all.index_select(&Tensor::new(back.as_slice(), all.device())?, 1)?,
            None => all,
        };
        let (_, texts, dim) = all.dims3()?;
        match self.templates {
            1 => Ok(all),
            t => Ok(unit_rows(&all)?.reshape((count, texts / t, t, dim))?.mean(2)?),
        }
    }

    /// Logits of many images, without gradients: where classes are encoded for each image, a few images at a time.
    ///
    /// # Shapes
    /// `images` [N, P] → [N, C]
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn logits(&self, on: &Forward<'_, '_>, images: &Tensor) -> Result<Tensor> {
        let one = |images: &Tensor| -> Result<Tensor> {
            let classes = on.patches.class_features(self.classes(on, images)?, images)?;
            Ok(class_logits(on.clip, images, &classes, on.patches)?)
        };
        let count = images.dim(0)?;
        if !on.patches.per_image() || count == 0 {
            return one(images);
        }
        let each = (CHUNK / self.ids.len().max(1)).max(1);
        let parts = (0..count).step_by(each).map(|from| one(&images.narrow(0, from, each.min(count - from))?));
        Ok(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?)
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
        let depth = on.constant.blocks;
        if depth > 0 && self.trunks.is_none() {
            let one = |batch| on.clip.text_trunk(&batch, depth, on.patches);
            self.trunks = Some(self.batches(on.clip)?.into_iter().map(one).collect::<TensorResult<_>>()?);
        }
        Ok(())
    }

    /// The texts in groups that go through the tower at once.
    fn batches(&self, clip: &Clip) -> Result<Vec<TextBatch>> {
        self.groups().map(|(ids, names)| Ok(self.batch(clip, ids)?.with_names(names.to_vec()))).collect()
    }

    fn batch(&self, clip: &Clip, ids: &[Vec<u32>]) -> Result<TextBatch> {
        let config = &clip.config().text;
        let to = (self.pad == Pad::Max).then_some(config.max_position_embeddings);
        Ok(TextBatch::new(ids, to, config, clip.device())?)
    }

    /// Texts that are alike in length, with their class names.
    fn groups(&self) -> impl Iterator<Item = (&[Vec<u32>], &[ClassName])> {
        let each = if self.back.is_some() { self.ids.len().div_ceil(4).clamp(ALIKE, CHUNK) } else { CHUNK };
        let names = move |i: usize, len: usize| self.names.get(i * each..i * each + len).unwrap_or_default();
        self.ids.chunks(each).enumerate().map(move |(i, ids)| (ids, names(i, ids.len())))
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

/// Sorted ids with their names, and where each text went.
fn by_length(ids: Vec<Vec<u32>>, names: &[ClassName]) -> (Vec<Vec<u32>>, Vec<ClassName>, Option<Vec<u32>>) {
    let mut order: Vec<(usize, Vec<u32>)> = ids.into_iter().enumerate().collect();
    order.sort_by_key(|(_, ids)| ids.len());
    let mut back = vec![0; order.len()];
    for (to, (from, _)) in order.iter().enumerate() {
        back[*from] = to as u32;
    }
    let names = order.iter().filter_map(|(from, _)| names.get(*from).copied()).collect();
    (order.into_iter().map(|(_, ids)| ids).collect(), names, Some(back))
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

    /// The tokens of a name are found wherever it stands and whatever it touches.
    #[test]
    fn class_names_are_found_in_their_prompts() {
        let parts = crate::clip::base::Parts::load("builtin:tiny").unwrap();
        let classes = ["sea_lion".to_string(), " C++ ".into(), "12:30".into(), "été".into()];
        for template in ["an icon of a {}.", "{}", "{} in the snow", "a \"{}\"!"] {
            let prompts = Prompts::of_classes(&parts.tokenizer, &classes, &[template.into()], Pad::Longest).unwrap();
            for ((ids, name), class) in prompts.ids.iter().zip(&prompts.names).zip(&classes) {
                let at = name.start as usize;
                let found = &ids[at..at + name.len as usize];
                let alone = parts.tokenizer.words(&class.replace('_', " ")).unwrap();
                // A name that ends in a sign joins the sign behind it.
                let whole = found == alone || (class.contains("++") && found.starts_with(&alone[..1]));
                assert!(whole, "{template} {class}: {found:?} {alone:?} in {ids:?}");
            }
        }
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
