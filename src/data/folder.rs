//! `root/<split>/<class>/*` or `root/<class>/*`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::paths::split_named;
use super::scan::{self, Entry, Links, Scan, advice, counted, entries, is_ignored};
use super::{ImageRef, Raw, RawExample, Source, Split};
use crate::error::{Error, Result};

/// Images in one directory a class, as torchvision's `ImageFolder` expects them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FolderConfig {
    /// Holds directories of splits (`train`, `validation`, `test_set`, …) with one directory a class in each, or the classes
    /// themselves.
    pub root: PathBuf,
}

impl Source for FolderConfig {
    fn place(&self) -> String {
        self.root.display().to_string()
    }

    fn read(&self) -> Result<Raw> {
        directories(&self.root).map_err(|e| e.hint("data.folder.root is relative to the working directory"))?;
        let mut reading = Reading::new(&self.root)?;
        let root = reading.unwrap(&self.root)?;
        match division(&root, &mut reading.notes)? {
            Division::None => reading.classes(&root, None)?,
            Division::Splits(splits) => {
                for (dir, split) in splits {
                    reading.classes(&doubled(dir, split)?, Some(split))?;
                }
            }
            Division::InClasses => reading.split_classes(&root)?,
        }
        reading.done()
    }

    fn has_own_splits(&self) -> bool {
        let reading = Reading::new(&self.root).and_then(|mut r| division(&r.unwrap(&self.root)?, &mut Vec::new()));
        !matches!(reading, Ok(Division::None) | Err(_))
    }
}

/// What the directories of a root are.
enum Division {
    /// Classes.
    None,
    /// Splits with classes in them.
    Splits(Vec<(PathBuf, Split)>),
    /// Classes with splits in them.
    InClasses,
}

/// Finds out by names, as Hugging Face `datasets` reads them, and by what the directories hold: a directory `train` that holds images
/// among others that are no splits is a class.
fn division(root: &Path, notes: &mut Vec<String>) -> Result<Division> {
    let dirs = directories(root)?;
    let (named, others): (Vec<_>, Vec<_>) = dirs.iter().partition(|d| split_named(&name(d)).is_some());
    let Some(first) = named.first() else {
        return Ok(if splits_in_classes(&dirs)? { Division::InClasses } else { Division::None });
    };
    let mut with_classes = Vec::new();
    for dir in &named {
        let inner = directories(dir)?;
        if !inner.is_empty() && !holds_images(dir)? && any_images(dir)? {
            with_classes.push(*dir);
        }
    }
    let mut strangers = Vec::new();
    for dir in &others {
        if any_images(dir)? {
            strangers.push(*dir);
        }
    }
    if with_classes.is_empty() {
        if !strangers.is_empty() {
            return Ok(Division::None);
        }
        let names: Vec<String> = named.iter().map(|d| format!("`{}`", name(d))).collect();
        return match any_images(first)? || named.len() > 1 {
            true => Err(Error::input(root.display(), format!("{} name splits, and hold no class directories", names.join(", "))).hint(
                "expected <split>/<class>/<image>; name a table of labels (`table: { path: FILE }`), or rename the directories if they are classes",
            )),
            false => Ok(Division::None),
        };
    }
    if let Some(stranger) = strangers.first() {
        return Err(Error::input(stranger.display(), format!("stands beside `{}` and names no split", name(with_classes[0])))
            .hint("expected directories of splits only (train, validation, test), or of classes only"));
    }
    let left: Vec<String> = others.iter().map(|d| format!("`{}`", name(d))).collect();
    if !left.is_empty() {
        notes.push(format!("{} beside the splits hold no image and are not read", left.join(", ")));
    }
    let splits: Vec<(PathBuf, Split)> = named.iter().filter_map(|d| Some(((*d).clone(), split_named(&name(d))?))).collect();
    notes.extend(read_as(&splits));
    Ok(Division::Splits(splits))
}

/// Names which directories are which split, where that is not plain.
fn read_as(splits: &[(PathBuf, Split)]) -> Option<String> {
    let plain = splits.iter().all(|(dir, split)| Split::parse(&name(dir)) == Some(*split));
    let mut counts: BTreeMap<Split, usize> = BTreeMap::new();
    splits.iter().for_each(|(_, split)| *counts.entry(*split).or_default() += 1);
    let list: Vec<String> = splits.iter().map(|(dir, split)| format!("`{}` as {split}", name(dir))).collect();
    (!plain || counts.values().any(|n| *n > 1)).then(|| format!("read {}", list.join(", ")))
}

/// `training_set/training_set/<class>`, as archives on Kaggle have it.
fn doubled(mut dir: PathBuf, split: Split) -> Result<PathBuf> {
    loop {
        let inner = directories(&dir)?;
        match inner.as_slice() {
            [one] if split_named(&name(one)) == Some(split) && !holds_images(&dir)? && !holds_images(one)? => dir.clone_from(one),
            _ => return Ok(dir),
        }
    }
}

/// Whether every class holds nothing but directories of splits, of which one is trained on.
fn splits_in_classes(classes: &[PathBuf]) -> Result<bool> {
    let mut found = BTreeSet::new();
    for class in classes {
        let inner: Vec<Option<Split>> = directories(class)?.iter().map(|d| split_named(&name(d))).collect();
        if inner.is_empty() || inner.contains(&None) || holds_images(class)? {
            return Ok(false);
        }
        found.extend(inner.into_iter().flatten());
    }
    Ok(found.len() > 1)
}

/// Whether images lie in a directory, not below it.
fn holds_images(dir: &Path) -> Result<bool> {
    Ok(entries(dir)?.iter().any(|e| !e.is_dir && is_image(&e.path)))
}

/// Whether a directory has an image anywhere in it.
fn any_images(dir: &Path) -> Result<bool> {
    if holds_images(dir)? {
        return Ok(true);
    }
    for inner in directories(dir)? {
        if !inner.is_symlink() && any_images(&inner)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What a folder holds, as far as it has been read.
struct Reading {
    root: PathBuf,
    /// The root without links.
    resolved: PathBuf,
    raw: Raw,
    notes: Vec<String>,
    /// Files that are not read, by extension and class.
    left_out: BTreeMap<String, BTreeMap<String, usize>>,
    /// Classes without an image, with the splits and what is there instead.
    empty: BTreeMap<String, Vec<(Option<Split>, String)>>,
    /// Images that have no class, and where.
    beside: Vec<(PathBuf, usize)>,
}

impl Reading {
    fn new(root: &Path) -> Result<Self> {
        let resolved = root.canonicalize().map_err(|e| Error::read(root, e))?;
        Ok(Self {
            root: root.to_path_buf(),
            resolved,
            raw: Raw::default(),
            notes: Vec::new(),
            left_out: BTreeMap::new(),
            empty: BTreeMap::new(),
            beside: Vec::new(),
        })
    }

    /// Goes down where a lone directory holds everything: `root/dataset/<class>`.
    fn unwrap(&mut self, root: &Path) -> Result<PathBuf> {
        let mut dir = root.to_path_buf();
        loop {
            let inner = directories(&dir)?;
            let [one] = inner.as_slice() else { break };
            if split_named(&name(one)).is_some()
                || one.is_symlink()
                || holds_images(&dir)?
                || holds_images(one)?
                || directories(one)?.is_empty()
            {
                break;
            }
            dir.clone_from(one);
        }
        if dir != root {
            let inner = dir.strip_prefix(root).unwrap_or(&dir).display().to_string();
            self.notes.push(format!("read what is in `{inner}`, the only directory of {}", root.display()));
        }
        Ok(dir)
    }

    /// Reads one directory a class.
    fn classes(&mut self, dir: &Path, split: Option<Split>) -> Result<()> {
        let classes = directories(dir)?;
        for class in &classes {
            self.class(class, &name(class), split)?;
        }
        self.look_beside(dir)
    }

    /// Reads `<class>/<split>/*`.
    fn split_classes(&mut self, root: &Path) -> Result<()> {
        for class in directories(root)? {
            for dir in directories(&class)? {
                let split = split_named(&name(&dir));
                self.class(&dir, &name(&class), split)?;
            }
        }
        self.look_beside(root)
    }

    fn class(&mut self, dir: &Path, label: &str, split: Option<Split>) -> Result<()> {
        if dir.is_symlink() {
            scan::check_link(dir, &self.resolved, Links::Any)?;
            let target = dir.canonicalize().map_err(|e| Error::read(dir, e))?;
            if target.starts_with(&self.resolved) {
                let message = format!("links to {}, so that one image would have two labels or splits", target.display());
                return Err(Error::input(dir.display(), message).hint("remove the link"));
            }
        }
        let Scan { images, left_out, ignored, broken } = scan::scan(dir, Links::Within(&self.resolved))?;
        if images.is_empty() && broken.is_empty() {
            let all = [&left_out, &ignored].into_iter().filter(|m| !m.is_empty()).map(counted).collect::<Vec<_>>().join(", ");
            self.empty.entry(label.to_string()).or_default().push((split, all));
        }
        for (extension, count) in left_out {
            *self.left_out.entry(extension).or_default().entry(label.to_string()).or_default() += count;
        }
        self.raw.bad.extend(broken);
        for path in images {
            let id = path.strip_prefix(&self.root).unwrap_or(&path).display().to_string();
            let image = ImageRef::File(path);
            self.raw.examples.push(RawExample { id, image, label: Some(label.to_string()), split, ..Default::default() });
        }
        Ok(())
    }

    /// Counts images that have no class, since they stand beside the classes.
    fn look_beside(&mut self, dir: &Path) -> Result<()> {
        let count = entries(dir)?.iter().filter(|e| !e.is_dir && is_image(&e.path)).count();
        if count > 0 {
            self.beside.push((dir.to_path_buf(), count));
        }
        Ok(())
    }

    fn done(mut self) -> Result<Raw> {
        let place = self.root.display().to_string();
        if self.raw.examples.is_empty() && self.raw.bad.is_empty() {
            return Err(self.nothing(&place));
        }
        let known: BTreeSet<&String> = self.raw.examples.iter().filter_map(|e| e.label.as_ref()).collect();
        if let Some((class, found)) = self.empty.iter().find(|(class, _)| !known.contains(class)) {
            return Err(self.lacks_images(class, found));
        }
        for (class, found) in &self.empty {
            for (split, _) in found {
                let split = split.map(|s| format!(" in {s}")).unwrap_or_default();
                self.notes.push(format!("class `{class}` has no image{split}"));
            }
        }
        if let (1, Some(class)) = (known.len(), known.first()) {
            self.notes.push(format!(
                "all images are of one class, `{class}`: directories are classes, and to classify takes two. Where a table says what the \
                 images show, name it in place of the folder: `table: {{ path: FILE, images: DIR }}`"
            ));
        }
        self.notes.extend(self.told_left_out());
        for (dir, count) in &self.beside {
            self.notes.push(format!("{count} images in {} itself are not read: they are in no class directory", dir.display()));
        }
        self.raw.notes.append(&mut self.notes);
        Ok(self.raw)
    }

    fn nothing(&self, place: &str) -> Error {
        let layout = "expected <class>/<image> or <split>/<class>/<image>";
        if let Some((dir, count)) = self.beside.first() {
            return Error::input(dir.display(), format!("holds {count} images, but no class directories"))
                .hint(format!("{layout}; where a table says what the images are, name it (`table: {{ path: FILE }}`)"));
        }
        match self.told_left_out() {
            Some(told) => Error::input(place, format!("no image found: {told}")).hint(layout),
            None => Error::input(place, "no image found").hint(format!("{layout}; {}", advice([]))),
        }
    }

    fn lacks_images(&self, class: &str, found: &[(Option<Split>, String)]) -> Error {
        let what: Vec<&str> = found.iter().map(|(_, what)| what.as_str()).filter(|w| !w.is_empty()).collect();
        let what = if what.is_empty() { "it is empty".to_string() } else { format!("it holds {}", what.join(", ")) };
        let extensions = self.left_out.iter().filter(|(_, classes)| classes.contains_key(class)).map(|(e, _)| e);
        Error::input(self.root.display(), format!("class `{class}` has no image that can be read: {what}"))
            .hint(format!("{}; remove the directory if it is no class", advice(extensions)))
    }

    /// `12 files are not read: 10 .heic (6 in cat, 4 in dog), 2 .psd (in dog)`.
    fn told_left_out(&self) -> Option<String> {
        const CLASSES: usize = 5;
        let of_extension = |(extension, classes): (&String, &BTreeMap<String, usize>)| {
            let all = BTreeMap::from([(extension.clone(), classes.values().sum::<usize>())]);
            let mut list: Vec<String> = classes.iter().take(CLASSES).map(|(class, n)| format!("{n} in {class}")).collect();
            if classes.len() > CLASSES {
                list.push(format!("the rest in {} more classes", classes.len() - CLASSES));
            }
            format!("{} ({})", counted(&all), list.join(", "))
        };
        let total: usize = self.left_out.values().flat_map(BTreeMap::values).sum();
        let parts: Vec<String> = self.left_out.iter().map(of_extension).collect();
        (total > 0).then(|| format!("{total} files are not read: {}; {}", parts.join(", "), advice(self.left_out.keys())))
    }
}

pub(super) use scan::is_image;

pub(super) fn name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Subdirectories that no rule passes over, sorted.
pub(super) fn directories(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut list = Vec::new();
    for Entry { path, is_dir } in entries(dir)? {
        if is_dir && !is_ignored(&name(&path), true) {
            if path.file_name().is_some_and(|n| n.to_str().is_none()) {
                return Err(
                    Error::input(path.display(), "its name is not UTF-8, and would be one with others that are not").hint("rename it")
                );
            }
            list.push(path);
        }
    }
    Ok(list)
}
