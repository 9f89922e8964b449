//! PiSSA: LoRA that starts from a weight's principal singular vectors.

use serde_json::Value;

use crate::Result;
use crate::linalg;
use crate::low_rank::{LoraConfig, ResidualPatch};
use crate::method::{Init, Method, Patch};
use crate::params::Params;
use crate::sites::Sites;
use crate::targets::Targets;

/// Options as [`LoraConfig`]; ranks go up to half of the smaller dimension, since the file is a LoRA of twice the rank.
#[derive(Debug)]
pub struct Pissa;

impl Method for Pissa {
    const NAME: &'static str = "pissa";
    const SOURCE: &'static str = "Meng et al. 2024 (arXiv 2404.02948), eq. 2–4: A₀ = S^½Vᵀ, B₀ = U S^½ of W's largest r, on W − s·B₀A₀";
    const INIT: Init = Init::Approximate(1e-5);
    type Config = LoraConfig;

    fn examples() -> Vec<LoraConfig> {
        let base = LoraConfig { rank: 4, alpha: 8.0, ..Default::default() };
        let targets = Targets::names(&["fc1", "fc2", "text_projection"]);
        vec![base.clone(), LoraConfig { rslora: true, rank: 3, targets, modules_to_save: vec!["post_layernorm".into()], ..base }]
    }

    fn plan(config: &LoraConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        let patch = ResidualPatch::plan(config, sites, params, |weight, base, rank, scale| {
            let svd = linalg::svd(sites, weight, base)?;
            let root = (svd.s.narrow(0, 0, rank)? / scale)?.sqrt()?;
            let a = svd.vt.narrow(0, 0, rank)?.broadcast_mul(&root.unsqueeze(1)?)?;
            Ok((a, svd.u.narrow(1, 0, rank)?.broadcast_mul(&root)?))
        })?;
        Ok(Box::new(patch))
    }

    fn reads(_config: &Value) -> bool {
        // The file is LoRA's.
        false
    }

    fn to_adapter_config(config: &LoraConfig, sites: &Sites) -> Result<Value> {
        config.doubled().to_adapter_config(sites, false)
    }

    fn from_adapter_config(value: &Value) -> Result<LoraConfig> {
        LoraConfig::from_adapter_config(value)
    }
}
