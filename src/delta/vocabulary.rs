//! Class names and templates that lie beside a merged model's weights.

use std::fmt::Write as _;
use std::path::Path;

use super::{Manifest, PixelOptions};
use crate::clip::source::Source;
use crate::clip::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::files;

/// One class name a line, in label order.
const LABELS: &str = "labels.txt";
/// One template a line.
const TEMPLATES: &str = "templates.txt";
/// The model card.
const CARD: &str = "README.md";

/// Classes and templates of a model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vocabulary {
    /// Class names in label order.
    pub classes: Vec<String>,
    /// Prompts around class names.
    pub templates: Vec<String>,
}

impl Vocabulary {
    /// What lies beside a base's weights; empty where nothing does.
    ///
    /// # Errors
    /// When a file is there and cannot be read.
    pub fn of(source: &Source) -> Result<Self> {
        let read = |name: &str| -> Result<Vec<String>> {
            let Some(bytes) = source.read(name)? else { return Ok(Vec::new()) };
            let text = files::text(&source.place(name), bytes.into_owned())?;
            Ok(files::lines(&text).map(str::trim).filter(|l| !l.is_empty()).map(String::from).collect())
        };
        Ok(Self { classes: read(LABELS)?, templates: read(TEMPLATES)? })
    }

    /// Classes and templates of the last adapter that has any, where its task compares images with class names.
    #[must_use]
    pub fn of_adapters<'m>(manifests: impl IntoIterator<Item = &'m Manifest>) -> Self {
        let own = manifests.into_iter().filter(|m| !m.classes.is_empty() && !m.templates.is_empty()).last();
        own.map_or_else(Self::default, |m| Self { classes: m.classes.clone(), templates: m.templates.clone() })
    }

    /// The same with names and templates that are one line each, and what to say about it. White space inside a template becomes one
    /// space where the tokeniser reads it alike.
    ///
    /// # Errors
    /// When a class name or a template cannot stand in one line.
    pub fn in_lines(mut self, tokenizer: &Tokenizer) -> Result<(Self, Vec<String>)> {
        let plain = |text: &str| text.trim() == text && !text.is_empty() && !text.contains(['\n', '\r']);
        if let Some(class) = self.classes.iter().find(|class| !plain(class)) {
            let message = format!("the class name {class:?} is no line of its own, which {LABELS} needs");
            return Err(
                Error::input("peft.json", message).hint("correct `classes` of the adapter, or train with a name without line breaks")
            );
        }
        let mut notes = Vec::new();
        for template in self.templates.iter_mut().filter(|template| !plain(template)) {
            let line = template.split_whitespace().collect::<Vec<_>>().join(" ");
            let ids = |template: &str| tokenizer.encode(&template.replace("{}", "x"));
            if line.is_empty() || ids(&line)? != ids(template)? {
                let message = format!("the template {template:?} is no line of its own, which {TEMPLATES} needs");
                return Err(Error::input("peft.json", message).hint("train with `templates` without line breaks, or merge with --bundle"));
            }
            notes.push(format!("the template {template:?} stands in {TEMPLATES} as {line:?}; the tokeniser reads both alike"));
            *template = line;
        }
        Ok((self, notes))
    }

    /// Writes `labels.txt`, `templates.txt` and a model card into a merged model's directory; names and templates are lines.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn write(&self, dir: &Path, base: &str, pixels: Option<PixelOptions>) -> Result<()> {
        let lines = |all: &[String]| all.iter().fold(String::new(), |text, line| text + line + "\n");
        if !self.classes.is_empty() {
            files::write_atomic(&dir.join(LABELS), lines(&self.classes).as_bytes())?;
            files::write_atomic(&dir.join(TEMPLATES), lines(&self.templates).as_bytes())?;
        }
        files::write_atomic(&dir.join(CARD), self.card(base, pixels).as_bytes())
    }

    fn card(&self, base: &str, pixels: Option<PixelOptions>) -> String {
        let mut card =
            "---\nlibrary_name: transformers\npipeline_tag: zero-shot-image-classification\ntags: [clip, peft]\n---\n\n".to_string();
        let _ = writeln!(card, "CLIP, adapted by `peft`. Base: {}", code(base));
        if let Some(pixels) = pixels {
            let _ = writeln!(card, "\nTrained on images with {pixels}. Prepare images the same way: the processor's files cannot say it.");
        }
        if !self.classes.is_empty() {
            let _ = writeln!(card, "\n## Classes\n\nIn label order, as in `{LABELS}`:\n");
            self.classes.iter().for_each(|class| card += &format!("- {}\n", code(class)));
            let _ = writeln!(card, "\n## Templates\n\nPrompts around class names, as in `{TEMPLATES}`:\n");
            self.templates.iter().for_each(|template| card += &format!("- {}\n", code(template)));
        }
        card
    }
}

/// A name as Markdown shows it, whatever it holds.
fn code(text: &str) -> String {
    let ticks = "`".repeat(1 + text.chars().filter(|c| *c == '`').count());
    let pad = if text.contains('`') { " " } else { "" };
    format!("{ticks}{pad}{}{pad}{ticks}", text.replace(['\n', '\r'], " "))
}
