//! CSV, TSV and JSONL; annotations of COCO and VQA.

use std::path::Path;

use peft::data::{CocoConfig, ColumnNames, DataConfig, Field, Reads, TableConfig, VqaConfig};

use super::Expect::{Either, Fine, Refused};
use super::{Case, Expect, ODD};

/// Reads a table of texts, so that no image has to be there.
fn case(name: impl Into<String>, expect: Expect, file: &'static str, content: impl Into<Vec<u8>>) -> Case {
    let content = content.into();
    Case::new(name, expect, move |dir| {
        let path = dir.join(file);
        std::fs::write(&path, content).unwrap();
        Box::new(move || open(&path))
    })
}

fn open(path: &Path) -> peft::Result<()> {
    let text = Some(ColumnNames::One("text".into()));
    let table = Some(TableConfig { path: path.to_path_buf(), text, ..Default::default() });
    DataConfig { table, ..Default::default() }.open(0).map(drop)
}

/// A table for a task that reads these fields.
fn case_for(name: impl Into<String>, expect: Expect, (file, text): (&'static str, String), also: &'static [Field]) -> Case {
    Case::new(name, expect, move |dir| {
        let path = dir.join(file);
        std::fs::write(&path, text).unwrap();
        let reads = Reads { needed: Vec::new(), also: also.to_vec() };
        let table = Some(TableConfig { path, ..Default::default() });
        Box::new(move || DataConfig { table, ..Default::default() }.open_for(0, &reads).map(drop))
    })
}

const ROWS: &str = "text,label\na cat,cat\na dog,dog\nan owl,owl\n";

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = vec![
        case("as it should be", Fine, "x.csv", ROWS),
        case("lines of Windows", Fine, "x.csv", ROWS.replace('\n', "\r\n")),
        case("a mark of the encoding", Fine, "x.csv", format!("\u{feff}{ROWS}")),
        case("quotes in quotes", Fine, "x.csv", format!("{ROWS}\"a \"\"fine\"\" cat\",cat\n")),
        case("a line in a cell", Fine, "x.csv", format!("{ROWS}\"a\ncat\",cat\n")),
        case("no last line end", Fine, "x.csv", ROWS.trim_end()),
        case("a comma too many", Refused("x.csv:5"), "x.csv", format!("{ROWS}a,b,c\n")),
        case("a comma too few", Refused("x.csv:5"), "x.csv", format!("{ROWS}a\n")),
        case("empty", Refused("no rows"), "x.csv", ""),
        case("a header alone", Refused("no rows"), "x.csv", "text,label\n"),
        case("empty lines", Refused("no rows"), "x.csv", "\n\n\n\n"),
        case("a column twice", Refused("occurs twice"), "x.csv", "text,label,label\na,b,c\n"),
        case("a column twice but for space", Refused("occurs twice"), "x.csv", "text,label, label\na,b,c\n"),
        case("no such column", Refused("no column `text`"), "x.csv", "words,label\na,b\n"),
        case(
            "UTF-16",
            Refused("UTF-16"),
            "x.csv",
            ROWS.encode_utf16().fold(vec![0xff, 0xfe], |v, c| [v, c.to_le_bytes().to_vec()].concat()),
        ),
        case(
            "UTF-16, big-endian",
            Refused("UTF-16"),
            "x.csv",
            ROWS.encode_utf16().fold(vec![0xfe, 0xff], |v, c| [v, c.to_be_bytes().to_vec()].concat()),
        ),
        case("UTF-16 JSONL", Refused("UTF-16"), "x.jsonl", b"\xff\xfe{\0}\0".to_vec()),
        case("UTF-16 without a mark", Refused("UTF-16"), "x.csv", ROWS.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<_>>()),
        case("UTF-32", Refused("UTF-32"), "x.csv", b"\xff\xfe\0\0t\0\0\0".to_vec()),
        case("semicolons", Fine, "x.csv", ROWS.replace(',', ";")),
        case("semicolons that are declared", Fine, "x.csv", format!("sep=;\n{}", ROWS.replace(',', ";"))),
        case("tabs in a CSV", Fine, "x.csv", ROWS.replace(',', "\t")),
        case("a separator and nothing else", Refused("no rows"), "x.csv", "sep=;\n"),
        case("a separator that is a quote", Refused("x.csv"), "x.csv", "sep=\"\ntext,label\na,b\n"),
        case("a spreadsheet", Refused("x.csv"), "x.csv", b"PK\x03\x04\x14\0\x06\0\x08\0\xff\xfe".to_vec()),
        case("zeros", Refused("x.csv"), "x.csv", vec![0; 4096]),
        case("another extension", Refused(".csv, .tsv or .jsonl"), "x.xlsx", ROWS),
        case("no extension", Refused("no extension"), "x", ROWS),
        case("a row of 17 MiB", Refused("quote left open"), "x.csv", format!("{ROWS}\"{}\",cat\n", "x\n".repeat(9 << 20))),
        case("an open quote before 17 MiB", Refused("quote left open"), "x.csv", format!("{ROWS}\"{}", "a cat,cat\n".repeat(2 << 20))),
        case(
            "a hundred thousand columns",
            Refused("expected 100000 cells"),
            "x.csv",
            format!("{}\n", (0..100_000).map(|i| i.to_string()).collect::<Vec<_>>().join(",") + "\n1"),
        ),
    ];
    // An open quote in each cell, first or last of its row, first or last row.
    for (at, cell) in ROWS
        .match_indices(|c: char| c.is_ascii_lowercase())
        .map(|(i, _)| i)
        .filter(|i| *i == 0 || b",\n".contains(&ROWS.as_bytes()[i - 1]))
        .enumerate()
    {
        let text = format!("{}\"{}", &ROWS[..cell], &ROWS[cell..]);
        cases.push(case(format!("an open quote in cell {at}"), Refused("x.csv:"), "x.csv", text.clone()));
        cases.push(case(format!("an open quote in cell {at}, tabs"), Refused("x.tsv:"), "x.tsv", text.replace(',', "\t")));
    }
    for (name, byte) in [("Latin-1", 0xe9u8), ("Windows-1252", 0x93), ("a lone continuation", 0x80), ("no UTF-8 at all", 0xff)] {
        let text = [ROWS.as_bytes(), b"caf", &[byte], b",cat\n"].concat();
        cases.push(case(name, Refused("save it as UTF-8"), "x.csv", text.clone()));
        let header = [b"text,label,", &[byte][..], b"\na,b,c\n"].concat();
        cases.push(case(format!("{name} in the header"), Refused("save it as UTF-8"), "x.csv", header));
        let json = [b"{\"text\": \"caf".as_slice(), &[byte], b"\"}\n"].concat();
        cases.push(case(format!("{name} in JSONL"), Refused("x.jsonl:1"), "x.jsonl", json));
    }
    cases.extend(columns());
    cases.extend(json_lines());
    cases
}

/// What a column may not hold.
fn columns() -> Vec<Case> {
    let mut cases = Vec::new();
    for (column, bad) in [
        ("value", ["nan", "inf", "-inf", "1e999", "x", "1,5", "--1"]),
        ("fits", ["maybe", "2", "-1", "01", "y", "t", "nan"]),
        ("split", ["trainings", "0", "traintest", "all", "train,test", "?", "none"]),
    ] {
        for value in bad {
            let text = format!("text,{column}\na cat,\"{value}\"\nb,\nc,\n");
            cases.push(case_for(format!("{column}: {value}"), Refused("x.csv:2"), ("x.csv", text.clone()), &[Field::Value, Field::Fits]));
            // Whoever does not read the column has nothing against it.
            let expect = if column == "split" { Refused("x.csv:2") } else { Fine };
            cases.push(case_for(format!("{column}: {value}, not read"), expect, ("x.csv", text), &[Field::Text]));
        }
    }
    for word in ["Testing", "dev set", "restval", "train_set", "VALIDATION"] {
        cases.push(case_for(format!("split: {word}"), Fine, ("x.csv", format!("text,split\na,{word}\nb,train\nc,train\n")), &[]));
    }
    cases
}

fn json_lines() -> Vec<Case> {
    let mut cases = vec![
        case("JSONL as it should be", Fine, "x.jsonl", "{\"text\": \"a cat\"}\n\n{\"text\": [\"a\", \"b\"]}\n{\"text\": \"c\"}"),
        case("JSONL with a mark", Fine, "x.jsonl", "\u{feff}{\"text\": \"a cat\"}\n{\"text\": \"b\"}\n{\"text\": \"c\"}\n"),
        case("a list of objects", Refused("x.jsonl:1"), "x.jsonl", "[{\"text\": \"a\"}]\n"),
        case("an object over lines", Refused("x.jsonl:1"), "x.jsonl", "{\n\"text\": \"a\"\n}\n"),
        case("two objects in a line", Refused("x.jsonl:1"), "x.jsonl", "{\"text\": \"a\"}{\"text\": \"b\"}\n"),
        case("a line of 17 MiB", Refused("more than 16777216 bytes"), "x.jsonl", format!("{{\"text\": \"{}\"}}\n", "x".repeat(17 << 20))),
        case(
            "a line of a million zeros",
            Refused("values"),
            "x.jsonl",
            format!("{{\"text\": \"a\", \"x\": [{}0]}}\n", "0,".repeat(2 << 20)),
        ),
        case("a key twice", Refused("`label` occurs twice"), "x.jsonl", "{\"text\": \"a\", \"label\": \"b\", \"label\": \"c\"}\n"),
        case_for(
            "labels beyond 2^53",
            Refused("in quotes"),
            (
                "x.jsonl",
                "{\"text\": \"a\", \"label\": 12345678901234567890123}\n{\"text\": \"b\", \"label\": 12345678901234567890124}\n".into(),
            ),
            &[Field::Label],
        ),
        case_for(
            "a value beyond f32",
            Refused("finite in f32"),
            ("x.jsonl", "{\"text\": \"a\", \"value\": 1e300}\n".into()),
            &[Field::Value],
        ),
        case("quotes that balance", Refused("line break"), "x.csv", "text,label\na,\"cat\nb,dog\nc,cat\"\nd,dog\n"),
        case("a deep line", Refused("x.jsonl:1"), "x.jsonl", format!("{{\"text\": {}\n", "[".repeat(1 << 20))),
    ];
    for column in ["text", "label", "labels", "value", "fits", "answer", "choices", "question", "split", "group", "image", "id"] {
        for odd in ODD.iter().chain(&["1e400", "null", "-1e-400", "[null]", "[{\"answer\": {}}]"]) {
            let text = format!("{{\"text\": \"a\"}}\n{{\"text\": \"b\", \"{column}\": {odd}}}\n{{\"text\": \"c\"}}\n");
            cases.push(case(format!("{column}: {odd}"), Either, "x.jsonl", text));
        }
    }
    cases
}

pub(crate) fn annotations() -> Vec<Case> {
    const COCO: &str = r#"{"images": [{"id": @id, "file_name": @file}], "annotations": [{"image_id": @of, "caption": @caption}]}"#;
    const QUESTIONS: &str = r#"{"data_subtype": "x", "questions": [{"question_id": @id, "image_id": @image, "question": @text}]}"#;
    let coco = |name: String, expect, text: String| {
        Case::new(name, expect, move |dir| {
            let path = dir.join("captions.json");
            std::fs::write(&path, text).unwrap();
            let coco = Some(CocoConfig { path, val: None, test: None, images: None });
            Box::new(move || DataConfig { coco, ..Default::default() }.open(0).map(drop))
        })
    };
    let vqa = |name: String, expect, text: String| {
        Case::new(name, expect, move |dir| {
            let path = dir.join("questions.json");
            std::fs::write(&path, text).unwrap();
            let vqa = Some(VqaConfig { questions: path, annotations: None, images: None, pattern: None, val: None, test: None });
            Box::new(move || DataConfig { vqa, ..Default::default() }.open(0).map(drop))
        })
    };
    let fill = |text: &str, defaults: &[(&str, &str)], field: &str, value: &str| {
        let all = defaults.iter().map(|(f, v)| (*f, if *f == field { value } else { v }));
        all.fold(text.to_string(), |text, (f, v)| text.replace(&format!("@{f}"), v))
    };
    let fields = [("id", "1"), ("file", "\"a.png\""), ("of", "1"), ("caption", "\"a cat\"")];
    let asked = [("id", "1"), ("image", "1"), ("text", "\"what?\"")];
    let mut cases = vec![
        coco("COCO as it should be".into(), Fine, fill(COCO, &fields, "", "")),
        vqa("VQA as it should be".into(), Fine, fill(QUESTIONS, &asked, "", "")),
    ];
    for odd in ODD.iter().chain(&["1e400", "null", "18446744073709551615", "-9223372036854775809", "\"\"", "\" \""]) {
        for (field, _) in fields {
            cases.push(coco(format!("COCO {field}: {odd}"), Either, fill(COCO, &fields, field, odd)));
        }
        for (field, _) in asked {
            cases.push(vqa(format!("VQA {field}: {odd}"), Either, fill(QUESTIONS, &asked, field, odd)));
        }
    }
    for (name, text) in [
        ("empty", String::new()),
        ("a list", "[]".into()),
        ("no images", "{\"annotations\": []}".into()),
        ("cut", "{\"images\": [{".into()),
        ("deep", "[".repeat(1 << 20)),
        ("zeros", format!("{{\"images\": [{}0], \"annotations\": []}}", "0,".repeat(2 << 20))),
        ("nothing in them", "{\"images\": [], \"annotations\": []}".into()),
        ("a key twice", "{\"images\": [], \"images\": [], \"annotations\": []}".into()),
    ] {
        cases.push(coco(format!("COCO: {name}"), Refused("captions.json"), text.clone()));
        cases.push(vqa(
            format!("VQA: {name}"),
            Refused("questions.json"),
            text.replace("\"images\"", "\"questions\"").replace("\"annotations\"", "\"x\""),
        ));
    }
    cases
}
