//! What is the same in every epoch, computed once: image features of whole splits where nothing that is trained reaches
//! them, otherwise the activations that enter the first trained block.

use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use peft_adapters::{Patches, Step};

use super::activations::{self, Bank, Builder, CacheConfig, Place};
use super::observer::{Event, Observer};
use crate::clip::{Clip, ConstantText, Encoded};
use crate::data::images::Cached;
use crate::data::loader::load;
use crate::data::{Example, Images, Split};
use crate::error::{Error, Result};

/// Features of a split, [N, P], and the images they come from.
#[derive(Debug)]
pub struct Features {
    images: Arc<Images>,
    batch: usize,
    cache: CacheConfig,
    /// Identifies all that activations depend on, the examples apart.
    identity: String,
    frozen: bool,
    /// Whether every token is wanted, and not pooled features alone.
    tokens: bool,
    /// Blocks of the image tower that nothing trained reaches.
    depth: usize,
    text: ConstantText,
    /// Whether a signal ends what is being encoded.
    heeds: bool,
    banks: HashMap<Split, Tensor>,
    trunks: HashMap<Split, Option<Arc<Bank>>>,
    pixels: HashMap<Split, Cached>,
}

/// What [`Features`] needs besides the model.
#[derive(Debug)]
pub struct FeatureSource {
    /// How images are read.
    pub images: Arc<Images>,
    /// How many go through the tower at once.
    pub batch: usize,
    /// Where activations may be kept.
    pub cache: CacheConfig,
    /// Identifies base, methods and preprocessing.
    pub identity: String,
    /// Whether every token is wanted, and not pooled features alone.
    pub tokens: bool,
}

impl Features {
    /// Finds out what is constant.
    ///
    /// # Errors
    /// When a forward pass fails.
    pub fn new(source: FeatureSource, clip: &Clip, patches: &mut Patches) -> Result<Self> {
        let FeatureSource { images, batch, cache, identity, tokens } = source;
        let frozen = !depends_on_parameters(&images, clip, patches)?;
        let depth = match (frozen, tokens) {
            (true, true) => clip.vision().depth(),
            (true, false) => 0,
            (false, _) => clip.constant_image_blocks(patches)?,
        };
        let text = clip.constant_text(patches)?;
        let (banks, trunks, pixels) = Default::default();
        Ok(Self { images, batch, cache, identity, frozen, tokens, depth, text, heeds: false, banks, trunks, pixels })
    }

    /// Whether from now on a signal ends what is being encoded. While steps are made it ends the run between two of them, with the
    /// state saved.
    pub(super) fn heed(&mut self, signals: bool) {
        self.heeds = signals;
    }

    /// What of the text tower is the same after every step.
    #[must_use]
    pub fn text(&self) -> ConstantText {
        self.text
    }

    /// Whether image features are the same after every step and all that is wanted.
    #[must_use]
    pub fn kept(&self) -> bool {
        self.frozen && !self.tokens
    }

    /// Hands out a split with all its tokens, a part at a time: deterministic transforms, no gradients.
    ///
    /// # Errors
    /// When an image cannot be read, a tensor operation fails, or what `take` returns.
    pub fn each(
        &mut self,
        (split, examples): (Split, &[Example]),
        clip: &Clip,
        view: &mut Patches,
        observer: &mut dyn Observer,
        mut take: impl FnMut(&Patches, Encoded, Range<usize>) -> Result<()>,
    ) -> Result<()> {
        let trunk = if split == Split::Test { None } else { self.trunk(split, examples, clip, view, observer)? };
        view.prepare(&Step::eval())?;
        let heeds = self.heeds;
        let cache = self.pixels.entry(split).or_insert_with(|| Cached::new(examples.len()));
        for from in (0..examples.len()).step_by(self.batch) {
            let rows = from..examples.len().min(from + self.batch);
            let indices: Vec<usize> = rows.clone().collect();
            let trunk = match &trunk {
                Some(bank) => bank.trunk(&indices, clip)?,
                None => clip.image_entrance(load(&self.images, examples, &indices, None, cache)?, None, view)?,
            };
            let encoded = clip.image_tokens_from(&trunk, view, None)?;
            take(view, encoded, rows)?;
            observer.event(Event::Advance(indices.len()));
            unless_stopped(heeds, observer)?;
        }
        Ok(())
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
        // Test images pass twice only.
        let trunk = if split == Split::Val { self.trunk(split, examples, clip, view, observer)? } else { None };
        let cache = self.pixels.entry(split).or_insert_with(|| Cached::new(examples.len()));
        let mut parts = Vec::new();
        let all: Vec<usize> = (0..examples.len()).collect();
        for indices in all.chunks(self.batch) {
            parts.push(match &trunk {
                Some(bank) => clip.image_features_from(&bank.trunk(indices, clip)?, view, None)?,
                None => clip.image_features(&load(&self.images, examples, indices, None, cache)?, view)?,
            });
            observer.event(Event::Advance(indices.len()));
            unless_stopped(self.heeds, observer)?;
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

    /// What enters the first trained block, for every example of a split; nothing where the first block is trained or
    /// where there is no room.
    ///
    /// # Errors
    /// When an image cannot be read, a tensor operation fails, or the disk refuses.
    pub fn trunk(
        &mut self,
        split: Split,
        examples: &[Example],
        clip: &Clip,
        view: &mut Patches,
        observer: &mut dyn Observer,
    ) -> Result<Option<Arc<Bank>>> {
        if let Some(found) = self.trunks.get(&split) {
            return Ok(found.clone());
        }
        let found = self.build(examples, clip, view, observer)?.map(Arc::new);
        self.trunks.insert(split, found.clone());
        Ok(found)
    }

    fn build(&self, examples: &[Example], clip: &Clip, view: &mut Patches, observer: &mut dyn Observer) -> Result<Option<Bank>> {
        if self.depth == 0 || examples.is_empty() {
            return Ok(None);
        }
        view.prepare(&Step::eval())?;
        let shape = self.trunk_shape(clip, view)?;
        let file = match self.cache.place(examples.len(), shape[0] * shape[1]) {
            Place::None => return Ok(None),
            Place::Memory => None,
            Place::Disk => Some(self.file(examples)?),
        };
        if let Some(path) = &file
            && let Some(bank) = activations::open(path, examples.len(), self.depth, shape)?
        {
            return Ok(Some(bank));
        }
        observer.event(Event::Phase("activations", Some(examples.len())));
        let mut builder = Builder::new(examples.len(), self.depth, shape, file.as_deref())?;
        let cache = Cached::none();
        let all: Vec<usize> = (0..examples.len()).collect();
        for indices in all.chunks(self.batch) {
            let pixels = load(&self.images, examples, indices, None, &cache)?;
            builder.push(&clip.image_trunk(&pixels, self.depth, view)?.x)?;
            observer.event(Event::Advance(indices.len()));
            unless_stopped(self.heeds, observer)?;
        }
        builder.finish().map(Some)
    }

    fn trunk_shape(&self, clip: &Clip, view: &Patches) -> Result<[usize; 2]> {
        let (_, tokens, dim) = clip.image_trunk(&blank(&self.images)?, self.depth, view)?.x.dims3()?;
        Ok([tokens, dim])
    }

    /// Named after everything that the activations depend on.
    fn file(&self, examples: &[Example]) -> Result<PathBuf> {
        let mut key = blake3::Hasher::new();
        key.update(format!("1 {} {}", self.depth, self.identity).as_bytes());
        for digest in self.images.digests(examples)? {
            key.update(digest.as_bytes());
        }
        Ok(self.cache.directory.join(format!("{}.f32", &key.finalize().to_hex()[..32])))
    }
}

fn unless_stopped(heeds: bool, observer: &dyn Observer) -> Result<()> {
    match observer.stop().filter(|_| heeds) {
        Some(signal) => Err(Error::Interrupted { message: "stopped during an evaluation; go on with --resume".into(), signal }),
        None => Ok(()),
    }
}

/// One image of zeros, [1, 3, H, W].
fn blank(images: &Images) -> Result<Tensor> {
    let (height, width) = images.size();
    Ok(Tensor::zeros((1, 3, height, width), DType::F32, &candle_core::Device::Cpu)?)
}

/// Whether a gradient of image features would reach any parameter.
fn depends_on_parameters(images: &Images, clip: &Clip, patches: &mut Patches) -> Result<bool> {
    patches.prepare(&Step::eval())?;
    Ok(clip.image_features(&blank(images)?, patches)?.track_op())
}
