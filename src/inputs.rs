//! What stands for images on a command line: files, directories, glob patterns, lists and tables.

use std::cmp::Ordering;
use std::path::{Path, PathBuf};

use crate::clip::decode::EXTENSIONS;
use crate::data::{image_cells, is_table, scan_images};
use crate::error::{Error, Result};
use crate::files;

/// The largest list of texts, labels or paths.
pub const MAX_LIST: u64 = 1 << 30;

/// What a file is whose name does not say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Other {
    /// An image.
    Image,
    /// A text with one path a line.
    List,
}

/// Images that were found, in order.
#[derive(Debug, Default)]
pub struct Inputs {
    /// Their files.
    pub images: Vec<PathBuf>,
    /// What was left out, for people.
    pub notes: Vec<String>,
    /// Rows of tables, lines of lists and links that name no image.
    pub bad: Vec<Error>,
}

impl Inputs {
    /// Adds the images that `argument` stands for.
    ///
    /// A file that is there is taken by its name: an image, a table (csv, tsv, jsonl), a list (txt, list), or `other`. Directories
    /// are walked through, in the natural order of their paths (`img2` before `img10`); a pattern, whose files come in the same order,
    /// may hold `**`.
    ///
    /// # Errors
    /// When nothing is there, or it cannot be read.
    pub fn add(&mut self, argument: &str, other: Other) -> Result<()> {
        let path = Path::new(argument);
        if path.is_dir() {
            return self.directory(path);
        }
        if !path.exists() && argument.contains(['*', '?', '[']) {
            return self.pattern(argument);
        }
        let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
        match extension.as_str() {
            "parquet" | "tar" => Err(Error::input(path.display(), format!("is a .{extension} file, which is not read here"))
                .hint("give image files, a directory, a glob pattern, a list or a table of paths")),
            _ if is_table(path) => self.table(path),
            "txt" | "list" => self.list(path),
            e if EXTENSIONS.contains(&e) || other == Other::Image => {
                self.images.push(path.to_path_buf());
                Ok(())
            }
            _ => self.list(path),
        }
    }

    fn list(&mut self, path: &Path) -> Result<()> {
        let text = files::read_text(path, MAX_LIST)?;
        let lines: Vec<&str> = files::lines(&text).map(str::trim).collect();
        let Some(last) = lines.iter().rposition(|line| !line.is_empty()) else {
            return Err(Error::input(path.display(), "has no lines"));
        };
        // A blank line between others may stand for an image that somebody lacks; behind the last it is nothing.
        for (i, line) in lines[..=last].iter().enumerate() {
            match line.is_empty() {
                true => self.bad.push(Error::input(format!("{}:{}", path.display(), i + 1), "names no image")),
                false => self.images.push(PathBuf::from(line)),
            }
        }
        Ok(())
    }

    fn table(&mut self, path: &Path) -> Result<()> {
        let cells = image_cells(path)?;
        self.notes.extend(cells.notes);
        self.images.extend(cells.found);
        self.bad.extend(cells.bad);
        Ok(())
    }

    fn directory(&mut self, path: &Path) -> Result<()> {
        let (mut images, broken, left_out) = scan_images(path)?;
        images.sort_by(|a, b| natural(a, b));
        if images.is_empty() && broken.is_empty() {
            let rest = left_out.map(|counts| format!(", but {counts}")).unwrap_or_default();
            return Err(Error::input(path.display(), format!("holds no image{rest}")));
        }
        self.notes.extend(left_out.map(|counts| format!("{}: not images by their names, and left out: {counts}", path.display())));
        self.images.extend(images);
        self.bad.extend(broken);
        Ok(())
    }

    /// A pattern that names an extension means all that it matches; any other one the images among them.
    fn pattern(&mut self, pattern: &str) -> Result<()> {
        let hidden = glob::MatchOptions { require_literal_leading_dot: true, ..glob::MatchOptions::new() };
        let found = glob::glob_with(pattern, hidden).map_err(|e| Error::input(pattern, e))?;
        let last = pattern.rsplit(['/', std::path::MAIN_SEPARATOR]).next().unwrap_or_default();
        let named = last.rsplit_once('.').is_some_and(|(_, e)| !e.is_empty() && e != "*");
        let (before, mut left_out) = (self.images.len(), 0);
        for path in found {
            let path = path.map_err(|e| Error::read(e.path(), std::io::Error::new(e.error().kind(), e.error().to_string())))?;
            let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
            match path.is_dir() {
                true => {}
                false if named || EXTENSIONS.contains(&extension.as_str()) => self.images.push(path),
                false => left_out += 1,
            }
        }
        self.images[before..].sort_by(|a, b| natural(a, b));
        if self.images.len() == before {
            return Err(
                Error::input(pattern, "matches no file").hint("`**` goes through directories: 'photos/**/*.jpg', or give the directory")
            );
        }
        if left_out > 0 {
            self.notes.push(format!("{pattern}: {left_out} files are not images by their names, and are left out"));
        }
        Ok(())
    }
}

/// Paths as people count: name by name, numbers inside of names by their value.
fn natural(a: &Path, b: &Path) -> Ordering {
    let names = |path: &Path| path.components().map(|c| c.as_os_str().to_string_lossy().into_owned()).collect::<Vec<_>>();
    let (left, right) = (names(a), names(b));
    let pairs = left.iter().zip(&right).map(|(a, b)| natural_names(a, b));
    pairs.fold(Ordering::Equal, Ordering::then).then(left.len().cmp(&right.len())).then_with(|| a.cmp(b))
}

fn natural_names(mut a: &str, mut b: &str) -> Ordering {
    // A run of digits without the zeros in front, or one of anything else, and what follows it.
    fn run(text: &str) -> (bool, &str, &str) {
        let digits = text.starts_with(|c: char| c.is_ascii_digit());
        let end = text.find(|c: char| c.is_ascii_digit() != digits).unwrap_or(text.len());
        let (run, rest) = text.split_at(end);
        (digits, if digits { run.trim_start_matches('0') } else { run }, rest)
    }
    while !a.is_empty() && !b.is_empty() {
        let ((number, left, rest_a), (other, right, rest_b)) = (run(a), run(b));
        let order = match number && other {
            true => left.len().cmp(&right.len()).then(left.cmp(right)),
            false => left.cmp(right),
        };
        // A name that goes on where the other has a number: what stands there decides.
        if order != Ordering::Equal {
            return if number == other { order } else { a.cmp(b) };
        }
        (a, b) = (rest_a, rest_b);
    }
    a.len().cmp(&b.len())
}

/// So many faults of images are told at once.
pub const SHOWN: usize = 50;

/// One error for all images that cannot be read.
#[must_use]
pub fn unreadable(bad: &[Error]) -> Error {
    let mut lines: Vec<String> = bad.iter().take(SHOWN).map(|e| format!("  {}", e.to_string().replace('\n', " "))).collect();
    if bad.len() > SHOWN {
        lines.push("  and more".into());
    }
    let count = if bad.len() >= SHOWN { format!("at least {SHOWN}") } else { bad.len().to_string() };
    Error::input("images", format!("{count} cannot be read:\n{}", lines.join("\n"))).hint("repair or remove them")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_names_are_numbers() {
        let order =
            ["a/img1.png", "a/img01.png", "a/img2.png", "a/img2b.png", "a/img10.png", "a/img.png", "a1/x.png", "a10/x.png", "b.png"];
        let mut names: Vec<PathBuf> = order.iter().rev().map(PathBuf::from).collect();
        names.sort_by(|a, b| natural(a, b));
        let at = |name: &str| names.iter().position(|n| n == Path::new(name));
        assert!(at("a/img1.png") < at("a/img2.png") && at("a/img2.png") < at("a/img10.png"), "{names:?}");
        assert!(at("a/img10.png") < at("a1/x.png") && at("a1/x.png") < at("a10/x.png") && at("a10/x.png") < at("b.png"), "{names:?}");
        // An order: nothing is before itself, and whatever the first order was, the last is one.
        let mut again: Vec<PathBuf> = order.iter().map(PathBuf::from).collect();
        again.sort_by(|a, b| natural(a, b));
        assert_eq!(names, again);
    }
}
