//! Class names that nobody can tell apart, and those that only a machine can.

use std::collections::HashMap;

use unicode_normalization::UnicodeNormalization;
use unicode_security::skeleton;

use crate::error::{Error, Result};

/// Pairs of look-alikes that a note lists.
const LISTED: usize = 5;

/// Empty names, those with control characters, and several that make one prompt.
///
/// # Errors
/// When a name is empty or invisible, has a control character, or two are equal after Unicode's composition (NFC), without white
/// space at their ends, invisible characters and case.
pub fn check_classes(place: &str, names: &[String]) -> Result<()> {
    let mut seen: HashMap<String, &String> = HashMap::new();
    for name in names {
        let key = prompt(name);
        if key.is_empty() {
            return Err(Error::input(place, format!("a class name is empty ({name:?})")).hint("give each class a name to make a prompt of"));
        }
        if let Some(other) = seen.insert(key, name) {
            return Err(Error::input(place, format!("classes {} and {} give the same prompt", shown(other, name), shown(name, other)))
                .hint("rename one of them"));
        }
    }
    match names.iter().find(|name| name.contains(char::is_control)) {
        Some(name) => Err(Error::input(place, format!("a class name has a line break or another control character: {}", brief(name)))
            .hint("is a quote left open?")),
        None => Ok(()),
    }
}

/// Names of different characters that look the same, such as a Latin and a Cyrillic `a`: often one class that was typed twice, but
/// `O` and `0` are two in a set of letters, so that they are told of and not refused.
pub(super) fn look_alikes(names: &[String]) -> Option<String> {
    let mut seen: HashMap<String, &String> = HashMap::new();
    let mut pairs = Vec::new();
    for name in names {
        let key = skeleton(&visible(name).nfkc().collect::<String>()).collect::<String>().to_lowercase();
        if let Some(other) = seen.insert(key, name) {
            pairs.push(format!("{} and {}", shown(other, name), shown(name, other)));
        }
    }
    let more = pairs.len().saturating_sub(LISTED);
    let rest = if more > 0 { format!(", and {more} more") } else { String::new() };
    pairs.truncate(LISTED);
    (!pairs.is_empty()).then(|| format!("class names look alike: {}{rest}", pairs.join(", ")))
}

/// The beginning of a name, as Rust writes it.
fn brief(name: &str) -> String {
    const SHOWN: usize = 60;
    let more = if name.chars().count() > SHOWN { "…" } else { "" };
    format!("{:?}{more}", name.chars().take(SHOWN).collect::<String>())
}

/// What of a name makes its prompt: the tokeniser composes and folds case.
fn prompt(name: &str) -> String {
    visible(name).to_lowercase()
}

fn visible(name: &str) -> String {
    let shown: String = name.nfc().filter(|c| !invisible(*c)).collect();
    shown.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Characters without a picture: soft hyphens, zero-width and directional marks, variation selectors, tags, controls.
fn invisible(c: char) -> bool {
    let hidden = matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{e0000}'..='\u{e0fff}');
    hidden || (c.is_control() && !c.is_whitespace())
}

/// A name, and what it is made of where that is all that tells it from `other`.
fn shown(name: &str, other: &str) -> String {
    let strange = name.chars().find(|c| !c.is_ascii() && !other.contains(*c));
    match strange {
        Some(c) => format!("`{name}` (with U+{:04X})", c as u32),
        None => format!("`{name}`"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_makes_one_prompt_is_refused() {
        for pair in
            [["cat", "Cat "], ["e\u{301}clair", "\u{e9}clair"], ["cat", "c\u{200b}at"], ["a  b", "a\tb"], ["\u{2764}", "\u{2764}\u{fe0f}"]]
        {
            let message = check_classes("x", &names(&pair)).unwrap_err().to_string();
            assert!(message.contains("the same prompt"), "{message}");
        }
        for empty in ["", " \t", "\u{200b}\u{feff}", "\u{0}"] {
            assert!(check_classes("x", &names(&["cat", empty])).unwrap_err().to_string().contains("empty"), "{empty:?}");
        }
    }

    #[test]
    fn look_alikes_are_named_with_their_difference() {
        let alike = names(&["cat", "c\u{430}t", "O", "0", "\u{fb01}sh", "fish", "dog"]);
        check_classes("x", &alike).unwrap();
        let note = look_alikes(&alike).unwrap();
        assert!(note.contains("`cat` and `c\u{430}t` (with U+0430)") && note.contains("`O` and `0`") && note.contains("sh"), "{note}");
        assert!(!note.contains("dog"), "{note}");
        assert_eq!(look_alikes(&names(&["cat", "dog", "naïve"])), None);
    }
}
