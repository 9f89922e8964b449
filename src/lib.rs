//! Parameter-efficient fine-tuning of CLIP: LoRA, prefix and adapter layers on a frozen base, from recipes.
//!
//! Three things make a round: [`session::train`] runs a [`recipe::Recipe`] and leaves a small adapter directory, [`Model`]
//! loads a base with adapters and predicts, [`merge::merge`] folds adapters into the base. Files are HF's: adapters trained here
//! load in HF PEFT, merged models in transformers, and the other way round. The command `peft` is a thin layer over the same
//! functions.
//!
//! # Train
//!
//! ```
//! use peft::recipe::Recipe;
//! use peft::run::Existing;
//! use peft::train::Silent;
//!
//! # fn main() -> peft::Result<()> {
//! # let dir = std::env::temp_dir().join(format!("peft-train-{}", std::process::id()));
//! let mut recipe = Recipe::parse("recipe", "
//! model: builtin:tiny
//! method:
//!   lora: { rank: 4, alpha: 8, targets: [q_proj, v_proj] }
//! data: { builtin: emoji, shots: 2 }
//! task:
//!   classify: { templates: ['an icon of a {}'] }
//! train: { steps: 2, batch: 8, lr: 2.0e-3 }
//! ", "icons", &[])?;
//! # let _ = std::fs::remove_dir_all(&dir);
//! recipe.output = Some(dir.join("icons"));
//! // `Silent` hears nothing; an `Observer` of your own draws a bar, or asks for a stop.
//! let (report, _) = peft::session::train(recipe, Existing::Refuse, &candle_core::Device::Cpu, &mut Silent)?;
//! let after = report.after.and_then(|e| e.metric("accuracy"));
//! println!("{} parameters trained, accuracy {after:?}", report.trainable_parameters);
//! # assert_eq!((report.steps, after.is_some()), (2, true));
//! # assert!(dir.join("icons/adapter/adapter_model.safetensors").exists());
//! # std::fs::remove_dir_all(&dir).ok();
//! # Ok(())
//! # }
//! ```
//!
//! # Predict
//!
//! One base in memory serves any number of adapters: [`Model::fork`] starts another model on it. `examples/serve.rs` is a small
//! server made of that.
//!
//! ```
//! # fn main() -> peft::Result<()> {
//! # let dir = std::env::temp_dir().join(format!("peft-predict-{}", std::process::id()));
//! # let _ = std::fs::remove_dir_all(&dir);
//! # for name in ["clock/1.png", "clock/2.png", "clock/3.png", "heart/1.png", "heart/2.png", "heart/3.png"] {
//! #     peft::files::write_atomic(&dir.join("images").join(name), peft::builtin::sample())?;
//! # }
//! # let data = format!("data: {{ folder: {{ root: '{}' }} }}", dir.join("images").display());
//! # let recipe = format!("{{ model: 'builtin:tiny', method: lora, {data}, task: classify, train: {{ steps: 1 }} }}");
//! # let mut recipe = peft::recipe::Recipe::parse("recipe", &recipe, "recipe", &[])?;
//! # recipe.output = Some(dir.join("run"));
//! # peft::session::train(recipe, peft::run::Existing::Refuse, &candle_core::Device::Cpu, &mut peft::train::Silent)?;
//! # let (adapter, photo) = (dir.join("run/adapter"), dir.join("photo.png"));
//! # std::fs::write(&photo, peft::builtin::sample()).ok();
//! let base = peft::Model::load("builtin:tiny")?;
//! let icons = base.fork().with_adapter(&adapter)?;
//! for model in [&base, &icons] {
//!     let ranked = model.predict(&[&photo], &["clock", "heart", "building"])?;
//!     println!("{} {:.2}", ranked[0][0].label, ranked[0][0].probability);
//! }
//! # assert!(std::ptr::eq(base.base(), icons.base()));
//! # std::fs::remove_dir_all(&dir).ok();
//! # Ok(())
//! # }
//! ```
//!
//! # Merge
//!
//! ```
//! use peft::merge::{MergeOptions, merge};
//!
//! # fn main() -> peft::Result<()> {
//! # let dir = std::env::temp_dir().join(format!("peft-merge-{}", std::process::id()));
//! # let _ = std::fs::remove_dir_all(&dir);
//! # for name in ["clock/1.png", "clock/2.png", "clock/3.png", "heart/1.png", "heart/2.png", "heart/3.png"] {
//! #     peft::files::write_atomic(&dir.join("images").join(name), peft::builtin::sample())?;
//! # }
//! # let data = format!("data: {{ folder: {{ root: '{}' }} }}", dir.join("images").display());
//! # let recipe = format!("{{ model: 'builtin:tiny', method: lora, {data}, task: classify, train: {{ steps: 1 }} }}");
//! # let mut recipe = peft::recipe::Recipe::parse("recipe", &recipe, "recipe", &[])?;
//! # recipe.output = Some(dir.join("run"));
//! # peft::session::train(recipe, peft::run::Existing::Refuse, &candle_core::Device::Cpu, &mut peft::train::Silent)?;
//! # let (adapter, output) = (dir.join("run/adapter"), dir.join("merged"));
//! let done = merge(&MergeOptions {
//!     model: "builtin:tiny".into(),
//!     adapters: vec![(adapter, 1.0)],
//!     output: output.clone(),
//!     dtype: None,
//!     layout: peft::merge::Layout::Hf,
//!     force: false,
//!     allow_base_mismatch: false,
//! })?;
//! println!("features differ by {:.1e} at most", done.max_abs_diff);
//! // A directory in HF layout, with tokeniser and preprocessing: no adapter is needed any more.
//! let merged = peft::Model::load(&output.display().to_string())?;
//! # assert!(merged.manifest().is_none());
//! # std::fs::remove_dir_all(&dir).ok();
//! # Ok(())
//! # }
//! ```
//!
//! # Where things are
//!
//! [`clip`] has the towers, tokeniser and preprocessing, [`data`] sources, splits and the loader, [`task`] losses and metrics,
//! [`delta`] the adapter directory. Methods and fused operations live in the crate `peft-adapters`, which serves any candle model.
//! Nothing here prints or exits; without the default feature `cli` there is no command line at all.

/// The helpers of `tests/` know the crate by its name.
#[cfg(test)]
extern crate self as peft;

#[allow(unsafe_code, reason = "an allocator")]
pub mod alloc;
pub mod bench;
pub mod builtin;
pub mod bundle;
pub mod change;
pub mod classifier;
#[cfg(feature = "cli")]
pub mod cli;
pub mod clip;
pub mod combine;
pub mod compare;
pub mod comparison;
pub mod data;
pub mod delta;
pub mod device;
#[cfg(feature = "cli")]
pub mod doctor;
pub mod draft;
pub mod embed;
pub mod error;
pub mod estimate;
pub mod events;
pub mod extract;
#[cfg(all(test, unix, feature = "cli"))]
mod faults;
pub mod fetch;
pub mod figures;
pub mod files;
pub mod fusion;
pub mod guard;
pub mod hub;
pub mod inputs;
pub mod inspect;
pub mod interval;
mod json;
pub mod measure;
pub mod memory;
pub mod merge;
pub mod model;
pub mod named;
pub mod optim;
pub mod page;
pub mod pool;
pub mod provenance;
pub mod recipe;
pub mod report;
pub mod roster;
pub mod run;
pub mod runs;
pub mod session;
pub mod sheet;
pub mod sign;
pub mod survey;
pub mod task;
pub mod train;
pub mod undo;

pub use error::{Error, Result};
pub use model::Model;
