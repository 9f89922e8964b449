//! The examples' own texts through the text tower; each once while nothing trained reaches it.

use std::collections::HashMap;

use candle_core::{DType, Tensor};
use peft_adapters::rng;
use rand::Rng;

use super::Forward;
use super::prompts::Pad;
use crate::clip::tokenizer::Tokenizer;
use crate::clip::{Encoded, TextBatch, Tokens};
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
    /// Known after the first training batch.
    frozen: bool,
    kept: HashMap<String, Kept>,
    bytes: usize,
    /// How many texts were cut to the context length.
    pub(super) truncated: usize,
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
        Self { tokenizer: tokenizer.clone(), pad, tokens, frozen: false, kept: HashMap::new(), bytes: 0, truncated: 0 }
    }

    /// Texts, equal ones encoded once.
    ///
    /// # Shapes
    /// N texts → features [N, P], tokens [N, T, D]
    pub(super) fn encode(&mut self, on: &Forward<'_, '_>, texts: &[&str]) -> Result<Encoded> {
        let (unique, rows) = unique(texts);
        if self.frozen
            && let Some(found) = self.from_kept(on, &unique)?
        {
            return spread(&found, &rows);
        }
        let encoded = self.through(on, &unique)?;
        if on.training() && !encoded.features.track_op() {
            self.frozen = true;
        }
        if self.frozen {
            self.keep(&unique, &encoded)?;
        }
        spread(&encoded, &rows)
    }

    fn through(&mut self, on: &Forward<'_, '_>, texts: &[&str]) -> Result<Encoded> {
        let owned: Vec<String> = texts.iter().map(ToString::to_string).collect();
        let (ids, truncated) = self.tokenizer.encode_all(&owned)?;
        self.truncated += truncated;
        let config = &on.clip.config().text;
        // One width for all, so that parts can be joined.
        let longest = ids.iter().map(Vec::len).max().unwrap_or(1);
        let to = if self.pad == Pad::Max { config.max_position_embeddings } else { longest };
        let mut parts = Vec::new();
        for ids in ids.chunks(if on.training() { usize::MAX } else { CHUNK }) {
            let batch = TextBatch::new(ids, Some(to), config, on.clip.device())?;
            parts.push(match self.tokens {
                true => on.clip.text_tokens(&batch, on.patches, on.tape)?,
                false => Encoded::pooled(on.clip.text_features_on(&batch, on.patches, on.tape)?),
            });
        }
        joined(parts)
    }

    fn keep(&mut self, texts: &[&str], encoded: &Encoded) -> Result<()> {
        let features = encoded.features.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let tokens =
            encoded.tokens.as_ref().map(|t| Ok::<_, crate::Error>((t.x.to_dtype(DType::F32)?.to_vec3::<f32>()?, &t.pool))).transpose()?;
        for (i, (text, features)) in texts.iter().zip(features).enumerate() {
            let tokens = match &tokens {
                Some((x, pool)) => x[i][..=pool[i] as usize].concat(),
                None => Vec::new(),
            };
            let bytes = 4 * (features.len() + tokens.len());
            if self.bytes + bytes <= KEEP_BYTES && !self.kept.contains_key(*text) {
                self.bytes += bytes;
                self.kept.insert((*text).to_string(), Kept { features, tokens });
            }
        }
        Ok(())
    }

    /// All of the texts, if all are kept.
    fn from_kept(&self, on: &Forward<'_, '_>, texts: &[&str]) -> Result<Option<Encoded>> {
        let Some(found) = texts.iter().map(|t| self.kept.get(*t)).collect::<Option<Vec<_>>>() else { return Ok(None) };
        let Some(first) = found.first() else { return Ok(None) };
        let (clip, count) = (on.clip, found.len());
        let tensor = |values: Vec<f32>, shape: &[usize]| -> Result<Tensor> {
            Ok(Tensor::from_vec(values, shape, clip.device())?.to_dtype(clip.dtype())?)
        };
        let width = first.features.len();
        let features = tensor(found.iter().flat_map(|k| k.features.iter().copied()).collect(), &[count, width])?;
        if !self.tokens {
            return Ok(Some(Encoded::pooled(features)));
        }
        let dim = clip.config().text.hidden_size;
        let longest = found.iter().map(|k| k.tokens.len() / dim).max().unwrap_or(1);
        let mut values = vec![0f32; count * longest * dim];
        for (row, kept) in values.chunks_exact_mut(longest * dim).zip(&found) {
            row[..kept.tokens.len()].copy_from_slice(&kept.tokens);
        }
        let pool = found.iter().map(|k| (k.tokens.len() / dim) as u32 - 1).collect();
        Ok(Some(Encoded { features, tokens: Some(Tokens { x: tensor(values, &[count, longest, dim])?, pool }) }))
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
    let group = |e: &Example| e.group.clone().unwrap_or_else(|| e.id.clone());
    group(image) == group(of) || image.texts.iter().any(|t| t == text)
}

/// One of an example's texts, another one each epoch.
pub(super) fn drawn<'e>(seed: u64, epoch: usize, e: &'e Example) -> &'e str {
    let mut rng = rng::rng(seed, &[rng::name_key("text"), epoch as u64, rng::name_key(&e.id)]);
    e.texts[rng.random_range(0..e.texts.len())].as_str()
}
