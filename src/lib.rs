//! Parameter-efficient fine-tuning of CLIP.
//!
//! [`Model`] loads a base with adapters and predicts; [`session::train`] runs a [`recipe::Recipe`];
//! [`merge::merge`] folds adapters into the base. Methods and fused operations live in the crate
//! `peft-adapters`. Nothing here prints or exits, the feature `cli` apart.

pub mod bench;
pub mod builtin;
#[cfg(feature = "cli")]
pub mod cli;
pub mod clip;
pub mod data;
pub mod delta;
pub mod device;
pub mod embed;
pub mod error;
pub mod estimate;
pub mod fetch;
pub mod files;
pub mod hub;
pub mod inspect;
pub mod merge;
pub mod model;
pub mod named;
pub mod optim;
pub mod recipe;
pub mod report;
pub mod run;
pub mod session;
pub mod task;
pub mod train;

pub use error::{Error, Result};
pub use model::Model;
