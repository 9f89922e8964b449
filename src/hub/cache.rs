//! The cache's layout: `models--owner--name/{blobs/<etag>, refs/<revision>, snapshots/<commit>/<file> → blob}`.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::files::write_atomic;

/// Between looks at a lock that another process holds.
const WAIT: Duration = Duration::from_millis(100);

/// One repository's part of the cache.
#[derive(Debug)]
pub(super) struct Cache {
    root: PathBuf,
    folder: String,
}

/// A git commit, which never changes.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

/// `HF_HOME`, or where it is by default.
pub(super) fn home() -> Option<PathBuf> {
    variable("HF_HOME")
        .map(PathBuf::from)
        .or_else(|| variable("XDG_CACHE_HOME").map(|xdg| PathBuf::from(xdg).join("huggingface")))
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache").join("huggingface")))
}

impl Cache {
    pub(super) fn from_env(id: &str) -> Result<Self> {
        let named = ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"].iter().find_map(|name| variable(name)).map(PathBuf::from);
        let root = named.or_else(|| home().map(|home| home.join("hub"))).ok_or_else(|| {
            Error::input("HF_HOME", "there is no home directory to keep fetched models in").hint("set HF_HOME to a directory")
        })?;
        Ok(Self { root, folder: format!("models--{}", id.replace('/', "--")) })
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    fn repo(&self) -> PathBuf {
        self.root.join(&self.folder)
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.repo().join("snapshots").join(commit)
    }

    /// The commit that a revision last stood for.
    pub(super) fn commit(&self, revision: &str) -> Option<String> {
        let commit = fs::read_to_string(self.repo().join("refs").join(revision)).ok()?.trim().to_string();
        is_commit(&commit).then_some(commit)
    }

    /// A file of a snapshot, if it is there.
    pub(super) fn file(&self, commit: &str, file: &str) -> Option<PathBuf> {
        Some(self.snapshot(commit).join(file)).filter(|p| p.is_file())
    }

    fn missing(&self, commit: &str, file: &str) -> PathBuf {
        self.repo().join(".no_exist").join(commit).join(file)
    }

    /// Whether the hub said that there is no such file.
    pub(super) fn known_missing(&self, commit: &str, file: &str) -> bool {
        self.missing(commit, file).is_file()
    }

    /// Best effort: it spares a question.
    #[cfg(feature = "hub")]
    pub(super) fn note_missing(&self, commit: &str, file: &str) {
        let _ = write_atomic(&self.missing(commit, file), b"");
    }

    #[cfg(feature = "hub")]
    pub(super) fn note_commit(&self, revision: &str, commit: &str) -> Result<()> {
        if is_commit(revision) || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        write_atomic(&self.repo().join("refs").join(revision), commit.as_bytes())
    }

    #[cfg(feature = "hub")]
    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.repo().join("blobs").join(etag)
    }

    /// One process at a time fetches a blob; `waiting` is asked meanwhile.
    #[cfg(feature = "hub")]
    pub(super) fn lock(&self, etag: &str, mut waiting: impl FnMut() -> Result<()>) -> Result<File> {
        let path = self.root.join(".locks").join(&self.folder).join(format!("{etag}.lock"));
        let parent = path.parent().unwrap_or(&self.root);
        fs::create_dir_all(parent).map_err(|e| Error::write(parent, e))?;
        let file = File::create(&path).map_err(|e| Error::write(&path, e))?;
        loop {
            match file.try_lock() {
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
    #[cfg(feature = "hub")]
    pub(super) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<PathBuf> {
        let path = self.snapshot(commit).join(file);
        let parent = path.parent().unwrap_or(&self.root).to_path_buf();
        fs::create_dir_all(&parent).map_err(|e| Error::write(&parent, e))?;
        let up = "../".repeat(2 + file.matches('/').count());
        let fresh = parent.join(format!(".tmp-{}-{}", std::process::id(), file.replace('/', "-")));
        let _ = fs::remove_file(&fresh);
        self.point(&format!("{up}blobs/{etag}"), etag, &fresh).map_err(|e| Error::write(&fresh, e))?;
        fs::rename(&fresh, &path).map_err(|e| Error::write(&path, e))?;
        Ok(path)
    }

    #[cfg(all(feature = "hub", unix))]
    fn point(&self, target: &str, _etag: &str, at: &Path) -> std::io::Result<()> {
        std::os::unix::fs::symlink(target, at)
    }

    /// Links need a privilege elsewhere.
    #[cfg(all(feature = "hub", not(unix)))]
    fn point(&self, _target: &str, etag: &str, at: &Path) -> std::io::Result<()> {
        fs::hard_link(self.blob(etag), at).or_else(|_| fs::copy(self.blob(etag), at).map(|_| ()))
    }
}
