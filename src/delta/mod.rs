//! What is trained, and the adapter directory that holds it: HF PEFT's format where HF PEFT has the method.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::Device;
use peft_adapters::{MethodConfig, Params, Patches, Sites};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::clip::base::Base;
use crate::clip::decode::PixelOptions;
use crate::clip::method_error;
use crate::error::Result;
use crate::provenance::Provenance;

mod bundle;
mod classes;
mod clip_lora;
mod fetch;
mod load;
mod named;
mod names;
mod save;
mod vocabulary;

pub use bundle::{Bundle, Bundled, bundled, digest as bundle_digest, files as bundle_files};
pub use classes::{class_order, other_vocabulary, same_classes};
pub use clip_lora::is_clip_lora;
pub use fetch::{locate, locate_with};
pub use load::{Delta, convert, manifest};
pub use named::named_base;
pub use save::{check_output, save};
pub use vocabulary::Vocabulary;

/// Planned methods: parameters, hooks for training and hooks for evaluation.
#[derive(Debug)]
pub struct Adapters {
    /// In recipe order.
    pub methods: Vec<MethodConfig>,
    /// Everything that is trained, a task's own weights last.
    pub params: Params,
    /// The parameters of each method.
    ranges: Vec<Range<usize>>,
    /// Hooks that record gradients.
    pub patches: Patches,
    /// Hooks that read the same values and record nothing.
    pub view: Patches,
    /// How many of the hooks, the first ones, are a bundle's and not trained.
    pub beneath: usize,
}

/// How many numbers methods may add: so many times those of the base, and so many to any. Beyond that an option is a slip.
const TIMES_BASE: usize = 4;
const FREE: usize = 1 << 26;

impl Adapters {
    /// Plans `methods` for a model.
    ///
    /// # Errors
    /// When a configuration does not fit the model or two methods train the same tensor.
    pub fn plan(methods: &[MethodConfig], sites: &Sites, seed: u64, device: &Device) -> Result<Self> {
        let base: usize = sites.weights().map(|(_, weight)| weight.tensor.elem_count()).sum();
        Self::plan_in(Params::new(seed, device).limited(TIMES_BASE * base + FREE), methods, sites)
    }

    fn plan_in(mut params: Params, methods: &[MethodConfig], sites: &Sites) -> Result<Self> {
        let (mut patches, mut ranges) = (Patches::none(), Vec::new());
        for method in methods {
            let from = params.len();
            patches.push(method.plan(sites, &mut params).map_err(|e| named(method, e))?);
            ranges.push(from..params.len());
        }
        let mut reading = params.view();
        let mut view = Patches::none();
        for method in methods {
            view.push(method.plan(sites, &mut reading).map_err(|e| named(method, e))?);
        }
        Ok(Self { methods: methods.to_vec(), params, ranges, patches, view, beneath: 0 })
    }

    /// Puts the hooks of a bundle's adapter beneath all others, above those that were put there before; `twice` gives them for
    /// training and for evaluation.
    pub fn put_beneath(&mut self, twice: [Patches; 2]) {
        let [training, reading] = twice;
        let count = training.iter().count();
        self.patches.insert(self.beneath, training);
        self.view.insert(self.beneath, reading);
        self.beneath += count;
    }

    /// `lora`, `lora+bottleneck`, `none`.
    #[must_use]
    pub fn label(&self) -> String {
        match self.methods.is_empty() {
            true => "none".into(),
            false => self.methods.iter().map(MethodConfig::name).collect::<Vec<_>>().join("+"),
        }
    }

    /// Whether a task has declared parameters of its own.
    #[must_use]
    pub fn has_own(&self) -> bool {
        self.own_from() < self.params.len()
    }

    /// Whether each method can do with `total` optimiser steps.
    ///
    /// # Errors
    /// When one cannot.
    pub fn check_steps(&self, total: usize) -> Result<()> {
        let own = self.patches.iter().skip(self.beneath);
        self.methods.iter().zip(own).try_for_each(|(method, patch)| patch.check_steps(total).map_err(|e| named(method, e)))
    }

    /// Where a task's own parameters begin.
    fn own_from(&self) -> usize {
        self.ranges.last().map_or(0, |r| r.end)
    }
}

fn named(method: &MethodConfig, error: peft_adapters::Error) -> crate::Error {
    match method_error(error) {
        crate::Error::Input(mut problem) => {
            problem.place = format!("method.{}", method.name());
            crate::Error::Input(problem)
        }
        other => other,
    }
}

/// `peft.json`: what an adapter is for.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the program that wrote it.
    pub version: String,
    /// The base.
    pub base: BaseRef,
    /// Digests of data, classes, base and preprocessing of the run that it comes from; empty ones are not known.
    #[serde(default)]
    pub made_of: Provenance,
    /// The task and its options, as a recipe has them.
    pub task: Value,
    /// How image and text become one, where that was said.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub fusion: Value,
    /// What was chosen on validation: a threshold, a temperature.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub scalars: BTreeMap<String, f64>,
    /// Class names in label order; empty where the task has none.
    #[serde(default)]
    pub classes: Vec<String>,
    /// Prompts around class names.
    #[serde(default)]
    pub templates: Vec<String>,
    /// How the images that it was trained on became pixels, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<PixelOptions>,
    /// The resolved recipe.
    #[serde(default)]
    pub recipe: Value,
    /// Metrics at the epoch that was saved.
    #[serde(default)]
    pub metrics: Value,
    /// Several methods: their directories in order of application. Empty for one or none.
    #[serde(default)]
    pub methods: Vec<MethodRef>,
}

impl Manifest {
    /// How the images that it was trained on became pixels: older versions said so in the recipe only.
    #[must_use]
    pub fn pixels(&self) -> Option<PixelOptions> {
        let told = || self.recipe.get("images").and_then(|images| serde_json::from_value(images.clone()).ok());
        self.images.or_else(told)
    }
}

/// The base that an adapter belongs to.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct BaseRef {
    /// As the recipe named it.
    pub name: String,
    /// blake3 of its weights.
    pub digest: String,
    /// blake3 of what its `config.json` says and its weights do not; empty where an older version did not look.
    #[serde(default)]
    pub architecture: String,
    /// blake3 of its tokeniser.
    pub tokenizer: String,
    /// blake3 of its preprocessing.
    pub preprocess: String,
}

impl BaseRef {
    /// What identifies `base`, which goes by `name`.
    #[must_use]
    pub fn of(base: &Base, name: &str) -> Self {
        Self {
            name: name.to_string(),
            digest: base.digest.clone(),
            architecture: base.clip.config().digest(),
            tokenizer: base.tokenizer.digest().to_string(),
            preprocess: format!("blake3:{}", blake3::hash(&base.preprocess.digest_bytes()).to_hex()),
        }
    }
}

/// One of several methods.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MethodRef {
    /// Its directory.
    pub dir: String,
    /// blake3 of its weights file.
    pub digest: String,
}

/// File names of an adapter directory.
pub(crate) mod file {
    pub(crate) const CONFIG: &str = "adapter_config.json";
    pub(crate) const WEIGHTS: &str = "adapter_model.safetensors";
    pub(crate) const PICKLED: &str = "adapter_model.bin";
    pub(crate) const FULL: &str = "model.safetensors";
    pub(crate) const MANIFEST: &str = "peft.json";
    pub(crate) const TASK: &str = "task.safetensors";

    /// `full` saves whole tensors under their own names.
    pub(crate) fn weights(method: &str) -> &'static str {
        if method == "full" { FULL } else { WEIGHTS }
    }
}
