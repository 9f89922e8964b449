//! What OpenAI and open_clip do to a text before they split it into tokens: `ftfy.fix_text`, `html.unescape` twice, white space.
//! transformers does none of it.

mod encoding;
mod fix;
mod html;
mod tables;

use std::borrow::Cow;

use crate::error::Result;

/// A key of ours in `tokenizer_config.json`, which transformers passes over.
pub(crate) const KEY: &str = "text_cleaning";

/// How texts are cleaned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cleaning {
    /// Not at all, as in transformers.
    #[default]
    None,
    /// open_clip's `lower`, which is what OpenAI does: repaired, white space made one space, lower case.
    Lower,
    /// open_clip's `whitespace`: as [`Cleaning::Lower`], upper case stays.
    Whitespace,
    /// open_clip's `canonicalize`: as [`Cleaning::Lower`], without ASCII punctuation.
    Canonicalize,
}

impl Cleaning {
    /// All of them with open_clip's names.
    const ALL: [(&'static str, Self); 4] =
        [("none", Self::None), ("lower", Self::Lower), ("whitespace", Self::Whitespace), ("canonicalize", Self::Canonicalize)];

    /// By open_clip's name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(n, _)| *n == name).map(|(_, cleaning)| *cleaning)
    }

    /// open_clip's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, c)| *c == self).map_or("none", |(name, _)| name)
    }

    /// The text as the tokeniser gets it.
    ///
    /// # Errors
    /// When the tables that are built in are damaged.
    pub fn apply(self, text: &str) -> Result<Cow<'_, str>> {
        if self == Self::None {
            return Ok(Cow::Borrowed(text));
        }
        let tables = tables::tables()?;
        let text = fix::text(tables, text);
        let text = html::unescape(tables, &html::unescape(tables, &text));
        Ok(Cow::Owned(match self {
            Self::Lower => spaced(&text).to_lowercase(),
            Self::Canonicalize => {
                let kept: String = text.replace('_', " ").chars().filter(|c| !c.is_ascii_punctuation()).collect();
                spaced(&kept.to_lowercase())
            }
            _ => spaced(&text),
        }))
    }
}

/// Words with one space between them; Python's `split` also parts at the four separators of ASCII.
fn spaced(text: &str) -> String {
    let words = text.split(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Golden {
        /// A text, `ftfy.fix_text` of it, open_clip's `lower` and `canonicalize` of it.
        texts: Vec<[String; 4]>,
        /// A reference without a semicolon, and `html.unescape` of it.
        entities: Vec<[String; 2]>,
    }

    #[test]
    fn texts_are_cleaned_as_ftfy_and_open_clip_clean_them() {
        let golden: Golden = serde_json::from_str(include_str!("../../../tests/data/open_clip/cleaned.json")).unwrap();
        let tables = tables::tables().unwrap();
        for [text, fixed, lower, canonical] in &golden.texts {
            assert_eq!(&fix::text(tables, text), fixed, "fix_text of {text:?}");
            assert_eq!(&*Cleaning::Lower.apply(text).unwrap(), lower, "lower of {text:?}");
            assert_eq!(&*Cleaning::Canonicalize.apply(text).unwrap(), canonical, "canonicalize of {text:?}");
        }
        for [reference, value] in &golden.entities {
            assert_eq!(&html::unescape(tables, reference), value, "{reference}");
        }
    }
}
