//! The first frame of a GIF, as Pillow shows it.

use image::{DynamicImage, Rgba, RgbaImage};

use super::timed::Timed;
use super::{DecodeOptions, check_size};
use crate::error::{Error, Result};

/// Decodes indices, not colours: transparent pixels keep the colour of their palette entry, and
/// what the frame does not cover is the transparent entry, or black.
pub(super) fn first_frame(place: &str, file: Timed<'_>, options: &DecodeOptions) -> Result<DynamicImage> {
    let damaged = |e: ::gif::DecodingError| Error::input(place, format!("the image is truncated or damaged: {e}"));
    let mut settings = ::gif::DecodeOptions::new();
    settings.set_color_output(::gif::ColorOutput::Indexed);
    settings.set_memory_limit(::gif::MemoryLimit::Unlimited);
    let mut decoder = settings.read_info(file).map_err(damaged)?;
    let (width, height) = (u32::from(decoder.width()), u32::from(decoder.height()));
    check_size(place, width.into(), height.into(), options)?;
    let Some(frame) = decoder.next_frame_info().map_err(damaged)? else {
        return Err(Error::input(place, "the image is truncated or damaged: it has no frame"));
    };
    let (frame_width, frame_height) = (u32::from(frame.width), u32::from(frame.height));
    let (left, top, transparent) = (u32::from(frame.left), u32::from(frame.top), frame.transparent);
    check_size(place, frame_width.into(), frame_height.into(), options)?;
    let mut indices = vec![0; decoder.buffer_size()];
    decoder.read_into_buffer(&mut indices).map_err(damaged)?;

    let palette = decoder.palette().unwrap_or_default();
    let colour = |index: u8| {
        let at = 3 * usize::from(index);
        let alpha = if transparent == Some(index) { 0 } else { 255 };
        match palette.get(at..at + 3) {
            Some(&[r, g, b]) => Rgba([r, g, b, alpha]),
            _ => Rgba([0, 0, 0, alpha]),
        }
    };
    let mut image = RgbaImage::from_pixel(width, height, colour(transparent.unwrap_or(0)));
    for (i, index) in indices.iter().enumerate() {
        let (x, y) = (left + i as u32 % frame_width, top + i as u32 / frame_width);
        if x < width && y < height {
            image.put_pixel(x, y, colour(*index));
        }
    }
    Ok(image.into())
}
