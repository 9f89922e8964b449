//! The examples' own texts through the text tower; each once while nothing trained reaches it.

use std::collections::HashMap;

use candle_core::{DType, Tensor};
use peft_adapters::{Patches, Tape, rng};
use rand::Rng;
use rayon::prelude::*;

use super::Forward;
use super::prompts::Pad;
use crate::clip::tokenizer::Tokenizer;
use crate::clip::{Clip, Encoded, TextBatch, Tokens};
use crate::data::Example;
use crate::error::Result;

/// Encoded texts are kept up to this size.
const KEEP_BYTES: usize = 512 << 20;

/// Texts that go through the tower at once without gradients.
const CHUNK: usize = 256;

/// Encodes texts.
#[derive(Debug)]
pub(super) struct Texts {
    tokenizer: Tokenizer,
    pad: Pad,
    /// Whether every token is wanted.
    tokens: bool,
    /// Known from the first training batch on.
    frozen: bool,
    kept: HashMap<String, Kept>,
    bytes: usize,
}

/// One text, encoded.
#[derive(Debug, Clone)]
struct Kept {
    features: Vec<f32>,
    /// [T, D] up to the pooled token.
    tokens: Vec<f32>,
}

impl Texts {
    pub(super) fn new(tokenizer: &Tokenizer, pad: Pad, tokens: bool) -> Self {
        Self { tokenizer: tokenizer.clone(), pad, tokens, frozen: false, kept: HashMap::new(), bytes: 0 }
    }

    /// Texts, equal ones encoded once.
    ///
    /// # Shapes
    /// N texts → features [N, P], tokens [N, T, D]
    pub(super) fn encode(&mut self, on: &Forward<'_, '_>, texts: &[&str]) -> Result<Encoded> {
        let (unique, rows) = unique(texts);
        self.frozen |= on.constant.features;
        if !self.frozen {
            return spread(&self.through(on, &unique)?, &rows);
        }
        self.complete(on, &unique)?;
        spread(&self.kept(on, &unique)?, &rows)
    }

    fn through(&mut self, on: &Forward<'_, '_>, texts: &[&str]) -> Result<Encoded> {
        let (ids, longest) = self.ids(texts)?;
        let mut parts = Vec::new();
        for ids in ids.chunks(if on.training() { usize::MAX } else { CHUNK }) {
            parts.push(self.tower((on.clip, on.patches), ids, longest, on.tape)?);
        }
        joined(parts)
    }

    /// Token ids, and the largest number of them.
    fn ids(&self, texts: &[&str]) -> Result<(Vec<Vec<u32>>, usize)> {
        let owned: Vec<String> = texts.iter().map(ToString::to_string).collect();
        let (ids, _) = self.tokenizer.encode_all(&owned)?;
        let longest = ids.iter().map(Vec::len).max().unwrap_or(1);
        Ok((ids, longest))
    }

    fn tower<'a>(
        &self,
        (clip, patches): (&'a Clip, &'a Patches),
        ids: &[Vec<u32>],
        longest: usize,
        tape: Option<&Tape<'a>>,
    ) -> Result<Encoded> {
        let config = &clip.config().text;
        let to = if self.pad == Pad::Max { config.max_position_embeddings } else { longest };
        let batch = TextBatch::new(ids, Some(to), config, clip.device())?;
        Ok(match self.tokens {
            true => clip.text_tokens(&batch, patches, tape)?,
            false => Encoded::pooled(clip.text_features_on(&batch, patches, tape)?),
        })
    }

    /// Encodes what is not kept yet. A text's rounding must not tell in which company it came up first, or a resumed run would
    /// end in other bits: each goes by itself.
    fn complete(&mut self, on: &Forward<'_, '_>, texts: &[&str]) -> Result<()> {
        if self.bytes > KEEP_BYTES {
            (self.kept, self.bytes) = (HashMap::new(), 0);
        }
        let new: Vec<&str> = texts.iter().copied().filter(|t| !self.kept.contains_key(*t)).collect();
        let (ids, _) = self.ids(&new)?;
        let model = (on.clip, on.patches);
        let encoded: Vec<Encoded> =
            ids.into_par_iter().map(|ids| self.tower(model, std::slice::from_ref(&ids), ids.len(), None)).collect::<Result<_>>()?;
        new.iter().zip(&encoded).try_for_each(|(text, encoded)| self.keep(text, encoded))
    }

    fn keep(&mut self, text: &str, encoded: &Encoded) -> Result<()> {
        let features = encoded.features.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let tokens = match &encoded.tokens {
            Some(Tokens { x, pool }) => {
                let words = pool.first().map_or(1, |&p| p as usize + 1);
                x.narrow(1, 0, words)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?
            }
            None => Vec::new(),
        };
        self.bytes += 4 * (features.len() + tokens.len());
        self.kept.insert(text.to_string(), Kept { features, tokens });
        Ok(())
    }

    /// Texts that are kept, together.
    fn kept(&self, on: &Forward<'_, '_>, texts: &[&str]) -> Result<Encoded> {
        let found: Vec<&Kept> = texts.iter().filter_map(|t| self.kept.get(*t)).collect();
        let (clip, count) = (on.clip, found.len());
        let tensor = |values: Vec<f32>, shape: &[usize]| -> Result<Tensor> {
            Ok(Tensor::from_vec(values, shape, clip.device())?.to_dtype(clip.dtype())?)
        };
        let width = found.first().map_or(0, |k| k.features.len());
        let features = tensor(found.iter().flat_map(|k| k.features.iter().copied()).collect(), &[count, width])?;
        if !self.tokens {
            return Ok(Encoded::pooled(features));
        }
        let dim = clip.config().text.hidden_size;
        let longest = found.iter().map(|k| k.tokens.len() / dim).max().unwrap_or(1);
        let mut values = vec![0f32; count * longest * dim];
        for (row, kept) in values.chunks_exact_mut(longest * dim).zip(&found) {
            row[..kept.tokens.len()].copy_from_slice(&kept.tokens);
        }
        let pool = found.iter().map(|k| (k.tokens.len() / dim) as u32 - 1).collect();
        Ok(Encoded { features, tokens: Some(Tokens { x: tensor(values, &[count, longest, dim])?, pool }) })
    }
}

/// The different texts in the order of their first use, and which of them each text is.
fn unique<'t>(texts: &[&'t str]) -> (Vec<&'t str>, Vec<u32>) {
    let mut index: HashMap<&str, u32> = HashMap::new();
    let mut unique = Vec::new();
    let row = |text: &&'t str| {
        *index.entry(*text).or_insert_with(|| {
            unique.push(*text);
            unique.len() as u32 - 1
        })
    };
    let rows = texts.iter().map(row).collect();
    (unique, rows)
}

/// One row for each text again.
fn spread(encoded: &Encoded, rows: &[u32]) -> Result<Encoded> {
    match rows.len() == encoded.features.dim(0)? {
        true => Ok(encoded.clone()),
        false => Ok(encoded.select(rows)?),
    }
}

fn joined(mut parts: Vec<Encoded>) -> Result<Encoded> {
    if parts.len() == 1 {
        return Ok(parts.remove(0));
    }
    let features = Tensor::cat(&parts.iter().map(|p| &p.features).collect::<Vec<_>>(), 0)?;
    let tokens: Option<Vec<&Tokens>> = parts.iter().map(|p| p.tokens.as_ref()).collect();
    let tokens = tokens.map(|all| {
        let x = Tensor::cat(&all.iter().map(|t| &t.x).collect::<Vec<_>>(), 0)?;
        Ok::<_, crate::Error>(Tokens { x, pool: all.iter().flat_map(|t| t.pool.iter().copied()).collect() })
    });
    Ok(Encoded { features, tokens: tokens.transpose()? })
}

/// Whether `text`, which is one of `of`'s, fits `image` as well: its own, a picture of the same thing, or an equal caption.
pub(super) fn belongs(image: &Example, of: &Example, text: &str) -> bool {
    image.shows_same(of) || image.texts.iter().any(|t| t == text)
}

/// One of an example's texts, another one each epoch.
pub(super) fn drawn(seed: u64, epoch: usize, e: &Example) -> &str {
    let mut rng = rng::rng(seed, &[rng::name_key("text"), epoch as u64, rng::name_key(&e.id)]);
    e.texts[rng.random_range(0..e.texts.len())].as_str()
}
