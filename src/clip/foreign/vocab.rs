//! CLIP's tokeniser for checkpoints that come without one.

use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::Files;
use crate::clip::tokenizer::FILES;
use crate::error::{Error, Result};
use crate::files;

/// The merges of OpenAI CLIP's `bpe_simple_vocab_16e6.txt.gz` (MIT) that CLIP reads, 200 kB: without them a bare
/// `.pt` of OpenAI's could not be used. Written by `scripts/open_clip_data.py`.
const MERGES: &[u8] = include_bytes!("merges.txt.gz");

/// OpenAI's own file, which people keep beside their checkpoints.
const BPE: &str = "bpe_simple_vocab_16e6.txt.gz";

/// Bytes twice (inside a word and at its end), merges, begin and end.
const SIZE: usize = 49408;
const COUNT: usize = SIZE - 2 * 256 - 2;

/// Larger than OpenAI's file when unpacked.
const MAX_TEXT: u64 = 64 << 20;
const MAX_FILE: u64 = 256 << 20;

/// The tokeniser in `dir`, or else CLIP's own where the token table has its size.
pub(super) fn files(dir: &Path, place: &str, vocab_size: usize, named: Option<&str>) -> Result<Files> {
    if dir.join("tokenizer.json").exists() || dir.join("vocab.json").exists() {
        let there = FILES.iter().filter(|name| dir.join(name).exists());
        return there.map(|name| Ok(((*name).to_string(), files::read(&dir.join(name), MAX_FILE)?))).collect();
    }
    let bpe = dir.join(BPE);
    if bpe.exists() {
        return from_merges(&unpack(&bpe.display().to_string(), &files::read(&bpe, MAX_FILE)?)?, &bpe.display().to_string());
    }
    if let Some(name) = named.filter(|n| !n.contains("openai/clip")) {
        return Err(Error::input(place, format!("is made for the tokeniser {name}, which is not there"))
            .hint("put that tokeniser's tokenizer.json beside the checkpoint"));
    }
    if vocab_size != SIZE {
        return Err(Error::input(place, format!("holds {vocab_size} tokens and no tokeniser; CLIP's own has {SIZE}"))
            .hint("put tokenizer.json, or vocab.json and merges.txt, beside the checkpoint"));
    }
    embedded()
}

/// CLIP's tokeniser as transformers saves it.
pub(super) fn embedded() -> Result<Files> {
    // With the line that OpenAI's file begins with.
    from_merges(&format!("#\n{}", unpack("merges.txt.gz", MERGES)?), "merges.txt.gz")
}

fn unpack(place: &str, bytes: &[u8]) -> Result<String> {
    let mut text = String::new();
    let read = flate2::read::GzDecoder::new(bytes).take(MAX_TEXT).read_to_string(&mut text);
    read.map_err(|e| Error::input(place, format!("is not gzipped text: {e}")))?;
    Ok(text)
}

/// The tokeniser of merges, one a line, after a first line that says what they are.
fn from_merges(text: &str, place: &str) -> Result<Files> {
    let merges: Vec<&str> = text.lines().skip(1).take(COUNT).collect();
    if merges.len() < COUNT {
        return Err(Error::input(place, format!("holds {} merges, CLIP's tokeniser has {COUNT}", merges.len())));
    }
    let mut vocab = Map::new();
    let mut add = |token: String| {
        let id = vocab.len();
        vocab.entry(token).or_insert(id.into());
    };
    letters().for_each(|c| add(c.to_string()));
    letters().for_each(|c| add(format!("{c}</w>")));
    merges.iter().for_each(|m| add(m.replacen(' ', "", 1)));
    ["<|startoftext|>", "<|endoftext|>"].iter().for_each(|t| add((*t).to_string()));
    let token = |content: &str, normalized: bool| json!({ "content": content, "lstrip": false, "normalized": normalized, "rstrip": false, "single_word": false });
    let special = json!({
        "bos_token": token("<|startoftext|>", true), "eos_token": token("<|endoftext|>", true),
        "unk_token": token("<|endoftext|>", true), "pad_token": "<|endoftext|>",
    });
    let mut config = special.clone();
    for (key, value) in [("tokenizer_class", json!("CLIPTokenizer")), ("model_max_length", json!(77)), ("do_lower_case", json!(true))] {
        config[key] = value;
    }
    let merges = format!("#version: 0.2\n{}\n", merges.join("\n"));
    let text = |value: &Value| value.to_string().into_bytes();
    Ok(vec![
        ("vocab.json".into(), text(&Value::Object(vocab))),
        ("merges.txt".into(), merges.into_bytes()),
        ("tokenizer_config.json".into(), text(&config)),
        ("special_tokens_map.json".into(), text(&special)),
    ])
}

/// The characters that stand for the 256 bytes, in CLIP's order: printable ones for themselves.
fn letters() -> impl Iterator<Item = char> {
    let printable = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let rest = (0..256u32).filter(move |b| !printable(*b)).count() as u32;
    (0..256u32).filter(move |b| printable(*b)).chain((0..rest).map(|n| 256 + n)).filter_map(char::from_u32)
}
