//! LoKr: an update that is a Kronecker product.

use std::collections::HashMap;

use candle_core::{Result as TensorResult, Tensor};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::lycoris::{Kept, Options, kept};
use crate::method::{Fold, Init, Inverse, Method, Patch, Step};
use crate::params::{Params, Spec, Start};
use crate::saved::{Bias, Saved};
use crate::scope::Scope;
use crate::sites::{SiteId, SiteKind, Sites, WeightId};
use crate::targets::{Layers, Targets, Towers};
use crate::{Error, Result, hf};

/// See [`LokrConfig`].
#[derive(Debug)]
pub struct Lokr;

/// Options of LoKr.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LokrConfig {
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
    /// The size of the left matrix's sides, at least 1, where it divides the weight's; the nearest divisors below the square
    /// roots when left out. Higher: larger left, smaller right matrix.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decompose_factor: Option<usize>,
    /// Whether the left matrix is low-rank too. `true`: smaller file, less capacity.
    pub decompose_both: bool,
    /// Whether what `rank_dropout` leaves is scaled up to the same mean.
    pub rank_dropout_scale: bool,
}

impl Default for LokrConfig {
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
            decompose_factor: None,
            decompose_both: false,
            rank_dropout_scale: false,
        }
    }
}

impl LokrConfig {
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

/// Two factors of `n`, the smaller first: `factor` and the rest where it divides, else as near to the square root (and not
/// above `factor`) as HF PEFT comes.
fn factorise(n: usize, factor: Option<usize>) -> (usize, usize) {
    if let Some(f) = factor.filter(|f| *f > 0 && n.is_multiple_of(*f)) {
        return (f, n / f);
    }
    let limit = factor.unwrap_or(n);
    let (mut m, mut rest) = (1, n);
    while m < rest {
        let next = (m + 1..=n).find(|d| n.is_multiple_of(*d)).unwrap_or(n);
        if next + n / next > 1 + n || next > limit {
            break;
        }
        (m, rest) = (next, n / next);
    }
    (m.min(rest), m.max(rest))
}

impl Method for Lokr {
    const NAME: &'static str = "lokr";
    const SOURCE: &'static str = "Yeh et al. 2024 (LyCORIS, arXiv 2309.14859), section 3.2: ΔW = (α/r)·C ⊗ (B A)";
    const INIT: Init = Init::Identity;
    type Config = LokrConfig;

    fn examples() -> Vec<LokrConfig> {
        let base = LokrConfig { rank: 1, alpha: 2.0, ..Default::default() };
        vec![
            base.clone(),
            LokrConfig {
                targets: Targets::names(&["fc1", "out_proj", "visual_projection"]),
                rank: 2,
                rank_pattern: IndexMap::from([("fc1".into(), 1)]),
                decompose_factor: Some(4),
                decompose_both: true,
                rank_dropout: 0.2,
                module_dropout: 0.1,
                modules_to_save: vec!["text_projection".into()],
                ..base.clone()
            },
            LokrConfig { rank: 8, alpha: 8.0, layers: Some(Layers::List(vec![1])), ..base },
        ]
    }

    fn plan(config: &LokrConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        let options = config.options();
        if config.decompose_factor == Some(0) {
            return Err(Error::config("decompose_factor", "expected at least 1, found 0"));
        }
        let mut layers = HashMap::new();
        for (id, site) in options.targets(sites, params)? {
            let (SiteKind::Linear { input, output }, Some((weight, _))) = (site.kind, sites.weight(&format!("{}.weight", site.path)))
            else {
                continue;
            };
            let (rank, scale) = options.rank_and_scale(site)?;
            let mut declare = |part: String, shape: (usize, usize), zero: bool| {
                let start = if zero { Start::Zeros } else { Start::KaimingUniform { fan_in: shape.1 } };
                params.declare(Spec::new(format!("base_model.model.{}.lokr_{part}", site.path), shape, start))
            };
            // A side is low-rank where that saves something; the left one starts at zero.
            let mut side = |name: &str, (rows, columns): (usize, usize), may: bool, zero: bool| -> Result<Side> {
                if may && 2 * rank < rows.max(columns) {
                    return Ok(Side::Product(
                        declare(format!("{name}_a"), (rows, rank), zero)?,
                        declare(format!("{name}_b"), (rank, columns), false)?,
                    ));
                }
                Ok(Side::Whole(declare(name.to_string(), (rows, columns), zero)?))
            };
            let ((out_left, out_right), (in_left, in_right)) =
                (factorise(output, config.decompose_factor), factorise(input, config.decompose_factor));
            let left = side("w1", (out_left, in_left), config.decompose_both, true)?;
            let right = side("w2", (out_right, in_right), true, false)?;
            layers.insert(weight, Layer { at: id, left, right, scale });
        }
        let saved = Saved::plan(&config.modules_to_save, Bias::None, &[], sites, params)?;
        let dropout = (config.rank_dropout, config.module_dropout);
        Ok(Box::new(LokrPatch { layers, saved, dropout, scaled: config.rank_dropout_scale, step: Step::eval() }))
    }

    fn to_adapter_config(config: &LokrConfig, sites: &Sites) -> Result<Value> {
        let mut fields = config.options().fields(sites)?;
        fields.insert("decompose_both".into(), json!(config.decompose_both));
        fields.insert("decompose_factor".into(), config.decompose_factor.map_or(json!(-1), |f| json!(f)));
        fields.insert("rank_dropout_scale".into(), json!(config.rank_dropout_scale));
        Ok(hf::config("LOKR", Value::Object(fields)))
    }

    fn from_adapter_config(value: &Value) -> Result<LokrConfig> {
        let object = hf::object(value)?;
        let own = ["decompose_both", "decompose_factor", "rank_dropout_scale"].as_slice();
        hf::refuse_others(object, &[own, Options::KEYS, hf::ScopeFields::KEYS].concat())?;
        let scope = hf::ScopeFields::read(object)?;
        let factor: i64 = hf::field(object, "decompose_factor")?.unwrap_or(-1);
        Ok(LokrConfig {
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
            decompose_factor: usize::try_from(factor).ok(),
            decompose_both: hf::field(object, "decompose_both")?.unwrap_or(false),
            rank_dropout_scale: hf::field(object, "rank_dropout_scale")?.unwrap_or(false),
        })
    }
}

/// A matrix, or the product of two.
enum Side {
    Whole(Tensor),
    Product(Tensor, Tensor),
}

impl Side {
    fn matrix(&self) -> TensorResult<Tensor> {
        match self {
            Self::Whole(w) => Ok(w.clone()),
            Self::Product(a, b) => a.matmul(b),
        }
    }
}

struct Layer {
    at: SiteId,
    left: Side,
    right: Side,
    scale: f64,
}

impl Layer {
    /// s · C ⊗ D, [out, in].
    fn delta(&self) -> TensorResult<Tensor> {
        let (left, right) = (self.left.matrix()?, self.right.matrix()?);
        let ((a, c), (b, d)) = (left.dims2()?, right.dims2()?);
        let product = left.reshape((a, 1, c, 1))?.broadcast_mul(&right.reshape((1, b, 1, d))?)?;
        product.reshape((a * b, c * d))? * self.scale
    }
}

struct LokrPatch {
    layers: HashMap<WeightId, Layer>,
    saved: Saved,
    dropout: (f64, f64),
    scaled: bool,
    step: Step,
}

impl Patch for LokrPatch {
    fn prepare(&mut self, step: &Step) -> TensorResult<()> {
        self.step = *step;
        Ok(())
    }

    fn weight(&self, id: WeightId, value: Tensor) -> TensorResult<Tensor> {
        let Some(layer) = self.layers.get(&id) else { return self.saved.weight(id, value) };
        let mut delta = layer.delta()?;
        match kept(&self.step, self.dropout, self.scaled, layer.at, &delta)? {
            Kept::All => {}
            Kept::Nothing => return Ok(value),
            Kept::Rows(mask) => delta = delta.broadcast_mul(&mask.unsqueeze(1)?)?,
        }
        // A view, since candle would hand a frozen summand itself a gradient.
        value.reshape(value.shape())? + delta.to_dtype(value.dtype())?
    }

    fn inverse(&self) -> Inverse {
        Inverse::Subtract
    }

    fn fold(&self, _id: WeightId, _value: &Tensor) -> TensorResult<Fold> {
        // `weight` says it all.
        Ok(Fold::Unchanged)
    }
}

#[cfg(test)]
mod tests {
    use super::factorise;

    /// From the docstring of HF PEFT's `factorization`, and what it returns where the factor does not divide.
    #[test]
    fn factors_are_hf_pefts() {
        let cases = [(256, None, (16, 16)), (128, None, (8, 16)), (127, None, (1, 127)), (128, Some(4), (4, 32))];
        let others = [(12, Some(5), (3, 4)), (20, Some(3), (2, 10)), (24, Some(7), (4, 6)), (16, Some(8), (8, 2)), (1, None, (1, 1))];
        for (n, factor, expected) in cases.into_iter().chain(others) {
            assert_eq!(factorise(n, factor), expected, "{n} {factor:?}");
        }
    }
}
