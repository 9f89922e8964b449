//! Colour conversions with Pillow's rounding.

use image::{DynamicImage, RgbImage, RgbaImage};

/// Drops alpha; 16 bits become 8 by dropping the low ones.
pub(super) fn rgb(image: DynamicImage) -> RgbImage {
    match image {
        DynamicImage::ImageRgb8(image) => image,
        DynamicImage::ImageLuma8(i) => collect(i.width(), i.height(), i.as_raw(), |&[l]| [l; 3]),
        DynamicImage::ImageLumaA8(i) => collect(i.width(), i.height(), i.as_raw(), |&[l, _]| [l; 3]),
        DynamicImage::ImageRgba8(i) => collect(i.width(), i.height(), i.as_raw(), |&[r, g, b, _]| [r, g, b]),
        DynamicImage::ImageLuma16(i) => collect(i.width(), i.height(), i.as_raw(), |&[l]| [high(l); 3]),
        DynamicImage::ImageLumaA16(i) => collect(i.width(), i.height(), i.as_raw(), |&[l, _]| [high(l); 3]),
        DynamicImage::ImageRgb16(i) => collect(i.width(), i.height(), i.as_raw(), |p: &[u16; 3]| p.map(high)),
        DynamicImage::ImageRgba16(i) => collect(i.width(), i.height(), i.as_raw(), |&[r, g, b, _]| [high(r), high(g), high(b)]),
        other => other.into_rgb8(),
    }
}

/// Keeps alpha; 16 bits become 8 by dropping the low ones.
pub(super) fn rgba(image: DynamicImage) -> RgbaImage {
    match image {
        DynamicImage::ImageLuma16(_) | DynamicImage::ImageRgb16(_) => DynamicImage::from(rgb(image)).into_rgba8(),
        DynamicImage::ImageLumaA16(i) => collect_rgba(i.width(), i.height(), i.as_raw(), |&[l, a]| [high(l), high(l), high(l), high(a)]),
        DynamicImage::ImageRgba16(i) => collect_rgba(i.width(), i.height(), i.as_raw(), |p: &[u16; 4]| p.map(high)),
        other => other.into_rgba8(),
    }
}

/// Composites onto white with the integer arithmetic of Pillow's `alpha_composite`.
pub(super) fn on_white(image: &RgbaImage) -> RgbImage {
    collect(image.width(), image.height(), image.as_raw(), |&[r, g, b, a]| {
        let a = u32::from(a);
        [r, g, b].map(|v| {
            let sum = 128 * (u32::from(v) * a + 255 * (255 - a)) + (0x80 << 7);
            ((((sum >> 8) + sum) >> 8) >> 7) as u8
        })
    })
}

/// Maps pixels of `N` samples to RGB.
pub(super) fn collect<T, const N: usize>(width: u32, height: u32, raw: &[T], map: impl Fn(&[T; N]) -> [u8; 3]) -> RgbImage {
    let mut out = RgbImage::new(width, height);
    for (pixel, source) in out.pixels_mut().zip(raw.as_chunks::<N>().0) {
        pixel.0 = map(source);
    }
    out
}

fn collect_rgba<T, const N: usize>(width: u32, height: u32, raw: &[T], map: impl Fn(&[T; N]) -> [u8; 4]) -> RgbaImage {
    let mut out = RgbaImage::new(width, height);
    for (pixel, source) in out.pixels_mut().zip(raw.as_chunks::<N>().0) {
        pixel.0 = map(source);
    }
    out
}

fn high(value: u16) -> u8 {
    (value >> 8) as u8
}
