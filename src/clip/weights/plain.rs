//! What training scripts save with `torch.save`: plain data with tensors in it.

use std::path::Path;

use candle_core::Tensor;

use super::container::Bytes;
use super::pickle::Node;
use super::torch;
use crate::error::Result;

/// A value of a Python program.
#[derive(Debug)]
pub(crate) enum Content {
    /// A dict's entries whose keys are strings.
    Map(Vec<(String, Content)>),
    Tensor(Tensor),
    Int(i64),
    Float(f64),
    Text(String),
    /// Lists and anything else.
    Other,
}

impl Content {
    /// An entry of a map.
    pub(crate) fn get(&self, key: &str) -> Option<&Self> {
        match self {
            Self::Map(entries) => entries.iter().find(|(k, _)| k == key).map(|(_, v)| v),
            _ => None,
        }
    }

    /// A number of either kind.
    pub(crate) fn number(&self) -> Option<f64> {
        match self {
            Self::Int(n) => Some(*n as f64),
            Self::Float(x) => Some(*x),
            _ => None,
        }
    }
}

/// Reads a file that `torch.save` wrote; nothing in it is executed.
///
/// # Errors
/// When it is damaged or names more than tensors.
pub(crate) fn read_torch(path: &Path) -> Result<Content> {
    let place = path.display().to_string();
    let (tree, archive) = torch::open_tree(&place, Bytes::open(path)?)?;
    content(tree, &archive)
}

fn content(node: Node, archive: &torch::Archived<'_>) -> Result<Content> {
    Ok(match node {
        Node::Map(entries) => {
            Content::Map(entries.into_iter().map(|(key, value)| Ok((key, content(value, archive)?))).collect::<Result<_>>()?)
        }
        Node::Tensor(rebuilt) => Content::Tensor(archive.tensor(&rebuilt)?),
        Node::Int(n) => Content::Int(n),
        Node::Float(x) => Content::Float(x),
        Node::Text(text) => Content::Text(text),
        Node::Other => Content::Other,
    })
}
