//! One Parquet file: its footer, which of its columns are read, its images by number.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use parquet::basic::{Compression, Repetition, Type as Physical};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, FileReader, Length, SerializedFileReader};
use parquet::schema::types::{ColumnPath, Type};

use super::pages;
use super::values::{class_names, features, kind};
use crate::data::columns::Columns;
use crate::data::stored::Shared;
use crate::error::{Error, Result};
use crate::{files, guard};

/// Images larger than this are refused, as image files are.
const MAX_IMAGE: usize = 256 << 20;

/// One file of a set. One that cannot be opened says so when it is read.
#[derive(Debug, Clone)]
pub(super) struct ShardFile {
    pub(super) path: PathBuf,
    inner: std::result::Result<Arc<Inner>, String>,
}

/// What the footer says.
pub(super) struct Inner {
    pub(super) reader: SerializedFileReader<Shared>,
    /// The columns that are read with each row: those that say something, without image bytes.
    pub(super) projection: Type,
    pub(super) image: Option<ImageColumn>,
    /// The columns that hold classes.
    pub(super) class_columns: Vec<ClassColumn>,
}

/// A column of classes.
pub(super) struct ClassColumn {
    pub(super) name: String,
    /// What the file's metadata call the classes.
    pub(super) names: Option<Vec<String>>,
    /// What its cells are; nothing where they are all empty.
    pub(super) kind: Option<&'static str>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("image", &self.image).finish_non_exhaustive()
    }
}

/// Where images are.
#[derive(Debug, Clone)]
pub(super) struct ImageColumn {
    pub(super) name: String,
    /// The leaf with the bytes, where there is one.
    pub(super) bytes: Option<usize>,
}

impl Length for Shared {
    fn len(&self) -> u64 {
        Shared::len(self).unwrap_or(0)
    }
}

impl ChunkReader for Shared {
    type T = std::io::BufReader<Shared>;

    fn get_read(&self, start: u64) -> parquet::errors::Result<Self::T> {
        // Page headers are small; the pages themselves come by `get_bytes`.
        Ok(std::io::BufReader::with_capacity(512, self.from(start)))
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        let size = Length::len(self);
        if start.checked_add(length as u64).is_none_or(|end| end > size) {
            return Err(ParquetError::EOF(format!("expected {length} bytes at {start}, the file has {size}")));
        }
        let mut buffer = vec![0; length];
        std::io::Read::read_exact(&mut self.from(start), &mut buffer)?;
        Ok(buffer.into())
    }
}

impl ShardFile {
    pub(super) fn open(path: &Path, columns: &Columns) -> Self {
        let inner = Inner::open(path, columns).map(Arc::new);
        Self { path: path.to_path_buf(), inner: inner.map_err(|e| e.to_string()) }
    }

    /// What is wrong with it as a whole.
    pub(super) fn failure(&self) -> Option<Error> {
        // The place is part of the message already.
        self.inner.as_ref().err().map(|message| Error::input("", message))
    }

    pub(super) fn inner(&self) -> Result<Arc<Inner>> {
        self.inner.clone().map_err(|message| Error::input("", message))
    }

    pub(super) fn classes(&self) -> Option<&Vec<String>> {
        let inner = self.inner.as_ref().ok()?;
        inner.class_columns.iter().find_map(|c| c.names.as_ref())
    }

    /// What the cells of its label columns are.
    pub(super) fn label_kinds(&self) -> impl Iterator<Item = (&str, &'static str)> {
        let columns = self.inner.as_ref().map(|inner| inner.class_columns.as_slice()).unwrap_or_default();
        columns.iter().filter_map(|c| Some((c.name.as_str(), c.kind?)))
    }

    /// Whether it has no row at all.
    pub(super) fn is_empty(&self) -> bool {
        self.inner.as_ref().is_ok_and(|inner| inner.reader.metadata().row_groups().iter().all(|g| g.num_rows() == 0))
    }

    /// Bytes of a row in the row group with the largest ones.
    pub(super) fn row_bytes(&self) -> u64 {
        let Ok(inner) = &self.inner else { return 0 };
        let groups = inner.reader.metadata().row_groups();
        let mean = |size: i64, rows: i64| u64::try_from(size / rows.max(1)).unwrap_or(0);
        groups.iter().map(|g| mean(g.total_byte_size(), g.num_rows())).max().unwrap_or(0)
    }
}

/// The crate panics on some broken pages.
pub(super) fn guarded<T>(run: impl FnOnce() -> parquet::errors::Result<T>) -> parquet::errors::Result<T> {
    guard::guarded(run).unwrap_or_else(|| Err(ParquetError::General("its contents make the reader fail".into())))
}

/// What reading a file ran into.
pub(super) fn broken(place: impl std::fmt::Display, error: &ParquetError) -> Error {
    Error::input(place, format!("is broken or no Parquet: {error}"))
}

impl Inner {
    fn open(path: &Path, columns: &Columns) -> Result<Self> {
        let file = Shared::new(files::open(path)?);
        let size = Length::len(&file);
        pages::check_footer(path, &file, size)?;
        let reader = guarded(|| SerializedFileReader::new(file.clone())).map_err(|e| broken(path.display(), &e))?;
        let metadata = reader.metadata();
        check_rows(path, metadata.row_groups().iter().map(|g| u64::try_from(g.num_rows()).unwrap_or(u64::MAX)), size)?;
        let pairs = metadata.file_metadata().key_value_metadata();
        let info = pairs.and_then(|all| all.iter().find(|p| p.key == "huggingface")).and_then(|p| p.value.as_deref());
        let features = features(info);
        let schema = metadata.file_metadata().schema();
        let known: Vec<&str> = schema.get_fields().iter().map(|f| f.name()).collect();
        if let Some(twice) = known.iter().enumerate().find(|(i, name)| known[..*i].contains(name)).map(|(_, name)| name) {
            return Err(Error::input(path.display(), format!("has two columns `{twice}`")).hint("rename one of them"));
        }
        check_named(path, columns, &known)?;
        let typed = |name: &str| features.get(name).and_then(|f| f.get("_type")).and_then(|t| t.as_str()) == Some("Image");
        let image = columns.image.clone().or_else(|| {
            let usual = ["image", "file_name"].into_iter().find(|n| known.contains(n));
            usual.or_else(|| known.iter().copied().find(|n| typed(n))).map(str::to_string)
        });
        let image = image.map(|name| image_column(path, &reader, &name)).transpose()?;
        check_codecs(path, &reader)?;
        let wanted = wanted(columns);
        pages::check(path, &file, &reader, &|name| image.as_ref().is_some_and(|i| i.name == name) || wanted.iter().any(|w| w == name))?;
        let kind = |name: &str| schema.get_fields().iter().find(|f| f.name() == name).and_then(|f| kind(f));
        let class = |name: &str| ClassColumn { name: name.into(), names: features.get(name).and_then(class_names), kind: kind(name) };
        let class_columns = columns.class_columns().into_iter().flatten().filter(|name| known.contains(name)).map(class).collect();
        let projection = project(schema, &wanted, image.as_ref()).map_err(|e| broken(path.display(), &e))?;
        Ok(Self { projection, image, class_columns, reader })
    }

    /// The images of a row group.
    pub(super) fn images(&self, group: usize) -> parquet::errors::Result<Option<ColumnReaderImpl<ByteArrayType>>> {
        let Some(leaf) = self.image.as_ref().and_then(|i| i.bytes) else { return Ok(None) };
        guarded(|| match self.reader.get_row_group(group)?.get_column_reader(leaf)? {
            ColumnReader::ByteArrayColumnReader(reader) => Ok(Some(reader)),
            _ => Ok(None),
        })
    }

    /// Whether the row group may have rows without image.
    pub(super) fn may_lack_images(&self, group: usize) -> bool {
        let column = |leaf: usize| self.reader.metadata().row_group(group).column(leaf).statistics().and_then(|s| s.null_count_opt());
        self.image.as_ref().and_then(|i| i.bytes).is_some_and(|leaf| column(leaf) != Some(0))
    }
}

/// Rows that differ take a byte at least. Repetitions take none, so that a file of a kilobyte could have a billion rows.
fn check_rows(path: &Path, groups: impl Iterator<Item = u64>, size: u64) -> Result<()> {
    let rows = groups.fold(0, u64::saturating_add);
    match rows > size {
        true => Err(Error::input(path.display(), format!("has {rows} rows in {size} bytes, so that most of them say the same"))),
        false => Ok(()),
    }
}

/// Columns that the recipe names have to be there.
fn check_named(path: &Path, columns: &Columns, known: &[&str]) -> Result<()> {
    for (key, name) in columns.named() {
        if !known.contains(&name) {
            return Err(Error::input(path.display(), format!("there is no column `{name}`")).hint(format!(
                "data.{}.{key} names it; the columns are {}",
                columns.key,
                known.join(", ")
            )));
        }
    }
    Ok(())
}

/// The columns that a row may say something by.
fn wanted(columns: &Columns) -> Vec<String> {
    const USUAL: [&str; 12] =
        ["text", "label", "labels", "question", "answer", "answers", "choices", "value", "fits", "split", "group", "id"];
    let named = columns.named().map(|(_, name)| name.to_string());
    named.chain(USUAL.iter().map(ToString::to_string)).collect()
}

fn image_column(path: &Path, reader: &SerializedFileReader<Shared>, name: &str) -> Result<ImageColumn> {
    let schema = reader.metadata().file_metadata().schema_descr();
    let leaf = |parts: &[&str]| {
        let wanted = ColumnPath::new(parts.iter().map(ToString::to_string).collect());
        let found = schema.columns().iter().position(|c| *c.path() == wanted);
        found.filter(|&i| schema.column(i).physical_type() == Physical::BYTE_ARRAY && schema.column(i).max_rep_level() == 0)
    };
    let text = |i: usize| schema.column(i).converted_type() == parquet::basic::ConvertedType::UTF8;
    match (leaf(&[name, "bytes"]), leaf(&[name, "path"]), leaf(&[name])) {
        (Some(bytes), ..) => Ok(ImageColumn { name: name.into(), bytes: Some(bytes) }),
        (None, Some(_), _) => Ok(ImageColumn { name: name.into(), bytes: None }),
        (_, _, Some(i)) if text(i) => Ok(ImageColumn { name: name.into(), bytes: None }),
        (_, _, Some(i)) => Ok(ImageColumn { name: name.into(), bytes: Some(i) }),
        _ => Err(Error::input(path.display(), format!("column `{name}`: expected a struct of bytes and path, bytes, or a path"))
            .hint("data.parquet.image names the column of images")),
    }
}

fn check_codecs(path: &Path, reader: &SerializedFileReader<Shared>) -> Result<()> {
    for column in reader.metadata().row_groups().iter().flat_map(|g| g.columns()) {
        if matches!(column.compression(), Compression::BROTLI(_) | Compression::LZO) {
            let codec = column.compression().to_string();
            let codec = codec.split('(').next().unwrap_or_default();
            return Err(Error::input(path.display(), format!("is compressed with {codec}, which is not read here"))
                .hint("write it with snappy, zstd, gzip or lz4: `pq.write_table(table, path, compression=\"zstd\")`"));
        }
    }
    Ok(())
}

/// The schema of what is read with each row.
fn project(schema: &Type, wanted: &[String], image: Option<&ImageColumn>) -> parquet::errors::Result<Type> {
    let mut fields = Vec::new();
    for field in schema.get_fields() {
        let is_image = image.is_some_and(|i| i.name == field.name());
        match image {
            Some(i) if is_image && i.bytes.is_some() && field.is_primitive() => {}
            Some(_) if is_image && field.is_group() => {
                let path = field.get_fields().iter().filter(|f| f.name() == "path").cloned().collect::<Vec<_>>();
                if !path.is_empty() {
                    let repetition = if field.is_optional() { Repetition::OPTIONAL } else { Repetition::REQUIRED };
                    let group = Type::group_type_builder(field.name()).with_repetition(repetition).with_fields(path).build()?;
                    fields.push(Arc::new(group));
                }
            }
            _ if is_image || wanted.iter().any(|w| w == field.name()) => fields.push(field.clone()),
            _ => {}
        }
    }
    Type::group_type_builder(schema.name()).with_fields(fields).build()
}

/// Reads one image from where a column reader stands; nothing where the cell is empty.
pub(super) fn one(reader: &mut ColumnReaderImpl<ByteArrayType>, place: &dyn Fn() -> String) -> Result<Option<ByteArray>> {
    let (mut levels, mut values) = (Vec::new(), Vec::new());
    let read = guarded(|| reader.read_records(1, Some(&mut levels), None, &mut values));
    let (records, ..) = read.map_err(|e| broken(place(), &e))?;
    if records == 0 {
        return Err(Error::input(place(), "is missing: the row group ends before it"));
    }
    match values.pop() {
        Some(image) if image.len() > MAX_IMAGE => {
            Err(Error::input(place(), format!("the image has {} bytes, expected at most {MAX_IMAGE}", image.len())))
        }
        image => Ok(image.filter(|i| !i.is_empty())),
    }
}

/// Rows that are read at once when one of them is asked for: pages hold several.
const AHEAD: usize = 16;
/// Bytes of such rows that are kept.
const KEPT: usize = 64 << 20;

/// Images of some rows behind one another.
struct Kept {
    shard: u32,
    group: usize,
    first: usize,
    images: Vec<Option<ByteArray>>,
}

impl Kept {
    fn get(&self, shard: u32, group: usize, row: usize) -> Option<&Option<ByteArray>> {
        let same = self.shard == shard && self.group == group;
        self.images.get(row.checked_sub(self.first).filter(|_| same)?)
    }

    fn size(&self) -> usize {
        self.images.iter().flatten().map(ByteArray::len).sum()
    }
}

/// The images that were asked for last, and those behind them.
#[derive(Default)]
pub(super) struct Cache(Mutex<VecDeque<Kept>>);

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Cache")
    }
}

impl Cache {
    /// The image of a row.
    pub(super) fn get(&self, file: &ShardFile, shard: u32, group: usize, row: usize, place: &dyn Fn() -> String) -> Result<Vec<u8>> {
        let lacks = || Error::input(place(), "has no image");
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(image) = kept.iter().rev().find_map(|k| k.get(shard, group, row)) {
            return image.as_ref().map(|i| i.data().to_vec()).ok_or_else(lacks);
        }
        drop(kept);
        let mut reader = file.inner()?.images(group).map_err(|e| broken(place(), &e))?.ok_or_else(lacks)?;
        guarded(|| reader.skip_records(row)).map_err(|e| broken(place(), &e))?;
        // Copied, so that no page stays in memory for one of its images.
        let copied = |image: Option<ByteArray>| image.map(|i| ByteArray::from(i.data().to_vec()));
        let found = one(&mut reader, place)?;
        let bytes = found.as_ref().map(|i| i.data().to_vec()).ok_or_else(lacks);
        let mut images = vec![copied(found)];
        while images.len() < AHEAD
            && let Ok(image) = one(&mut reader, place)
        {
            images.push(copied(image));
        }
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push_back(Kept { shard, group, first: row, images });
        while kept.len() > 1 && kept.iter().map(Kept::size).sum::<usize>() > KEPT {
            kept.pop_front();
        }
        bytes
    }
}
