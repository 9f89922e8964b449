//! The world's images as other sources have them: a table, tars, Parquet files, each divided in the same way.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use crate::common::{World, read};

/// An image with its classes.
#[derive(Clone)]
pub(crate) struct Row {
    pub(crate) key: String,
    pub(crate) file: PathBuf,
    pub(crate) labels: Vec<String>,
    /// A column of its own in Parquet, where the first row has one.
    pub(crate) text: Option<String>,
}

/// The images of `data/<class>/` whose numbers are in `numbers`; names of classes go through `named`.
pub(crate) fn rows(w: &World, numbers: std::ops::Range<usize>, named: &dyn Fn(&str) -> Vec<String>) -> Vec<Row> {
    let classes = ["red", "green", "blue"];
    let row = |class: &str, i: usize| Row {
        key: format!("{class}{i}"),
        file: w.path("data").join(class).join(format!("{i}.png")),
        labels: named(class),
        text: None,
    };
    numbers.flat_map(|i| classes.map(|class| row(class, i))).collect()
}

/// What is trained on, what chooses, what is reported.
pub(crate) const PARTS: [(&str, std::ops::Range<usize>); 3] = [("train", 0..6), ("val", 6..8), ("test", 8..10)];

/// `<dir>/{train,val,test}.tar`; with one class each the class is a `.cls`, otherwise a list in a `.json`.
pub(crate) fn tars(w: &World, dir: &str, several: bool, named: &dyn Fn(&str) -> Vec<String>) {
    std::fs::create_dir_all(w.path(dir)).unwrap();
    for (split, numbers) in PARTS {
        tar(&w.path(dir).join(format!("{split}.tar")), &rows(w, numbers, named), several);
    }
}

pub(crate) fn tar(path: &Path, rows: &[Row], several: bool) {
    let mut tar = tar::Builder::new(std::fs::File::create(path).unwrap());
    for row in rows {
        let label = match several {
            true => ("json", serde_json::json!({ "labels": row.labels }).to_string()),
            false => ("cls", row.labels[0].clone()),
        };
        for (extension, bytes) in [(label.0, label.1.into_bytes()), ("png", read(&row.file))] {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            tar.append_data(&mut header, format!("{}.{extension}", row.key), bytes.as_slice()).unwrap();
        }
    }
    tar.finish().unwrap();
}

/// A table `<name>` beside the data with a column of splits; classes of one image stand between bars.
pub(crate) fn table(w: &World, name: &str, several: bool, named: &dyn Fn(&str) -> Vec<String>) {
    let mut text = format!("image,{},split\n", if several { "labels" } else { "label" });
    for (split, numbers) in PARTS {
        for row in rows(w, numbers, named) {
            let file = row.file.strip_prefix(w.dir.path()).unwrap().display().to_string();
            text += &format!("{file},{},{split}\n", row.labels.join("|"));
        }
    }
    w.write(name, &text);
}

/// `<dir>/{train,val,test}.parquet`, whose labels are numbers in `classes`.
pub(crate) fn parquets(w: &World, dir: &str, several: bool, classes: &[&str], named: &dyn Fn(&str) -> Vec<String>) {
    std::fs::create_dir_all(w.path(dir)).unwrap();
    for (split, numbers) in PARTS {
        parquet(&w.path(dir).join(format!("{split}.parquet")), &rows(w, numbers, named), several, classes);
    }
}

pub(crate) fn parquet(path: &Path, rows: &[Row], several: bool, classes: &[&str]) {
    let label = match several {
        true => "optional group labels (LIST) { repeated group list { optional int64 element; } }",
        false => "required int64 label;",
    };
    let text = if rows[0].text.is_some() { "required binary text (UTF8);" } else { "" };
    let schema = format!("message m {{ optional group image {{ optional binary bytes; }} {label} {text} }}");
    let schema = Arc::new(parse_message_type(&schema).unwrap());
    let mut file = SerializedFileWriter::new(Vec::new(), schema, Arc::new(WriterProperties::builder().build())).unwrap();
    let mut group = file.next_row_group().unwrap();
    let images: Vec<ByteArray> = rows.iter().map(|row| ByteArray::from(read(&row.file))).collect();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<ByteArrayType>().write_batch(&images, Some(&vec![2; rows.len()]), None).unwrap();
    column.close().unwrap();
    let number = |name: &String| classes.iter().position(|c| c == name).unwrap() as i64;
    let numbers: Vec<i64> = rows.iter().flat_map(|row| row.labels.iter().map(number)).collect();
    let mut column = group.next_column().unwrap().unwrap();
    let typed = column.typed::<Int64Type>();
    if several {
        let starts = |row: &Row| (0..row.labels.len()).map(|i| i16::from(i > 0)).collect::<Vec<_>>();
        let levels: Vec<i16> = rows.iter().flat_map(starts).collect();
        typed.write_batch(&numbers, Some(&vec![3; numbers.len()]), Some(&levels)).unwrap();
    } else {
        typed.write_batch(&numbers, None, None).unwrap();
    }
    column.close().unwrap();
    if rows[0].text.is_some() {
        let texts: Vec<ByteArray> = rows.iter().map(|row| ByteArray::from(row.text.as_deref().unwrap())).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    std::fs::write(path, file.into_inner().unwrap()).unwrap();
}
