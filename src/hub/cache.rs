//! The cache's layout: `models--owner--name/{blobs/<etag>, refs/<revision>, snapshots/<commit>/<file> → blob}`.

use std::fs;
use std::path::{Path, PathBuf};

use super::Repo;
use crate::error::{Error, Result};

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
    pub(super) fn from_env(repo: &Repo) -> Result<Self> {
        let named = ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"].iter().find_map(|name| variable(name)).map(PathBuf::from);
        let root = named.or_else(|| home().map(|home| home.join("hub"))).ok_or_else(|| {
            Error::input("HF_HOME", "there is no home directory to keep fetched files in").hint("set HF_HOME to a directory")
        })?;
        Ok(Self { root, folder: format!("{}s--{}", repo.kind.name(), repo.id.replace('/', "--")) })
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn repo(&self) -> PathBuf {
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

    pub(super) fn missing(&self, commit: &str, file: &str) -> PathBuf {
        self.repo().join(".no_exist").join(commit).join(file)
    }

    /// Whether the hub said that there is no such file.
    pub(super) fn known_missing(&self, commit: &str, file: &str) -> bool {
        self.missing(commit, file).is_file()
    }
}
