//! Which options of `images` a recipe gives, and which are defaults.

use serde::Deserialize;

use super::ImageConfig;
use crate::clip::preprocess::Background;

/// The options that change pixels, each with whether the recipe gives it. A recipe that spells out a default is the same recipe,
/// so that two of these are always equal.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stated {
    /// `images.background`.
    pub background: bool,
    /// `images.orient`.
    pub orient: bool,
}

impl PartialEq for Stated {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// `images` as it is written.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename = "ImageConfig")]
pub(super) struct Given {
    background: Option<Background>,
    orient: Option<bool>,
    max_pixels: Option<u64>,
    max_bytes: Option<u64>,
    max_seconds: Option<f64>,
}

impl From<Given> for ImageConfig {
    fn from(given: Given) -> Self {
        let default = Self::default();
        Self {
            background: given.background.unwrap_or(default.background),
            orient: given.orient.unwrap_or(default.orient),
            max_pixels: given.max_pixels.unwrap_or(default.max_pixels),
            max_bytes: given.max_bytes.unwrap_or(default.max_bytes),
            max_seconds: given.max_seconds.unwrap_or(default.max_seconds),
            stated: Stated { background: given.background.is_some(), orient: given.orient.is_some() },
        }
    }
}
