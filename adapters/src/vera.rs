//! VeRA: two random matrices shared by all layers, two trained vectors a layer.

use std::collections::HashMap;

use candle_core::{Device, Result as TensorResult, Tensor};
use rand_mt::Mt;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::flow::{LinearOut, LowRankTerm};
use crate::low_rank::{check_dropout, dropout_mask, is_default};
use crate::method::{Fold, Init, Inverse, Method, Patch, Step};
use crate::params::{Params, Spec, Start};
use crate::saved::{Bias, Saved};
use crate::scope::{self, Scope};
use crate::sites::{SiteId, SiteKind, Sites, WeightId};
use crate::targets::{Layers, Targets, Towers};
use crate::{Error, Result, hf};

/// See [`VeraConfig`].
#[derive(Debug)]
pub struct Vera;

/// Options of VeRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VeraConfig {
    /// Rank r of the shared matrices, 1 to 16384; far above LoRA's, since a unit costs one number a layer. Higher: more
    /// capacity, slower steps.
    pub rank: usize,
    /// Where d starts. Up to 0.1 is recommended; higher: acts like a higher learning rate of b.
    pub d_initial: f64,
    /// Probability in [0, 1) with which inputs are dropped in training. Higher: more regularised.
    pub dropout: f64,
    /// Linear layers: a list of names or a regex over the whole path. More targets: more capacity, slower steps.
    pub targets: Targets,
    /// `vision`, `text` or `both`. One tower alone is faster; `vision` keeps class prompts fixed.
    pub towers: Towers,
    /// Blocks: `[10, 11]`, `"6..12"` or `{ last: 2 }`; all when left out. Only late blocks: faster, less capacity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
    /// Seed of the shared matrices, which are those of HF PEFT for the same seed.
    pub projection_prng_key: u32,
    /// Whether the file holds the shared matrices. `false`: a much smaller file, read again from the seed.
    pub save_projection: bool,
    /// `none`, `all` or `lora_only`: biases that are trained too, all of the model's or those of the targets.
    #[serde(skip_serializing_if = "is_default")]
    pub bias: Bias,
    /// Modules whose own weights are trained and saved beside the update, such as `visual_projection`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub modules_to_save: Vec<String>,
}

impl Default for VeraConfig {
    fn default() -> Self {
        Self {
            rank: 256,
            d_initial: 0.1,
            dropout: 0.0,
            targets: Targets::names(&["q_proj", "k_proj", "v_proj"]),
            towers: Towers::Both,
            layers: None,
            projection_prng_key: 0,
            save_projection: true,
            bias: Bias::None,
            modules_to_save: Vec::new(),
        }
    }
}

/// Beyond any use.
const MAX_RANK: usize = 16384;

impl VeraConfig {
    fn check(&self) -> Result<()> {
        check_dropout("dropout", self.dropout)?;
        if !self.d_initial.is_finite() {
            return Err(Error::config("d_initial", format!("expected a number, found {}", self.d_initial)));
        }
        match (1..=MAX_RANK).contains(&self.rank) {
            true => Ok(()),
            false => Err(Error::config("rank", format!("expected 1 to {MAX_RANK}, found {}", self.rank))),
        }
    }

    fn scope(&self) -> Scope<'_> {
        Scope {
            targets: &self.targets,
            towers: self.towers,
            layers: self.layers.as_ref(),
            exclude: None,
            modules_to_save: &self.modules_to_save,
        }
    }
}

/// torch's `uniform_(-bound, bound)` with Kaiming's bound √3·√2/√columns.
fn kaiming(generator: &mut Mt, rows: usize, columns: usize) -> TensorResult<Tensor> {
    const DIGITS: u32 = 24;
    let bound = (3.0_f64.sqrt() * (2.0_f64.sqrt() / (columns as f64).sqrt())) as f32;
    let mut draw = || {
        let x = f64::from(generator.next_u32() & ((1 << DIGITS) - 1)) / f64::from(1_u32 << DIGITS);
        (x * f64::from(bound - -bound) + f64::from(-bound)) as f32
    };
    let values: Vec<f32> = (0..rows * columns).map(|_| draw()).collect();
    Tensor::from_vec(values, (rows, columns), &Device::Cpu)
}

impl Method for Vera {
    const NAME: &'static str = "vera";
    const SOURCE: &'static str = "Kopiczko et al. 2024 (arXiv 2310.11454), eq. 2: h = W₀x + Λ_b B Λ_d A x";
    const INIT: Init = Init::Identity;
    type Config = VeraConfig;

    fn examples() -> Vec<VeraConfig> {
        let base = VeraConfig { rank: 6, ..Default::default() };
        vec![
            base.clone(),
            VeraConfig {
                targets: Targets::names(&["q_proj", "fc1", "fc2", "visual_projection"]),
                save_projection: false,
                projection_prng_key: 7,
                bias: Bias::LoraOnly,
                modules_to_save: vec!["text_projection".into()],
                ..base
            },
        ]
    }

    fn plan(config: &VeraConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        config.check()?;
        let found = config.scope().sites(sites, scope::linear)?;
        let (mut widest, mut layers, mut by_weight) = ((0, 0), HashMap::new(), HashMap::new());
        for (id, site) in &found {
            let SiteKind::Linear { input, output } = site.kind else { continue };
            widest = (widest.0.max(input), widest.1.max(output));
            let mut declare = |part: &str, size: usize, start: f64| {
                params.declare(Spec::new(format!("base_model.model.{}.vera_lambda_{part}", site.path), size, Start::Constant(start)))
            };
            let layer = Layer { b: declare("b", output, 0.0)?, d: declare("d", config.rank, config.d_initial)?, size: (input, output) };
            if let Some((weight, _)) = sites.weight(&format!("{}.weight", site.path)) {
                by_weight.insert(weight, *id);
            }
            layers.insert(*id, layer);
        }
        let mut generator = Mt::new(config.projection_prng_key);
        let mut shared = |name: &str, (rows, columns): (usize, usize)| -> Result<Tensor> {
            let start = kaiming(&mut generator, rows, columns)?;
            if !config.save_projection {
                return Ok(start.to_dtype(params.dtype())?.to_device(params.device())?);
            }
            params.declare(Spec { frozen: true, ..Spec::new(format!("base_model.vera_{name}"), (rows, columns), Start::Value(start)) })
        };
        let (a, b) = (shared("A", (config.rank, widest.0))?, shared("B", (widest.1, config.rank))?);
        let paths: Vec<&str> = found.iter().map(|(_, s)| s.path.as_str()).collect();
        let saved = Saved::plan(&config.modules_to_save, config.bias, &paths, sites, params)?;
        Ok(Box::new(VeraPatch { layers, by_weight, a, b, saved, dropout: config.dropout, step: Step::eval() }))
    }

    fn to_adapter_config(config: &VeraConfig, sites: &Sites) -> Result<Value> {
        let mut fields = config.scope().fields(sites, scope::linear)?;
        let own = json!({
            "bias": config.bias.to_json("vera"),
            "d_initial": config.d_initial,
            "fan_in_fan_out": false,
            "init_weights": true,
            "projection_prng_key": config.projection_prng_key,
            "r": config.rank,
            "save_projection": config.save_projection,
            "vera_dropout": config.dropout,
        });
        if let (Value::Object(fields), Value::Object(own)) = (&mut fields, own) {
            fields.remove("exclude_modules");
            fields.extend(own);
        }
        Ok(hf::config("VERA", fields))
    }

    fn from_adapter_config(value: &Value) -> Result<VeraConfig> {
        const OWN: &[&str] = &["r", "bias", "d_initial", "init_weights", "projection_prng_key", "save_projection", "vera_dropout"];
        let object = hf::object(value)?;
        let keys: Vec<&str> = OWN.iter().chain(hf::ScopeFields::KEYS).copied().filter(|k| *k != "exclude_modules").collect();
        hf::refuse_others(object, &keys)?;
        let (scope, default) = (hf::ScopeFields::read(object)?, VeraConfig::default());
        Ok(VeraConfig {
            rank: hf::field(object, "r")?.unwrap_or(default.rank),
            d_initial: hf::field(object, "d_initial")?.unwrap_or(default.d_initial),
            dropout: hf::field(object, "vera_dropout")?.unwrap_or(0.0),
            targets: scope.targets,
            towers: scope.towers,
            layers: scope.layers,
            projection_prng_key: hf::field(object, "projection_prng_key")?.unwrap_or(0),
            save_projection: hf::field(object, "save_projection")?.unwrap_or(true),
            bias: Bias::read(object)?,
            modules_to_save: scope.modules_to_save,
        })
    }
}

/// The trained vectors of a layer.
struct Layer {
    /// [out].
    b: Tensor,
    /// [r].
    d: Tensor,
    size: (usize, usize),
}

struct VeraPatch {
    layers: HashMap<SiteId, Layer>,
    by_weight: HashMap<WeightId, SiteId>,
    /// [r, widest input].
    a: Tensor,
    /// [widest output, r].
    b: Tensor,
    saved: Saved,
    dropout: f64,
    step: Step,
}

impl VeraPatch {
    /// Λ_d A [r, in] and Λ_b B [out, r] of a layer: the corner of the shared matrices that fits.
    fn factors(&self, layer: &Layer) -> TensorResult<(Tensor, Tensor)> {
        let a = self.a.narrow(1, 0, layer.size.0)?.broadcast_mul(&layer.d.unsqueeze(1)?)?;
        let b = self.b.narrow(0, 0, layer.size.1)?.broadcast_mul(&layer.b.unsqueeze(1)?)?;
        Ok((a, b))
    }
}

impl Patch for VeraPatch {
    fn prepare(&mut self, step: &Step) -> TensorResult<()> {
        self.step = *step;
        Ok(())
    }

    fn weight(&self, id: WeightId, value: Tensor) -> TensorResult<Tensor> {
        self.saved.weight(id, value)
    }

    fn linear(&self, at: SiteId, y: LinearOut) -> TensorResult<LinearOut> {
        let Some(layer) = self.layers.get(&at) else { return Ok(y) };
        let (a, b) = self.factors(layer)?;
        let dropout = dropout_mask(&self.step, self.dropout, at, "vera", y.x())?;
        let dtype = y.x().dtype();
        y.low_rank(LowRankTerm { a: a.to_dtype(dtype)?, b: b.to_dtype(dtype)?, scale: 1.0, dropout })
    }

    fn inverse(&self) -> Inverse {
        Inverse::Subtract
    }

    fn fold(&self, id: WeightId, value: &Tensor) -> TensorResult<Fold> {
        let Some(layer) = self.by_weight.get(&id).and_then(|site| self.layers.get(site)) else { return Ok(Fold::Unchanged) };
        let (a, b) = self.factors(layer)?;
        Ok(Fold::Replace((value + b.detach().matmul(&a.detach())?.to_dtype(value.dtype())?)?))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// `torch.empty(2, 3).uniform_(-b, b, generator=torch.Generator().manual_seed(7))` with peft's `_kaiming_init`.
    #[test]
    fn projections_are_torchs() {
        let drawn = kaiming(&mut Mt::new(7), 2, 3).unwrap().to_vec2::<f32>().unwrap();
        let torch = [[0.098_775_856_f32, -0.851_913_2, 0.450_318_66], [0.443_752_7, -0.755_864_44, -0.211_958_35]];
        assert_eq!(drawn, torch);
    }
}
