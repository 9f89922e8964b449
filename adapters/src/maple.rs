//! MaPLe: learnt context in the text tower that linear layers carry over into the image tower.

use std::collections::HashMap;

use candle_core::{Result as TensorResult, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::context::{self, ClassPosition, Layout, Replaced};
use crate::flow::{Embedded, Sequence};
use crate::method::{Fold, Init, Method, Patch, Step};
use crate::ops;
use crate::params::{Params, Spec, Start};
use crate::sites::{SiteId, SiteKind, Sites, Tower, WeightId};
use crate::{Error, Result};

/// See [`MapleConfig`].
#[derive(Debug)]
pub struct Maple;

/// Options of MaPLe. The vectors stand in place of the template's first words; what is left of the template stays, as in the
/// authors' code: with two vectors "a photo of a {}." becomes v₁ v₂ "of a {}.".
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MapleConfig {
    /// Learnt vectors in each tower, from 1 to what the context has room for. Higher: more capacity, longer sequences.
    pub n_ctx: usize,
    /// Words whose first `n_ctx` tokens the first block's vectors start from, such as "a photo of a". Random when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<String>,
    /// Standard deviation of vectors that start at random.
    pub init_std: f64,
    /// Blocks of each tower that get vectors of their own, counted from the input. Higher: more capacity. Three quarters of the
    /// shallower tower, the authors' 9 of 12, when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub depth: Option<usize>,
}

impl Default for MapleConfig {
    fn default() -> Self {
        Self { n_ctx: 2, init: None, init_std: 0.02, depth: None }
    }
}

impl MapleConfig {
    fn depth(&self, sites: &Sites) -> Result<usize> {
        let blocks = sites.depth(Tower::Vision).min(sites.depth(Tower::Text));
        let depth = self.depth.unwrap_or((3 * blocks).div_ceil(4));
        match (1..=blocks).contains(&depth) {
            true => Ok(depth),
            false => Err(Error::config("depth", format!("expected 1 to {blocks}, the blocks of the shallower tower, found {depth}"))),
        }
    }
}

/// The vectors of one block: [n, text width], and what makes the image tower's of them.
struct Level {
    context: Tensor,
    coupling: (Tensor, Tensor),
    /// [n, image width], made once for each forward pass.
    image: Option<Tensor>,
}

struct MaplePatch {
    /// By block.
    levels: Vec<Level>,
    entrances: [SiteId; 2],
    /// Where vectors of an earlier block are replaced: the block, and whether it is the text tower's.
    blocks: HashMap<SiteId, (usize, bool)>,
    layout: Layout,
}

impl Method for Maple {
    const NAME: &'static str = "maple";
    const SOURCE: &'static str = "Khattak et al. 2023 (arXiv 2210.03117), eq. 3 to 6: P̃ₖ = Fₖ(Pₖ)";
    const INIT: Init = Init::Changes;
    type Config = MapleConfig;

    fn examples() -> Vec<MapleConfig> {
        vec![MapleConfig::default(), MapleConfig { n_ctx: 3, depth: Some(1), ..Default::default() }]
    }

    fn plan(config: &MapleConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        if !(config.init_std >= 0.0 && config.init_std.is_finite()) {
            return Err(Error::config("init_std", format!("expected a number from 0, found {}", config.init_std)));
        }
        let (text, text_dim, limit) = context::text_entrance(sites)?;
        let entrance = sites.iter().find_map(|(id, s)| match s.kind {
            SiteKind::Embed { dim, .. } if s.tower == Tower::Vision => Some((id, dim)),
            _ => None,
        });
        let (vision, vision_dim) = entrance.ok_or_else(|| Error::config("method", "coupled context needs an image tower"))?;
        let (count, mut start) = context::start(sites, config.n_ctx, config.init.as_deref(), config.init_std, true)?;
        let depth = config.depth(sites)?;
        let mut levels = Vec::with_capacity(depth);
        for level in 0..depth {
            let mut declare = |tower: &str, part: &str, shape: &[usize], start| {
                params.declare(Spec::new(format!("base_model.model.{tower}.encoder.layers.{level}.maple.{part}"), shape, start))
            };
            let start = std::mem::replace(&mut start, Start::Normal { std: config.init_std });
            let uniform = || Start::KaimingUniform { fan_in: text_dim };
            levels.push(Level {
                context: declare("text_model", "ctx", &[count, text_dim], start)?,
                coupling: (
                    declare("vision_model", "proj.weight", &[vision_dim, text_dim], uniform())?,
                    declare("vision_model", "proj.bias", &[vision_dim], uniform())?,
                ),
                image: None,
            });
        }
        let replaced = |(id, s): (SiteId, &crate::Site)| match (s.kind, s.layer) {
            (SiteKind::Tokens { .. }, Some(layer)) if (1..depth).contains(&layer) => Some((id, (layer, s.tower == Tower::Text))),
            _ => None,
        };
        Ok(Box::new(MaplePatch {
            levels,
            entrances: [vision, text],
            blocks: sites.iter().filter_map(replaced).collect(),
            layout: Layout { count, position: ClassPosition::End, replaced: Replaced::First, limit },
        }))
    }

    fn to_adapter_config(config: &MapleConfig, sites: &Sites) -> Result<Value> {
        let saved = MapleConfig { init: None, depth: config.depth.map(|_| config.depth(sites)).transpose()?, ..config.clone() };
        Ok(json!({ "peft_type": "MAPLE", "base_model_name_or_path": null, "config": saved }))
    }

    fn from_adapter_config(value: &Value) -> Result<MapleConfig> {
        serde_json::from_value(value["config"].clone()).map_err(|e| Error::config("config", crate::wording::plain(&e.to_string())))
    }
}

impl MaplePatch {
    /// Vectors for each of `like`'s rows, [B, n, D].
    fn spread(vectors: &Tensor, like: &Tensor) -> TensorResult<Tensor> {
        let (count, dim) = vectors.dims2()?;
        vectors.to_dtype(like.dtype())?.unsqueeze(0)?.broadcast_as((like.dim(0)?, count, dim))
    }

    fn image(&self, level: usize) -> TensorResult<&Tensor> {
        match self.levels.get(level).and_then(|l| l.image.as_ref()) {
            Some(image) => Ok(image),
            None => candle_core::bail!("maple: block {level} was not prepared"),
        }
    }
}

impl Patch for MaplePatch {
    fn prepare(&mut self, _step: &Step) -> TensorResult<()> {
        for level in &mut self.levels {
            level.image = Some(ops::linear(&level.context, &level.coupling.0, Some(&level.coupling.1))?);
        }
        Ok(())
    }

    fn embed(&self, at: SiteId, embedded: Embedded) -> TensorResult<Embedded> {
        if at == self.entrances[1] {
            return context::insert(embedded, &self.levels[0].context, |_| 0, &self.layout);
        }
        if at != self.entrances[0] {
            return Ok(embedded);
        }
        let x = Tensor::cat(&[&embedded.x, &Self::spread(self.image(0)?, &embedded.x)?], 1)?;
        Ok(Embedded { x, ..embedded })
    }

    fn tokens(&self, at: SiteId, sequence: Sequence) -> TensorResult<Sequence> {
        let Some(&(level, text)) = self.blocks.get(&at) else { return Ok(sequence) };
        let Sequence { x, pool } = sequence;
        let (len, count) = (x.dim(1)?, self.layout.count);
        let x = if text {
            let own = Self::spread(&self.levels[level].context, &x)?;
            Tensor::cat(&[&x.narrow(1, 0, 1)?, &own, &x.narrow(1, 1 + count, len - 1 - count)?], 1)?
        } else {
            Tensor::cat(&[&x.narrow(1, 0, len - count)?, &Self::spread(self.image(level)?, &x)?], 1)?
        };
        Ok(Sequence { x, pool })
    }

    fn unfoldable(&self) -> Option<&'static str> {
        Some("learnt tokens are not weights of plain CLIP")
    }

    fn fold(&self, _id: WeightId, _value: &Tensor) -> TensorResult<Fold> {
        Ok(Fold::Unchanged)
    }
}
