//! Python's `html.unescape`, and ftfy's stricter one.

use fancy_regex::Captures;

use super::tables::Tables;

/// `html.unescape`: references with and without a semicolon, by the rules of HTML 5.
pub(super) fn unescape(tables: &Tables, text: &str) -> String {
    if !text.contains('&') {
        return text.to_string();
    }
    let replace = |found: &Captures<'_, str>| reference(tables, found.get(1).map_or("", |m| m.as_str()));
    tables.reference.replace_all(text, replace).into_owned()
}

fn reference(tables: &Tables, name: &str) -> String {
    if let Some(number) = name.strip_prefix('#') {
        return numbered(tables, number.trim_end_matches(';'));
    }
    if let Some(value) = tables.entities.get(name) {
        return value.clone();
    }
    // The longest name that it begins with, of two characters at least.
    let ends = name.char_indices().map(|(i, _)| i).skip(2).collect::<Vec<_>>();
    for end in ends.into_iter().rev() {
        if let Some(value) = tables.entities.get(&name[..end]) {
            return format!("{value}{}", &name[end..]);
        }
    }
    format!("&{name}")
}

fn numbered(tables: &Tables, number: &str) -> String {
    let parsed = match number.strip_prefix(['x', 'X']) {
        Some(hex) => u32::from_str_radix(hex, 16),
        None => number.parse(),
    };
    // Larger than any number of 32 bits is larger than any code point.
    let Ok(number) = parsed else { return "\u{fffd}".into() };
    if let Some(value) = tables.invalid_references.get(&number) {
        return value.clone();
    }
    match char::from_u32(number) {
        None => "\u{fffd}".into(),
        Some(_) if tables.invalid_codepoints.contains(&number) => String::new(),
        Some(c) => c.to_string(),
    }
}

/// ftfy's: with a semicolon only, and some names in upper case.
pub(super) fn unescape_strict(tables: &Tables, text: &str) -> String {
    let replace = |found: &Captures<'_, str>| {
        let whole = found.get(0).map_or("", |m| m.as_str());
        let name = &whole[1..];
        if let Some(value) = tables.entities.get(name).or_else(|| tables.entities_upper.get(name)) {
            return value.clone();
        }
        let value = unescape(tables, whole);
        if name.starts_with('#') && !value.contains(';') { value } else { whole.to_string() }
    };
    tables.entity.replace_all(text, replace).into_owned()
}
