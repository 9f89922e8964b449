//! `root/<split>/<class>/*` or `root/<class>/*`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{ImageRef, Raw, RawExample, Source, Split};
use crate::clip::decode;
use crate::error::{Error, Result};

/// Images in one directory a class, as torchvision's `ImageFolder` expects them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FolderConfig {
    /// Holds `train`, `val` and `test` directories of classes, or the classes themselves.
    pub root: PathBuf,
}

impl Source for FolderConfig {
    fn place(&self) -> String {
        self.root.display().to_string()
    }

    fn read(&self) -> Result<Raw> {
        let top = directories(&self.root).map_err(|e| e.hint("data.folder.root is relative to the working directory"))?;
        let split = |path: &PathBuf| Split::parse(&name(path));
        let mut raw = Raw::default();
        if top.iter().any(|d| split(d) == Some(Split::Train)) {
            for dir in &top {
                let Some(split) = split(dir) else {
                    return Err(Error::input(dir.display(), "stands beside a `train` directory and is no split")
                        .hint("expected train, val and test only, or classes only"));
                };
                read_classes(&self.root, dir, Some(split), &mut raw)?;
            }
        } else {
            read_classes(&self.root, &self.root, None, &mut raw)?;
        }
        if raw.examples.is_empty() {
            return Err(Error::input(self.place(), "no image found")
                .hint(format!("expected <class>/<image> or <split>/<class>/<image>; images end in {}", decode::EXTENSIONS.join(", "))));
        }
        Ok(raw)
    }
}

fn read_classes(root: &Path, dir: &Path, split: Option<Split>, raw: &mut Raw) -> Result<()> {
    for class in directories(dir)? {
        let label = name(&class);
        let mut files: Vec<PathBuf> = walkdir::WalkDir::new(&class)
            .follow_links(true)
            .into_iter()
            .filter_map(std::result::Result::ok)
            .filter(|e| e.file_type().is_file() && is_image(e.path()))
            .map(walkdir::DirEntry::into_path)
            .collect();
        files.sort();
        for path in files {
            let id = path.strip_prefix(root).unwrap_or(&path).display().to_string();
            raw.examples.push(RawExample { id, image: ImageRef::File(path), label: Some(label.clone()), split, ..Default::default() });
        }
    }
    Ok(())
}

/// Whether the extension is one of an image; hidden files are not.
pub(crate) fn is_image(path: &Path) -> bool {
    let hidden = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
    let known = path.extension().is_some_and(|e| decode::EXTENSIONS.contains(&e.to_string_lossy().to_ascii_lowercase().as_str()));
    known && !hidden
}

pub(super) fn name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Visible subdirectories, sorted.
pub(super) fn directories(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut list = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| Error::read(dir, e))? {
        let path = entry.map_err(|e| Error::read(dir, e))?.path();
        if path.is_dir() && !name(&path).starts_with('.') {
            if path.file_name().is_some_and(|n| n.to_str().is_none()) {
                return Err(
                    Error::input(path.display(), "its name is not UTF-8, and would be one with others that are not").hint("rename it")
                );
            }
            list.push(path);
        }
    }
    list.sort();
    Ok(list)
}
