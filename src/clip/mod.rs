//! CLIP: configuration, weights, towers, tokeniser, preprocessing.

pub mod base;
pub mod block;
pub mod clean;
pub mod config;
pub mod decode;
pub mod encoded;
pub(crate) mod foreign;
pub mod model;
pub mod preprocess;
pub mod source;
pub mod spec;
pub mod text;
pub mod tokenizer;
pub mod trunk;
pub mod vision;
pub mod weights;

pub use block::Tensors;
pub use config::{ClipConfig, TextConfig, VisionConfig};
pub use encoded::{Encoded, Tokens};
pub use model::Clip;
pub use text::{ConstantText, TextBatch};
pub use trunk::Trunk;

pub(crate) fn method_error(error: peft_adapters::Error) -> crate::Error {
    match error {
        peft_adapters::Error::Tensor(e) => crate::Error::Tensor(e),
        e => crate::Error::input("method", e),
    }
}
