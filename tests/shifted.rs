//! Rows that have only a number are known by what is in them: where rows come in before them, shards come in beside theirs or files
//! get other names, none that a run has trained on becomes its test, and a run does not go on with other rows.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/sets.rs"]
mod sets;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use candle_core::Device;
use common::{StopAfter, World};
use peft::data::{Dataset, Example, Split};
use peft::recipe::Recipe;
use peft::run::Existing;
use peft::session::{self, EvalOptions};
use peft::train::{Event, Observer};
use sets::Row;

#[derive(Default)]
struct Notes(String);

impl Observer for Notes {
    fn event(&mut self, event: Event<'_>) {
        if let Event::Note(note) | Event::Warning(note) = event {
            self.0 += &format!("{note}\n");
        }
    }
}

const CLASSES: [&str; 3] = ["blue", "green", "red"];

fn recipe(w: &World, data: &str) -> Recipe {
    let text = w
        .recipe("lora: { rank: 2 }")
        .replace("model: base", "model: DIR/base")
        .replace("folder: { root: data }", data)
        .replace("epochs: 4", "epochs: 1, checkpoint_steps: 1")
        .replace("output: run", "output: DIR/run")
        .replace("DIR", &w.dir.path().display().to_string());
    Recipe::parse("recipe", &text, "recipe", &[]).unwrap()
}

fn train(w: &World, data: &str, existing: Existing, steps: usize) -> peft::Result<()> {
    session::train(recipe(w, data), existing, &Device::Cpu, &mut StopAfter(steps)).map(drop)
}

/// What is in an example, whatever it is called.
fn content(e: &Example) -> String {
    e.bytes().map_or_else(|_| e.texts.join("|"), |bytes| blake3::hash(&bytes).to_hex().to_string())
}

/// Contents by split, and by id.
fn opened(w: &World, data: &str) -> ([BTreeSet<String>; 3], BTreeMap<String, String>) {
    let recipe = recipe(w, data);
    let data: Dataset = recipe.data.open(recipe.train.seed).unwrap();
    let lists = [Split::Train, Split::Val, Split::Test].map(|s| data.listed(s).unwrap().into_owned());
    let ids = lists.iter().flatten().map(|e| (e.id.clone(), content(e))).collect();
    (lists.map(|list| list.iter().map(content).collect()), ids)
}

/// Contents of what is evaluated, and what was said.
fn evaluated(w: &World, data: &str, split: Split) -> (BTreeSet<String>, String) {
    let mut notes = Notes::default();
    let options = EvalOptions { adapter: Some(w.path("run/adapter")), split, allow_base_mismatch: false };
    let found = session::evaluate(recipe(w, data), &options, &Device::Cpu, &mut notes).unwrap();
    let (_, ids) = opened(w, data);
    (found.predictions.into_iter().map(|p| ids[&p.id].clone()).collect(), notes.0)
}

/// The images of the world as shards with these rows each; a set of another kind for each extension.
fn write(w: &World, kind: &str, shards: &[(&str, Vec<Row>)]) {
    let _ = std::fs::remove_dir_all(w.path("rows"));
    std::fs::create_dir(w.path("rows")).unwrap();
    for (name, rows) in shards {
        let path = w.path("rows").join(format!("{name}.{kind}"));
        // Tars number their rows as well.
        let number = |(i, row): (usize, &Row)| Row { key: format!("{i:04}"), ..row.clone() };
        match kind {
            "tar" => sets::tar(&path, &rows.iter().enumerate().map(number).collect::<Vec<_>>(), false),
            _ => sets::parquet(&path, rows, false, &CLASSES),
        }
    }
}

fn rows(w: &World) -> Vec<Row> {
    sets::rows(w, 0..10, &|class| vec![class.into()])
}

/// Images that nobody has seen, one of each class and number.
fn more(w: &World, count: u8) -> Vec<Row> {
    let one = |i: u8| {
        let file: PathBuf = w.path(&format!("new{i}.png"));
        image::RgbImage::from_fn(20, 16, |x, y| image::Rgb([i * 7, (x * 9 + y) as u8, 90 + i])).save(&file).unwrap();
        Row { key: format!("new{i}"), file, labels: vec![CLASSES[i as usize % 3].into()], text: None }
    };
    (0..count).map(one).collect()
}

const SOURCES: [(&str, &str); 4] = [
    ("parquet", "parquet: { path: DIR/rows, classes: [blue, green, red] }"),
    ("parquet", "parquet: { path: DIR/rows, classes: [blue, green, red], stream: true, buffer: 5 }"),
    ("tar", "webdataset: { path: DIR/rows }"),
    ("tar", "webdataset: { path: DIR/rows, stream: true, buffer: 5 }"),
];

#[test]
fn what_was_trained_on_is_no_test_wherever_it_stands() {
    type Shards = Vec<(&'static str, Vec<Row>)>;
    type Change = fn(Vec<Row>, Vec<Row>) -> Shards;
    let changes: [(&str, usize, Change); 4] = [
        ("rows before the others", 6, |old, new| vec![("data-00000-of-00001", [new, old].concat())]),
        ("a shard more, so that all have other names", 6, |old, new| vec![("data-00000-of-00002", new), ("data-00001-of-00002", old)]),
        ("the other way round", 0, |old, _| vec![("data-00000-of-00001", old.into_iter().rev().collect())]),
        ("another name", 0, |old, _| vec![("x", old)]),
    ];
    for (kind, data) in SOURCES {
        let w = World::new();
        write(&w, kind, &[("data-00000-of-00001", rows(&w))]);
        train(&w, data, Existing::Refuse, usize::MAX).unwrap();
        let ([trained, chosen, tested], _) = opened(&w, data);
        assert_eq!(evaluated(&w, data, Split::Test).0, tested);
        for (name, come, change) in &changes {
            write(&w, kind, &change(rows(&w), more(&w, 6)));
            let (test, said) = evaluated(&w, data, Split::Test);
            assert!(test.is_disjoint(&trained) && test.is_disjoint(&chosen), "{data}: {name}: {said}");
            assert!(test.is_superset(&tested), "{data}: {name}: {said}");
            let (val, _) = evaluated(&w, data, Split::Val);
            assert!(val.is_superset(&chosen) && val.is_disjoint(&trained) && val.is_disjoint(&tested), "{data}: {name}");
            // A tar's keys are names, of which another shard has others.
            if kind == "parquet" {
                assert_eq!(said.contains("6 examples have come and 0 have gone"), *come == 6, "{data}: {name}: {said}");
            }
        }
    }
}

/// A set that says its splits itself: rows that were trained on are put into the test shard.
#[test]
fn a_trained_row_in_the_test_shard_is_no_test() {
    for (kind, data) in SOURCES {
        let w = World::new();
        let parts = |moved: usize| {
            let all = rows(&w);
            let test = [&all[..moved], &all[24..]].concat();
            [("train", all[moved..18].to_vec()), ("val", all[18..24].to_vec()), ("test", test)]
        };
        write(&w, kind, &parts(0));
        train(&w, data, Existing::Refuse, usize::MAX).unwrap();
        let ([trained, _, tested], _) = opened(&w, data);
        write(&w, kind, &parts(5));
        let (test, said) = evaluated(&w, data, Split::Test);
        assert_eq!(test, tested, "{data}: {said}");
        assert!(test.is_disjoint(&trained) && said.contains('5'), "{data}: {said}");
    }
}

/// The source has equal rows in train and test: what was reported is what is evaluated.
#[test]
fn equal_rows_in_two_splits_stay_in_both() {
    for (kind, data) in SOURCES {
        let w = World::new();
        let all = rows(&w);
        let test = [&all[..4], &all[24..]].concat();
        write(&w, kind, &[("train", all[..18].to_vec()), ("val", all[18..24].to_vec()), ("test", test)]);
        train(&w, data, Existing::Refuse, usize::MAX).unwrap();
        let reported = peft::run::read_predictions(&w.path("run")).unwrap().len();
        assert_eq!(reported, 10);
        let options = EvalOptions { adapter: Some(w.path("run/adapter")), split: Split::Test, allow_base_mismatch: false };
        let found = session::evaluate(recipe(&w, data), &options, &Device::Cpu, &mut Notes::default()).unwrap();
        assert_eq!(found.examples, reported, "{data}");
    }
}

#[test]
fn a_run_does_not_go_on_with_other_rows() {
    type Change = fn(&World, &mut Vec<Row>);
    let changes: [(Change, &str); 6] = [
        (|w, rows| rows.insert(0, more(w, 1).remove(0)), "1 example"),
        (|_, rows| drop(rows.remove(7)), "1 example"),
        (|w, rows| rows[4].file = more(w, 1)[0].file.clone(), "example"),
        (|_, rows| rows[5].labels = vec!["green".into()], "was blue"),
        (|_, rows| rows.swap(3, 9), "order"),
        (|w, rows| rows.extend(more(w, 2)), "2 examples are new"),
    ];
    for (kind, data) in SOURCES {
        let w = World::new();
        write(&w, kind, &[("data", rows(&w))]);
        train(&w, data, Existing::Refuse, 1).unwrap_err();
        for (change, expected) in changes {
            let mut other = rows(&w);
            change(&w, &mut other);
            write(&w, kind, &[("data", other)]);
            let error = train(&w, data, Existing::Resume, usize::MAX).unwrap_err();
            let said = error.to_string();
            assert!(error.exit_code() == 2 && said.contains("--force"), "{data}: {said}");
            // Keys of tars are names: what stands under another one is another image.
            assert!(kind == "tar" || said.contains(expected), "{data}: {expected}: {said}");
        }
        write(&w, kind, &[("data", rows(&w))]);
        train(&w, data, Existing::Resume, usize::MAX).unwrap();
    }
}

/// Texts in a table have a line, and no name; a task that looks at texts alone reads no images, which then say nothing.
#[test]
fn texts_are_known_by_what_they_say() {
    let table = |w: &World, from: usize| {
        let line = |i: usize| format!("word {i} of {},{}\n", i * 7, CLASSES[i % 3]);
        let text: String = ((50 - from)..50).chain(0..30).map(line).collect();
        w.write("texts.csv", &format!("text,label\n{text}"));
    };
    let parquet = |w: &World, from: usize| {
        let all = [more(w, from as u8), rows(w)].concat();
        let said = |row: Row| Row { text: Some(format!("a thing {}", row.key)), ..row };
        write(w, "parquet", &[("data", all.into_iter().map(said).collect())]);
    };
    type Write<'a> = &'a dyn Fn(&World, usize);
    let sources: [(&str, Write<'_>); 3] = [("table: { path: DIR/texts.csv }", &table), (SOURCES[0].1, &parquet), (SOURCES[1].1, &parquet)];
    for (data, write) in sources {
        let w = World::new();
        let of = || {
            let mut recipe = recipe(&w, data);
            recipe.task = serde_json::from_value(serde_json::json!({ "classify": { "inputs": "text" } })).unwrap();
            recipe
        };
        let texts = |listed: &[Example]| listed.iter().map(|e| (e.id.clone(), e.texts.join("|"))).collect::<BTreeMap<_, _>>();
        let opened = || {
            let data = recipe(&w, data).data.open(3).unwrap();
            [Split::Train, Split::Val, Split::Test].map(|s| texts(&data.listed(s).unwrap()))
        };
        let set = |texts: &BTreeMap<String, String>| texts.values().cloned().collect::<BTreeSet<_>>();
        write(&w, 0);
        session::train(of(), Existing::Refuse, &Device::Cpu, &mut StopAfter(usize::MAX)).unwrap();
        let [trained, chosen, tested] = opened().each_ref().map(set);
        write(&w, 6);
        let options = EvalOptions { adapter: Some(w.path("run/adapter")), split: Split::Test, allow_base_mismatch: false };
        let mut notes = Notes::default();
        let found = session::evaluate(of(), &options, &Device::Cpu, &mut notes).unwrap();
        let ids: BTreeMap<String, String> = opened().into_iter().flatten().collect();
        let test: BTreeSet<String> = found.predictions.into_iter().map(|p| ids[&p.id].clone()).collect();
        assert!(test.is_superset(&tested) && test.is_disjoint(&trained) && test.is_disjoint(&chosen), "{data}: {}", notes.0);
        assert!(notes.0.contains("6 examples have come and 0 have gone"), "{data}: {}", notes.0);
        let resumed = session::train(of(), Existing::Resume, &Device::Cpu, &mut StopAfter(usize::MAX)).unwrap_err();
        assert!(resumed.to_string().contains("6 examples are new"), "{data}: {resumed}");
    }
}
