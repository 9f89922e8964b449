//! Texts to ids.

use tokenizers::Tokenizer as Inner;

use super::config::TextConfig;
use super::source::Source;
use crate::error::{Error, Result};

/// A CLIP tokeniser: begin-of-text, byte-level BPE, end-of-text.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Inner,
    bos: u32,
    eos: u32,
    context: usize,
    digest: String,
}

impl Tokenizer {
    /// Reads `tokenizer.json`.
    ///
    /// # Errors
    /// When the files are missing or malformed, or have more tokens than the model.
    pub fn load(source: &Source, config: &TextConfig) -> Result<Self> {
        let place = source.place("tokenizer.json");
        let bytes = source.require("tokenizer.json")?;
        let mut inner = Inner::from_bytes(&bytes).map_err(|e| Error::input(&place, e))?;
        inner.with_padding(None);
        let _ = inner.with_truncation(None);
        let id = |t: &str| inner.token_to_id(t).ok_or_else(|| Error::input(&place, format!("has no token {t}")));
        let (bos, eos) = (id("<|startoftext|>")?, id("<|endoftext|>")?);
        let digest = format!("blake3:{}", blake3::hash(&bytes).to_hex());
        Ok(Self { inner, bos, eos, context: config.max_position_embeddings, digest })
    }

    /// BOS … EOS without padding, cut to the context with EOS kept; whether it was cut.
    ///
    /// # Errors
    /// When the tokeniser fails.
    pub fn encode(&self, text: &str) -> Result<(Vec<u32>, bool)> {
        let encoding = self.inner.encode(text, false).map_err(|e| Error::input("text", e))?;
        let mut ids = vec![self.bos];
        ids.extend(encoding.get_ids());
        let cut = ids.len() + 1 > self.context;
        ids.truncate(self.context.saturating_sub(1));
        ids.push(self.eos);
        Ok((ids, cut))
    }

    /// Many texts; how many were cut.
    ///
    /// # Errors
    /// When the tokeniser fails.
    pub fn encode_all(&self, texts: &[String]) -> Result<(Vec<Vec<u32>>, usize)> {
        let all = texts.iter().map(|t| self.encode(t)).collect::<Result<Vec<_>>>()?;
        let cut = all.iter().filter(|(_, cut)| *cut).count();
        Ok((all.into_iter().map(|(ids, _)| ids).collect(), cut))
    }

    /// Digest of what defines it.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.digest
    }
}
