//! Pillow's resampling bit by bit: its coefficients, its 22-bit integers, its rounding.

use std::f64::consts::PI;
use std::ops::Range;

use image::RgbImage;
use pulp::{Arch, NullaryFnOnce};

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

/// Rows that are resampled side by side, one in each lane of a vector.
const LANES: usize = 16;
/// Values of a row that are resampled side by side.
const CHUNK: usize = 64;

/// Resamples along x, for these rows of the source only.
fn rows(image: &RgbImage, taps: &[Taps], seen: Range<usize>) -> RgbImage {
    let used = span(taps);
    let mut out = RgbImage::new(taps.len() as u32, seen.len() as u32);
    let width = 3 * image.width() as usize;
    let source = &image.as_raw()[width * seen.start..width * seen.end];
    let mut block = vec![[0; LANES]; 3 * used.len()];
    let targets = out.chunks_mut((3 * taps.len() * LANES).max(1));
    for (target, source) in targets.zip(source.chunks((width * LANES).max(1))) {
        for (lane, row) in source.chunks_exact(width).enumerate() {
            for (value, column) in row[3 * used.start..3 * used.end].iter().zip(&mut block) {
                column[lane] = *value;
            }
        }
        Arch::new().dispatch(BlockOfRows { block: &block, taps, start: used.start, out: target });
    }
    out
}

/// Some rows along x, compiled for the machine's vectors.
struct BlockOfRows<'a> {
    /// One column of [`LANES`] rows for each value of the source from pixel `start` on.
    block: &'a [[u8; LANES]],
    taps: &'a [Taps],
    start: usize,
    out: &'a mut [u8],
}

impl NullaryFnOnce for BlockOfRows<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let width = 3 * self.taps.len();
        for (pixel, Taps { first, weights }) in self.taps.iter().enumerate() {
            let mut sums = [[1 << (BITS - 1); LANES]; 3];
            for (values, weight) in self.block[3 * (first - self.start)..].as_chunks::<3>().0.iter().zip(weights) {
                for (sums, values) in sums.iter_mut().zip(values) {
                    add(sums, values, *weight);
                }
            }
            let sums = sums.map(|lanes| lanes.map(clip));
            for (lane, row) in self.out.chunks_exact_mut(width).enumerate() {
                for (value, lanes) in row[3 * pixel..3 * pixel + 3].iter_mut().zip(&sums) {
                    *value = lanes[lane];
                }
            }
        }
    }
}

/// Resamples along y, for these columns of the source only.
fn columns(image: &RgbImage, taps: &[Taps], seen: Range<usize>) -> RgbImage {
    let width = 3 * image.width() as usize;
    let mut out = RgbImage::new(seen.len() as u32, taps.len() as u32);
    for (target, Taps { first, weights }) in out.chunks_exact_mut((3 * seen.len()).max(1)).zip(taps) {
        let source = &image.as_raw()[width * first..];
        Arch::new().dispatch(Row { source, width, start: 3 * seen.start, weights, out: target });
    }
    out
}

/// One row of the result, compiled for the machine's vectors.
struct Row<'a> {
    /// From the first row on that it is made of.
    source: &'a [u8],
    width: usize,
    /// The first value of each row that is used.
    start: usize,
    weights: &'a [i32],
    out: &'a mut [u8],
}

impl NullaryFnOnce for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for (chunk, target) in self.out.chunks_mut(CHUNK).enumerate() {
            let from = self.start + chunk * CHUNK;
            let mut sums = [1 << (BITS - 1); CHUNK];
            for (row, weight) in self.source.chunks_exact(self.width).zip(self.weights) {
                // A constant length, so that the sums stay in registers.
                match row[from..].first_chunk::<CHUNK>() {
                    Some(values) => add(&mut sums, values, *weight),
                    None => add(&mut sums, &row[from..from + target.len()], *weight),
                }
            }
            for (value, sum) in target.iter_mut().zip(&sums) {
                *value = clip(*sum);
            }
        }
    }
}

#[inline(always)]
fn add(sums: &mut [i32], values: &[u8], weight: i32) {
    for (sum, v) in sums.iter_mut().zip(values) {
        *sum += i32::from(*v) * weight;
    }
}

#[inline(always)]
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
