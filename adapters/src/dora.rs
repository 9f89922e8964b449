//! DoRA: magnitude and direction of each weight row apart; the direction is LoRA's.

use std::collections::HashMap;

use candle_core::{DType, Result as TensorResult, Tensor};
use serde_json::Value;

use crate::Result;
use crate::flow::LinearOut;
use crate::low_rank::{Factor, Factors, LoraConfig, dropout_mask, is_lora};
use crate::method::{Fold, Init, Inverse, Method, Patch, Step};
use crate::params::{Params, Spec, Start};
use crate::saved::{Bias, Saved};
use crate::sites::{SiteId, SiteKind, Sites, WeightId};
use crate::targets::{Layers, Targets};

/// Options as [`LoraConfig`].
#[derive(Debug)]
pub struct Dora;

impl Method for Dora {
    const NAME: &'static str = "dora";
    const SOURCE: &'static str = "Liu et al. 2024 (arXiv 2402.09353), eq. 5: W' = m·(W₀ + s·BA)/‖W₀ + s·BA‖, norms of rows, detached (4.3)";
    // The magnitude starts as the norm, so that their ratio is 1 but for rounding.
    const INIT: Init = Init::Approximate(1e-5);
    type Config = LoraConfig;

    fn examples() -> Vec<LoraConfig> {
        let base = LoraConfig { rank: 4, alpha: 8.0, ..Default::default() };
        vec![
            base.clone(),
            LoraConfig {
                targets: Targets::names(&["out_proj", "fc1", "fc2", "text_projection"]),
                rslora: true,
                bias: Bias::LoraOnly,
                modules_to_save: vec!["visual_projection".into()],
                ..base.clone()
            },
            LoraConfig { targets: Targets::names(&["patch_embedding", "token_embedding", "position_embedding"]), ..base.clone() },
            LoraConfig { layers: Some(Layers::List(vec![1])), ..base },
        ]
    }

    fn plan(config: &LoraConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        config.check()?;
        let factors = Factors::plan(config, sites, params)?;
        let mut parts = HashMap::new();
        for (id, site) in sites.iter() {
            let Some(factor) = factors.at(id) else { continue };
            let squares = squares(factor)?;
            let norms = Row { squares: squares.clone(), magnitude: squares.clone(), norm: squares };
            let start = norms.length(factor)?;
            let shape = match site.kind {
                SiteKind::Conv { output, .. } => vec![1, output, 1, 1],
                _ => start.dims().to_vec(),
            };
            let name = format!("base_model.model.{}.lora_magnitude_vector", site.path);
            let start = start.reshape(shape.as_slice())?;
            // Decay would pull the weights themselves to zero.
            let spec = Spec { decay: Some(false), ..Spec::new(name, shape, Start::Value(start.clone())) };
            let magnitude = params.declare(spec)?.flatten_all()?;
            parts.insert(id, Row { magnitude, norm: start.flatten_all()?, ..norms });
        }
        let saved = Saved::plan(&config.modules_to_save, config.bias, &factors.paths(sites), sites, params)?;
        Ok(Box::new(DoraPatch { factors, rows: parts, saved, dropout: config.dropout, step: Step::eval() }))
    }

    fn reads(config: &Value) -> bool {
        is_lora(config, true)
    }

    fn to_adapter_config(config: &LoraConfig, sites: &Sites) -> Result<Value> {
        config.to_adapter_config(sites, true)
    }

    fn from_adapter_config(value: &Value) -> Result<LoraConfig> {
        LoraConfig::from_adapter_config(value)
    }
}

/// What is known of the rows of one weight, [out] each; of an embedding's columns.
#[derive(Debug)]
struct Row {
    /// ‖W_j‖², of the frozen weight.
    squares: Tensor,
    /// m, trained.
    magnitude: Tensor,
    /// ‖W_j + s B_j A‖ of this step, a constant.
    norm: Tensor,
}

/// f64 stays, all else becomes f32: sums of squares of half floats overflow.
fn wide(t: &Tensor) -> TensorResult<Tensor> {
    t.to_dtype(if t.dtype() == DType::F64 { DType::F64 } else { DType::F32 })
}

/// The frozen weight as a matrix [out, in]; the transpose of an embedding.
fn matrix(factor: &Factor) -> TensorResult<Tensor> {
    let base = wide(&factor.base)?.flatten_from(1)?;
    if factor.embedding { base.t() } else { Ok(base) }
}

fn squares(factor: &Factor) -> TensorResult<Tensor> {
    let base = wide(&factor.base)?.sqr()?;
    let squares = if factor.embedding { base.sum(0)? } else { base.flatten_from(1)?.sum(1)? };
    squares.to_dtype(factor.a.dtype())
}

impl Row {
    /// ‖W + s B A‖ of each row without forming the sum: ‖W_j‖² + 2s·B_j(A W_jᵀ) + s²·B_j(A Aᵀ)B_jᵀ.
    fn length(&self, factor: &Factor) -> TensorResult<Tensor> {
        let (a, b, s) = (factor.a.detach(), factor.b.detach(), factor.scale);
        // [r, out] and [r, r].
        let (across, gram) = (a.matmul(&matrix(factor)?.to_dtype(a.dtype())?.t()?)?, a.matmul(&a.t()?)?);
        let twice = ((across.t()? * (2.0 * s))? + (b.matmul(&gram)? * (s * s))?)?;
        let squares = (&self.squares + (b * twice)?.sum(1)?)?;
        // A zero row has no direction: it stays zero, whatever it is divided by.
        squares.maximum(f64::from(f32::MIN_POSITIVE))?.sqrt()
    }
}

struct DoraPatch {
    factors: Factors,
    rows: HashMap<SiteId, Row>,
    saved: Saved,
    dropout: f64,
    step: Step,
}

impl Patch for DoraPatch {
    fn prepare(&mut self, step: &Step) -> TensorResult<()> {
        self.step = *step;
        for (id, row) in &mut self.rows {
            if let Some(factor) = self.factors.at(*id) {
                row.norm = row.length(factor)?;
            }
        }
        Ok(())
    }

    fn weight(&self, id: WeightId, value: Tensor) -> TensorResult<Tensor> {
        self.saved.weight(id, value)
    }

    fn linear(&self, at: SiteId, y: LinearOut) -> TensorResult<LinearOut> {
        let (Some(factor), Some(row)) = (self.factors.at(at), self.rows.get(&at)) else { return Ok(y) };
        let scale = (&row.magnitude / &row.norm)?.to_dtype(y.x().dtype())?;
        let dropout = dropout_mask(&self.step, self.dropout, at, "lora", y.x())?;
        let term = factor.term(y.x(), dropout)?;
        y.decomposed(term, &scale)
    }

    fn embedding(&self, at: SiteId, ids: Option<&Tensor>, rows: Tensor) -> TensorResult<Tensor> {
        let (Some(factor), Some(row)) = (self.factors.at(at), self.rows.get(&at)) else { return Ok(rows) };
        let scale = (&row.magnitude / &row.norm)?.to_dtype(rows.dtype())?;
        (&rows + factor.rows(ids, &rows)?)?.broadcast_mul(&scale)
    }

    fn inverse(&self) -> Inverse {
        Inverse::Undefined("a merged row has its new length, and the old one is nowhere")
    }

    fn fold(&self, id: WeightId, value: &Tensor) -> TensorResult<Fold> {
        let Some((site, factor)) = self.factors.of(id) else { return Ok(Fold::Unchanged) };
        let Some(row) = self.rows.get(&site) else { return Ok(Fold::Unchanged) };
        let scale = (row.magnitude.detach() / row.length(factor)?)?.to_dtype(value.dtype())?;
        let sum = (value + factor.delta()?.to_dtype(value.dtype())?)?;
        if factor.embedding {
            return Ok(Fold::Replace(sum.broadcast_mul(&scale)?));
        }
        let folded = sum.flatten_from(1)?.broadcast_mul(&scale.unsqueeze(1)?)?;
        Ok(Fold::Replace(folded.reshape(value.shape())?))
    }
}
