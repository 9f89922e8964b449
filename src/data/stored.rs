//! Images that lie inside larger files: read when they are wanted, never unpacked to disk.

use std::fmt::Debug;
use std::fs::File;
use std::io::Read;
use std::sync::Arc;

use crate::error::Result;

/// An image inside a shard.
#[derive(Debug, Clone)]
pub struct Stored {
    store: Arc<dyn Store>,
    at: Address,
}

/// Where in a set of shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Address {
    /// Which shard.
    pub(super) shard: u32,
    /// The row in the shard, from 0.
    pub(super) row: u64,
    /// Byte and length in a tar, row group and row in a Parquet file.
    pub(super) part: [u64; 2],
}

/// A set of shards that finds an image again.
pub(super) trait Store: Debug + Send + Sync {
    /// Its bytes.
    fn bytes(&self, at: Address) -> Result<Vec<u8>>;
    /// The number of its bytes, where it is known without reading them.
    fn size(&self, _at: Address) -> Option<u64> {
        None
    }
    /// Its name in messages.
    fn row_place(&self, at: Address) -> String;
}

impl Stored {
    pub(super) fn new(store: Arc<dyn Store>, at: Address) -> Self {
        Self { store, at }
    }

    /// The image's bytes.
    ///
    /// # Errors
    /// When the shard cannot be read.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        self.store.bytes(self.at)
    }

    /// The number of its bytes, where it is known without reading them.
    pub(super) fn size(&self) -> Option<u64> {
        self.store.size(self.at)
    }

    /// Names shard and row.
    #[must_use]
    pub fn place(&self) -> String {
        self.store.row_place(self.at)
    }
}

impl PartialEq for Stored {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.store, &other.store) && self.at == other.at
    }
}

impl Eq for Stored {}

/// A file that several threads read from, each at its own position.
#[derive(Debug, Clone)]
pub(super) struct Shared {
    file: Arc<File>,
    at: u64,
    /// What counts as the beginning.
    base: u64,
}

impl Shared {
    pub(super) fn new(file: File) -> Self {
        Self { file: Arc::new(file), at: 0, base: 0 }
    }

    pub(super) fn from(&self, at: u64) -> Self {
        Self { file: self.file.clone(), at, base: 0 }
    }

    /// The same file as if it began at `base`.
    pub(super) fn window(&self, base: u64) -> Self {
        Self { file: self.file.clone(), at: base, base }
    }

    pub(super) fn len(&self) -> std::io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }
}

impl Read for Shared {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        #[cfg(unix)]
        let count = std::os::unix::fs::FileExt::read_at(&*self.file, buffer, self.at)?;
        #[cfg(windows)]
        let count = std::os::windows::fs::FileExt::seek_read(&*self.file, buffer, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

impl std::io::Seek for Shared {
    fn seek(&mut self, to: std::io::SeekFrom) -> std::io::Result<u64> {
        let (base, offset) = match to {
            std::io::SeekFrom::Start(at) => (self.base.saturating_add(at), 0),
            std::io::SeekFrom::End(offset) => (self.len()?, offset),
            std::io::SeekFrom::Current(offset) => (self.at, offset),
        };
        let at = base.checked_add_signed(offset).filter(|at| *at >= self.base);
        self.at = at.ok_or_else(|| std::io::Error::other("a position before the beginning"))?;
        Ok(self.at - self.base)
    }
}
