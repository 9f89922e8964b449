//! An MLP over both features and what they have in common.

use candle_core::Tensor;
use peft_adapters::Params;
use peft_adapters::ops::{self, Activation};
use serde::{Deserialize, Serialize};

use super::nn::Linear;
use super::{Both, Fuse, FusionParts, Pass, check_dropout, check_positive};
use crate::clip::model::unit_rows;
use crate::error::Result;

/// Options of `concat`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConcatConfig {
    /// Width of the hidden layer; larger fits more and needs more examples.
    pub hidden: usize,
    /// Share of hidden values that is dropped while training.
    pub dropout: f64,
}

impl Default for ConcatConfig {
    fn default() -> Self {
        Self { hidden: 256, dropout: 0.0 }
    }
}

impl ConcatConfig {
    pub(super) fn validate(&self, place: &str) -> Result<()> {
        check_positive(&format!("{place}.concat"), "hidden", self.hidden)?;
        check_dropout(&format!("{place}.concat"), self.dropout)
    }

    pub(super) fn build(&self, parts: &FusionParts<'_>, params: &mut Params) -> Result<Concat> {
        let input = 4 * parts.clip.config().projection_dim;
        Ok(Concat { mlp: Linear::declare(params, "fusion.mlp", input, self.hidden)?, width: self.hidden, dropout: self.dropout })
    }
}

/// gelu(W [u, v, u∘v, |u−v|] + b) of unit features u and v; features of the products are as in InferSent (Conneau et al. 2017,
/// section 3.1).
#[derive(Debug)]
pub(super) struct Concat {
    mlp: Linear,
    width: usize,
    dropout: f64,
}

impl Fuse for Concat {
    fn width(&self) -> usize {
        self.width
    }

    fn fuse(&self, both: &Both<'_>, pass: &Pass) -> Result<Tensor> {
        let (u, v) = (unit_rows(&both.images.features)?, unit_rows(&both.texts.features)?);
        let (product, difference) = ((&u * &v)?, (&u - &v)?.abs()?);
        let x = Tensor::cat(&[&u, &v, &product, &difference], 1)?;
        let hidden = ops::activation(&self.mlp.forward(&x, pass)?, Activation::Gelu)?;
        pass.dropout(hidden, self.dropout, "fusion.mlp")
    }
}
