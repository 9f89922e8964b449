//! Images and texts of a table, for verbs that take them without a task.

use std::path::{Path, PathBuf};

use super::rules::{Field, Mistake};
use super::{DataConfig, ImageRef, Raw, TableConfig};
use crate::error::{Error, Result};

/// What the rows of a table hold, in their order.
#[derive(Debug)]
pub(crate) struct Cells<T> {
    pub(crate) found: Vec<T>,
    /// Rows that hold nothing of it, or something else, by file and line.
    pub(crate) bad: Vec<Error>,
    /// Rows that hold more than one.
    pub(crate) several: usize,
    /// What a user should know.
    pub(crate) notes: Vec<String>,
}

/// Whether the name is that of a table.
pub(crate) fn is_table(path: &Path) -> bool {
    path.extension().is_some_and(|e| ["csv", "tsv", "tab", "jsonl", "ndjson"].iter().any(|known| e.eq_ignore_ascii_case(known)))
}

/// The image of each row of a table, whose column has a usual name (`image`, `file_name`, `path`…). A row without one is bad.
///
/// # Errors
/// When the table cannot be read, or no row has an image.
pub(crate) fn image_cells(path: &Path) -> Result<Cells<PathBuf>> {
    let raw = rows(path, |table| TableConfig { text: None, ..table })?;
    let mut cells = Cells { found: Vec::new(), bad: raw.bad, several: 0, notes: raw.notes };
    let broken = cells.bad.len();
    let mut empty = 0;
    for example in raw.examples {
        match example.image {
            ImageRef::File(path) => cells.found.push(path),
            _ => match example.mistakes.into_iter().find(Mistake::is_path) {
                Some(mistake) => cells.bad.push(mistake.error()),
                None => {
                    empty += 1;
                    cells.bad.push(Error::input(example.place.unwrap_or(example.id), "names no image"));
                }
            },
        }
    }
    match cells.found.is_empty() && broken == 0 && empty == cells.bad.len() {
        true => Err(Error::input(path.display(), "names no image").hint("a column `image`, `file_name` or `path` names them")),
        false => Ok(cells),
    }
}

/// The texts of each row of a table, whose column has a usual name (`text`, `caption`…). A row without one has the empty text.
///
/// # Errors
/// When the table cannot be read, or no row has a text.
pub(crate) fn text_cells(path: &Path) -> Result<Cells<String>> {
    let raw = rows(path, |table| TableConfig { image: None, ..table })?;
    let mut cells = Cells { found: Vec::new(), bad: raw.bad, several: 0, notes: raw.notes };
    for example in raw.examples {
        cells.several += usize::from(example.texts.len() > 1);
        match example.mistakes.into_iter().find(|m| m.field == Field::Text) {
            Some(mistake) => cells.bad.push(mistake.error()),
            None if example.texts.is_empty() => cells.found.push(String::new()),
            None => cells.found.extend(example.texts),
        }
    }
    match cells.bad.is_empty() && cells.found.iter().all(String::is_empty) {
        true => Err(Error::input(path.display(), "holds no text").hint("a column `text` or `caption` holds them")),
        false => Ok(cells),
    }
}

/// All rows, those with nothing in them too. Labels and splits of them are of no interest here.
fn rows(path: &Path, of: impl Fn(TableConfig) -> TableConfig) -> Result<Raw> {
    let config = DataConfig::locate(&path.display().to_string())?;
    let table = config.table.ok_or_else(|| Error::input(path.display(), "is no table"))?;
    of(TableConfig { label: None, split: None, ..table }).read_rows(true)
}
