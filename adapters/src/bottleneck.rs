//! Bottleneck adapters: a narrow MLP beside or behind a block's branches.

use std::collections::HashMap;

use candle_core::{Result as TensorResult, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::flow::Branch;
use crate::method::{Fold, Init, Method, Patch};
use crate::ops::{self, Activation};
use crate::params::{Params, Spec, Start};
use crate::phm::{Phm, PhmConfig};
use crate::sites::{SiteId, SiteKind, Sites, WeightId};
use crate::targets::{Layers, Selection, Towers};
use crate::{Error, Result};

/// See [`BottleneckConfig`].
#[derive(Debug)]
pub struct Bottleneck;

/// Options of bottleneck adapters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BottleneckConfig {
    /// `houlsby`: behind attention and MLP. `pfeiffer`: behind the MLP only, half the parameters.
    /// `parallel`: beside the MLP, from its normed input.
    pub placement: Placement,
    /// The hidden width is the model's width divided by this, at least 1. Higher: fewer parameters.
    pub reduction: usize,
    /// `relu`, `gelu`, `quick_gelu`, `gelu_tanh`, `silu`, `tanh` or `identity`.
    pub activation: Activation,
    /// Multiplies the adapter's output. Higher: acts like a higher learning rate.
    pub scale: f64,
    /// Compacter: matrices as sums of Kronecker products, `{ n: 4, rank: 1, shared: true }`; plain ones when left out. A small
    /// fraction of the parameters, less capacity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hypercomplex: Option<PhmConfig>,
    /// `vision`, `text` or `both`. `vision` keeps class prompts fixed.
    pub towers: Towers,
    /// Blocks: `[10, 11]`, `"6..12"` or `{ last: 2 }`; all when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
}

/// Where the adapters sit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// Houlsby et al. 2019.
    Houlsby,
    /// Pfeiffer et al. 2020.
    Pfeiffer,
    /// He et al. 2021.
    Parallel,
}

impl Default for BottleneckConfig {
    fn default() -> Self {
        Self {
            placement: Placement::Pfeiffer,
            reduction: 16,
            activation: Activation::Relu,
            scale: 1.0,
            hypercomplex: None,
            towers: Towers::Both,
            layers: None,
        }
    }
}

struct Narrow {
    down: (Matrix, Tensor),
    up: (Matrix, Tensor),
}

enum Matrix {
    Plain(Tensor),
    Hypercomplex(Phm),
}

impl Matrix {
    /// [out, in].
    fn weight(&self) -> TensorResult<Tensor> {
        match self {
            Self::Plain(w) => Ok(w.clone()),
            Self::Hypercomplex(phm) => phm.weight(),
        }
    }
}

struct BottleneckPatch {
    adapters: HashMap<SiteId, Narrow>,
    parallel: bool,
    activation: Activation,
    scale: f64,
}

impl Method for Bottleneck {
    const NAME: &'static str = "bottleneck";
    const SOURCE: &'static str = "Houlsby et al. 2019 (arXiv 1902.00751), h + s·U f(D h); parallel: He et al. 2021 (arXiv 2110.04366), \
         h + s·U f(D x); hypercomplex: Karimi Mahabadi et al. 2021 (arXiv 2106.04647), eq. 6";
    const INIT: Init = Init::Identity;
    type Config = BottleneckConfig;

    fn examples() -> Vec<BottleneckConfig> {
        let base = BottleneckConfig { reduction: 4, ..Default::default() };
        vec![
            base.clone(),
            BottleneckConfig { placement: Placement::Houlsby, activation: Activation::Gelu, ..base.clone() },
            BottleneckConfig {
                placement: Placement::Parallel,
                scale: 4.0,
                activation: Activation::Silu,
                layers: Some(Layers::List(vec![0])),
                ..base.clone()
            },
            BottleneckConfig { reduction: 2, hypercomplex: Some(PhmConfig { n: 2, ..Default::default() }), ..base.clone() },
            BottleneckConfig {
                reduction: 1,
                placement: Placement::Houlsby,
                hypercomplex: Some(PhmConfig { rank: 2, shared: false, ..Default::default() }),
                ..base
            },
        ]
    }

    fn plan(config: &BottleneckConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        if config.reduction == 0 {
            return Err(Error::config("reduction", "expected at least 1, found 0"));
        }
        if !config.scale.is_finite() || config.scale == 0.0 {
            return Err(Error::config("scale", format!("expected a number other than 0, found {}", config.scale)));
        }
        let both = config.placement == Placement::Houlsby;
        let selection = Selection { targets: None, towers: config.towers, layers: config.layers.as_ref() };
        let found = selection.sites(sites, |k| matches!(k, SiteKind::Branch { mlp, .. } if *mlp || both))?;
        let shared = match &config.hypercomplex {
            Some(phm) => {
                phm.check()?;
                phm.shared.then(|| phm.rule("base_model.model.phm_rule".into(), params)).transpose()?
            }
            None => None,
        };
        let mut adapters = HashMap::new();
        for (id, site) in found {
            let SiteKind::Branch { dim, .. } = site.kind else { continue };
            if config.reduction > dim {
                return Err(Error::config(
                    "reduction",
                    format!("expected 1 to {dim} at {} (its width), found {}", site.path, config.reduction),
                ));
            }
            let hidden = dim / config.reduction;
            let mut layer = |part: &str, (output, input): (usize, usize), zero: bool| -> Result<(Matrix, Tensor)> {
                let name = format!("base_model.model.{}.adapter_{part}", site.path);
                let weight = match &config.hypercomplex {
                    None => {
                        let start = if zero { Start::Zeros } else { Start::KaimingUniform { fan_in: input } };
                        Matrix::Plain(params.declare(Spec::new(format!("{name}.weight"), (output, input), start))?)
                    }
                    Some(phm) => {
                        let rule = shared.clone().map_or_else(|| phm.rule(format!("{name}.phm_rule"), params), Ok)?;
                        Matrix::Hypercomplex(Phm::plan(phm, rule, &name, (output, input), zero, params)?)
                    }
                };
                Ok((weight, params.declare(Spec::new(format!("{name}.bias"), output, Start::Zeros))?))
            };
            let (down, up) = (layer("down", (hidden, dim), false)?, layer("up", (dim, hidden), true)?);
            adapters.insert(id, Narrow { down, up });
        }
        let parallel = config.placement == Placement::Parallel;
        Ok(Box::new(BottleneckPatch { adapters, parallel, activation: config.activation, scale: config.scale }))
    }

    fn to_adapter_config(config: &BottleneckConfig, _sites: &Sites) -> Result<Value> {
        Ok(json!({ "peft_type": "BOTTLENECK", "base_model_name_or_path": null, "config": config }))
    }

    fn from_adapter_config(value: &Value) -> Result<BottleneckConfig> {
        serde_json::from_value(value["config"].clone()).map_err(|e| Error::config("config", crate::wording::plain(&e.to_string())))
    }
}

impl Patch for BottleneckPatch {
    fn branch(&self, at: SiteId, branch: Branch<'_>) -> TensorResult<Tensor> {
        let Some(Narrow { down, up }) = self.adapters.get(&at) else { return Ok(branch.output) };
        let x = if self.parallel { branch.input } else { &branch.output };
        let dtype = x.dtype();
        let cast = |t: &Tensor| t.to_dtype(dtype);
        let h = ops::linear(x, &cast(&down.0.weight()?)?, Some(&cast(&down.1)?))?;
        let h = ops::activation(&h, self.activation)?;
        let y = ops::linear(&h, &cast(&up.0.weight()?)?, Some(&cast(&up.1)?))?;
        let y = if self.scale == 1.0 { y } else { (y * self.scale)? };
        ops::add(&branch.output, &y)
    }

    fn unfoldable(&self) -> Option<&'static str> {
        Some("a bottleneck's non-linearity cannot be folded into plain CLIP's weights")
    }

    fn fold(&self, _id: WeightId, _value: &Tensor) -> TensorResult<Fold> {
        Ok(Fold::Unchanged)
    }
}
