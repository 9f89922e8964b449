//! Directories and entries that cannot be read are errors that name them, whichever source looks.
#![cfg(unix)]

use std::os::unix::fs::{PermissionsExt, symlink};

use peft::data::{CoopConfig, Draw};

use super::*;

/// A link to itself: nobody, root included, can say what it is.
fn circle(files: &Files, name: &str) {
    std::fs::create_dir_all(files.at(name).parent().unwrap()).unwrap();
    symlink(files.at(name).file_name().unwrap(), files.at(name)).unwrap();
}

/// Whatever is asked of the source names the entry.
fn named(error: &peft::Error, name: &str) {
    assert!(error.exit_code() == 2 && error.to_string().contains(name), "{error}");
}

fn locate(files: &Files) -> peft::Result<DataConfig> {
    DataConfig::locate(&files.0.path().display().to_string())
}

fn coop(files: &Files) -> peft::Result<Dataset> {
    let coop = CoopConfig { root: files.0.path().into(), split: None, images: None, draw: Draw::Coop };
    DataConfig { coop: Some(coop), ..Default::default() }.open(0)
}

#[test]
fn an_entry_that_cannot_be_looked_at_is_named() {
    let files = Files::new(&["cat/1.png", "dog/1.png"]);
    circle(&files, "bird");
    named(&files.folder().open(0).unwrap_err(), "bird");
    named(&locate(&files).unwrap_err(), "bird");
    let files = Files::new(&["cat/1.png", "dog/1.png"]);
    circle(&files, "dog/2.png");
    named(&files.folder().open(0).unwrap_err(), "2.png");
    named(&locate(&files).and_then(|d| d.open(0)).unwrap_err(), "2.png");
    // What a rule passes over is nobody's concern.
    let files = Files::new(&["cat/1.png", "dog/1.png"]);
    circle(&files, ".cache");
    circle(&files, "cat/.cache");
    assert_eq!(files.located().open(0).unwrap().classes, ["cat", "dog"]);
}

#[test]
fn benchmarks_name_what_they_cannot_read() {
    let files = Files::new(&["split_zhou_A.json"]);
    circle(&files, "split_zhou_B.json");
    named(&coop(&files).unwrap_err(), "split_zhou_B.json");
    let images = ["images/train/n01/1.jpg", "images/train/n01/2.heic", "images/val/n01/1.jpg", "images/val/n01/notes.txt"];
    let files = Files::new(&images);
    files.write("classnames.txt", "n01 tench\n\n");
    let data = coop(&files).unwrap();
    assert!(data.notes.iter().any(|n| n.contains("1 .heic")), "{:?}", data.notes);
    circle(&files, "images/val/n01/2.jpg");
    named(&coop(&files).unwrap_err(), "2.jpg");
    std::fs::remove_file(files.at("images/val/n01/2.jpg")).unwrap();
    symlink("nowhere", files.at("images/val/n01/3.jpg")).unwrap();
    named(&coop(&files).unwrap_err(), "3.jpg");
    files.write("classnames.txt", "n01 tench\nn02\n");
    named(&coop(&files).unwrap_err(), "n02");
}

#[test]
fn annotations_and_shards_that_cannot_be_read_are_not_passed_over() {
    let files = Files::new(&["cat/1.png", "dog/1.png"]);
    circle(&files, "captions.json");
    named(&locate(&files).unwrap_err(), "captions.json");
    let files = Files::new(&["cat/1.png", "dog/1.png"]);
    circle(&files, "more/x.tar");
    named(&locate(&files).unwrap_err(), "x.tar");
    let files = Files::new(&["cat/1.png", "dog/1.png"]);
    symlink("gone.parquet", files.at("cat/x.parquet")).unwrap();
    named(&locate(&files).unwrap_err(), "x.parquet");
}

/// Root reads everything, so that this shows something to other users only.
#[test]
fn a_directory_without_rights_is_named() {
    let files = Files::new(&["cat/1.png", "dog/1.png", "images/train/n01/1.jpg", "images/val/n01/1.jpg"]);
    files.write("classnames.txt", "n01 tench\n");
    let locked = files.at("dog");
    std::fs::set_permissions(&locked, PermissionsExt::from_mode(0o000)).unwrap();
    if std::fs::read_dir(&locked).is_err() {
        named(&files.folder().open(0).unwrap_err(), "dog");
        named(&locate(&files).unwrap_err(), "dog");
    }
    std::fs::set_permissions(&locked, PermissionsExt::from_mode(0o755)).unwrap();
}
