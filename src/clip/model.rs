//! Both towers and what joins them.

use std::collections::HashMap;

use candle_core::{DType, Device, Result as TensorResult, Tensor};
use peft_adapters::{ClassFeatures, Patches, Sites, Tape, Tower, WeightId, rng};

use super::block::Tensors;
use super::config::ClipConfig;
use super::text::{ConstantText, TextBatch, TextTower};
use super::trunk::Trunk;
use super::vision::VisionTower;
use crate::error::Result;

/// A CLIP model: immutable, shared by any number of adapters.
#[derive(Debug)]
pub struct Clip {
    config: ClipConfig,
    vision: VisionTower,
    text: TextTower,
    logit_scale: (WeightId, Tensor),
    sites: Sites,
    device: Device,
    dtype: DType,
}

impl Clip {
    /// Builds the towers from a complete set of tensors under HF names, cast to `dtype` on `device`.
    ///
    /// # Errors
    /// When a tensor is missing or misshapen.
    pub fn new(config: &ClipConfig, tensors: HashMap<String, Tensor>, dtype: DType, device: &Device) -> Result<Self> {
        let cast = tensors
            .into_iter()
            .map(|(name, t)| Ok((name, t.to_device(device)?.to_dtype(dtype)?.contiguous()?)))
            .collect::<TensorResult<HashMap<_, _>>>()?;
        let mut tensors = Tensors::new(cast);
        let mut sites = Sites::new();
        let vision = VisionTower::new(config, &mut tensors, &mut sites)?;
        let text = TextTower::new(config, &mut tensors, &mut sites)?;
        let scale = tensors.take("logit_scale")?.flatten_all()?.squeeze(0)?;
        let logit_scale = (sites.add_weight("logit_scale", Tower::Shared, None, scale.clone()), scale);
        Ok(Self { config: config.clone(), vision, text, logit_scale, sites, device: device.clone(), dtype })
    }

    /// Makes the tokeniser known to methods that start from words.
    #[must_use]
    pub fn with_encoder(mut self, encode: impl Fn(&str) -> std::result::Result<Vec<u32>, String> + Send + Sync + 'static) -> Self {
        self.sites.set_encoder(encode);
        self
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &ClipConfig {
        &self.config
    }

    /// Where the model can be patched.
    #[must_use]
    pub fn sites(&self) -> &Sites {
        &self.sites
    }

    /// The image encoder.
    #[must_use]
    pub fn vision(&self) -> &VisionTower {
        &self.vision
    }

    /// The text encoder.
    #[must_use]
    pub fn text(&self) -> &TextTower {
        &self.text
    }

    /// Where the model lives.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What the model computes in.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Projected image features, not normalised.
    ///
    /// # Shapes
    /// `pixels` [B, 3, H, W] → [B, P]
    ///
    /// # Errors
    /// When the image size is not the model's.
    pub fn image_features(&self, pixels: &Tensor, patches: &Patches) -> TensorResult<Tensor> {
        self.image_features_on(pixels.clone(), None, patches, None)
    }

    /// [`Clip::image_features`] of some patches of each image, [B, K] u32, and with a tape that saves memory. Pixels that
    /// nobody else holds are freed as soon as they are embedded.
    ///
    /// # Errors
    /// When the image size is not the model's.
    pub fn image_features_on<'a>(
        &'a self,
        pixels: Tensor,
        keep: Option<&Tensor>,
        patches: &'a Patches,
        tape: Option<&Tape<'a>>,
    ) -> TensorResult<Tensor> {
        let here = pixels.to_device(&self.device)?.to_dtype(self.dtype)?;
        drop(pixels);
        let pixels = here;
        let Some((tape, rows)) = tape.and_then(|t| Some((t, t.rows()?))) else {
            return self.vision.forward(pixels, keep, patches, tape);
        };
        by_rows(pixels.dim(0)?, rows, |from, count| {
            let keep = keep.map(|k| k.narrow(0, from, count)).transpose()?;
            let again = move |pixels: &Tensor| {
                rng::with_rows(from..from + count, || self.vision.forward(pixels.clone(), keep.as_ref(), patches, None))
            };
            tape.segment(&pixels.narrow(0, from, count)?, again)
        })
    }

    /// Projected text features, not normalised.
    ///
    /// # Shapes
    /// [N, T] ids → [N, P]
    ///
    /// # Errors
    /// When there are more tokens than positions.
    pub fn text_features(&self, texts: &TextBatch, patches: &Patches) -> TensorResult<Tensor> {
        self.text_features_on(texts, patches, None)
    }

    /// [`Clip::text_features`] with a tape that saves memory.
    ///
    /// # Errors
    /// When there are more tokens than positions.
    pub fn text_features_on<'a>(&'a self, texts: &TextBatch, patches: &'a Patches, tape: Option<&Tape<'a>>) -> TensorResult<Tensor> {
        let Some((tape, rows)) = tape.and_then(|t| Some((t, t.rows()?))) else {
            return self.text.forward(texts, patches, tape);
        };
        by_rows(texts.ids.dim(0)?, rows, |from, count| {
            let part = texts.narrow(from, count)?;
            let ids = part.ids.clone();
            // The ids are constants, so there is nothing to take from the segment's input.
            let again = move |_: &Tensor| rng::with_rows(from..from + count, || self.text.forward(&part, patches, None));
            tape.segment(&ids, again)
        })
    }

    /// How many leading blocks of the image tower nothing reaches that `patches` train. What they give can be kept:
    /// [`Clip::image_trunk`].
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn constant_image_blocks(&self, patches: &Patches) -> TensorResult<usize> {
        self.vision.constant_blocks(patches)
    }

    /// What of the text tower nothing reaches that `patches` train. What its blocks give can be kept: [`Clip::text_trunk`].
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn constant_text(&self, patches: &Patches) -> TensorResult<ConstantText> {
        self.text.constant(&self.config.text, patches)
    }

    /// Images up to block `depth`.
    ///
    /// # Shapes
    /// `pixels` [B, 3, H, W] → [B, T, D]
    ///
    /// # Errors
    /// When the image size is not the model's.
    pub fn image_trunk(&self, pixels: &Tensor, depth: usize, patches: &Patches) -> TensorResult<Trunk> {
        let pixels = pixels.to_device(&self.device)?.to_dtype(self.dtype)?;
        self.vision.trunk(&pixels, depth, patches)
    }

    /// Texts up to block `depth`.
    ///
    /// # Shapes
    /// [N, T] ids → [N, T, D]
    ///
    /// # Errors
    /// When there are more tokens than positions.
    pub fn text_trunk(&self, texts: &TextBatch, depth: usize, patches: &Patches) -> TensorResult<Trunk> {
        self.text.trunk(texts, depth, patches)
    }

    /// [`Clip::image_features_on`] from the middle of the tower.
    ///
    /// # Shapes
    /// [B, T, D] → [B, P]
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn image_features_from<'a>(&'a self, trunk: &Trunk, patches: &'a Patches, tape: Option<&Tape<'a>>) -> TensorResult<Tensor> {
        let Some((tape, rows)) = tape.and_then(|t| Some((t, t.rows()?))) else {
            return self.vision.finish(trunk.clone(), patches, tape);
        };
        by_rows(trunk.x.dim(0)?, rows, |from, count| {
            let part = trunk.narrow(from, count)?;
            let x = part.x.clone();
            let again = move |x: &Tensor| {
                let part = Trunk { x: x.clone(), ..part.clone() };
                rng::with_rows(from..from + count, || self.vision.finish(part, patches, None))
            };
            tape.segment(&x, again)
        })
    }

    /// [`Clip::text_features_on`] from the middle of the tower.
    ///
    /// # Shapes
    /// [N, T, D] → [N, P]
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn text_features_from<'a>(&'a self, trunk: &Trunk, patches: &'a Patches, tape: Option<&Tape<'a>>) -> TensorResult<Tensor> {
        let Some((tape, rows)) = tape.and_then(|t| Some((t, t.rows()?))) else {
            return self.text.finish(trunk.clone(), patches, tape);
        };
        by_rows(trunk.x.dim(0)?, rows, |from, count| {
            let part = trunk.narrow(from, count)?;
            let x = part.x.clone();
            let again = move |x: &Tensor| {
                let part = Trunk { x: x.clone(), ..part.clone() };
                rng::with_rows(from..from + count, || self.text.finish(part, patches, None))
            };
            tape.segment(&x, again)
        })
    }

    /// exp of the learnt logit scale, a scalar f32 (f64 for an f64 model).
    ///
    /// # Errors
    /// When a patch fails.
    pub fn logit_scale(&self, patches: &Patches) -> TensorResult<Tensor> {
        let scale = patches.weight(self.logit_scale.0, &self.logit_scale.1)?;
        widen(&scale)?.exp()
    }

    /// Scaled cosine similarities of unnormalised features, f32 (f64 for an f64 model).
    ///
    /// # Shapes
    /// `images` [B, P], `texts` [N, P] → [B, N]
    ///
    /// # Errors
    /// When widths differ.
    pub fn logits(&self, images: &Tensor, texts: &Tensor, patches: &Patches) -> TensorResult<Tensor> {
        let (images, texts) = (unit_rows(images)?, unit_rows(texts)?);
        images.matmul(&texts.t()?)?.broadcast_mul(&self.logit_scale(patches)?)
    }
}

/// Logits of images against classes that may differ from image to image (CoCoOp), and what patches add to them.
///
/// # Shapes
/// `images` [B, P], `classes` [C, P] or [B, C, P] → [B, C]
///
/// # Errors
/// When widths differ.
pub fn class_logits(clip: &Clip, images: &Tensor, classes: &ClassFeatures, patches: &Patches) -> TensorResult<Tensor> {
    patches.logits(cosine_logits(clip, images, classes, patches)?, &unit_rows(images)?)
}

/// [`class_logits`] without what patches add.
///
/// # Shapes
/// `images` [B, P], `classes` [C, P] or [B, C, P] → [B, C]
///
/// # Errors
/// When widths differ.
pub fn cosine_logits(clip: &Clip, images: &Tensor, classes: &ClassFeatures, patches: &Patches) -> TensorResult<Tensor> {
    match classes {
        ClassFeatures::Shared(classes) => clip.logits(images, classes, patches),
        ClassFeatures::PerImage(classes) => {
            let cosine = unit_rows(classes)?.matmul(&unit_rows(images)?.unsqueeze(2)?)?.squeeze(2)?;
            cosine.broadcast_mul(&clip.logit_scale(patches)?)
        }
    }
}

/// Whether no value is infinite or NaN.
///
/// # Errors
/// When the tensor cannot be read.
pub fn all_finite(t: &Tensor) -> TensorResult<bool> {
    // A finite value times zero is zero, everything else NaN.
    Ok((widen(t)? * 0.0)?.sum_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()? == 0.0)
}

/// Features of groups of at most `rows` examples, joined.
pub(super) fn by_rows(count: usize, rows: usize, features: impl Fn(usize, usize) -> TensorResult<Tensor>) -> TensorResult<Tensor> {
    let parts = (0..count.max(1)).step_by(rows).map(|from| features(from, rows.min(count - from)));
    Tensor::cat(&parts.collect::<TensorResult<Vec<_>>>()?, 0)
}

/// Rows divided by their Euclidean norm, in f32 (f64 stays). Zero rows stay zero; rows whose norm overflows become NaN.
///
/// # Shapes
/// [..., D] → [..., D]
///
/// # Errors
/// When the tensor has no dimension.
pub fn unit_rows(x: &Tensor) -> TensorResult<Tensor> {
    let x = widen(x)?;
    let norm = (x.sqr()?.sum_keepdim(candle_core::D::Minus1)? + 1e-24)?.sqrt()?;
    // A norm that overflowed becomes NaN: divided by infinity, the row would be zero, which looks like a result.
    let norm = (&norm + (&norm * 0.0)?)?;
    x.broadcast_div(&norm)
}

/// f32 at least.
fn widen(x: &Tensor) -> TensorResult<Tensor> {
    if x.dtype() == DType::F64 { Ok(x.clone()) } else { x.to_dtype(DType::F32) }
}

/// Random weights as transformers' `CLIPPreTrainedModel._init_weights` draws them.
///
/// # Errors
/// When a tensor cannot be made.
pub fn random_weights(config: &ClipConfig, seed: u64, device: &Device) -> Result<HashMap<String, Tensor>> {
    let mut tensors = HashMap::new();
    for (name, shape) in config.tensors() {
        let tensor = match start(&name, config) {
            Start::Zeros => Tensor::zeros(shape, DType::F32, device)?,
            Start::Constant(c) => Tensor::full(c as f32, shape, device)?,
            Start::Normal(std) => {
                let mut rng = rng::rng(seed, &[rng::name_key(&name)]);
                rng::normal(&mut rng, std, shape, DType::F32, device)?
            }
        };
        tensors.insert(name, tensor);
    }
    Ok(tensors)
}

enum Start {
    Zeros,
    Constant(f64),
    Normal(f64),
}

fn start(name: &str, config: &ClipConfig) -> Start {
    if name == "logit_scale" {
        return Start::Constant(config.logit_scale_init_value);
    }
    if name.contains("norm") {
        return if name.ends_with("weight") { Start::Constant(1.0) } else { Start::Zeros };
    }
    if name.ends_with(".bias") {
        return Start::Zeros;
    }
    let vision = name.starts_with("vis");
    let (hidden, depth) = if vision {
        (config.vision.hidden_size, config.vision.num_hidden_layers)
    } else {
        (config.text.hidden_size, config.text.num_hidden_layers)
    };
    let width = (hidden as f64).powf(-0.5);
    let residual = width * (2.0 * depth as f64).powf(-0.5);
    Start::Normal(match name.rsplit('.').nth(1).unwrap_or(name) {
        "q_proj" | "k_proj" | "v_proj" | "fc2" => residual,
        "out_proj" | "visual_projection" | "text_projection" => width,
        "fc1" => (2.0 * hidden as f64).powf(-0.5),
        _ if name.ends_with("class_embedding") => width,
        _ => 0.02,
    })
}
