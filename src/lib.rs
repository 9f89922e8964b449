//! Parameter-efficient fine-tuning of CLIP.

pub mod builtin;
pub mod clip;
pub mod data;
pub mod delta;
pub mod error;
pub mod files;
pub mod optim;

pub use error::{Error, Result};
