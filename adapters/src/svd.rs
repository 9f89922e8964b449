//! Singular-value fine-tuning: each weight keeps its singular vectors, its singular values are trained.

use std::collections::HashMap;

use candle_core::{Result as TensorResult, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::flow::{LinearOut, LowRankTerm};
use crate::linalg;
use crate::method::{Fold, Init, Inverse, Method, Patch};
use crate::params::{Params, Spec, Start};
use crate::scope;
use crate::sites::{SiteId, SiteKind, Sites, WeightId};
use crate::targets::{Layers, Selection, Targets, Towers};
use crate::{Error, Result};

/// See [`SvdConfig`].
#[derive(Debug)]
pub struct SingularValues;

/// Options of singular-value fine-tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SvdConfig {
    /// Linear layers: a list of names or a regex over the whole path. The default is every layer of a block, as CLIP-SVD has
    /// it. Fewer: faster, less capacity.
    pub targets: Targets,
    /// How many of the largest singular values of a weight are trained; all when left out. Fewer: faster, less capacity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// `vision`, `text` or `both`. `vision` keeps class prompts fixed.
    pub towers: Towers,
    /// Blocks: `[10, 11]`, `"6..12"` or `{ last: 2 }`; all when left out. Only late blocks: faster, less capacity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
}

impl Default for SvdConfig {
    fn default() -> Self {
        let targets = Targets::names(&["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]);
        Self { targets, rank: None, towers: Towers::Both, layers: None }
    }
}

impl Method for SingularValues {
    const NAME: &'static str = "svd";
    const SOURCE: &'static str = "Koleilat et al. 2025 (CLIP-SVD, arXiv 2509.03740): W' = U diag(σ) Vᵀ with U, V of W frozen and σ trained";
    const INIT: Init = Init::Identity;
    type Config = SvdConfig;

    fn examples() -> Vec<SvdConfig> {
        vec![
            SvdConfig::default(),
            SvdConfig {
                targets: Targets::names(&["fc1", "visual_projection"]),
                rank: Some(5),
                towers: Towers::Vision,
                ..Default::default()
            },
        ]
    }

    fn plan(config: &SvdConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        let selection = Selection { targets: Some(&config.targets), towers: config.towers, layers: config.layers.as_ref() };
        let mut patch = SvdPatch { spectra: HashMap::new(), by_weight: HashMap::new() };
        let found = selection.sites(sites, scope::linear)?;
        linalg::svd_all(sites, &found)?;
        for (id, site) in found {
            let (SiteKind::Linear { input, output }, Some((weight, base))) = (site.kind, sites.weight(&format!("{}.weight", site.path)))
            else {
                return Err(Error::config("targets", format!("{} has no weight", site.path)));
            };
            let most = input.min(output);
            let rank = config.rank.unwrap_or(most);
            if !(1..=most).contains(&rank) {
                return Err(Error::config("rank", format!("expected 1 to {most} at {}, found {rank}", site.path)));
            }
            let svd = linalg::svd(sites, weight, &base.tensor)?;
            let start = svd.s.narrow(0, 0, rank)?.to_dtype(params.dtype())?;
            let name = format!("base_model.model.{}.svd_s", site.path);
            let s = params.declare(Spec::new(name, rank, Start::Value(start.clone())))?;
            let (u, vt) = (svd.u.narrow(1, 0, rank)?.contiguous()?, svd.vt.narrow(0, 0, rank)?.contiguous()?);
            patch.by_weight.insert(weight, id);
            patch.spectra.insert(id, Spectrum { u: u.to_dtype(params.dtype())?, vt: vt.to_dtype(base.tensor.dtype())?, start, s });
        }
        Ok(Box::new(patch))
    }

    fn to_adapter_config(config: &SvdConfig, _sites: &Sites) -> Result<Value> {
        Ok(json!({ "peft_type": "SVD", "base_model_name_or_path": null, "config": config }))
    }

    fn from_adapter_config(value: &Value) -> Result<SvdConfig> {
        serde_json::from_value(value["config"].clone()).map_err(|e| Error::config("config", crate::wording::plain(&e.to_string())))
    }
}

/// The trained part of one weight's decomposition.
struct Spectrum {
    /// [out, k].
    u: Tensor,
    /// [k, in].
    vt: Tensor,
    /// σ₀, [k].
    start: Tensor,
    /// σ, [k].
    s: Tensor,
}

impl Spectrum {
    /// U diag(σ − σ₀): the change is added to the weight, so that nothing changes before the first step.
    fn change(&self) -> TensorResult<Tensor> {
        self.u.broadcast_mul(&(&self.s - &self.start)?)
    }
}

struct SvdPatch {
    spectra: HashMap<SiteId, Spectrum>,
    by_weight: HashMap<WeightId, SiteId>,
}

impl Patch for SvdPatch {
    fn linear(&self, at: SiteId, y: LinearOut) -> TensorResult<LinearOut> {
        let Some(spectrum) = self.spectra.get(&at) else { return Ok(y) };
        let b = spectrum.change()?.to_dtype(y.x().dtype())?;
        y.low_rank(LowRankTerm { a: spectrum.vt.clone(), b, scale: 1.0, dropout: None })
    }

    fn inverse(&self) -> Inverse {
        Inverse::Undefined("it changes singular values that only the base has")
    }

    fn fold(&self, id: WeightId, value: &Tensor) -> TensorResult<Fold> {
        let Some(spectrum) = self.by_weight.get(&id).and_then(|site| self.spectra.get(site)) else { return Ok(Fold::Unchanged) };
        let delta = spectrum.change()?.detach().to_dtype(value.dtype())?.matmul(&spectrum.vt.to_dtype(value.dtype())?)?;
        Ok(Fold::Replace((value + delta)?))
    }
}
