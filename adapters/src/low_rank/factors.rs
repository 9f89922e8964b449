//! The factors A and B of each adapted site, as HF PEFT shapes and names them.

use std::collections::HashMap;

use candle_core::{Result as TensorResult, Tensor};

use super::{LoraConfig, idle_patterns, takes};
use crate::flow::LowRankTerm;
use crate::method::Step;
use crate::params::{Params, Spec, Start};
use crate::sites::{Site, SiteId, SiteKind, Sites, WeightId};
use crate::{Error, Result, ops, rng};

/// An update `s B A` of one site's matrix.
#[derive(Debug, Clone)]
pub struct Factor {
    /// [r, in]; for an embedding [r, rows].
    pub a: Tensor,
    /// [out, r]; for an embedding [dim, r].
    pub b: Tensor,
    /// s: α/r or α/√r.
    pub scale: f64,
    /// The weight that the update is for.
    pub weight: WeightId,
    /// Its frozen value; of an embedding [rows, dim], of a convolution [out, C, P, P].
    pub base: Tensor,
    /// Whether it is an embedding's, whose table is the transpose.
    pub embedding: bool,
}

impl Factor {
    /// As a term of a linear layer in the layer's dtype.
    ///
    /// # Errors
    /// When the dtype cannot be converted.
    pub fn term(&self, x: &Tensor, dropout: Option<Tensor>) -> TensorResult<LowRankTerm> {
        Ok(LowRankTerm { a: self.a.to_dtype(x.dtype())?, b: self.b.to_dtype(x.dtype())?, scale: self.scale, dropout })
    }

    /// What an embedding's rows gain: `s A[:, ids]ᵀ Bᵀ`.
    ///
    /// # Shapes
    /// `rows` [..., D] → [..., D]
    ///
    /// # Errors
    /// When an id is outside the table.
    pub fn rows(&self, ids: Option<&Tensor>, rows: &Tensor) -> TensorResult<Tensor> {
        let table = self.a.to_dtype(rows.dtype())?.t()?.contiguous()?;
        let down = match ids {
            Some(ids) => ops::embedding(&table, ids)?,
            None => table,
        };
        ops::linear(&down, &self.b.to_dtype(rows.dtype())?, None)? * self.scale
    }

    /// `s B A` in the weight's own shape, f32.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn delta(&self) -> TensorResult<Tensor> {
        let delta = (self.b.detach().matmul(&self.a.detach())? * self.scale)?;
        if self.embedding { delta.t()?.contiguous() } else { delta.reshape(self.base.shape()) }
    }
}

/// All factors of an adapter.
#[derive(Debug, Default)]
pub struct Factors {
    by_site: HashMap<SiteId, Factor>,
    by_weight: HashMap<WeightId, SiteId>,
}

impl Factors {
    /// Declares A and B at every target.
    ///
    /// # Errors
    /// When the configuration does not fit the model.
    pub fn plan(config: &LoraConfig, sites: &Sites, params: &mut Params) -> Result<Self> {
        let mut factors = Self::default();
        let targets = config.scope().sites(sites, takes)?;
        let mut notes = idle_patterns("rank_pattern", &config.rank_pattern, &targets)?;
        notes.extend(idle_patterns("alpha_pattern", &config.alpha_pattern, &targets)?);
        notes.into_iter().for_each(|note| params.note(note));
        for (id, site) in targets {
            let (input, output) = matrix(&site.kind).unwrap_or_default();
            let (rank, scale) = config.rank_and_scale(site, input, output, input.min(output))?;
            factors.declare(id, site, (rank, scale), config.lr_ratio.unwrap_or(1.0), (None, sites, params))?;
        }
        Ok(factors)
    }

    /// Declares A and B of one site under HF PEFT's names, from LoRA's start or from matrices [r, in] and [out, r].
    ///
    /// # Errors
    /// When another method trains the same tensors.
    pub fn declare(
        &mut self,
        id: SiteId,
        site: &Site,
        (rank, scale): (usize, f64),
        lr_ratio: f64,
        (start, sites, params): (Option<(Tensor, Tensor)>, &Sites, &mut Params),
    ) -> Result<()> {
        let (Some((input, output)), Some((weight, base))) = (matrix(&site.kind), sites.weight(&format!("{}.weight", site.path))) else {
            return Err(Error::config("targets", format!("{} has no weight", site.path)));
        };
        let embedding = matches!(site.kind, SiteKind::Embedding { .. });
        let [name_a, name_b] = factor_names(site);
        let (shape_a, shape_b) = match site.kind {
            SiteKind::Conv { kernel: [c, h, w], .. } => (vec![rank, c, h, w], vec![output, rank, 1, 1]),
            _ => (vec![rank, input], vec![output, rank]),
        };
        let (start_a, start_b) = match (start, embedding) {
            (Some((a, b)), _) => (Start::Value(a.reshape(shape_a.as_slice())?), Start::Value(b.reshape(shape_b.as_slice())?)),
            (None, false) => (Start::KaimingUniform { fan_in: input }, Start::Zeros),
            // As in torch: a table's update starts from zero rows.
            (None, true) => (Start::Zeros, Start::Normal { std: 1.0 }),
        };
        let a = params.declare(Spec::new(name_a, shape_a, start_a))?.reshape((rank, input))?;
        let spec = Spec { lr_factor: lr_ratio, ..Spec::new(name_b, shape_b, start_b) };
        let b = params.declare(spec)?.reshape((output, rank))?;
        self.by_weight.insert(weight, id);
        self.by_site.insert(id, Factor { a, b, scale, weight, base: base.tensor.clone(), embedding });
        Ok(())
    }

    /// The factor at a site.
    #[must_use]
    pub fn at(&self, id: SiteId) -> Option<&Factor> {
        self.by_site.get(&id)
    }

    /// The site and the factor of a weight.
    #[must_use]
    pub fn of(&self, id: WeightId) -> Option<(SiteId, &Factor)> {
        let site = *self.by_weight.get(&id)?;
        Some((site, self.by_site.get(&site)?))
    }

    /// All of them, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (SiteId, &Factor)> {
        self.by_site.iter().map(|(id, f)| (*id, f))
    }

    /// The paths of the adapted modules.
    #[must_use]
    pub fn paths<'s>(&self, sites: &'s Sites) -> Vec<&'s str> {
        sites.iter().filter(|(id, _)| self.by_site.contains_key(id)).map(|(_, s)| s.path.as_str()).collect()
    }
}

/// HF PEFT's names of A and B.
#[must_use]
pub fn factor_names(site: &Site) -> [String; 2] {
    ["A", "B"].map(|part| match site.kind {
        SiteKind::Embedding { .. } => format!("base_model.model.{}.lora_embedding_{part}", site.path),
        _ => format!("base_model.model.{}.lora_{part}.weight", site.path),
    })
}

/// Inputs and outputs of a site's matrix; of a table its rows and their width.
#[must_use]
pub fn matrix(kind: &SiteKind) -> Option<(usize, usize)> {
    match *kind {
        SiteKind::Linear { input, output } => Some((input, output)),
        SiteKind::Conv { kernel, output } => Some((kernel.iter().product(), output)),
        SiteKind::Embedding { rows, dim } => Some((rows, dim)),
        _ => None,
    }
}

/// A mask over a site's input in training; `stream` keeps methods apart.
///
/// # Errors
/// When the mask cannot be made.
pub fn dropout_mask(step: &Step, p: f64, at: SiteId, stream: &str, x: &Tensor) -> TensorResult<Option<Tensor>> {
    if !step.training || p == 0.0 {
        return Ok(None);
    }
    let mut rng = rng::rng(step.seed, &[step.step, at.index() as u64, rng::name_key(stream)]);
    rng::dropout_mask(&mut rng, p, x.shape(), x.dtype(), x.device()).map(Some)
}
