//! A tokeniser's files, brought to the one form that the `tokenizers` crate reads.

use serde_json::{Map, Value, json};

use crate::clip::clean::{self, Cleaning};
use crate::clip::source::Source;
use crate::error::{Error, Result};

/// All that may define a tokeniser.
pub(crate) const FILES: [&str; 6] =
    ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"];

const BOS: &str = "<|startoftext|>";
const EOS: &str = "<|endoftext|>";

/// CLIP's splits, as transformers 5 writes them.
const SPLIT: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// What transformers 4 leaves out of [`SPLIT`]. It changes no ids: special tokens are found first.
const SPLIT_SPECIAL: &str = r"<\|startoftext\|>|<\|endoftext\|>|";

/// A `tokenizer.json` and what its neighbours add.
pub(super) struct Definition {
    /// The file that errors name.
    pub(super) place: String,
    pub(super) json: Value,
    pub(super) bos: String,
    pub(super) eos: String,
    pub(super) cleaning: Cleaning,
}

impl Definition {
    pub(super) fn read(source: &Source) -> Result<Self> {
        let config = read_object(source, "tokenizer_config.json")?;
        let map = read_object(source, "special_tokens_map.json")?;
        let cleaning = cleaning(&source.place("tokenizer_config.json"), &config)?;
        let special = Special { config, map };
        let (bos, eos) = (special.token("bos_token", BOS), special.token("eos_token", EOS));
        let (name, json) = match source.read("tokenizer.json")? {
            Some(bytes) => ("tokenizer.json", from_tokenizer(&source.place("tokenizer.json"), &bytes)?),
            None => ("vocab.json", from_vocabulary(source, &special)?),
        };
        Ok(Self { place: source.place(name), json, bos, eos, cleaning })
    }
}

/// What happens to a text first: nothing, where the files are transformers' own.
fn cleaning(place: &str, config: &Map<String, Value>) -> Result<Cleaning> {
    let Some(value) = config.get(clean::KEY).filter(|v| !v.is_null()) else { return Ok(Cleaning::None) };
    value
        .as_str()
        .and_then(Cleaning::named)
        .ok_or_else(|| Error::input(place, format!("`{}`: expected none, lower, whitespace or canonicalize, found {value}", clean::KEY)))
}

/// Where transformers keeps special tokens.
struct Special {
    config: Map<String, Value>,
    map: Map<String, Value>,
}

impl Special {
    fn value(&self, role: &str) -> Option<&Value> {
        [&self.config, &self.map].into_iter().find_map(|m| m.get(role)).filter(|v| !v.is_null())
    }

    /// A token's text: a string, or an object with `content`.
    fn token(&self, role: &str, default: &str) -> String {
        let value = self.value(role);
        let text = value.and_then(|v| v.as_str().or_else(|| v.get("content")?.as_str()));
        text.unwrap_or(default).to_string()
    }

    /// An entry of `added_tokens`, with the token's own flags where they are given.
    fn added(&self, role: &str, content: &str, id: u64) -> Value {
        let flag = |name: &str| self.value(role).and_then(|v| v.get(name)).and_then(Value::as_bool).unwrap_or(false);
        json!({
            "id": id, "content": content, "special": true,
            "single_word": flag("single_word"), "lstrip": flag("lstrip"),
            "rstrip": flag("rstrip"), "normalized": flag("normalized"),
        })
    }
}

fn read_object(source: &Source, name: &str) -> Result<Map<String, Value>> {
    match source.read(name)? {
        Some(bytes) => object(&source.place(name), &bytes),
        None => Ok(Map::new()),
    }
}

fn object(place: &str, bytes: &[u8]) -> Result<Map<String, Value>> {
    crate::json::from_slice(bytes).map_err(|e| Error::input(place, format!("not a valid JSON object: {e}")))
}

/// Keeps what decides ids. Truncation and padding would cut and fill behind our back, dropout
/// makes ids random, and some readers choke on keys they do not know.
fn from_tokenizer(place: &str, bytes: &[u8]) -> Result<Value> {
    let mut all = object(place, bytes)?;
    let mut kept = Map::new();
    for key in ["version", "added_tokens", "normalizer", "pre_tokenizer", "model"] {
        if let Some(value) = all.shift_remove(key) {
            kept.insert(key.to_string(), value);
        }
    }
    check_growth(place, kept.get("normalizer"))?;
    let Some(model) = kept.get_mut("model").and_then(Value::as_object_mut) else {
        return Err(Error::input(place, "expected an object `model`"));
    };
    model.shift_remove("dropout");
    match model.shift_remove("continuing_subword_prefix") {
        None | Some(Value::Null) => {}
        Some(Value::String(prefix)) if prefix.is_empty() => {}
        // The crate panics where pieces are shorter than their prefix, and CLIP has none.
        Some(other) => return Err(Error::input(place, format!("`continuing_subword_prefix`: expected none, found {other}"))),
    }
    Ok(Value::Object(kept))
}

/// How many times longer a text may become before it is split. CLIP's own normaliser may double it.
const MAX_GROWTH: usize = 64;

/// Every `Replace` can make a text longer, and the next one what the one before made of it: ten in a row, and a word fills the memory.
fn check_growth(place: &str, normalizer: Option<&Value>) -> Result<()> {
    let growth = normalizer.map_or(1, growth);
    if growth <= MAX_GROWTH {
        return Ok(());
    }
    Err(Error::input(place, format!("`normalizer`: would make a text more than {MAX_GROWTH} times as long"))
        .hint("a CLIP's normaliser replaces white space by one space"))
}

fn growth(normalizer: &Value) -> usize {
    let length = |key: &str| normalizer.get(key).and_then(Value::as_str).map_or(0, str::len);
    match normalizer.get("type").and_then(Value::as_str) {
        Some("Sequence") => {
            let all = normalizer.get("normalizers").and_then(Value::as_array);
            all.into_iter().flatten().fold(1, |product: usize, n| product.saturating_mul(growth(n)))
        }
        // An expression may match nothing, so that what replaces it stands between all characters.
        Some("Replace") => match normalizer.pointer("/pattern/String").and_then(Value::as_str).map_or(0, str::len) {
            0 => length("content").saturating_add(1),
            pattern => length("content").div_ceil(pattern).max(1),
        },
        Some("Prepend") => length("prepend").saturating_add(1),
        _ => 1,
    }
}

/// What transformers' `CLIPTokenizer` builds from a vocabulary and merges.
fn from_vocabulary(source: &Source, special: &Special) -> Result<Value> {
    let vocab = vocabulary(source)?;
    let mut added = Vec::new();
    for (role, default) in [("bos_token", BOS), ("eos_token", EOS)] {
        let content = special.token(role, default);
        if let Some(id) = vocab.get(&content).and_then(Value::as_u64) {
            added.push(special.added(role, &content, id));
        }
    }
    // Tokens that users added; CLIP's own vocabulary already has its special ones.
    let mut extra: Vec<(String, Value)> = read_object(source, "added_tokens.json")?.into_iter().collect();
    extra.retain(|(token, _)| !vocab.contains_key(token));
    extra.sort_by_key(|(_, id)| id.as_u64());
    added.extend(extra.into_iter().map(|(token, id)| {
        json!({ "id": id, "content": token, "special": false, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": true })
    }));
    Ok(json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "NFC" },
            { "type": "Replace", "pattern": { "Regex": r"\s+" }, "content": " " },
            { "type": "Lowercase" },
        ]},
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
            { "type": "Split", "pattern": { "Regex": SPLIT }, "behavior": "Removed", "invert": true },
            { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        ]},
        "model": {
            "type": "BPE", "unk_token": special.token("unk_token", EOS), "end_of_word_suffix": "</w>",
            "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": merges(source)?,
        },
    }))
}

fn vocabulary(source: &Source) -> Result<Map<String, Value>> {
    let place = source.place("vocab.json");
    let Some(bytes) = source.read("vocab.json")? else {
        return Err(Error::input(source, "holds no tokeniser: expected tokenizer.json, or vocab.json and merges.txt"));
    };
    let vocab = object(&place, &bytes)?;
    match vocab.iter().find(|(_, id)| id.as_u64().is_none_or(|id| id > u64::from(u32::MAX))) {
        Some((token, id)) => Err(Error::input(&place, format!("token `{token}`: expected an id, found {id}"))),
        None => Ok(vocab),
    }
}

/// Lines of two pieces; the first line may name the format's version.
fn merges(source: &Source) -> Result<Vec<Value>> {
    let place = source.place("merges.txt");
    let bytes = source.require("merges.txt")?;
    let text = crate::files::text(&place, bytes.into_owned())?;
    let mut merges = Vec::new();
    for (i, line) in text.lines().enumerate() {
        if line.starts_with("#version") || line.trim().is_empty() {
            continue;
        }
        match line.split_once(' ') {
            Some((left, right)) if !right.contains(' ') => merges.push(json!([left, right])),
            _ => return Err(Error::input(format!("{place}:{}", i + 1), format!("expected two pieces, found `{line}`"))),
        }
    }
    Ok(merges)
}

/// The crate hands out ids of its own where the declared ones do not fit, with no more than a log line.
pub(super) fn check_added(place: &str, json: &Value, inner: &tokenizers::Tokenizer) -> Result<()> {
    for token in json.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
        let content = token.get("content").and_then(Value::as_str).unwrap_or_default();
        let declared = token.get("id").and_then(Value::as_u64);
        let actual = inner.token_to_id(content).map(u64::from);
        if declared != actual && !content.is_empty() {
            let show = |id: Option<u64>| id.map_or("none".into(), |id| id.to_string());
            return Err(Error::input(place, format!("added token `{content}` has id {}, its place is {}", show(declared), show(actual))));
        }
    }
    Ok(())
}

/// Hashes the definition in the crate's own normal form, without what has no effect on ids.
pub(super) fn digest(place: &str, inner: &tokenizers::Tokenizer, bos: u32, eos: u32) -> Result<String> {
    let mut value = serde_json::to_value(inner).map_err(|e| Error::fault(place, e))?;
    plain(&mut value);
    value.sort_all_objects();
    let bytes = serde_json::to_vec(&json!([value, bos, eos])).map_err(|e| Error::fault(place, e))?;
    Ok(format!("blake3:{}", blake3::hash(&bytes).to_hex()))
}

/// Drops offsets' options and the split alternatives that never match.
fn plain(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.shift_remove("trim_offsets");
            map.values_mut().for_each(plain);
        }
        Value::Array(items) => items.iter_mut().for_each(plain),
        Value::String(text) => {
            if let Some(rest) = text.strip_prefix(SPLIT_SPECIAL) {
                *text = rest.to_string();
            }
        }
        _ => {}
    }
}
