//! Prefix tuning: learned keys and values in front of those of every attention layer.

use std::collections::HashMap;

use candle_core::{Result as TensorResult, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::flow::Qkv;
use crate::method::{Fold, Init, Method, Patch, Step};
use crate::ops;
use crate::params::{Params, Spec, Start};
use crate::sites::{SiteId, SiteKind, Sites, Tower, WeightId};
use crate::targets::{Layers, Selection, Towers};
use crate::{Error, Result};

/// See [`PrefixConfig`].
#[derive(Debug)]
pub struct Prefix;

/// Options of prefix tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PrefixConfig {
    /// Learned keys and values a layer, at least 1. Higher: more capacity, slower attention.
    pub length: usize,
    /// `vision`, `text` or `both`. `vision` keeps class prompts fixed.
    pub towers: Towers,
    /// Blocks: `[10, 11]`, `"6..12"` or `{ last: 2 }`; all when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
    /// Standard deviation of the initial keys and values (or embeddings, with `reparameterise`).
    pub init_std: f64,
    /// Hidden width of the MLP that makes keys and values from one embedding a tower while training; it is
    /// dropped on save. Steadier at high learning rates; off when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reparameterise: Option<usize>,
}

impl Default for PrefixConfig {
    fn default() -> Self {
        Self { length: 8, towers: Towers::Both, layers: None, init_std: 0.02, reparameterise: None }
    }
}

/// A sequence longer than this is a mistake.
const MAX_LENGTH: usize = 4096;

impl PrefixConfig {
    fn check(&self) -> Result<()> {
        if !(1..=MAX_LENGTH).contains(&self.length) {
            return Err(Error::config("length", format!("expected 1 to {MAX_LENGTH}, found {}", self.length)));
        }
        if !(self.init_std >= 0.0 && self.init_std.is_finite()) {
            return Err(Error::config("init_std", format!("expected a number from 0, found {}", self.init_std)));
        }
        match self.reparameterise {
            Some(0) => Err(Error::config("reparameterise", "expected a width of at least 1, found 0")),
            _ => Ok(()),
        }
    }
}

/// Keys and values of a layer, [L, D] each.
#[derive(Clone)]
struct Pair {
    key: Tensor,
    value: Tensor,
}

/// Li & Liang 2021, section 4.3: P = MLP(P'), one embedding and one MLP for a tower.
struct Generator {
    sites: Vec<(SiteId, String)>,
    embedding: Tensor,
    down: (Tensor, Tensor),
    up: (Tensor, Tensor),
}

struct PrefixPatch {
    pairs: HashMap<SiteId, Pair>,
    generators: Vec<Generator>,
}

impl Method for Prefix {
    const NAME: &'static str = "prefix";
    const SOURCE: &'static str = "Li & Liang 2021 (arXiv 2101.00190), eq. 3: attention over [P_k; K], [P_v; V]";
    const INIT: Init = Init::Changes;
    type Config = PrefixConfig;

    fn examples() -> Vec<PrefixConfig> {
        vec![
            PrefixConfig { length: 3, ..Default::default() },
            PrefixConfig { length: 2, towers: Towers::Text, layers: Some(Layers::List(vec![1])), ..Default::default() },
            PrefixConfig { length: 2, reparameterise: Some(6), init_std: 0.5, ..Default::default() },
        ]
    }

    fn plan(config: &PrefixConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        config.check()?;
        let selection = Selection { targets: None, towers: config.towers, layers: config.layers.as_ref() };
        let found = selection.sites(sites, |k| matches!(k, SiteKind::Attention { .. }))?;
        let mut patch = PrefixPatch { pairs: HashMap::new(), generators: Vec::new() };
        let Some(hidden) = config.reparameterise else {
            for (id, site) in found {
                let SiteKind::Attention { dim, .. } = site.kind else { continue };
                let start = Start::Normal { std: config.init_std };
                let [key, value] = names(&site.path).map(|n| Spec::new(n, (config.length, dim), start.clone()));
                patch.pairs.insert(id, Pair { key: params.declare(key)?, value: params.declare(value)? });
            }
            return Ok(Box::new(patch));
        };
        for tower in [Tower::Vision, Tower::Text] {
            let sites: Vec<_> = found.iter().filter(|(_, s)| s.tower == tower).collect();
            let Some(SiteKind::Attention { dim, .. }) = sites.first().map(|(_, s)| s.kind) else { continue };
            let sites: Vec<_> = sites.iter().map(|(id, s)| (*id, s.path.clone())).collect();
            patch.generators.push(Generator::new(config, hidden, tower, dim, sites, params)?);
        }
        Ok(Box::new(patch))
    }

    fn to_adapter_config(config: &PrefixConfig, _sites: &Sites) -> Result<Value> {
        // The file holds the finished keys and values.
        let saved = PrefixConfig { reparameterise: None, ..config.clone() };
        Ok(json!({ "peft_type": "PREFIX", "base_model_name_or_path": null, "config": saved }))
    }

    fn from_adapter_config(value: &Value) -> Result<PrefixConfig> {
        serde_json::from_value(value["config"].clone()).map_err(|e| Error::config("config", crate::wording::plain(&e.to_string())))
    }
}

fn names(path: &str) -> [String; 2] {
    ["prefix_key", "prefix_value"].map(|part| format!("base_model.model.{path}.{part}"))
}

impl Generator {
    fn new(
        config: &PrefixConfig,
        hidden: usize,
        tower: Tower,
        dim: usize,
        sites: Vec<(SiteId, String)>,
        params: &mut Params,
    ) -> Result<Self> {
        let tower = if tower == Tower::Text { "text_model" } else { "vision_model" };
        let out = sites.len() * 2 * dim;
        let mut declare =
            |part: &str, shape: &[usize], start| params.declare(Spec::new(format!("prefix_mlp.{tower}.{part}"), shape, start));
        let uniform = |fan_in| Start::KaimingUniform { fan_in };
        Ok(Self {
            embedding: declare("embedding", &[config.length, dim], Start::Normal { std: config.init_std })?,
            down: (declare("down.weight", &[hidden, dim], uniform(dim))?, declare("down.bias", &[hidden], Start::Zeros)?),
            up: (declare("up.weight", &[out, hidden], uniform(hidden))?, declare("up.bias", &[out], Start::Zeros)?),
            sites,
        })
    }

    fn run(&self) -> TensorResult<Vec<Pair>> {
        let h = ops::linear(&self.embedding, &self.down.0, Some(&self.down.1))?;
        let h = ops::activation(&h, ops::Activation::Tanh)?;
        let all = ops::linear(&h, &self.up.0, Some(&self.up.1))?;
        let dim = self.embedding.dim(1)?;
        let part = |index: usize| all.narrow(1, index * dim, dim)?.contiguous();
        (0..self.sites.len()).map(|i| Ok(Pair { key: part(2 * i)?, value: part(2 * i + 1)? })).collect()
    }
}

impl Patch for PrefixPatch {
    fn prepare(&mut self, _step: &Step) -> TensorResult<()> {
        for generator in &self.generators {
            let made = generator.run()?;
            self.pairs.extend(generator.sites.iter().map(|(id, _)| *id).zip(made));
        }
        Ok(())
    }

    fn attention(&self, at: SiteId, qkv: Qkv) -> TensorResult<Qkv> {
        let Some(pair) = self.pairs.get(&at) else { return Ok(qkv) };
        let length = pair.key.dim(0)?;
        let join = |prefix: &Tensor, tokens: &Tensor| ops::splice(tokens, &prefix.to_dtype(tokens.dtype())?, 0..0);
        Ok(Qkv { k: join(&pair.key, &qkv.k)?, v: join(&pair.value, &qkv.v)?, prefix: qkv.prefix + length, q: qkv.q })
    }

    fn unfoldable(&self) -> Option<&'static str> {
        Some("prefix keys and values are not weights of plain CLIP")
    }

    fn fold(&self, _id: WeightId, _value: &Tensor) -> TensorResult<Fold> {
        Ok(Fold::Unchanged)
    }

    fn export(&self) -> TensorResult<Option<Vec<(String, Tensor)>>> {
        if self.generators.is_empty() {
            return Ok(None);
        }
        let mut all = Vec::new();
        for generator in &self.generators {
            for ((_, path), pair) in generator.sites.iter().zip(generator.run()?) {
                let [key, value] = names(path);
                all.extend([(key, pair.key), (value, pair.value)]);
            }
        }
        Ok(Some(all))
    }
}
