//! Images and texts of a table, for verbs that take them without a task.

use std::path::{Path, PathBuf};

use super::{DataConfig, ImageRef, Source as _};
use crate::error::{Error, Result};

/// What the rows of a table name, in their order.
#[derive(Debug, Default)]
pub(crate) struct Cells {
    pub(crate) images: Vec<PathBuf>,
    /// Rows that name none.
    pub(crate) without_image: usize,
    /// Every text of every row.
    pub(crate) texts: Vec<String>,
    /// Rows that cannot be read.
    pub(crate) bad: Vec<Error>,
}

/// Whether the name is that of a table.
pub(crate) fn is_table(path: &Path) -> bool {
    path.extension().is_some_and(|e| ["csv", "tsv", "tab", "jsonl", "ndjson"].iter().any(|known| e.eq_ignore_ascii_case(known)))
}

/// Reads a table whose columns have usual names (`image`, `file_name`, `path`…; `text`, `caption`…).
///
/// # Errors
/// When the table cannot be read.
pub(crate) fn cells(path: &Path) -> Result<Cells> {
    let config = DataConfig::locate(&path.display().to_string())?;
    let table = config.table.ok_or_else(|| Error::input(path.display(), "is no table"))?;
    // Labels and splits of it are of no interest here.
    let raw = super::TableConfig { label: None, split: None, ..table }.read()?;
    let mut found = Cells { bad: raw.bad, ..Cells::default() };
    for example in raw.examples {
        match example.image {
            ImageRef::File(path) => found.images.push(path),
            _ => found.without_image += 1,
        }
        found.texts.extend(example.texts);
    }
    Ok(found)
}
