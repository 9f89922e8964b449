//! What tasks on image and text share: both towers, a fusion, a linear head.

use candle_core::{DType, Tensor};
use peft_adapters::{Params, Start};

use super::prompts::Pad;
use super::texts::Texts;
use super::{Forward, Needs, TaskParts};
use crate::clip::Encoded;
use crate::error::{Error, Result};
use crate::fusion::nn::Linear;
use crate::fusion::{Both, Fuse, FusionConfig, FusionParts, Inputs};

/// Names of a head's weights in `task.safetensors`: [outputs, width] and \[outputs\].
pub(crate) const HEAD: [&str; 2] = ["head.weight", "head.bias"];

/// Both towers up to the head's outputs.
#[derive(Debug)]
pub(super) struct Joint {
    inputs: Inputs,
    texts: Texts,
    fusion: Box<dyn Fuse>,
    head: Linear,
}

/// How a joint is put together.
pub(super) struct JointParts<'a> {
    pub(super) inputs: Inputs,
    /// Where a recipe names no fusion.
    pub(super) default: FusionConfig,
    pub(super) outputs: usize,
    pub(super) pad: Pad,
    pub(super) task: &'a TaskParts<'a>,
}

impl Joint {
    /// Declares the weights of fusion and head. A single output over CLIP's own comparison starts as that comparison.
    pub(super) fn new(parts: &JointParts<'_>, params: &mut Params) -> Result<Self> {
        let task = parts.task;
        let config = task.fusion.unwrap_or(&parts.default);
        let fusion = config.build(&FusionParts { clip: task.clip, inputs: parts.inputs }, params)?;
        let (width, tokens) = (fusion.width(), fusion.tokens());
        let head = match (width, parts.outputs) {
            (1, 2..) => {
                return Err(Error::input(
                    "fusion",
                    format!("`cosine` gives one number, from which {} classes cannot be told", parts.outputs),
                )
                .hint("concat, bilinear, cross_attention or transformer"));
            }
            (1, _) => Linear::starting(params, "head", (1, 1), Start::Constant(1.0))?,
            (width, outputs) => Linear::starting(params, "head", (width, outputs), Start::KaimingUniform { fan_in: width })?,
        };
        Ok(Self { inputs: parts.inputs, texts: Texts::new(task.tokenizer, parts.pad, tokens), fusion, head })
    }

    pub(super) fn needs(&self) -> Needs {
        match (self.inputs.image(), self.fusion.tokens()) {
            (false, _) => Needs::Nothing,
            (true, true) => Needs::Tokens,
            (true, false) => Needs::Features,
        }
    }

    /// Texts through the text tower; where they are not looked at, nothing of the right length.
    pub(super) fn encode(&mut self, on: &Forward<'_, '_>, texts: &[&str]) -> Result<Encoded> {
        match self.inputs.text() {
            true => self.texts.encode(on, texts),
            false => Ok(Encoded::pooled(Tensor::zeros((texts.len(), 1), DType::F32, on.clip.device())?)),
        }
    }

    /// The head's outputs for pairs, in f32.
    ///
    /// # Shapes
    /// `images` and `texts` [B, …] → [B, outputs]
    pub(super) fn outputs(&self, on: &Forward<'_, '_>, images: &Encoded, texts: &Encoded) -> Result<Tensor> {
        let scale = on.clip.logit_scale(on.patches)?;
        let joint = self.fusion.fuse(&Both { images, texts, scale: &scale }, &on.pass)?;
        let outputs = self.head.forward(&joint, &on.pass)?;
        Ok(if outputs.dtype() == DType::F64 { outputs } else { outputs.to_dtype(DType::F32)? })
    }
}

/// The error for an example that lacks an input.
pub(super) fn lacks(task: &str, id: &str, what: &str) -> Error {
    Error::input(format!("task.{task}"), format!("`{id}` has no {what}"))
}
