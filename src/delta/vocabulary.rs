//! Class names and templates that lie beside a merged model's weights.

use std::fmt::Write as _;
use std::path::Path;

use super::{Manifest, PixelOptions};
use crate::clip::source::Source;
use crate::error::Result;
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

    /// Writes `labels.txt`, `templates.txt` and a model card into a merged model's directory.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn write(&self, dir: &Path, base: &str, pixels: Option<PixelOptions>) -> Result<()> {
        let lines = |all: &[String]| all.iter().fold(String::new(), |text, line| text + line + "\n");
        if !self.classes.is_empty() {
            files::write_atomic(&dir.join(LABELS), lines(&self.classes).as_bytes())?;
            // A line break inside a template would make two of it.
            let one_line: Vec<String> = self.templates.iter().filter(|t| !t.contains(['\n', '\r'])).cloned().collect();
            files::write_atomic(&dir.join(TEMPLATES), lines(&one_line).as_bytes())?;
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
