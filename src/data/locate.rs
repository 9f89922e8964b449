//! From a path to a source: which of the layouts lies there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::captions::{self, IMAGE, LABEL, TEXT};
use super::folder::directories;
use super::metadata;
use super::paths::{Paths, on_hub, split_named};
use super::scan::entries;
use super::{
    CocoConfig, ColumnNames, CoopConfig, DataConfig, Draw, FolderConfig, ImageRef, ParquetConfig, Raw, Source, Split, TableConfig,
    VqaConfig, VqaFiles, WebDatasetConfig, cells, coco, is_split, table,
};
use crate::error::{Error, Result};
use crate::hub;

impl DataConfig {
    /// Finds out what lies at `path`: `builtin:NAME`, `hub:owner/dataset`, a table, Parquet files or tars (also a glob or a
    /// brace range), a file of COCO or VQA, a directory with `metadata.csv|jsonl`, one of CoOp's benchmarks, one directory a
    /// class, or a directory with such files in it.
    ///
    /// # Errors
    /// When it is none of them.
    pub fn locate(path: &str) -> Result<Self> {
        if let Some(name) = path.strip_prefix("builtin:") {
            return Ok(Self { builtin: Some(name.to_string()), ..Self::default() });
        }
        let place = Path::new(path);
        if let Some(found) = sharded(path, place)? {
            return Ok(found);
        }
        if place.is_file() {
            return match place.extension().is_some_and(|e| e.eq_ignore_ascii_case("json")) {
                true => annotations(&[place.to_path_buf()])?.ok_or_else(|| {
                    Error::input(path, "is neither COCO's captions ({\"images\", \"annotations\"}) nor VQA's questions ({\"questions\"})")
                }),
                false => Ok(Self { table: Some(guess(place)?), ..Self::default() }),
            };
        }
        let files: Vec<PathBuf> = entries(place)?.into_iter().map(|e| e.path).filter(|p| p.is_file()).collect();
        let named = |wanted: &dyn Fn(&str) -> bool| files.iter().any(|f| f.file_name().is_some_and(|n| wanted(&n.to_string_lossy())));
        let root = place.to_path_buf();
        if let Some(found) = metadata::find(place)? {
            return Ok(Self { table: Some(TableConfig { path: root, ..guess(&found.files[0].0)? }), ..Self::default() });
        }
        if named(&|n| is_split(n) || n == "variants.txt" || n == "classnames.txt") {
            let coop = CoopConfig { root, split: None, images: None, draw: Draw::default() };
            return Ok(Self { coop: Some(coop), ..Self::default() });
        }
        let json: Vec<PathBuf> = files.iter().filter(|f| f.extension().is_some_and(|e| e == "json")).cloned().collect();
        if let Some(found) = annotations(&json)? {
            return Ok(found);
        }
        let tables = tables_of(&files)?;
        let folder = FolderConfig { root };
        let read = folder.read();
        match &read {
            // Images of one directory are what the tables beside it are about.
            Ok(raw) if tables.is_empty() || !is_one_class(raw) => Ok(Self { folder: Some(folder), ..Self::default() }),
            Err(e) if tables.is_empty() => apart(path, place)?.map_or_else(|| Err(nothing(path, e)), Ok),
            _ => {
                let table = split_tables(path, &tables)?;
                match read.is_err() || names_images(&table)? {
                    true => Ok(Self { table: Some(table), ..Self::default() }),
                    false => Ok(Self { folder: Some(folder), ..Self::default() }),
                }
            }
        }
    }

    /// Whether the source says itself what is trained on and what is tested.
    #[must_use]
    pub fn has_own_splits(&self) -> bool {
        self.source().is_ok_and(|s| s.has_own_splits())
    }

    /// The source's key in a recipe.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        let given = [
            ("folder", self.folder.is_some()),
            ("table", self.table.is_some()),
            ("parquet", self.parquet.is_some()),
            ("webdataset", self.webdataset.is_some()),
            ("coco", self.coco.is_some()),
            ("vqa", self.vqa.is_some()),
            ("coop", self.coop.is_some()),
        ];
        given.iter().find(|(_, is)| *is).map_or("builtin", |(name, _)| name)
    }
}

/// What a directory may hold.
const LAYOUTS: &str = "expected <class>/<image>, <split>/<class>/<image>, metadata.csv or metadata.jsonl, one table or one for each split \
     (train.csv, test.csv), Parquet files, tars, COCO's captions, VQA's questions, or one of CoOp's benchmarks";

fn is_one_class(raw: &Raw) -> bool {
    let first = raw.examples.first().and_then(|e| e.label.as_ref());
    raw.examples.iter().all(|e| e.label.as_ref() == first)
}

/// Whether the first image that a table names is there.
fn names_images(table: &TableConfig) -> Result<bool> {
    let first = table.read()?.examples.into_iter().next();
    Ok(matches!(first.map(|e| e.image), Some(ImageRef::File(path)) if path.is_file()))
}

/// The tables among files.
fn tables_of(files: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut tables = Vec::new();
    for file in files {
        if cells::is_table(file) || (captions::is_text(file) && captions::form(file)?.is_some()) {
            tables.push(file.clone());
        }
    }
    Ok(tables)
}

/// Captions in a directory of their own beside that of their images, as Flickr8k's two archives are unpacked.
fn apart(path: &str, place: &Path) -> Result<Option<DataConfig>> {
    let mut tables = Vec::new();
    for dir in directories(place)? {
        let texts: Vec<PathBuf> = entries(&dir)?.into_iter().map(|e| e.path).filter(|p| captions::is_text(p) && p.is_file()).collect();
        tables.extend(tables_of(&texts)?);
    }
    if tables.is_empty() {
        return Ok(None);
    }
    let table = split_tables(path, &tables)?;
    Ok(names_images(&table)?.then(|| DataConfig { table: Some(table), ..DataConfig::default() }))
}

/// Why nothing can be learnt from a directory. What cannot be read is named as it is.
fn nothing(path: &str, error: &Error) -> Error {
    match error {
        Error::Input(p) if p.place == path => {
            let hint = p.hint.clone().filter(|_| p.message.contains("class director")).unwrap_or_else(|| LAYOUTS.into());
            Error::input(path, format!("holds nothing that can be learnt from ({})", p.message)).hint(hint)
        }
        Error::Input(p) => Error::Input(p.clone()),
        Error::Fault(p) => Error::Fault(p.clone()),
        other => Error::input(path, other),
    }
}

/// The one table of a directory, or one for each split by their names.
fn split_tables(path: &str, tables: &[PathBuf]) -> Result<TableConfig> {
    if let [one] = tables {
        return guess(one);
    }
    let mut of: BTreeMap<Split, &PathBuf> = BTreeMap::new();
    for table in tables {
        let split = split_named(&table.file_stem().unwrap_or_default().to_string_lossy());
        let other = split.and_then(|split| of.insert(split, table));
        if split.is_none() || other.is_some() {
            let names: Vec<String> = tables.iter().filter_map(|t| Some(t.file_name()?.to_string_lossy().into_owned())).collect();
            return Err(Error::input(path, format!("holds several tables, whose names do not say one split each: {}", names.join(", ")))
                .hint("name the one that is meant, or `table: { path: FILE, val: FILE, test: FILE }` in a recipe"));
        }
    }
    let Some(train) = of.get(&Split::Train) else {
        let names: Vec<String> = of.values().filter_map(|t| Some(t.file_name()?.to_string_lossy().into_owned())).collect();
        return Err(Error::input(path, format!("holds {}, and no table to train on", names.join(" and "))));
    };
    let other = |split: Split| of.get(&split).map(|p| (*p).clone());
    Ok(TableConfig { val: other(Split::Val), test: other(Split::Test), ..guess(train)? })
}

/// Parquet files or tars, by their extension: a file, files that a glob or a range names, a directory, a dataset on the hub.
fn sharded(path: &str, place: &Path) -> Result<Option<DataConfig>> {
    let parquet = |columns: &[String]| {
        let path = Paths::One(path.into());
        let (text, label) = (usual(columns, &TEXT, 1).map(ColumnNames::One), usual(columns, &LABEL, 1));
        let image = usual(columns, &IMAGE[..4], 2).or_else(|| columns.iter().find(|c| *c == "img").cloned());
        Some(DataConfig { parquet: Some(ParquetConfig { path, image, text, label, ..Default::default() }), ..Default::default() })
    };
    let webdataset = || {
        let webdataset = WebDatasetConfig { path: Paths::One(path.into()), ..Default::default() };
        Some(DataConfig { webdataset: Some(webdataset), ..Default::default() })
    };
    let ends = |name: &str, e: &str| name.to_ascii_lowercase().ends_with(e);
    if let Some((id, wanted)) = on_hub(path) {
        let names = hub::dataset_files(id)?;
        return match ["parquet", "tar"].map(|e| wanted.unwrap_or_default().ends_with(e) || names.iter().any(|n| ends(n, &format!(".{e}")))) {
            // Columns are seen once the files are here.
            [true, _] => Ok(parquet(&[])),
            [_, true] => Ok(webdataset()),
            _ => Err(Error::input(path, "holds neither Parquet files nor tars").hint(
                "the hub keeps a Parquet copy of many datasets under the revision refs/convert/parquet: hub:owner/dataset@refs/convert/parquet",
            )),
        };
    }
    let pattern = place.is_dir() || place.is_file() || path.contains(['*', '?', '{']);
    let first = |extension: &str| -> Result<Option<PathBuf>> {
        let found = Paths::One(path.into()).found("data", &[extension])?;
        Ok(found.into_iter().find(|f| ends(&f.to_string_lossy(), &format!(".{extension}"))))
    };
    if !pattern || (place.is_dir() && metadata::find(place)?.is_some()) {
        return Ok(None);
    }
    if let Some(file) = first("parquet")? {
        return Ok(parquet(&super::parquet::columns(&file)?));
    }
    Ok(first("tar")?.and_then(|_| webdataset()))
}

/// COCO's captions or VQA's questions among JSON files; training and validation where both are there. Nothing where there are none.
fn annotations(files: &[PathBuf]) -> Result<Option<DataConfig>> {
    let name = |f: &Path| f.file_name().map(|n| n.to_string_lossy().to_lowercase()).unwrap_or_default();
    let mut kinds = Vec::new();
    for file in files {
        kinds.push((file.clone(), coco::kind(file)?));
    }
    let of = |wanted: coco::Kind, part: &str| {
        let mut all = kinds.iter().filter(|(_, kind)| *kind == wanted).map(|(f, _)| f).filter(|f| name(f).contains(part));
        all.next().cloned()
    };
    let pair = |wanted: coco::Kind| {
        let val = of(wanted, "val").filter(|_| files.len() > 1);
        (of(wanted, "train").or_else(|| of(wanted, "")), val)
    };
    if let (Some(path), val) = pair(coco::Kind::Captions) {
        let val = val.filter(|v| *v != path);
        return Ok(Some(DataConfig { coco: Some(CocoConfig { path, val, test: None, images: None }), ..Default::default() }));
    }
    if let (Some(questions), val) = pair(coco::Kind::Questions) {
        let answers = |questions: &Path| -> Result<Option<PathBuf>> {
            let wanted = name(questions).replace("openended_", "").replace("multiplechoice_", "").replace("questions", "annotations");
            let beside = entries(questions.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new(".")))?;
            Ok(beside.into_iter().map(|e| e.path).find(|f| name(f) == wanted))
        };
        let val =
            val.filter(|v| *v != questions).map(|q| Ok::<_, Error>(VqaFiles { annotations: answers(&q)?, questions: q, images: None }));
        let annotations = answers(&questions)?;
        let vqa = VqaConfig { questions, annotations, images: None, pattern: None, val: val.transpose()?, test: None };
        return Ok(Some(DataConfig { vqa: Some(vqa), ..Default::default() }));
    }
    Ok(None)
}

/// The column with one of these names, unless it is found by itself, as the first `known` of them are.
fn usual(columns: &[String], names: &[&str], known: usize) -> Option<String> {
    let found = names.iter().find_map(|n| columns.iter().position(|c| c.eq_ignore_ascii_case(n)).map(|i| columns[i].clone()));
    found.filter(|c| !names[..known].contains(&c.as_str()))
}

/// A table whose columns are named where they are not called by the default name.
fn guess(path: &Path) -> Result<TableConfig> {
    let columns = table::columns(path)?;
    let find = |names: &[&str], known: usize| usual(&columns, names, known);
    Ok(TableConfig {
        path: path.to_path_buf(),
        image: find(&IMAGE, 2),
        text: find(&TEXT, 1).map(ColumnNames::One),
        label: find(&LABEL, 1),
        split: find(&["split", "subset"], 1),
        ..Default::default()
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let write = |name: &str, text: &str| {
            std::fs::create_dir_all(at(name).parent().unwrap()).unwrap();
            std::fs::write(at(name), text).unwrap();
        };
        let locate = |name: &str| DataConfig::locate(&at(name).display().to_string());
        write("pets/cat/1.png", "");
        write("pets/notes.csv", "a,b\n1,2\n");
        assert_eq!(locate("pets").unwrap().kind(), "folder");
        write("hf/train/metadata.jsonl", "{\"file_name\": \"1.png\", \"caption\": \"a cat\"}\n");
        let table = locate("hf").unwrap().table.unwrap();
        assert_eq!((table.path, table.image, table.text), (at("hf"), None, Some(ColumnNames::One("caption".into()))));
        write("coop/split_zhou_DTD.json", "{}");
        assert_eq!(locate("coop").unwrap().kind(), "coop");
        write("one/all.csv", "Filename,Category,subset\n1.png,cat,train\n");
        let table = locate("one").unwrap().table.unwrap();
        assert_eq!(
            (table.image.as_deref(), table.label.as_deref(), table.split.as_deref()),
            (Some("Filename"), Some("Category"), Some("subset"))
        );
        write("nothing/readme.txt", "");
        assert!(locate("nothing").unwrap_err().to_string().contains("no image found"));
        assert!(locate("nowhere").unwrap_err().to_string().contains("no such"));
        assert_eq!(DataConfig::locate("builtin:emoji").unwrap().builtin.as_deref(), Some("emoji"));
    }
}
