//! Parquet: cut and changed files, and those whose rows or cells are far more than their bytes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::basic::{Compression, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use peft::data::{DataConfig, ParquetConfig, Paths, Split};

use super::Expect::{Either, Fine, Refused};
use super::{Case, Expect};

fn open(path: &Path) -> peft::Result<()> {
    let parquet = ParquetConfig { path: Paths::One(path.display().to_string()), ..Default::default() };
    let data = DataConfig { parquet: Some(parquet), ..Default::default() }.open(0)?;
    for split in [Split::Train, Split::Val, Split::Test] {
        data.split(split).iter().filter(|e| e.texts.is_empty()).try_for_each(|e| e.bytes().map(drop))?;
    }
    Ok(())
}

fn case(name: impl Into<String>, expect: Expect, bytes: impl FnOnce() -> Vec<u8> + 'static) -> Case {
    Case::new(name, expect, move |dir| {
        let path = dir.join("x.parquet");
        std::fs::write(&path, bytes()).unwrap();
        Box::new(move || open(&path))
    })
}

/// A file with one column of these values.
fn written(schema: &str, values: &[ByteArray]) -> Vec<u8> {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let zstd = Compression::ZSTD(ZstdLevel::try_new(1).unwrap());
    let properties = WriterProperties::builder().set_compression(zstd).set_dictionary_page_size_limit(64 << 20).build();
    let mut file = SerializedFileWriter::new(Vec::new(), schema, Arc::new(properties)).unwrap();
    let mut group = file.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<ByteArrayType>().write_batch(values, None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    file.into_inner().unwrap()
}

/// A file with these columns of texts.
fn columns_of(schema: &str, columns: &[&[&str]]) -> Vec<u8> {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut file = SerializedFileWriter::new(Vec::new(), schema, Arc::new(WriterProperties::builder().build())).unwrap();
    let mut group = file.next_row_group().unwrap();
    for texts in columns {
        let values: Vec<ByteArray> = texts.iter().map(|text| ByteArray::from(*text)).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    file.into_inner().unwrap()
}

const TEXTS: &str = "message m { required binary text (UTF8); }";

fn texts() -> Vec<u8> {
    written(TEXTS, &(0..20).map(|i| ByteArray::from(format!("text {i}").as_str())).collect::<Vec<_>>())
}

/// Files that pyarrow wrote.
fn source(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/sets").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = vec![
        case("as it should be", Fine, texts),
        case("a list that is not there", Refused("no footer"), || {
            let mut bytes = texts();
            bytes.truncate(4);
            // An unknown field of the footer: two billion truths.
            let footer = [0x05, 0x28, 0x02, 0x09, 0x28, 0xf1, 0xff, 0xff, 0xff, 0xff, 0x07, 0];
            bytes.extend(footer);
            bytes.extend(12u32.to_le_bytes());
            bytes.extend(b"PAR1");
            bytes
        }),
        case("two columns of one name", Refused("two columns `text`"), || {
            let columns = "message m { required binary text (UTF8); required binary text (UTF8); }";
            columns_of(columns, &[&["a", "b"], &["c", "d"]])
        }),
    ];
    for name in [
        "codecs/none.parquet",
        "codecs/snappy.parquet",
        "codecs/gzip.parquet",
        "codecs/zstd.parquet",
        "codecs/lz4.parquet",
        "hf/test-00000-of-00001.parquet",
    ] {
        for percent in [0, 1, 30, 60, 99] {
            cases.push(case(format!("{name} cut at {percent} %"), Refused("x.parquet"), move || {
                let whole = source(name);
                whole[..whole.len() * percent / 100].to_vec()
            }));
        }
        // The footer's end, then pages.
        for back in (1..200).step_by(13) {
            cases.push(case(format!("{name}: another byte {back} before the end"), Either, move || {
                let mut bytes = source(name);
                let at = bytes.len() - back;
                bytes[at] ^= 0xff;
                bytes
            }));
        }
        for at in (4..200).step_by(13) {
            cases.push(case(format!("{name}: another byte {at}"), Either, move || {
                let mut bytes = source(name);
                bytes[at] ^= 0xff;
                bytes
            }));
        }
    }
    for length in [0u32, 1, 8, 1 << 20, 1 << 31, u32::MAX] {
        cases.push(case(format!("a footer of {length} bytes"), Refused("x.parquet"), move || {
            let mut bytes = texts();
            let at = bytes.len() - 8;
            bytes[at..at + 4].copy_from_slice(&length.to_le_bytes());
            bytes
        }));
    }
    // The crate passes over a list of two billion texts that are not there, one by one.
    cases.push(case("an endless list in a page's header", Refused("is no header"), || {
        let mut bytes = texts();
        let endless =
            [0x15, 0, 0x15, 0x14, 0x15, 0x14, 0x2c, 0x15, 2, 0x15, 0, 0x15, 6, 0x15, 6, 0x1c, 0x19, 0xf8, 0xff, 0xff, 0xff, 0xff, 7];
        bytes[4..4 + endless.len()].copy_from_slice(&endless);
        bytes
    }));
    cases.push(case("the mark alone", Refused("x.parquet"), || b"PAR1PAR1".to_vec()));
    cases.push(case("encrypted", Refused("x.parquet"), || [b"PARE".to_vec(), vec![0; 100], b"PARE".to_vec()].concat()));
    cases.push(case("twenty thousand rows of one text", Refused("rows in"), || written(TEXTS, &vec![ByteArray::from("a cat"); 20_000])));
    cases.push(case("a text of 2 MiB a hundred times", Refused("at most 1048576 bytes"), || {
        let long = ByteArray::from("x".repeat(2 << 20).as_str());
        written(TEXTS, &vec![long; 100])
    }));
    cases.push(case("an image of 80 MiB of zeros", Refused("a page of column `image` has"), || {
        written("message m { required binary image; }", &[ByteArray::from(vec![0; 80 << 20])])
    }));
    cases.push(case("no column of ours", Refused("x.parquet"), || {
        written("message m { required binary other (UTF8); }", &[ByteArray::from("x"), ByteArray::from("y")])
    }));
    cases.push(case("texts that are not UTF-8", Refused("x.parquet"), || written(TEXTS, &[ByteArray::from(vec![0xff, 0xfe])])));
    cases.push(case("no rows", Refused("x.parquet"), || written(TEXTS, &[])));
    cases
}
