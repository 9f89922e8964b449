//! Rows that show one image.

use peft::data::{ParquetConfig, Streaming, WebDatasetConfig};

use super::*;

/// 20 images with five captions each, one a row, in whatever order and spelling.
fn captions(spelled: impl Fn(usize, usize) -> String) -> String {
    let mut text = "image,text\n".to_string();
    for caption in 0..5 {
        for image in 0..20 {
            text += &format!("{},caption {caption} of {image}\n", spelled(image, caption));
        }
    }
    text
}

/// Each image is in one split, and all of its rows are one group.
fn check(data: &Dataset) {
    assert_eq!(counts(data).iter().sum::<usize>(), 100);
    let image = |e: &Example| e.texts[0].rsplit(' ').next().unwrap().to_string();
    for (image, splits) in splits_of_images(data, image) {
        assert_eq!(splits.len(), 1, "image {image} is in {splits:?}");
    }
    let rows: Vec<&Example> = SPLITS.into_iter().flat_map(|s| data.split(s)).collect();
    for a in &rows {
        let same = rows.iter().filter(|b| b.same_image(a)).count();
        assert_eq!((same, rows.iter().filter(|b| b.group == a.group).count()), (5, 5), "{}", a.id);
        assert!(rows.iter().all(|b| b.same_image(a) == (image(a) == image(b))));
    }
    assert!(!data.test.is_empty() && !data.val.is_empty());
}

fn images() -> Files {
    let names: Vec<String> = (0..20).map(|i| format!("images/{i}.png")).collect();
    Files::new(&names.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn captions_of_an_image_share_its_split() {
    let files = images();
    files.write("t.csv", &captions(|i, _| format!("images/{i}.png")));
    check(&files.table("t.csv").open(0).unwrap());
}

#[test]
fn two_spellings_of_a_file_are_one_file() {
    let files = images();
    let root = files.at("images");
    #[cfg(unix)]
    std::os::unix::fs::symlink("images", files.at("linked")).unwrap();
    #[cfg(not(unix))]
    std::fs::rename(&root, files.at("linked")).unwrap();
    let spelled = |i: usize, caption: usize| match caption {
        0 => format!("images/{i}.png"),
        1 => format!("./images/{i}.png"),
        2 => root.join(format!("{i}.png")).display().to_string(),
        3 => format!("images/../images/{i}.png"),
        _ => format!("linked/{i}.png"),
    };
    files.write("t.csv", &captions(spelled));
    let data = files.table("t.csv").open(0).unwrap();
    check(&data);
    assert!(SPLITS.iter().flat_map(|s| ids(&data, *s)).all(|id| id.starts_with("images/") || id.starts_with("linked/")));
}

#[test]
fn json_lines_are_alike() {
    let files = images();
    let rows: Vec<String> =
        (0..100).map(|i| format!("{{\"file_name\": \"images/{}.png\", \"text\": \"caption {} of {}\"}}", i / 5, i % 5, i / 5)).collect();
    files.write("t.jsonl", &rows.join("\n"));
    check(&files.table("t.jsonl").open(0).unwrap());
}

/// Groups of the user's and images join: scene 1 has images a and b, scene 2 has b and c.
#[test]
fn stated_groups_and_images_join() {
    let files = Files::new(&[]);
    let mut text = "image,text,group\na,1,one\nb,2,one\nb,3,two\nc,4,two\nd,5,three\ne,6,\ne,7,\n".to_string();
    (0..20).for_each(|i| text += &format!("f{i},8,\n"));
    files.write("t.csv", &text);
    let data = files.table("t.csv").open(3).unwrap();
    let group = |text: &str| {
        let found = SPLITS.into_iter().flat_map(|s| data.split(s)).find(|e| e.texts[0] == text).unwrap();
        found.group.clone()
    };
    assert_eq!(["1", "2", "3", "4"].map(group), [const { Some("one") }; 4].map(|g| g.map(String::from)));
    assert_eq!((group("5").as_deref(), group("6").as_deref(), group("7").as_deref()), (Some("three"), Some("e"), Some("e")));
    assert_eq!(group("8"), None);
}

#[test]
fn a_file_in_two_splits_is_refused_however_it_is_written() {
    let files = Files::new(&["a.png", "b.png"]);
    files.write("t.csv", "id,image,label,split\n1,a.png,x,train\n2,b.png,y,train\n3,./a.png,x,test\n");
    let table = TableConfig { path: files.at("t.csv"), id: Some("id".into()), ..Default::default() };
    let message = DataConfig { table: Some(table), ..Default::default() }.open(0).unwrap_err().to_string();
    assert!(message.contains("`1` in train and `3` in test are the same image"), "{message}");
}

#[test]
fn rows_of_one_image_with_two_classes_are_told_of() {
    let files = Files::new(&[]);
    files.write("t.csv", "image,label\na.png,cat\na.png,dog\nb.png,cat\nc.png,dog\n");
    let data = files.table("t.csv").open(0).unwrap();
    assert!(data.notes.iter().any(|n| n.contains("`a.png` is `cat` and `dog`")), "{:?}", data.notes);
}

/// Equal names in two directories are two images.
#[test]
fn one_metadata_file_a_split_may_use_the_same_names() {
    let files = Files::new(&["train/1.png", "train/2.png", "test/1.png", "test/2.png"]);
    for split in ["train", "test"] {
        files.write(&format!("{split}/metadata.csv"), "file_name,label\n1.png,cat\n2.png,dog\n");
    }
    let data = files.located().open(0).unwrap();
    assert_eq!(ids(&data, Split::Test), ["test/1.png", "test/2.png"]);
    // The same as tables of their own.
    let [path, test] = ["train", "test"].map(|s| files.at(s).join("metadata.csv"));
    let table = TableConfig { path, test: Some(test), ..Default::default() };
    let data = DataConfig { table: Some(table), ..Default::default() }.open(0).unwrap();
    assert_eq!((counts(&data)[2], ids(&data, Split::Test)), (2, vec!["test/1.png", "test/2.png"]));
}

#[test]
fn metadata_over_directories_of_splits_keeps_them() {
    let names = ["train/1.png", "train/2.png", "train/3.png", "train/4.png", "test/1.png", "test/5.png"];
    let files = Files::new(&names);
    let rows: String = names[..5].iter().enumerate().map(|(i, n)| format!("{n},{}\n", ["cat", "dog"][i % 2])).collect();
    files.write("metadata.csv", &format!("file_name,label\n{rows}"));
    let data = files.located().open(0).unwrap();
    assert_eq!(ids(&data, Split::Test), ["test/1.png"]);
    assert!(data.notes.iter().any(|n| n.starts_with("1 images in") && n.contains("test/5.png")), "{:?}", data.notes);
    assert!(files.located().has_own_splits());
    // What some directories say and others do not is refused.
    files.write("metadata.csv", &format!("file_name,label\n{rows}other/9.png,cat\n"));
    let message = files.located().open(0).unwrap_err().to_string();
    assert!(message.contains("`other/9.png`"), "{message}");
    files.write("train/metadata.csv", "file_name,label\n1.png,cat\n");
    let message = DataConfig::locate(&files.0.path().display().to_string()).unwrap_err().to_string();
    assert!(message.contains("describes images that"), "{message}");
}

/// COCO's files may number their images each from 1, and call them alike.
#[test]
fn equal_numbers_in_two_annotation_files_are_two_images() {
    let files = Files::new(&["train/1.jpg", "train/2.jpg", "val/1.jpg", "val/2.jpg"]);
    let text = r#"{"images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
        "annotations": [{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": "b"}]}"#;
    ["train", "val"].iter().for_each(|s| files.write(&format!("{s}/captions.json"), text));
    let [path, val] = ["train", "val"].map(|s| files.at(s).join("captions.json"));
    let coco = CocoConfig { path, val: Some(val), test: None, images: None };
    let data = DataConfig { coco: Some(coco), ..Default::default() }.open(0).unwrap();
    assert_eq!((ids(&data, Split::Train), ids(&data, Split::Val)), (vec!["train/1.jpg", "train/2.jpg"], vec!["val/1.jpg", "val/2.jpg"]));
}

/// Names that start again in each split are told apart where the images are.
#[test]
fn equal_identifiers_of_different_images_take_their_split() {
    let files = Files::new(&[]);
    files.write("t.csv", "id,image,label,split\n1,a.png,x,train\n2,b.png,y,train\n1,c.png,x,test\n");
    let table = TableConfig { path: files.at("t.csv"), id: Some("id".into()), ..Default::default() };
    let data = DataConfig { table: Some(table), ..Default::default() }.open(0).unwrap();
    assert_eq!(ids(&data, Split::Test), ["test:1"]);
}

/// The same in Parquet and in a tar, where bytes say what is one image. A stream divides its rows as a list does.
#[test]
fn equal_bytes_in_shards_are_one_image() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sets/captions");
    let path = |name: &str| Paths::One(dir.join(name).display().to_string());
    for stream in [Streaming::Fixed(false), Streaming::Fixed(true)] {
        let stream = Some(stream);
        let parquet = ParquetConfig { path: path("captions.parquet"), stream, ..Default::default() };
        let tar = WebDatasetConfig { path: path("captions.tar"), stream, ..Default::default() };
        for config in
            [DataConfig { parquet: Some(parquet), ..Default::default() }, DataConfig { webdataset: Some(tar), ..Default::default() }]
        {
            let mut data = config.open(0).unwrap();
            data.train = data.listed(Split::Train).unwrap().into_owned();
            check(&data);
        }
    }
}

/// Where the splits are given, nothing is divided, and images are known nevertheless.
#[test]
fn equal_bytes_are_one_image_in_given_splits() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sets/captions");
    let file = |name: &str| Some(Paths::One(dir.join(name).display().to_string()));
    let tar = WebDatasetConfig {
        path: file("captions.tar").unwrap(),
        val: file("captions.tar"),
        test: file("captions.tar"),
        stream: Some(Streaming::Fixed(false)),
        ..Default::default()
    };
    let data = DataConfig { webdataset: Some(tar.clone()), ..Default::default() }.open(0).map_err(|e| e.to_string());
    // One file three times is refused by its names already.
    assert!(data.unwrap_err().contains("is in train and in val"));
    let parquet = ParquetConfig {
        path: file("captions.parquet").unwrap(),
        val: file("captions.parquet"),
        stream: Some(Streaming::Fixed(false)),
        ..Default::default()
    };
    assert!(DataConfig { parquet: Some(parquet), ..Default::default() }.open(0).is_err());
}
