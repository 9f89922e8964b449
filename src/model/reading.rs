//! How a model's image files become pixels: what its adapters were trained with, unless somebody says otherwise.

use std::path::Path;

use crate::clip::decode::{DecodeOptions, PixelOptions};
use crate::clip::preprocess::Background;

/// What somebody wants in place of what the adapters were trained with; nothing where that is to hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PixelChoice {
    /// What becomes of transparency.
    pub background: Option<Background>,
    /// Whether the EXIF orientation is applied.
    pub orient: Option<bool>,
}

/// Options of decoding with their origin.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ImageReading {
    /// Limits, and what holds without an adapter.
    pub(super) limits: DecodeOptions,
    pub(super) choice: PixelChoice,
    /// What the last adapter that says it was trained with.
    trained: Option<PixelOptions>,
}

impl ImageReading {
    /// For another model on the same base: what was asked for stays, what its adapters say does not.
    pub(super) fn without_adapters(&self) -> Self {
        Self { trained: None, ..*self }
    }

    pub(super) fn options(&self) -> DecodeOptions {
        self.limits.with_pixels(self.pixels())
    }

    fn pixels(&self) -> PixelOptions {
        let trained = self.trained.unwrap_or(self.limits.pixels());
        PixelOptions {
            background: self.choice.background.unwrap_or(trained.background),
            orient: self.choice.orient.unwrap_or(trained.orient),
        }
    }

    /// Takes what an adapter was trained with. Returns what a user should know.
    pub(super) fn adopt(&mut self, dir: &Path, trained: Option<PixelOptions>) -> Vec<String> {
        let Some(trained) = trained else { return Vec::new() };
        let before = self.trained.replace(trained).filter(|before| *before != trained);
        let change = before.map(|before| {
            format!(
                "{}: was trained on images with {trained}, the adapter before it with {before}; the last one's options hold",
                dir.display()
            )
        });
        change.into_iter().chain(self.overruled()).collect()
    }

    /// Where a choice is not what the adapter was trained with.
    pub(super) fn overruled(&self) -> Option<String> {
        let (trained, used) = (self.trained?, self.pixels());
        (trained != used).then(|| format!("the adapter was trained on images with {trained}; they are read with {used}, as asked"))
    }
}
