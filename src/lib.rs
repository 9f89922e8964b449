//! Parameter-efficient fine-tuning of CLIP.

pub mod error;

pub use error::{Error, Result};
