//! What lives in the binary: a small base and two sets of icons.

pub mod recipes;

/// The embedded bases.
pub const BASES: &[&str] = &["tiny"];

/// A file of an embedded base.
#[must_use]
pub fn file(base: &str, name: &str) -> Option<&'static [u8]> {
    FILES.iter().find(|(b, n, _)| *b == base && *n == name).map(|(_, _, bytes)| *bytes)
}

macro_rules! tiny {
    ($($name:literal),* $(,)?) => { &[$(("tiny", $name, include_bytes!(concat!("tiny/", $name)))),*] };
}

const FILES: &[(&str, &str, &[u8])] = tiny![
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
];

/// The embedded sets of images.
pub const PACKS: &[&str] = &["emoji", "emoji-flat"];

/// An embedded set: one line of JSON, then the images (`scripts/emoji/README.md` has the format).
#[must_use]
pub fn pack(name: &str) -> Option<&'static [u8]> {
    match name {
        "emoji" => Some(include_bytes!("emoji.pack")),
        "emoji-flat" => Some(include_bytes!("emoji-flat.pack")),
        _ => None,
    }
}

/// One small PNG, for examples.
#[must_use]
pub fn sample() -> &'static [u8] {
    include_bytes!("sample.png")
}
