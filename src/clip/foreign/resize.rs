//! Positional embeddings for another number of positions.

use candle_core::{DType, Device, Tensor};

use crate::error::Result;

/// Whose interpolation is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Interpolation {
    /// `open_clip.model.resize_pos_embed`: bicubic with antialiasing, and linear for texts.
    OpenClip,
    /// `interpolate_pos_encoding` of transformers: bicubic.
    Transformers,
}

impl Interpolation {
    /// What a note says.
    #[must_use]
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::OpenClip => "bicubic with antialiasing, as open_clip's resize_pos_embed",
            Self::Transformers => "bicubic, as transformers' interpolate_pos_encoding",
        }
    }
}

/// Image positions of another grid; the class token's row comes first and stays.
///
/// # Shapes
/// [1 + old², width] → [1 + side², width], in f32
pub(crate) fn image_positions(table: &Tensor, side: usize, how: Interpolation) -> Result<Tensor> {
    let (rows, width) = table.dims2()?;
    let old = (rows - 1).isqrt();
    let weights = match how {
        Interpolation::OpenClip => antialiased(old, side),
        Interpolation::Transformers => plain(old, side, 4, cubic(-0.75)),
    };
    let weights = Tensor::from_vec(weights, (side, old), &Device::Cpu)?;
    let table = table.to_dtype(DType::F32)?;
    // Along x, then along y.
    let grid = table.narrow(0, 1, old * old)?.reshape((old, old, width))?;
    let across = weights.broadcast_matmul(&grid)?;
    let down = weights.matmul(&across.reshape((old, side * width))?)?;
    Ok(Tensor::cat(&[table.narrow(0, 0, 1)?, down.reshape((side * side, width))?], 0)?)
}

/// Text positions of another context length, linear between neighbours.
///
/// # Shapes
/// [old, width] → [len, width], in f32
pub(crate) fn text_positions(table: &Tensor, len: usize) -> Result<Tensor> {
    let old = table.dim(0)?;
    let weights = Tensor::from_vec(plain(old, len, 2, |x| 1.0 - x.abs().min(1.0)), (len, old), &Device::Cpu)?;
    Ok(weights.matmul(&table.to_dtype(DType::F32)?)?)
}

/// Keys' cubic convolution kernel.
fn cubic(a: f64) -> impl Fn(f64) -> f64 {
    move |x: f64| {
        let x = x.abs();
        match x {
            _ if x < 1.0 => ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0,
            _ if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * a,
            _ => 0.0,
        }
    }
}

/// Rows of weights as `F.interpolate` without antialiasing: pixels beyond the border repeat it.
fn plain(old: usize, new: usize, taps: i64, kernel: impl Fn(f64) -> f64) -> Vec<f32> {
    let scale = old as f64 / new as f64;
    let mut weights = vec![0f64; new * old];
    for (i, row) in weights.chunks_exact_mut(old).enumerate() {
        let centre = scale * (i as f64 + 0.5) - 0.5;
        // Linear interpolation clamps the centre, cubic only the neighbours; for linear both come to the same.
        let first = centre.floor() as i64 - (taps / 2 - 1);
        for tap in first..first + taps {
            row[tap.clamp(0, old as i64 - 1) as usize] += kernel(centre - tap as f64);
        }
    }
    weights.into_iter().map(|w| w as f32).collect()
}

/// Rows of weights as `F.interpolate(antialias=True)`: the kernel widens when the grid shrinks, and is cut and
/// normalised at the border.
fn antialiased(old: usize, new: usize) -> Vec<f32> {
    let kernel = cubic(-0.5);
    let scale = old as f64 / new as f64;
    let wide = scale.max(1.0);
    let mut weights = vec![0f64; new * old];
    for (i, row) in weights.chunks_exact_mut(old).enumerate() {
        let centre = scale * (i as f64 + 0.5);
        let from = (centre - 2.0 * wide + 0.5).max(0.0) as usize;
        let to = ((centre + 2.0 * wide + 0.5).max(0.0) as usize).min(old);
        for (j, weight) in row.iter_mut().enumerate().take(to).skip(from) {
            *weight = kernel((j as f64 + 0.5 - centre) / wide);
        }
        let total: f64 = row.iter().sum();
        row.iter_mut().for_each(|w| *w /= total);
    }
    weights.into_iter().map(|w| w as f32).collect()
}
