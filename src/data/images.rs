//! From an [`ImageRef`] to pixels, with a bounded cache of what does not change between epochs.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use fast_image_resize as fir;
use image::{RgbImage, RgbaImage};
use peft_adapters::rng;
use rayon::prelude::*;

use super::example::content_of;
use super::{AugmentConfig, Example, ImageRef};
use crate::clip::decode::{self, DecodeOptions};
use crate::clip::preprocess::{Background, Preprocess};
use crate::error::{Error, Result};

/// Decoded images up to this size in total stay in memory.
const CACHE_BYTES: usize = 1 << 30;

/// Reads, transforms and normalises images.
#[derive(Debug)]
pub struct Images {
    preprocess: Preprocess,
    options: DecodeOptions,
}

/// The images of one split, each read at most once while the cache has room.
#[derive(Debug)]
pub struct Cached {
    plain: Vec<OnceLock<RgbImage>>,
    decoded: Vec<OnceLock<RgbaImage>>,
    used: AtomicUsize,
}

impl Cached {
    /// A cache that never keeps anything, for images that are read once.
    #[must_use]
    pub fn none() -> Self {
        Self::new(0)
    }

    /// An empty cache for `count` images.
    #[must_use]
    pub fn new(count: usize) -> Self {
        Self {
            plain: (0..count).map(|_| OnceLock::new()).collect(),
            decoded: (0..count).map(|_| OnceLock::new()).collect(),
            used: AtomicUsize::new(0),
        }
    }

    fn has_room(&self, bytes: usize) -> bool {
        self.used.fetch_add(bytes, Ordering::Relaxed) + bytes <= CACHE_BYTES
    }
}

/// How a training image is varied: the transforms and where their randomness comes from.
#[derive(Debug, Clone, Copy)]
pub struct Variation<'a> {
    /// The transforms.
    pub augment: &'a AugmentConfig,
    /// The run's seed.
    pub seed: u64,
    /// The epoch.
    pub epoch: u64,
}

/// What `then` makes of an image that is kept, or is made now and kept if there is room.
fn keep<T: std::ops::Deref<Target = [u8]>, R>(
    slots: &[OnceLock<T>],
    index: usize,
    cache: &Cached,
    make: impl FnOnce() -> Result<T>,
    then: impl FnOnce(&T) -> R,
) -> Result<R> {
    if let Some(image) = slots.get(index).and_then(OnceLock::get) {
        return Ok(then(image));
    }
    let image = make()?;
    let result = then(&image);
    if let Some(slot) = slots.get(index).filter(|_| cache.has_room(image.len())) {
        let _ = slot.set(image);
    }
    Ok(result)
}

impl Images {
    /// Images as `preprocess` wants them.
    #[must_use]
    pub fn new(preprocess: Preprocess, options: DecodeOptions) -> Self {
        Self { preprocess, options }
    }

    /// Height and width of what comes out.
    #[must_use]
    pub fn size(&self) -> (usize, usize) {
        self.preprocess.output_size()
    }

    /// How images are prepared.
    #[must_use]
    pub fn preprocess(&self) -> &Preprocess {
        &self.preprocess
    }

    fn read<T>(&self, example: &Example, decode: impl Fn(&str, &[u8], &DecodeOptions) -> Result<T>) -> Result<T> {
        decode(&example.place(), &example.bytes_within(self.options.max_bytes)?, &self.options)
    }

    /// [`Images::fetch`] of an image whose bytes are here.
    ///
    /// # Errors
    /// When they are no image.
    pub fn decode(&self, index: usize, place: &str, bytes: &[u8], vary: Option<&Variation<'_>>) -> Result<RgbImage> {
        match vary.filter(|v| !v.augment.is_none()) {
            Some(vary) => self.vary(&decode::decode_rgba(place, bytes, &self.options)?, index, vary),
            None => self.preprocess.resize_crop(&decode::decode(place, bytes, &self.options)?),
        }
    }

    /// Resized and cropped, not yet normalised.
    ///
    /// # Errors
    /// When the image cannot be read.
    pub fn open(&self, example: &Example) -> Result<RgbImage> {
        self.preprocess.resize_crop(&self.read(example, decode::decode)?)
    }

    /// blake3 of each example's file.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn digests(&self, examples: &[Example]) -> Result<Vec<blake3::Hash>> {
        let digest = |e: &Example| match e.image {
            ImageRef::Missing => Ok(blake3::hash(b"")),
            _ => Ok(blake3::hash(&e.bytes()?)),
        };
        examples.par_iter().map(digest).collect()
    }

    /// Reads each image once and notes the digest of its file. The indices of unreadable images, each with the reason.
    pub fn verify(&self, examples: &mut [Example]) -> Vec<(usize, Error)> {
        let read = |e: &mut Example| {
            let bytes = e.bytes_within(self.options.max_bytes)?;
            e.content = Some(content_of(&bytes));
            decode::decode(&e.place(), &bytes, &self.options).map(drop)
        };
        let examples = examples.par_iter_mut().enumerate().filter(|(_, e)| e.image != ImageRef::Missing);
        examples.filter_map(|(i, e)| read(e).err().map(|error| (i, error))).collect()
    }

    /// One image, resized and cropped, not yet normalised; varied where that is asked for.
    ///
    /// # Errors
    /// When the image cannot be read.
    pub fn fetch(&self, index: usize, example: &Example, vary: Option<&Variation<'_>>, cache: &Cached) -> Result<RgbImage> {
        let Some(vary) = vary.filter(|v| !v.augment.is_none()) else {
            let open = || self.open(example);
            return keep(&cache.plain, index, cache, open, Clone::clone);
        };
        let read = || self.read(example, decode::decode_rgba);
        keep(&cache.decoded, index, cache, read, |image| self.vary(image, index, vary))?
    }

    /// The same image, epoch and seed always give the same pixels, whichever thread asks.
    fn vary(&self, image: &RgbaImage, index: usize, vary: &Variation<'_>) -> Result<RgbImage> {
        let mut rng = rng::rng(vary.seed, &[rng::name_key("augment"), vary.epoch, index as u64]);
        let white = self.options.background == Background::White;
        let image = vary.augment.compose(image, white, &mut rng);
        let image = match vary.augment.region(image.width(), image.height(), &mut rng) {
            Some(region) => self.crop(&image, region)?,
            None => self.preprocess.resize_crop(&image)?,
        };
        Ok(vary.augment.finish(image, &mut rng))
    }

    fn crop(&self, image: &RgbImage, (left, top, width, height): super::augment::Region) -> Result<RgbImage> {
        let (out_height, out_width) = self.size();
        let mut out = RgbImage::new(out_width as u32, out_height as u32);
        let options =
            fir::ResizeOptions::new().resize_alg(fir::ResizeAlg::Convolution(fir::FilterType::CatmullRom)).crop(left, top, width, height);
        fir::Resizer::new().resize(image, &mut out, &options).map_err(|e| Error::fault("random crop", e))?;
        Ok(out)
    }
}
