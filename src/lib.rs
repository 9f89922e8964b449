//! Parameter-efficient fine-tuning of CLIP.

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
pub mod files;
pub mod inspect;
pub mod merge;
pub mod model;
pub mod optim;
pub mod recipe;
pub mod report;
pub mod run;
pub mod session;
pub mod task;
pub mod train;

pub use error::{Error, Result};
pub use model::Model;
