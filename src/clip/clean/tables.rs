//! The tables that `scripts/text_cleaning_data.py` wrote from ftfy and from Python's `html`.

use std::collections::HashMap;
use std::sync::OnceLock;

use fancy_regex::Regex;
use serde::Deserialize;

use crate::error::{Error, Result};

const JSON: &str = include_str!("tables.json");

#[derive(Deserialize)]
struct Raw {
    badness: String,
    embedded: String,
    altered: String,
    lossy: String,
    encodings: Vec<(String, String)>,
    replaced: HashMap<char, String>,
    controls: String,
    entities: HashMap<String, String>,
    entities_upper: HashMap<String, String>,
    invalid_references: HashMap<u32, String>,
    invalid_codepoints: Vec<u32>,
}

/// One byte a character.
pub(super) struct Charmap {
    pub(super) name: String,
    /// Of the characters that have a byte.
    pub(super) bytes: HashMap<char, u8>,
}

/// See the parts of ftfy of the same names.
pub(super) struct Tables {
    /// Sequences of characters that are unlikely in anything but mojibake.
    pub(super) badness: Regex,
    /// UTF-8 that was read in another encoding, within a text.
    pub(super) embedded: Regex,
    /// Over bytes, each as the character of its number: UTF-8 whose byte A0 became a space.
    pub(super) altered: Regex,
    /// Over bytes: UTF-8 of which bytes were lost.
    pub(super) lossy: Regex,
    /// "à " that was followed by a word.
    pub(super) a_grave: Regex,
    pub(super) entity: Regex,
    pub(super) reference: Regex,
    pub(super) escape: Regex,
    /// In the order in which they are tried; Latin-1 is the first.
    pub(super) encodings: Vec<Charmap>,
    /// What C1 control characters are in Windows-1252.
    pub(super) windows: Vec<char>,
    /// Ligatures, full-width and half-width characters.
    pub(super) replaced: HashMap<char, String>,
    pub(super) controls: Vec<char>,
    pub(super) entities: HashMap<String, String>,
    pub(super) entities_upper: HashMap<String, String>,
    pub(super) invalid_references: HashMap<u32, String>,
    pub(super) invalid_codepoints: Vec<u32>,
}

/// Built once.
pub(super) fn tables() -> Result<&'static Tables> {
    static TABLES: OnceLock<std::result::Result<Tables, String>> = OnceLock::new();
    TABLES.get_or_init(build).as_ref().map_err(|why| Error::fault("text cleaning", why))
}

fn build() -> std::result::Result<Tables, String> {
    let raw: Raw = serde_json::from_str(JSON).map_err(|e| e.to_string())?;
    let regex = |pattern: &str| Regex::new(pattern).map_err(|e| e.to_string());
    let charmap = |name: &str, chars: &str| {
        let bytes = chars.chars().zip(0..=255u8).collect();
        Charmap { name: name.to_string(), bytes }
    };
    let latin: String = (0..=255u8).map(char::from).collect();
    let mut encodings = vec![charmap("latin-1", &latin)];
    encodings.extend(raw.encodings.iter().map(|(name, chars)| charmap(name, chars)));
    let windows = raw.encodings.iter().find(|(name, _)| name == "sloppy-windows-1252").map(|(_, chars)| chars.chars().collect());
    Ok(Tables {
        badness: regex(&raw.badness)?,
        embedded: regex(&raw.embedded)?,
        altered: regex(&raw.altered)?,
        lossy: regex(&raw.lossy)?,
        a_grave: regex("\u{c3} (?! |quele|quela|quilo|s )")?,
        entity: regex("&#?[0-9A-Za-z]{1,24};")?,
        reference: regex("&(#[0-9]+;?|#[xX][0-9a-fA-F]+;?|[^\\t\\n\\x0c <&#;]{1,32};?)")?,
        escape: regex("\u{1b}\\[[0-9;]*[a-zA-Z]")?,
        encodings,
        windows: windows.unwrap_or_default(),
        replaced: raw.replaced,
        controls: raw.controls.chars().collect(),
        entities: raw.entities,
        entities_upper: raw.entities_upper,
        invalid_references: raw.invalid_references,
        invalid_codepoints: raw.invalid_codepoints,
    })
}
