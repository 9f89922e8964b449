//! Columns that somebody names instead of those that [`DataConfig::locate`] guesses.

use super::columns::Row;
use super::shards::Shards as _;
use super::{ColumnNames, DataConfig, metadata, parquet, table};
use crate::error::{Error, Result};

/// What a user says of the columns; what is left out stays as it was guessed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ColumnChoice {
    /// The column of class names, of one or several a row.
    pub label: Option<String>,
    /// The columns of texts; the strings of several are joined.
    pub text: Vec<String>,
    /// The column of images; of tars the extension of the member.
    pub image: Option<String>,
    /// What stands between the class names of a cell, so that a row may have several.
    pub separator: Option<String>,
}

/// The columns of a source.
#[derive(Debug, Default)]
struct Found {
    names: Vec<String>,
    /// Those whose cells are lists.
    lists: Vec<String>,
}

/// So many rows of a tar are looked at for the columns, which a row may lack.
const LOOKED_AT: usize = 100;

impl ColumnChoice {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Found {
    fn add(&mut self, row: &Row) {
        for (name, value) in row {
            if !self.names.contains(name) {
                self.names.push(name.clone());
            }
            if value.is_array() && !self.lists.contains(name) {
                self.lists.push(name.clone());
            }
        }
    }

    fn check(&self, place: &str, key: &str, name: &str) -> Result<()> {
        match self.names.iter().any(|n| n == name) {
            true => Ok(()),
            false => Err(Error::input(place, format!("there is no column `{name}`, which was named as the {key} column"))
                .hint(format!("columns found: {}", self.names.join(", ")))),
        }
    }
}

impl DataConfig {
    /// The names of its columns; nothing where a source has none, as a folder. What lies on the hub is to be fetched before.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn column_names(&self) -> Result<Option<Vec<String>>> {
        Ok(self.found()?.map(|found| found.names))
    }

    fn found(&self) -> Result<Option<Found>> {
        let mut found = Found::default();
        if let Some(t) = &self.table {
            let tables = if t.path.is_dir() { metadata::find(&t.path)? } else { None };
            let file = tables.and_then(|tables| tables.files.into_iter().next()).map_or_else(|| t.path.clone(), |(file, _)| file);
            found = Found { names: table::columns(&file)?, lists: table::lists(&file)? };
        } else if let Some(p) = &self.parquet {
            let files = p.path.files("data.parquet.path", &["parquet"])?;
            if let Some(first) = files.first() {
                (found.names, found.lists) = (parquet::columns(first)?, parquet::lists(first)?);
            }
        } else if let Some(w) = &self.webdataset {
            let mut rows = w.set()?.rows(0)?;
            let looked_at = std::iter::from_fn(|| rows.next()).take(LOOKED_AT);
            looked_at.flatten().for_each(|row| found.add(&row.cells));
        } else {
            return Ok(None);
        }
        Ok(Some(found))
    }

    /// The same data read by the columns that are named.
    ///
    /// # Errors
    /// When a source has no columns, or not those.
    pub fn with_choice(mut self, choice: &ColumnChoice) -> Result<Self> {
        if choice.is_empty() {
            return Ok(self);
        }
        let kind = self.kind();
        let Some(found) = self.found()? else {
            return Err(Error::input(format!("data.{kind}"), "has no columns, so that none can be named")
                .hint("tables (CSV, TSV, JSONL), Parquet files and tars have columns; of a folder, directories are the classes"));
        };
        let place = format!("data.{kind}");
        for name in &choice.text {
            found.check(&place, "text", name)?;
        }
        if let Some(name) = &choice.label {
            found.check(&place, "label", name)?;
        }
        // Of tars it is a member, which opening them looks for.
        if let (Some(name), None) = (&choice.image, &self.webdataset) {
            found.check(&place, "image", name)?;
        }
        macro_rules! set {
            ($config:expr) => {
                if let Some(config) = $config {
                    let [label, labels] = classes(&place, choice, &found, [config.label.take(), config.labels.take()])?;
                    (config.label, config.labels) = (label, labels);
                    config.label_separator = choice.separator.clone().or(config.label_separator.take());
                    config.image = choice.image.clone().or(config.image.take());
                    config.text = texts(&choice.text).or(config.text.take());
                }
            };
        }
        set!(&mut self.table);
        set!(&mut self.parquet);
        set!(&mut self.webdataset);
        Ok(self)
    }
}

fn texts(names: &[String]) -> Option<ColumnNames> {
    match names {
        [] => None,
        [one] => Some(ColumnNames::One(one.clone())),
        several => Some(ColumnNames::Many(several.to_vec())),
    }
}

/// The column of one class and that of several: a separator, lists and the column's usual name say which it is.
fn classes(place: &str, choice: &ColumnChoice, found: &Found, guessed: [Option<String>; 2]) -> Result<[Option<String>; 2]> {
    let usual = || ["labels", "label"].iter().find(|n| found.names.iter().any(|f| f == *n)).map(ToString::to_string);
    if choice.separator.is_some() {
        let [label, labels] = guessed;
        let name = choice.label.clone().or(labels).or(label).or_else(usual).ok_or_else(|| {
            Error::input(place, "a separator of labels needs a column of labels, and none is named or called so")
                .hint(format!("columns found: {}", found.names.join(", ")))
        })?;
        return Ok([None, Some(name)]);
    }
    Ok(match &choice.label {
        None => guessed,
        Some(name) if name == "labels" || found.lists.contains(name) => [None, Some(name.clone())],
        Some(name) => [Some(name.clone()), None],
    })
}
