//! Resizing and centre crop in one go, with Pillow's results.
//!
//! Only what survives the crop is computed, so that a thin image (1×5000 pixels resized to
//! 224×1120000) costs no more than any other.

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::RgbImage;

use super::{Preprocess, Resample, ResizeTo};
use crate::error::{Error, Result};

/// Longer resized sides come from broken images only.
const MAX_RESIZED: u64 = 1 << 24;
/// More pixels than any model takes.
const MAX_OUTPUT: usize = 1 << 26;

/// One axis: `source` pixels become `resized` ones, of which `len` from `start` on are kept and
/// put at `offset` of `out`.
#[derive(Debug, Clone, Copy)]
struct Axis {
    source: usize,
    resized: usize,
    start: usize,
    len: usize,
    offset: usize,
    out: usize,
}

pub(super) fn resize_crop(p: &Preprocess, image: &RgbImage) -> Result<RgbImage> {
    let (x, y) = axes(p, image)?;
    let kept = match p.resample {
        _ if x.is_identity() && y.is_identity() => cut(image, x, y),
        Resample::Nearest => nearest(image, x, y),
        filter => convolve(image, x, y, filter)?,
    };
    if x.len == x.out && y.len == y.out {
        return Ok(kept);
    }
    let mut padded = RgbImage::new(x.out as u32, y.out as u32);
    image::imageops::replace(&mut padded, &kept, x.offset as i64, y.offset as i64);
    Ok(padded)
}

fn axes(p: &Preprocess, image: &RgbImage) -> Result<(Axis, Axis)> {
    let (width, height) = (image.width() as usize, image.height() as usize);
    if width == 0 || height == 0 {
        return Err(Error::input("image", format!("{width}×{height} pixels: there is nothing to see")));
    }
    let (resized_width, resized_height) = match (p.do_resize, p.size) {
        (false, _) => (width, height),
        (true, ResizeTo::Exact { height, width }) => (width, height),
        (true, ResizeTo::ShortestEdge(edge)) => {
            let long = edge as u64 * width.max(height) as u64 / width.min(height) as u64;
            if long > MAX_RESIZED {
                return Err(Error::input("image", format!("{width}×{height} pixels: too thin to be resized")));
            }
            if width <= height { (edge, long as usize) } else { (long as usize, edge) }
        }
    };
    let crop = p.do_center_crop.then_some((p.crop_width, p.crop_height)).unzip();
    let (x, y) = (Axis::new(width, resized_width, crop.0), Axis::new(height, resized_height, crop.1));
    if x.out.saturating_mul(y.out) > MAX_OUTPUT {
        return Err(Error::input("image", format!("{width}×{height} pixels would become {}×{}", x.out, y.out))
            .hint("set `do_center_crop` in preprocessor_config.json"));
    }
    Ok((x, y))
}

impl Axis {
    /// transformers' `center_crop`: floor where it cuts, ceiling where it pads.
    fn new(source: usize, resized: usize, crop: Option<usize>) -> Self {
        let out = crop.unwrap_or(resized);
        Self {
            source,
            resized,
            start: resized.saturating_sub(out) / 2,
            len: resized.min(out),
            offset: out.saturating_sub(resized).div_ceil(2),
            out,
        }
    }

    fn is_identity(self) -> bool {
        self.source == self.resized
    }

    fn scale(self) -> f64 {
        self.source as f64 / self.resized as f64
    }

    /// Where what is kept begins in the source, and its length there.
    fn window(self) -> (f64, f64) {
        if self.len == self.resized {
            return (0.0, self.source as f64);
        }
        let start = self.start as f64 * self.scale();
        (start, (self.len as f64 * self.scale()).min(self.source as f64 - start))
    }
}

fn cut(image: &RgbImage, x: Axis, y: Axis) -> RgbImage {
    image::imageops::crop_imm(image, x.start as u32, y.start as u32, x.len as u32, y.len as u32).to_image()
}

/// Pillow steps through the source by repeated addition; so do we, for the same rounding.
fn nearest(image: &RgbImage, x: Axis, y: Axis) -> RgbImage {
    let indices = |axis: Axis| -> Vec<u32> {
        let mut at = axis.scale() * 0.5;
        let mut all = Vec::with_capacity(axis.len);
        for i in 0..axis.start + axis.len {
            if i >= axis.start {
                all.push((at as usize).min(axis.source - 1) as u32);
            }
            at += axis.scale();
        }
        all
    };
    let (columns, rows) = (indices(x), indices(y));
    RgbImage::from_fn(x.len as u32, y.len as u32, |i, j| *image.get_pixel(columns[i as usize], rows[j as usize]))
}

/// Pillow filters rows first and rounds in between; `fast_image_resize` would begin with the
/// columns, so that each direction is a call of its own.
fn convolve(image: &RgbImage, x: Axis, y: Axis, filter: Resample) -> Result<RgbImage> {
    let (filter, support) = match filter {
        Resample::Lanczos => (FilterType::Lanczos3, 3.0),
        Resample::Bilinear => (FilterType::Bilinear, 1.0),
        Resample::Box => (FilterType::Box, 0.5),
        Resample::Hamming => (FilterType::Hamming, 1.0),
        Resample::Bicubic | Resample::Nearest => (FilterType::CatmullRom, 2.0),
    };
    let failed = |e: &dyn std::fmt::Display| Error::fault("image", format!("cannot be resized: {e}"));
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter));
    let mut resizer = Resizer::new();

    // The rows that the second pass will look at.
    let (top, height) = y.window();
    let reach = support * y.scale().max(1.0) + 2.0;
    let first = (top - reach).max(0.0) as usize;
    let last = ((top + height + reach).ceil() as usize).min(y.source);

    let source = ImageRef::new(image.width(), image.height(), image.as_raw(), PixelType::U8x3).map_err(|e| failed(&e))?;
    let mut rows = Image::new(x.len as u32, (last - first) as u32, PixelType::U8x3);
    let (left, width) = x.window();
    let window = options.crop(left, first as f64, width, (last - first) as f64);
    resizer.resize(&source, &mut rows, &window).map_err(|e| failed(&e))?;

    let mut result = Image::new(x.len as u32, y.len as u32, PixelType::U8x3);
    let window = options.crop(0.0, top - first as f64, x.len as f64, height.min(last as f64 - top));
    resizer.resize(&rows, &mut result, &window).map_err(|e| failed(&e))?;
    RgbImage::from_raw(x.len as u32, y.len as u32, result.into_vec())
        .ok_or_else(|| failed(&"the result has the wrong size"))
}
