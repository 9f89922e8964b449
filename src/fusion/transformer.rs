//! One encoder over both token sequences.

use candle_core::Tensor;
use peft_adapters::{Params, Start};
use serde::{Deserialize, Serialize};

use super::nn::{Attention, FeedForward, Linear, Norm, Weight, pick, visible};
use super::{Both, Fuse, FusionParts, Pass, check_dropout, check_positive, widen};
use crate::clip::{Encoded, Tokens};
use crate::error::{Error, Result};

/// Options of `transformer`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TransformerConfig {
    /// Encoder layers.
    pub layers: usize,
    /// Width inside; both towers' tokens are projected to it.
    pub dim: usize,
    /// Attention heads; they divide `dim`.
    pub heads: usize,
    /// Width of the feed-forward layers; 4 · `dim` when left out.
    pub feedforward: Option<usize>,
    /// Share of values that is dropped after attention and inside the feed-forward layers while training.
    pub dropout: f64,
}

impl Default for TransformerConfig {
    fn default() -> Self {
        Self { layers: 2, dim: 128, heads: 4, feedforward: None, dropout: 0.0 }
    }
}

/// What token fusions are made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    pub(super) layers: usize,
    pub(super) dim: usize,
    pub(super) heads: usize,
    pub(super) feedforward: Option<usize>,
    pub(super) dropout: f64,
}

impl Size {
    pub(super) fn hidden(&self) -> usize {
        self.feedforward.unwrap_or(4 * self.dim)
    }

    pub(super) fn validate(&self, place: &str) -> Result<()> {
        check_positive(place, "layers", self.layers)?;
        check_positive(place, "dim", self.dim)?;
        check_positive(place, "heads", self.heads)?;
        check_positive(place, "feedforward", self.hidden())?;
        if !self.dim.is_multiple_of(self.heads) {
            return Err(Error::input(format!("{place}.heads"), format!("{} heads do not divide dim {}", self.heads, self.dim)));
        }
        check_dropout(place, self.dropout)
    }
}

impl TransformerConfig {
    fn size(&self) -> Size {
        Size { layers: self.layers, dim: self.dim, heads: self.heads, feedforward: self.feedforward, dropout: self.dropout }
    }

    pub(super) fn validate(&self, place: &str) -> Result<()> {
        self.size().validate(&format!("{place}.transformer"))
    }

    pub(super) fn build(&self, parts: &FusionParts<'_>, params: &mut Params) -> Result<Transformer> {
        let (config, size) = (parts.clip.config(), self.size());
        let layers = (0..self.layers).map(|i| EncoderLayer::declare(params, &format!("fusion.layers.{i}"), &size));
        Ok(Transformer {
            layers: layers.collect::<Result<_>>()?,
            norm: Norm::declare(params, "fusion.norm", self.dim)?,
            image: Linear::declare(params, "fusion.image_projection", config.vision.hidden_size, self.dim)?,
            text: Linear::declare(params, "fusion.text_projection", config.text.hidden_size, self.dim)?,
            modality: Weight::declare(params, "fusion.modality_embedding.weight", (2, self.dim), Start::Normal { std: 0.02 })?,
            dim: self.dim,
        })
    }
}

/// [image tokens + m₀; text tokens + m₁] through `nn.TransformerEncoder(norm_first=True, activation="gelu")` with a last norm
/// (one stream, as in UNITER, Chen et al. 2020, arXiv 1909.11740). The pooled tokens of both stand side by side.
#[derive(Debug)]
pub(super) struct Transformer {
    image: Linear,
    text: Linear,
    /// [2, D]: images, texts.
    modality: Weight,
    layers: Vec<EncoderLayer>,
    norm: Norm,
    dim: usize,
}

/// `nn.TransformerEncoderLayer(norm_first=True, activation="gelu", batch_first=True)`.
#[derive(Debug)]
struct EncoderLayer {
    attention: Attention,
    feedforward: FeedForward,
    norm1: Norm,
    norm2: Norm,
    dropout: f64,
    name: String,
}

impl EncoderLayer {
    fn declare(params: &mut Params, name: &str, size: &Size) -> Result<Self> {
        Ok(Self {
            attention: Attention::declare(params, &format!("{name}.self_attn"), size.dim, size.heads)?,
            feedforward: FeedForward::declare(params, name, (size.dim, size.hidden()), size.dropout)?,
            norm1: Norm::declare(params, &format!("{name}.norm1"), size.dim)?,
            norm2: Norm::declare(params, &format!("{name}.norm2"), size.dim)?,
            dropout: size.dropout,
            name: name.to_string(),
        })
    }

    fn forward(&self, x: &Tensor, mask: &Tensor, pass: &Pass) -> Result<Tensor> {
        let h = self.norm1.forward(x, pass)?;
        let branch = self.attention.forward(&h, &h, Some(mask), pass)?;
        let x = (x + pass.dropout(branch, self.dropout, &format!("{}.attn", self.name))?)?;
        let branch = self.feedforward.forward(&self.norm2.forward(&x, pass)?, pass)?;
        Ok((&x + pass.dropout(branch, self.dropout, &format!("{}.out", self.name))?)?)
    }
}

/// The tokens that a token fusion asked for.
pub(super) fn tokens_of(encoded: &Encoded) -> Result<&Tokens> {
    encoded.tokens.as_ref().ok_or_else(|| Error::fault("fusion", "got no tokens"))
}

impl Fuse for Transformer {
    fn tokens(&self) -> bool {
        true
    }

    fn width(&self) -> usize {
        2 * self.dim
    }

    fn fuse(&self, both: &Both<'_>, pass: &Pass) -> Result<Tensor> {
        let (images, texts) = (tokens_of(both.images)?, tokens_of(both.texts)?);
        let modality = self.modality.on(pass);
        let side = |layer: &Linear, x: &Tensor, row: usize| -> Result<Tensor> {
            Ok(layer.forward(&widen(x)?, pass)?.broadcast_add(&modality.narrow(0, row, 1)?)?)
        };
        let (u, v) = (side(&self.image, &images.x, 0)?, side(&self.text, &texts.x, 1)?);
        let (batch, offset, _) = u.dims3()?;
        let words = visible(texts)?;
        let mask = Tensor::cat(&[&Tensor::ones((batch, offset), words.dtype(), words.device())?, &words], 1)?;
        let mut x = Tensor::cat(&[&u, &v], 1)?;
        for layer in &self.layers {
            x = layer.forward(&x, &mask, pass)?;
        }
        let u = self.norm.forward(&pick(&x, &images.pool, 0)?, pass)?;
        let v = self.norm.forward(&pick(&x, &texts.pool, offset)?, pass)?;
        Ok(Tensor::cat(&[&u, &v], 1)?)
    }
}
