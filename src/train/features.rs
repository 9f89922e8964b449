//! Image features of whole splits, computed once where nothing that is trained reaches them.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use peft_adapters::{Patches, Step};

use super::observer::{Event, Observer};
use crate::clip::Clip;
use crate::data::images::Cached;
use crate::data::loader::load;
use crate::data::{Example, Images, Split};
use crate::error::Result;

/// Features of a split, [N, P], and the images they come from.
#[derive(Debug)]
pub struct Features {
    images: Arc<Images>,
    batch: usize,
    frozen: bool,
    banks: HashMap<Split, Tensor>,
    pixels: HashMap<Split, Cached>,
}

impl Features {
    /// `batch` images go through the tower at once.
    ///
    /// # Errors
    /// When a forward pass fails.
    pub fn new(images: Arc<Images>, batch: usize, clip: &Clip, patches: &mut Patches) -> Result<Self> {
        let frozen = !depends_on_parameters(&images, clip, patches)?;
        Ok(Self { images, batch, frozen, banks: HashMap::new(), pixels: HashMap::new() })
    }

    /// Whether image features are the same after every step.
    #[must_use]
    pub fn frozen(&self) -> bool {
        self.frozen
    }

    /// Features of every example of a split, deterministic transforms, no gradients.
    ///
    /// # Shapes
    /// N examples → [N, P]
    ///
    /// # Errors
    /// When an image cannot be read or a tensor operation fails.
    pub fn of(
        &mut self,
        split: Split,
        examples: &[Example],
        clip: &Clip,
        view: &mut Patches,
        observer: &mut dyn Observer,
    ) -> Result<Tensor> {
        if let Some(bank) = self.banks.get(&split) {
            return Ok(bank.clone());
        }
        view.prepare(&Step::eval())?;
        let cache = self.pixels.entry(split).or_insert_with(|| Cached::new(examples.len()));
        let mut parts = Vec::new();
        let all: Vec<usize> = (0..examples.len()).collect();
        for indices in all.chunks(self.batch) {
            let pixels = load(&self.images, examples, indices, None, cache)?;
            parts.push(clip.image_features(&pixels, view)?);
            observer.event(Event::Advance(indices.len()));
        }
        let features = match parts.is_empty() {
            true => Tensor::zeros((0, clip.config().projection_dim), DType::F32, clip.device())?,
            false => Tensor::cat(&parts, 0)?,
        };
        if self.frozen {
            self.banks.insert(split, features.clone());
            self.pixels.remove(&split);
        }
        Ok(features)
    }
}

/// Whether a gradient of image features would reach any parameter.
fn depends_on_parameters(images: &Images, clip: &Clip, patches: &mut Patches) -> Result<bool> {
    let (height, width) = images.size();
    let blank = Tensor::zeros((1, 3, height, width), DType::F32, &candle_core::Device::Cpu)?;
    patches.prepare(&Step::eval())?;
    Ok(clip.image_features(&blank, patches)?.track_op())
}
