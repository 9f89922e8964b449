//! CSV, TSV and JSONL tables, and HF's imagefolder with `metadata.csv` or `metadata.jsonl`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{ImageRef, Raw, RawExample, Source, Split};
use crate::error::{Error, Result};
use crate::files;

/// One row an example. The format follows the extension: csv, tsv, jsonl.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableConfig {
    /// A table, or a directory in HF imagefolder layout (`metadata.jsonl` or `metadata.csv` in it, or in its
    /// `train`, `val` and `test` directories).
    pub path: PathBuf,
    /// A table of its own for validation.
    #[serde(default)]
    pub val: Option<PathBuf>,
    /// A table of its own for testing.
    #[serde(default)]
    pub test: Option<PathBuf>,
    /// Column of image paths, relative to the table; `image` or `file_name` when left out.
    #[serde(default)]
    pub image: Option<String>,
    /// Column of texts: a string, in JSONL also a list of strings. `text` when left out.
    #[serde(default)]
    pub text: Option<String>,
    /// Column of class names. `label` when left out.
    #[serde(default)]
    pub label: Option<String>,
    /// Column that says train, val or test. `split` when left out.
    #[serde(default)]
    pub split: Option<String>,
    /// Column whose equal values stay in one split. `group` when left out.
    #[serde(default)]
    pub group: Option<String>,
}

type Row = Map<String, Value>;

impl Source for TableConfig {
    fn place(&self) -> String {
        self.path.display().to_string()
    }

    fn read(&self) -> Result<Raw> {
        let mut raw = Raw::default();
        for (path, split) in self.tables()? {
            let before = raw.examples.len();
            self.read_table(&path, split, &mut raw)?;
            if raw.examples.len() == before {
                return Err(Error::input(path.display(), "has no rows"));
            }
        }
        Ok(raw)
    }
}

impl TableConfig {
    /// The table files and the split that their place says.
    fn tables(&self) -> Result<Vec<(PathBuf, Option<Split>)>> {
        let own = self.val.is_some() || self.test.is_some();
        let mut tables = match self.path.is_dir() {
            true => imagefolder(&self.path)?,
            false => vec![(self.path.clone(), own.then_some(Split::Train))],
        };
        tables.extend(self.val.clone().map(|p| (p, Some(Split::Val))));
        tables.extend(self.test.clone().map(|p| (p, Some(Split::Test))));
        Ok(tables)
    }

    fn read_table(&self, path: &Path, split: Option<Split>, raw: &mut Raw) -> Result<()> {
        let mut each = |line: usize, row: &Row| -> Result<()> {
            raw.examples.push(self.example(path, line, row, split)?);
            Ok(())
        };
        rows(path, &mut each)
    }

    fn example(&self, path: &Path, line: usize, row: &Row, split: Option<Split>) -> Result<RawExample> {
        let place = || format!("{}:{line}", path.display());
        let column = |key: &str, named: &Option<String>, default: &str| -> Result<Option<Value>> {
            let name = named.as_deref().unwrap_or(default);
            match row.get(name).filter(|v| !v.is_null()) {
                Some(v) => Ok(Some(v.clone())),
                None if named.is_some() && !row.contains_key(name) => Err(Error::input(place(), format!("there is no column `{name}`"))
                    .hint(format!("data.table.{key} names it; the columns are {}", row.keys().cloned().collect::<Vec<_>>().join(", ")))),
                None => Ok(None),
            }
        };
        let image = match column("image", &self.image, "image")? {
            None if self.image.is_none() => column("image", &None, "file_name")?,
            found => found,
        };
        let image = image.as_ref().and_then(Value::as_str).map(str::trim).filter(|s| !s.is_empty()).ok_or_else(|| {
            Error::input(place(), "expected a path in the image column, found none").hint("data.table.image names the column")
        })?;
        let text = column("text", &self.text, "text")?;
        let cell = |v: Option<Value>| v.map(|v| plain(&v)).filter(|s| !s.is_empty());
        let split = match cell(column("split", &self.split, "split")?) {
            Some(name) if split.is_none() => {
                Some(Split::parse(&name).ok_or_else(|| Error::input(place(), format!("split `{name}`: expected train, val or test")))?)
            }
            _ => split,
        };
        Ok(RawExample {
            id: image.to_string(),
            image: ImageRef::File(path.parent().unwrap_or(Path::new(".")).join(image)),
            texts: texts(text.as_ref())
                .map_err(|found| Error::input(place(), format!("text: expected a string or a list of strings, found {found}")))?,
            label: cell(column("label", &self.label, "label")?),
            group: cell(column("group", &self.group, "group")?),
            split,
            ..Default::default()
        })
    }
}

/// The `metadata` files of HF's imagefolder.
pub(super) fn imagefolder(dir: &Path) -> Result<Vec<(PathBuf, Option<Split>)>> {
    let metadata = |dir: &Path| ["metadata.jsonl", "metadata.csv"].map(|n| dir.join(n)).into_iter().find(|p| p.is_file());
    if let Some(path) = metadata(dir) {
        return Ok(vec![(path, None)]);
    }
    let mut found = Vec::new();
    let entries = std::fs::read_dir(dir).map_err(|e| Error::read(dir, e))?;
    let mut names: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(|p| p.is_dir()).collect();
    names.sort();
    for sub in names {
        let split = sub.file_name().and_then(|n| Split::parse(&n.to_string_lossy()));
        if let (Some(split), Some(path)) = (split, metadata(&sub)) {
            found.push((path, Some(split)));
        }
    }
    match found.is_empty() {
        true => Err(Error::input(dir.display(), "has no metadata.jsonl or metadata.csv, and none in train, val or test")
            .hint("name a table file, or use `folder` for one directory a class")),
        false => Ok(found),
    }
}

/// The names of a table's columns: its header, or the keys of its first line.
pub(super) fn columns(path: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    let mut each = |_: usize, row: &Row| -> Result<()> {
        if names.is_empty() {
            names = row.keys().cloned().collect();
        }
        Ok(())
    };
    rows(path, &mut each)?;
    Ok(names)
}

/// Reads a table as its extension says.
fn rows(path: &Path, each: Each<'_>) -> Result<()> {
    let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
    match extension.as_deref() {
        Some("csv") => delimited(path, b',', each),
        Some("tsv" | "tab") => delimited(path, b'\t', each),
        Some("jsonl" | "ndjson") => json_lines(path, each),
        other => {
            Err(Error::input(path.display(), format!("expected a .csv, .tsv or .jsonl file, found {}", other.unwrap_or("no extension")))
                .hint("rename the file after its format"))
        }
    }
}

/// A cell as text; numbers as they are written.
fn plain(value: &Value) -> String {
    match value {
        Value::String(s) => s.trim().to_string(),
        other => other.to_string(),
    }
}

fn texts(value: Option<&Value>) -> std::result::Result<Vec<String>, String> {
    match value {
        None => Ok(Vec::new()),
        Some(Value::String(s)) => Ok(Some(s.trim()).filter(|s| !s.is_empty()).map(str::to_string).into_iter().collect()),
        Some(Value::Array(items)) => items.iter().map(|i| i.as_str().map(|s| s.trim().to_string()).ok_or_else(|| i.to_string())).collect(),
        Some(other) => Err(other.to_string()),
    }
}

type Each<'a> = &'a mut dyn FnMut(usize, &Row) -> Result<()>;

fn delimited(path: &Path, delimiter: u8, each: Each<'_>) -> Result<()> {
    let file = files::open(path)?;
    let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).from_reader(std::io::BufReader::new(file));
    let wrong = |e: csv::Error| {
        let line = e.position().map(|p| format!(":{}", p.line())).unwrap_or_default();
        Error::input(format!("{}{line}", path.display()), e)
    };
    let header: Vec<String> =
        reader.headers().map_err(wrong)?.iter().map(|h| h.trim_start_matches('\u{feff}').trim().to_string()).collect();
    for record in reader.records() {
        let record = record.map_err(wrong)?;
        let line = record.position().map_or(0, |p| p.line() as usize);
        let cells = record.iter().map(|c| if c.is_empty() { Value::Null } else { Value::String(c.to_string()) });
        each(line, &header.iter().cloned().zip(cells).collect())?;
    }
    Ok(())
}

fn json_lines(path: &Path, each: Each<'_>) -> Result<()> {
    use std::io::BufRead;
    let file = files::open(path)?;
    for (index, line) in std::io::BufReader::new(file).lines().enumerate() {
        let line = line.map_err(|e| Error::input(format!("{}:{}", path.display(), index + 1), e))?;
        if line.trim().is_empty() {
            continue;
        }
        let row: Row = serde_json::from_str(&line)
            .map_err(|e| Error::input(format!("{}:{}", path.display(), index + 1), format!("expected a JSON object: {e}")))?;
        each(index + 1, &row)?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn config(path: PathBuf) -> TableConfig {
        TableConfig { path, val: None, test: None, image: None, text: None, label: None, split: None, group: None }
    }

    fn read(name: &str, content: &str) -> Result<Raw> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        config(path).read()
    }

    #[test]
    fn the_three_formats_read_alike() {
        for (name, text) in [
            ("a.csv", "image,text,label\na.png,\"a, cat\",cat\n"),
            ("a.tsv", "image\ttext\tlabel\na.png\ta, cat\tcat\n"),
            ("a.jsonl", "{\"file_name\":\"a.png\",\"text\":[\"a, cat\"],\"label\":\"cat\"}\n\n"),
        ] {
            let raw = read(name, text).unwrap();
            assert_eq!(raw.examples[0].texts, ["a, cat"], "{name}");
            assert_eq!(raw.examples[0].label.as_deref(), Some("cat"));
            assert_eq!(raw.examples[0].id, "a.png");
        }
    }

    #[test]
    fn a_broken_row_is_named() {
        for (name, text, part) in [
            ("a.csv", "image,label\na.png,b,c\n", ":2"),
            ("a.jsonl", "{\"image\":\"a\"}\nnope\n", ":2"),
            ("a.jsonl", "{\"image\":3}\n", ":1"),
            ("a.csv", "picture\na.png\n", "image column"),
            ("a.csv", "image,split\na.png,rest\n", "split `rest`"),
            ("a.xlsx", "", "xlsx"),
            ("a.csv", "image\n", "no rows"),
        ] {
            let message = read(name, text).unwrap_err().to_string();
            assert!(message.contains(part), "{text}: {message}");
        }
    }
}
