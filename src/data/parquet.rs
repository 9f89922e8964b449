//! Parquet files as Hugging Face `datasets` writes them: an image is a struct of bytes and path, class names stand in the
//! file's metadata, a set is several shards whose names say the split.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::columns::{Columns, with_columns};
use super::paths::{Paths, common, missing, splits_of};
use super::shards::{Rows, Shard, Shards, StreamOptions, Streaming};
use super::stored::{Address, Store};
use super::{DataConfig, Dataset, Raw, Reads, Source, Split, check_classes, shards};
use crate::error::{Error, Result};

mod file;
mod pages;
mod rows;
mod values;

use file::{Cache, ShardFile};

with_columns! {
    /// Rows of Parquet files; a row's number counts from 0 in its file.
    pub struct ParquetConfig as "parquet" {
        /// Files, directories, globs, brace ranges, `hub:owner/dataset@revision`. Names such as
        /// `train-00000-of-00003.parquet` and `test-….parquet` say the split.
        pub path: Paths,
        /// Files of their own for validation.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub val: Option<Paths>,
        /// Files of their own for testing.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub test: Option<Paths>,
        /// Names for the numbers in the label columns, in order; those in the files' metadata when left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub classes: Option<Vec<String>>,
        /// Whether the training split is streamed: `true`, `false`, or `auto`, which streams more than 20 000 rows.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub stream: Option<Streaming>,
        /// Rows that are shuffled at a time where it is streamed; 10 000 when left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub buffer: Option<usize>,
        /// Fewer where their images would have more than so many MiB; 256 when left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub buffer_mib: Option<usize>,
    }
}

/// A set of Parquet files.
#[derive(Debug)]
pub(super) struct ParquetSet {
    place: String,
    columns: Columns,
    classes: Option<Vec<String>>,
    options: StreamOptions,
    shards: Vec<Shard>,
    files: Vec<ShardFile>,
    cache: Cache,
}

impl ParquetConfig {
    /// Opens every file's footer.
    fn set(&self, skip_bad: bool) -> Result<ParquetSet> {
        self.columns().check()?;
        let paths = files(&self.path, self.val.as_ref(), self.test.as_ref(), "parquet", &["parquet"])?;
        let root = common(&paths.iter().map(|(p, _)| p.clone()).collect::<Vec<_>>());
        let columns = self.columns();
        let files: Vec<ShardFile> = paths.iter().map(|(path, _)| ShardFile::open(path, &columns)).collect();
        let classes = match &self.classes {
            Some(names) => Some(names.clone()),
            None => names(&files)?,
        };
        if classes.is_none() {
            one_kind(&files)?;
        }
        if let Some(names) = &self.classes {
            check_classes("data.parquet.classes", names)?;
        }
        if let Some(error) = files.iter().find_map(ShardFile::failure).filter(|_| !skip_bad) {
            return Err(error);
        }
        let splits = splits_of(&paths, &root, "parquet")?;
        let shards = paths.iter().zip(splits).zip(&files).map(|(((path, _), split), file)| Shard {
            name: path.strip_prefix(&root).unwrap_or(path).display().to_string(),
            split,
            row_bytes: file.row_bytes(),
        });
        Ok(ParquetSet {
            place: self.path.to_string(),
            columns,
            classes,
            options: StreamOptions::new("parquet", self.stream, self.buffer, self.buffer_mib)?,
            shards: shards.collect(),
            files,
            cache: Cache::default(),
        })
    }
}

impl Source for ParquetConfig {
    fn place(&self) -> String {
        self.path.to_string()
    }

    fn read(&self) -> Result<Raw> {
        shards::list(Arc::new(self.set(false)?))
    }

    fn open(&self, config: &DataConfig, draw: Option<(usize, u64)>, reads: Option<&Reads>) -> Option<Result<Dataset>> {
        Some(self.set(config.skip_bad).and_then(|set| shards::open(config, Arc::new(set), draw, reads)))
    }

    fn has_own_splits(&self) -> bool {
        self.set(true).is_ok_and(|set| shards::own_splits(Arc::new(set)))
    }
}

/// The names of a file's columns.
pub(super) fn columns(path: &Path) -> Result<Vec<String>> {
    fields(path, &|_| true)
}

/// The names of the columns that hold lists.
pub(super) fn lists(path: &Path) -> Result<Vec<String>> {
    fields(path, &|field| field.get_basic_info().converted_type() == parquet::basic::ConvertedType::LIST)
}

fn fields(path: &Path, wanted: &dyn Fn(&parquet::schema::types::Type) -> bool) -> Result<Vec<String>> {
    let file = ShardFile::open(path, &Columns::default()).inner()?;
    let schema = parquet::file::reader::FileReader::metadata(&file.reader).file_metadata().schema();
    Ok(schema.get_fields().iter().filter(|f| wanted(f)).map(|f| f.name().to_string()).collect())
}

/// The files of a source, with the split of those that have a key of their own.
pub(super) fn files(
    path: &Paths,
    val: Option<&Paths>,
    test: Option<&Paths>,
    key: &str,
    extensions: &[&str],
) -> Result<Vec<(PathBuf, Option<Split>)>> {
    let own = (val.is_some() || test.is_some()).then_some(Split::Train);
    let mut all = Vec::new();
    for (name, paths, split) in [("path", Some(path), own), ("val", val, Some(Split::Val)), ("test", test, Some(Split::Test))] {
        let Some(paths) = paths else { continue };
        all.extend(paths.files(&format!("data.{key}.{name}"), extensions)?.into_iter().map(|p| (p, split)));
    }
    Ok(all)
}

/// The class names that the files' metadata give the label column; all files have to agree.
fn names(files: &[ShardFile]) -> Result<Option<Vec<String>>> {
    let mut found: Option<(&ShardFile, &Vec<String>)> = None;
    for file in files.iter() {
        let Some(names) = file.classes() else { continue };
        match found {
            Some((first, other)) if other != names => {
                let message = format!("has other class names than {}", first.path.display());
                return Err(Error::input(file.path.display(), message).hint("data.parquet.classes overrules them"));
            }
            _ => found = Some((file, names)),
        }
    }
    Ok(found.map(|(_, names)| names.clone()))
}

/// Numbers in one file and texts in another are no classes of one set.
fn one_kind(files: &[ShardFile]) -> Result<()> {
    let mut first: BTreeMap<&str, (&'static str, &ShardFile)> = BTreeMap::new();
    for file in files {
        for (column, kind) in file.label_kinds() {
            let (other, before) = *first.entry(column).or_insert((kind, file));
            if other != kind {
                let message = format!("column `{column}` holds {kind}, in {} {other}", before.path.display());
                return Err(Error::input(file.path.display(), message)
                    .hint("write the column with one type in all files; data.parquet.classes names the classes of numbers"));
            }
        }
    }
    Ok(())
}

impl Store for ParquetSet {
    fn bytes(&self, at: Address) -> Result<Vec<u8>> {
        let file = self.file(at.shard)?;
        self.cache.get(file, at.shard, at.part[0] as usize, at.part[1] as usize, &|| self.row_place(at))
    }

    fn row_place(&self, at: Address) -> String {
        let path = self.files.get(at.shard as usize).map(|f| f.path.display().to_string()).unwrap_or_default();
        format!("{path}: row {}", at.row)
    }
}

impl ParquetSet {
    fn file(&self, shard: u32) -> Result<&ShardFile> {
        self.files.get(shard as usize).ok_or_else(|| Error::fault(&self.place, format!("there is no shard {shard}")))
    }
}

impl Shards for ParquetSet {
    fn place(&self) -> String {
        self.place.clone()
    }

    fn columns(&self) -> &Columns {
        &self.columns
    }

    fn shards(&self) -> &[Shard] {
        &self.shards
    }

    fn classes(&self) -> Option<Vec<String>> {
        self.classes.clone()
    }

    fn options(&self) -> StreamOptions {
        self.options
    }

    fn notes(&self) -> Vec<String> {
        let empty = self.files.iter().filter(|f| f.is_empty()).map(|f| format!("{} has no rows", f.path.display()));
        empty.chain(missing(&self.files.iter().map(|f| f.path.clone()).collect::<Vec<_>>())).collect()
    }

    fn numbers_rows(&self) -> bool {
        true
    }

    fn rows(&self, shard: usize) -> Result<Box<dyn Rows>> {
        let file = self.file(shard as u32)?;
        Ok(Box::new(rows::FileRows::new(file.clone(), self.classes.clone().map(Arc::new))?))
    }
}
