//! Tars and Parquet files that are not what their set says: what is lost of them is told of.

use std::path::Path;
use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType, Int32Type, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use super::*;

fn written(path: &Path, members: &[&str]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for name in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(name.len() as u64);
        tar.append_data(&mut header, name, name.as_bytes()).unwrap();
    }
    let bytes = tar.into_inner().unwrap();
    std::fs::write(path, &bytes).unwrap();
    bytes
}

fn opened(files: &Files) -> peft::Result<Dataset> {
    files.located().open(0)
}

fn rows(data: &Dataset) -> usize {
    counts(data).iter().sum()
}

fn told(data: &Dataset, part: &str) -> bool {
    data.notes.iter().any(|n| n.contains(part))
}

#[test]
fn two_images_of_a_key_are_refused_with_its_members() {
    let files = Files::new(&[]);
    written(&files.at("a.tar"), &["x.png", "x.jpg", "x.cls", "y.png", "y.cls"]);
    let error = opened(&files).unwrap_err();
    let message = error.to_string();
    assert!(error.exit_code() == 2 && ["x.jpg", "png, jpg", "row 0"].iter().all(|p| message.contains(p)), "{message}");
    let mut named = files.located();
    named.webdataset.as_mut().unwrap().image = Some("png".into());
    assert_eq!(rows(&named.open(0).unwrap()), 2);
    // With a name of its own a second image is a column that is not read.
    written(&files.at("a.tar"), &["x.png", "x.mask.png", "x.cls", "y.png", "y.cls"]);
    assert!(told(&opened(&files).unwrap(), "1 .png"));
}

#[test]
fn tars_behind_one_another_are_read_to_the_end_and_a_cut_one_is_told_of() {
    let files = Files::new(&[]);
    let path = files.at("a.tar");
    // The same key on both sides of an end mark is two examples.
    let first = written(&path, &["x.png", "x.cls"]);
    let second = written(&path, &["x.txt", "y.png", "y.cls"]);
    let plain = opened(&files).unwrap();
    assert!(rows(&plain) == 2 && !told(&plain, "end mark"), "{:?}", plain.notes);
    std::fs::write(&path, [first.as_slice(), &[0; 10_240], &second].concat()).unwrap();
    let both = opened(&files).unwrap();
    assert!(rows(&both) == 3 && told(&both, "1 tars go on behind an end mark"), "{:?}", both.notes);
    std::fs::write(&path, &first[..4 * 512]).unwrap();
    let cut = opened(&files).unwrap();
    assert!(rows(&cut) == 1 && told(&cut, "no end mark") && told(&cut, "a.tar"), "{:?}", cut.notes);
    std::fs::write(&path, [first.as_slice(), &[7; 512]].concat()).unwrap();
    assert!(opened(&files).unwrap_err().to_string().contains("a.tar: byte"), "what is no tar is not passed over");
}

/// Values of a label column.
enum Labels<'a> {
    Texts(&'a [&'a str]),
    Long(&'a [i64]),
    Short(&'a [i32]),
}

fn parquet(path: &Path, label: &str, labels: &Labels<'_>) {
    let schema = format!("message m {{ required binary text (UTF8); required {label}; }}");
    let schema = Arc::new(parse_message_type(&schema).unwrap());
    let mut file = SerializedFileWriter::new(Vec::new(), schema, Arc::new(WriterProperties::builder().build())).unwrap();
    let mut group = file.next_row_group().unwrap();
    let bytes = |texts: &[&str]| texts.iter().map(|t| ByteArray::from(*t)).collect::<Vec<_>>();
    let count = match labels {
        Labels::Texts(l) => l.len(),
        Labels::Long(l) => l.len(),
        Labels::Short(l) => l.len(),
    };
    let name = path.display().to_string();
    let texts: Vec<String> = (0..count).map(|i| format!("{name} {i}")).collect();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<ByteArrayType>().write_batch(&bytes(&texts.iter().map(String::as_str).collect::<Vec<_>>()), None, None).unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    match labels {
        Labels::Texts(l) => column.typed::<ByteArrayType>().write_batch(&bytes(l), None, None),
        Labels::Long(l) => column.typed::<Int64Type>().write_batch(l, None, None),
        Labels::Short(l) => column.typed::<Int32Type>().write_batch(l, None, None),
    }
    .unwrap();
    column.close().unwrap();
    group.close().unwrap();
    std::fs::write(path, file.into_inner().unwrap()).unwrap();
}

#[test]
fn a_shard_that_the_others_count_is_missed() {
    let files = Files::new(&[]);
    for (n, label) in [(0, "red"), (2, "blue")] {
        parquet(&files.at(&format!("train-0000{n}-of-00003.parquet")), "binary label (UTF8)", &Labels::Texts(&[label, "green"]));
    }
    let data = opened(&files).unwrap();
    assert!(rows(&data) == 4 && told(&data, "1 of the 3 shards"), "{:?}", data.notes);
    parquet(&files.at("train-00001-of-00003.parquet"), "binary label (UTF8)", &Labels::Texts(&["red"]));
    assert!(!told(&opened(&files).unwrap(), "shards that"));
    let tars = Files::new(&[]);
    written(&tars.at("train-1-of-2.tar"), &["x.png", "x.cls", "y.png", "y.cls"]);
    assert!(told(&opened(&tars).unwrap(), "1 of the 2 shards"));
}

#[test]
fn labels_of_two_types_are_refused_with_both_files() {
    let files = Files::new(&[]);
    parquet(&files.at("a.parquet"), "binary label (UTF8)", &Labels::Texts(&["red", "green"]));
    parquet(&files.at("b.parquet"), "int64 label", &Labels::Long(&[2, 3]));
    let error = opened(&files).unwrap_err();
    let message = error.to_string();
    let parts = ["a.parquet", "b.parquet", "`label`", "whole numbers", "texts"];
    assert!(error.exit_code() == 2 && parts.iter().all(|p| message.contains(p)), "{message}");
    // Numbers of other widths are numbers.
    parquet(&files.at("a.parquet"), "int32 label", &Labels::Short(&[2, 1]));
    assert_eq!(opened(&files).unwrap().classes, ["1", "2", "3"]);
}

#[test]
fn points_in_time_are_no_class_names() {
    let files = Files::new(&[]);
    let reads = peft::data::Reads { needed: vec![peft::data::Field::Label], also: Vec::new() };
    for (label, values) in [
        ("int32 label (DATE)", Labels::Short(&[18_262, 18_263])),
        ("int64 label (TIMESTAMP_MICROS)", Labels::Long(&[1_577_836_800_000_000])),
        ("int64 label (TIMESTAMP(NANOS,true))", Labels::Long(&[1_577_836_800_000_000_000])),
    ] {
        parquet(&files.at("a.parquet"), label, &values);
        let error = files.located().open_for(0, &reads).unwrap_err();
        let message = error.to_string();
        let kind = if label.contains("DATE") { "dates" } else { "timestamps" };
        assert!(error.exit_code() == 2 && message.contains(kind) && message.contains("as text"), "{message}");
        // Whoever does not read them is not disturbed.
        let reads = peft::data::Reads { needed: vec![peft::data::Field::Text], also: Vec::new() };
        assert!(files.located().open_for(0, &reads).is_ok());
    }
}

#[test]
fn a_file_without_rows_is_said_to_be_that() {
    let files = Files::new(&[]);
    parquet(&files.at("a.parquet"), "int64 label", &Labels::Long(&[]));
    let message = opened(&files).unwrap_err().to_string();
    assert!(message.contains("no row") && !message.contains("broken"), "{message}");
    parquet(&files.at("b.parquet"), "int64 label", &Labels::Long(&[1, 2]));
    let data = opened(&files).unwrap();
    assert!(rows(&data) == 2 && told(&data, "a.parquet has no rows"), "{:?}", data.notes);
}
