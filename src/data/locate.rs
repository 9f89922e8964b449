//! From a path to a source: which of the layouts lies there.

use std::path::{Path, PathBuf};

use super::{ColumnNames, CoopConfig, DataConfig, Draw, FolderConfig, Source, TableConfig, is_split, table};
use crate::error::{Error, Result};

/// What columns are called, the default first.
const IMAGE: [&str; 8] = ["image", "file_name", "path", "image_path", "filename", "filepath", "file", "img"];
const TEXT: [&str; 5] = ["text", "caption", "description", "title", "prompt"];
const LABEL: [&str; 6] = ["label", "class", "category", "class_name", "label_name", "target"];

impl DataConfig {
    /// Finds out what lies at `path`: `builtin:NAME`, a table, a directory with `metadata.csv|jsonl`, one of CoOp's
    /// benchmarks, one directory a class, or a directory with one table in it.
    ///
    /// # Errors
    /// When it is none of them.
    pub fn locate(path: &str) -> Result<Self> {
        if let Some(name) = path.strip_prefix("builtin:") {
            return Ok(Self { builtin: Some(name.to_string()), ..Self::default() });
        }
        let place = Path::new(path);
        if place.is_file() {
            return Ok(Self { table: Some(guess(place)?), ..Self::default() });
        }
        let entries = std::fs::read_dir(place).map_err(|e| Error::read(place, e))?;
        let files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(|p| p.is_file()).collect();
        let named = |wanted: &dyn Fn(&str) -> bool| files.iter().any(|f| f.file_name().is_some_and(|n| wanted(&n.to_string_lossy())));
        let root = place.to_path_buf();
        if let Ok(found) = table::imagefolder(place) {
            return Ok(Self { table: Some(TableConfig { path: root, ..guess(&found[0].0)? }), ..Self::default() });
        }
        if named(&|n| is_split(n) || n == "variants.txt" || n == "classnames.txt") {
            let coop = CoopConfig { root, split: None, images: None, draw: Draw::default() };
            return Ok(Self { coop: Some(coop), ..Self::default() });
        }
        let folder = FolderConfig { root };
        let read = folder.read();
        let mut tables = files.iter().filter(|f| is_table(f));
        match (&read, tables.next(), tables.next()) {
            (Err(_), Some(one), None) => Ok(Self { table: Some(guess(one)?), ..Self::default() }),
            (Err(e), ..) => Err(Error::input(path, format!("holds nothing that can be learnt from ({})", without_place(e))).hint(
                "expected <class>/<image>, <split>/<class>/<image>, metadata.csv or metadata.jsonl, one table, or one of CoOp's benchmarks",
            )),
            _ => Ok(Self { folder: Some(folder), ..Self::default() }),
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
        let given = [("folder", self.folder.is_some()), ("table", self.table.is_some()), ("coop", self.coop.is_some())];
        given.iter().find(|(_, is)| *is).map_or("builtin", |(name, _)| name)
    }
}

fn without_place(error: &Error) -> String {
    match error {
        Error::Input(p) => p.message.clone(),
        other => other.to_string(),
    }
}

fn is_table(path: &Path) -> bool {
    path.extension().is_some_and(|e| ["csv", "tsv", "tab", "jsonl", "ndjson"].contains(&e.to_string_lossy().to_ascii_lowercase().as_str()))
}

/// A table whose columns are named where they are not called by the default name.
fn guess(path: &Path) -> Result<TableConfig> {
    let columns = table::columns(path)?;
    let find = |names: &[&str], known: usize| {
        let found = names.iter().find_map(|n| columns.iter().position(|c| c.eq_ignore_ascii_case(n)).map(|i| columns[i].clone()));
        found.filter(|c| !names[..known].contains(&c.as_str()))
    };
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
