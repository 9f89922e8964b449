//! Two streams that look at one another.

use candle_core::Tensor;
use peft_adapters::Params;
use serde::{Deserialize, Serialize};

use super::nn::{Attention, FeedForward, Linear, Norm, pick, visible};
use super::transformer::{Size, tokens_of};
use super::{Both, Fuse, FusionParts, Pass, widen};
use crate::error::Result;

/// Options of `cross_attention`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CrossAttentionConfig {
    /// How often both sides look at one another.
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

impl Default for CrossAttentionConfig {
    fn default() -> Self {
        Self { layers: 1, dim: 128, heads: 4, feedforward: None, dropout: 0.0 }
    }
}

impl CrossAttentionConfig {
    fn size(&self) -> Size {
        Size { layers: self.layers, dim: self.dim, heads: self.heads, feedforward: self.feedforward, dropout: self.dropout }
    }

    pub(super) fn validate(&self, place: &str) -> Result<()> {
        self.size().validate(&format!("{place}.cross_attention"))
    }

    pub(super) fn build(&self, parts: &FusionParts<'_>, params: &mut Params) -> Result<CrossAttention> {
        let config = parts.clip.config();
        let size = self.size();
        let side = |params: &mut Params, name: &str, width: usize| -> Result<Side> {
            let layers = (0..self.layers).map(|i| Layer::declare(params, &format!("fusion.layers.{i}.{name}"), &size));
            let layers = layers.collect::<Result<_>>()?;
            let norm = Norm::declare(params, &format!("fusion.{name}_norm"), self.dim)?;
            Ok(Side { project: Linear::declare(params, &format!("fusion.{name}_projection"), width, self.dim)?, layers, norm })
        };
        Ok(CrossAttention {
            image: side(params, "image", config.vision.hidden_size)?,
            text: side(params, "text", config.text.hidden_size)?,
            dim: self.dim,
        })
    }
}

/// In each layer, for both sides at once, x + attn(norm(x), norm(other)), then x + ff(norm(x)) (ViLBERT's co-attention, Lu et
/// al. 2019, arXiv 1908.02265, figure 2b, in pre-norm form). The pooled tokens of both sides, normed, stand side by side.
#[derive(Debug)]
pub(super) struct CrossAttention {
    image: Side,
    text: Side,
    dim: usize,
}

#[derive(Debug)]
struct Side {
    project: Linear,
    layers: Vec<Layer>,
    norm: Norm,
}

/// One side's half of a layer.
#[derive(Debug)]
struct Layer {
    norm1: Norm,
    attention: Attention,
    norm2: Norm,
    feedforward: FeedForward,
    dropout: f64,
    name: String,
}

impl Layer {
    fn declare(params: &mut Params, name: &str, size: &Size) -> Result<Self> {
        Ok(Self {
            norm1: Norm::declare(params, &format!("{name}.norm1"), size.dim)?,
            attention: Attention::declare(params, &format!("{name}.attn"), size.dim, size.heads)?,
            norm2: Norm::declare(params, &format!("{name}.norm2"), size.dim)?,
            feedforward: FeedForward::declare(params, name, (size.dim, size.hidden()), size.dropout)?,
            dropout: size.dropout,
            name: name.to_string(),
        })
    }

    fn forward(&self, x: &Tensor, own: &Tensor, other: &Tensor, mask: Option<&Tensor>, pass: &Pass) -> Result<Tensor> {
        let branch = self.attention.forward(own, other, mask, pass)?;
        let x = (x + pass.dropout(branch, self.dropout, &format!("{}.attn", self.name))?)?;
        let branch = self.feedforward.forward(&self.norm2.forward(&x, pass)?, pass)?;
        Ok((&x + pass.dropout(branch, self.dropout, &format!("{}.out", self.name))?)?)
    }
}

impl Fuse for CrossAttention {
    fn tokens(&self) -> bool {
        true
    }

    fn width(&self) -> usize {
        2 * self.dim
    }

    fn fuse(&self, both: &Both<'_>, pass: &Pass) -> Result<Tensor> {
        let (images, texts) = (tokens_of(both.images)?, tokens_of(both.texts)?);
        let mask = visible(texts)?;
        let mut u = self.image.project.forward(&widen(&images.x)?, pass)?;
        let mut v = self.text.project.forward(&widen(&texts.x)?, pass)?;
        for (image, text) in self.image.layers.iter().zip(&self.text.layers) {
            let (nu, nv) = (image.norm1.forward(&u, pass)?, text.norm1.forward(&v, pass)?);
            u = image.forward(&u, &nu, &nv, Some(&mask), pass)?;
            v = text.forward(&v, &nv, &nu, None, pass)?;
        }
        let u = self.image.norm.forward(&pick(&u, &images.pool, 0)?, pass)?;
        let v = self.text.norm.forward(&pick(&v, &texts.pool, 0)?, pass)?;
        Ok(Tensor::cat(&[&u, &v], 1)?)
    }
}
