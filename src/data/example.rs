//! One example: an image, texts, and what is to be learnt of them.

use std::borrow::Cow;
use std::path::PathBuf;

use super::Stored;
use crate::clip::decode;
use crate::error::{Error, Result};

/// Where the bytes of an image are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ImageRef {
    /// There is no image: the example is a text.
    #[default]
    Missing,
    /// A file.
    File(PathBuf),
    /// Bytes inside the binary.
    Embedded(&'static [u8]),
    /// Inside a shard.
    Stored(Stored),
}

/// One example.
#[derive(Debug, Clone, Default)]
pub struct Example {
    /// Stable name, in messages and predictions: a path, or an identifier of the source.
    pub id: String,
    /// Whether that is where it stands, such as the number of a row, and no name of its own: another row may stand there later.
    pub by_number: bool,
    /// The image.
    pub image: ImageRef,
    /// Texts that belong to it, each by itself.
    pub texts: Vec<String>,
    /// What is asked about it.
    pub question: Option<String>,
    /// Index into the classes, where there is one.
    pub label: Option<u32>,
    /// Indices into the classes, ascending, where there may be any number: `a|b` in a table.
    pub labels: Option<Vec<u32>>,
    /// A number that belongs to it.
    pub value: Option<f64>,
    /// Whether image and text belong together.
    pub fits: Option<bool>,
    /// Answers to the question, one from each annotator.
    pub answers: Vec<String>,
    /// Answers to choose from, where each question has its own.
    pub choices: Vec<String>,
    /// Examples of one group show the same thing: they share a split and are no negatives of one another.
    pub group: Option<String>,
    /// Equal for examples that show the same image: a digest of the file's resolved path, or of the bytes in a shard. Nothing where
    /// no other example shows it, or there is no image.
    pub image_key: Option<u128>,
    /// The first 8 bytes of blake3 of its image's file, once that was read.
    pub content: Option<u64>,
}

/// The digest that [`Example::content`] is.
pub(super) fn content_of(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(blake3::hash(bytes).as_bytes().first_chunk().copied().unwrap_or_default())
}

impl Example {
    /// The image file's bytes.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn bytes(&self) -> Result<Cow<'static, [u8]>> {
        self.bytes_within(decode::MAX_FILE)
    }

    /// [`Example::bytes`] of a file that has at most `limit` of them.
    ///
    /// # Errors
    /// When it is larger, or cannot be read.
    pub fn bytes_within(&self, limit: u64) -> Result<Cow<'static, [u8]>> {
        match &self.image {
            ImageRef::Embedded(bytes) => Ok(Cow::Borrowed(bytes)),
            ImageRef::File(path) => decode::read_file(path, limit).map(Cow::Owned),
            ImageRef::Stored(stored) => stored.bytes().map(Cow::Owned),
            ImageRef::Missing => Err(Error::input(&self.id, "has no image")),
        }
    }

    /// What its image is called in messages: a path, or shard and row.
    #[must_use]
    pub fn place(&self) -> String {
        match &self.image {
            ImageRef::File(path) => path.display().to_string(),
            ImageRef::Stored(stored) => stored.place(),
            _ => self.id.clone(),
        }
    }

    /// Whether both show the same thing: the same image, or images of one group.
    #[must_use]
    pub fn shows_same(&self, other: &Self) -> bool {
        let equal = |a: Option<&str>, b: Option<&str>| a.is_some() && a == b;
        self.same_image(other) || equal(self.group.as_deref(), other.group.as_deref()) || self.id == other.id
    }

    /// Whether both show the same image.
    #[must_use]
    pub fn same_image(&self, other: &Self) -> bool {
        self.image_key.is_some() && self.image_key == other.image_key
    }

    /// Every class that it belongs to.
    #[must_use]
    pub fn all_labels(&self) -> &[u32] {
        self.labels.as_deref().unwrap_or(self.label.as_slice())
    }
}
