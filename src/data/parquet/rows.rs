//! The rows of one file, a row group at a time.

use std::sync::Arc;

use parquet::column::reader::ColumnReaderImpl;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::reader::FileReader;
use parquet::record::reader::{ReaderIter, TreeBuilder};
use parquet::schema::types::SchemaDescriptor;
use serde_json::Value;

use super::file::{ClassColumn, Inner, ShardFile, broken, guarded, one};
use super::values::{name_classes, object};
use crate::data::columns::{Row, TIMES, shown};
use crate::data::shards::{Found, Place, Rows};
use crate::error::{Error, Result};

/// Values of a column that are decoded at once.
const BATCH: usize = 256;

/// Goes through a file.
pub(super) struct FileRows {
    file: ShardFile,
    inner: Arc<Inner>,
    /// Overrules the names that the file has.
    names: Option<Arc<Vec<String>>>,
    /// The row group, and its first row's number in the file.
    group: usize,
    first: u64,
    /// The next row in the group.
    row: u64,
    cells: Option<ReaderIter>,
    images: Option<Images>,
}

/// The images of the group, read behind the other columns.
struct Images {
    reader: ColumnReaderImpl<ByteArrayType>,
    /// The next image.
    at: u64,
    /// The one before it, where it was looked at already.
    last: Option<ByteArray>,
}

impl FileRows {
    pub(super) fn new(file: ShardFile, names: Option<Arc<Vec<String>>>) -> Result<Self> {
        let inner = file.inner()?;
        Ok(Self { file, inner, names, group: 0, first: 0, row: 0, cells: None, images: None })
    }

    fn place(&self, number: u64) -> String {
        format!("{}: row {number}", self.file.path.display())
    }

    /// The size of the current row group; nothing behind the last.
    fn group_rows(&self) -> Option<u64> {
        let groups = self.inner.reader.metadata().row_groups();
        groups.get(self.group).map(|g| u64::try_from(g.num_rows()).unwrap_or(0))
    }

    /// What is left of the group cannot be read.
    fn give_up(&mut self, rows: u64, why: &parquet::errors::ParquetError) -> Error {
        let (from, to) = (self.first + self.row, self.first + rows.saturating_sub(1));
        self.row = rows;
        self.cells = None;
        broken(format!("{}: row group {}, rows {from} to {to}", self.file.path.display(), self.group), why)
    }

    fn cells(&mut self) -> parquet::errors::Result<Row> {
        if self.inner.projection.get_fields().is_empty() {
            return Ok(Row::new());
        }
        if self.cells.is_none() {
            let schema = Arc::new(SchemaDescriptor::new(Arc::new(self.inner.projection.clone())));
            let group = self.inner.reader.get_row_group(self.group)?;
            self.cells = Some(guarded(|| TreeBuilder::new().with_batch_size(BATCH).as_iter(schema, &*group))?);
        }
        let next = match &mut self.cells {
            Some(cells) => guarded(|| Ok(cells.next()))?,
            None => None,
        };
        next.unwrap_or_else(|| Err(parquet::errors::ParquetError::EOF("the row group ends early".into()))).map(object)
    }

    fn found(&mut self, mut cells: Row, number: u64, row: u64) -> Result<Found> {
        for ClassColumn { name: column, names: own, kind } in &self.inner.class_columns {
            let Some(cell) = cells.get_mut(column) else { continue };
            if let Some(kind) = kind.filter(|kind| TIMES.contains(kind) && !cell.is_null()) {
                // Its number means nothing to anybody.
                *cell = Value::Object(Row::from_iter([(kind.to_string(), cell.take())]));
                continue;
            }
            let Some(names) = self.names.as_deref().or(own.as_ref()) else { continue };
            name_classes(cell, names).map_err(|found| {
                let expected = format!("column `{column}`: expected a class from 0 to {}, found {found}", names.len() as i64 - 1);
                Error::input(self.place(number), expected)
            })?;
        }
        let image = self.image_place(&mut cells, number, row)?;
        Ok(Found { number, key: number.to_string(), cells, image })
    }

    fn image_place(&mut self, cells: &mut Row, number: u64, row: u64) -> Result<Place> {
        let Some(column) = self.inner.image.clone() else { return Ok(Place::None) };
        if column.bytes.is_some() && (!self.inner.may_lack_images(self.group) || self.look(row, number)?) {
            return Ok(Place::Part([self.group as u64, row]));
        }
        let cell = match cells.get(&column.name) {
            Some(Value::Object(image)) => image.get("path").cloned().unwrap_or_default(),
            other => other.cloned().unwrap_or_default(),
        };
        match cell {
            Value::String(path) if !path.trim().is_empty() => {
                let beside = self.file.path.parent().unwrap_or(std::path::Path::new("."));
                Ok(Place::File(beside.join(path.trim())))
            }
            Value::Null | Value::String(_) => Ok(Place::None),
            other => {
                let found = shown(&other);
                Err(Error::input(self.place(number), format!("column `{}`: expected a path, found {found}", column.name)))
            }
        }
    }

    /// Whether the row has an image.
    fn look(&mut self, row: u64, number: u64) -> Result<bool> {
        self.advance(row, number)?;
        Ok(self.images.as_ref().is_some_and(|i| i.last.is_some()))
    }

    /// Reads the image of a row of the group, passing over those before it. Behind an error a new reader begins, so that
    /// what can be read does not depend on what was read before.
    fn advance(&mut self, row: u64, number: u64) -> Result<()> {
        let place = self.place(number);
        let mut images = match self.images.take() {
            Some(images) => images,
            None => match self.inner.images(self.group).map_err(|e| broken(&place, &e))? {
                Some(reader) => Images { reader, at: 0, last: None },
                None => return Ok(()),
            },
        };
        if images.at != row + 1 {
            let passed = row.saturating_sub(images.at) as usize;
            guarded(|| images.reader.skip_records(passed)).map_err(|e| broken(&place, &e))?;
            images.last = one(&mut images.reader, &|| place.clone())?;
            images.at = row + 1;
        }
        self.images = Some(images);
        Ok(())
    }
}

impl Rows for FileRows {
    fn next(&mut self) -> Option<Result<Found>> {
        let rows = loop {
            let rows = self.group_rows()?;
            if self.row < rows {
                break rows;
            }
            self.first += rows;
            (self.group, self.row, self.cells, self.images) = (self.group + 1, 0, None, None);
        };
        let (row, number) = (self.row, self.first + self.row);
        let cells = match self.cells() {
            Ok(cells) => cells,
            Err(why) => return Some(Err(self.give_up(rows, &why))),
        };
        self.row += 1;
        Some(self.found(cells, number, row))
    }

    fn image(&mut self) -> Result<Vec<u8>> {
        let row = self.row.saturating_sub(1);
        let number = self.first + row;
        self.advance(row, number)?;
        match self.images.as_ref().and_then(|i| i.last.as_ref()) {
            Some(image) => Ok(image.data().to_vec()),
            None => Err(Error::input(self.place(number), "has no image")),
        }
    }
}
