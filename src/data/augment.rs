//! Random transforms of training images.

use image::{Rgb, RgbImage, Rgba, RgbaImage};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What happens to a training image, in this order. Nothing where the key is left out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AugmentConfig {
    /// Transparent pixels are filled with `white`, or with a `random` colour each time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub background: Option<Fill>,
    /// Random resized crop: this fraction of the area, aspect ratio 3/4 to 4/3. Lower: stronger.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crop: Option<[f64; 2]>,
    /// Mirror left and right in half of the cases. Not for text or handed objects.
    pub flip: bool,
    /// Rotate by up to this many degrees either way.
    pub rotate: f64,
    /// Change brightness, contrast and saturation by up to these factors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jitter: Option<Jitter>,
}

/// A colour for transparent pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fill {
    /// White.
    White,
    /// White in half of the cases, otherwise any colour.
    Random,
}

/// Strengths from 0 to 1, as in torchvision's `ColorJitter`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Jitter {
    /// Factor in [1 − b, 1 + b].
    pub brightness: f64,
    /// Factor in [1 − c, 1 + c] around the mean grey.
    pub contrast: f64,
    /// Factor in [1 − s, 1 + s] around each pixel's grey.
    pub saturation: f64,
}

/// The part of an image that a crop keeps: left, top, width, height in pixels.
pub(super) type Region = (f64, f64, f64, f64);

impl AugmentConfig {
    /// Whether every epoch sees the same pixels.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// When a value is out of range.
    pub fn validate(&self, place: &str) -> Result<()> {
        let wrong = |key: &str, message: String| Err(Error::input(format!("{place}: train.augment.{key}"), message));
        if let Some([low, high]) = self.crop
            && !(low > 0.0 && low <= high && high <= 1.0)
        {
            return wrong("crop", format!("expected [low, high] with 0 < low <= high <= 1, found [{low}, {high}]"));
        }
        if !(0.0..=180.0).contains(&self.rotate) {
            return wrong("rotate", format!("expected degrees from 0 to 180, found {}", self.rotate));
        }
        let j = self.jitter.unwrap_or_default();
        for (key, value) in [("brightness", j.brightness), ("contrast", j.contrast), ("saturation", j.saturation)] {
            if !(0.0..=1.0).contains(&value) {
                return wrong(&format!("jitter.{key}"), format!("expected 0 to 1, found {value}"));
            }
        }
        Ok(())
    }

    /// Puts the image on a background; alpha is dropped where none is asked for.
    pub(super) fn compose(&self, image: &RgbaImage, default_white: bool, rng: &mut ChaCha8Rng) -> RgbImage {
        let fill = match self.background {
            Some(Fill::White) => Some([255; 3]),
            Some(Fill::Random) if rng.random::<bool>() => Some([255; 3]),
            Some(Fill::Random) => Some(rng.random::<[u8; 3]>()),
            None => default_white.then_some([255; 3]),
        };
        let (w, h) = image.dimensions();
        RgbImage::from_fn(w, h, |x, y| over(image.get_pixel(x, y), fill))
    }

    /// Draws the crop's region of a `width` × `height` image, as torchvision's `RandomResizedCrop` does.
    pub(super) fn region(&self, width: u32, height: u32, rng: &mut ChaCha8Rng) -> Option<Region> {
        let [low, high] = self.crop?;
        let (w, h) = (f64::from(width), f64::from(height));
        for _ in 0..10 {
            let area = w * h * rng.random_range(low..=high);
            let ratio = rng.random_range((0.75f64).ln()..=(4.0f64 / 3.0).ln()).exp();
            let (cw, ch) = ((area * ratio).sqrt().round(), (area / ratio).sqrt().round());
            if (1.0..=w).contains(&cw) && (1.0..=h).contains(&ch) {
                return Some((rng.random_range(0.0..=w - cw).floor(), rng.random_range(0.0..=h - ch).floor(), cw, ch));
            }
        }
        let side = w.min(h);
        Some((((w - side) / 2.0).floor(), ((h - side) / 2.0).floor(), side, side))
    }

    /// What follows the crop: flip, rotation, colour.
    pub(super) fn finish(&self, mut image: RgbImage, rng: &mut ChaCha8Rng) -> RgbImage {
        if self.flip && rng.random::<bool>() {
            image::imageops::flip_horizontal_in_place(&mut image);
        }
        if self.rotate > 0.0 {
            image = rotate(&image, rng.random_range(-self.rotate..=self.rotate));
        }
        if let Some(jitter) = self.jitter {
            jitter.apply(&mut image, rng);
        }
        image
    }
}

fn over(pixel: &Rgba<u8>, fill: Option<[u8; 3]>) -> Rgb<u8> {
    let [r, g, b, a] = pixel.0;
    let Some(fill) = fill else { return Rgb([r, g, b]) };
    let a = u32::from(a);
    let mix = |c: u8, f: u8| ((u32::from(c) * a + u32::from(f) * (255 - a) + 127) / 255) as u8;
    Rgb([mix(r, fill[0]), mix(g, fill[1]), mix(b, fill[2])])
}

/// Bilinear rotation about the centre; corners repeat the nearest edge pixel.
fn rotate(image: &RgbImage, degrees: f64) -> RgbImage {
    let (w, h) = image.dimensions();
    let (sin, cos) = degrees.to_radians().sin_cos();
    let (cx, cy) = ((f64::from(w) - 1.0) / 2.0, (f64::from(h) - 1.0) / 2.0);
    let at = |x: i64, y: i64| image.get_pixel(x.clamp(0, i64::from(w) - 1) as u32, y.clamp(0, i64::from(h) - 1) as u32).0;
    RgbImage::from_fn(w, h, |x, y| {
        let (dx, dy) = (f64::from(x) - cx, f64::from(y) - cy);
        let (sx, sy) = (cos * dx + sin * dy + cx, cos * dy - sin * dx + cy);
        let (x0, y0) = (sx.floor(), sy.floor());
        let (fx, fy) = (sx - x0, sy - y0);
        let (x0, y0) = (x0 as i64, y0 as i64);
        let (a, b, c, d) = (at(x0, y0), at(x0 + 1, y0), at(x0, y0 + 1), at(x0 + 1, y0 + 1));
        Rgb(std::array::from_fn(|i| {
            let top = f64::from(a[i]) * (1.0 - fx) + f64::from(b[i]) * fx;
            let bottom = f64::from(c[i]) * (1.0 - fx) + f64::from(d[i]) * fx;
            (top * (1.0 - fy) + bottom * fy).round() as u8
        }))
    })
}

impl Jitter {
    fn apply(&self, image: &mut RgbImage, rng: &mut ChaCha8Rng) {
        let mut factor = |strength: f64| (1.0 + strength * rng.random_range(-1.0..=1.0)) as f32;
        let (brightness, contrast, saturation) = (factor(self.brightness), factor(self.contrast), factor(self.saturation));
        let grey = |p: &Rgb<u8>| 0.299 * f32::from(p.0[0]) + 0.587 * f32::from(p.0[1]) + 0.114 * f32::from(p.0[2]);
        let count = (image.width() * image.height()).max(1) as f32;
        let mean = image.pixels().map(grey).sum::<f32>() / count * brightness;
        for pixel in image.pixels_mut() {
            let own = grey(pixel) * brightness;
            for channel in &mut pixel.0 {
                let value = f32::from(*channel) * brightness;
                let value = own + (value - own) * saturation;
                *channel = (mean + (value - mean) * contrast).round().clamp(0.0, 255.0) as u8;
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use peft_adapters::rng::rng;

    #[test]
    fn a_rotation_by_nothing_changes_nothing_and_by_half_a_turn_reverses() {
        let image = RgbImage::from_fn(5, 4, |x, y| Rgb([x as u8 * 40, y as u8 * 60, 7]));
        assert_eq!(rotate(&image, 0.0), image);
        assert_eq!(rotate(&image, 180.0), image::imageops::rotate180(&image));
    }

    #[test]
    fn regions_stay_inside_and_keep_the_asked_area() {
        let config = AugmentConfig { crop: Some([0.5, 0.9]), ..Default::default() };
        for seed in 0..200 {
            let (x, y, w, h) = config.region(64, 48, &mut rng(seed, &[])).unwrap();
            assert!(x >= 0.0 && y >= 0.0 && x + w <= 64.0 && y + h <= 48.0);
            let share = w * h / (64.0 * 48.0);
            assert!((0.45..=0.95).contains(&share), "{share}");
        }
    }

    #[test]
    fn transparency_takes_the_background() {
        let clear = Rgba([10, 20, 30, 0]);
        assert_eq!(over(&clear, Some([255; 3])).0, [255; 3]);
        assert_eq!(over(&clear, None).0, [10, 20, 30]);
    }
}
