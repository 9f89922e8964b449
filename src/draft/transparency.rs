//! Whether a recipe should put images on white.

use rayon::prelude::*;

use crate::clip::decode::{self, DecodeOptions};
use crate::data::{Dataset, Example, ImageRef};

/// Training images that are looked at, evenly spaced.
const SAMPLE: usize = 256;
/// Transparent images are many from this share of those that were looked at.
const MANY: f64 = 0.1;

/// What a sample of the training images showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Looked {
    /// Images that could be read.
    pub(super) read: usize,
    /// Those of them with transparent parts.
    pub(super) transparent: usize,
    /// Images that could not be read.
    pub(super) unreadable: usize,
}

impl Looked {
    /// Looks at a sample of the training images.
    pub(super) fn at(data: &Dataset) -> Self {
        let step = data.train.len().div_ceil(SAMPLE).max(1);
        let sample: Vec<&Example> = data.train.iter().filter(|e| e.image != ImageRef::Missing).step_by(step).collect();
        let options = DecodeOptions::default();
        let see = |e: &&Example| {
            let bytes = e.bytes_within(options.max_bytes).ok()?;
            decode::decode_rgba(&e.id, &bytes, &options).ok().map(|image| decode::is_transparent(&image))
        };
        let seen: Vec<Option<bool>> = sample.par_iter().map(see).collect();
        let count = |what: Option<bool>| seen.iter().filter(|s| **s == what).count();
        Self { read: count(Some(true)) + count(Some(false)), transparent: count(Some(true)), unreadable: count(None) }
    }

    /// The recipe's line, where many images are transparent.
    pub(super) fn line(self) -> Option<String> {
        let many = self.transparent > 0 && self.transparent as f64 >= MANY * self.read as f64;
        many.then(|| {
            format!(
                "images: {{ background: white }}   # {} of {} images that were looked at have transparent parts; without this the colours\n\
                 \x20                               # hidden there are read, often black\n",
                self.transparent, self.read
            )
        })
    }

    /// What the author should know of images that cannot be read.
    pub(super) fn note(self) -> Option<String> {
        let all = self.read + self.unreadable;
        (self.unreadable > 0)
            .then(|| format!("{} of {all} training images that were looked at cannot be read: `peft data` names all such", self.unreadable))
    }
}
