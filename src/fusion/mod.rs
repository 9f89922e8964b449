//! How image and text become one: what stands between the towers and a task's head.
//!
//! A fusion is one file and one line in [`FusionConfig`]. Its weights are the task's own: they are saved in
//! `task.safetensors` under `fusion.`.

use candle_core::{DType, Tensor};
use peft_adapters::{Params, rng};
use serde::{Deserialize, Serialize};

use crate::clip::model::unit_rows;
use crate::clip::{Clip, Encoded};
use crate::error::{Error, Result};

mod bilinear;
mod concat;
mod cosine;
mod cross_attention;
pub mod nn;
mod transformer;

pub use bilinear::BilinearConfig;
pub use concat::ConcatConfig;
pub use cosine::CosineConfig;
pub use cross_attention::CrossAttentionConfig;
pub use transformer::TransformerConfig;

/// What a task looks at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Inputs {
    /// The image alone.
    Image,
    /// The text alone; images are not read.
    Text,
    /// Both, through a fusion.
    #[default]
    Both,
}

impl Inputs {
    /// Whether the image tower is needed.
    #[must_use]
    pub fn image(self) -> bool {
        self != Self::Text
    }

    /// Whether the text tower is needed.
    #[must_use]
    pub fn text(self) -> bool {
        self != Self::Image
    }
}

/// What a fusion is built from.
#[derive(Debug, Clone, Copy)]
pub struct FusionParts<'a> {
    /// The base.
    pub clip: &'a Clip,
    /// What there is to fuse.
    pub inputs: Inputs,
}

/// The pass that a fusion is part of.
#[derive(Debug, Clone, Copy)]
pub struct Pass {
    /// Whether gradients are wanted; dropout is on then.
    pub training: bool,
    /// The run's seed.
    pub seed: u64,
    /// Micro-batches from the start of training, which vary what is dropped.
    pub position: u64,
}

impl Pass {
    /// A pass without gradients.
    #[must_use]
    pub fn eval() -> Self {
        Self { training: false, seed: 0, position: 0 }
    }

    /// `x`, some of its values dropped while training.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn dropout(&self, x: Tensor, p: f64, name: &str) -> Result<Tensor> {
        if !self.training || p == 0.0 {
            return Ok(x);
        }
        let mut rng = rng::rng(self.seed, &[rng::name_key("dropout"), rng::name_key(name), self.position]);
        let mask = rng::dropout_mask(&mut rng, p, x.shape(), x.dtype(), x.device())?;
        Ok((x * mask)?)
    }
}

/// Image and text made one.
pub trait Fuse: std::fmt::Debug + Send + Sync {
    /// Whether it looks at tokens, and not at pooled features alone.
    fn tokens(&self) -> bool {
        false
    }

    /// Width of what comes out.
    fn width(&self) -> usize;

    /// # Shapes
    /// features [B, P] and, where asked for, tokens [B, T, D] of both → [B, width]
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn fuse(&self, both: &Both<'_>, pass: &Pass) -> Result<Tensor>;
}

/// What both towers gave, row by row.
#[derive(Debug, Clone, Copy)]
pub struct Both<'a> {
    /// Images.
    pub images: &'a Encoded,
    /// Texts.
    pub texts: &'a Encoded,
    /// exp(logit scale), a scalar.
    pub scale: &'a Tensor,
}

macro_rules! fusions {
    ($($(#[$doc:meta])* $name:ident($config:ty)),* $(,)?) => {
        /// Which fusion: `concat`, or `concat: { hidden: 256 }`.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum FusionConfig {
            $($(#[$doc])* $name($config)),*
        }

        impl FusionConfig {
            /// What can be checked without a model.
            ///
            /// # Errors
            /// When an option is out of range.
            pub fn validate(&self, place: &str) -> Result<()> {
                match self { $(Self::$name(c) => c.validate(place)),* }
            }

            fn of_both(&self, parts: &FusionParts<'_>, params: &mut Params) -> Result<Box<dyn Fuse>> {
                Ok(match self { $(Self::$name(c) => Box::new(c.build(parts, params)?)),* })
            }
        }
    };
}

fusions! {
    /// exp(logit scale) · cos(image, text), as CLIP compares them; no weights.
    Cosine(CosineConfig),
    /// An MLP over [u, v, u∘v, |u−v|] of normalised features.
    Concat(ConcatConfig),
    /// (Uu) ∘ (Vv): low-rank bilinear pooling.
    Bilinear(BilinearConfig),
    /// Image tokens attend to text tokens and the other way round.
    CrossAttention(CrossAttentionConfig),
    /// One encoder over the tokens of both.
    Transformer(TransformerConfig),
}

impl FusionConfig {
    /// Builds the fusion and declares its weights; of one input alone its normalised features are what comes out.
    ///
    /// # Errors
    /// When an option does not fit the model.
    pub fn build(&self, parts: &FusionParts<'_>, params: &mut Params) -> Result<Box<dyn Fuse>> {
        match parts.inputs {
            Inputs::Both => self.of_both(parts, params),
            one => Ok(Box::new(Alone { inputs: one, width: parts.clip.config().projection_dim })),
        }
    }
}

/// One of the two.
#[derive(Debug)]
struct Alone {
    inputs: Inputs,
    width: usize,
}

impl Fuse for Alone {
    fn width(&self) -> usize {
        self.width
    }

    fn fuse(&self, both: &Both<'_>, _: &Pass) -> Result<Tensor> {
        let of = if self.inputs == Inputs::Image { both.images } else { both.texts };
        Ok(unit_rows(&of.features)?)
    }
}

/// A share of values that is dropped.
fn check_dropout(place: &str, p: f64) -> Result<()> {
    match (0.0..1.0).contains(&p) {
        true => Ok(()),
        false => Err(Error::input(format!("{place}.dropout"), format!("expected at least 0 and less than 1, found {p}"))),
    }
}

/// A count that cannot be 0.
fn check_positive(place: &str, key: &str, n: usize) -> Result<()> {
    match n {
        0 => Err(Error::input(format!("{place}.{key}"), "expected at least 1, found 0")),
        _ => Ok(()),
    }
}

/// Features in the dtype that fusions compute in: f32, or f64 of an f64 model.
fn widen(x: &Tensor) -> Result<Tensor> {
    Ok(if x.dtype() == DType::F64 { x.clone() } else { x.to_dtype(DType::F32)? })
}
