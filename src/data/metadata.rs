//! HF's imagefolder: images in directories, and `metadata.csv` or `metadata.jsonl` beside them.

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};

use super::folder::{directories, name};
use super::identity::{file_key, name_in, normal};
use super::paths::split_named;
use super::scan::{Links, scan};
use super::{ImageRef, Raw, Split};
use crate::error::{Error, Result};

/// Table files, each with the split that its place says.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) files: Vec<(PathBuf, Option<Split>)>,
    /// What examples are named from.
    pub(super) root: PathBuf,
    /// Whether they are the metadata of a directory of images.
    pub(super) is_folder: bool,
}

/// Lone directories that are looked into.
const DEEPEST: usize = 8;

/// The `metadata` files of a directory: its own, or those of its directories of splits; nothing where there is none.
///
/// # Errors
/// When several files describe the same images, or the directory cannot be read.
pub(super) fn find(dir: &Path) -> Result<Option<Tables>> {
    let mut root = dir.to_path_buf();
    for _ in 0..DEEPEST {
        let inner = directories(&root)?;
        let own = file(&root)?;
        let mut files = Vec::new();
        for sub in &inner {
            if let (Some(split), Some(path)) = (split_named(&name(sub)), file(sub)?) {
                files.push((path, Some(split)));
            }
        }
        match (own, files.first()) {
            (Some(own), Some((other, _))) => {
                return Err(Error::input(own.display(), format!("describes images that {} describes as well", other.display()))
                    .hint("keep one metadata file for all images, or one in each split"));
            }
            (Some(own), None) => return Ok(Some(Tables { files: vec![(own, None)], root, is_folder: true })),
            (None, Some(_)) => return Ok(Some(Tables { files, root, is_folder: true })),
            (None, None) => {}
        }
        // A lone directory is where an archive was unpacked.
        let [one] = inner.as_slice() else { break };
        root = one.clone();
    }
    Ok(None)
}

fn file(dir: &Path) -> Result<Option<PathBuf>> {
    let mut found = ["metadata.jsonl", "metadata.csv"].map(|n| dir.join(n)).into_iter().filter(|p| p.is_file());
    match (found.next(), found.next()) {
        (Some(one), Some(other)) => Err(Error::input(one.display(), format!("stands beside {}", other.display())).hint("keep one of them")),
        (one, _) => Ok(one),
    }
}

/// Puts rows into the split that the directories of their images say, where nothing else says one, and tells of images without a row.
///
/// # Errors
/// When directories say the split of some images of an imagefolder only.
pub(super) fn place(tables: &Tables, raw: &mut Raw) -> Result<()> {
    if raw.examples.iter().all(|e| e.split.is_none()) {
        place_by_directory(tables, raw)?;
    }
    if tables.is_folder {
        raw.notes.extend(without_row(tables, raw)?);
    }
    Ok(())
}

fn place_by_directory(tables: &Tables, raw: &mut Raw) -> Result<()> {
    let by_directory = |image: &ImageRef| match image {
        ImageRef::File(path) => {
            let name = PathBuf::from(name_in(&tables.root, path));
            name.parent().into_iter().flatten().find_map(|part| split_named(&part.to_string_lossy()))
        }
        _ => None,
    };
    let splits: Vec<Option<Split>> = raw.examples.iter().map(|e| by_directory(&e.image)).collect();
    let named: BTreeSet<Split> = splits.iter().flatten().copied().collect();
    let Some(outside) = splits.iter().position(Option::is_none) else {
        // In a table of its own, directories that all are of one split say where images came from.
        if tables.is_folder || named.len() > 1 {
            raw.examples.iter_mut().zip(splits).for_each(|(e, split)| e.split = split);
            if !tables.is_folder {
                raw.notes.push("no column says the split; the directories of the images do".into());
            }
        }
        return Ok(());
    };
    let count = splits.iter().filter(|s| s.is_none()).count();
    let message = format!(
        "the directories of {} images say their split, those of {count} others do not; the first of these: `{}`",
        splits.len() - count,
        raw.examples[outside].id
    );
    match named.len() {
        0 | 1 if !tables.is_folder => Ok(()),
        0 => Ok(()),
        _ => Err(Error::input(tables.root.display(), message)
            .hint("give the table a column `split` (train, val or test), or put all images into directories of splits")),
    }
}

/// Images beside the metadata that no row names.
fn without_row(tables: &Tables, raw: &Raw) -> Result<Option<String>> {
    let files = || raw.examples.iter().filter_map(|e| if let ImageRef::File(path) = &e.image { Some(path) } else { None });
    let named: HashSet<PathBuf> = files().map(|path| normal(path)).collect();
    let mut left: Vec<PathBuf> = scan(&tables.root, Links::Any)?.images;
    left.retain(|path| !named.contains(&normal(path)));
    if !left.is_empty() {
        // They may be written otherwise.
        let keys: HashSet<u128> = files().map(|path| file_key(path)).collect();
        left.retain(|path| !keys.contains(&file_key(path)));
    }
    Ok(left.first().map(|first| {
        format!(
            "{} images in {} have no row in its metadata and are not read; the first: {}",
            left.len(),
            tables.root.display(),
            first.display()
        )
    }))
}
