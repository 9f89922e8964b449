//! A bundle: a base's directory that brings adapters along.

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::load::read_json;
use crate::clip::base::BUNDLE;
use crate::error::{Error, Result};

/// `bundle.json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Bundle {
    /// Version of the program that wrote it.
    pub version: String,
    /// The adapters in order of application.
    pub adapters: Vec<Bundled>,
}

/// An adapter of a bundle.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Bundled {
    /// Its directory, seen from the bundle.
    pub dir: PathBuf,
    /// blake3 over its files' names and contents.
    pub digest: String,
}

/// The adapters that a base brings along, in order; none where it is a plain base.
///
/// # Errors
/// When `bundle.json` is broken, or names what is not there or has changed.
pub fn bundled(base: &str) -> Result<Vec<PathBuf>> {
    let root = Path::new(base);
    let place = root.join(BUNDLE);
    let Some(bundle) = read_json::<Bundle>(&place)? else { return Ok(Vec::new()) };
    let one = |adapter: &Bundled| {
        let inside = adapter.dir.components().all(|c| matches!(c, Component::Normal(_))) && adapter.dir.components().count() > 0;
        let dir = root.join(&adapter.dir);
        if !inside || !dir.is_dir() {
            return Err(Error::input(place.display(), format!("`{}` is not a directory of this bundle", adapter.dir.display())));
        }
        match digest(&dir)? == adapter.digest {
            true => Ok(dir),
            false => Err(Error::input(dir.display(), format!("is not what {BUNDLE} says")).hint("make the bundle anew")),
        }
    };
    bundle.adapters.iter().map(one).collect()
}

/// `blake3:<hex>` over the names and contents of a directory's files.
///
/// # Errors
/// When a file cannot be read.
pub fn digest(dir: &Path) -> Result<String> {
    let mut all = blake3::Hasher::new();
    for name in files(dir)? {
        let bytes = std::fs::read(dir.join(&name)).map_err(|e| Error::read(dir.join(&name), e))?;
        all.update(blake3::hash(name.to_string_lossy().as_bytes()).as_bytes());
        all.update(blake3::hash(&bytes).as_bytes());
    }
    Ok(format!("blake3:{}", all.finalize().to_hex()))
}

/// The files of a directory and of those in it, sorted, seen from it.
///
/// # Errors
/// When it cannot be read.
pub fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    // A hub's cache consists of links.
    for entry in walkdir::WalkDir::new(dir).follow_links(true).sort_by_file_name() {
        let entry = entry.map_err(|e| Error::input(dir.display(), e))?;
        if let (true, Ok(name)) = (entry.file_type().is_file(), entry.path().strip_prefix(dir)) {
            all.push(name.to_path_buf());
        }
    }
    Ok(all)
}
