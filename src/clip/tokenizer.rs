//! Texts to ids.

use rayon::prelude::*;
use serde_json::{Map, Value, json};
use tokenizers::Tokenizer as Inner;

use super::config::TextConfig;
use super::source::Source;
use crate::error::{Error, Result};

/// CLIP's special tokens; `tokenizer_config.json` may name others.
const BOS: &str = "<|startoftext|>";
const EOS: &str = "<|endoftext|>";

/// All files that a tokeniser may consist of.
const FILES: [&str; 6] =
    ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"];

/// From this many texts on, several threads work on them.
const PARALLEL: usize = 64;

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
    /// Reads `tokenizer.json`, or `vocab.json` and `merges.txt`.
    ///
    /// # Errors
    /// When the files are missing or malformed, or have more tokens than the model.
    pub fn load(source: &Source, config: &TextConfig) -> Result<Self> {
        let (place, bytes) = match source.read("tokenizer.json")? {
            Some(bytes) => (source.place("tokenizer.json"), bytes.into_owned()),
            None => (source.place("vocab.json"), from_parts(source)?),
        };
        // Truncation and padding are ours; a file may ask for its own.
        let mut value: Value = serde_json::from_slice(&bytes).map_err(|e| Error::input(&place, format!("not valid JSON: {e}")))?;
        if let Some(object) = value.as_object_mut() {
            object.insert("truncation".into(), Value::Null);
            object.insert("padding".into(), Value::Null);
        }
        let canonical = value.to_string();
        let inner = Inner::from_bytes(&canonical).map_err(|e| Error::input(&place, format!("is no tokeniser: {e}")))?;
        let special = specials(source)?;
        let id = |key: &str, usual: &str| {
            let token = special.get(key).map_or(usual, String::as_str);
            inner.token_to_id(token).ok_or_else(|| Error::input(&place, format!("has no token `{token}`")))
        };
        let (bos, eos) = (id("bos_token", BOS)?, id("eos_token", EOS)?);
        let largest = inner.get_vocab(true).into_values().max().unwrap_or(0);
        if largest as usize >= config.vocab_size {
            return Err(Error::input(&place, format!("has the id {largest}, the model has {} tokens", config.vocab_size))
                .hint("the tokeniser and config.json belong to different models"));
        }
        let digest = format!("blake3:{}", blake3::hash(canonical.as_bytes()).to_hex());
        Ok(Self { inner, bos, eos, context: config.max_position_embeddings, digest })
    }

    /// BOS … EOS without padding, cut to the context with EOS kept; the flag says whether it was cut.
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

    /// Many texts, and how many of them were cut.
    ///
    /// # Errors
    /// When the tokeniser fails.
    pub fn encode_all(&self, texts: &[String]) -> Result<(Vec<Vec<u32>>, usize)> {
        let all: Vec<(Vec<u32>, bool)> = match texts.len() {
            0..PARALLEL => texts.iter().map(|t| self.encode(t)).collect::<Result<_>>()?,
            _ => texts.par_iter().map(|t| self.encode(t)).collect::<Result<_>>()?,
        };
        let cut = all.iter().filter(|(_, cut)| *cut).count();
        Ok((all.into_iter().map(|(ids, _)| ids).collect(), cut))
    }

    /// The longest text in tokens, BOS and EOS included.
    #[must_use]
    pub fn context(&self) -> usize {
        self.context
    }

    /// blake3 of the tokeniser's definition.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The files of a base's tokeniser with their contents, to stand beside a merged model.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn files(source: &Source) -> Result<Vec<(String, Vec<u8>)>> {
        let mut found = Vec::new();
        for name in FILES {
            if let Some(bytes) = source.read(name)? {
                found.push((name.to_string(), bytes.into_owned()));
            }
        }
        Ok(found)
    }
}

/// `bos_token` and `eos_token` as `tokenizer_config.json` names them: a string, or an object with `content`.
fn specials(source: &Source) -> Result<std::collections::HashMap<String, String>> {
    let name = "tokenizer_config.json";
    let Some(bytes) = source.read(name)? else { return Ok(Default::default()) };
    let config: Map<String, Value> =
        serde_json::from_slice(&bytes).map_err(|e| Error::input(source.place(name), format!("expected a JSON object: {e}")))?;
    let content = |v: &Value| v.as_str().or_else(|| v.get("content")?.as_str()).map(str::to_string);
    let pairs = ["bos_token", "eos_token"].into_iter().filter_map(|key| Some((key.to_string(), content(config.get(key)?)?)));
    Ok(pairs.collect())
}

/// `tokenizer.json` as transformers would make it of `vocab.json` and `merges.txt`.
fn from_parts(source: &Source) -> Result<Vec<u8>> {
    let missing = |name: &str| {
        Error::input(source.place(name), "no such file in this base").hint("expected tokenizer.json, or vocab.json and merges.txt")
    };
    let vocab = source.read("vocab.json")?.ok_or_else(|| missing("tokenizer.json"))?;
    let merges = source.read("merges.txt")?.ok_or_else(|| missing("merges.txt"))?;
    let vocab: Map<String, Value> =
        serde_json::from_slice(&vocab).map_err(|e| Error::input(source.place("vocab.json"), format!("expected an object of ids: {e}")))?;
    let merges = std::str::from_utf8(&merges).map_err(|e| Error::input(source.place("merges.txt"), e))?;
    let merges: Vec<&str> = merges.lines().filter(|l| !l.starts_with("#version") && !l.trim().is_empty()).collect();
    let special = |token: &str| {
        json!({
            "id": vocab.get(token), "content": token, "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        })
    };
    let added: Vec<Value> = [BOS, EOS].iter().filter(|t| vocab.contains_key(**t)).map(|t| special(t)).collect();
    let split = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "NFC" },
            { "type": "Replace", "pattern": { "Regex": r"\s+" }, "content": " " },
            { "type": "Lowercase" },
        ]},
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
            { "type": "Split", "pattern": { "Regex": split }, "behavior": "Removed", "invert": true },
            { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        ]},
        "post_processor": null,
        "decoder": null,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": EOS, "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>", "fuse_unk": false, "byte_fallback": false,
            "vocab": vocab, "merges": merges,
        },
    });
    serde_json::to_vec(&tokenizer).map_err(|e| Error::fault("tokeniser", e))
}
