//! Image decoding.

use std::path::Path;

use image::{RgbImage, RgbaImage};

use super::preprocess::Background;
use crate::error::{Error, Result};

/// How.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DecodeOptions {
    /// Transparency.
    pub background: Background,
    /// EXIF.
    pub orient: bool,
    /// Limit.
    pub max_pixels: u64,
}

impl Default for DecodeOptions {
    fn default() -> Self {
        Self { background: Background::Keep, orient: true, max_pixels: 100_000_000 }
    }
}

/// Extensions.
pub const EXTENSIONS: &[&str] = &["png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff"];

/// Reads a file.
///
/// # Errors
/// When it cannot be read.
pub fn read_file(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| Error::read(path, e))
}

/// Decodes.
///
/// # Errors
/// When malformed.
pub fn decode(place: &str, bytes: &[u8], options: &DecodeOptions) -> Result<RgbImage> {
    let rgba = decode_rgba(place, bytes, options)?;
    Ok(RgbImage::from_fn(rgba.width(), rgba.height(), |x, y| {
        let [r, g, b, a] = rgba.get_pixel(x, y).0;
        let over = |c: u8| ((u32::from(c) * u32::from(a) + 255 * (255 - u32::from(a)) + 127) / 255) as u8;
        image::Rgb(if options.background == Background::White { [over(r), over(g), over(b)] } else { [r, g, b] })
    }))
}

/// Decodes with alpha.
///
/// # Errors
/// When malformed.
pub fn decode_rgba(place: &str, bytes: &[u8], _options: &DecodeOptions) -> Result<RgbaImage> {
    Ok(image::load_from_memory(bytes).map_err(|e| Error::input(place, e))?.to_rgba8())
}
