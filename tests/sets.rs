//! Parquet and WebDataset: what `datasets`, pyarrow and `webdataset` wrote is what they read, in any order, from any point on.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use peft::data::{
    ColumnNames, DataConfig, Dataset, Example, ImageRef, ParquetConfig, Paths, Split, SplitConfig, Stream, Streaming, WebDatasetConfig,
};
use serde_json::Value;
use sha2::{Digest, Sha256};

fn sets() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sets")
}

fn expected(name: &str) -> Vec<Value> {
    let all: Value = serde_json::from_slice(&common::read(&sets().join("expected.json"))).unwrap();
    all[name].as_array().unwrap().clone()
}

fn sha(example: &Example) -> String {
    Sha256::digest(example.bytes().unwrap()).iter().map(|b| format!("{b:02x}")).collect()
}

fn one(name: &str) -> Option<String> {
    Some(name.to_string())
}

fn hf() -> ParquetConfig {
    ParquetConfig {
        path: Paths::One(sets().join("hf").display().to_string()),
        text: Some(ColumnNames::One("alternatives".into())),
        value: one("score"),
        group: one("concept"),
        ..Default::default()
    }
}

fn parquet(config: ParquetConfig) -> DataConfig {
    DataConfig { parquet: Some(config), ..Default::default() }
}

fn codec(name: &str) -> DataConfig {
    let path = Paths::One(sets().join("codecs").join(name).display().to_string());
    parquet(ParquetConfig { path, ..Default::default() })
}

fn tars(path: &str) -> WebDatasetConfig {
    WebDatasetConfig { path: Paths::One(path.into()), ..Default::default() }
}

fn wds() -> WebDatasetConfig {
    let classes = Some(peft::data::ClassList::Names(["cat", "dog", "owl"].map(String::from).to_vec()));
    WebDatasetConfig { classes, ..tars(&sets().join("wds/shard-{000000..000002}.tar").display().to_string()) }
}

fn webdataset(config: WebDatasetConfig) -> DataConfig {
    DataConfig { webdataset: Some(config), ..Default::default() }
}

fn all(data: &Dataset) -> Vec<Example> {
    [Split::Train, Split::Val, Split::Test].into_iter().flat_map(|s| data.listed(s).unwrap().into_owned()).collect()
}

/// Everything but the split, in the order of the rows.
fn check(data: &Dataset, found: &[Example], expected: &[Value]) {
    assert_eq!(found.len(), expected.len());
    for (e, want) in found.iter().zip(expected) {
        assert_eq!(sha(e), want["sha256"], "{}", e.id);
        assert_eq!(e.label.map(|l| data.classes[l as usize].clone()), want["label"].as_str().map(String::from), "{}", e.id);
        assert_eq!(Value::from(e.texts.clone()), want["texts"], "{}", e.id);
        assert_eq!(e.question.as_deref(), want["question"].as_str(), "{}", e.id);
        assert!((e.value.unwrap_or(0.0) - want["value"].as_f64().unwrap_or(0.0)).abs() < 1e-6, "{}", e.id);
    }
}

/// The row's number behind the name of its shard.
fn by_row(mut examples: Vec<Example>) -> Vec<Example> {
    let key = |e: &Example| {
        let (shard, row) = e.id.rsplit_once(':').unwrap();
        (shard.to_string(), row.parse::<usize>().unwrap())
    };
    examples.sort_by_key(key);
    examples
}

#[test]
fn a_set_of_datasets_reads_as_datasets_reads_it() {
    let data = parquet(hf()).open(0).unwrap();
    assert_eq!(data.classes, ["cat", "dog", "owl"]);
    // No validation shard: a part of train becomes one; groups stay together.
    let rows = by_row(data.train.iter().chain(&data.val).cloned().collect());
    check(&data, &rows, &expected("hf/train"));
    check(&data, &by_row(data.test.clone()), &expected("hf/test"));
    for (e, want) in rows.iter().zip(expected("hf/train")) {
        assert_eq!(e.answers, want["answers"].as_array().unwrap().iter().map(|a| a.as_str().unwrap()).collect::<Vec<_>>());
        assert_eq!((Value::from(e.fits), Value::from(e.group.clone())), (want["fits"].clone(), want["group"].clone()));
    }
    let groups = |list: &[Example]| list.iter().map(|e| e.group.clone().unwrap()).collect::<HashSet<_>>();
    assert!(groups(&data.train).is_disjoint(&groups(&data.val)));
    assert!(data.notes.iter().any(|n| n.contains("no validation split")), "{:?}", data.notes);
    assert_eq!(rows[0].id, "train-00000-of-00002.parquet:0");
}

#[test]
fn several_labels_have_the_names_of_their_own_column() {
    // Where `labels` is named, `label` is not read, whose classes are others.
    let data = parquet(ParquetConfig { labels: one("tags"), ..hf() }).open(0).unwrap();
    assert_eq!(data.classes, ["big", "small", "wild"]);
    for (e, want) in by_row(data.test.clone()).iter().zip(expected("hf/test")) {
        let names: Vec<&str> = e.labels.as_ref().unwrap().iter().map(|&l| data.classes[l as usize].as_str()).collect();
        assert_eq!((e.label, Value::from(names)), (None, want["labels"].clone()));
    }
    let renamed = ParquetConfig { classes: Some(["a", "b"].map(String::from).to_vec()), ..hf() };
    let error = parquet(renamed).open(0).unwrap_err().to_string();
    // One line for all rows, with the first of them.
    let parts = ["train-00000-of-00002.parquet: row 2", ": row 2: column `label`: expected a class from 0 to 1, found 2", "7 more rows"];
    assert!(parts.iter().all(|p| error.contains(p)), "{error}");
    let error = parquet(ParquetConfig { label: one("absent"), ..hf() }).open(0).unwrap_err().to_string();
    assert!(error.contains("no column `absent`") && error.contains("data.parquet.label") && error.contains("concept"), "{error}");
}

#[test]
fn every_codec_page_version_and_encoding() {
    for name in ["none", "snappy", "zstd", "gzip", "lz4"] {
        let data = codec(&format!("{name}.parquet")).open(0).unwrap();
        check(&data, &by_row(all(&data)), &expected("codecs"));
    }
    let error = codec("brotli.parquet").open(0).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("BROTLI") && error.to_string().contains("zstd"), "{error}");
}

#[test]
fn rows_without_image_and_rows_with_a_path() {
    let rows = by_row(all(&codec("sparse.parquet").open(0).unwrap()));
    assert_eq!(rows[0].image, ImageRef::Missing);
    assert_eq!(rows[1].image, ImageRef::File(sets().join("codecs/7.png")));
    assert!(matches!(rows[2].image, ImageRef::Stored(_)));
    assert_eq!(rows.iter().map(|e| e.texts[0].as_str()).collect::<Vec<_>>(), ["only text", "a path", "bytes"]);
}

#[test]
fn shards_of_webdataset_read_as_webdataset_reads_them() {
    let data = webdataset(WebDatasetConfig { id: one("key"), ..wds() });
    let mut found = all(&webdataset(wds()).open(0).unwrap());
    // `id` stands in the JSON member.
    let named = WebDatasetConfig { id: one("id"), ..wds() };
    let names: HashSet<String> = all(&webdataset(named).open(0).unwrap()).into_iter().map(|e| e.id).collect();
    assert_eq!(names, (0..10).map(|i| format!("n{i}")).collect());
    found.sort_by(|a, b| a.id.cmp(&b.id));
    let want = expected("wds");
    check(&webdataset(wds()).open(0).unwrap(), &found, &want);
    for (e, want) in found.iter().zip(&want) {
        assert_eq!(e.id, format!("{}:{}", want["shard"].as_str().unwrap(), want["key"].as_str().unwrap()));
    }
    assert!(data.open(0).unwrap_err().to_string().contains("no column `key`"));
}

/// The whole set as one stream.
fn stream(config: &DataConfig) -> std::sync::Arc<Stream> {
    config.open(0).unwrap().stream.unwrap()
}

fn streamed(buffer: usize) -> [DataConfig; 2] {
    let stream = Some(Streaming::Fixed(true));
    let split = Some(SplitConfig { train: 0.8, val: 0.2, test: 0.0, seed: 4 });
    [
        parquet(ParquetConfig { stream, buffer: Some(buffer), ..hf() }),
        DataConfig { split, ..webdataset(WebDatasetConfig { stream, buffer: Some(buffer), ..wds() }) },
    ]
}

fn epoch(stream: &Stream, epoch: usize, done: usize) -> Vec<(usize, String, Vec<u8>)> {
    let mut feed = stream.epoch(7, epoch, true, done);
    let rows = std::iter::from_fn(|| feed.next_row().unwrap());
    rows.map(|r| (r.index, r.example.id, r.image.unwrap().unwrap())).collect()
}

#[test]
fn a_stream_has_what_a_list_has_and_goes_on_anywhere() {
    for buffer in [1, 3, 100] {
        for config in streamed(buffer) {
            let stream = stream(&config);
            let mut listed = config.clone();
            listed.parquet.iter_mut().for_each(|p| p.stream = Some(Streaming::Fixed(false)));
            listed.webdataset.iter_mut().for_each(|w| w.stream = Some(Streaming::Fixed(false)));
            let listed = listed.open(0).unwrap();
            assert_eq!(stream.len(), listed.train.len());
            let whole = epoch(&stream, 0, 0);
            // The number of a row is its place in the list, so that augmentation draws the same.
            for (index, id, bytes) in &whole {
                assert_eq!((id, bytes.as_slice()), (&listed.train[*index].id, &*listed.train[*index].bytes().unwrap()));
            }
            assert_eq!(whole.iter().map(|r| r.0).collect::<HashSet<_>>().len(), stream.len());
            if buffer > 1 {
                assert!(whole != epoch(&stream, 1, 0), "another epoch, another order");
            }
            for done in 0..=whole.len() {
                assert!(epoch(&stream, 0, done) == whole[done..], "buffer {buffer}, behind {done}");
            }
        }
    }
}

#[test]
fn what_is_in_memory_is_the_buffer() {
    let dir = tempfile::tempdir().unwrap();
    // Different bytes, since rows with one image would be one group.
    let image = |n: u32| [common::read(&sets().join("codecs/7.png")), n.to_le_bytes().to_vec()].concat();
    for shard in 0..4 {
        let mut tar = tar::Builder::new(std::fs::File::create(dir.path().join(format!("train-{shard}.tar"))).unwrap());
        for i in 0..500 {
            member(&mut tar, &format!("{i}.png"), &image(shard * 500 + i));
            member(&mut tar, &format!("{i}.cls"), b"1");
        }
        tar.into_inner().unwrap();
    }
    let config = WebDatasetConfig { stream: Some(Streaming::Fixed(true)), buffer: Some(32), ..tars(&dir.path().display().to_string()) };
    let data = webdataset(config.clone()).open(0).unwrap();
    assert!(data.train.is_empty() && data.val.len() > 100, "{}", data.val.len());
    let stream = data.stream.unwrap();
    let mut feed = stream.epoch(0, 0, true, 0);
    let mut order = Vec::new();
    while let Some(row) = feed.next_row().unwrap() {
        order.push(row.index);
    }
    assert_eq!((order.len(), feed.peak()), (stream.len(), 32));
    assert_eq!(data.val.len() + order.len(), 2000);
    // Neighbours do not stay neighbours.
    let moved = order.windows(2).filter(|w| w[0].abs_diff(w[1]) > 1).count();
    assert!(moved > order.len() * 8 / 10, "{moved}");
    // Near the end only what is still wanted is read again.
    let mut late = stream.epoch(0, 0, true, order.len() - 5);
    assert_eq!(std::iter::from_fn(|| late.next_row().unwrap()).map(|r| r.index).collect::<Vec<_>>(), order[order.len() - 5..]);
    assert!(late.peak() <= 5, "{}", late.peak());
    // Images too large for so many: the buffer shrinks.
    let small = WebDatasetConfig { buffer: Some(1_000_000), buffer_mib: Some(1), ..config };
    assert_eq!(webdataset(small).open(0).unwrap().stream.unwrap().buffer(), (1 << 20) / image(0).len());
}

fn member(tar: &mut tar::Builder<std::fs::File>, name: &str, bytes: &[u8]) {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    tar.append_data(&mut header, name, bytes).unwrap();
}

/// A tar of members and what is wrong with it.
fn tar_error(dir: &Path, members: &[(&str, &[u8])], cut: usize) -> String {
    let path = dir.join("bad.tar");
    let mut tar = tar::Builder::new(std::fs::File::create(&path).unwrap());
    members.iter().for_each(|(name, bytes)| member(&mut tar, name, bytes));
    tar.into_inner().unwrap();
    if cut > 0 {
        let bytes = common::read(&path);
        std::fs::write(&path, &bytes[..cut]).unwrap();
    }
    let error = webdataset(WebDatasetConfig { path: Paths::One(path.display().to_string()), ..wds() }).open(0).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    error.to_string()
}

#[test]
fn bad_members_are_named_with_shard_and_row() {
    let dir = tempfile::tempdir().unwrap();
    let good: [(&str, &[u8]); 2] = [("a.png", b"x"), ("a.cls", b"0")];
    for (bad, parts) in [
        (("b.cls", b"7".as_slice()), ["row 1 (b.cls)", "from 0 to 2, found 7"]),
        (("b.cls", b"fox"), ["row 1 (b.cls)", "3 classes or its number, found `fox`"]),
        (("b.json", b"{"), ["row 1 (b.json)", "expected JSON"]),
        (("b.json", b"[1]"), ["row 1 (b.json)", "expected a JSON object"]),
        (("b.json", b"{\"value\": \"x\"}"), ["row 1", "neither an image nor a text"]),
        (("b.txt", b"\xff"), ["row 1 (b.txt)", "UTF-8"]),
        (("b.cls", b"1"), ["row 1", "neither an image nor a text"]),
    ] {
        let error = tar_error(dir.path(), &[good[0], good[1], bad], 0);
        assert!(parts.iter().all(|p| error.contains(p)) && error.contains("bad.tar"), "{error}");
    }
    let twice = tar_error(dir.path(), &[good[0], good[0]], 0);
    assert!(twice.contains("a.png") && twice.contains("twice"), "{twice}");
    let cut = tar_error(dir.path(), &[good[0], good[1], ("b.png", &[0; 4000])], 3 * 1024);
    assert!(cut.contains("b.png") && cut.contains("cut off"), "{cut}");
    let half = tar_error(dir.path(), &[good[0], good[1]], 1024 + 100);
    assert!(half.contains("bad.tar: byte 1024") && half.contains("broken"), "{half}");
    std::fs::write(dir.path().join("no.tar"), [7; 2048]).unwrap();
    let none = webdataset(tars(&dir.path().join("no.tar").display().to_string())).open(0).unwrap_err().to_string();
    assert!(none.contains("no.tar") && none.contains("no tar"), "{none}");
    let packed = dir.path().join("x.tar.gz");
    std::fs::write(&packed, "").unwrap();
    let packed = webdataset(tars(&packed.display().to_string())).open(0).unwrap_err().to_string();
    assert!(packed.contains("compressed") && packed.contains("gunzip"), "{packed}");
}

#[test]
fn members_that_lead_elsewhere_are_no_rows() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.tar");
    let mut tar = tar::Builder::new(std::fs::File::create(&path).unwrap());
    for (kind, name) in [
        (tar::EntryType::Symlink, "l.png"),
        (tar::EntryType::Link, "h.png"),
        (tar::EntryType::Char, "d.png"),
        (tar::EntryType::Directory, "e.png"),
        (tar::EntryType::Regular, "up"),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(0);
        header.set_link_name("a.png").unwrap();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        if name == "up" {
            header.as_old_mut().name[..9].copy_from_slice(b"../up.png");
        }
        header.set_cksum();
        tar.append(&header, std::io::empty()).unwrap();
    }
    member(&mut tar, "a.png", &common::read(&sets().join("codecs/7.png")));
    member(&mut tar, &format!("{}.txt", "long".repeat(60)), b"a long name");
    tar.into_inner().unwrap();
    let found = all(&webdataset(tars(&path.display().to_string())).open(0).unwrap());
    let mut ids: Vec<String> = found.iter().map(|e| e.id.clone()).collect();
    ids.sort();
    assert_eq!(ids, ["x.tar:a".to_string(), format!("x.tar:{}", "long".repeat(60))]);
    assert!(std::fs::read_dir(dir.path()).unwrap().count() == 1, "nothing is unpacked");
}

#[test]
fn broken_shards_are_named_and_left_out_on_request() {
    peft::guard::hush();
    let dir = tempfile::tempdir().unwrap();
    let good = common::read(&sets().join("codecs/none.parquet"));
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
    write("a.parquet", &good);
    write("b.parquet", &good[..good.len() - 20]);
    let config = parquet(ParquetConfig { path: Paths::One(dir.path().display().to_string()), ..Default::default() });
    let error = config.open(0).unwrap_err().to_string();
    assert!(error.contains("b.parquet") && error.contains("no Parquet"), "{error}");
    let data = DataConfig { skip_bad: true, ..config.clone() }.open(0).unwrap();
    assert_eq!((all(&data).len(), data.skipped), (6, 1));
    assert!(data.notes.iter().any(|n| n.contains("skipped 1 rows") && n.contains("b.parquet")), "{:?}", data.notes);
    // Somewhere in the first pages: what is found is either an error with a name or other values, never a panic.
    std::fs::remove_file(dir.path().join("b.parquet")).unwrap();
    for at in (4..good.len()).step_by(5) {
        let mut bytes = good.clone();
        bytes[at] ^= 0x55;
        write("a.parquet", &bytes);
        match config.open(0) {
            Ok(data) => all(&data).iter().for_each(|e| {
                if let Err(error) = e.bytes() {
                    assert!(error.to_string().contains("a.parquet"), "{error}");
                }
            }),
            Err(error) => assert!(error.to_string().contains("a.parquet"), "{at}: {error}"),
        }
    }
}

#[test]
fn a_group_may_not_be_trained_on_and_tested() {
    for streaming in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        for split in ["train", "test"] {
            let mut tar = tar::Builder::new(std::fs::File::create(dir.path().join(format!("{split}-0.tar"))).unwrap());
            for i in 0..20 {
                member(&mut tar, &format!("{split}{i}.txt"), b"text");
                member(
                    &mut tar,
                    &format!("{split}{i}.json"),
                    format!("{{\"group\": \"{}{i}\"}}", if i == 3 { "g" } else { split }).as_bytes(),
                );
            }
            tar.into_inner().unwrap();
        }
        let config = WebDatasetConfig { stream: Some(Streaming::Fixed(streaming)), ..tars(&dir.path().display().to_string()) };
        let error = webdataset(config).open(0).unwrap_err().to_string();
        assert!(error.contains("group `g3` is in"), "{error}");
    }
}

#[test]
fn data_and_new_know_parquet_and_tars() {
    let w = common::World::new();
    let found = w.json(&["data", &sets().join("hf").display().to_string()]);
    assert_eq!((found["kind"].as_str(), found["splits"]["test"].as_u64()), (Some("parquet"), Some(6)));
    assert_eq!(found["classes"].as_array().unwrap().len(), 3);
    assert_eq!(found["captions"]["count"], 24);
    let shards = sets().join("wds/shard-{000000..000002}.tar").display().to_string();
    let found = w.json(&["data", &shards]);
    assert_eq!((found["kind"].as_str(), found["width"]["max"].as_u64()), (Some("webdataset"), Some(8)));
    for (data, key) in [(sets().join("hf").display().to_string(), "parquet"), (shards, "webdataset")] {
        assert!(w.peft(&["new", "--data", &data, "--force", "draft.yaml"]).status.success());
        let text = std::fs::read_to_string(w.path("draft.yaml")).unwrap();
        assert!(text.contains(&format!("  {key}: {{ path: ")), "{text}");
        w.json(&["train", "draft.yaml", "--check"]);
    }
}

/// What a source of `scripts/reference/data.py` reads as, listed and streamed.
#[test]
#[ignore = "run by scripts/reference/data.py"]
fn dump() {
    let source: DataConfig = serde_json::from_str(&std::env::var("PEFT_SET").unwrap()).unwrap();
    let row = |data: &Dataset, e: &Example, sha: String| {
        let label = e.label.map(|l| data.classes[l as usize].clone());
        serde_json::json!({"id": e.id, "sha256": sha, "label": label, "texts": e.texts, "answers": e.answers, "value": e.value})
    };
    let listed = source.listed().open(0).unwrap();
    all(&listed).iter().for_each(|e| println!("row {}", row(&listed, e, sha(e))));
    let mut streamed = source;
    for buffer in [
        streamed.parquet.as_mut().map(|p| (&mut p.stream, &mut p.buffer)),
        streamed.webdataset.as_mut().map(|w| (&mut w.stream, &mut w.buffer)),
    ] {
        buffer.into_iter().for_each(|(stream, buffer)| (*stream, *buffer) = (Some(Streaming::Fixed(true)), Some(50)));
    }
    let data = streamed.open(0).unwrap();
    let stream = data.stream.clone().unwrap();
    let mut feed = stream.epoch(1, 0, true, 0);
    while let Some(taken) = feed.next_row().unwrap() {
        let hash = Sha256::digest(taken.image.unwrap().unwrap()).iter().map(|b| format!("{b:02x}")).collect();
        println!("stream {}", row(&data, &taken.example, hash));
    }
    // What is evaluated is listed.
    data.val.iter().chain(&data.test).for_each(|e| println!("stream {}", row(&data, e, sha(e))));
}
