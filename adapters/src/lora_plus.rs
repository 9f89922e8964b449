//! LoRA+: LoRA whose B learns faster than its A.

use serde_json::Value;

use crate::Result;
use crate::low_rank::{Factors, LoraConfig, LowRankPatch};
use crate::method::{Init, Method, Patch};
use crate::params::Params;
use crate::sites::Sites;

/// Options as [`LoraConfig`]; `lr_ratio` is 16 when left out. Saved as plain LoRA.
#[derive(Debug)]
pub struct LoraPlus;

/// Hayou et al. recommend 16.
const RATIO: f64 = 16.0;

impl Method for LoraPlus {
    const NAME: &'static str = "lora_plus";
    const SOURCE: &'static str = "Hayou et al. 2024 (arXiv 2402.12354), def. 2: η_B = λ·η_A";
    const INIT: Init = Init::Identity;
    type Config = LoraConfig;

    fn examples() -> Vec<LoraConfig> {
        let base = LoraConfig { rank: 4, alpha: 8.0, ..Default::default() };
        vec![base.clone(), LoraConfig { lr_ratio: Some(4.0), dropout: 0.1, ..base }]
    }

    fn plan(config: &LoraConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        config.check()?;
        let config = LoraConfig { lr_ratio: Some(config.lr_ratio.unwrap_or(RATIO)), ..config.clone() };
        let factors = Factors::plan(&config, sites, params)?;
        Ok(Box::new(LowRankPatch::new(&config, factors, sites, params)?))
    }

    fn reads(_config: &Value) -> bool {
        // The file is LoRA's: a learning rate is nothing of an adapter's.
        false
    }

    fn to_adapter_config(config: &LoraConfig, sites: &Sites) -> Result<Value> {
        config.to_adapter_config(sites, false)
    }

    fn from_adapter_config(value: &Value) -> Result<LoraConfig> {
        LoraConfig::from_adapter_config(value)
    }
}
