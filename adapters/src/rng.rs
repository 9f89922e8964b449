//! Seeded randomness without state.
//!
//! Every random draw of the project comes from a generator that is a pure function
//! of a seed and of where the draw happens (epoch, step, site, example). Nothing has
//! to be saved to resume a run, and the order in which threads run cannot change a result.

use std::cell::Cell;
use std::ops::Range;

use candle_core::{DType, Device, Result, Shape, Tensor};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// One round of SplitMix64, a bijective mixer.
fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The generator for `stream` under `seed`.
///
/// Streams that differ in length or in any element are independent.
#[must_use]
pub fn rng(seed: u64, stream: &[u64]) -> ChaCha8Rng {
    let mut state = mix(seed ^ mix(stream.len() as u64));
    for &part in stream {
        state = mix(state.rotate_left(17) ^ mix(part));
    }
    let mut bytes = [0u8; 32];
    for chunk in bytes.chunks_exact_mut(8) {
        state = mix(state);
        chunk.copy_from_slice(&state.to_le_bytes());
    }
    ChaCha8Rng::from_seed(bytes)
}

/// A stable number for a name, to be used as part of a stream (FNV-1a).
#[must_use]
pub fn name_key(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Uniform values in `[low, high)`.
///
/// # Errors
/// When the tensor cannot be made on `device`.
pub fn uniform(rng: &mut ChaCha8Rng, low: f64, high: f64, shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    let values: Vec<f64> = (0..shape.elem_count()).map(|_| low + (high - low) * rng.random::<f64>()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
}

/// Normal values with mean 0 (Box–Muller, both halves used).
///
/// # Errors
/// When the tensor cannot be made on `device`.
pub fn normal(rng: &mut ChaCha8Rng, std: f64, shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    let count = shape.elem_count();
    let mut values = Vec::with_capacity(count + 1);
    while values.len() < count {
        // 1 - u is in (0, 1], so the logarithm is finite.
        let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt() * std;
        let angle = std::f64::consts::TAU * rng.random::<f64>();
        values.push(radius * angle.cos());
        values.push(radius * angle.sin());
    }
    values.truncate(count);
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
}

thread_local! {
    static ROWS: Cell<Range<usize>> = const { Cell::new(0..0) };
}

/// Runs `f` for these rows of a batch that is computed in parts: its dropout masks are those parts of the whole batch's.
pub fn with_rows<R>(rows: Range<usize>, f: impl FnOnce() -> R) -> R {
    struct Reset(Range<usize>);
    impl Drop for Reset {
        fn drop(&mut self) {
            ROWS.set(self.0.clone());
        }
    }
    let _before = Reset(ROWS.replace(rows));
    f()
}

/// A dropout mask: 0 with probability `p`, otherwise `1 / (1 - p)`.
///
/// # Errors
/// When the tensor cannot be made on `device`.
pub fn dropout_mask(rng: &mut ChaCha8Rng, p: f64, shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    let keep = (1.0 / (1.0 - p)) as f32;
    // One 32-bit draw an element: enough for a probability, half the cost of a float.
    let threshold = (p * f64::from(u32::MAX)) as u32;
    let rows = ROWS.take();
    ROWS.set(rows.clone());
    let before = shape.elem_count() / rows.len().max(1) * rows.start;
    rng.set_word_pos(rng.get_word_pos() + before as u128);
    let values: Vec<f32> = (0..shape.elem_count()).map(|_| if rng.random::<u32>() < threshold { 0.0 } else { keep }).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_reproducible_and_distinct() {
        let draw = |seed, stream: &[u64]| rng(seed, stream).random::<u64>();
        assert_eq!(draw(1, &[2, 3]), draw(1, &[2, 3]));
        let all = [draw(1, &[2, 3]), draw(1, &[3, 2]), draw(1, &[2]), draw(2, &[2, 3]), draw(1, &[])];
        for (i, a) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|b| a != b));
        }
    }

    #[test]
    fn normal_has_the_asked_deviation() {
        let t = normal(&mut rng(0, &[]), 0.5, 10_001, DType::F32, &Device::Cpu).unwrap();
        let mean = t.mean_all().unwrap().to_scalar::<f32>().unwrap();
        let var = t.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(mean.abs() < 0.02, "{mean}");
        assert!((var.sqrt() - 0.5).abs() < 0.01, "{var}");
    }

    #[test]
    fn parts_of_a_batch_get_their_parts_of_the_mask() {
        let draw = |shape: (usize, usize)| dropout_mask(&mut rng(0, &[]), 0.5, shape, DType::F32, &Device::Cpu).unwrap();
        let whole = draw((5, 7)).to_vec2::<f32>().unwrap();
        let part = with_rows(2..5, || draw((3, 7))).to_vec2::<f32>().unwrap();
        assert_eq!(part, whole[2..]);
        assert_eq!(draw((5, 7)).to_vec2::<f32>().unwrap(), whole);
    }

    #[test]
    fn dropout_keeps_the_mean() {
        let t = dropout_mask(&mut rng(0, &[]), 0.25, 20_000, DType::F32, &Device::Cpu).unwrap();
        let mean = t.mean_all().unwrap().to_scalar::<f32>().unwrap();
        assert!((mean - 1.0).abs() < 0.02, "{mean}");
    }
}
