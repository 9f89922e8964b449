//! Where logits come from: class prompts, a linear head on images, or a fusion.

use candle_core::Tensor;
use peft_adapters::{ClassFeatures, Params, Patches, Spec, Start};

use super::{ClassifyConfig, Head, HeadInit, Labels};
use crate::clip::model::{class_logits, unit_rows};
use crate::clip::{Clip, Encoded};
use crate::data::Example;
use crate::error::{Error, Result};
use crate::fusion::{ConcatConfig, FusionConfig, Inputs};
use crate::task::joint::{HEAD, Joint, JointParts};
use crate::task::prompts::Prompts;
use crate::task::{Forward, Needs, TaskParts};

/// Name of the cosines from which on an image belongs to a class, \[C\].
const COSINE: &str = "prompts.threshold";

/// Where these cosines start: about what CLIP gives for an image and a caption that fit moderately.
const START: f64 = 0.2;

/// Where logits come from.
pub(super) enum Source {
    /// Images alone.
    Images(Box<Images>),
    /// Texts, or both.
    Joint(Box<Joint>),
}

impl Source {
    pub(super) fn new(config: &ClassifyConfig, parts: &TaskParts<'_>, params: &mut Params) -> Result<Self> {
        if config.inputs == Inputs::Image {
            return Ok(Self::Images(Box::new(Images::new(config, parts, params)?)));
        }
        let default = FusionConfig::Concat(ConcatConfig::default());
        let joint = JointParts { inputs: config.inputs, default, outputs: parts.classes.len(), pad: config.pad, task: parts };
        Ok(Self::Joint(Box::new(Joint::new(&joint, params)?)))
    }

    pub(super) fn needs(&self) -> Needs {
        match self {
            Self::Images(_) => Needs::Features,
            Self::Joint(joint) => joint.needs(),
        }
    }

    /// Logits of a training batch, [B, C]; `text` draws one of an example's.
    pub(super) fn train<'e>(
        &mut self,
        on: &Forward<'_, '_>,
        images: &Encoded,
        examples: &[&'e Example],
        text: impl Fn(&'e Example) -> &'e str,
    ) -> Result<Tensor> {
        match self {
            Self::Images(own) => own.logits(on, &images.features, None),
            Self::Joint(joint) => {
                let texts: Vec<&str> = examples.iter().map(|e| text(e)).collect();
                let texts = joint.encode(on, &texts)?;
                joint.outputs(on, images, &texts)
            }
        }
    }

    /// Logits without gradients, [B, C]; of an example's texts the first counts.
    pub(super) fn read(&mut self, on: &Forward<'_, '_>, images: &Encoded, examples: &[Example]) -> Result<Tensor> {
        match self {
            Self::Images(own) => own.read(on, &images.features),
            Self::Joint(joint) => {
                let texts: Vec<&str> = examples.iter().map(|e| e.texts.first().map_or("", String::as_str)).collect();
                let texts = joint.encode(on, &texts)?;
                joint.outputs(on, images, &texts)
            }
        }
    }
}

/// Class prompts, or a linear head.
pub(super) struct Images {
    prompts: Prompts,
    head: Option<[Tensor; 2]>,
    /// What a cosine is compared with where each class stands for itself, \[C\].
    threshold: Option<Tensor>,
    /// Class features, kept while no patch reaches the text tower.
    frozen: Option<Tensor>,
}

impl Images {
    fn new(config: &ClassifyConfig, parts: &TaskParts<'_>, params: &mut Params) -> Result<Self> {
        let count = parts.classes.len();
        let prompts = Prompts::of_classes(parts.tokenizer, parts.classes, &config.templates, config.pad)?;
        let several = config.labels == Labels::Multi;
        let mut declare = |spec| params.declare(spec).map_err(|e| Error::input("task.classify.head", e));
        let (head, threshold) = match config.head {
            Head::Prompts => (None, several.then(|| declare(Spec::new(COSINE, count, Start::Constant(START)))).transpose()?),
            Head::Linear => {
                let dim = parts.clip.config().projection_dim;
                let start = match config.head_init {
                    HeadInit::Zero => [Start::Zeros, Start::Zeros],
                    HeadInit::Text => [Start::Value(text_weights(parts.clip, &prompts)?), text_bias(parts.clip, several)?],
                };
                let [weight, bias] = start;
                (Some([declare(Spec::new(HEAD[0], (count, dim), weight))?, declare(Spec::new(HEAD[1], count, bias))?]), None)
            }
        };
        Ok(Self { prompts, head, threshold, frozen: None })
    }

    /// [C, P], unnormalised.
    pub(super) fn class_features(&mut self, on: &Forward<'_, '_>) -> Result<Tensor> {
        if let Some(kept) = &self.frozen {
            return Ok(kept.clone());
        }
        self.prompts.keep_constant(on)?;
        let features = self.prompts.class_features(on)?;
        if on.constant.features {
            self.frozen = Some(features.clone());
        }
        Ok(features)
    }

    /// Whether every image is compared with the same class features.
    pub(super) fn compares(&self) -> bool {
        self.head.is_none() && self.threshold.is_none()
    }

    fn read(&mut self, on: &Forward<'_, '_>, features: &Tensor) -> Result<Tensor> {
        match &self.head {
            None if on.patches.per_image() => self.above(on, self.prompts.logits(on, features)?),
            None => {
                let classes = self.class_features(on)?;
                self.logits(on, features, Some(&classes))
            }
            Some(_) => self.logits(on, features, None),
        }
    }

    /// [B, C]
    fn logits(&mut self, on: &Forward<'_, '_>, features: &Tensor, classes: Option<&Tensor>) -> Result<Tensor> {
        if let Some([weight, bias]) = &self.head {
            let (weight, bias) = if on.training() { (weight.clone(), bias.clone()) } else { (weight.detach(), bias.detach()) };
            let x = unit_rows(features)?.to_dtype(weight.dtype())?;
            return Ok(x.matmul(&weight.t()?)?.broadcast_add(&bias)?);
        }
        let classes = match classes {
            Some(c) => ClassFeatures::Shared(c.clone()),
            None if on.patches.per_image() => self.prompts.classes(on, features)?,
            None => ClassFeatures::Shared(self.class_features(on)?),
        };
        let classes = on.patches.class_features(classes, features)?;
        self.above(on, class_logits(on.clip, features, &classes, on.patches)?)
    }

    /// s cos → s (cos − threshold): of one label's logits only differences count, of several each by itself.
    fn above(&self, on: &Forward<'_, '_>, logits: Tensor) -> Result<Tensor> {
        let Some(threshold) = &self.threshold else { return Ok(logits) };
        let threshold = if on.training() { threshold.clone() } else { threshold.detach() };
        let scale = on.clip.logit_scale(on.patches)?.to_dtype(logits.dtype())?;
        Ok(logits.broadcast_sub(&threshold.to_dtype(logits.dtype())?.broadcast_mul(&scale)?)?)
    }
}

/// A zero-shot classifier of the bare base as the weights of a linear one, [C, P].
fn text_weights(clip: &Clip, prompts: &Prompts) -> Result<Tensor> {
    let none = Patches::none();
    let features = unit_rows(&prompts.class_features(&Forward::eval(clip, &none))?)?;
    Ok(features.broadcast_mul(&clip.logit_scale(&none)?)?)
}

/// Its bias: 0, or where each class stands for itself that of a cosine's threshold.
fn text_bias(clip: &Clip, several: bool) -> Result<Start> {
    let scale = clip.logit_scale(&Patches::none())?.to_dtype(candle_core::DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    Ok(if several { Start::Constant(-START * scale.first().copied().unwrap_or(1.0)) } else { Start::Zeros })
}
