//! The seam: a [`Method`] plans once for a whole model and returns a [`Patch`] of typed hooks.

use std::collections::HashMap;

use candle_core::{Result as TensorResult, Tensor};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::Result;
use crate::flow::{Branch, ClassFeatures, Embedded, LinearOut, Qkv, Sequence};
use crate::grads::Grads;
use crate::params::Params;
use crate::sites::{SiteId, Sites, WeightId};

/// What a method does to the model's output before the first step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// Nothing: outputs are those of the base.
    Identity,
    /// Almost nothing, within this relative tolerance.
    Approximate(f64),
    /// Outputs differ from the start (prefixes add keys).
    Changes,
}

/// A way of adapting a model. One file each; see `CONTRIBUTING.md` for the recipe.
pub trait Method: 'static {
    /// Recipe key, directory suffix, table label.
    const NAME: &'static str;
    /// Paper and equation.
    const SOURCE: &'static str;
    /// What it does before the first step.
    const INIT: Init;
    /// Its options, `deny_unknown_fields`; unit, range and effect in each doc line.
    type Config: DeserializeOwned + Serialize + Clone + std::fmt::Debug + PartialEq;

    /// Configurations that the contract tests run.
    fn examples() -> Vec<Self::Config>;

    /// Checks the configuration against the model, declares parameters and returns the hooks.
    ///
    /// # Errors
    /// When the configuration does not fit the model.
    fn plan(config: &Self::Config, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>>;

    /// Whether an `adapter_config.json` is this method's: by its `peft_type`, unless several methods share one.
    fn reads(config: &Value) -> bool {
        config.get("peft_type").and_then(Value::as_str).is_some_and(|kind| kind.eq_ignore_ascii_case(Self::NAME))
    }

    /// `adapter_config.json`: HF PEFT's fields where HF PEFT has the method.
    ///
    /// # Errors
    /// When the configuration cannot be written in that form.
    fn to_adapter_config(config: &Self::Config, sites: &Sites) -> Result<Value>;

    /// Reads `adapter_config.json` back. Fields that are not implemented here are refused
    /// unless they hold their default.
    ///
    /// # Errors
    /// When a field is missing, of another type, or asks for what is not implemented.
    fn from_adapter_config(config: &Value) -> Result<Self::Config>;
}

/// What a forward pass is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Whether dropout applies.
    pub training: bool,
    /// The run's seed.
    pub seed: u64,
    /// Counts forward passes of training; randomness is a function of seed, step and site.
    pub step: u64,
}

impl Step {
    /// Evaluation: no dropout.
    #[must_use]
    pub const fn eval() -> Self {
        Self { training: false, seed: 0, step: 0 }
    }
}

/// What becomes of a base weight when an adapter is merged.
#[derive(Debug)]
pub enum Fold {
    /// The weight stays.
    Unchanged,
    /// The weight is replaced.
    Replace(Tensor),
}

/// How an adapter comes out of merged weights again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inverse {
    /// Folding adds what does not depend on the weight; that is subtracted.
    Subtract,
    /// Folding multiplies by what does not depend on the weight; the weight is divided by that.
    Divide,
    /// It does not: why.
    Undefined(&'static str),
}

/// The hooks of one planned method. Every hook defaults to "leave as is".
///
/// Towers are immutable and shared; a patch is passed to each forward pass.
pub trait Patch: Send + Sync {
    /// Once before each forward pass: couplings, norms, reparameterisation, dropout seeds.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn prepare(&mut self, _step: &Step) -> TensorResult<()> {
        Ok(())
    }

    /// The effective value of a base weight (full fine-tuning, BitFit, layer-norm tuning).
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn weight(&self, _id: WeightId, value: Tensor) -> TensorResult<Tensor> {
        Ok(value)
    }

    /// Whether [`Patch::weight`] never looks at the base's value of this weight: it has one of its own. Where memory is
    /// short, the base's can then go.
    fn replaces(&self, _id: WeightId) -> bool {
        false
    }

    /// A linear layer. `y` is not computed for the first patch, which may fuse with the frozen product.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn linear(&self, _at: SiteId, y: LinearOut) -> TensorResult<LinearOut> {
        Ok(y)
    }

    /// Rows of a table: those at `ids`, or all of them.
    ///
    /// # Shapes
    /// `ids` u32 [...], `rows` [..., D] → [..., D]
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn embedding(&self, _at: SiteId, _ids: Option<&Tensor>, rows: Tensor) -> TensorResult<Tensor> {
        Ok(rows)
    }

    /// Attention's inputs; prefixes join keys and values here.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn attention(&self, _at: SiteId, qkv: Qkv) -> TensorResult<Qkv> {
        Ok(qkv)
    }

    /// Tokens on their way into a tower, before texts get positions; learnt context takes the place of words here.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn embed(&self, _at: SiteId, embedded: Embedded) -> TensorResult<Embedded> {
        Ok(embedded)
    }

    /// The tokens that enter a block; prompts are inserted here.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn tokens(&self, _at: SiteId, sequence: Sequence) -> TensorResult<Sequence> {
        Ok(sequence)
    }

    /// A residual branch, before it is added.
    ///
    /// # Shapes
    /// [B, T, D] → [B, T, D]
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn branch(&self, _at: SiteId, branch: Branch<'_>) -> TensorResult<Tensor> {
        Ok(branch.output)
    }

    /// A tower's projected features.
    ///
    /// # Shapes
    /// [B, D] → [B, D]
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn features(&self, _at: SiteId, features: Tensor) -> TensorResult<Tensor> {
        Ok(features)
    }

    /// The text side of a classifier, which may depend on the images' features [B, D].
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn class_features(&self, classes: ClassFeatures, _images: &Tensor) -> TensorResult<ClassFeatures> {
        Ok(classes)
    }

    /// The logits of a classifier, f32; `images` are normalised features [B, P]. Tip-Adapter adds its cache's here.
    ///
    /// # Shapes
    /// [B, C] → [B, C]
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn logits(&self, logits: Tensor, _images: &Tensor) -> TensorResult<Tensor> {
        Ok(logits)
    }

    /// Whether [`Patch::logits`] changes any: a trained head has none of these.
    fn adds_logits(&self) -> bool {
        false
    }

    /// Whether texts depend on the image they are compared with: every class prompt is then encoded for every image.
    fn per_image(&self) -> bool {
        false
    }

    /// Whether something is held for each class of the task, so that other classes cannot be asked for.
    fn class_bound(&self) -> bool {
        false
    }

    /// A stored tensor after the classes have changed places: class i of the new order is class `order[i]` of the old one.
    /// `None` for tensors that hold nothing for single classes.
    ///
    /// # Errors
    /// When the tensor is not what the method stores under that name.
    fn reorder_classes(&self, _name: &str, _tensor: &Tensor, _order: &[u32]) -> TensorResult<Option<Tensor>> {
        Ok(None)
    }

    /// A term of the loss, a scalar.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn regulariser(&self) -> TensorResult<Option<Tensor>> {
        Ok(None)
    }

    /// Before anything is trained: whether `total` optimiser steps suffice (AdaLoRA's schedule).
    ///
    /// # Errors
    /// When they do not.
    fn check_steps(&self, _total: usize) -> Result<()> {
        Ok(())
    }

    /// After each optimiser step, counted from 1; AdaLoRA allocates ranks here.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn after_backward(&mut self, _step: usize, _total: usize, _grads: &Grads) -> TensorResult<()> {
        Ok(())
    }

    /// Whether [`Patch::fit`] and [`Patch::tune`] want to be called.
    fn fits(&self) -> bool {
        false
    }

    /// Before the first step, for methods that look at the training examples first (Tip-Adapter): new values of
    /// parameters by name.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn fit(&self, _train: &Labelled) -> TensorResult<Vec<(String, Tensor)>> {
        Ok(Vec::new())
    }

    /// After the last step: hyper-parameters chosen on validation examples, as new values of parameters by name.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn tune(&self, _val: &Labelled) -> TensorResult<Vec<(String, Tensor)>> {
        Ok(Vec::new())
    }

    /// Whether the method folds into plain weights; `Some(why)` where it does not.
    fn unfoldable(&self) -> Option<&'static str> {
        None
    }

    /// What becomes of a base weight (f32) when this adapter is merged, beyond what [`Patch::weight`] makes of it:
    /// `value` is what all patches' `weight` hooks have left.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn fold(&self, id: WeightId, value: &Tensor) -> TensorResult<Fold>;

    /// How [`Patch::weight`] and [`Patch::fold`] are taken back.
    fn inverse(&self) -> Inverse {
        Inverse::Undefined("its files hold new weights, and the old ones are nowhere")
    }

    /// The tensors of the adapter file, where they differ from the declared parameters
    /// (a reparameterisation that is dropped).
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn export(&self) -> TensorResult<Option<Vec<(String, Tensor)>>> {
        Ok(None)
    }

    /// What training has decided of `adapter_config.json` (AdaLoRA's ranks).
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn export_config(&self, _config: &mut Value) -> TensorResult<()> {
        Ok(())
    }

    /// What a checkpoint has to hold besides the parameters, by name.
    fn state(&self) -> Vec<(String, Tensor)> {
        Vec::new()
    }

    /// Takes what [`Patch::state`] gave.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn restore(&mut self, _state: &HashMap<String, Tensor>) -> TensorResult<()> {
        Ok(())
    }
}

/// Labelled examples as methods that look at data see them.
#[derive(Debug, Clone)]
pub struct Labelled {
    /// Normalised image features, [N, P].
    pub features: Tensor,
    /// The class of each, u32 [N].
    pub labels: Tensor,
    /// Logits before [`Patch::logits`], f32 [N, C].
    pub logits: Tensor,
}
