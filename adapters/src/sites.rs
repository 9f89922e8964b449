//! Where a model can be patched: its sites and base weights under their HF names.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::layers::{Embedding, LayerNorm, Linear, PatchConv};
use crate::{Error, Result};

/// A place where hooks run. Cheap to copy; an index into [`Sites`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SiteId(u32);

/// A base weight. Cheap to copy; an index into [`Sites`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WeightId(u32);

impl SiteId {
    /// Position in [`Sites::iter`].
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl WeightId {
    /// Position in [`Sites::weights`].
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Which half of a two-tower model. Single-tower models use the one that fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tower {
    /// The image encoder.
    Vision,
    /// The text encoder.
    Text,
    /// Outside both, such as the logit scale.
    Shared,
}

/// What happens at a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SiteKind {
    /// A matrix product: the `linear` hook.
    Linear {
        /// Width of the input.
        input: usize,
        /// Width of the output.
        output: usize,
    },
    /// A convolution whose stride is its kernel, a product over unfolded patches: the `linear` hook.
    Conv {
        /// Channels, height and width of the kernel.
        kernel: [usize; 3],
        /// Width of the output.
        output: usize,
    },
    /// A table of vectors: the `embedding` hook.
    Embedding {
        /// Number of vectors.
        rows: usize,
        /// Their width.
        dim: usize,
    },
    /// Attention over (q, k, v): the `attention` hook.
    Attention {
        /// Model width.
        dim: usize,
        /// Number of heads.
        heads: usize,
    },
    /// A residual branch (attention or MLP): the `branch` hook.
    Branch {
        /// Model width.
        dim: usize,
        /// Whether it is the MLP branch.
        mlp: bool,
    },
    /// Tokens on their way into a tower: the `embed` hook.
    Embed {
        /// Model width.
        dim: usize,
        /// The most tokens there are positions for; for images, whose positions are given, as many as memory holds.
        limit: usize,
    },
    /// The token sequence that enters a block: the `tokens` hook.
    Tokens {
        /// Model width.
        dim: usize,
    },
    /// The projected feature of a tower: the `features` hook.
    Features {
        /// Projection width.
        dim: usize,
    },
}

/// One site.
#[derive(Debug, Clone)]
pub struct Site {
    /// HF module path, such as `vision_model.encoder.layers.0.self_attn.q_proj`.
    pub path: String,
    /// The tower it belongs to.
    pub tower: Tower,
    /// The block it belongs to, counted from the input.
    pub layer: Option<usize>,
    /// What happens here.
    pub kind: SiteKind,
}

/// One base weight.
#[derive(Debug, Clone)]
pub struct BaseWeight {
    /// HF tensor name, such as `text_model.final_layer_norm.weight`.
    pub name: String,
    /// The tower it belongs to.
    pub tower: Tower,
    /// The block it belongs to.
    pub layer: Option<usize>,
    /// The frozen value.
    pub tensor: Tensor,
}

/// Everything a method may see when it plans: of the model, and of the task where there is one.
#[derive(Debug, Default, Clone)]
pub struct Sites {
    sites: Vec<Site>,
    weights: Vec<BaseWeight>,
    by_name: HashMap<String, WeightId>,
    encoder: Option<Encoder>,
    task: TaskFacts,
    derived: Arc<Mutex<Derived>>,
}

/// What has been computed of a weight, by a name of its own.
type Derived = HashMap<(WeightId, String), Vec<Tensor>>;

/// What methods that hold something for each class or example have to know.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct TaskFacts {
    /// Classes; 0 where the task has none, or where it is not known.
    pub classes: usize,
    /// Training examples; 0 where it is not known.
    pub examples: usize,
}

/// A text's token ids without begin and end.
#[derive(Clone)]
struct Encoder(Arc<Encode>);

type Encode = dyn Fn(&str) -> std::result::Result<Vec<u32>, String> + Send + Sync;

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Encoder")
    }
}

impl Sites {
    /// An empty set, to be filled while the model is built.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes the model's tokeniser known, for methods that start from words.
    pub fn set_encoder(&mut self, encode: impl Fn(&str) -> std::result::Result<Vec<u32>, String> + Send + Sync + 'static) {
        self.encoder = Some(Encoder(Arc::new(encode)));
    }

    /// The same model for a task.
    #[must_use]
    pub fn for_task(&self, task: TaskFacts) -> Self {
        Self { task, ..self.clone() }
    }

    /// What is known of the task.
    #[must_use]
    pub fn task(&self) -> TaskFacts {
        self.task
    }

    /// The token ids of a text, without begin and end; `key` stands in messages.
    ///
    /// # Errors
    /// When the model came without a tokeniser, or the text cannot be encoded.
    pub fn encode(&self, key: &str, text: &str) -> Result<Vec<u32>> {
        let Some(Encoder(encode)) = &self.encoder else { return Err(Error::config(key, "needs the model's tokeniser")) };
        encode(text).map_err(|e| Error::config(key, e))
    }

    /// Registers a site.
    pub fn add(&mut self, site: Site) -> SiteId {
        self.sites.push(site);
        SiteId((self.sites.len() - 1) as u32)
    }

    /// Registers a base weight under its HF name.
    pub fn add_weight(&mut self, name: &str, tower: Tower, layer: Option<usize>, tensor: Tensor) -> WeightId {
        let id = WeightId(self.weights.len() as u32);
        self.by_name.insert(name.to_string(), id);
        self.weights.push(BaseWeight { name: name.to_string(), tower, layer, tensor });
        id
    }

    /// Registers a linear layer: its site and its weights `<path>.weight` [out, in] and `<path>.bias` [out].
    ///
    /// # Errors
    /// When the weight is not a matrix.
    pub fn linear(&mut self, path: &str, tower: Tower, layer: Option<usize>, weight: Tensor, bias: Option<Tensor>) -> Result<Linear> {
        let (output, input) = weight.dims2()?;
        let site = self.add(Site { path: path.to_string(), tower, layer, kind: SiteKind::Linear { input, output } });
        let weight = (self.add_weight(&format!("{path}.weight"), tower, layer, weight.clone()), weight);
        let bias = bias.map(|b| (self.add_weight(&format!("{path}.bias"), tower, layer, b.clone()), b));
        Ok(Linear { site, weight, bias })
    }

    /// Registers a layer norm with `<path>.weight` and `<path>.bias`, both `[dim]`.
    pub fn layer_norm(&mut self, path: &str, tower: Tower, layer: Option<usize>, (weight, bias): (Tensor, Tensor), eps: f64) -> LayerNorm {
        LayerNorm {
            weight: (self.add_weight(&format!("{path}.weight"), tower, layer, weight.clone()), weight),
            bias: (self.add_weight(&format!("{path}.bias"), tower, layer, bias.clone()), bias),
            eps,
        }
    }

    /// Registers a convolution of patches with `<path>.weight` [out, C, P, P].
    ///
    /// # Errors
    /// When the weight has other dimensions.
    pub fn patch_conv(&mut self, path: &str, tower: Tower, weight: Tensor) -> Result<PatchConv> {
        let (output, channels, height, width) = weight.dims4()?;
        let kind = SiteKind::Conv { kernel: [channels, height, width], output };
        let site = self.add(Site { path: path.to_string(), tower, layer: None, kind });
        Ok(PatchConv { site, weight: (self.add_weight(&format!("{path}.weight"), tower, None, weight.clone()), weight) })
    }

    /// Registers an embedding table `<path>.weight` [rows, dim].
    ///
    /// # Errors
    /// When the table is not a matrix.
    pub fn embedding(&mut self, path: &str, tower: Tower, table: Tensor) -> Result<Embedding> {
        let (rows, dim) = table.dims2()?;
        let site = self.add(Site { path: path.to_string(), tower, layer: None, kind: SiteKind::Embedding { rows, dim } });
        Ok(Embedding { site, weight: (self.add_weight(&format!("{path}.weight"), tower, None, table.clone()), table) })
    }

    /// What several plans derive from a base weight, such as its singular vectors: computed once, kept with the model.
    ///
    /// # Errors
    /// What `compute` returns.
    pub fn derived(&self, id: WeightId, what: &str, compute: impl FnOnce() -> Result<Vec<Tensor>>) -> Result<Vec<Tensor>> {
        let key = (id, what.to_string());
        let lock = || self.derived.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(found) = lock().get(&key) {
            return Ok(found.clone());
        }
        let made = compute()?;
        lock().insert(key, made.clone());
        Ok(made)
    }

    /// All sites with their ids, in model order.
    pub fn iter(&self) -> impl Iterator<Item = (SiteId, &Site)> {
        self.sites.iter().enumerate().map(|(i, s)| (SiteId(i as u32), s))
    }

    /// The site behind an id.
    ///
    /// # Panics
    /// When the id comes from another model.
    #[must_use]
    pub fn site(&self, id: SiteId) -> &Site {
        &self.sites[id.index()]
    }

    /// All base weights with their ids, in model order.
    pub fn weights(&self) -> impl Iterator<Item = (WeightId, &BaseWeight)> {
        self.weights.iter().enumerate().map(|(i, w)| (WeightId(i as u32), w))
    }

    /// The base weight called `name`.
    #[must_use]
    pub fn weight(&self, name: &str) -> Option<(WeightId, &BaseWeight)> {
        let id = *self.by_name.get(name)?;
        Some((id, &self.weights[id.index()]))
    }

    /// The number of blocks of a tower.
    #[must_use]
    pub fn depth(&self, tower: Tower) -> usize {
        self.sites.iter().filter(|s| s.tower == tower).filter_map(|s| s.layer).max().map_or(0, |last| last + 1)
    }

    /// How many numbers the base holds.
    #[must_use]
    pub fn count(&self) -> usize {
        self.weights.iter().map(|w| w.tensor.elem_count()).sum()
    }

    /// The paths of the sites that `keep` accepts, layer numbers collapsed to `{i}`, each once.
    pub fn summary(&self, keep: impl Fn(&Site) -> bool) -> Vec<String> {
        let mut seen: Vec<String> = Vec::new();
        for site in self.sites.iter().filter(|s| keep(s)) {
            let path = collapse(&site.path);
            if !seen.contains(&path) {
                seen.push(path);
            }
        }
        seen
    }

    /// The dtype that the base computes in.
    ///
    /// # Errors
    /// When the model has no weights.
    pub fn dtype(&self) -> Result<DType> {
        self.weights.first().map(|w| w.tensor.dtype()).ok_or_else(|| Error::config("model", "has no weights"))
    }
}

/// `a.layers.11.b` becomes `a.layers.{i}.b`.
fn collapse(path: &str) -> String {
    path.split('.').map(|part| if part.bytes().all(|b| b.is_ascii_digit()) { "{i}" } else { part }).collect::<Vec<_>>().join(".")
}
