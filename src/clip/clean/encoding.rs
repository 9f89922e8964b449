//! Mojibake: UTF-8 that was read in an encoding of one byte a character, as `ftfy.fix_encoding` turns it back.

use fancy_regex::{Captures, Regex};

use super::fix::MAX_ROUNDS;
use super::tables::Tables;

/// `ftfy.fix_encoding`.
pub(super) fn fix(tables: &Tables, text: &str) -> String {
    let mut text = text.to_string();
    for _ in 0..MAX_ROUNDS {
        match step(tables, &text) {
            Some(fixed) if fixed != text => text = fixed,
            _ => break,
        }
    }
    text
}

fn matches(regex: &Regex, text: &str) -> bool {
    // An expression that backtracks too far finds nothing.
    regex.is_match(text).unwrap_or(false)
}

fn step(tables: &Tables, text: &str) -> Option<String> {
    if text.is_ascii() || !matches(&tables.badness, text) {
        return None;
    }
    let encode = |map: &std::collections::HashMap<char, u8>| text.chars().map(|c| map.get(&c).copied()).collect::<Option<Vec<u8>>>();
    for encoding in &tables.encodings {
        if let Some(fixed) = encode(&encoding.bytes).and_then(|bytes| decoded(tables, &encoding.name, bytes)) {
            return Some(fixed);
        }
    }
    if matches(&tables.embedded, text) {
        let replace = |found: &Captures<'_, str>| {
            let part = found.get(0).map_or("", |m| m.as_str());
            // Shorter than the whole, so that this comes to an end.
            if part.len() < text.len() && matches(&tables.badness, part) { fix(tables, part) } else { part.to_string() }
        };
        let fixed = tables.embedded.replace_all(text, replace).into_owned();
        if fixed != text {
            return Some(fixed);
        }
    }
    if text.chars().all(|c| u32::from(c) < 256) {
        // All of Latin-1: its control characters are Windows-1252's punctuation, where that has some for all of them.
        let undefined = |c: char| matches!(c, '\u{81}' | '\u{8d}' | '\u{8f}' | '\u{90}' | '\u{9d}');
        if !text.chars().any(|c| matches!(c, '\u{80}'..='\u{9f}')) {
            return None;
        }
        if !text.chars().any(undefined) {
            return Some(without_c1(tables, text));
        }
    }
    Some(without_c1(tables, text))
}

/// C1 control characters as Windows-1252 has them.
pub(super) fn without_c1(tables: &Tables, text: &str) -> String {
    let replace = |c: char| match c {
        '\u{80}'..='\u{9f}' => tables.windows.get(u32::from(c) as usize).copied().unwrap_or(c),
        c => c,
    };
    text.chars().map(replace).collect()
}

/// Bytes of an encoding as UTF-8, once what programs are known to do to such bytes is undone.
fn decoded(tables: &Tables, encoding: &str, bytes: Vec<u8>) -> Option<String> {
    // Expressions run over text, so each byte is the character of its number.
    let mut latin: String = bytes.iter().copied().map(char::from).collect();
    if encoding != "macroman" && matches(&tables.altered, &latin) {
        latin = tables.a_grave.replace_all(&latin, "\u{c3}\u{a0} ").into_owned();
        let restore = |found: &Captures<'_, str>| found.get(0).map_or("", |m| m.as_str()).replace(' ', "\u{a0}");
        latin = tables.altered.replace_all(&latin, restore).into_owned();
    }
    if encoding.starts_with("sloppy") {
        latin = tables.lossy.replace_all(&latin, "\u{ef}\u{bf}\u{bd}").into_owned();
    }
    let bytes: Vec<u8> = latin.chars().filter_map(|c| u8::try_from(u32::from(c)).ok()).collect();
    utf8_variants(&bytes)
}

/// UTF-8, with CESU-8's pairs of surrogates and Java's null.
fn utf8_variants(bytes: &[u8]) -> Option<String> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some(first) = rest.first() {
        match rest {
            [0xc0, 0x80, tail @ ..] => {
                out.push(0);
                rest = tail;
            }
            [0xed, a @ 0xa0..=0xaf, b @ 0x80..=0xbf, 0xed, c @ 0xb0..=0xbf, d @ 0x80..=0xbf, tail @ ..] => {
                let bits = |byte: u8, mask: u8| u32::from(byte & mask);
                let point = (bits(*a, 0x0f) << 16) + (bits(*b, 0x3f) << 10) + (bits(*c, 0x0f) << 6) + bits(*d, 0x3f) + 0x10000;
                out.extend_from_slice(char::from_u32(point)?.encode_utf8(&mut [0; 4]).as_bytes());
                rest = tail;
            }
            _ => {
                out.push(*first);
                rest = &rest[1..];
            }
        }
    }
    String::from_utf8(out).ok()
}
