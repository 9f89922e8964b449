//! The recipe: what the modules' own configurations compose to.

use std::path::PathBuf;

use peft_adapters::MethodConfig;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::clip::decode::{DecodeOptions, MAX_FILE};
use crate::clip::spec::Spec;
use crate::data::DataConfig;
use crate::error::{Error, Result};
use crate::fusion::FusionConfig;
use crate::named;
use crate::task::TaskConfig;
use crate::train::TrainConfig;

mod compare;
mod images;
mod load;
mod nulls;
mod spot;

pub use compare::{CompareConfig, CompareMethod};
pub use images::Stated;
pub use load::yaml;

/// What `peft train` runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The base: `builtin:tiny`, a directory, a checkpoint file or a hub id; `{ base: FILE, arch: NAME, image_size: N }` where
    /// the files do not say it; or `{ init: { config: DIR } }` for random weights.
    pub model: ModelConfig,
    /// What is trained: `none`, one method, or a list of them in the order in which they apply.
    #[serde(deserialize_with = "named::list", serialize_with = "write_methods")]
    pub method: Vec<MethodConfig>,
    /// Where examples come from.
    pub data: DataConfig,
    /// What is learnt.
    #[serde(deserialize_with = "named::one")]
    pub task: TaskConfig,
    /// How image and text become one, where the task looks at both.
    #[serde(default, deserialize_with = "named::maybe", skip_serializing_if = "Option::is_none")]
    pub fusion: Option<FusionConfig>,
    /// How it is learnt.
    #[serde(default)]
    pub train: TrainConfig,
    /// How images are read.
    #[serde(default)]
    pub images: ImageConfig,
    /// What `peft compare` does with this recipe; training takes no notice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compare: Option<CompareConfig>,
    /// A second set, in the form of `data`, on which `peft compare` measures what was forgotten.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forget: Option<DataConfig>,
    /// The run directory; `runs/<recipe name>` when left out.
    #[serde(default)]
    pub output: Option<PathBuf>,
    /// The file's stem.
    #[serde(skip)]
    pub name: String,
}

/// The base model.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum ModelConfig {
    /// A base, with its options as [`crate::clip::spec::Spec`] writes them.
    Pretrained(String),
    /// Random weights.
    Scratch(Scratch),
}

impl<'de> Deserialize<'de> for ModelConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(ModelVisitor)
    }
}

/// A derived untagged enum would say only that nothing matched.
struct ModelVisitor;

impl<'de> Visitor<'de> for ModelVisitor {
    type Value = ModelConfig;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the name of a base, `{ base: FILE, arch: NAME }`, or `init: { config: DIR }`")
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> std::result::Result<ModelConfig, E> {
        Ok(ModelConfig::Pretrained(name.to_string()))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> std::result::Result<ModelConfig, A::Error> {
        let map = ModelMap::deserialize(MapAccessDeserializer::new(map))?;
        match (map.init, map.base, map.arch.is_some() || map.image_size.is_some()) {
            (Some(init), None, false) => Ok(ModelConfig::Scratch(Scratch { init })),
            (None, Some(base), _) => {
                let spec = Spec::with(&base, map.arch.as_deref(), map.image_size).map_err(A::Error::custom)?;
                Ok(ModelConfig::Pretrained(spec))
            }
            _ => Err(A::Error::custom("expected `base`, with `arch` and `image_size` where they are needed, or `init` alone")),
        }
    }
}

/// What may stand in place of a name.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelMap {
    init: Option<InitConfig>,
    base: Option<String>,
    arch: Option<String>,
    image_size: Option<usize>,
}

/// `{ init: { config: DIR } }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scratch {
    /// What to initialise.
    pub init: InitConfig,
}

/// Where the shape and the tokeniser of a new model come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InitConfig {
    /// A directory with config, tokeniser and preprocessing, or `builtin:tiny`.
    pub config: String,
}

impl ModelConfig {
    /// The base or configuration that is named.
    #[must_use]
    pub fn spec(&self) -> &str {
        match self {
            Self::Pretrained(spec) => spec,
            Self::Scratch(s) => &s.init.config,
        }
    }
}

/// How images are read before the base's own preprocessing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, from = "images::Given")]
pub struct ImageConfig {
    /// What becomes of transparency: `keep` drops the alpha channel as Pillow's `convert("RGB")` does,
    /// `white` composites on white.
    pub background: crate::clip::preprocess::Background,
    /// Whether EXIF orientation is applied.
    pub orient: bool,
    /// Images with more pixels are refused before they are decoded; each thread may need 24 bytes for each of them.
    pub max_pixels: u64,
    /// Larger image files are refused before they are read; at most 268435456.
    pub max_bytes: u64,
    /// Seconds after which decoding an image is given up.
    pub max_seconds: f64,
    /// Which of the options that change pixels the recipe gives; the others give way to what an adapter was trained with.
    #[serde(skip)]
    pub stated: Stated,
}

impl Default for ImageConfig {
    fn default() -> Self {
        let DecodeOptions { background, orient, max_pixels, max_bytes, max_seconds } = DecodeOptions::default();
        Self { background, orient, max_pixels, max_bytes, max_seconds, stated: Stated::default() }
    }
}

impl ImageConfig {
    /// As decoders take it.
    #[must_use]
    pub fn options(&self) -> DecodeOptions {
        let Self { background, orient, max_pixels, max_bytes, max_seconds, .. } = *self;
        DecodeOptions { background, orient, max_pixels, max_bytes, max_seconds }
    }

    fn validate(&self, place: &str) -> Result<()> {
        let wrong = |key: &str, expected: String, found: String| {
            Err(Error::input(format!("{place}: images.{key}"), format!("expected {expected}, found {found}")))
        };
        if self.max_pixels == 0 {
            return wrong("max_pixels", "at least 1".into(), "0".into());
        }
        if !(1..=MAX_FILE).contains(&self.max_bytes) {
            return wrong("max_bytes", format!("1 to {MAX_FILE}"), self.max_bytes.to_string());
        }
        match self.max_seconds > 0.0 {
            true => Ok(()),
            false => wrong("max_seconds", "a number above 0".into(), self.max_seconds.to_string()),
        }
    }
}

/// One method is written as a map, none as `none`, several as a list.
fn write_methods<S: serde::Serializer>(methods: &[MethodConfig], serializer: S) -> std::result::Result<S::Ok, S::Error> {
    match methods {
        [] => serializer.serialize_str("none"),
        [one] => one.serialize(serializer),
        many => many.serialize(serializer),
    }
}

impl Recipe {
    /// Everything that can be checked without opening the model or the data.
    fn validate(&self, place: &str) -> Result<()> {
        if self.output.as_ref().is_some_and(|o| o.as_os_str().is_empty()) {
            return Err(Error::input(format!("{place}: output"), "expected a directory, found an empty path")
                .hint("leave it out for runs/<recipe name>"));
        }
        if self.model.spec().trim().is_empty() {
            return Err(
                Error::input(format!("{place}: model"), "expected a base, found an empty name").hint("builtin:tiny, or a directory")
            );
        }
        if let Some(compare) = &self.compare {
            compare.validate(place)?;
        }
        self.train.validate(place)?;
        self.images.validate(place)?;
        let task = self.task.definition();
        task.validate(place)?;
        if let Some(fusion) = &self.fusion {
            fusion.validate(&format!("{place}: fusion"))?;
            if !task.fuses() {
                return Err(Error::input(format!("{place}: fusion"), format!("task `{}` has nothing to fuse", task.name()))
                    .hint("leave it out, or choose a task on image and text"));
            }
        }
        if let Some(metric) = self.train.early_stopping.as_ref().and_then(|e| e.metric.as_deref())
            && metric != "loss"
            && !task.metrics().contains(&metric)
        {
            return Err(Error::input(format!("{place}: train.early_stopping.metric"), format!("`{metric}` is not a metric of this task"))
                .hint(format!("there are loss, {}", task.metrics().join(", "))));
        }
        if matches!(self.model, ModelConfig::Scratch(_)) && !self.method.iter().any(|m| m.name() == "full") {
            return Err(Error::input(format!("{place}: model.init"), "random weights are of use only where they are trained")
                .hint("add `method: full`, or name a pretrained base"));
        }
        if self.method.is_empty() && !task.has_own_weights() {
            return Err(Error::input(format!("{place}: method"), "`none` trains nothing with this task")
                .hint("choose a method, or `task: { classify: { head: linear } }` for a linear probe"));
        }
        Ok(())
    }
}
