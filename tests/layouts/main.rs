//! Whole sources, as strangers have them: which directories are splits and classes, which rows are of one image.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::PathBuf;

use peft::data::{CocoConfig, DataConfig, Dataset, Example, FolderConfig, ImageRef, Paths, Split, TableConfig};

mod captions;
mod folders;
mod same_image;
mod shards;
mod unreadable;

/// A directory of files with made-up content; nothing here decodes an image.
struct Files(tempfile::TempDir);

impl Files {
    fn new(names: &[&str]) -> Self {
        let files = Self(tempfile::tempdir().unwrap());
        names.iter().for_each(|name| files.write(name, name));
        files
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::create_dir_all(self.at(name).parent().unwrap()).unwrap();
        std::fs::write(self.at(name), text).unwrap();
    }

    fn folder(&self) -> DataConfig {
        DataConfig { folder: Some(FolderConfig { root: self.0.path().into() }), ..Default::default() }
    }

    fn table(&self, name: &str) -> DataConfig {
        DataConfig { table: Some(TableConfig { path: self.at(name), ..Default::default() }), ..Default::default() }
    }

    fn located(&self) -> DataConfig {
        DataConfig::locate(&self.0.path().display().to_string()).unwrap()
    }
}

const SPLITS: [Split; 3] = [Split::Train, Split::Val, Split::Test];

/// Examples of each split.
fn counts(data: &Dataset) -> [usize; 3] {
    SPLITS.map(|s| data.split(s).len())
}

fn ids(data: &Dataset, split: Split) -> Vec<&str> {
    data.split(split).iter().map(|e| e.id.as_str()).collect()
}

/// The splits that each image is in.
fn splits_of_images(data: &Dataset, image: impl Fn(&Example) -> String) -> BTreeMap<String, Vec<Split>> {
    let mut found: BTreeMap<String, Vec<Split>> = BTreeMap::new();
    for split in SPLITS {
        for e in data.split(split) {
            let splits = found.entry(image(e)).or_default();
            if !splits.contains(&split) {
                splits.push(split);
            }
        }
    }
    found
}
