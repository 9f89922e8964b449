//! Tables of captions as archives have them: text files, and images in a directory beside the table.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::columns::Row;
use super::delimited::mark_of;
use super::identity::name_in;
use super::{ImageRef, RawExample, coco};
use crate::clip::decode;
use crate::error::{Error, Result};
use crate::files;

/// What columns of images are called, the default first.
pub(super) const IMAGE: [&str; 9] = ["image", "file_name", "path", "image_path", "filename", "filepath", "file", "img", "image_name"];
/// What columns of texts are called.
pub(super) const TEXT: [&str; 6] = ["text", "caption", "description", "title", "prompt", "comment"];
/// What columns of class names are called.
pub(super) const LABEL: [&str; 6] = ["label", "class", "category", "class_name", "label_name", "target"];

/// A first line that is longer says nothing.
const MAX_FIRST: u64 = 1 << 16;
/// Longer lines are refused.
const MAX_LINE: u64 = 16 << 20;

/// How a text file is a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Its first line names columns, of images and of texts or classes: `image,caption`.
    Columns,
    /// Flickr8k's: `photo.jpg#0`, a tab, the caption.
    Numbered,
}

/// Whether a file's extension leaves open what it is.
pub(super) fn is_text(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("txt") || e.eq_ignore_ascii_case("token"))
}

/// Finds out by the first line; nothing where it is that of no table.
///
/// # Errors
/// When the file cannot be read.
pub(super) fn form(path: &Path) -> Result<Option<Form>> {
    let mut start = Vec::new();
    files::open(path)?.take(MAX_FIRST).read_to_end(&mut start).map_err(|e| Error::read(path, e))?;
    let text = String::from_utf8_lossy(start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&start));
    let line = text.lines().next().unwrap_or_default();
    if numbered(line).is_some() {
        return Ok(Some(Form::Numbered));
    }
    let mark = char::from(mark_of(line.as_bytes(), b','));
    let cells: Vec<String> = line.split(mark).map(|c| c.trim().trim_matches('"').to_lowercase()).collect();
    let any = |names: &[&str]| cells.iter().any(|c| names.contains(&c.as_str()));
    Ok((any(&IMAGE) && (any(&TEXT) || any(&LABEL))).then_some(Form::Columns))
}

/// Image and caption of a line `photo.jpg#0<tab>caption`.
fn numbered(line: &str) -> Option<(&str, &str)> {
    let (first, caption) = line.split_once('\t')?;
    let (image, number) = first.trim().rsplit_once('#')?;
    let is_image = image.to_ascii_lowercase().split('.').skip(1).any(|part| decode::EXTENSIONS.contains(&part));
    (is_image && !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())).then_some((image, caption))
}

/// Why a text file is no table, and what one looks like.
pub(super) fn no_table(path: &Path) -> Error {
    let message = "is no table: expected a first line that names columns (image,caption), or lines as in Flickr8k.token.txt \
                   (photo.jpg#0, a tab, the caption)";
    Error::input(path.display(), message).hint("a table of other columns is named .csv, .tsv or .jsonl after its format")
}

/// The rows of a file in Flickr8k's form: columns `image` and `text`.
pub(super) fn numbered_rows(path: &Path, each: &mut dyn FnMut(usize, Result<&Row>)) -> Result<()> {
    let mut lines = files::Lines::new(path.display().to_string(), files::open_text(path)?, MAX_LINE);
    loop {
        let next = lines.next_line().map(|found| found.map(|(number, line)| (number, line.to_string())));
        let (number, line) = match next {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(()),
            Err(error) if lines.is_broken() => return Err(error),
            Err(error) => {
                each(0, Err(error));
                continue;
            }
        };
        match numbered(&line) {
            Some((image, caption)) => {
                let cells = [("image", image), ("text", caption.trim())].map(|(name, cell)| (name.to_string(), Value::from(cell)));
                each(number, Ok(&cells.into_iter().collect()));
            }
            None if line.trim().is_empty() => {}
            None => {
                let message = "expected an image's name with # and a number, a tab, and its caption";
                each(number, Err(Error::input(format!("{}:{number}", path.display()), message)));
            }
        }
    }
}

/// Names that are looked for, so that one missing image does not matter.
const LOOKED_FOR: usize = 5;

/// Images are where the table is. Where none of them is there, a directory near it is looked for that has one of the first,
/// as Flickr8k's `Images`, and all paths start in it; what was done is told.
pub(super) fn look_near(path: &Path, root: &Path, examples: &mut [RawExample]) -> Option<String> {
    let own = path.parent().unwrap_or(Path::new("."));
    let file = |e: &RawExample| match &e.image {
        ImageRef::File(file) => file.strip_prefix(own).ok().filter(|inner| inner.is_relative()).map(Path::to_path_buf),
        _ => None,
    };
    let inner: Vec<Option<PathBuf>> = examples.iter().map(file).collect();
    if inner.iter().flatten().any(|name| own.join(name).exists()) {
        return None;
    }
    let mut names: Vec<&PathBuf> = inner.iter().flatten().collect();
    names.dedup();
    let mut near = names.into_iter().take(LOOKED_FOR).map(|name| (name, coco::find(path, &name.to_string_lossy())));
    let found = near.find_map(|(name, dir)| dir.join(name).is_file().then_some(dir))?;
    for (example, name) in examples.iter_mut().zip(inner) {
        let Some(name) = name else { continue };
        let (before, now) = (own.join(&name), found.join(&name));
        if example.id == name_in(root, &before) {
            example.id = name_in(root, &now);
        }
        example.image = ImageRef::File(now);
    }
    Some(format!("images are read from {}: none of them is beside {}", found.display(), path.display()))
}
