//! Resizing and centre crop in one go, with Pillow's results.
//!
//! Only what survives the crop is computed, so that a thin image (1×5000 pixels resized to
//! 224×1120000) costs no more than any other.

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::RgbImage;

use super::{Preprocess, Resample, ResizeTo, Rounding, exact};
use crate::error::{Error, Result};

/// Longer resized sides come from broken images only.
const MAX_RESIZED: u64 = 1 << 29;
/// From here on `fast_image_resize` is used: its coarser coefficients now and then move a value by
/// one in each pass, which adds up to two only where a result is mostly one pixel.
const FAST_SCALE: f64 = 2.0;
/// More pixels than any model takes.
const MAX_OUTPUT: usize = 1 << 26;

/// One axis: `source` pixels become `resized` ones, of which `len` from `start` on are kept and
/// put at `offset` of `out`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Axis {
    pub(super) source: usize,
    pub(super) resized: usize,
    pub(super) start: usize,
    pub(super) len: usize,
    offset: usize,
    out: usize,
}

pub(super) fn resize_crop(p: &Preprocess, image: &RgbImage) -> Result<RgbImage> {
    let (x, y) = axes(p, image)?;
    let kept = match p.resample {
        _ if x.is_identity() && y.is_identity() => cut(image, x, y),
        Resample::Nearest => nearest(image, x, y),
        filter => match fast(filter).filter(|_| x.scale() >= FAST_SCALE && y.scale() >= FAST_SCALE) {
            Some((filter, support)) => convolve(image, x, y, filter, support)?,
            None => exact::resize(image, x, y, filter),
        },
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
    let axis = |source, resized, crop| Axis::new(source, resized, crop, p.crop_rounding);
    let (x, y) = (axis(width, resized_width, crop.0), axis(height, resized_height, crop.1));
    if x.out.saturating_mul(y.out) > MAX_OUTPUT {
        return Err(Error::input("image", format!("{width}×{height} pixels would become {}×{}", x.out, y.out))
            .hint("set `do_center_crop` in preprocessor_config.json"));
    }
    Ok((x, y))
}

impl Axis {
    fn new(source: usize, resized: usize, crop: Option<usize>, rounding: Rounding) -> Self {
        let out = crop.unwrap_or(resized);
        let (cut, pad) = (resized.saturating_sub(out), out.saturating_sub(resized));
        let (start, offset) = match rounding {
            Rounding::Transformers => (cut / 2, pad.div_ceil(2)),
            // Python's `round(cut / 2.0)`: a half goes to the even neighbour.
            Rounding::Torchvision => (cut / 2 + usize::from(cut % 4 == 3), pad / 2),
        };
        Self { source, resized, start, len: resized.min(out), offset, out }
    }

    fn is_identity(self) -> bool {
        self.source == self.resized
    }

    pub(super) fn scale(self) -> f64 {
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

    /// The source pixels that a filter of this support may look at, and a few more.
    fn reach(self, support: f64) -> (usize, usize) {
        let (start, len) = self.window();
        let reach = support * self.scale().max(1.0) + 2.0;
        ((start - reach).max(0.0) as usize, ((start + len + reach).ceil() as usize).min(self.source))
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

/// The filter and its support in `fast_image_resize`. Where a box ends in the middle of a pixel,
/// rounding decides whether that pixel counts, which only Pillow's own arithmetic gets right.
fn fast(filter: Resample) -> Option<(FilterType, f64)> {
    match filter {
        Resample::Lanczos => Some((FilterType::Lanczos3, 3.0)),
        Resample::Bilinear => Some((FilterType::Bilinear, 1.0)),
        Resample::Hamming => Some((FilterType::Hamming, 1.0)),
        Resample::Bicubic => Some((FilterType::CatmullRom, 2.0)),
        Resample::Nearest | Resample::Box => None,
    }
}

/// The first pass covers what the second one looks at.
fn convolve(image: &RgbImage, x: Axis, y: Axis, filter: FilterType, support: f64) -> Result<RgbImage> {
    let ((left, width), (top, height)) = (x.window(), y.window());
    if columns_first(x, y) {
        let (first, last) = x.reach(support);
        let part = Window { left: first as f64, top, width: (last - first) as f64, height };
        let columns = pass(image, part, last - first, y.len, filter)?;
        let left = left - first as f64;
        let part = Window { left, top: 0.0, width: width.min((last - first) as f64 - left), height: y.len as f64 };
        return pass(&columns, part, x.len, y.len, filter);
    }
    let (first, last) = y.reach(support);
    let part = Window { left, top: first as f64, width, height: (last - first) as f64 };
    let rows = pass(image, part, x.len, last - first, filter)?;
    let top = top - first as f64;
    let part = Window { left: 0.0, top, width: x.len as f64, height: height.min((last - first) as f64 - top) };
    pass(&rows, part, x.len, y.len, filter)
}

/// Pillow rounds between its passes, so their order shows. Since version 13 it begins with the
/// columns where the height shrinks by more than twice as many pixels as the width.
pub(super) fn columns_first(x: Axis, y: Axis) -> bool {
    let shrinks = |axis: Axis| axis.source as i64 - axis.resized as i64;
    shrinks(y) > 0 && shrinks(y) > 2 * shrinks(x)
}

struct Window {
    left: f64,
    top: f64,
    width: f64,
    height: f64,
}

/// One direction: the window has the result's size, in whole pixels, in the other one.
/// `fast_image_resize` would always begin with the columns.
fn pass(image: &RgbImage, part: Window, width: usize, height: usize, filter: FilterType) -> Result<RgbImage> {
    let failed = |e: &dyn std::fmt::Display| Error::fault("image", format!("cannot be resized: {e}"));
    let source = ImageRef::new(image.width(), image.height(), image.as_raw(), PixelType::U8x3).map_err(|e| failed(&e))?;
    let mut result = Image::new(width as u32, height as u32, PixelType::U8x3);
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter));
    let options = options.crop(part.left, part.top, part.width, part.height);
    Resizer::new().resize(&source, &mut result, &options).map_err(|e| failed(&e))?;
    RgbImage::from_raw(width as u32, height as u32, result.into_vec()).ok_or_else(|| failed(&"the result has the wrong size"))
}
