//! CSV, TSV and JSONL tables, and HF's imagefolder with `metadata.csv` or `metadata.jsonl`.

use std::io::{BufRead, Read as _};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::captions::{Form, form, is_text, look_near, no_table, numbered_rows};
use super::columns::{At, Row, shown, with_columns};
use super::delimited::delimited;
use super::identity::name_in;
use super::metadata::{self, Tables};
use super::paths::common;
use super::rules::{A_PATH, Field};
use super::{ImageRef, Raw, RawExample, Source, Split};
use crate::error::{Error, Result};
use crate::{files, json};

/// Longer rows are refused.
pub(super) const MAX_LINE: u64 = 16 << 20;

with_columns! {
    /// One row an example. The format follows the extension: csv, tsv, jsonl; a txt is read where its first line names columns
    /// (`image,caption`) or is one of Flickr8k's (`photo.jpg#0`, a tab, the caption).
    pub struct TableConfig as "table" {
        /// A table, or a directory in HF imagefolder layout (`metadata.jsonl` or `metadata.csv` in it, or in its
        /// `train`, `val` and `test` directories).
        pub path: PathBuf,
        /// A table of its own for validation.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub val: Option<PathBuf>,
        /// A table of its own for testing.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub test: Option<PathBuf>,
        /// Where the paths of images start. When left out they start at the table, or, where no image is there, in a directory near it
        /// that has them.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub images: Option<PathBuf>,
    }
}

impl Source for TableConfig {
    fn place(&self) -> String {
        self.path.display().to_string()
    }

    fn read(&self) -> Result<Raw> {
        self.read_rows(false)
    }
}

impl TableConfig {
    /// What the rows say. A row that has neither image nor text is wrong, unless `bare` ones are wanted too.
    pub(super) fn read_rows(&self, bare: bool) -> Result<Raw> {
        let mut raw = Raw::default();
        let tables = self.tables()?;
        for (path, split) in &tables.files {
            let (rows, bad) = (raw.examples.len(), raw.bad.len());
            self.read_table((path, &tables.root), *split, bare, &mut raw)?;
            if (raw.examples.len(), raw.bad.len()) == (rows, bad) {
                return Err(Error::input(path.display(), "has no rows"));
            }
            if self.images.is_none() && !tables.is_folder {
                raw.notes.extend(look_near(path, &tables.root, &mut raw.examples[rows..]));
            }
        }
        metadata::place(&tables, &mut raw)?;
        Ok(raw)
    }

    /// The table files and the split that their place says.
    fn tables(&self) -> Result<Tables> {
        let own = self.val.is_some() || self.test.is_some();
        let mut tables = match self.path.is_dir() {
            true => metadata::find(&self.path)?.ok_or_else(|| {
                Error::input(self.path.display(), "has no metadata.jsonl or metadata.csv, and none in train, val or test")
                    .hint("name a table file, or use `folder` for one directory a class")
            })?,
            false => Tables { files: vec![(self.path.clone(), own.then_some(Split::Train))], root: PathBuf::new(), is_folder: false },
        };
        tables.files.extend(self.val.clone().map(|p| (p, Some(Split::Val))));
        tables.files.extend(self.test.clone().map(|p| (p, Some(Split::Test))));
        if !tables.is_folder {
            tables.root = common(&tables.files.iter().map(|(p, _)| p.clone()).collect::<Vec<_>>());
        }
        Ok(tables)
    }

    fn read_table(&self, (path, root): (&Path, &Path), split: Option<Split>, bare: bool, raw: &mut Raw) -> Result<()> {
        let columns = self.columns();
        columns.check()?;
        let flat = !is_json(path);
        rows(path, &mut |line, row| {
            let found = row.and_then(|row| {
                let place = || format!("{}:{line}", path.display());
                let at = At { row, place: &place, flat };
                let image = columns.image(at)?;
                let mut example = columns.example(at)?;
                example.split = split.or(example.split);
                example.place = Some(place());
                let start = self.images.as_deref().unwrap_or(path.parent().unwrap_or(Path::new(".")));
                locate((path, root, start), line, image, &mut example, at);
                let wrong = example.mistakes.iter().any(|m| m.is_text() || m.is_path());
                let says = wrong || !example.texts.is_empty() || example.question.is_some();
                if !bare && example.image == ImageRef::Missing && !says {
                    let message = format!("expected a path in the image column, found none, and there is no text either; {}", at.columns());
                    return Err(Error::input(place(), message).hint("data.table.image and data.table.text name the columns"));
                }
                Ok(example)
            });
            match found {
                Ok(example) => raw.examples.push(example),
                Err(error) => raw.bad.push(error),
            }
        })
    }
}

/// Where the image is, and what the example is called: from the table, what names are told from, and where images' paths start.
fn locate((path, root, start): (&Path, &Path, &Path), line: usize, image: Option<Value>, example: &mut RawExample, at: At<'_>) {
    let cell = match &image {
        Some(Value::String(s)) => Some(s.trim()).filter(|s| !s.is_empty()),
        Some(other) => {
            example.mistakes.push(at.mistake(Field::Place, "image", A_PATH, shown(other)));
            return;
        }
        None => None,
    };
    let (id, by_number) = match cell {
        Some(image) => {
            let file = start.join(image);
            let name = name_in(root, &file);
            example.image = ImageRef::File(file);
            (name, false)
        }
        None => (format!("{}:{line}", name_in(root, path)), true),
    };
    if example.id.is_empty() {
        (example.id, example.by_number) = (id, by_number);
    }
}

/// The names of a table's columns: its header, or the keys of its first line.
pub(super) fn columns(path: &Path) -> Result<Vec<String>> {
    let (mut names, mut bad) = (Vec::new(), None);
    rows(path, &mut |_, row| match row {
        Ok(row) if names.is_empty() => names = row.keys().cloned().collect(),
        Ok(_) => {}
        Err(error) => _ = bad.get_or_insert(error),
    })?;
    bad.map_or(Ok(names), Err)
}

/// The names of the columns that hold a list in some row.
pub(super) fn lists(path: &Path) -> Result<Vec<String>> {
    let mut names: Vec<String> = Vec::new();
    rows(path, &mut |_, row| {
        let lists = row.ok().into_iter().flatten().filter(|(_, value)| value.is_array()).map(|(name, _)| name);
        for name in lists {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
    })?;
    Ok(names)
}

fn extension(path: &Path) -> String {
    path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase()).unwrap_or_default()
}

fn is_json(path: &Path) -> bool {
    ["jsonl", "ndjson"].contains(&extension(path).as_str())
}

/// Reads a table as its extension says; rows that cannot be read are handed on as errors.
fn rows(path: &Path, each: Each<'_>) -> Result<()> {
    match extension(path).as_str() {
        "csv" => delimited(path, b',', each),
        "tsv" | "tab" => delimited(path, b'\t', each),
        "jsonl" | "ndjson" => json_lines(path, each),
        _ if is_text(path) => match form(path)? {
            Some(Form::Columns) => delimited(path, b',', each),
            Some(Form::Numbered) => numbered_rows(path, each),
            None => Err(no_table(path)),
        },
        other => {
            let found = if other.is_empty() { "no extension" } else { other };
            Err(Error::input(path.display(), format!("expected a .csv, .tsv or .jsonl file, found {found}"))
                .hint("rename the file after its format"))
        }
    }
}

/// Takes a row and its line.
pub(super) type Each<'a> = &'a mut dyn FnMut(usize, Result<&Row>);

fn json_lines(path: &Path, each: Each<'_>) -> Result<()> {
    let mut reader = files::open_text(path)?;
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let count = reader.by_ref().take(MAX_LINE + 1).read_until(b'\n', &mut line).map_err(|e| Error::read(path, e))?;
        if count == 0 {
            break;
        }
        let place = || format!("{}:{number}", path.display());
        if count as u64 > MAX_LINE {
            return Err(Error::input(place(), format!("the row has more than {MAX_LINE} bytes")));
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        match json::from_slice::<Row>(&line) {
            Ok(row) => each(number, Ok(&row)),
            Err(e) => each(number, Err(Error::input(place(), format!("expected a JSON object: {e}")))),
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn read(name: &str, content: &str) -> Result<Raw> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        TableConfig { path, ..Default::default() }.read()
    }

    #[test]
    fn the_three_formats_read_alike() {
        for (name, text) in [
            ("a.csv", "image,text,label,labels,answer,fits\na.png,\"a, cat\",cat,a|b,x|y,1\n"),
            ("a.tsv", "image\ttext\tlabel\tlabels\tanswer\tfits\na.png\ta, cat\tcat\ta|b\tx|y\tyes\n"),
            (
                "a.jsonl",
                "{\"file_name\":\"a.png\",\"text\":[\"a, cat\"],\"label\":\"cat\",\"labels\":[\"a\",\"b\"],\
                 \"answer\":[\"x\",\"y\"],\"fits\":true}\n\n",
            ),
        ] {
            let raw = read(name, text).unwrap();
            let e = &raw.examples[0];
            assert!(raw.bad.is_empty(), "{name}: {:?}", raw.bad);
            assert_eq!((e.texts[0].as_str(), e.label.as_deref(), e.id.as_str()), ("a, cat", Some("cat"), "a.png"), "{name}");
            assert_eq!((e.labels.as_ref().unwrap().len(), e.answers.len(), e.fits), (2, 2, Some(true)), "{name}");
        }
    }

    #[test]
    fn a_row_needs_an_image_or_a_text() {
        let raw = read("a.csv", "image,text\n,a poem\nb.png,\n,\n").unwrap();
        assert_eq!(raw.examples.iter().map(|e| e.id.as_str()).collect::<Vec<_>>(), ["a.csv:2", "b.png"]);
        assert_eq!(raw.examples[0].image, ImageRef::Missing);
        assert!(raw.bad[0].to_string().contains("a.csv:4: expected a path in the image column"), "{}", raw.bad[0]);
    }

    #[test]
    fn a_broken_row_is_named() {
        for (name, text, part) in [
            ("a.csv", "image,label\na.png,b,c\n", ":2"),
            ("a.jsonl", "{\"image\":\"a\"}\nnope\n", ":2"),
            ("a.jsonl", "{\"image\":3}\n", ":1"),
            ("a.csv", "picture\na.png\n", "image column"),
            ("a.csv", "image,split\na.png,rest\n", "`rest`"),
        ] {
            let raw = read(name, text).unwrap();
            let message = raw.bad.first().map_or_else(|| format!("{:?}", raw.examples[0].mistakes), ToString::to_string);
            assert!(message.contains(part), "{text}: {message}");
        }
        for (name, text, part) in [("a.xlsx", "", "xlsx"), ("a.csv", "image\n", "no rows")] {
            let message = read(name, text).unwrap_err().to_string();
            assert!(message.contains(part), "{text}: {message}");
        }
    }
}
