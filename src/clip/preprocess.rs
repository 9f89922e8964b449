//! preprocessor_config.json.

use image::RgbImage;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Transparency.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Background {
    /// Alpha is dropped.
    #[default]
    Keep,
    /// On white.
    White,
}

/// How images become pixels.
#[derive(Debug, Clone, PartialEq)]
pub struct Preprocess {
    size: usize,
    mean: [f32; 3],
    std: [f32; 3],
}

impl Preprocess {
    /// Reads.
    ///
    /// # Errors
    /// When malformed.
    pub fn from_json(place: &str, bytes: &[u8]) -> Result<Self> {
        let v: serde_json::Value = serde_json::from_slice(bytes).map_err(|e| Error::input(place, e))?;
        let three = |key: &str| [0, 1, 2].map(|i| v[key][i].as_f64().unwrap_or(0.5) as f32);
        Ok(Self { size: v["crop_size"]["height"].as_u64().unwrap_or(224) as usize, mean: three("image_mean"), std: three("image_std") })
    }

    /// Default.
    #[must_use]
    pub fn for_size(size: usize) -> Self {
        Self { size, mean: [0.481_454_66, 0.457_827_5, 0.408_210_73], std: [0.268_629_54, 0.261_302_58, 0.275_777_11] }
    }

    /// Checks.
    ///
    /// # Errors
    /// When sizes differ.
    pub fn check(&self, place: &str, image_size: usize) -> Result<()> {
        if self.size == image_size { Ok(()) } else { Err(Error::input(place, "size")) }
    }

    /// Resize and crop.
    ///
    /// # Errors
    /// When it fails.
    pub fn resize_crop(&self, image: &RgbImage) -> Result<RgbImage> {
        let s = self.size as u32;
        if image.dimensions() == (s, s) {
            return Ok(image.clone());
        }
        Ok(image::imageops::resize(image, s, s, image::imageops::FilterType::CatmullRom))
    }

    /// Rescale and normalise.
    pub fn normalise(&self, image: &RgbImage, out: &mut [f32]) {
        let plane = out.len() / 3;
        for (i, p) in image.pixels().enumerate() {
            for c in 0..3 {
                out[c * plane + i] = (f32::from(p.0[c]) / 255.0 - self.mean[c]) / self.std[c];
            }
        }
    }

    /// Height and width.
    #[must_use]
    pub fn output_size(&self) -> (usize, usize) {
        (self.size, self.size)
    }

    /// Canonical.
    #[must_use]
    pub fn digest_bytes(&self) -> Vec<u8> {
        format!("{self:?}").into_bytes()
    }
}
