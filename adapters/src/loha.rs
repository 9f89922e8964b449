//! LoHa: an update that is the elementwise product of two low-rank matrices.

use std::collections::HashMap;

use candle_core::{Result as TensorResult, Tensor};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::flow::{LinearOut, LowRankTerm};
use crate::lycoris::{Kept, Options, kept};
use crate::method::{Fold, Init, Inverse, Method, Patch, Step};
use crate::params::{Params, Spec, Start};
use crate::saved::{Bias, Saved};
use crate::scope::Scope;
use crate::sites::{SiteId, SiteKind, Sites, WeightId};
use crate::targets::{Layers, Targets, Towers};
use crate::{Result, hf};

/// See [`LohaConfig`].
#[derive(Debug)]
pub struct Loha;

/// Options of LoHa.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LohaConfig {
    /// Rank r, 1 to 4096. Higher: more capacity, slower steps, larger file.
    pub rank: usize,
    /// α: the update is scaled by α/r. Higher: acts like a higher learning rate.
    pub alpha: f64,
    /// Probability in [0, 1) with which a row of the update is dropped in training. Higher: more regularised.
    pub rank_dropout: f64,
    /// Probability in [0, 1) with which the update of a whole layer is dropped in a training step. Higher: more regularised.
    pub module_dropout: f64,
    /// Linear layers: a list of names or a regex over the whole path. More targets: more capacity, slower steps.
    pub targets: Targets,
    /// `vision`, `text` or `both`. One tower alone is faster; `vision` keeps class prompts fixed.
    pub towers: Towers,
    /// Blocks: `[10, 11]`, `"6..12"` or `{ last: 2 }`; all when left out. Only late blocks: faster, less capacity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
    /// Other ranks for some sites: a key matches a path's end (or is a regex for it), the first match wins.
    #[serde(skip_serializing_if = "IndexMap::is_empty")]
    pub rank_pattern: IndexMap<String, usize>,
    /// Other alphas for some sites.
    #[serde(skip_serializing_if = "IndexMap::is_empty")]
    pub alpha_pattern: IndexMap<String, f64>,
    /// Modules whose own weights are trained and saved beside the update, such as `visual_projection`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub modules_to_save: Vec<String>,
    /// Modules to leave out of the targets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude: Option<Targets>,
}

impl Default for LohaConfig {
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 8.0,
            rank_dropout: 0.0,
            module_dropout: 0.0,
            targets: Targets::names(&["q_proj", "k_proj", "v_proj"]),
            towers: Towers::Both,
            layers: None,
            rank_pattern: IndexMap::new(),
            alpha_pattern: IndexMap::new(),
            modules_to_save: Vec::new(),
            exclude: None,
        }
    }
}

impl LohaConfig {
    fn options(&self) -> Options<'_> {
        Options {
            rank: self.rank,
            alpha: self.alpha,
            rank_pattern: &self.rank_pattern,
            alpha_pattern: &self.alpha_pattern,
            rank_dropout: self.rank_dropout,
            module_dropout: self.module_dropout,
            scope: Scope {
                targets: &self.targets,
                towers: self.towers,
                layers: self.layers.as_ref(),
                exclude: self.exclude.as_ref(),
                modules_to_save: &self.modules_to_save,
            },
        }
    }
}

impl Method for Loha {
    const NAME: &'static str = "loha";
    const SOURCE: &'static str = "Hyeon-Woo et al. 2022 (FedPara, arXiv 2108.06098), prop. 1: ΔW = (α/r)·(X₁Y₁) ∘ (X₂Y₂)";
    const INIT: Init = Init::Identity;
    type Config = LohaConfig;

    fn examples() -> Vec<LohaConfig> {
        let base = LohaConfig { rank: 3, ..Default::default() };
        vec![
            base.clone(),
            LohaConfig {
                targets: Targets::names(&["fc1", "out_proj", "visual_projection"]),
                rank_pattern: IndexMap::from([("fc1".into(), 2)]),
                alpha_pattern: IndexMap::from([("out_proj".into(), 3.0)]),
                rank_dropout: 0.2,
                module_dropout: 0.1,
                modules_to_save: vec!["text_projection".into()],
                ..base
            },
        ]
    }

    fn plan(config: &LohaConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        let options = config.options();
        let (mut layers, mut by_weight) = (HashMap::new(), HashMap::new());
        for (id, site) in options.targets(sites, params)? {
            let SiteKind::Linear { input, output } = site.kind else { continue };
            let (rank, scale) = options.rank_and_scale(site)?;
            let mut declare = |part: &str, shape: (usize, usize), zero: bool| {
                let start = if zero { Start::Zeros } else { Start::KaimingUniform { fan_in: shape.1 } };
                params.declare(Spec::new(format!("base_model.model.{}.hada_{part}", site.path), shape, start))
            };
            let first = (declare("w1_a", (output, rank), false)?, declare("w1_b", (rank, input), false)?);
            let second = (declare("w2_a", (output, rank), false)?, declare("w2_b", (rank, input), true)?);
            if let Some((weight, _)) = sites.weight(&format!("{}.weight", site.path)) {
                by_weight.insert(weight, id);
            }
            layers.insert(id, Layer { first, second, scale });
        }
        let saved = Saved::plan(&config.modules_to_save, Bias::None, &[], sites, params)?;
        let dropout = (config.rank_dropout, config.module_dropout);
        Ok(Box::new(LohaPatch { layers, by_weight, saved, dropout, step: Step::eval() }))
    }

    fn to_adapter_config(config: &LohaConfig, sites: &Sites) -> Result<Value> {
        Ok(hf::config("LOHA", Value::Object(config.options().fields(sites)?)))
    }

    fn from_adapter_config(value: &Value) -> Result<LohaConfig> {
        let object = hf::object(value)?;
        hf::refuse_others(object, &[Options::KEYS, hf::ScopeFields::KEYS].concat())?;
        let scope = hf::ScopeFields::read(object)?;
        Ok(LohaConfig {
            rank: hf::field(object, "r")?.unwrap_or(8),
            alpha: hf::field(object, "alpha")?.unwrap_or(8.0),
            rank_dropout: hf::field(object, "rank_dropout")?.unwrap_or(0.0),
            module_dropout: hf::field(object, "module_dropout")?.unwrap_or(0.0),
            targets: scope.targets,
            towers: scope.towers,
            layers: scope.layers,
            rank_pattern: hf::field(object, "rank_pattern")?.unwrap_or_default(),
            alpha_pattern: hf::field(object, "alpha_pattern")?.unwrap_or_default(),
            modules_to_save: scope.modules_to_save,
            exclude: scope.exclude,
        })
    }
}

/// X₁, Y₁ and X₂, Y₂: [out, r] and [r, in].
struct Layer {
    first: (Tensor, Tensor),
    second: (Tensor, Tensor),
    scale: f64,
}

impl Layer {
    /// The update as one of rank r²: row-wise products of the X, column-wise products of the Y. It is never formed whole.
    fn factors(&self) -> TensorResult<(Tensor, Tensor)> {
        let (output, rank) = self.first.0.dims2()?;
        let input = self.first.1.dim(1)?;
        let b = self.first.0.unsqueeze(2)?.broadcast_mul(&self.second.0.unsqueeze(1)?)?.reshape((output, rank * rank))?;
        let a = self.first.1.unsqueeze(1)?.broadcast_mul(&self.second.1.unsqueeze(0)?)?.reshape((rank * rank, input))?;
        Ok((a, b))
    }
}

struct LohaPatch {
    layers: HashMap<SiteId, Layer>,
    by_weight: HashMap<WeightId, SiteId>,
    saved: Saved,
    dropout: (f64, f64),
    step: Step,
}

impl Patch for LohaPatch {
    fn prepare(&mut self, step: &Step) -> TensorResult<()> {
        self.step = *step;
        Ok(())
    }

    fn weight(&self, id: WeightId, value: Tensor) -> TensorResult<Tensor> {
        self.saved.weight(id, value)
    }

    fn linear(&self, at: SiteId, y: LinearOut) -> TensorResult<LinearOut> {
        let Some(layer) = self.layers.get(&at) else { return Ok(y) };
        let (a, mut b) = layer.factors()?;
        match kept(&self.step, self.dropout, true, at, &b)? {
            Kept::All => {}
            Kept::Nothing => return Ok(y),
            Kept::Rows(mask) => b = b.broadcast_mul(&mask.unsqueeze(1)?)?,
        }
        let dtype = y.x().dtype();
        y.low_rank(LowRankTerm { a: a.to_dtype(dtype)?, b: b.to_dtype(dtype)?, scale: layer.scale, dropout: None })
    }

    fn inverse(&self) -> Inverse {
        Inverse::Subtract
    }

    fn fold(&self, id: WeightId, value: &Tensor) -> TensorResult<Fold> {
        let Some(layer) = self.by_weight.get(&id).and_then(|site| self.layers.get(site)) else { return Ok(Fold::Unchanged) };
        let product = |(x, y): &(Tensor, Tensor)| x.detach().matmul(&y.detach());
        let delta = ((product(&layer.first)? * product(&layer.second)?)? * layer.scale)?;
        Ok(Fold::Replace((value + delta.to_dtype(value.dtype())?)?))
    }
}
