//! Files of a sharded set: a file, a directory, a glob, a brace range, or a list of these.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Split;
use crate::error::{Error, Result};
use crate::hub;

/// One path, or several: `data/train-*.parquet`, `shard-{000000..000012}.tar`, a directory, `hub:owner/dataset@revision`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a path such as data/train-*.parquet, or a list of paths")]
pub enum Paths {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl Default for Paths {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl From<&Path> for Paths {
    fn from(path: &Path) -> Self {
        Self::One(path.display().to_string())
    }
}

impl std::fmt::Display for Paths {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.patterns() {
            [first, .., last] if self.patterns().len() > 3 => write!(f, "{first}, …, {last}"),
            few => f.write_str(&few.join(", ")),
        }
    }
}

/// More shards than this are taken for a mistake in a range.
const MAX_SHARDS: usize = 100_000;

/// An id on the hub, taken out of `hub:owner/dataset@revision:data/train-*.parquet`, and which of its files are meant.
pub(super) fn on_hub(pattern: &str) -> Option<(&str, Option<&str>)> {
    let id = pattern.strip_prefix("hub:")?;
    Some(id.split_once(':').map_or((id, None), |(id, files)| (id, Some(files))))
}

impl Paths {
    /// Whether a part of it lies on the hub.
    pub(super) fn is_remote(&self) -> bool {
        self.patterns().iter().any(|p| on_hub(p).is_some())
    }

    /// Fetches what lies on the hub, so that only paths of this machine are left.
    pub(super) fn local(&self, place: &str, extensions: &[&str], progress: &mut hub::Progress<'_>) -> Result<Self> {
        let mut paths = Vec::new();
        for pattern in self.patterns() {
            let Some((id, wanted)) = on_hub(pattern) else {
                paths.push(pattern.clone());
                continue;
            };
            let wanted = wanted.map(glob::Pattern::new).transpose();
            let wanted = wanted.map_err(|e| Error::input(place, format!("`{pattern}` has no pattern behind the id: {e}")))?;
            let picked = |name: &str| {
                let known = extensions.iter().any(|e| name.to_ascii_lowercase().ends_with(&format!(".{e}")));
                known && wanted.as_ref().is_none_or(|w| w.matches(name))
            };
            paths.extend(hub::dataset(id, &picked, progress)?.iter().map(|p| p.display().to_string()));
        }
        Ok(Self::Many(paths))
    }

    /// Each as it was written.
    #[must_use]
    pub fn patterns(&self) -> &[String] {
        match self {
            Self::One(path) => std::slice::from_ref(path),
            Self::Many(paths) => paths,
        }
    }

    /// The files behind them, in the order of a list, sorted within a directory or a glob; `place` is the recipe's key.
    pub(super) fn files(&self, place: &str, extensions: &[&str]) -> Result<Vec<PathBuf>> {
        let files = self.found(place, extensions)?;
        match files.is_empty() {
            true => Err(Error::input(place, format!("`{self}` names no file ending in {}", extensions.join(", ")))),
            false => Ok(files),
        }
    }

    /// [`Paths::files`], of which there may be none.
    pub(super) fn found(&self, place: &str, extensions: &[&str]) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for pattern in self.patterns() {
            if on_hub(pattern).is_some() {
                return Err(Error::input(place, format!("{pattern} has not been fetched")));
            }
            match Path::new(pattern).exists() {
                true => listed(Path::new(pattern), extensions, &mut files)?,
                false => {
                    for path in braces(place, pattern)? {
                        globbed(place, &path, extensions, &mut files)?;
                    }
                }
            }
        }
        match files.len() {
            n if n > MAX_SHARDS => Err(Error::input(place, format!("`{self}` names {n} files, expected at most {MAX_SHARDS}"))),
            _ => Ok(files),
        }
    }
}

/// A file, or all files below a directory.
fn listed(path: &Path, extensions: &[&str], files: &mut Vec<PathBuf>) -> Result<()> {
    if !path.is_dir() {
        files.push(path.to_path_buf());
        return Ok(());
    }
    let is_hidden = |path: &Path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(['.', '_']));
    let visible = |e: &walkdir::DirEntry| e.depth() == 0 || !is_hidden(e.path());
    let wanted = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        extensions.iter().any(|e| name.ends_with(&format!(".{e}")))
    };
    for entry in walkdir::WalkDir::new(path).follow_links(true).sort_by_file_name().into_iter().filter_entry(visible) {
        match entry {
            Ok(entry) if entry.file_type().is_file() && wanted(entry.path()) => files.push(entry.into_path()),
            Ok(_) => {}
            // Links of other names that lead nowhere, or back to what is read anyway, are no files of this kind.
            Err(e) if e.loop_ancestor().is_some() => {}
            Err(e) if e.depth() > 0 && e.path().is_some_and(is_hidden) => {}
            Err(e) if e.io_error().is_some_and(|e| e.kind() == ErrorKind::NotFound) && !e.path().is_some_and(wanted) => {}
            Err(e) => {
                let at = e.path().unwrap_or(path).to_path_buf();
                let cause = e.into_io_error().unwrap_or_else(|| std::io::Error::other("cannot be walked through"));
                return Err(Error::read(at, cause));
            }
        }
    }
    Ok(())
}

fn globbed(place: &str, pattern: &str, extensions: &[&str], files: &mut Vec<PathBuf>) -> Result<()> {
    let path = Path::new(pattern);
    if path.exists() || !pattern.contains(['*', '?', '[']) {
        return match path.exists() {
            true => listed(path, extensions, files),
            false => Err(Error::input(path.display(), "no such file or directory").hint(format!("{place} names it"))),
        };
    }
    let found = glob::glob(pattern).map_err(|e| Error::input(place, format!("`{pattern}` is no pattern: {e}")))?;
    let before = files.len();
    // glob sorts.
    for path in found {
        listed(&path.map_err(|e| Error::read(e.path(), std::io::Error::other(e.to_string())))?, extensions, files)?;
    }
    match files.len() == before {
        true => Err(Error::input(place, format!("`{pattern}` names no file"))),
        false => Ok(()),
    }
}

/// `{000..012}` counts, with the zeros of its ends and a step where `{0..9..3}` has one; `{a,b}` lists; several multiply.
fn braces(place: &str, pattern: &str) -> Result<Vec<String>> {
    let Some((start, end)) = pattern.find('{').and_then(|s| Some((s, s + pattern[s..].find('}')?))) else {
        return Ok(vec![pattern.to_string()]);
    };
    let (head, inner, tail) = (&pattern[..start], &pattern[start + 1..end], &pattern[end + 1..]);
    let parts = match range(inner) {
        Some(parts) => parts,
        None if inner.contains(',') => inner.split(',').map(str::to_string).collect(),
        None => return Err(Error::input(place, format!("`{{{inner}}}` is neither a range as {{000..012}} nor a list as {{a,b}}"))),
    };
    let rests = braces(place, tail)?;
    if parts.len().saturating_mul(rests.len()) > MAX_SHARDS {
        return Err(Error::input(place, format!("`{pattern}` names more than {MAX_SHARDS} files")));
    }
    Ok(parts.iter().flat_map(|part| rests.iter().map(move |rest| format!("{head}{part}{rest}"))).collect())
}

fn range(inner: &str) -> Option<Vec<String>> {
    let mut ends = inner.split("..");
    let (from, to) = (ends.next()?, ends.next()?);
    let step: u64 = ends.next().map_or(Some(1), |s| s.parse().ok()).filter(|s| *s > 0)?;
    let digits = |s: &str| !s.is_empty() && s.len() < 19 && s.bytes().all(|b| b.is_ascii_digit());
    if ends.next().is_some() || !digits(from) || !digits(to) {
        return None;
    }
    let padded = [from, to].iter().any(|s| s.len() > 1 && s.starts_with('0'));
    let width = if padded { from.len().max(to.len()) } else { 0 };
    let (a, b): (u64, u64) = (from.parse().ok()?, to.parse().ok()?);
    let count = (a.abs_diff(b) / step).min(MAX_SHARDS as u64);
    let at = |i: u64| if a <= b { a + i * step } else { a - i * step };
    Some((0..=count).map(|i| format!("{:0width$}", at(i))).collect())
}

/// The deepest directory that holds all files.
pub(super) fn common(files: &[PathBuf]) -> PathBuf {
    let mut root = files.first().and_then(|f| f.parent()).map(Path::to_path_buf).unwrap_or_default();
    while !files.iter().all(|f| f.starts_with(&root)) {
        if !root.pop() {
            break;
        }
    }
    root
}

/// The split that a file's name or its directories say, as the hub reads them: `train-00000-of-00003.parquet`, `test/0.tar`.
pub(super) fn split_of(file: &Path, root: &Path) -> Option<Split> {
    let inner = file.strip_prefix(root).unwrap_or(file);
    // The root itself may be the split's directory.
    let own = root.file_name().filter(|_| inner.components().count() == 1);
    let parents = inner.parent().into_iter().flatten();
    parents.chain(inner.file_name()).chain(own).find_map(|part| split_named(&part.to_string_lossy()))
}

/// The split that the name of a directory or a file says: one of the words that Hugging Face `datasets` knows, by itself or set off
/// by `-`, `.`, `_`, a space or digits, in any case: `train`, `test_set`, `images-val`, `train2017`. Words of two splits say none.
pub(super) fn split_named(name: &str) -> Option<Split> {
    let lower = name.to_ascii_lowercase();
    let word = |word: &str| match word {
        "train" | "training" => Some(Split::Train),
        "validation" | "valid" | "val" | "dev" => Some(Split::Val),
        "test" | "testing" | "eval" | "evaluation" => Some(Split::Test),
        _ => None,
    };
    let mut found = lower.split(|c: char| "-._ ".contains(c) || c.is_ascii_digit()).filter_map(word);
    let first = found.next()?;
    found.all(|other| other == first).then_some(first)
}

/// The splits of a set's files: what its keys say, or their names. Either all names say one, or none does.
pub(super) fn splits_of(files: &[(PathBuf, Option<Split>)], root: &Path, key: &str) -> Result<Vec<Option<Split>>> {
    let splits: Vec<Option<Split>> = files.iter().map(|(path, split)| split.or_else(|| split_of(path, root))).collect();
    let of = |named: bool| splits.iter().position(|s| s.is_some() == named);
    if let (Some(with), Some(without)) = (of(true), of(false)) {
        let others = splits.iter().filter(|s| s.is_none()).count() - 1;
        let more = if others > 0 { format!(" (and {others} more)") } else { String::new() };
        let message = format!("names no split{more}, while {} does", files[with].0.display());
        return Err(Error::input(files[without].0.display(), message).hint(format!(
            "rename it after its split (train, validation, test), or list the files that are wanted in data.{key}.path, val and test"
        )));
    }
    Ok(splits)
}

/// The parts of `train-00000-of-00003.parquet`: what stands before the numbers, the number, how many there are, what stands behind.
fn numbered(name: &str) -> Option<(&str, u64, u64, &str)> {
    let (head, rest) = name.rsplit_once("-of-")?;
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let (before, number) = head.rsplit_once(['-', '_'])?;
    Some((before, number.parse().ok()?, rest[..digits].parse().ok()?, &rest[digits..]))
}

/// Shards that belong together: their directory, what stands before the number, how many there are, and what stands behind.
type Set<'n> = (PathBuf, &'n str, u64, &'n str);

/// Names the shards that are not there though the names of the others count them.
pub(super) fn missing(files: &[PathBuf]) -> Vec<String> {
    const SHOWN: usize = 3;
    let mut sets: BTreeMap<Set<'_>, (BTreeSet<u64>, &str)> = BTreeMap::new();
    for file in files {
        let Some(name) = file.file_name().and_then(|n| n.to_str()) else { continue };
        let Some((before, number, of, behind)) = numbered(name) else { continue };
        let dir = file.parent().unwrap_or(Path::new("")).to_path_buf();
        sets.entry((dir, before, of, behind)).or_insert_with(|| (BTreeSet::new(), name)).0.insert(number);
    }
    let told = sets.into_iter().filter_map(|((dir, _, of, _), (numbers, first))| {
        // Some count from 1.
        let start = u64::from(!numbers.contains(&0) && numbers.contains(&of));
        let mut gaps = (start..of.saturating_add(start)).filter(|n| !numbers.contains(n)).peekable();
        gaps.peek()?;
        let count = of.saturating_sub(numbers.len() as u64);
        let shown: Vec<String> = gaps.take(SHOWN).map(|n| n.to_string()).collect();
        let more = if count > SHOWN as u64 { ", …" } else { "" };
        let name = dir.join(first);
        Some(format!(
            "{count} of the {of} shards that `{}` counts are not among the files: {}{more}; their rows are missing",
            name.display(),
            shown.join(", ")
        ))
    });
    told.collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn braces_count_and_list() {
        let expand = |p: &str| braces("p", p).unwrap();
        assert_eq!(expand("s-{008..011}.tar"), ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"]);
        assert_eq!(expand("{9..11}"), ["9", "10", "11"]);
        assert_eq!(expand("{0..6..3}"), ["0", "3", "6"]);
        assert_eq!(expand("{2..0}"), ["2", "1", "0"]);
        assert_eq!(expand("{a,b}{1..2}"), ["a1", "a2", "b1", "b2"]);
        assert_eq!(expand("plain"), ["plain"]);
        assert!(braces("p", "{x}").unwrap_err().to_string().contains("neither a range"));
        assert!(braces("p", "{0..99999999}").unwrap_err().to_string().contains("more than"));
    }

    #[test]
    fn names_say_the_split() {
        for (name, split) in [
            ("d/train-00000-of-00003.parquet", Some(Split::Train)),
            ("d/validation-00000-of-00001.parquet", Some(Split::Val)),
            ("d/test/0000.parquet", Some(Split::Test)),
            ("d/valid_01.tar", Some(Split::Val)),
            ("d/latest-1.tar", None),
            ("d/shard-000000.tar", None),
        ] {
            assert_eq!(split_of(Path::new(name), Path::new("d")), split, "{name}");
        }
        assert_eq!(split_of(Path::new("x/test/0.tar"), Path::new("x/test")), Some(Split::Test));
    }

    /// `datasets` has no case; what it reads as two splits is none here.
    #[test]
    fn names_are_read_as_datasets_reads_them() {
        let golden: serde_json::Value = serde_json::from_str(include_str!("../../tests/data/splits.json")).unwrap();
        let expected = |value: &serde_json::Value| match value.as_str() {
            Some("train") => Some(Split::Train),
            Some("validation") => Some(Split::Val),
            Some("test") => Some(Split::Test),
            _ => None,
        };
        for (name, split) in golden["directories"].as_object().unwrap() {
            assert_eq!(split_named(name), expected(split), "{name}");
            assert_eq!(split_named(&name.to_uppercase()), expected(split), "{name}");
        }
        for (name, split) in golden["files"].as_object().unwrap() {
            assert_eq!(split_of(&Path::new("d").join(name), Path::new("d")), expected(split), "{name}");
        }
    }

    #[test]
    fn a_file_without_a_split_beside_others_is_named() {
        let files: Vec<_> = ["d/train-0.parquet", "d/test-0.parquet", "d/unsupervised-0.parquet"].map(|f| (PathBuf::from(f), None)).into();
        let message = splits_of(&files, Path::new("d"), "parquet").unwrap_err().to_string();
        assert!(message.contains("unsupervised-0.parquet") && message.contains("data.parquet.path"), "{message}");
        assert_eq!(splits_of(&files[..2], Path::new("d"), "parquet").unwrap(), [Some(Split::Train), Some(Split::Test)]);
    }

    #[test]
    fn shards_that_others_count_are_missed() {
        let told = |names: &[&str]| missing(&names.iter().map(PathBuf::from).collect::<Vec<_>>());
        let some = told(&["d/train-00000-of-00003.parquet", "d/train-00002-of-00003.parquet", "d/test-00000-of-00001.parquet"]);
        assert!(some.len() == 1 && some[0].contains("1 of the 3") && some[0].contains(": 1;"), "{some:?}");
        assert!(told(&["d/a-1-of-2.tar", "d/a-2-of-2.tar", "d/b-000.tar", "d/of.tar", "d/-of-.tar"]).is_empty());
        assert_eq!(told(&["d/a-1-of-18446744073709551615.tar"]).len(), 1);
    }

    #[test]
    fn files_come_sorted_from_directories_and_globs() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.tar", "a.tar", "sub/c.tar", ".hidden/x.tar", "notes.txt"] {
            std::fs::create_dir_all(dir.path().join(name).parent().unwrap()).unwrap();
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let names = |p: &str| -> Vec<String> {
            let files = Paths::One(dir.path().join(p).display().to_string()).files("data.webdataset.path", &["tar"]).unwrap();
            files.iter().map(|f| f.strip_prefix(dir.path()).unwrap().display().to_string()).collect()
        };
        assert_eq!(names(""), ["a.tar", "b.tar", "sub/c.tar"]);
        assert_eq!(names("*.tar"), ["a.tar", "b.tar"]);
        assert_eq!(names("{b,a}.tar"), ["b.tar", "a.tar"]);
        let missing = Paths::One(dir.path().join("{a,z}.tar").display().to_string()).files("data.webdataset.path", &["tar"]);
        assert!(missing.unwrap_err().to_string().contains("z.tar"));
        let nothing = Paths::One(dir.path().display().to_string()).files("data.parquet.path", &["parquet"]);
        assert!(nothing.unwrap_err().to_string().contains("names no file"));
    }
}
