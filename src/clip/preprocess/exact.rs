//! Pillow's resampling bit by bit: its coefficients, its 22-bit integers, its rounding.

use std::f64::consts::PI;
use std::ops::Range;

use image::RgbImage;

use super::Resample;
use super::resize::{Axis, columns_first};

/// Pillow's precision.
const BITS: u32 = 22;

/// The source values behind one result.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

pub(super) fn resize(image: &RgbImage, x: Axis, y: Axis, filter: Resample) -> RgbImage {
    let (mut across, mut down) = (taps(x, filter), taps(y, filter));
    // The second pass need not see more than it looks at.
    if columns_first(x, y) {
        let seen = span(&across);
        across.iter_mut().for_each(|t| t.first -= seen.start);
        return rows(&columns(image, &down, seen), &across, 0..down.len());
    }
    let seen = span(&down);
    down.iter_mut().for_each(|t| t.first -= seen.start);
    columns(&rows(image, &across, seen), &down, 0..across.len())
}

fn span(taps: &[Taps]) -> Range<usize> {
    let start = taps.iter().map(|t| t.first).min().unwrap_or(0);
    let end = taps.iter().map(|t| t.first + t.weights.len()).max().unwrap_or(0);
    start..end
}

fn taps(axis: Axis, filter: Resample) -> Vec<Taps> {
    let (function, support): (fn(f64) -> f64, f64) = match filter {
        Resample::Box | Resample::Nearest => (square, 0.5),
        Resample::Bilinear => (triangle, 1.0),
        Resample::Hamming => (hamming, 1.0),
        Resample::Bicubic => (cubic, 2.0),
        Resample::Lanczos => (lanczos, 3.0),
    };
    let stretch = axis.scale().max(1.0);
    let (support, shrink) = (support * stretch, 1.0 / stretch);
    let one = |i: usize| {
        let centre = (i as f64 + 0.5) * axis.scale();
        let first = ((centre - support + 0.5).max(0.0) as usize).min(axis.source - 1);
        let last = ((centre + support + 0.5) as usize).clamp(first + 1, axis.source);
        let raw: Vec<f64> = (first..last).map(|k| function((k as f64 - centre + 0.5) * shrink)).collect();
        let sum: f64 = raw.iter().sum();
        let sum = if sum == 0.0 { 1.0 } else { sum };
        let weights = raw.iter().map(|w| (w / sum * f64::from(1 << BITS)).round() as i32).collect();
        Taps { first, weights }
    };
    (axis.start..axis.start + axis.len).map(one).collect()
}

/// Resamples along x, for these rows of the source only.
fn rows(image: &RgbImage, taps: &[Taps], seen: Range<usize>) -> RgbImage {
    let width = 3 * image.width() as usize;
    let mut out = RgbImage::new(taps.len() as u32, seen.len() as u32);
    let targets = out.chunks_exact_mut((3 * taps.len()).max(1));
    for (target, source) in targets.zip(image.as_raw().chunks_exact(width).skip(seen.start)) {
        for (pixel, Taps { first, weights }) in target.as_chunks_mut::<3>().0.iter_mut().zip(taps) {
            let mut sums = [1 << (BITS - 1); 3];
            for (value, weight) in source[3 * first..].as_chunks::<3>().0.iter().zip(weights) {
                for (sum, v) in sums.iter_mut().zip(value) {
                    *sum += i32::from(*v) * weight;
                }
            }
            *pixel = sums.map(clip);
        }
    }
    out
}

/// Resamples along y, for these columns of the source only.
fn columns(image: &RgbImage, taps: &[Taps], seen: Range<usize>) -> RgbImage {
    let width = 3 * image.width() as usize;
    let mut out = RgbImage::new(seen.len() as u32, taps.len() as u32);
    let mut sums = vec![0; 3 * seen.len()];
    for (target, Taps { first, weights }) in out.chunks_exact_mut(sums.len().max(1)).zip(taps) {
        sums.fill(1 << (BITS - 1));
        for (source, weight) in image.as_raw().chunks_exact(width).skip(*first).zip(weights) {
            for (sum, v) in sums.iter_mut().zip(&source[3 * seen.start..3 * seen.end]) {
                *sum += i32::from(*v) * weight;
            }
        }
        for (value, sum) in target.iter_mut().zip(&sums) {
            *value = clip(*sum);
        }
    }
    out
}

fn clip(sum: i32) -> u8 {
    (sum >> BITS).clamp(0, 255) as u8
}

fn square(x: f64) -> f64 {
    f64::from(u8::from(x > -0.5 && x <= 0.5))
}

fn triangle(x: f64) -> f64 {
    (1.0 - x.abs()).max(0.0)
}

fn hamming(x: f64) -> f64 {
    let x = x.abs();
    match x {
        0.0 => 1.0,
        _ if x >= 1.0 => 0.0,
        // Pillow has these two in single precision.
        _ => sinc(x) * (f64::from(0.54_f32) + f64::from(0.46_f32) * (x * PI).cos()),
    }
}

fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

fn lanczos(x: f64) -> f64 {
    if (-3.0..3.0).contains(&x) { sinc(x) * sinc(x / 3.0) } else { 0.0 }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 { 1.0 } else { (x * PI).sin() / (x * PI) }
}
