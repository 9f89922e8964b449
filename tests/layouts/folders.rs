//! Which directories are splits, which are classes, and what becomes of every file below them.

use super::*;

fn classes(names: &[&str]) -> Vec<String> {
    let files = Files::new(names);
    files.folder().open(0).unwrap().classes
}

fn refused(names: &[&str]) -> String {
    Files::new(names).folder().open(0).unwrap_err().to_string()
}

/// Two classes in each of these directories.
fn two_each(dirs: &[&str]) -> Vec<String> {
    dirs.iter().flat_map(|d| ["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"].map(|f| format!("{d}/{f}"))).collect()
}

fn opened(dirs: &[&str]) -> Dataset {
    let names = two_each(dirs);
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    Files::new(&names).folder().open(0).unwrap()
}

#[test]
fn directories_of_splits_are_read_by_their_names() {
    for dirs in [
        ["train", "test"],
        ["training_set", "test_set"],
        ["Training", "Testing"],
        ["train_images", "test_images"],
        ["images-train", "images-eval"],
        ["dataset/train", "dataset/test"],
        ["a/b/TRAIN", "a/b/TEST"],
        ["training_set/training_set", "test_set/test_set"],
        ["train2017", "test2017"],
    ] {
        let data = opened(&dirs);
        assert_eq!(data.classes, ["cat", "dog"], "{dirs:?}");
        assert_eq!(counts(&data), [2, 2, 4], "{dirs:?}");
        assert!(ids(&data, Split::Test).iter().all(|id| id.to_lowercase().contains("test") || id.contains("eval")), "{dirs:?}");
        assert!(ids(&data, Split::Val).iter().all(|id| id.to_lowercase().contains("train")), "{dirs:?}");
    }
    assert_eq!(counts(&opened(&["train", "dev", "eval"])), [4, 4, 4]);
    let merged = opened(&["train_1", "train_2", "val", "test"]);
    assert_eq!(counts(&merged), [8, 4, 4]);
    assert!(merged.notes.iter().any(|n| n.contains("`train_1` as train, `train_2` as train")), "{:?}", merged.notes);
}

#[test]
fn nothing_is_trained_on_where_nothing_is_for_training() {
    let data = opened(&["val", "test"]);
    assert_eq!((data.classes.len(), counts(&data)), (2, [0, 4, 4]));
    let flat = refused(&["train/1.png", "test/2.png"]);
    assert!(flat.contains("`test`, `train` name splits, and hold no class directories"), "{flat}");
}

#[test]
fn a_class_called_train_is_a_class() {
    assert_eq!(classes(&["train/1.png", "train/2.png", "bus/1.png", "car/1.png"]), ["bus", "car", "train"]);
    assert_eq!(classes(&["test_tube/1.png", "flask/1.png", "flask/2.png"]), ["flask", "test_tube"]);
    let mixed = refused(&["train/cat/1.png", "train/dog/1.png", "test/cat/2.png", "extra/3.png"]);
    assert!(mixed.contains("extra") && mixed.contains("names no split"), "{mixed}");
}

#[test]
fn lone_directories_are_looked_into() {
    let files = Files::new(&["archive/data/cat/1.png", "archive/data/dog/1.png", "README.md", "__MACOSX/x/y.png"]);
    let data = files.folder().open(0).unwrap();
    assert_eq!(data.classes, ["cat", "dog"]);
    assert!(data.notes.iter().any(|n| n.contains("archive/data")), "{:?}", data.notes);
    // One class with kinds in it has images of its own.
    assert_eq!(classes(&["cat/1.png", "cat/persian/2.png", "cat/siamese/3.png"]), ["cat"]);
}

#[test]
fn splits_may_be_inside_of_classes() {
    let names = ["cat/train/1.png", "cat/train/2.png", "cat/test/3.png", "dog/train/1.png", "dog/train/2.png", "dog/test/3.png"];
    let data = Files::new(&names).folder().open(0).unwrap();
    assert_eq!((data.classes.len(), data.test.len()), (2, 2));
    assert!(ids(&data, Split::Test).iter().all(|id| id.contains("/test/")));
}

#[test]
fn every_file_of_a_class_is_read_passed_over_or_told_of() {
    let files = Files::new(&[
        "cat/1.png",
        "cat/2.ppm",
        "cat/3.heic",
        "cat/4.HEIC",
        "cat/raw",
        "cat/notes.txt",
        "cat/.ipynb_checkpoints/1.png",
        "cat/.thumbnails/1.png",
        "cat/@eaDir/1.png/SYNO.jpg",
        "cat/Thumbs.db",
        "dog/1.png",
        "dog/2.avif",
        "stray.png",
    ]);
    let data = files.folder().open(0).unwrap();
    assert_eq!(counts(&data).iter().sum::<usize>(), 3);
    let notes = data.notes.join("\n");
    assert!(notes.contains("4 files are not read: 1 without an extension (1 in cat), 1 .avif (1 in dog), 2 .heic (2 in cat)"), "{notes}");
    assert!(notes.contains("AVIF, HEIC images cannot be read: convert them to JPEG or PNG"), "{notes}");
    assert!(notes.contains("1 images in") && notes.contains("itself are not read"), "{notes}");
}

#[test]
fn a_class_without_images_is_refused_by_name() {
    let heic = refused(&["cat/1.png", "dog/1.heic", "dog/2.heic"]);
    assert!(heic.contains("class `dog` has no image that can be read: it holds 2 .heic"), "{heic}");
    assert!(heic.contains("HEIC images cannot be read"), "{heic}");
    let files = Files::new(&["cat/1.png"]);
    std::fs::create_dir(files.at("dog")).unwrap();
    let empty = files.folder().open(0).unwrap_err().to_string();
    assert!(empty.contains("class `dog`") && empty.contains("it is empty"), "{empty}");
    // In one split only it is told of.
    let files = Files::new(&["train/cat/1.png", "train/dog/1.png", "test/cat/2.png", "test/dog/notes.txt"]);
    let data = files.folder().open(0).unwrap();
    assert!(data.notes.iter().any(|n| n == "class `dog` has no image in test"), "{:?}", data.notes);
}

#[test]
fn images_without_class_directories_are_said_to_be_that() {
    let flat = refused(&["1.png", "2.png", "3.jpg"]);
    assert!(flat.contains("holds 3 images, but no class directories"), "{flat}");
    let files = Files::new(&["1.png", "2.png"]);
    let located = DataConfig::locate(&files.0.path().display().to_string()).unwrap_err().to_string();
    assert!(located.contains("holds 2 images, but no class directories"), "{located}");
}

#[cfg(unix)]
#[test]
fn links_are_followed_where_they_lead_to_images_of_one_label() {
    use std::os::unix::fs::symlink;
    let elsewhere = Files::new(&["birds/1.png", "one.png"]);
    let files = Files::new(&["cat/1.png", "dog/1.png"]);
    symlink(elsewhere.at("birds"), files.at("bird")).unwrap();
    symlink(elsewhere.at("one.png"), files.at("cat/linked.png")).unwrap();
    let data = files.folder().open(0).unwrap();
    assert_eq!((data.classes.len(), counts(&data).iter().sum::<usize>()), (3, 4));
    for (target, name, part) in [
        ("..", "cat/up", "links to a directory that it lies in"),
        ("../dog", "cat/dogs", "another class or split"),
        ("cat", "kitten", "two labels or splits"),
        (".", "all", "links to a directory that it lies in"),
    ] {
        symlink(target, files.at(name)).unwrap();
        let message = files.folder().open(0).unwrap_err().to_string();
        assert!(message.contains(part), "{name}: {message}");
        std::fs::remove_file(files.at(name)).unwrap();
    }
    symlink("nowhere.png", files.at("cat/dangling.png")).unwrap();
    let message = files.folder().open(0).unwrap_err().to_string();
    assert!(message.contains("dangling.png: is a link to a file that does not exist"), "{message}");
    let skipped = DataConfig { skip_bad: true, ..files.folder() }.open(0).unwrap();
    assert_eq!(skipped.skipped, 1);
}

#[test]
fn tables_of_a_directory_are_taken_by_their_names() {
    let files = Files::new(&[]);
    for (name, image) in [("train.csv", "a.png"), ("my_test.csv", "b.png"), ("validation.csv", "c.png")] {
        files.write(name, &format!("image,label\n{image},cat\nx{image},dog\n"));
    }
    let data = files.located().open(0).unwrap();
    assert_eq!((counts(&data), ids(&data, Split::Test)), ([2, 2, 2], vec!["b.png", "xb.png"]));
    files.write("more.csv", "image,label\nz.png,cat\n");
    let message = DataConfig::locate(&files.0.path().display().to_string()).unwrap_err().to_string();
    assert!(message.contains("several tables") && message.contains("more.csv"), "{message}");
}

/// Flickr8k: one directory of images, and a table beside it.
#[test]
fn a_table_beside_one_directory_of_images_is_about_them() {
    let files = Files::new(&["Images/1.png", "Images/2.png"]);
    files.write("captions.csv", "image,caption\nImages/1.png,a cat\nImages/1.png,a pet\nImages/2.png,a dog\n");
    assert_eq!(files.located().kind(), "table");
}

#[test]
fn a_path_alone_is_a_source() {
    let read = |text: &str| serde_json::from_str::<DataConfig>(text);
    assert_eq!(read(r#"{"folder": "data/x"}"#).unwrap(), read(r#"{"folder": {"root": "data/x"}}"#).unwrap());
    for key in ["table", "parquet", "webdataset", "coco"] {
        let (bare, full) = (format!(r#"{{"{key}": "data/x"}}"#), format!(r#"{{"{key}": {{"path": "data/x"}}}}"#));
        assert_eq!(read(&bare).unwrap(), read(&full).unwrap(), "{key}");
    }
    assert_eq!(read(r#"{"parquet": ["a", "b"]}"#).unwrap().parquet.unwrap().path, Paths::Many(vec!["a".into(), "b".into()]));
    for (text, form) in
        [(r#"{"vqa": "q.json"}"#, "{ questions: FILE"), (r#"{"folder": ["a"]}"#, "{ root: DIR }"), (r#"{"folder": 3}"#, "{ root: DIR }")]
    {
        let message = read(text).unwrap_err().to_string();
        assert!(message.contains(form), "{message}");
    }
}
