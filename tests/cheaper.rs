//! What makes a step cheaper or smaller changes no result.
#![allow(clippy::unwrap_used)]

mod common;

use common::{World, read};

/// The losses of a run's steps.
fn losses(w: &World, run: &str) -> Vec<f64> {
    let text = String::from_utf8(read(&w.path(run).join("metrics.jsonl"))).unwrap();
    text.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["loss"].as_f64().unwrap()).collect()
}

fn train(w: &World, run: &str, sets: &[&str]) -> Vec<f64> {
    let sets: Vec<&str> = sets.iter().flat_map(|s| ["--set", s]).collect();
    w.json(&[&["train", "recipe.yaml", "--output", run], sets.as_slice()].concat());
    losses(w, run)
}

fn close(a: &[f64], b: &[f64], tolerance: f64) {
    assert!(a.len() == b.len() && a.len() > 4);
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() <= tolerance * a.abs(), "{a} {b}");
    }
}

const LAST_BLOCK: &str = "method={lora: {rank: 2, layers: {last: 1}}}";

#[test]
fn kept_activations_give_the_same_losses() {
    let w = World::new();
    let plain = train(&w, "plain", &[LAST_BLOCK, "train.activation_cache={memory_mib: 0}"]);
    let memory = train(&w, "memory", &[LAST_BLOCK]);
    close(&plain, &memory, 1e-5);

    let disk = "train.activation_cache={memory_mib: 0, disk_mib: 10, directory: kept}";
    assert_eq!(train(&w, "disk", &[LAST_BLOCK, disk]), memory);
    let kept = || {
        let mut files: Vec<_> = std::fs::read_dir(w.path("kept")).unwrap().map(|f| f.unwrap().path()).collect();
        files.sort();
        files
    };
    let files = kept();
    assert_eq!(files.len(), 2, "one for train, one for validation: {files:?}");
    assert_eq!(train(&w, "disk2", &[LAST_BLOCK, disk, "train.lr=1.0e-2"]), memory, "found again");
    assert_eq!(kept(), files);
    // Another image, another name.
    std::fs::copy(w.path("data/red/1.png"), w.path("data/red/0.png")).unwrap();
    train(&w, "disk3", &[LAST_BLOCK, disk]);
    assert!(kept().len() > files.len());
}

/// A file that lost its end is not believed.
#[test]
fn a_truncated_cache_is_made_again() {
    let w = World::new();
    let disk = "train.activation_cache={memory_mib: 0, disk_mib: 10, directory: kept}";
    let first = train(&w, "first", &[LAST_BLOCK, disk]);
    for file in std::fs::read_dir(w.path("kept")).unwrap() {
        let path = file.unwrap().path();
        let bytes = read(&path);
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    }
    assert_eq!(train(&w, "second", &[LAST_BLOCK, disk]), first);
}

#[test]
fn augmentation_keeps_activations_out() {
    let w = World::new();
    let sets = [LAST_BLOCK, "train.augment={flip: true}", "train.activation_cache={memory_mib: 0, disk_mib: 10, directory: kept}"];
    train(&w, "run", &sets);
    let files = std::fs::read_dir(w.path("kept")).unwrap().count();
    assert_eq!(files, 1, "validation images are not augmented, training images are");
}

#[test]
fn checkpointing_gives_the_same_losses() {
    let w = World::new();
    for method in [
        "method={lora: {rank: 2, dropout: 0.3}}",
        "method={dora: {rank: 2, dropout: 0.3}}",
        "method=full",
        "method={bottleneck: {reduction: 4}}",
        LAST_BLOCK,
    ] {
        let plain = train(&w, "plain", &[method, "train.lr=1.0e-3"]);
        let saved = train(&w, "saved", &[method, "train.lr=1.0e-3", "train.checkpointing=true"]);
        close(&plain, &saved, 1e-5);
        for run in ["plain", "saved"] {
            std::fs::remove_dir_all(w.path(run)).unwrap();
        }
    }
}

/// GradCache: the contrastive batch is 8, three images go through the towers at once.
#[test]
fn cached_gradients_are_those_of_the_whole_batch() {
    let w = World::new();
    let rows = |from: usize| -> String {
        let row = |(c, i): (&str, usize)| format!("{{\"image\": \"data/{c}/{i}.png\", \"text\": \"{c} {i}\"}}\n");
        let all = ["red", "green", "blue"].into_iter().flat_map(|c| (from..from + 4).map(move |i| (c, i)));
        all.map(row).collect()
    };
    w.write("train.jsonl", &rows(0));
    w.write("val.jsonl", &rows(4));
    let data = ["data={table: {path: train.jsonl, val: val.jsonl}}", "task=retrieve", "train.lr=1.0e-3", "train.epochs=6"];
    for method in ["method=full", "method={lora: {rank: 2, layers: {last: 1}}}", "method={lora: {rank: 2, dropout: 0.3}}"] {
        let plain = train(&w, "plain", &[data.as_slice(), &[method]].concat());
        let cached = train(&w, "cached", &[data.as_slice(), &[method, "train.grad_cache=3"]].concat());
        close(&plain, &cached, 1e-4);
        for run in ["plain", "cached"] {
            std::fs::remove_dir_all(w.path(run)).unwrap();
        }
    }
    let both = w.fails(&["train", "recipe.yaml", "--set", "train.grad_cache=3", "--set", "train.checkpointing=true"], 2);
    assert!(both.contains("exclude each other"), "{both}");
}

#[test]
fn bench_reports_the_floor() {
    let w = World::new();
    let found = w.json(&["bench", "recipe.yaml", "--steps", "2", "--floor"]);
    assert!(found["floor"]["gflop"].as_f64().unwrap() > 0.0);
    assert!(found["floor"]["seconds"]["median"].as_f64().unwrap() > 0.0 && found["floor"]["multiple"].as_f64().unwrap() > 0.0);
}
