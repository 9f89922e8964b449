//! `ftfy.fix_text` with its default settings.

use unicode_normalization::UnicodeNormalization;

use super::encoding;
use super::html;
use super::tables::Tables;

/// ftfy repeats its steps until nothing changes; texts that never settle are not known, and would hang.
pub(super) const MAX_ROUNDS: usize = 64;

/// Every line by itself. After the first `<` nothing counts as HTML that was escaped by mistake.
pub(super) fn text(tables: &Tables, text: &str) -> String {
    let mut unescape = true;
    let lines = text.split_inclusive('\n').map(|line| {
        unescape &= !line.contains('<');
        segment(tables, line, unescape)
    });
    lines.collect()
}

fn segment(tables: &Tables, line: &str, unescape: bool) -> String {
    let mut text = line.to_string();
    for _ in 0..MAX_ROUNDS {
        let before = text.clone();
        // What one round brings to light ends unescaping as little as in ftfy: the first look decides.
        if unescape {
            text = html::unescape_strict(tables, &text);
        }
        text = encoding::fix(tables, &text);
        text = characters(tables, &text);
        text = tables.escape.replace_all(&text, "").into_owned();
        text.retain(|c| !tables.controls.contains(&c));
        text = text.nfc().collect();
        if text == before {
            break;
        }
    }
    text
}

/// C1 control characters, ligatures, widths, quotation marks and line ends, in this order.
fn characters(tables: &Tables, text: &str) -> String {
    let text = encoding::without_c1(tables, text);
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match tables.replaced.get(&c) {
            Some(value) => out.push_str(value),
            None => out.push(c),
        }
    }
    let quotes: String = out
        .chars()
        .map(|c| match c {
            '\u{201c}'..='\u{201f}' => '"',
            '\u{2bc}' | '\u{2018}'..='\u{201b}' => '\'',
            c => c,
        })
        .collect();
    quotes.replace("\r\n", "\n").replace(['\r', '\u{2028}', '\u{2029}', '\u{85}'], "\n")
}
