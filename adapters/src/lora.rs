//! LoRA: low-rank updates of linear layers, in HF PEFT's terms and file format.

use indexmap::IndexMap;
use serde_json::Value;

use crate::Result;
use crate::low_rank::{Factors, LowRankPatch, is_lora};
use crate::method::{Init, Method, Patch};
use crate::params::Params;
use crate::saved::Bias;
use crate::sites::Sites;
use crate::targets::{Layers, Targets, Towers};

pub use crate::low_rank::LoraConfig;

/// See [`LoraConfig`].
#[derive(Debug)]
pub struct Lora;

impl Method for Lora {
    const NAME: &'static str = "lora";
    const SOURCE: &'static str = "Hu et al. 2021 (arXiv 2106.09685), eq. 3: h = W₀x + (α/r)·BAx";
    const INIT: Init = Init::Identity;
    type Config = LoraConfig;

    fn examples() -> Vec<LoraConfig> {
        let base = LoraConfig { rank: 4, alpha: 8.0, ..Default::default() };
        vec![
            base.clone(),
            LoraConfig {
                targets: Targets::Pattern(r".*\.(fc1|fc2|out_proj)".into()),
                rslora: true,
                towers: Towers::Vision,
                layers: Some(Layers::List(vec![1])),
                bias: Bias::LoraOnly,
                ..base.clone()
            },
            LoraConfig {
                targets: Targets::names(&["q_proj", "fc1", "visual_projection", "text_projection"]),
                rank_pattern: IndexMap::from([("fc1".into(), 2)]),
                alpha_pattern: IndexMap::from([("layers.0.self_attn.q_proj".into(), 3.0)]),
                bias: Bias::All,
                ..base.clone()
            },
            LoraConfig { targets: Targets::names(&["patch_embedding", "token_embedding", "position_embedding"]), ..base.clone() },
            LoraConfig { modules_to_save: vec!["visual_projection".into(), "post_layernorm".into()], ..base },
        ]
    }

    fn plan(config: &LoraConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        config.check()?;
        let factors = Factors::plan(config, sites, params)?;
        Ok(Box::new(LowRankPatch::new(config, factors, sites, params)?))
    }

    fn reads(config: &Value) -> bool {
        is_lora(config, false)
    }

    fn to_adapter_config(config: &LoraConfig, sites: &Sites) -> Result<Value> {
        config.to_adapter_config(sites, false)
    }

    fn from_adapter_config(value: &Value) -> Result<LoraConfig> {
        LoraConfig::from_adapter_config(value)
    }
}
