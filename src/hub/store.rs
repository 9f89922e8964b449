//! Writing to the cache, so that other processes and Python can work in it at the same time.

use std::fs::TryLockError;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::cache::{Cache, is_commit};
use crate::error::{Error, Result};
use crate::files::{self, Output, write_atomic};

/// Between looks at a lock that another process holds.
const WAIT: Duration = Duration::from_millis(100);

impl Cache {
    /// Best effort: it spares a question.
    pub(super) fn note_missing(&self, commit: &str, file: &str) {
        let _ = write_atomic(&self.missing(commit, file), b"");
    }

    pub(super) fn note_commit(&self, revision: &str, commit: &str) -> Result<()> {
        if is_commit(revision) || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        write_atomic(&self.repo().join("refs").join(revision), commit.as_bytes())
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.repo().join("blobs").join(etag)
    }

    /// One process at a time fetches a blob; `waiting` is asked meanwhile.
    pub(super) fn lock(&self, etag: &str, mut waiting: impl FnMut() -> Result<()>) -> Result<Output> {
        let folder = self.repo();
        let path = self.root().join(".locks").join(folder.file_name().unwrap_or_default()).join(format!("{etag}.lock"));
        let parent = path.parent().unwrap_or(self.root());
        files::create_dir_all(parent)?;
        let mut file = Output::update(&path)?;
        loop {
            match file.file().try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => {
                    waiting()?;
                    std::thread::sleep(WAIT);
                }
                // Not every file system can lock; the rename at the end still leaves one whole blob.
                Err(TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Unsupported => return Ok(file),
                Err(TryLockError::Error(e)) => return Err(Error::write(&path, e)),
            }
        }
    }

    /// Makes a blob a file of a snapshot.
    pub(super) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<PathBuf> {
        let path = self.snapshot(commit).join(file);
        let parent = path.parent().unwrap_or(self.root()).to_path_buf();
        files::create_dir_all(&parent)?;
        let up = "../".repeat(2 + file.matches('/').count());
        files::link(Path::new(&format!("{up}blobs/{etag}")), &self.blob(etag), &path)?;
        Ok(path)
    }
}
