//! Which examples show the same image. Captions, questions and pairs often stand in one row each, so that several rows name
//! one image: such rows are one group, and the image is one candidate in retrieval.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::{ImageRef, RawExample, Split};
use crate::error::{Error, Result};

/// Gives rows that show the same image the same [`super::Example::image_key`] and the same group, within each split. Groups that the
/// source states and images join: rows of group `a` and rows of group `b` that share an image become one group.
///
/// Files are the same when their resolved paths are; images in shards are the same when their bytes are.
///
/// # Errors
/// When a file is in two splits.
pub(super) fn join(place: &str, examples: &mut [RawExample]) -> Result<Vec<String>> {
    let keys = keys(examples);
    for (example, key) in examples.iter_mut().zip(keys) {
        example.image_key = example.image_key.or(key);
    }
    let renamed = tell_apart(examples);
    let mut seen = HashSet::new();
    // Only images that occur twice are of interest.
    let shared: HashSet<u128> = examples.iter().filter_map(|e| e.image_key).filter(|key| !seen.insert(*key)).collect();
    let mut notes: Vec<String> = renamed.into_iter().collect();
    if shared.is_empty() {
        return Ok(notes);
    }
    drop(seen);
    notes.extend(check_splits(place, examples, &shared)?);
    notes.extend(contradictions(examples, &shared));
    unite(examples, &shared);
    Ok(notes)
}

/// Annotation files may number their images each from the beginning: a number that is two images is two groups.
pub(super) fn numbered_apart(examples: &mut [RawExample]) {
    let mut first: HashMap<&str, (Option<Split>, &ImageRef)> = HashMap::new();
    let mut twice: HashSet<String> = HashSet::new();
    for e in examples.iter() {
        let Some(group) = &e.group else { continue };
        let (split, image) = *first.entry(group).or_insert((e.split, &e.image));
        if split != e.split && image != &e.image {
            twice.insert(group.clone());
        }
    }
    for e in examples {
        if let (Some(group), Some(split)) = (e.group.as_ref().filter(|g| twice.contains(*g)), e.split) {
            e.group = Some(format!("{split}:{group}"));
        }
    }
}

/// Two splits may number their examples each from the beginning: different images of one name take the name of their split.
fn tell_apart(examples: &mut [RawExample]) -> Option<String> {
    if examples.iter().all(|e| e.split.is_none()) {
        return None;
    }
    let mut first: HashMap<&str, (Split, Option<u128>)> = HashMap::new();
    let mut twice: HashSet<String> = HashSet::new();
    for e in examples.iter() {
        let (split, key) = (e.split.unwrap_or(Split::Train), e.image_key);
        let (other, before) = *first.entry(&e.id).or_insert((split, key));
        if other != split && key.is_some() && before.is_some() && before != key {
            twice.insert(e.id.clone());
        }
    }
    for e in examples.iter_mut().filter(|e| twice.contains(&e.id)) {
        e.id = format!("{}:{}", e.split.unwrap_or(Split::Train), e.id);
    }
    let one = twice.iter().min()?;
    Some(format!("{} names stand in several splits for different images, as `{one}` does; they take the name of their split", twice.len()))
}

/// A key for each image: of files by their path, of images in shards by their bytes where the rows have texts or questions.
fn keys(examples: &[RawExample]) -> Vec<Option<u128>> {
    let mut files = Files::default();
    for example in examples {
        if let ImageRef::File(path) = &example.image {
            files.enter(parent(path));
        }
    }
    let mut sizes: HashMap<u64, usize> = HashMap::new();
    examples.iter().filter_map(stored_size).for_each(|size| *sizes.entry(size).or_default() += 1);
    let key = |e: &RawExample| match &e.image {
        ImageRef::File(path) => Some(key_of(files.resolve(path).as_os_str().as_encoded_bytes())),
        ImageRef::Stored(_) if e.image_key.is_some() || (e.texts.is_empty() && e.question.is_none()) => None,
        // Images of different sizes differ.
        ImageRef::Stored(_) if stored_size(e).is_some_and(|size| sizes.get(&size) == Some(&1)) => None,
        // What cannot be read is told of when it is wanted.
        ImageRef::Stored(stored) => stored.bytes().ok().map(|bytes| key_of(&bytes)),
        ImageRef::Missing | ImageRef::Embedded(_) => None,
    };
    examples.par_iter().map(key).collect()
}

fn stored_size(e: &RawExample) -> Option<u64> {
    match &e.image {
        ImageRef::Stored(stored) => stored.size(),
        _ => None,
    }
}

/// The key of a file: its resolved path's.
pub(super) fn file_key(path: &Path) -> u128 {
    let mut files = Files::default();
    files.enter(parent(path));
    key_of(files.resolve(path).as_os_str().as_encoded_bytes())
}

/// The beginning of blake3.
pub(super) fn key_of(bytes: &[u8]) -> u128 {
    u128::from_le_bytes(blake3::hash(bytes).as_bytes().first_chunk().copied().unwrap_or_default())
}

/// Resolves paths; each directory once.
#[derive(Default)]
struct Files(HashMap<PathBuf, PathBuf>);

impl Files {
    fn enter(&mut self, parent: &Path) {
        if !self.0.contains_key(parent) {
            let resolved = parent.canonicalize().unwrap_or_else(|_| normal(&std::path::absolute(parent).unwrap_or_else(|_| parent.into())));
            self.0.insert(parent.to_path_buf(), resolved);
        }
    }

    /// Without links, and without `.` and `..`; a file that does not exist has a path nevertheless.
    fn resolve(&self, path: &Path) -> PathBuf {
        let is_link = path.symlink_metadata().is_ok_and(|m| m.is_symlink());
        let plain = || match (self.0.get(parent(path)), path.file_name()) {
            (Some(parent), Some(name)) => parent.join(name),
            _ => normal(path),
        };
        if is_link || path.file_name().is_none() { path.canonicalize().unwrap_or_else(|_| plain()) } else { plain() }
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A path without `.`, and without `..` behind a name.
pub(super) fn normal(path: &Path) -> PathBuf {
    use std::path::Component;
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir if matches!(out.components().next_back(), Some(Component::Normal(_))) => _ = out.pop(),
            Component::ParentDir if matches!(out.components().next_back(), Some(Component::RootDir)) => {}
            other => out.push(other),
        }
    }
    out
}

/// A file below `root` as it is called there, however it was written: `a.png`, `./a.png` and `/data/a.png` in `/data` are `a.png`.
/// A file elsewhere keeps its path, without what is superfluous in it.
pub(super) fn name_in(root: &Path, path: &Path) -> String {
    let (plain, start) = (normal(path), normal(root));
    if let Ok(inner) = plain.strip_prefix(&start).map(Path::to_path_buf)
        && !inner.starts_with("..")
    {
        return inner.display().to_string();
    }
    let absolute = |p: &Path| std::path::absolute(p).map(|p| normal(&p)).unwrap_or_else(|_| normal(p));
    let (plain, start) = (absolute(path), absolute(root));
    let resolved = root.canonicalize().unwrap_or_else(|_| start.clone());
    // A few steps up, so that a table beside its images gives the same names wherever both are moved to.
    const STEPS: usize = 2;
    for start in [start, resolved] {
        for (up, above) in start.ancestors().take(STEPS + 1).enumerate() {
            if above.parent().is_some()
                && let Ok(inner) = plain.strip_prefix(above)
            {
                return format!("{}{}", "../".repeat(up), inner.display());
            }
        }
    }
    plain.display().to_string()
}

/// An image that is trained on must not be tested with. A file in two splits is a mistake in the source; equal bytes in two shards
/// may be what the benchmark is, and are told of. So are questions about an image that other splits ask about as well.
fn check_splits(place: &str, examples: &[RawExample], shared: &HashSet<u128>) -> Result<Option<String>> {
    if examples.iter().all(|e| e.split.is_none()) {
        return Ok(None);
    }
    let mut first: HashMap<u128, (Split, &RawExample)> = HashMap::new();
    let mut told: BTreeMap<u128, String> = BTreeMap::new();
    let mut example = None;
    for e in examples {
        let Some(key) = e.image_key.filter(|key| shared.contains(key)) else { continue };
        let split = e.split.unwrap_or(Split::Train);
        let (other, before) = *first.entry(key).or_insert((split, e));
        if other == split {
            continue;
        }
        let message = match before.id == e.id {
            true => format!("`{}` is in {other} and in {split}", e.id),
            false => format!("`{}` in {other} and `{}` in {split} are the same image", before.id, e.id),
        };
        if matches!(e.image, ImageRef::File(_)) && e.question.is_none() {
            return Err(Error::input(place, message).hint("an image that is trained on says nothing as a test: leave it in one split"));
        }
        example.get_or_insert_with(|| message.clone());
        told.insert(key, message);
    }
    Ok(example.map(|one| format!("{} images are in two splits or more: what is tested has been trained on. The first: {one}", told.len())))
}

/// Images whose rows say different classes.
fn contradictions(examples: &[RawExample], shared: &HashSet<u128>) -> Option<String> {
    let mut first: HashMap<u128, &RawExample> = HashMap::new();
    let mut found = HashSet::new();
    let mut example = None;
    for e in examples {
        let (Some(key), Some(label)) = (e.image_key.filter(|key| shared.contains(key)), &e.label) else { continue };
        let before = *first.entry(key).or_insert(e);
        let Some(other) = before.label.as_ref().filter(|other| *other != label) else { continue };
        example.get_or_insert_with(|| match before.id == e.id {
            true => format!("`{}` is `{other}` and `{label}`", e.id),
            false => format!("`{}` is `{other}`, and `{}`, the same file, is `{label}`", before.id, e.id),
        });
        found.insert(key);
    }
    example.map(|one| format!("{} images have rows with different classes. The first: {one}", found.len()))
}

/// Makes rows that share an image, or a group with such rows, one group.
fn unite(examples: &mut [RawExample], shared: &HashSet<u128>) {
    #[derive(PartialEq, Eq, Hash)]
    enum Tie<'a> {
        Image(u128),
        Group(&'a str),
    }
    let mut sets = Sets::new(examples.len());
    let mut first: HashMap<(Split, Tie<'_>), usize> = HashMap::new();
    for (i, e) in examples.iter().enumerate() {
        let split = e.split.unwrap_or(Split::Train);
        let image = e.image_key.filter(|key| shared.contains(key)).map(Tie::Image);
        for tie in image.into_iter().chain(e.group.as_deref().map(Tie::Group)) {
            let by_image = matches!(tie, Tie::Image(_));
            let other = *first.entry((split, tie)).or_insert(i);
            sets.unite(other, i, by_image);
        }
    }
    drop(first);
    let stated: HashSet<String> = examples.iter().filter_map(|e| e.group.clone()).collect();
    // A set is called after its first group, or after its first example where it has none, so that other rows do not rename it.
    let mut names: HashMap<usize, (bool, String)> = HashMap::new();
    let roots: Vec<Option<usize>> = (0..examples.len()).map(|i| Some(sets.find(i)).filter(|&r| sets.by_image[r])).collect();
    for (e, root) in examples.iter().zip(&roots) {
        let Some(root) = root else { continue };
        let own = match &e.group {
            Some(group) => (false, group.clone()),
            None if stated.contains(&e.id) => (true, format!("image {}", e.id)),
            None => (true, e.id.clone()),
        };
        let name = names.entry(*root).or_insert_with(|| own.clone());
        *name = own.min(name.clone());
    }
    for (e, root) in examples.iter_mut().zip(&roots) {
        if let Some((_, name)) = root.and_then(|root| names.get(&root)) {
            e.group = Some(name.clone());
        }
    }
}

/// Disjoint sets of indices.
struct Sets {
    above: Vec<usize>,
    /// Whether two of a set (given by its root) share an image.
    by_image: Vec<bool>,
}

impl Sets {
    fn new(count: usize) -> Self {
        Self { above: (0..count).collect(), by_image: vec![false; count] }
    }

    fn find(&mut self, mut i: usize) -> usize {
        while self.above[i] != i {
            self.above[i] = self.above[self.above[i]];
            i = self.above[i];
        }
        i
    }

    fn unite(&mut self, a: usize, b: usize, by_image: bool) {
        let (a, b) = (self.find(a), self.find(b));
        if a != b {
            let (root, below) = (a.min(b), a.max(b));
            self.above[below] = root;
            self.by_image[root] = self.by_image[root] || self.by_image[below] || by_image;
        }
    }
}
