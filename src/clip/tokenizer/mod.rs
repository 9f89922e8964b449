//! Texts to ids, as transformers' `CLIPTokenizer` makes them.

mod definition;

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::clean::Cleaning;
use super::config::TextConfig;
use super::source::Source;
use crate::error::{Error, Result};
use definition::Definition;
pub(crate) use definition::FILES;

/// Below this many texts threads cost more than they save.
const PARALLEL: usize = 32;

/// A base's tokeniser. Truncation and padding that its files ask for are ignored: texts are cut
/// to the model's context here, and padded where batches are made.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    bos: u32,
    eos: u32,
    context: usize,
    /// Of all but the cleaning.
    pipeline: String,
    digest: String,
    cleaning: Cleaning,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, or else `vocab.json` and `merges.txt`.
    ///
    /// # Errors
    /// When there is no tokeniser, it is damaged, lacks its begin or end token, or knows ids that
    /// the model's token table has not.
    pub fn load(source: &Source, config: &TextConfig) -> Result<Self> {
        let Definition { place, json, bos, eos, cleaning } = Definition::read(source)?;
        let bytes = serde_json::to_vec(&json).map_err(|e| Error::fault(&place, e))?;
        let inner = guarded(|| tokenizers::Tokenizer::from_bytes(bytes))
            .map_err(|e| Error::input(&place, format!("is not a valid tokeniser: {e}")))?;
        definition::check_added(&place, &json, &inner)?;
        check_vocabulary(&place, &inner, config)?;
        let id = |role: &str, token: &str| {
            inner.token_to_id(token).ok_or_else(|| {
                Error::input(&place, format!("the {role} token `{token}` is not in the vocabulary"))
                    .hint("name it in special_tokens_map.json or tokenizer_config.json")
            })
        };
        let (bos_id, eos_id) = (id("begin", &bos)?, id("end", &eos)?);
        let context = config.max_position_embeddings;
        if context < 2 {
            return Err(Error::input(&place, format!("a context of {context} tokens leaves no room for the begin and end tokens")));
        }
        let pipeline = definition::digest(&place, &inner, bos_id, eos_id)?;
        // What transformers would do has the digest that it always had.
        let digest = match cleaning {
            Cleaning::None => pipeline.clone(),
            other => format!("blake3:{}", blake3::hash(format!("{pipeline} {}", other.name()).as_bytes()).to_hex()),
        };
        let tokenizer = Self { inner: Arc::new(inner), bos: bos_id, eos: eos_id, context, pipeline, digest, cleaning };
        // A vocabulary without the pieces or the unknown token it needs shows on the first text.
        tokenizer.encode("a photo of a \u{1f427}.").map_err(|e| Error::input(&place, e))?;
        Ok(tokenizer)
    }

    /// The ids of a text between begin and end token, without padding, and whether it was cut.
    ///
    /// A text that is too long loses its end, never its end token.
    ///
    /// # Errors
    /// When the vocabulary has neither a character nor an unknown token.
    pub fn encode(&self, text: &str) -> Result<(Vec<u32>, bool)> {
        let encoding = self.encoding(text)?;
        Ok(self.enclosed(encoding.get_ids()))
    }

    /// [`Tokenizer::encode`], and which of the ids stand for the bytes `part` of the text: the first of them, counted from the
    /// begin token, and how many there are. A token that reaches into `part` counts.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_part(&self, text: &str, part: &Range<usize>) -> Result<(Vec<u32>, bool, Range<usize>)> {
        let (text, part) = self.cleaned_part(text, part)?;
        let encoding = guarded(|| self.inner.encode(text.as_str(), false)).map_err(|e| unencodable(&text, &e))?;
        let offsets = encoding.get_offsets();
        let first = offsets.iter().take_while(|(_, end)| *end <= part.start).count();
        let len = offsets[first..].iter().take_while(|(start, _)| *start < part.end).count();
        let (ids, cut) = self.enclosed(encoding.get_ids());
        let end = ids.len() - 1;
        Ok((ids, cut, (first + 1).min(end)..(first + 1 + len).min(end)))
    }

    /// The ids of a text alone, without begin and end and of any length.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn words(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.encoding(text)?.get_ids().to_vec())
    }

    /// Between begin and end token, cut to the context, and whether that was needed.
    fn enclosed(&self, ids: &[u32]) -> (Vec<u32>, bool) {
        let room = self.context - 2;
        let mut all = Vec::with_capacity(ids.len().min(room) + 2);
        all.push(self.bos);
        all.extend_from_slice(&ids[..ids.len().min(room)]);
        all.push(self.eos);
        (all, ids.len() > room)
    }

    /// How many ids a text has before it is cut, begin and end included.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn count(&self, text: &str) -> Result<usize> {
        Ok(self.encoding(text)?.len() + 2)
    }

    fn encoding(&self, text: &str) -> Result<tokenizers::Encoding> {
        let text = self.cleaning.apply(text)?;
        guarded(|| self.inner.encode_fast(text.as_ref(), false)).map_err(|e| unencodable(&text, &e))
    }

    /// A text as it is split, and where a part of it has come to lie: behind what the text before it became.
    fn cleaned_part(&self, text: &str, part: &Range<usize>) -> Result<(String, Range<usize>)> {
        if self.cleaning == Cleaning::None {
            return Ok((text.to_string(), part.clone()));
        }
        let end_of = |at: usize| Ok::<_, Error>(self.cleaning.apply(text.get(..at).unwrap_or(text))?.len());
        Ok((self.cleaning.apply(text)?.into_owned(), end_of(part.start)?..end_of(part.end)?))
    }

    /// What is done to a text before it is split.
    #[must_use]
    pub fn cleaning(&self) -> Cleaning {
        self.cleaning
    }

    /// [`Tokenizer::digest`] of the tokeniser alone, whatever is done to texts before.
    pub(crate) fn pipeline(&self) -> &str {
        &self.pipeline
    }

    /// The ids of many texts, and how many were cut. For the caller to warn about.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_all(&self, texts: &[String]) -> Result<(Vec<Vec<u32>>, usize)> {
        let encoded: Vec<(Vec<u32>, bool)> = if texts.len() < PARALLEL {
            texts.iter().map(|t| self.encode(t)).collect::<Result<_>>()?
        } else {
            texts.par_iter().map(|t| self.encode(t)).collect::<Result<_>>()?
        };
        let cut = encoded.iter().filter(|(_, cut)| *cut).count();
        Ok((encoded.into_iter().map(|(ids, _)| ids).collect(), cut))
    }

    /// The most ids of a text, begin and end included.
    #[must_use]
    pub fn context(&self) -> usize {
        self.context
    }

    /// `blake3:<hex>` over all that decides ids: pipeline, vocabulary, merges, added, begin and end
    /// tokens. The same from `tokenizer.json` as from `vocab.json` and `merges.txt`.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The tokeniser's files, to stand beside a merged model.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn files(source: &Source) -> Result<Vec<(String, Vec<u8>)>> {
        let mut files = Vec::new();
        for name in definition::FILES {
            if let Some(bytes) = source.read(name)? {
                files.push((name.to_string(), bytes.into_owned()));
            }
        }
        Ok(files)
    }
}

fn unencodable(text: &str, error: &impl std::fmt::Display) -> Error {
    let start: String = text.chars().take(80).collect();
    Error::input("tokeniser", format!("cannot encode `{start}`: {error}"))
}

/// The crate panics on some definitions that are valid JSON, for example on a `Replace` whose
/// regular expression matches nothing at all; that, too, is a broken file.
fn guarded<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    crate::guard::guarded(run).unwrap_or_else(|| Err("its definition makes the tokenizers library fail".into()))
}

fn check_vocabulary(place: &str, inner: &tokenizers::Tokenizer, config: &TextConfig) -> Result<()> {
    let vocab = inner.get_vocab(true);
    match vocab.iter().max_by_key(|(_, id)| **id) {
        None => Err(Error::input(place, "the vocabulary is empty")),
        Some((token, id)) if *id as usize >= config.vocab_size => {
            Err(Error::input(place, format!("token `{token}` has id {id}, the model's `vocab_size` is {}", config.vocab_size))
                .hint("the tokeniser belongs to another model, or the token table was not resized"))
        }
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests;
