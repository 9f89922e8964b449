//! Low-rank bilinear pooling.

use candle_core::Tensor;
use peft_adapters::Params;
use serde::{Deserialize, Serialize};

use super::nn::Linear;
use super::{Both, Fuse, FusionParts, Pass, check_dropout, check_positive};
use crate::clip::model::unit_rows;
use crate::error::Result;

/// Options of `bilinear`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BilinearConfig {
    /// Rank of the bilinear form: how many products there are.
    pub rank: usize,
    /// Share of products that is dropped while training.
    pub dropout: f64,
}

impl Default for BilinearConfig {
    fn default() -> Self {
        Self { rank: 256, dropout: 0.0 }
    }
}

impl BilinearConfig {
    pub(super) fn validate(&self, place: &str) -> Result<()> {
        check_positive(&format!("{place}.bilinear"), "rank", self.rank)?;
        check_dropout(&format!("{place}.bilinear"), self.dropout)
    }

    pub(super) fn build(&self, parts: &FusionParts<'_>, params: &mut Params) -> Result<Bilinear> {
        let dim = parts.clip.config().projection_dim;
        Ok(Bilinear {
            image: Linear::declare(params, "fusion.image", dim, self.rank)?,
            text: Linear::declare(params, "fusion.text", dim, self.rank)?,
            rank: self.rank,
            // Unit features have values of about 1/√P, and products of them of about 1/P.
            gain: (dim as f64).sqrt(),
            dropout: self.dropout,
        })
    }
}

/// tanh(√P · Uu + b) ∘ tanh(√P · Vv + c) of unit features u and v [P] (MLB, Kim et al. 2017, arXiv 1610.04325, eq. 9).
#[derive(Debug)]
pub(super) struct Bilinear {
    image: Linear,
    text: Linear,
    rank: usize,
    gain: f64,
    dropout: f64,
}

impl Fuse for Bilinear {
    fn width(&self) -> usize {
        self.rank
    }

    fn fuse(&self, both: &Both<'_>, pass: &Pass) -> Result<Tensor> {
        let side = |layer: &Linear, x: &Tensor| -> Result<Tensor> { Ok(layer.forward(&(unit_rows(x)? * self.gain)?, pass)?.tanh()?) };
        let joint = (side(&self.image, &both.images.features)? * side(&self.text, &both.texts.features)?)?;
        pass.dropout(joint, self.dropout, "fusion.bilinear")
    }
}
