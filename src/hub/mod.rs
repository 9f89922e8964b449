//! Files of a model hub by way of the cache that `huggingface_hub` keeps: what Python fetched is not fetched again,
//! and the other way round.
//!
//! `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH` and `HF_HUB_OFFLINE` mean what they mean there.
//! Without the cargo feature `hub` only the cache is looked at.

mod cache;
mod dataset;
#[cfg(feature = "hub")]
mod remote;
#[cfg(feature = "hub")]
mod store;

use std::collections::HashMap;
use std::path::PathBuf;
#[cfg(feature = "hub")]
use std::sync::Arc;
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};
use cache::Cache;
pub use dataset::{dataset, dataset_files};

/// How far a file is.
#[derive(Debug, Clone, Copy)]
pub struct Transfer<'a> {
    /// Its name in the repository.
    pub file: &'a str,
    /// Bytes that are here.
    pub done: u64,
    /// Bytes in all; 0 when the hub does not say.
    pub total: u64,
}

/// Is told of each piece; an error stops the transfer, which goes on there next time.
pub type Progress<'a> = dyn FnMut(Transfer<'_>) -> Result<()> + 'a;

/// A repository at a revision: `owner/name` or `owner/name@revision`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Repo {
    kind: Kind,
    id: String,
    revision: String,
}

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Model,
    Dataset,
}

impl Kind {
    /// In messages and, with an s, in the names of directories.
    fn name(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Dataset => "dataset",
        }
    }
}

impl Repo {
    /// A model's id, taken apart; nothing where the text is none (a path, for example). open_clip's prefix `hf-hub:` is allowed.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.strip_prefix("hf-hub:").unwrap_or(text);
        let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (owner, name) = id.split_once('/')?;
        let legal = |part: &str| {
            let inside = part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
            inside && !part.is_empty() && part.len() <= 96 && !part.starts_with('.') && !part.contains("..")
        };
        let revised = !revision.is_empty() && revision.split('/').all(legal);
        (legal(owner) && legal(name) && revised).then(|| Self { kind: Kind::Model, id: id.to_string(), revision: revision.to_string() })
    }

    /// A dataset's.
    #[must_use]
    pub fn dataset(text: &str) -> Option<Self> {
        Some(Self { kind: Kind::Dataset, ..Self::parse(text)? })
    }
}

impl std::fmt::Display for Repo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.revision.as_str() {
            "main" => f.write_str(&self.id),
            revision => write!(f, "{}@{revision}", self.id),
        }
    }
}

/// Commits that revisions stood for when this process first asked, so that all files are of one state.
static SEEN: Mutex<Option<HashMap<(PathBuf, Repo), String>>> = Mutex::new(None);

/// A repository's files at one commit.
pub struct Snapshot {
    repo: Repo,
    cache: Cache,
    /// Known from the first answer on, or from before.
    commit: Option<String>,
    #[cfg(feature = "hub")]
    remote: Option<Arc<remote::Remote>>,
    notes: Vec<String>,
}

impl Snapshot {
    /// Nothing is asked yet.
    ///
    /// # Errors
    /// When the environment's settings are malformed, or there is no place for a cache.
    pub fn open(repo: &Repo) -> Result<Self> {
        let cache = Cache::from_env(repo)?;
        let key = (cache.root().to_path_buf(), repo.clone());
        let seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
        let known = seen.as_ref().and_then(|s| s.get(&key).cloned());
        let commit = known.or_else(|| cache::is_commit(&repo.revision).then(|| repo.revision.clone()));
        Ok(Self {
            commit,
            #[cfg(feature = "hub")]
            remote: if offline() { None } else { Some(Arc::new(remote::Remote::from_env(repo)?)) },
            notes: Vec::new(),
            repo: repo.clone(),
            cache,
        })
    }

    /// Where a file lies; fetched if it has to be. Nothing where the repository has no such file, or where the hub may
    /// not be asked and the cache lacks it.
    ///
    /// # Errors
    /// When the hub cannot be reached, refuses, or sends something else than it announced.
    pub fn get(&mut self, file: &str, progress: &mut Progress<'_>) -> Result<Option<PathBuf>> {
        if !legal_file(file) {
            return Err(Error::input(&self.repo, format!("`{file}` is no file of a repository")));
        }
        if let Some(commit) = self.commit.clone() {
            if let Some(path) = self.cache.file(&commit, file) {
                return Ok(Some(path));
            }
            if self.cache.known_missing(&commit, file) {
                return Ok(None);
            }
        }
        #[cfg(feature = "hub")]
        if self.remote.is_some() {
            return self.fetch(file, progress);
        }
        let _ = progress;
        Ok(self.cached(file))
    }

    /// From the cache alone, at the commit that the revision last stood for.
    fn cached(&mut self, file: &str) -> Option<PathBuf> {
        let commit = self.commit.clone().or_else(|| self.cache.commit(&self.repo.revision))?;
        let path = self.cache.file(&commit, file);
        if path.is_some() {
            self.settle(&commit);
        }
        path
    }

    fn settle(&mut self, commit: &str) {
        self.commit = Some(commit.to_string());
        let key = (self.cache.root().to_path_buf(), self.repo.clone());
        let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
        seen.get_or_insert_with(HashMap::new).insert(key, commit.to_string());
    }

    #[cfg(feature = "hub")]
    fn fetch(&mut self, file: &str, progress: &mut Progress<'_>) -> Result<Option<PathBuf>> {
        let Some(remote) = self.remote.clone() else { return Ok(None) };
        let revision = self.commit.as_deref().unwrap_or(&self.repo.revision);
        let answer = match remote.head(revision, file) {
            Ok(answer) => answer,
            Err(unreachable @ remote::Failure::Unreachable(_)) => {
                // What is here is better than nothing, as in huggingface_hub.
                return match self.cached(file) {
                    Some(path) => {
                        self.remote = None;
                        self.notes.push(format!("{}: the hub cannot be reached; files come from the cache", self.repo));
                        Ok(Some(path))
                    }
                    None => Err(remote.explain(unreachable, file)),
                };
            }
            Err(failure) => return Err(remote.explain(failure, file)),
        };
        match answer {
            remote::Answer::Missing(commit) => {
                if let Some(commit) = commit {
                    self.cache.note_missing(&commit, file);
                    self.settle(&commit);
                }
                Ok(None)
            }
            remote::Answer::Found(meta) => {
                let blob = self.cache.blob(&meta.etag);
                if !blob.exists() {
                    let lock = self.cache.lock(&meta.etag, || progress(Transfer { file, done: 0, total: meta.size }))?;
                    // Another process may have fetched it while this one waited.
                    if !blob.exists() {
                        remote.download(&meta, file, &blob, progress)?;
                    }
                    drop(lock);
                }
                let path = self.cache.link(&meta.commit, file, &meta.etag)?;
                self.settle(&meta.commit);
                Ok(Some(path))
            }
        }
    }

    /// Notes what the revision stands for now, so that it is found again without the hub. To be called when all files that
    /// belong together are here: until then the files of before are the ones that are found.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn keep(&mut self) -> Result<()> {
        #[cfg(feature = "hub")]
        if let Some(commit) = &self.commit {
            self.cache.note_commit(&self.repo.revision, commit)?;
        }
        Ok(())
    }

    /// The directory with the files that were asked for.
    #[must_use]
    pub fn dir(&self) -> Option<PathBuf> {
        self.commit.as_deref().map(|commit| self.cache.snapshot(commit))
    }

    /// What is worth knowing about how the files came.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The error of a repository that lacks what it needs, by what could help.
    #[must_use]
    pub fn lacks(&self, what: &str) -> Error {
        let error = |message: String| Error::input(&self.repo, message);
        if !cfg!(feature = "hub") {
            return error(format!("{what} is not in the cache ({}), and this build cannot fetch", self.cache.root().display()))
                .hint("build with the cargo feature `hub`, or fetch it with another program and name the directory");
        }
        if offline() {
            return error(format!("HF_HUB_OFFLINE is set, and {what} is not in the cache ({})", self.cache.root().display()))
                .hint("unset HF_HUB_OFFLINE once, or set HF_HOME to where it was fetched to");
        }
        error(format!("the repository holds no {what}"))
    }
}

/// Whether the network is forbidden.
fn offline() -> bool {
    std::env::var("HF_HUB_OFFLINE").is_ok_and(|v| matches!(v.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
}

/// A relative path without surprises.
fn legal_file(file: &str) -> bool {
    !file.is_empty() && !file.contains(['\\', ':', '\0']) && file.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_told_from_paths() {
        for (text, id, revision) in [
            ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32", "main"),
            ("a/b@v1.0", "a/b", "v1.0"),
            ("a/b@refs/pr/5", "a/b", "refs/pr/5"),
            ("hf-hub:laion/CLIP-ViT-B-32", "laion/CLIP-ViT-B-32", "main"),
        ] {
            assert_eq!(Repo::parse(text), Some(Repo { kind: Kind::Model, id: id.into(), revision: revision.into() }));
        }
        for text in ["model", "./a", "../a", "/a", "a/b/c", "a/", "/b", "a b/c", "a/b@", "a/b@../x", "a/..", "~/b", "a\\b/c"] {
            assert_eq!(Repo::parse(text), None, "{text}");
        }
    }
}
