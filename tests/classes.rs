//! What an adapter holds for each class goes by the names of classes, never by their places: an adapter gives the same answers on
//! the same images, whatever the order in which a source has its classes.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/sets.rs"]
mod sets;

use std::collections::BTreeMap;

use candle_core::Device;
use common::World;
use peft::data::Split;
use peft::recipe::Recipe;
use peft::report::Prediction;
use peft::run::Existing;
use peft::session::{self, EvalOptions};
use peft::train::{Event, Observer};
use serde_json::Value;

struct Silent;

impl Observer for Silent {
    fn event(&mut self, _: Event<'_>) {}
}

/// Sources of the same images in the same splits, each with its classes in another order; DIR is the world's directory.
const SOURCES: [&str; 3] = [
    "table: { path: DIR/rows.csv }",
    "webdataset: { path: DIR/tars, classes: [CLASSES] }",
    "parquet: { path: DIR/parquet, classes: [CLASSES] }",
];

fn one(class: &str) -> Vec<String> {
    vec![class.to_string()]
}

/// Red is warm as well.
fn several(class: &str) -> Vec<String> {
    if class == "red" { vec!["red".into(), "warm".into()] } else { one(class) }
}

fn world(multi: bool) -> World {
    let w = World::new();
    let named: &dyn Fn(&str) -> Vec<String> = if multi { &several } else { &one };
    sets::table(&w, "rows.csv", multi, named);
    sets::tars(&w, "tars", multi, named);
    let classes: &[&str] = if multi { &["warm", "green", "blue", "red"] } else { &["green", "blue", "red"] };
    sets::parquets(&w, "parquet", multi, classes, named);
    w
}

/// A recipe for one of [`SOURCES`].
fn recipe(w: &World, source: usize, method: &str, classify: &str, train: &str) -> Recipe {
    let multi = classify.contains("multi");
    let classes = match (source, multi) {
        (1, false) => "red, green, blue",
        (1, true) => "red, warm, green, blue",
        (_, false) => "green, blue, red",
        (_, true) => "warm, green, blue, red",
    };
    let text = w
        .recipe(method)
        .replace("method: { none }", "method: none")
        .replace("model: base", "model: DIR/base")
        .replace("folder: { root: data }", &SOURCES[source].replace("CLASSES", classes))
        .replace("templates:", &format!("{classify} templates:"))
        .replace("epochs: 4, batch: 8, lr: 1.0e-2", train)
        .replace("output: run", &format!("output: DIR/run{source}"))
        .replace("DIR", &w.dir.path().display().to_string());
    Recipe::parse("recipe", &text, "recipe", &[]).unwrap()
}

const TRAIN: &str = "epochs: 30, batch: 18, lr: 5.0e-2";

/// For each image its label, what is predicted, and the logit of each class, by name.
type Answers = BTreeMap<String, (Vec<String>, Vec<String>, BTreeMap<String, f32>)>;

/// What stands between `parquet/test.parquet:4` and `green9` is in the order of rows.
fn image_of(id: &str) -> String {
    let stem = |name: &str| name.trim_end_matches(".png").replace("data/", "").replace('/', "");
    match id.split_once(".parquet:") {
        Some((_, row)) => {
            let row: usize = row.parse().unwrap();
            format!("{}{}", ["red", "green", "blue"][row % 3], 8 + row / 3)
        }
        None => stem(id.rsplit_once(':').map_or(id, |(_, key)| key)),
    }
}

fn answers(predictions: &[Prediction], classes: &[String]) -> Answers {
    let names = |text: &str| {
        let mut names: Vec<String> = text.split('|').map(String::from).collect();
        names.sort();
        names
    };
    let one = |p: &Prediction| {
        assert_eq!(p.logits.len(), classes.len());
        let logits = classes.iter().cloned().zip(p.logits.iter().copied()).collect();
        (image_of(&p.id), (names(p.label.as_deref().unwrap()), names(&p.prediction), logits))
    };
    predictions.iter().map(one).collect()
}

fn evaluated(w: &World, adapter: &str, recipe: Recipe) -> peft::Result<Answers> {
    let classes = recipe.data.open(recipe.train.seed).unwrap().classes;
    let options = EvalOptions { adapter: Some(w.path(adapter)), split: Split::Test, allow_base_mismatch: false };
    let found = session::evaluate(recipe, &options, &Device::Cpu, &mut Silent)?;
    Ok(answers(&found.predictions, &classes))
}

fn assert_same(found: &Answers, expected: &Answers, what: &str) {
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{what}");
    for (id, (label, predicted, logits)) in found {
        let (right, before, then) = &expected[id];
        assert_eq!((label, predicted), (right, before), "{what}: {id}");
        for (name, logit) in logits {
            let (off, most) = ((logit - then[name]).abs(), 1e-3 * (1.0 + then[name].abs()));
            assert!(off < most, "{what}: {id}: {name}: {logit}, was {}", then[name]);
        }
    }
}

/// Trains on one source, and asks on all. `apart`: what is held for classes has to matter, so that a wrong order would show.
fn follows_names(method: &str, classify: &str) {
    let w = world(classify.contains("multi"));
    for trained in [0, 1] {
        let on = |source| recipe(&w, source, method, classify, TRAIN);
        let (report, _) = session::train(on(trained), Existing::Refuse, &Device::Cpu, &mut Silent).unwrap();
        let expected = answers(&report.after.as_ref().unwrap().predictions, &report.classes);
        let right = expected.values().filter(|(label, predicted, _)| label == predicted).count();
        assert!(right >= 5, "{method}: {right} of {} are right: an order could not show", expected.len());
        let adapter = format!("run{trained}/adapter");
        for source in 0..SOURCES.len() {
            let what = format!("{method} {classify} trained on {trained}, evaluated on {source}");
            assert_same(&evaluated(&w, &adapter, on(source)).unwrap(), &expected, &what);
            if source == trained {
                continue;
            }
            // Training that starts from it starts with these answers.
            let train = format!("epochs: 1, batch: 9, lr: 1.0e-3, init_adapter: DIR/{adapter}");
            let mut next = recipe(&w, source, method, classify, &train);
            next.output = Some(w.path("next"));
            let (next, _) = session::train(next, Existing::Replace, &Device::Cpu, &mut Silent).unwrap();
            let before = answers(&next.before.as_ref().unwrap().predictions, &next.classes);
            assert_same(&before, &expected, &format!("{what}, before training"));
        }
        refuses_others(&w, &adapter, &on);
    }
}

/// A class of another name, one less, one more.
fn refuses_others(w: &World, adapter: &str, on: &dyn Fn(usize) -> Recipe) {
    let table = std::fs::read_to_string(w.path("rows.csv")).unwrap();
    let without: String = table.lines().filter(|l| !l.contains("blue")).map(|l| format!("{l}\n")).collect();
    let more = format!("{table}data/red/0.png,violet,train\n").replacen("data/red/0.png,red", "data/red/0.png,violet", 1);
    for (text, named) in [(table.replace(",blue", ",violet"), "violet"), (without, "blue"), (more, "violet")] {
        w.write("rows.csv", &text);
        let error = evaluated(w, adapter, on(0)).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains(&format!("`{named}`")), "{error}");
        let mut next = on(0);
        next.train.init_adapter = Some(w.path(adapter));
        next.output = Some(w.path("other"));
        let error = session::train(next, Existing::Replace, &Device::Cpu, &mut Silent).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains(&format!("`{named}`")), "{error}");
    }
    w.write("rows.csv", &table);
}

#[test]
fn context_of_each_class() {
    follows_names("coop: { n_ctx: 2, class_specific: true }", "");
}

#[test]
fn values_of_a_cache() {
    follows_names("tip_adapter: { alpha: 3.0, beta: 2.0, search: false }", "");
}

#[test]
fn rows_of_a_linear_head() {
    follows_names("lora: { rank: 2 }", "head: linear,");
}

#[test]
fn rows_and_thresholds_of_a_linear_head_for_several_labels() {
    follows_names("none", "labels: multi, threshold: each, head: linear,");
}

#[test]
fn thresholds_of_prompts_for_several_labels() {
    follows_names("lora: { rank: 2 }", "labels: multi, threshold: each,");
}

/// `predict --labels` in another order, in a file and for each line, and several adapters on one base.
#[test]
fn labels_of_the_command_line_are_names() {
    for (method, classify) in [
        ("coop: { n_ctx: 2, class_specific: true }", ""),
        ("tip_adapter: { alpha: 3.0, beta: 2.0, search: false }", ""),
        ("none", "head: linear,"),
    ] {
        let w = world(false);
        session::train(recipe(&w, 1, method, classify, TRAIN), Existing::Refuse, &Device::Cpu, &mut Silent).unwrap();
        w.write("labels.txt", "blue\nred\ngreen\n");
        let ask =
            |flags: &[&str]| w.json(&[&["predict", "--model", "base", "--adapter", "run1/adapter", "data/red/9.png"], flags].concat());
        let expected = ask(&[]);
        assert_eq!(expected[0]["predictions"][0]["label"], "red", "{method}");
        for labels in ["green,red,blue", "blue,green,red", "labels.txt"] {
            let found = ask(&["--labels", labels]);
            let rows = |v: &Value| v[0]["predictions"].as_array().unwrap().clone();
            for (a, b) in rows(&found).iter().zip(&rows(&expected)) {
                // Another order sums in another order.
                let close = |key: &str| (a[key].as_f64().unwrap() - b[key].as_f64().unwrap()).abs() < 1e-5;
                assert!(a["label"] == b["label"] && close("probability") && close("logit"), "{method}: {labels}: {found}");
            }
        }
        w.write(
            "lines.jsonl",
            "{\"image\": \"data/red/9.png\", \"adapter\": \"run1/adapter\", \"labels\": [\"blue\", \"red\", \"green\"]}\n",
        );
        let out = w.peft(&["predict", "--model", "base", "--jsonl", "lines.jsonl"]);
        let line: Value = serde_json::from_slice(&out.stdout).unwrap();
        for (a, b) in line["predictions"].as_array().unwrap().iter().zip(expected[0]["predictions"].as_array().unwrap()) {
            assert_eq!(a["label"], b["label"], "{method}: {line}");
        }
        if !method.starts_with("tip") {
            let matrix = |labels: &str| {
                let adapter = ["--model", "base", "--adapter", "run1/adapter", "--labels", labels];
                w.json(&[&["merge"], &adapter[..], &["--classifier", "m.safetensors", "--force"]].concat());
                let all = candle_core::safetensors::load(w.path("m.safetensors"), &Device::Cpu).unwrap();
                all["weight"].to_vec2::<f32>().unwrap()
            };
            let (a, b) = (matrix("red,green,blue"), matrix("blue,red,green"));
            assert_eq!([&a[0], &a[1], &a[2]], [&b[1], &b[2], &b[0]], "{method}");
        }
        for (labels, named) in [("red,green,violet", "violet"), ("red,green", "blue"), ("red,green,blue,grey", "grey")] {
            let message = w.fails(&["predict", "--model", "base", "--adapter", "run1/adapter", "--labels", labels, "data/red/1.png"], 2);
            assert!(message.contains(&format!("`{named}`")), "{method}: {message}");
        }
    }
}

/// Weights by name are those of a list in the order of the source's classes.
#[test]
fn class_weights_are_named() {
    let w = world(false);
    let loss = |source: usize, weights: &str| {
        let mut recipe = recipe(&w, source, "lora: { rank: 2 }", weights, "epochs: 1, batch: 9, lr: 1.0e-2");
        recipe.output = Some(w.path("weighed"));
        session::train(recipe, Existing::Replace, &Device::Cpu, &mut Silent).map(|(r, _)| r.after.unwrap().loss)
    };
    let named = "class_weights: { blue: 5, green: 0.5 },";
    let expected = loss(0, "class_weights: [5, 0.5, 1],").unwrap();
    for source in [0, 1] {
        let found = loss(source, named).unwrap();
        assert!((found - expected).abs() < 1e-5 * expected, "{source}: {found}, by list {expected}");
    }
    // Of tars the classes are red, green, blue: the same list means something else.
    assert!((loss(1, "class_weights: [5, 0.5, 1],").unwrap() - expected).abs() > 1e-3 * expected);
    let error = loss(0, "class_weights: { violet: 2 },").unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("`violet`"), "{error}");
}

/// Adapters whose classes stand in different orders lie on one another, in memory and in a bundle.
#[test]
fn adapters_of_one_another_follow_names() {
    let w = world(false);
    let coop = "coop: { n_ctx: 2, class_specific: true }";
    for (source, method, classify) in [(0, coop, ""), (1, "none", "head: linear,"), (2, coop, "")] {
        session::train(recipe(&w, source, method, classify, TRAIN), Existing::Refuse, &Device::Cpu, &mut Silent).unwrap();
    }
    let ask = |args: &[&str]| {
        let found = w.json(&[&["predict"], args, &["data/red/9.png", "data/blue/8.png"]].concat());
        let one = |answer: &Value| {
            let pairs = answer["predictions"].as_array().unwrap().iter();
            pairs.map(|p| (p["label"].as_str().unwrap().to_string(), p["logit"].as_f64().unwrap())).collect::<BTreeMap<_, _>>()
        };
        found.as_array().unwrap().iter().map(one).collect::<Vec<_>>()
    };
    let same = |a: &[BTreeMap<String, f64>], b: &[BTreeMap<String, f64>]| {
        a.iter().zip(b).all(|(a, b)| a.keys().eq(b.keys()) && a.iter().all(|(name, z)| (z - b[name]).abs() < 1e-3 * (1.0 + z.abs())))
    };
    // Context of texts changes nothing of a head on images.
    let head = ask(&["--model", "base", "--adapter", "run1/adapter"]);
    assert!(same(&ask(&["--model", "base", "--adapter", "run0/adapter", "--adapter", "run1/adapter"]), &head));
    w.json(&["merge", "--model", "base", "--adapter", "run0/adapter", "--adapter", "run1/adapter", "--bundle", "--output", "both"]);
    assert!(same(&ask(&["--model", "both"]), &head));
    assert!(same(&ask(&["--model", "both", "--labels", "blue,red,green"]), &head));
    // A bundle of one order as the base of a recipe of another.
    w.json(&["merge", "--model", "base", "--adapter", "run2/adapter", "--bundle", "--output", "context"]);
    for source in 0..3 {
        let mut over = recipe(&w, source, "lora: { rank: 2 }", "", TRAIN);
        over.model = peft::recipe::ModelConfig::Pretrained(w.path("context").display().to_string());
        let options = EvalOptions { adapter: None, split: Split::Test, allow_base_mismatch: false };
        let classes = over.data.open(3).unwrap().classes;
        let found = session::evaluate(over, &options, &Device::Cpu, &mut Silent).unwrap();
        let expected = evaluated(&w, "run2/adapter", recipe(&w, 2, coop, "", TRAIN)).unwrap();
        let found = answers(&found.predictions, &classes);
        assert!(expected.values().filter(|(label, predicted, _)| label == predicted).count() >= 5);
        // The calibration differs, the logits do not.
        assert_same(&found, &expected, &format!("bundle on {source}"));
    }
}

/// Updates of a base add up whatever they were trained for; whose classes are meant is said.
#[test]
fn adapters_for_different_classes_are_told_apart() {
    let w = world(false);
    w.json(&["train", "recipe.yaml", "--output", "a"]);
    for name in ["red", "blue"] {
        std::fs::rename(w.path("data").join(name), w.path("data").join(format!("dark {name}"))).unwrap();
    }
    w.json(&["train", "recipe.yaml", "--output", "b"]);
    let both = ["--model", "base", "--adapter", "a/adapter", "--adapter", "b/adapter"];
    let notes = |rest: &[&str]| w.json(&[&["merge"], &both[..], rest].concat())["notes"].to_string();
    for rest in [&["--output", "m"][..], &["--bundle", "--output", "n"]] {
        let said = notes(rest);
        assert!(said.contains("`red`") && said.contains("`dark red`"), "{rest:?}: {said}");
    }
    assert!(notes(&["--combine", "cat", "--output", "c"]).contains("classes"));
    let manifest: Value = serde_json::from_slice(&common::read(&w.path("c/peft.json"))).unwrap();
    assert!(manifest["classes"].as_array().is_none_or(Vec::is_empty), "{manifest}");
    let said = w.peft(&[&["predict"], &both[..], &["data/green/0.png"]].concat());
    assert!(String::from_utf8_lossy(&said.stderr).contains("`dark red`"), "{said:?}");
    // The same classes are no news.
    let twice =
        w.json(&["merge", "--model", "base", "--adapter", "b/adapter", "--adapter", "b/adapter", "--combine", "svd", "--output", "d"]);
    assert!(!twice["notes"].to_string().contains("classes"), "{twice}");
}

/// A task of several labels answers for all of its classes, whichever order they are named in; others are refused, in lines as well.
#[test]
fn labels_of_a_task_that_marks_several_are_names() {
    let w = world(true);
    let multi = "labels: multi, threshold: each, head: linear,";
    session::train(recipe(&w, 1, "none", multi, TRAIN), Existing::Refuse, &Device::Cpu, &mut Silent).unwrap();
    let ask = |flags: &[&str]| w.json(&[&["predict", "--model", "base", "--adapter", "run1/adapter", "data/red/9.png"], flags].concat());
    let expected = ask(&[]);
    assert_eq!(ask(&["--labels", "blue,green,warm,red"]), expected);
    let other = ["predict", "--model", "base", "--adapter", "run1/adapter", "data/red/9.png", "--labels", "red,green,blue"];
    assert!(w.fails(&other, 2).contains("`warm`"));
    let line = |labels: &str| format!("{{\"image\": \"data/red/9.png\", \"adapter\": \"run1/adapter\", \"labels\": {labels}}}\n");
    let plain = "{\"image\": \"data/red/9.png\", \"labels\": [\"a\", \"b\"], \"text\": \"a red thing\"}\n";
    w.write("lines.jsonl", &(line("[\"blue\", \"warm\", \"green\", \"red\"]") + &line("[\"red\", \"blue\"]") + plain));
    let out = String::from_utf8(w.peft(&["predict", "--model", "base", "--jsonl", "lines.jsonl"]).stdout).unwrap();
    let answers: Vec<Value> = out.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(answers[0]["prediction"], expected[0]["prediction"], "{out}");
    assert!(answers[1]["error"].to_string().contains("`warm`") && answers[2]["error"].to_string().contains("text"), "{out}");
}
