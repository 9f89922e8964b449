//! The TIFFs that the `image` crate does not read, or not with Pillow's colours: palettes, whose
//! indices are decoded as grey values and looked up, and CMYK.

use std::io::{Cursor, Read, Seek};

use ::tiff::decoder::{Decoder, DecodingResult, Limits};
use ::tiff::tags::Tag;
use ::tiff::{ColorType, TiffError};
use image::RgbImage;
use image::metadata::Orientation;

use super::timed::Timed;
use super::{DecodeOptions, Decoded, check_size, colour};
use crate::error::{Error, Result};

const PHOTOMETRIC: u16 = 262;
const BLACK_IS_ZERO: u16 = 1;
const PALETTE: u16 = 3;
const SEPARATED: u16 = 5;

/// The image, if it is of such a kind.
pub(super) fn special(place: &str, bytes: &[u8], file: Timed<'_>, options: &DecodeOptions) -> Result<Option<Decoded>> {
    let Some(at) = photometric(bytes) else { return Ok(None) };
    let little = bytes[0] == b'I';
    match read16(bytes, at, little) {
        Some(PALETTE) => {
            let mut grey = bytes.to_vec();
            let value = if little { BLACK_IS_ZERO.to_le_bytes() } else { BLACK_IS_ZERO.to_be_bytes() };
            grey[at..at + 2].copy_from_slice(&value);
            decode(place, Cursor::new(grey), options)
        }
        Some(SEPARATED) => decode(place, file, options),
        _ => Ok(None),
    }
}

fn decode(place: &str, file: impl Read + Seek, options: &DecodeOptions) -> Result<Option<Decoded>> {
    let failed = |e: TiffError| match e {
        TiffError::UnsupportedError(e) => {
            Error::input(place, format!("this kind of image is not supported: {e}")).hint("convert it to PNG")
        }
        e => Error::input(place, format!("the image is truncated or damaged: {e}")),
    };
    let mut decoder = Decoder::new(file).map_err(failed)?;
    let (width, height) = decoder.dimensions().map_err(failed)?;
    check_size(place, width.into(), height.into(), options)?;
    let mut limits = Limits::default();
    limits.decoding_buffer_size = usize::try_from(options.max_pixels.saturating_mul(4)).unwrap_or(usize::MAX);
    let mut decoder = decoder.with_limits(limits);
    let kind = decoder.colortype().map_err(failed)?;
    if !matches!(kind, ColorType::Gray(1 | 2 | 4 | 8) | ColorType::CMYK(8)) || decoder.image_buffer_layout().map_err(failed)?.planes > 1 {
        return Ok(None);
    }
    let orientation = decoder.find_tag_unsigned::<u8>(Tag::Orientation).ok().flatten().and_then(Orientation::from_exif);
    let DecodingResult::U8(samples) = decoder.read_image().map_err(failed)? else { return Ok(None) };
    let image = if let ColorType::Gray(bits) = kind {
        let map = decoder.get_tag_u16_vec(Tag::ColorMap).map_err(failed)?;
        look_up(&samples, &map, (width, height), usize::from(bits))
    } else {
        colour::collect(width, height, &samples, cmyk)
    };
    Ok(Some(Decoded { image: image.into(), orientation: orientation.unwrap_or(Orientation::NoTransforms) }))
}

/// The map holds all reds, then all greens, then all blues, in 16 bits.
fn look_up(indices: &[u8], map: &[u16], (width, height): (u32, u32), bits: usize) -> RgbImage {
    let row = (width as usize * bits).div_ceil(8);
    let plane = map.len() / 3;
    RgbImage::from_fn(width, height, |x, y| {
        let bit = x as usize * bits;
        let byte = indices.get(y as usize * row + bit / 8).copied().unwrap_or(0);
        let index = usize::from(byte >> (8 - bits - bit % 8)) & ((1 << bits) - 1);
        let value = |channel: usize| map.get(channel * plane + index).map_or(0, |v| (v >> 8) as u8);
        image::Rgb([value(0), value(1), value(2)])
    })
}

/// Pillow's conversion, with its rounding.
fn cmyk(&[c, m, y, k]: &[u8; 4]) -> [u8; 3] {
    let light = 255 - u32::from(k);
    [c, m, y].map(|ink| {
        let product = u32::from(ink) * light + 128;
        (light - (((product >> 8) + product) >> 8)) as u8
    })
}

/// Where the first directory keeps the photometric interpretation.
fn photometric(bytes: &[u8]) -> Option<usize> {
    let little = match bytes.get(..4)? {
        b"II*\0" => true,
        b"MM\0*" => false,
        _ => return None,
    };
    let start = read32(bytes, 4, little)?;
    let count = usize::from(read16(bytes, start, little)?);
    let entry = (0..count).map(|i| start + 2 + 12 * i).find(|at| read16(bytes, *at, little) == Some(PHOTOMETRIC))?;
    Some(entry + 8).filter(|at| at + 2 <= bytes.len())
}

fn read16(bytes: &[u8], at: usize, little: bool) -> Option<u16> {
    let pair: [u8; 2] = bytes.get(at..at.checked_add(2)?)?.try_into().ok()?;
    Some(if little { u16::from_le_bytes(pair) } else { u16::from_be_bytes(pair) })
}

fn read32(bytes: &[u8], at: usize, little: bool) -> Option<usize> {
    let quad: [u8; 4] = bytes.get(at..at.checked_add(4)?)?.try_into().ok()?;
    Some(if little { u32::from_le_bytes(quad) } else { u32::from_be_bytes(quad) } as usize)
}
