//! What rows of strangers' tables mean: columns of other types, words for splits, labels that are none, lists that were not divided.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::Write as _;
use std::path::Path;

use common::World;
use peft::data::{DataConfig, Dataset, Field, Paths, Reads, Split, TableConfig, WebDatasetConfig};

fn classify() -> Reads {
    Reads { needed: vec![Field::Label], also: Vec::new() }
}

fn several() -> Reads {
    Reads { needed: vec![Field::Labels], also: vec![Field::Label] }
}

/// A set of one table and of the same rows in a tar.
fn both(dir: &Path, csv: &str) -> [DataConfig; 2] {
    let path = dir.join("t.csv");
    std::fs::write(&path, csv).unwrap();
    let tar = dir.join("t.tar");
    let mut out = tar::Builder::new(std::fs::File::create(&tar).unwrap());
    let mut rows = csv::Reader::from_reader(csv.as_bytes());
    let header = rows.headers().unwrap().clone();
    for (i, row) in rows.records().enumerate() {
        let row = row.unwrap();
        let cells = header.iter().zip(row.iter()).filter(|(_, c)| !c.is_empty()).map(|(k, c)| (k.to_string(), c.into()));
        let cells: serde_json::Map<String, serde_json::Value> = cells.collect();
        let mut member = tar::Header::new_gnu();
        let bytes = serde_json::to_vec(&cells).unwrap();
        member.set_size(bytes.len() as u64);
        out.append_data(&mut member, format!("{i:04}.json"), bytes.as_slice()).unwrap();
    }
    out.into_inner().unwrap().flush().unwrap();
    let table = DataConfig { table: Some(TableConfig { path, ..Default::default() }), ..Default::default() };
    let web = WebDatasetConfig { path: Paths::One(tar.display().to_string()), ..Default::default() };
    [table, DataConfig { webdataset: Some(web), ..Default::default() }]
}

fn counts(d: &Dataset) -> [usize; 3] {
    [Split::Train, Split::Val, Split::Test].map(|s| d.count(s))
}

fn rows(count: usize, row: impl Fn(usize) -> String) -> String {
    (0..count).map(|i| row(i) + "\n").collect()
}

/// Notes, or the error.
fn said(data: &peft::Result<Dataset>) -> String {
    data.as_ref().map_or_else(ToString::to_string, |d| d.notes.join("\n"))
}

#[test]
fn a_column_that_the_task_does_not_read_may_hold_anything() {
    let dir = tempfile::tempdir().unwrap();
    let csv = "text,label,value,fits,question\n".to_string() + &rows(12, |i| format!("text {i},{},high {i},maybe,?", ["a", "b"][i % 2]));
    for data in both(dir.path(), &csv) {
        let found = data.open_for(0, &classify()).unwrap();
        assert_eq!(counts(&found).iter().sum::<usize>(), 12);
        assert!(!found.notes.iter().any(|n| n.contains("value")), "{:?}", found.notes);
        // Where nobody knows the task, it is told of in one line a column.
        let found = data.open(0).unwrap();
        let told: Vec<&String> = found.notes.iter().filter(|n| n.contains("expected")).collect();
        assert!(told.len() == 2 && told[0].contains("`value`") && told[0].contains("11 more rows"), "{told:?}");
        // The task that reads it hears of all rows in one line.
        let reads = Reads { needed: vec![Field::Value], also: Vec::new() };
        let error = data.open_for(0, &reads).unwrap_err();
        assert_eq!((error.exit_code(), error.to_string().matches("column `value`").count()), (2, 1), "{error}");
        assert!(error.to_string().contains("`high 0`") && error.to_string().contains("none of 12"), "{error}");
    }
    let mixed = "text,value\n".to_string() + &rows(12, |i| format!("t {i},{}", if i % 4 == 0 { "n/a".into() } else { i.to_string() }));
    for data in both(dir.path(), &mixed) {
        let reads = Reads { needed: vec![Field::Value], also: Vec::new() };
        let error = data.open_for(0, &reads).unwrap_err().to_string();
        assert!(error.contains("3 rows") && error.contains("found `n/a`") && error.contains("skip_bad"), "{error}");
        let found = DataConfig { skip_bad: true, ..data }.open_for(0, &reads).unwrap();
        assert_eq!((found.skipped, counts(&found).iter().sum::<usize>()), (3, 9));
        assert!(said(&Ok(found)).contains("skipped 3 rows"));
    }
}

#[test]
fn words_for_splits() {
    let dir = tempfile::tempdir().unwrap();
    for (words, expected) in [
        (["train", "restval", "val", "test"], [6, 3, 3]),
        (["Training", "train_set", "Validation", "Testing"], [6, 3, 3]),
        (["TRAIN", "training set", "dev", "test-split"], [6, 3, 3]),
        (["0", "0", "1", "2"], [6, 3, 3]),
    ] {
        let csv = "text,label,split\n".to_string() + &rows(12, |i| format!("text {i},{},{}", ["a", "b"][i % 2], words[i % 4]));
        for data in both(dir.path(), &csv) {
            let found = data.open_for(0, &classify());
            assert_eq!(counts(found.as_ref().unwrap()), expected, "{words:?}: {}", said(&found));
            assert_eq!(said(&found).contains("0, 1 and 2"), words[0] == "0");
        }
    }
    // Of two numbers nobody knows which is which: CUB's 1 is train, others' 0 is.
    for (words, part) in [(["0", "1"], "`0`, `1`"), (["train", "holdout"], "`holdout`")] {
        let csv = "text,label,split\n".to_string() + &rows(12, |i| format!("text {i},{},{}", ["a", "b"][i / 6], words[i % 2]));
        for data in both(dir.path(), &csv) {
            let error = data.open_for(0, &classify()).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("splits:") && error.matches("column `split`").count() == 1, "{error}");
        }
    }
    let w = World::new();
    w.write(
        "cub.csv",
        &("image,label,split\n".to_string() + &rows(12, |i| format!("data/{}/{}.png,{0},{}", ["red", "blue"][i / 6], i % 6, i % 2))),
    );
    let recipe = w.recipe("lora: { rank: 2 }").replace("folder: { root: data }", "table: { path: cub.csv, splits: { 1: train, 0: test } }");
    w.write("cub.yaml", &recipe);
    assert_eq!(w.json(&["data", "cub.yaml"])["splits"]["test"], 6);
}

#[test]
fn a_split_without_labels_is_said_and_left_out_on_request() {
    let dir = tempfile::tempdir().unwrap();
    for none in ["-1", ""] {
        let label = |i: usize| if i < 12 { (i % 3).to_string() } else { none.to_string() };
        let csv = "text,label,split\n".to_string()
            + &rows(18, |i| {
                format!(
                    "text {i},{},{}",
                    label(i),
                    if i < 9 {
                        "train"
                    } else if i < 12 {
                        "val"
                    } else {
                        "test"
                    }
                )
            });
        for data in both(dir.path(), &csv) {
            let error = data.open_for(0, &classify()).unwrap_err().to_string();
            assert!(error.contains("6 rows") && error.contains("in test, has no label") && error.contains("skip_bad"), "{error}");
            let found = DataConfig { skip_bad: true, ..data.clone() }.open_for(0, &classify()).unwrap();
            assert_eq!((counts(&found), found.skipped), ([9, 3, 0], 6));
            assert_eq!(found.classes, ["0", "1", "2"]);
            let found = data.open(0);
            assert!(said(&found).contains("6 rows of test"), "{}", said(&found));
            // A task that reads no label has nothing against it.
            assert_eq!(counts(&data.open_for(0, &Reads { needed: vec![Field::Text], also: Vec::new() }).unwrap()), [9, 3, 6]);
        }
    }
    // Among others -1 is a class: negative, neutral, positive.
    let csv = "text,label,split\n".to_string() + &rows(18, |i| format!("t {i},{},{}", i as i64 % 3 - 1, ["train", "test"][i / 9]));
    for data in both(dir.path(), &csv) {
        let found = data.open_for(0, &classify()).unwrap();
        assert_eq!(found.classes.len(), 3);
        assert!(found.notes.iter().any(|n| n.contains("-1") && n.contains("class")), "{:?}", found.notes);
    }
}

#[test]
fn lists_of_labels_are_divided_by_what_the_recipe_says() {
    let dir = tempfile::tempdir().unwrap();
    let csv = "text,labels\n".to_string() + &rows(12, |i| format!("t {i},{}", ["a;b", "b;c", "a", "a;b;c"][i % 4]));
    let [mut table, mut web] = both(dir.path(), &csv);
    for data in [&table, &web] {
        let found = data.open_for(0, &several()).unwrap();
        assert!(found.classes.len() == 4 && found.notes.iter().any(|n| n.contains("label_separator: \";\"")), "{:?}", found.notes);
    }
    table.table.as_mut().unwrap().label_separator = Some(";".into());
    web.webdataset.as_mut().unwrap().label_separator = Some(";".into());
    for data in [&table, &web] {
        let found = data.open_for(0, &several()).unwrap();
        assert_eq!(found.classes, ["a", "b", "c"]);
        assert!(!found.notes.iter().any(|n| n.contains("label_separator")), "{:?}", found.notes);
    }
    table.table.as_mut().unwrap().label_separator = Some(String::new());
    assert!(table.open(0).unwrap_err().to_string().contains("label_separator"));
    // One class a row by right: names with commas are ImageNet's.
    let csv = "text,label\n".to_string()
        + &rows(12, |i| format!("t {i},\"{}\"", ["tench, Tinca tinca", "goldfish, Carassius auratus", "crane"][i % 3]));
    for data in both(dir.path(), &csv) {
        assert!(!said(&data.open_for(0, &classify())).contains("label_separator"));
    }
    let w = World::new();
    w.write("m.csv", &("image,labels\n".to_string() + &rows(10, |i| format!("data/red/{i}.png,{}", ["red|warm", "red"][i % 2]))));
    let found = w.json(&["data", "m.csv"]);
    let all = |class: &serde_json::Value| ["train", "val", "test"].iter().map(|s| class[s].as_u64().unwrap()).sum::<u64>();
    assert_eq!(found["classes"].as_array().unwrap().iter().map(all).collect::<Vec<_>>(), [10, 5]);
}

/// `pandas.read_csv(sep=None, engine="python")` finds the same cells.
#[test]
fn other_separators_of_spreadsheets() {
    let dir = tempfile::tempdir().unwrap();
    let plain = "text,label\n\"a, b; c\",x\nd,y\ne,x\n";
    let semicolons = plain.replace("\",x", "\";x").replace("text,", "text;").replace("d,", "d;").replace("e,", "e;");
    let read = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        let data = DataConfig { table: Some(TableConfig { path, ..Default::default() }), ..Default::default() }.open(0).unwrap();
        let all = [Split::Train, Split::Val, Split::Test].map(|s| data.split(s).to_vec()).concat();
        let mut all: Vec<(String, u32)> = all.into_iter().map(|e| (e.texts[0].clone(), e.label.unwrap())).collect();
        all.sort();
        all
    };
    let wanted = vec![("a, b; c".to_string(), 0), ("d".into(), 1), ("e".into(), 0)];
    assert_eq!(read("plain.csv", plain), wanted);
    for (name, text) in [
        ("excel.csv", semicolons.clone()),
        ("sep.csv", format!("\u{feff}sep=;\r\n{}", semicolons.replace('\n', "\r\n"))),
        ("comma.csv", format!("sep=,\n{plain}")),
        ("tabs.csv", semicolons.replace("\";x", "\"\tx").replace("text;", "text\t").replace("d;", "d\t").replace("e;", "e\t")),
        ("commas.tsv", plain.into()),
    ] {
        assert_eq!(read(name, &text), wanted, "{name}");
    }
    // Line numbers are the file's.
    let path = dir.path().join("bad.csv");
    std::fs::write(&path, "sep=;\ntext;label\na;x;y\nb;x\n").unwrap();
    let error = DataConfig { table: Some(TableConfig { path, ..Default::default() }), ..Default::default() }.open(0).unwrap_err();
    assert!(error.to_string().contains("bad.csv:3"), "{error}");
}

#[test]
fn a_set_without_a_good_row_says_why_and_which_columns_there_are() {
    let w = World::new();
    w.write("bad.csv", "picture,class\na.png,x\nb.png,y\n");
    let message = w.fails(&["data", "bad.csv"], 2);
    assert!(message.contains("the columns are picture, class") && message.contains("none of 2 rows"), "{message}");
    w.write("words.csv", "text,split\na,rest\nb,other\n");
    let message = w.fails(&["data", "words.csv"], 2);
    assert!(message.contains("found `rest`, `other`") && message.contains("words.csv:2"), "{message}");
}

#[test]
fn members_with_dots_are_named_with_webdatasets_rule() {
    let dir = tempfile::tempdir().unwrap();
    let image = common::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sets/codecs/7.png"));
    let tar = |members: &[(&str, &[u8])]| {
        let path = dir.path().join("x.tar");
        let mut out = tar::Builder::new(std::fs::File::create(&path).unwrap());
        for (name, bytes) in members {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            out.append_data(&mut header, name, *bytes).unwrap();
        }
        out.into_inner().unwrap();
        let web = WebDatasetConfig { path: Paths::One(path.display().to_string()), ..Default::default() };
        DataConfig { webdataset: Some(web), ..Default::default() }
    };
    // A text beside it does not make it an example without image.
    let dots = tar(&[("IMG_2022.05.01.png", &image), ("IMG_2022.txt", b"a"), ("b.png", &image), ("b.txt", b"b")]);
    let error = dots.open(0).unwrap_err().to_string();
    assert!(["IMG_2022.05.01.png", "row 0", "first dot", "`05.01.png`"].iter().all(|p| error.contains(p)), "{error}");
    assert_eq!(DataConfig { skip_bad: true, ..dots }.open(0).unwrap().skipped, 1);
    let mut named = tar(&[("a.v1.png", &image), ("a.txt", b"a")]);
    named.webdataset.as_mut().unwrap().image = Some("v1.png".into());
    let found = named.open(0).unwrap();
    assert!(found.train.iter().chain(&found.val).chain(&found.test).all(|e| e.bytes().is_ok()));
    for (members, part) in [
        (vec![("a.heic", b"x".as_slice()), ("a.txt", b"a")], "a.heic"),
        (vec![("a.npy", b"x"), ("a.pth", b"x")], "its members are npy, pth"),
        (vec![("d.01.png", &image), ("d.01.png", &image)], "first dot"),
    ] {
        let error = tar(&members).open(0).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains("x.tar: row 0"), "{error}");
    }
    let nested = tar(&[("v1.2/a.png", &image), ("v1.2/a.txt", b"a"), ("v1.2/._a.png", b"x"), ("__meta__/b.png", b"x")]).open(0).unwrap();
    assert_eq!(counts(&nested).iter().sum::<usize>(), 1, "{:?}", nested.notes);
    let notes = nested.notes.join("\n");
    assert!(notes.contains("1 whose names begin with a dot (the first: `v1.2/._a.png`)") && notes.contains("`__meta__/b.png`"), "{notes}");
}

/// Whatever is no part of an example is counted once, however often the tar is walked through, and with its rule.
#[test]
fn members_that_are_not_read_are_counted_once() {
    let dir = tempfile::tempdir().unwrap();
    let image = common::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sets/codecs/7.png"));
    let mut out = tar::Builder::new(std::fs::File::create(dir.path().join("x.tar")).unwrap());
    let mut member = |name: &str, kind: tar::EntryType, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(bytes.len() as u64);
        if kind == tar::EntryType::Symlink {
            header.set_link_name("a.png").unwrap();
        }
        out.append_data(&mut header, name, bytes).unwrap();
    };
    for key in ["a", "b", "c", "d"] {
        for (extension, bytes) in [("png", image.as_slice()), ("mask.png", &image), ("npy", b"x"), ("txt", b"text"), ("note.json", b"1")] {
            member(&format!("{key}.{extension}"), tar::EntryType::Regular, bytes);
        }
    }
    member(".DS_Store", tar::EntryType::Regular, b"x");
    member("d/._a.png", tar::EntryType::Regular, b"x");
    member("README", tar::EntryType::Regular, b"x");
    member("e.png", tar::EntryType::Symlink, b"");
    member("d", tar::EntryType::Directory, b"");
    out.into_inner().unwrap();
    for stream in [None, Some(peft::data::Streaming::Fixed(true))] {
        let path = Paths::One(dir.path().join("x.tar").display().to_string());
        let web = WebDatasetConfig { path, stream, ..Default::default() };
        let notes = DataConfig { webdataset: Some(web), ..Default::default() }.open(0).unwrap().notes;
        let told: Vec<&String> = notes.iter().filter(|n| n.contains("members of tars are not read")).collect();
        assert_eq!(told.len(), 1, "{notes:?}");
        for part in ["12 members", "2 whose names begin", "1 without an extension", "1 that are links", "4 .npy", "4 .png"] {
            assert!(told[0].contains(part), "{part}: {}", told[0]);
        }
    }
}

/// The same number in both verbs: each text once, whether it is drawn in each epoch, in none, or stands in several rows.
#[test]
fn texts_that_are_cut_are_counted_once() {
    let w = World::new();
    let long = |i: usize| format!("{} {i}", "red thing ".repeat(20));
    // Three different long texts in five rows, two of them a row's second choice.
    let row = |(i, class): (usize, &str)| {
        let texts = match i {
            0 | 1 => vec![format!("a {class} thing {i}"), long(0)],
            2 => vec![long(1), long(2)],
            _ => vec![format!("a {class} thing {i}")],
        };
        format!("{}\n", serde_json::json!({ "image": format!("data/{class}/{i}.png"), "text": texts }))
    };
    let rows: String = (0..10).flat_map(|i| [(i, "red"), (i, "blue")]).map(row).collect();
    w.write("t.jsonl", &rows);
    let recipe = w.recipe("lora: { rank: 2 }").replace("folder: { root: data }", "table: { path: t.jsonl }");
    let recipe =
        recipe.replace("  classify: { templates: [\"a {} thing\"] }", "  retrieve: { pad: longest }").replace("epochs: 4", "epochs: 2");
    w.write("r.yaml", &recipe);
    for source in ["t.jsonl", "r.yaml"] {
        assert_eq!(w.json(&["data", source, "--model", "base"])["captions"]["too_long"], 3, "{source}");
    }
    let out = w.peft(&["train", "r.yaml"]);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success() && said.contains("3 texts are longer"), "{said}");
}
