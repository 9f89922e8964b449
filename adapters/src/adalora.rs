//! AdaLoRA: low-rank updates as P Λ Q, whose singular values are given to the layers where they matter.

use std::collections::HashMap;

use candle_core::{Result as TensorResult, Tensor};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::allocator::{Allocator, Schedule};
use crate::flow::{LinearOut, LowRankTerm};
use crate::grads::Grads;
use crate::low_rank::{check_dropout, check_init, check_positive, dropout_mask, is_default};
use crate::method::{Fold, Init, Inverse, Method, Patch, Step};
use crate::params::{Params, Spec, Start};
use crate::saved::{Bias, Saved};
use crate::scope::{self, Scope};
use crate::sites::{SiteId, SiteKind, Sites, WeightId};
use crate::targets::{Layers, Targets, Towers};
use crate::{Error, Result, hf};

/// See [`AdaloraConfig`].
#[derive(Debug)]
pub struct Adalora;

/// Options of AdaLoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdaloraConfig {
    /// Rank of every target at the start, from 1. Higher: more to choose from, slower steps.
    pub init_r: usize,
    /// Mean rank of the targets at the end, from 1 to `init_r`. Higher: more capacity, larger file. A best epoch from before the
    /// end keeps the ranks that it had.
    pub target_r: usize,
    /// α: the update is scaled by α/init_r. Higher: acts like a higher learning rate.
    pub alpha: f64,
    /// Optimiser steps before ranks are taken away.
    pub tinit: usize,
    /// Optimiser steps at the end during which ranks stay.
    pub tfinal: usize,
    /// Optimiser steps between two allocations, at least 1.
    pub delta_t: usize,
    /// Smoothing of the sensitivities, in (0, 1). Higher: slower to change its mind.
    pub beta1: f64,
    /// Smoothing of their uncertainty, in (0, 1).
    pub beta2: f64,
    /// Weight of ‖PᵀP − I‖ + ‖QQᵀ − I‖ in the loss, from 0. Higher: P and Q closer to orthogonal.
    pub orth_reg_weight: f64,
    /// Probability in [0, 1) with which inputs are dropped in training. Higher: more regularised.
    pub dropout: f64,
    /// Linear layers: a list of names or a regex over the whole path. More targets: more to choose from, slower steps.
    pub targets: Targets,
    /// `vision`, `text` or `both`. One tower alone is faster; `vision` keeps class prompts fixed.
    pub towers: Towers,
    /// Blocks: `[10, 11]`, `"6..12"` or `{ last: 2 }`; all when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
    /// Which of the initial ranks a trained adapter has kept, by `<path>.lora_E`; training sets it.
    #[serde(skip_serializing_if = "IndexMap::is_empty")]
    pub rank_pattern: IndexMap<String, Vec<bool>>,
    /// `none`, `all` or `lora_only`: biases that are trained too, all of the model's or those of the targets.
    #[serde(skip_serializing_if = "is_default")]
    pub bias: Bias,
    /// Modules whose own weights are trained and saved beside the update, such as `visual_projection`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub modules_to_save: Vec<String>,
    /// Modules to leave out of the targets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude: Option<Targets>,
}

impl Default for AdaloraConfig {
    fn default() -> Self {
        Self {
            init_r: 12,
            target_r: 8,
            alpha: 16.0,
            tinit: 0,
            tfinal: 0,
            delta_t: 1,
            beta1: 0.85,
            beta2: 0.85,
            orth_reg_weight: 0.5,
            dropout: 0.0,
            targets: Targets::names(&["q_proj", "k_proj", "v_proj"]),
            towers: Towers::Both,
            layers: None,
            rank_pattern: IndexMap::new(),
            bias: Bias::None,
            modules_to_save: Vec::new(),
            exclude: None,
        }
    }
}

impl AdaloraConfig {
    fn check(&self) -> Result<()> {
        check_dropout("dropout", self.dropout)?;
        check_positive("alpha", self.alpha)?;
        for (key, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(beta > 0.0 && beta < 1.0) {
                return Err(Error::config(key, format!("expected a number between 0 and 1, found {beta}")));
            }
        }
        if !(self.orth_reg_weight >= 0.0 && self.orth_reg_weight.is_finite()) {
            return Err(Error::config("orth_reg_weight", format!("expected a number from 0, found {}", self.orth_reg_weight)));
        }
        if self.delta_t == 0 {
            return Err(Error::config("delta_t", "expected at least 1 step, found 0"));
        }
        match (1..=self.init_r).contains(&self.target_r) {
            true => Ok(()),
            false => Err(Error::config("target_r", format!("expected 1 to init_r, which is {}, found {}", self.init_r, self.target_r))),
        }
    }

    fn scope(&self) -> Scope<'_> {
        Scope {
            targets: &self.targets,
            towers: self.towers,
            layers: self.layers.as_ref(),
            exclude: self.exclude.as_ref(),
            modules_to_save: &self.modules_to_save,
        }
    }

    fn schedule(&self) -> Schedule {
        Schedule {
            tinit: self.tinit,
            tfinal: self.tfinal,
            delta_t: self.delta_t,
            target_r: self.target_r,
            beta1: self.beta1,
            beta2: self.beta2,
        }
    }
}

impl Method for Adalora {
    const NAME: &'static str = "adalora";
    const SOURCE: &'static str = "Zhang et al. 2023 (arXiv 2303.10512), eq. 3: W₀ + (α/r)·PΛQ; eq. 4 (orthogonality), 8–12 (importance)";
    const INIT: Init = Init::Identity;
    type Config = AdaloraConfig;

    fn examples() -> Vec<AdaloraConfig> {
        let base = AdaloraConfig { init_r: 4, target_r: 2, ..Default::default() };
        vec![
            base.clone(),
            AdaloraConfig {
                targets: Targets::names(&["fc1", "out_proj", "text_projection"]),
                rank_pattern: IndexMap::from([
                    ("vision_model.encoder.layers.0.mlp.fc1.lora_E".into(), vec![true, false, true, false]),
                    ("text_model.encoder.layers.1.mlp.fc1.lora_E".into(), vec![false; 4]),
                ]),
                dropout: 0.1,
                bias: Bias::LoraOnly,
                modules_to_save: vec!["visual_projection".into()],
                ..base
            },
        ]
    }

    fn plan(config: &AdaloraConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        config.check()?;
        let targets = config.scope().sites(sites, scope::linear)?;
        let mut patch = AdaloraPatch {
            triplets: Vec::new(),
            by_site: HashMap::new(),
            by_weight: HashMap::new(),
            saved: Saved::default(),
            allocator: Allocator::new(config.schedule()),
            scale: config.alpha / (config.init_r as f64 + 1e-5),
            orthogonality: config.orth_reg_weight,
            dropout: config.dropout,
            step: Step::eval(),
        };
        for (id, site) in &targets {
            let SiteKind::Linear { input, output } = site.kind else { continue };
            let rank = match config.rank_pattern.get(&format!("{}.lora_E", site.path)) {
                Some(kept) if kept.len() != config.init_r => {
                    let message = format!("expected init_r = {} values at {}, found {}", config.init_r, site.path, kept.len());
                    return Err(Error::config("rank_pattern", message));
                }
                Some(kept) => kept.iter().filter(|k| **k).count(),
                None => config.init_r,
            };
            let mut declare = |part: &str, shape: (usize, usize), start: Start| {
                params.declare(Spec::new(format!("base_model.model.{}.lora_{part}", site.path), shape, start))
            };
            let normal = Start::Normal { std: 0.02 };
            let triplet = Triplet {
                path: site.path.clone(),
                a: declare("A", (rank, input), normal.clone())?,
                b: declare("B", (output, rank), normal)?,
                e: declare("E", (rank, 1), Start::Zeros)?,
            };
            if let Some((weight, _)) = sites.weight(&format!("{}.weight", site.path)) {
                patch.by_weight.insert(weight, patch.triplets.len());
            }
            patch.by_site.insert(*id, patch.triplets.len());
            patch.triplets.push(triplet);
        }
        let paths: Vec<&str> = targets.iter().map(|(_, s)| s.path.as_str()).collect();
        patch.saved = Saved::plan(&config.modules_to_save, config.bias, &paths, sites, params)?;
        Ok(Box::new(patch))
    }

    fn to_adapter_config(config: &AdaloraConfig, sites: &Sites) -> Result<Value> {
        let mut fields = config.scope().fields(sites, scope::linear)?;
        let own = json!({
            "alpha_pattern": {},
            "beta1": config.beta1,
            "beta2": config.beta2,
            "bias": config.bias.to_json("lora"),
            "deltaT": config.delta_t,
            "fan_in_fan_out": false,
            "init_lora_weights": true,
            "init_r": config.init_r,
            "lora_alpha": hf::number(config.alpha),
            "lora_dropout": config.dropout,
            "orth_reg_weight": config.orth_reg_weight,
            "r": 8,
            "rank_pattern": if config.rank_pattern.is_empty() { Value::Null } else { json!(config.rank_pattern) },
            "target_r": config.target_r,
            "tfinal": config.tfinal,
            "tinit": config.tinit,
            // HF PEFT wants more than the two together, whatever it loads the adapter for.
            "total_step": config.tinit + config.tfinal + 1,
            "use_dora": false,
            "use_rslora": false,
        });
        if let (Value::Object(fields), Value::Object(own)) = (&mut fields, own) {
            fields.extend(own);
        }
        Ok(hf::config("ADALORA", fields))
    }

    fn from_adapter_config(value: &Value) -> Result<AdaloraConfig> {
        const OWN: &[&str] = &[
            "beta1",
            "beta2",
            "bias",
            "deltaT",
            "init_lora_weights",
            "init_r",
            "lora_alpha",
            "lora_dropout",
            "orth_reg_weight",
            "r",
            "rank_pattern",
            "target_r",
            "tfinal",
            "tinit",
            "total_step",
        ];
        let object = hf::object(value)?;
        check_init(object.get("init_lora_weights"))?;
        hf::refuse_others(object, &[OWN, hf::ScopeFields::KEYS].concat())?;
        let (scope, default) = (hf::ScopeFields::read(object)?, AdaloraConfig::default());
        Ok(AdaloraConfig {
            init_r: hf::field(object, "init_r")?.unwrap_or(default.init_r),
            target_r: hf::field(object, "target_r")?.unwrap_or(default.target_r),
            alpha: hf::field(object, "lora_alpha")?.unwrap_or(8.0),
            tinit: hf::field(object, "tinit")?.unwrap_or(0),
            tfinal: hf::field(object, "tfinal")?.unwrap_or(0),
            delta_t: hf::field(object, "deltaT")?.unwrap_or(1),
            beta1: hf::field(object, "beta1")?.unwrap_or(default.beta1),
            beta2: hf::field(object, "beta2")?.unwrap_or(default.beta2),
            orth_reg_weight: hf::field(object, "orth_reg_weight")?.unwrap_or(default.orth_reg_weight),
            dropout: hf::field(object, "lora_dropout")?.unwrap_or(0.0),
            targets: scope.targets,
            towers: scope.towers,
            layers: scope.layers,
            rank_pattern: hf::field(object, "rank_pattern")?.unwrap_or_default(),
            bias: Bias::read(object)?,
            modules_to_save: scope.modules_to_save,
            exclude: scope.exclude,
        })
    }
}

/// Q, P and Λ of one layer.
struct Triplet {
    path: String,
    /// [r, in].
    a: Tensor,
    /// [out, r].
    b: Tensor,
    /// [r, 1].
    e: Tensor,
}

struct AdaloraPatch {
    triplets: Vec<Triplet>,
    by_site: HashMap<SiteId, usize>,
    by_weight: HashMap<WeightId, usize>,
    saved: Saved,
    allocator: Allocator,
    scale: f64,
    orthogonality: f64,
    dropout: f64,
    step: Step,
}

impl AdaloraPatch {
    /// Which singular values are not zero; all where nothing is taken away yet.
    fn kept(&self) -> TensorResult<Vec<Vec<bool>>> {
        let mut kept = Vec::with_capacity(self.triplets.len());
        for t in &self.triplets {
            let e: Vec<f64> = t.e.detach().flatten_all()?.to_dtype(candle_core::DType::F64)?.to_vec1()?;
            kept.push(e.iter().map(|e| *e != 0.0).collect::<Vec<_>>());
        }
        if kept.iter().flatten().all(|k| !k) {
            kept.iter_mut().flatten().for_each(|k| *k = true);
        }
        Ok(kept)
    }
}

/// The rows of `t` along `dim` that are kept.
fn keep(t: &Tensor, kept: &[bool], dim: usize) -> TensorResult<Tensor> {
    let rows: Vec<u32> = (0..).zip(kept).filter_map(|(i, k)| k.then_some(i)).collect();
    match rows.len() {
        all if all == kept.len() => Ok(t.detach()),
        0 => t.detach().narrow(dim, 0, 0),
        count => t.detach().index_select(&Tensor::from_vec(rows, count, t.device())?, dim),
    }
}

/// ‖M Mᵀ − I‖ of a matrix with r rows.
fn off_orthogonal(m: &Tensor) -> TensorResult<Tensor> {
    let eye = Tensor::eye(m.dim(0)?, m.dtype(), m.device())?;
    (m.matmul(&m.t()?)? - eye)?.sqr()?.sum_all()?.sqrt()
}

impl Patch for AdaloraPatch {
    fn prepare(&mut self, step: &Step) -> TensorResult<()> {
        self.step = *step;
        Ok(())
    }

    fn weight(&self, id: WeightId, value: Tensor) -> TensorResult<Tensor> {
        self.saved.weight(id, value)
    }

    fn linear(&self, at: SiteId, y: LinearOut) -> TensorResult<LinearOut> {
        let Some(t) = self.by_site.get(&at).map(|i| &self.triplets[*i]).filter(|t| t.e.elem_count() > 0) else { return Ok(y) };
        let dtype = y.x().dtype();
        let dropout = dropout_mask(&self.step, self.dropout, at, "lora", y.x())?;
        let a = t.a.broadcast_mul(&t.e)?.to_dtype(dtype)?;
        y.low_rank(LowRankTerm { a, b: t.b.to_dtype(dtype)?, scale: self.scale, dropout })
    }

    fn regulariser(&self) -> TensorResult<Option<Tensor>> {
        let (mut sum, count) = (None, 2 * self.triplets.len());
        if self.orthogonality == 0.0 {
            return Ok(None);
        }
        for t in self.triplets.iter().filter(|t| t.e.elem_count() > 0) {
            let both = (off_orthogonal(&t.a)? + off_orthogonal(&t.b.t()?)?)?;
            sum = Some(match sum {
                Some(sum) => (sum + both)?,
                None => both,
            });
        }
        sum.map(|s| s * (self.orthogonality / count as f64)).transpose()
    }

    fn check_steps(&self, total: usize) -> Result<()> {
        let Schedule { tinit, tfinal, .. } = *self.allocator.schedule();
        match tinit.saturating_add(tfinal) < total {
            true => Ok(()),
            false => Err(Error::config(
                "tinit, tfinal",
                format!(
                    "expected a sum below the {total} optimiser steps of the run, so that ranks can be taken away in between, \
                     found {tinit} + {tfinal}; lower them or train longer"
                ),
            )),
        }
    }

    fn after_backward(&mut self, step: usize, total: usize, grads: &Grads) -> TensorResult<()> {
        for t in &self.triplets {
            let name = |part: &str| format!("base_model.model.{}.lora_{part}", t.path);
            self.allocator.see(step, total, [(name("A"), &t.a), (name("B"), &t.b), (name("E"), &t.e)], grads)?;
        }
        let layers: Vec<_> = self.triplets.iter().map(|t| (format!("base_model.model.{}", t.path), &t.e)).collect();
        self.allocator.allocate(step, total, &layers)
    }

    fn inverse(&self) -> Inverse {
        Inverse::Subtract
    }

    fn fold(&self, id: WeightId, value: &Tensor) -> TensorResult<Fold> {
        let Some(t) = self.by_weight.get(&id).map(|i| &self.triplets[*i]).filter(|t| t.e.elem_count() > 0) else {
            return Ok(Fold::Unchanged);
        };
        let delta = (t.b.detach().matmul(&t.a.detach().broadcast_mul(&t.e.detach())?)? * self.scale)?;
        Ok(Fold::Replace((value + delta.to_dtype(value.dtype())?)?))
    }

    fn export(&self) -> TensorResult<Option<Vec<(String, Tensor)>>> {
        let mut all = Vec::new();
        for (t, kept) in self.triplets.iter().zip(self.kept()?) {
            for (part, value, dim) in [("A", &t.a, 0), ("B", &t.b, 1), ("E", &t.e, 0)] {
                all.push((format!("base_model.model.{}.lora_{part}", t.path), keep(value, &kept, dim)?));
            }
        }
        all.extend(self.saved.export());
        Ok(Some(all))
    }

    fn export_config(&self, config: &mut Value) -> TensorResult<()> {
        let mut pattern = config["rank_pattern"].as_object().cloned().unwrap_or_default();
        for (t, kept) in self.triplets.iter().zip(self.kept()?) {
            let name = format!("{}.lora_E", t.path);
            match pattern.get_mut(&name).and_then(Value::as_array_mut) {
                // Ranks that were gone before stay gone; the others stand in their order.
                Some(before) => {
                    let mut kept = kept.into_iter();
                    before.iter_mut().filter(|b| **b == json!(true)).for_each(|b| *b = json!(kept.next().unwrap_or(true)));
                }
                None => drop(pattern.insert(name, json!(kept))),
            }
        }
        let taken = pattern.values().filter_map(Value::as_array).flatten().any(|k| *k == json!(false));
        config["rank_pattern"] = if taken { Value::Object(pattern) } else { Value::Null };
        Ok(())
    }

    fn state(&self) -> Vec<(String, Tensor)> {
        self.allocator.state()
    }

    fn restore(&mut self, state: &HashMap<String, Tensor>) -> TensorResult<()> {
        self.allocator.restore(state);
        Ok(())
    }
}
