//! A base model with all that belongs to it: towers, tokeniser, preprocessing, digest.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};

use super::config::ClipConfig;
use super::model::{Clip, random_weights};
use super::preprocess::Preprocess;
use super::source::Source;
use super::tokenizer::Tokenizer;
use super::weights;
use crate::error::Result;

/// Names the adapters that a base brings along, in its directory.
pub const BUNDLE: &str = "bundle.json";

/// Everything that is frozen.
#[derive(Debug)]
pub struct Base {
    /// The towers.
    pub clip: Clip,
    /// Texts to ids.
    pub tokenizer: Tokenizer,
    /// Images to pixels.
    pub preprocess: Preprocess,
    /// Where the files are.
    pub source: Source,
    /// blake3 over names, dtypes, shapes and bytes of the weights; of a bundle, over that and its list of adapters.
    pub digest: String,
    /// What the files hold, whatever the model computes in.
    pub file_dtype: DType,
}

/// Everything of a base but its weights.
#[derive(Debug)]
pub struct Parts {
    /// Sizes.
    pub config: ClipConfig,
    /// Texts to ids.
    pub tokenizer: Tokenizer,
    /// Images to pixels.
    pub preprocess: Preprocess,
    /// Where the files are.
    pub source: Source,
}

impl Parts {
    /// Reads configuration, tokeniser and preprocessing.
    ///
    /// # Errors
    /// When a file is missing or malformed, or they do not fit together.
    pub fn load(spec: &str) -> Result<Self> {
        Self::from_source(Source::resolve(spec)?)
    }

    /// [`Parts::load`] of what a name was resolved to.
    ///
    /// # Errors
    /// As [`Parts::load`].
    pub fn from_source(source: Source) -> Result<Self> {
        let config = ClipConfig::from_json(&source.place("config.json"), &source.require("config.json")?)?;
        let tokenizer = Tokenizer::load(&source, &config.text)?;
        let size = config.vision.image_size;
        let (place, preprocess) = match source.preprocessor()? {
            Some((place, bytes)) => {
                let preprocess = Preprocess::from_json(&place, &bytes)?;
                (place, preprocess)
            }
            None => (source.place("config.json"), Preprocess::for_size(size)),
        };
        preprocess.check(&place, size)?;
        Ok(Self { config, tokenizer, preprocess, source })
    }

    fn with(self, tensors: HashMap<String, Tensor>, digest: String, file_dtype: DType, dtype: DType, device: &Device) -> Result<Base> {
        let tokenizer = self.tokenizer.clone();
        let encode = move |text: &str| tokenizer.words(text).map_err(|e| e.to_string());
        Ok(Base {
            clip: Clip::new(&self.config, tensors, dtype, device)?.with_encoder(encode),
            tokenizer: self.tokenizer,
            preprocess: self.preprocess,
            source: self.source,
            digest,
            file_dtype,
        })
    }
}

impl Base {
    /// Loads any base that [`Source::resolve`] understands to compute in `dtype` on `device`.
    ///
    /// # Errors
    /// When a file is missing or malformed.
    pub fn load(spec: &str, dtype: DType, device: &Device) -> Result<Self> {
        Self::from_source(Source::resolve(spec)?, dtype, device)
    }

    /// [`Base::load`] of what a name was resolved to.
    ///
    /// # Errors
    /// As [`Base::load`].
    pub fn from_source(source: Source, dtype: DType, device: &Device) -> Result<Self> {
        let mut parts = Parts::from_source(source)?;
        let mut weights = weights::load(&parts.source, &parts.config)?;
        if !weights.notes.is_empty() {
            parts.source = parts.source.with_notes(std::mem::take(&mut weights.notes));
        }
        let digest = match parts.source.read(BUNDLE)? {
            None => weights.digest,
            Some(list) => format!("blake3:{}", blake3::hash(&[weights.digest.as_bytes(), &list].concat()).to_hex()),
        };
        parts.with(weights.tensors, digest, weights.dtype, dtype, device)
    }

    /// The tensor with the largest value, where that is larger than any of a trained model: what to say once features are not finite.
    ///
    /// # Errors
    /// When a tensor cannot be read.
    pub(crate) fn extreme(&self) -> Result<Option<(String, f64)>> {
        /// Squares of larger values come near the end of f32 where they are summed up.
        const LARGE: f64 = 1e15;
        let mut found: Option<(String, f64)> = None;
        for (_, weight) in self.clip.sites().weights() {
            let largest = f64::from(weight.tensor.to_dtype(DType::F32)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?);
            if largest > found.as_ref().map_or(LARGE, |(_, value)| *value) {
                found = Some((weight.name.clone(), largest));
            }
        }
        Ok(found)
    }

    /// Random weights in the shape of `spec`.
    ///
    /// # Errors
    /// When a file is missing or malformed.
    pub fn random(spec: &str, seed: u64, dtype: DType, device: &Device) -> Result<Self> {
        let parts = Parts::load(spec)?;
        let tensors = random_weights(&parts.config, seed, &Device::Cpu)?;
        let digest = weights::digest(&tensors)?;
        parts.with(tensors, digest, DType::F32, dtype, device)
    }
}
