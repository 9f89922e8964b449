//! CLIP's own comparison.

use candle_core::Tensor;
use peft_adapters::Params;
use serde::{Deserialize, Serialize};

use super::{Both, Fuse, FusionParts, Pass};
use crate::clip::model::unit_rows;
use crate::error::Result;

/// No options.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CosineConfig {}

impl CosineConfig {
    pub(super) fn validate(&self, _: &str) -> Result<()> {
        Ok(())
    }

    pub(super) fn build(&self, _: &FusionParts<'_>, _: &mut Params) -> Result<Cosine> {
        Ok(Cosine)
    }
}

/// exp(logit scale) · cos(u, v), [B, 1].
#[derive(Debug)]
pub(super) struct Cosine;

impl Fuse for Cosine {
    fn width(&self) -> usize {
        1
    }

    fn fuse(&self, both: &Both<'_>, _: &Pass) -> Result<Tensor> {
        let (u, v) = (unit_rows(&both.images.features)?, unit_rows(&both.texts.features)?);
        Ok((u * v)?.sum_keepdim(1)?.broadcast_mul(both.scale)?)
    }
}
