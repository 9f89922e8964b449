//! Adapters by name: a directory, a file of CLIP-LoRA's, or a repository on the hub.

use std::path::{Path, PathBuf};

use super::{Manifest, file};
use crate::error::{Error, Result};
use crate::files;
use crate::hub::{Progress, Repo, Snapshot};
use crate::sign;

/// The largest `peft.json` that is read.
const MAX_JSON: u64 = 64 << 20;

/// A signed adapter has at most so many files.
const MAX_FILES: usize = 1000;

/// Where the files of an adapter are; those of a hub id are fetched where they are not in the cache.
///
/// # Errors
/// When there is no such adapter, or it cannot be fetched.
pub fn locate(name: &Path) -> Result<PathBuf> {
    locate_with(name, &mut |_| Ok(()))
}

/// [`locate`], telling `progress` of what is fetched.
///
/// # Errors
/// As [`locate`], and what `progress` returns.
pub fn locate_with(name: &Path, progress: &mut Progress<'_>) -> Result<PathBuf> {
    if name.exists() {
        return Ok(of_run(name)?.unwrap_or_else(|| name.to_path_buf()));
    }
    match name.to_str().and_then(Repo::parse) {
        Some(repo) => fetch(&repo, progress),
        // A directory that a kill moved aside is found by who reads it.
        None => Ok(name.to_path_buf()),
    }
}

/// The adapter of a run directory. One that a kill moved aside is found by who reads it.
fn of_run(dir: &Path) -> Result<Option<PathBuf>> {
    let has = |name: &str| dir.join(name).exists();
    if !dir.is_dir() || [file::CONFIG, file::MANIFEST, file::TASK, file::WEIGHTS, file::FULL].into_iter().any(has) {
        return Ok(None);
    }
    match (has("adapter") || has(".old-adapter"), has("recipe.yaml")) {
        (true, _) => Ok(Some(dir.join("adapter"))),
        (false, true) => Err(Error::input(dir.display(), "is a run without an adapter yet")
            .hint("let its training come to an end, or to its first saved epoch")),
        (false, false) => Ok(None),
    }
}

fn fetch(repo: &Repo, progress: &mut Progress<'_>) -> Result<PathBuf> {
    let mut snapshot = Snapshot::open(repo)?;
    let mut parts = vec![String::new()];
    if let Some(path) = snapshot.get(file::MANIFEST, progress)? {
        let place = format!("{repo} ({})", file::MANIFEST);
        let manifest: Manifest =
            crate::json::from_slice(&files::read(&path, MAX_JSON)?).map_err(|e| Error::input(place, format!("not as expected: {e}")))?;
        parts.extend(manifest.methods.iter().map(|m| format!("{}/", m.dir)));
    }
    let mut found = snapshot.get(file::TASK, progress)?.is_some();
    for part in parts {
        if snapshot.get(&format!("{part}{}", file::CONFIG), progress)?.is_none() {
            continue;
        }
        found = true;
        let weights = [file::WEIGHTS, file::PICKLED, file::FULL].map(|name| format!("{part}{name}"));
        let mut here = false;
        for name in &weights {
            here = here || snapshot.get(name, progress)?.is_some();
        }
        if !here {
            return Err(snapshot.lacks(&weights.join(" or ")));
        }
    }
    if found {
        signature(&mut snapshot, progress)?;
        snapshot.keep()?;
    }
    snapshot.dir().filter(|_| found).ok_or_else(|| snapshot.lacks(&format!("adapter ({})", file::CONFIG)))
}

/// What a signature is checked with, where the adapter is signed: the digests, their signature and every file that they name.
fn signature(snapshot: &mut Snapshot, progress: &mut Progress<'_>) -> Result<()> {
    let Some(sums) = snapshot.get(sign::SUMS, progress)? else { return Ok(()) };
    snapshot.get(sign::SUMS_SIGNATURE, progress)?;
    let names = sign::listed(&sums)?;
    if names.len() > MAX_FILES {
        return Err(Error::input(sums.display(), format!("names {} files; an adapter has at most {MAX_FILES}", names.len())));
    }
    // What the repository lacks is told by who verifies.
    names.iter().try_for_each(|name| snapshot.get(name, progress).map(drop))
}
