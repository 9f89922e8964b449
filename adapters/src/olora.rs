//! OLoRA: LoRA that starts from an orthonormal basis of a weight.

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
pub struct Olora;

impl Method for Olora {
    const NAME: &'static str = "olora";
    const SOURCE: &'static str = "Büyükakyüz 2024 (arXiv 2406.01775), alg. 1: B₀ = Q_r, A₀ = R_r of W = QR, on W − s·B₀A₀";
    const INIT: Init = Init::Approximate(1e-5);
    type Config = LoraConfig;

    fn examples() -> Vec<LoraConfig> {
        let base = LoraConfig { rank: 4, alpha: 8.0, ..Default::default() };
        vec![base.clone(), LoraConfig { targets: Targets::names(&["out_proj", "fc1"]), dropout: 0.1, ..base }]
    }

    fn plan(config: &LoraConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        let patch = ResidualPatch::plan(config, sites, params, |weight, base, rank, _scale| {
            let parts = sites.derived(weight, &format!("qr{rank}"), || {
                let (q, r) = linalg::qr(base)?;
                Ok(vec![r.narrow(0, 0, rank)?.contiguous()?, q.narrow(1, 0, rank)?.contiguous()?])
            })?;
            Ok((parts[0].clone(), parts[1].clone()))
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
