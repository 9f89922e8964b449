//! A run knows what it was made of: it does not go on with other data or another base, and what it has seen is never its test.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::path::Path;

use candle_core::Device;
use common::{StopAfter, World};
use peft::clip::{ClipConfig, model::random_weights, weights};
use peft::data::Split;
use peft::recipe::Recipe;
use peft::run::{self, Existing};
use peft::session::{self, EvalOptions};
use peft::train::{Event, Observer};

/// Keeps what was told.
#[derive(Default)]
struct Notes(Vec<String>);

impl Observer for Notes {
    fn event(&mut self, event: Event<'_>) {
        if let Event::Note(note) | Event::Warning(note) = event {
            self.0.push(note);
        }
    }
}

/// What every opening of a stream says, and of data without a validation split.
const USUAL: [&str; 2] = ["are streamed", "no validation split"];

/// `data` is the source of a recipe; DIR stands for the world's directory.
fn recipe(w: &World, data: &str) -> Recipe {
    let text = w
        .recipe("lora: { rank: 2 }")
        .replace("model: base", "model: DIR/base")
        .replace("  folder: { root: data }", data)
        .replace("epochs: 4", "epochs: 1, checkpoint_steps: 1")
        .replace("output: run", "output: DIR/run")
        .replace("DIR", &w.dir.path().display().to_string());
    Recipe::parse("recipe", &text, "recipe", &[]).unwrap()
}

fn train(w: &World, data: &str, existing: Existing, steps: usize) -> peft::Result<(peft::report::TrainReport, bool)> {
    session::train(recipe(w, data), existing, &Device::Cpu, &mut StopAfter(steps))
}

/// What is evaluated: the ids, and what was said.
fn evaluated(w: &World, data: &str, split: Split) -> (BTreeSet<String>, String) {
    let mut notes = Notes::default();
    let options = EvalOptions { adapter: Some(w.path("run/adapter")), split, allow_base_mismatch: false };
    let found = session::evaluate(recipe(w, data), &options, &Device::Cpu, &mut notes).unwrap();
    notes.0.retain(|n| USUAL.iter().all(|u| !n.contains(u)));
    (found.predictions.into_iter().map(|p| p.id).collect(), notes.0.join("\n"))
}

const FOLDER: &str = "  folder: { root: DIR/data }";

/// Ids of a source as a run of it has them, by split.
fn ids(w: &World, data: &str) -> [BTreeSet<String>; 3] {
    let recipe = recipe(w, data);
    let data = recipe.data.open(recipe.train.seed).unwrap();
    [Split::Train, Split::Val, Split::Test].map(|s| data.listed(s).unwrap().iter().map(|e| e.id.clone()).collect())
}

/// More images, other ones than all that are there; names that sort before, between and behind the others.
fn add_images(w: &World) {
    for (class, blue) in [("red", 0u8), ("green", 90), ("blue", 200)] {
        for i in 0..9u8 {
            let image = image::RgbImage::from_fn(20, 16, |x, y| image::Rgb([i * 20, (x * 9 + y) as u8, blue + i]));
            image.save(w.path("data").join(class).join(format!("{}new{i}.png", ["", "5", "z"][i as usize % 3]))).unwrap();
        }
    }
}

fn table(w: &World) {
    let mut rows = String::new();
    for class in ["red", "green", "blue"] {
        let mut names: Vec<_> = std::fs::read_dir(w.path("data").join(class)).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        rows.extend(names.iter().map(|n| format!("{{\"image\": \"data/{class}/{}\", \"label\": \"{class}\"}}\n", n.to_string_lossy())));
    }
    w.write("rows.jsonl", &rows);
}

fn tars(w: &World) {
    let _ = std::fs::remove_dir_all(w.path("shards"));
    std::fs::create_dir(w.path("shards")).unwrap();
    let mut tar = tar::Builder::new(std::fs::File::create(w.path("shards/a.tar")).unwrap());
    for class in ["red", "green", "blue"] {
        let mut files: Vec<_> = std::fs::read_dir(w.path("data").join(class)).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        for file in files {
            let stem = format!("{class}{}", file.file_stem().unwrap().to_string_lossy());
            for (name, bytes) in [(format!("{stem}.cls"), class.as_bytes().to_vec()), (format!("{stem}.png"), common::read(&file))] {
                let mut header = tar::Header::new_gnu();
                header.set_size(bytes.len() as u64);
                tar.append_data(&mut header, name, bytes.as_slice()).unwrap();
            }
        }
    }
    tar.finish().unwrap();
}

#[test]
fn what_a_run_has_seen_is_never_its_test_however_much_is_added() {
    let table_data = "  table: { path: DIR/rows.jsonl }";
    let listed = "  webdataset: { path: DIR/shards }";
    let streamed = "  webdataset: { path: DIR/shards, stream: true, buffer: 5 }";
    let own = "  split: { train: 0.6, val: 0.2, test: 0.2, seed: 4 }";
    let nothing: fn(&World) = |_| {};
    let sources = [(FOLDER, nothing), (table_data, table), (listed, tars), (streamed, tars)];
    for (data, write) in sources.into_iter().chain([(FOLDER, nothing)]) {
        let data = if data == table_data { format!("{data}\n{own}") } else { data.to_string() };
        let w = World::new();
        write(&w);
        train(&w, &data, Existing::Refuse, usize::MAX).unwrap();
        let [trained, chosen, tested] = ids(&w, &data);
        let reported: BTreeSet<_> = run::read_predictions(&w.path("run")).unwrap().into_iter().map(|p| p.id).collect();
        assert_eq!(reported, tested);
        assert_eq!(evaluated(&w, &data, Split::Test), (tested.clone(), String::new()), "{data}: nothing is new");
        add_images(&w);
        write(&w);
        let (test, said) = evaluated(&w, &data, Split::Test);
        assert!(test.is_superset(&tested) && test.len() > tested.len(), "{data}: {test:?}");
        assert!(test.is_disjoint(&trained) && test.is_disjoint(&chosen), "{data}: {test:?}");
        assert!(said.contains("27 examples have come and 0 have gone"), "{data}: {said}");
        let (val, _) = evaluated(&w, &data, Split::Val);
        assert!(val.is_superset(&chosen) && val.is_disjoint(&trained) && val.is_disjoint(&tested), "{data}: {val:?}");
    }
}

/// 10 images a class: 2 test, 1 val, of each class, in every source, streamed or not.
#[test]
fn each_class_has_its_share_in_every_source() {
    let w = World::new();
    table(&w);
    tars(&w);
    let sources = [FOLDER, "  table: { path: DIR/rows.jsonl }", "  webdataset: { path: DIR/shards }"];
    for data in sources.into_iter().chain(["  webdataset: { path: DIR/shards, stream: true }"]) {
        let [train, val, test] = ids(&w, data);
        for class in ["red", "green", "blue"] {
            let count = |ids: &BTreeSet<String>| ids.iter().filter(|id| id.contains(class)).count();
            assert_eq!([count(&train), count(&val), count(&test)], [7, 1, 2], "{data}: {class}");
        }
    }
    assert_eq!(ids(&w, sources[2]), ids(&w, "  webdataset: { path: DIR/shards, stream: true }"));
}

#[test]
fn an_image_under_another_name_has_been_trained_on() {
    let w = World::new();
    train(&w, FOLDER, Existing::Refuse, usize::MAX).unwrap();
    let [trained, chosen, _] = ids(&w, FOLDER);
    for id in trained.iter().chain(&chosen) {
        let path = w.path("data").join(id);
        std::fs::rename(&path, path.with_file_name(format!("again-{}", path.file_name().unwrap().to_string_lossy()))).unwrap();
    }
    let (test, said) = evaluated(&w, FOLDER, Split::Test);
    assert!(test.iter().all(|id| !id.contains("again-")), "{test:?}: {said}");
    // The same images in a set of another name.
    std::fs::rename(w.path("data"), w.path("other")).unwrap();
    let (test, said) = evaluated(&w, "  folder: { root: DIR/other }", Split::Test);
    assert!(test.iter().all(|id| !id.contains("again-")), "{test:?}: {said}");
}

fn resumed(w: &World) -> String {
    let error = train(w, FOLDER, Existing::Resume, usize::MAX).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string()
}

#[test]
fn a_run_does_not_go_on_with_other_data_or_another_base() {
    type Change = fn(&Path);
    let changes: [(Change, &str); 6] = [
        (|d| std::fs::rename(d.join("data/red"), d.join("data/crimson")).unwrap(), "class 2 is `crimson`, was `green`"),
        (|d| std::fs::rename(d.join("data/red/1.png"), d.join("data/red/x.png")).unwrap(), "1 example is new; 1 example is gone"),
        (|d| std::fs::copy(d.join("data/red/1.png"), d.join("data/blue/1.png")).map(drop).unwrap(), "another image (blue/1.png)"),
        (|d| std::fs::copy(d.join("data/red/1.png"), d.join("data/red/new.png")).map(drop).unwrap(), "1 example is new"),
        (
            |d| {
                let config = ClipConfig::from_json("c", &common::read(&d.join("base/config.json"))).unwrap();
                let tensors: Vec<_> = random_weights(&config, 2, &Device::Cpu).unwrap().into_iter().collect();
                weights::save(&d.join("base/model.safetensors"), &tensors).unwrap();
            },
            "the base has other weights",
        ),
        (
            |d| {
                let path = d.join("base/preprocessor_config.json");
                let text = std::fs::read_to_string(&path).unwrap().replace("[0.5, 0.5, 0.5]", "[0.4, 0.5, 0.5]");
                std::fs::write(path, text).unwrap();
            },
            "images are prepared in another way",
        ),
    ];
    for (change, expected) in changes {
        for steps in [1, usize::MAX] {
            let w = World::new();
            let done = train(&w, FOLDER, Existing::Refuse, steps);
            assert_eq!(done.is_ok(), steps == usize::MAX);
            change(w.dir.path());
            let before = common::read(&w.path("run/examples.safetensors"));
            let said = resumed(&w);
            assert!(said.contains(expected) && said.contains("--force"), "{said}");
            assert_eq!(common::read(&w.path("run/examples.safetensors")), before);
            train(&w, FOLDER, Existing::Replace, usize::MAX).unwrap();
        }
    }
}

#[test]
fn a_run_without_a_list_goes_on_and_says_so() {
    let w = World::new();
    assert!(train(&w, FOLDER, Existing::Refuse, 1).is_err());
    std::fs::remove_file(w.path("run/examples.safetensors")).unwrap();
    let mut notes = Notes::default();
    session::train(recipe(&w, FOLDER), Existing::Resume, &Device::Cpu, &mut notes).unwrap();
    assert!(notes.0.iter().any(|n| n.contains("cannot be compared")), "{:?}", notes.0);
}

#[test]
fn splits_do_not_depend_on_how_the_root_is_spelled() {
    let w = World::new();
    let found = ids(&w, FOLDER);
    for root in ["DIR/data/", "DIR/./data", "DIR/base/../data"] {
        assert_eq!(ids(&w, &format!("  folder: {{ root: {root} }}")), found, "{root}");
    }
}
