//! Visual prompt tuning: learnt tokens between an image's class token and its patches.

use std::collections::HashMap;

use candle_core::{Result as TensorResult, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::flow::Sequence;
use crate::method::{Fold, Init, Method, Patch, Step};
use crate::params::{Params, Spec, Start};
use crate::sites::{SiteId, SiteKind, Sites, Tower, WeightId};
use crate::{Error, Result, ops, rng};

/// See [`VptConfig`].
#[derive(Debug)]
pub struct Vpt;

/// Options of visual prompt tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VptConfig {
    /// Learnt tokens, at least 1. Higher: more capacity, a longer sequence in every block.
    pub length: usize,
    /// Blocks that get tokens of their own, counted from the input. 1: VPT-shallow, whose tokens go on through all blocks.
    /// More: VPT-deep, each of these blocks forgets those of the block before. All blocks when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub depth: Option<usize>,
    /// Probability in [0, 1) that a number of a token is zeroed while training. Higher: less overfitting, slower learning.
    pub dropout: f64,
}

impl Default for VptConfig {
    fn default() -> Self {
        Self { length: 8, depth: None, dropout: 0.0 }
    }
}

/// A sequence longer than this is a mistake.
const MAX_LENGTH: usize = 4096;

struct VptPatch {
    prompts: HashMap<SiteId, Prompt>,
    dropout: f64,
    step: Step,
}

struct Prompt {
    /// [L, D].
    tokens: Tensor,
    /// Whether tokens of an earlier block are in the sequence.
    replaces: bool,
}

impl Method for Vpt {
    const NAME: &'static str = "vpt";
    const SOURCE: &'static str = "Jia et al. 2022 (arXiv 2203.12119), eq. 4 (shallow: [x₀, P, E₀]) and 7 (deep: [xᵢ, Pᵢ, Eᵢ])";
    const INIT: Init = Init::Changes;
    type Config = VptConfig;

    fn examples() -> Vec<VptConfig> {
        vec![
            VptConfig { length: 3, ..Default::default() },
            VptConfig { length: 2, depth: Some(1), dropout: 0.5 },
            VptConfig { length: 1, depth: Some(2), ..Default::default() },
        ]
    }

    fn plan(config: &VptConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        if !(1..=MAX_LENGTH).contains(&config.length) {
            return Err(Error::config("length", format!("expected 1 to {MAX_LENGTH}, found {}", config.length)));
        }
        if !(0.0..1.0).contains(&config.dropout) {
            return Err(Error::config("dropout", format!("expected a probability in [0, 1), found {}", config.dropout)));
        }
        let blocks = sites.depth(Tower::Vision);
        let depth = config.depth.unwrap_or(blocks);
        if !(1..=blocks).contains(&depth) {
            return Err(Error::config("depth", format!("expected 1 to {blocks}, the blocks of the image tower, found {depth}")));
        }
        let mut prompts = HashMap::new();
        for (id, site) in sites.iter().filter(|(_, s)| s.tower == Tower::Vision && s.layer.is_some_and(|l| l < depth)) {
            let SiteKind::Tokens { dim } = site.kind else { continue };
            let name = format!("base_model.model.{}.prompt", site.path);
            let tokens = params.declare(Spec::new(name, (config.length, dim), Start::Uniform { bound: bound(sites, dim) }))?;
            prompts.insert(id, Prompt { tokens, replaces: site.layer != Some(0) });
        }
        Ok(Box::new(VptPatch { prompts, dropout: config.dropout, step: Step::eval() }))
    }

    fn to_adapter_config(config: &VptConfig, _sites: &Sites) -> Result<Value> {
        Ok(json!({ "peft_type": "VPT", "base_model_name_or_path": null, "config": config }))
    }

    fn from_adapter_config(value: &Value) -> Result<VptConfig> {
        serde_json::from_value(value["config"].clone()).map_err(|e| Error::config("config", crate::wording::plain(&e.to_string())))
    }
}

/// The authors' Xavier bound √(6 / (3·P² + D)): a patch's pixels are a token's inputs.
fn bound(sites: &Sites, dim: usize) -> f64 {
    let patches = sites.weights().find(|(_, w)| w.tower == Tower::Vision && w.tensor.rank() == 4);
    let pixels = patches.map_or(dim, |(_, w)| w.tensor.elem_count() / w.tensor.dims()[0]);
    (6.0 / (pixels + dim) as f64).sqrt()
}

impl VptPatch {
    /// What dropout does to the tokens of each image, [B, L, D]; nothing where there is none.
    fn mask(&self, at: SiteId, length: usize, like: &Tensor) -> TensorResult<Option<Tensor>> {
        if !self.step.training || self.dropout == 0.0 {
            return Ok(None);
        }
        let (batch, _, dim) = like.dims3()?;
        let mut rng = rng::rng(self.step.seed, &[rng::name_key("vpt"), self.step.step, at.index() as u64]);
        rng::dropout_mask(&mut rng, self.dropout, (batch, length, dim), like.dtype(), like.device()).map(Some)
    }
}

impl Patch for VptPatch {
    fn prepare(&mut self, step: &Step) -> TensorResult<()> {
        self.step = *step;
        Ok(())
    }

    fn tokens(&self, at: SiteId, sequence: Sequence) -> TensorResult<Sequence> {
        let Some(Prompt { tokens, replaces }) = self.prompts.get(&at) else { return Ok(sequence) };
        let Sequence { x, pool } = sequence;
        let length = tokens.dim(0)?;
        let gone = 1..1 + if *replaces { length } else { 0 };
        let tokens = tokens.to_dtype(x.dtype())?;
        let x = match self.mask(at, length, &x)? {
            None => ops::splice(&x, &tokens, gone)?,
            Some(mask) => {
                let rest = x.narrow(1, gone.end, x.dim(1)? - gone.end)?;
                Tensor::cat(&[&x.narrow(1, 0, 1)?, &mask.broadcast_mul(&tokens)?, &rest], 1)?
            }
        };
        Ok(Sequence { x, pool })
    }

    fn unfoldable(&self) -> Option<&'static str> {
        Some("plain CLIP has no tokens beside an image's patches")
    }

    fn fold(&self, _id: WeightId, _value: &Tensor) -> TensorResult<Fold> {
        Ok(Fold::Unchanged)
    }
}
