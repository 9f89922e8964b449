//! Many images of which some may be unreadable, and what tells two models apart.

use std::path::Path;

use candle_core::Tensor;
use image::{Rgb, RgbImage};
use rayon::prelude::*;

use super::Model;
use crate::error::{Error, Result};

/// Features of the images that can be read, and what is wrong with the others.
#[derive(Debug)]
pub struct Readable {
    /// Projected, unnormalised, f32, [G, P].
    pub features: Tensor,
    /// Which images they are of, in order.
    pub good: Vec<usize>,
    /// The others, in order.
    pub bad: Vec<(usize, Error)>,
}

impl Model {
    /// [`Model::embed_images`] of at most a batch, without those that cannot be read.
    ///
    /// # Errors
    /// When the machine is at fault, or features are not finite.
    pub fn embed_readable(&self, paths: &[impl AsRef<Path> + Sync]) -> Result<Readable> {
        let (mut good, mut bad, mut all) = (Vec::new(), Vec::new(), Vec::new());
        let read: Vec<Result<Vec<f32>>> = paths.par_iter().map(|p| self.pixels_of(p.as_ref())).collect();
        for (i, pixels) in read.into_iter().enumerate() {
            match pixels {
                Ok(pixels) => {
                    good.push(i);
                    all.extend(pixels);
                }
                Err(e) if e.exit_code() != 2 => return Err(e),
                Err(e) => bad.push((i, e)),
            }
        }
        if good.is_empty() {
            return Ok(Readable { features: self.joined(&[])?, good, bad });
        }
        let (height, width) = self.base.preprocess.output_size();
        let pixels = Tensor::from_vec(all, (good.len(), 3, height, width), &candle_core::Device::Cpu)?;
        let features = self.base.clip.image_features(&pixels, &self.patches)?.to_dtype(candle_core::DType::F32)?;
        Ok(Readable { features: self.finite("image", features)?, good, bad })
    }

    /// The images among `paths` that cannot be read, in order; it stops looking when it has about `most`.
    #[must_use]
    pub fn unreadable(&self, paths: &[impl AsRef<Path> + Sync], most: usize) -> Vec<Error> {
        let mut bad = Vec::new();
        for part in paths.chunks(super::BATCH) {
            if bad.len() >= most {
                break;
            }
            bad.extend(part.par_iter().filter_map(|p| self.pixels_of(p.as_ref()).err()).collect::<Vec<_>>());
        }
        bad
    }

    /// The same for two models exactly where they make the same features of an image (`images`) or of a text (`texts`), as far as
    /// one of each can tell.
    ///
    /// # Errors
    /// When the model can make no such features.
    pub fn fingerprint(&self, images: bool, texts: bool) -> Result<String> {
        let mut hash = blake3::Hasher::new();
        hash.update(self.base.digest.as_bytes());
        let mut add = |features: Tensor| -> Result<()> {
            features.flatten_all()?.to_vec1::<f32>()?.iter().for_each(|v| _ = hash.update(&v.to_le_bytes()));
            Ok(())
        };
        if images {
            let probe = RgbImage::from_fn(97, 71, |x, y| Rgb([(x * 2) as u8, (y * 3) as u8, (x * y) as u8]));
            add(self.embed_pixels(&[probe])?)?;
        }
        if texts {
            add(self.embed_texts(&["a photo of two cats".to_string()])?.0)?;
        }
        hash.update(&self.base.preprocess.digest_bytes());
        hash.update(format!("{:?}", self.images.options()).as_bytes());
        Ok(hash.finalize().to_hex().to_string())
    }
}
