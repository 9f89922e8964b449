//! Tip-Adapter: training features and their labels as a cache that adds to the logits.

use std::sync::Mutex;

use candle_core::{DType, Result as TensorResult, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::method::{Fold, Init, Labelled, Method, Patch};
use crate::params::{Params, Spec, Start};
use crate::sites::{SiteKind, Sites, Tower, WeightId};
use crate::{Error, Result};

/// See [`TipAdapterConfig`].
#[derive(Debug)]
pub struct TipAdapter;

/// Options of Tip-Adapter. The cache is filled before the first step; with `train.augment` a key is the mean of ten views.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TipAdapterConfig {
    /// false: the cache stays as it is, no step is made. true: Tip-Adapter-F, its keys are trained.
    pub train: bool,
    /// The cache's share of the logits, from 0; where Tip-Adapter-F trains, and where nothing is searched. Higher: further from
    /// the base.
    pub alpha: f64,
    /// How fast a key's weight falls with its distance, above 0; as `alpha`. Higher: only near examples count.
    pub beta: f64,
    /// Whether both are searched on the validation split when training is over, never on the test split.
    pub search: bool,
    /// The search goes from 0.1 up to this α.
    pub alpha_max: f64,
    /// The search goes from 0.1 up to this β.
    pub beta_max: f64,
    /// Values of α that are tried.
    pub alpha_steps: usize,
    /// Values of β that are tried. The authors try 200.
    pub beta_steps: usize,
    /// Examples in the cache. The training split's when left out; a saved adapter says how many it holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entries: Option<usize>,
    /// The cache's classes. The task's when left out; a saved adapter says how many it holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classes: Option<usize>,
}

impl Default for TipAdapterConfig {
    fn default() -> Self {
        Self {
            train: false,
            alpha: 1.0,
            beta: 1.0,
            search: true,
            alpha_max: 3.0,
            beta_max: 7.0,
            alpha_steps: 20,
            beta_steps: 200,
            entries: None,
            classes: None,
        }
    }
}

/// How many pairs of `alpha` and `beta` a search tries at most; the authors' grid has 4000.
const MAX_STEPS: usize = 1_000_000;

impl TipAdapterConfig {
    fn check(&self) -> Result<()> {
        let range = |key: &str, value: f64, least: f64| match value >= least && value.is_finite() {
            true => Ok(()),
            false => Err(Error::config(key, format!("expected a number from {least}, found {value}"))),
        };
        range("alpha", self.alpha, 0.0)?;
        range("beta", self.beta, f64::MIN_POSITIVE)?;
        range("alpha_max", self.alpha_max, 0.1)?;
        range("beta_max", self.beta_max, 0.1)?;
        let steps = self.alpha_steps.saturating_mul(self.beta_steps);
        match (1..=MAX_STEPS).contains(&steps) {
            true => Ok(()),
            false => {
                let found = format!("found {} and {}", self.alpha_steps, self.beta_steps);
                Err(Error::config("alpha_steps, beta_steps", format!("expected at least 1 and a product of at most {MAX_STEPS}, {found}")))
            }
        }
    }

    /// Entries and classes of the cache.
    fn size(&self, sites: &Sites) -> Result<[usize; 2]> {
        let task = sites.task();
        let one = |key: &str, held: Option<usize>, asked: usize| match (held.unwrap_or(0), asked) {
            (0, 0) => Err(Error::config(key, "a cache needs a task with classes and training examples")),
            (0, asked) => Ok(asked),
            (held, asked) if asked != 0 && asked != held => {
                Err(Error::config(key, format!("the cache holds {held} {key}, the task has {asked}")))
            }
            (held, _) => Ok(held),
        };
        Ok([one("entries", self.entries, task.examples)?, one("classes", self.classes, task.classes)?])
    }
}

struct TipAdapterPatch {
    /// [N, P].
    keys: Tensor,
    /// Class indices, [N].
    labels: Tensor,
    /// [α, β].
    factors: Tensor,
    classes: usize,
    config: TipAdapterConfig,
    /// The labels that `values` was made of, and one row for each of them: [N, C].
    values: Mutex<Option<(Vec<f32>, Tensor)>>,
}

fn name(part: &str) -> String {
    format!("base_model.model.vision_model.cache.{part}")
}

impl Method for TipAdapter {
    const NAME: &'static str = "tip_adapter";
    const SOURCE: &'static str = "Zhang et al. 2022 (arXiv 2207.09519), eq. 5: logits + α·exp(−β(1 − x Kᵀ)) V";
    const INIT: Init = Init::Identity;
    type Config = TipAdapterConfig;

    fn examples() -> Vec<TipAdapterConfig> {
        let base = TipAdapterConfig { entries: Some(4), classes: Some(3), ..Default::default() };
        vec![base.clone(), TipAdapterConfig { train: true, alpha: 2.0, beta: 3.0, ..base }]
    }

    fn plan(config: &TipAdapterConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        config.check()?;
        let [entries, classes] = config.size(sites)?;
        let width = sites.iter().find_map(|(_, s)| match s.kind {
            SiteKind::Features { dim } if s.tower == Tower::Vision => Some(dim),
            _ => None,
        });
        let width = width.ok_or_else(|| Error::config("method", "a cache of image features needs an image tower"))?;
        let keys = Spec::new(name("keys"), (entries, width), Start::Zeros);
        // Nothing is added before the cache is filled.
        let start = Tensor::new(&[0.0, config.beta], params.device())?.to_dtype(params.dtype())?;
        Ok(Box::new(TipAdapterPatch {
            keys: params.declare(Spec { frozen: !config.train, ..keys })?,
            labels: params.declare(Spec { frozen: true, ..Spec::new(name("labels"), entries, Start::Zeros) })?,
            factors: params.declare(Spec { frozen: true, ..Spec::new(name("alpha_beta"), 2, Start::Value(start)) })?,
            classes,
            config: config.clone(),
            values: Mutex::new(None),
        }))
    }

    fn to_adapter_config(config: &TipAdapterConfig, sites: &Sites) -> Result<Value> {
        let [entries, classes] = config.size(sites)?;
        let saved = TipAdapterConfig { entries: Some(entries), classes: Some(classes), ..config.clone() };
        Ok(json!({ "peft_type": "TIP_ADAPTER", "base_model_name_or_path": null, "config": saved }))
    }

    fn from_adapter_config(value: &Value) -> Result<TipAdapterConfig> {
        serde_json::from_value(value["config"].clone()).map_err(|e| Error::config("config", crate::wording::plain(&e.to_string())))
    }
}

impl TipAdapterPatch {
    /// The labels as rows of zeros with a one, [N, C]; made again where they have changed.
    fn values(&self, like: &Tensor) -> TensorResult<Tensor> {
        let labels = self.labels.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        let Ok(mut kept) = self.values.lock() else { candle_core::bail!("another thread failed while it made the cache's values") };
        if let Some((of, values)) = kept.as_ref()
            && *of == labels
            && values.dtype() == like.dtype()
        {
            return Ok(values.clone());
        }
        let mut rows = vec![0f32; labels.len() * self.classes];
        for (row, label) in rows.chunks_exact_mut(self.classes).zip(&labels) {
            match row.get_mut(label.round() as usize) {
                Some(one) => *one = 1.0,
                None => candle_core::bail!("the cache holds class {label}, there are {}", self.classes),
            }
        }
        let values = Tensor::from_vec(rows, (labels.len(), self.classes), like.device())?.to_dtype(like.dtype())?;
        *kept = Some((labels, values.clone()));
        Ok(values)
    }

    /// exp(−β(1 − x Kᵀ)) V: `images` [B, P] → [B, C].
    fn cache(&self, images: &Tensor, keys: &Tensor, beta: f64) -> TensorResult<Tensor> {
        let affinity = images.matmul(&keys.t()?)?;
        affinity.affine(beta, -beta)?.exp()?.matmul(&self.values(&affinity)?)
    }

    fn factors(&self) -> TensorResult<[f64; 2]> {
        let both = self.factors.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        Ok([both[0], both[1]])
    }

    /// The authors' grid: `steps` values from 0.1 up to, but without, `max`.
    fn grid(max: f64, steps: usize) -> impl Iterator<Item = f64> {
        (0..steps).map(move |i| 0.1 + i as f64 * (max - 0.1) / steps as f64)
    }
}

/// How many rows of `logits` [N, C] are largest at their label.
fn correct(logits: &Tensor, labels: &Tensor) -> TensorResult<u32> {
    let hits = logits.argmax(1)?.eq(labels)?;
    hits.to_dtype(DType::U32)?.sum_all()?.to_scalar::<u32>()
}

impl Patch for TipAdapterPatch {
    fn logits(&self, logits: Tensor, images: &Tensor) -> TensorResult<Tensor> {
        let classes = logits.dim(1)?;
        if classes != self.classes {
            candle_core::bail!("the cache knows its {} classes only, there are {classes}", self.classes);
        }
        let [alpha, beta] = self.factors()?;
        let keys = self.keys.to_dtype(images.dtype())?;
        logits + (self.cache(images, &keys, beta)? * alpha)?.to_dtype(images.dtype())?
    }

    fn adds_logits(&self) -> bool {
        true
    }

    fn class_bound(&self) -> bool {
        true
    }

    fn reorder_classes(&self, stored: &str, tensor: &Tensor, order: &[u32]) -> TensorResult<Option<Tensor>> {
        if stored != name("labels") {
            return Ok(None);
        }
        // The cache stores the class of each entry, so that each number becomes the place where its class is now.
        let moved = |label: &f32| match order.iter().position(|old| *old as f32 == label.round()) {
            Some(new) => Ok(new as f32),
            None => candle_core::bail!("the cache holds class {label}, there are {}", order.len()),
        };
        let labels = tensor.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        let labels = labels.iter().map(moved).collect::<TensorResult<Vec<f32>>>()?;
        Tensor::from_vec(labels, tensor.dims(), tensor.device()).map(Some)
    }

    fn fits(&self) -> bool {
        true
    }

    fn fit(&self, train: &Labelled) -> TensorResult<Vec<(String, Tensor)>> {
        let factors = Tensor::new(&[self.config.alpha, self.config.beta], self.factors.device())?;
        let labels = train.labels.to_dtype(DType::F32)?;
        Ok(vec![(name("keys"), train.features.clone()), (name("labels"), labels), (name("alpha_beta"), factors)])
    }

    fn tune(&self, val: &Labelled) -> TensorResult<Vec<(String, Tensor)>> {
        if !self.config.search || val.features.dim(0)? == 0 {
            return Ok(Vec::new());
        }
        let keys = self.keys.detach().to_dtype(val.features.dtype())?;
        let mut best = (0, [0.0; 2]);
        for beta in Self::grid(self.config.beta_max, self.config.beta_steps) {
            let cache = self.cache(&val.features, &keys, beta)?;
            for alpha in Self::grid(self.config.alpha_max, self.config.alpha_steps) {
                let hits = correct(&(&val.logits + (&cache * alpha)?)?, &val.labels)?;
                if hits > best.0 {
                    best = (hits, [alpha, beta]);
                }
            }
        }
        // No value was right even once: what the recipe says stays.
        match best.0 {
            0 => Ok(Vec::new()),
            _ => Ok(vec![(name("alpha_beta"), Tensor::new(&best.1, self.factors.device())?)]),
        }
    }

    fn unfoldable(&self) -> Option<&'static str> {
        Some("plain CLIP has no cache of examples")
    }

    fn fold(&self, _id: WeightId, _value: &Tensor) -> TensorResult<Fold> {
        Ok(Fold::Unchanged)
    }
}
