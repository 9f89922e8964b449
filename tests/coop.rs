//! CoOp's benchmarks as they lie on disks, and the shots that CoOp's and CLIP-LoRA's own code draws.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

mod common;

use common::World;
use peft::data::{CoopConfig, DataConfig, Dataset, Draw, Example};
use serde_json::{Value, json};

/// Written by `scripts/goldens/coop.py` with Python's `random`.
fn goldens() -> Value {
    serde_json::from_str(include_str!("data/coop/draws.json")).unwrap()
}

fn touch(path: &Path) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, b"").unwrap();
}

fn config(root: PathBuf, draw: Draw, shots: Option<usize>) -> DataConfig {
    DataConfig { coop: Some(CoopConfig { root, split: None, images: None, draw }), shots, ..Default::default() }
}

fn ids(examples: &[Example]) -> Value {
    json!(examples.iter().map(|e| e.id.as_str()).collect::<Vec<_>>())
}

#[test]
fn the_same_shots_as_python_draws() {
    let golden = goldens();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("split_zhou_Made.json"), golden["split"].to_string()).unwrap();
    // Where the images start is found by looking.
    touch(&dir.path().join("pictures/deep").join(golden["split"]["train"][0][0].as_str().unwrap()));
    for draw in golden["draws"].as_array().unwrap() {
        let order = if draw["draw"] == "coop" { Draw::Coop } else { Draw::ClipLora };
        let shots = draw["shots"].as_u64().unwrap() as usize;
        let data = config(dir.path().into(), order, Some(shots)).open(draw["seed"].as_u64().unwrap()).unwrap();
        assert_eq!((ids(&data.train), ids(&data.val)), (draw["train"].clone(), draw["val"].clone()), "{shots} shots");
        assert_eq!(data.test.len(), 8);
    }
    let all = config(dir.path().into(), Draw::Coop, None).open(0).unwrap();
    assert_eq!((all.train.len(), all.val.len()), (454, 105));
    assert_eq!((all.classes.len(), all.classes[7].as_str(), all.train[0].label), (8, "class 7", Some(7)));
    assert!(format!("{:?}", all.train[0].image).contains("pictures/deep/a/c7/000.jpg"));
}

fn imagenet(root: &Path) -> Dataset {
    config(root.into(), Draw::ClipLora, Some(16)).open(1).unwrap()
}

/// Two classes of ImageNet are called `sunglasses`, two `missile`; their prompts are the same, the classes are not.
#[test]
fn imagenet_draws_both_splits_at_once_and_may_repeat_names() {
    let golden = goldens();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("classnames.txt"), "n03 sunglasses\nn00 sunglasses\nn01 unused\n").unwrap();
    for (folder, count) in [("n00", 30), ("n03", 200)] {
        (0..count).for_each(|i| touch(&dir.path().join(format!("images/train/{folder}/{i:03}.jpg"))));
        touch(&dir.path().join(format!("images/val/{folder}/x.JPEG")));
    }
    let data = imagenet(dir.path());
    let renamed = |split: &str| json!(golden["imagenet"][split].as_array().unwrap().iter().map(renamed).collect::<Vec<_>>());
    assert_eq!((ids(&data.train), ids(&data.val)), (renamed("train"), renamed("val")));
    assert_eq!((data.test.len(), data.classes), (2, vec!["sunglasses".to_string(); 2]));
    assert!(data.notes.iter().any(|n| n.contains("same prompt")), "{:?}", data.notes);
    // CLIP-LoRA keeps `train` and `val` without `images` above.
    std::fs::rename(dir.path().join("images/train"), dir.path().join("train")).unwrap();
    std::fs::rename(dir.path().join("images/val"), dir.path().join("val")).unwrap();
    assert_eq!(ids(&imagenet(dir.path()).train), renamed("train"));
}

/// `a/c3/007.jpg` is `train/n03/007.jpg` on this disk.
fn renamed(path: &Value) -> String {
    path.as_str().unwrap().replace("a/c", "train/n0")
}

#[test]
fn aircraft_comes_with_lists_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("variants.txt"), "707-320\nA300B4 long\n").unwrap();
    for (split, text) in
        [("train", "0034309 A300B4 long\n0034310 707-320\n"), ("val", "1 707-320\n"), ("test", "2 707-320\n3 A300B4 long\n")]
    {
        std::fs::write(dir.path().join(format!("images_variant_{split}.txt")), text).unwrap();
    }
    let data = config(dir.path().into(), Draw::Coop, None).open(0).unwrap();
    assert_eq!((data.train.len(), data.val.len(), data.test.len()), (2, 1, 2));
    assert_eq!((data.train[0].id.as_str(), data.train[0].label), ("0034309.jpg", Some(1)));
}

#[test]
fn what_is_missing_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let message = || config(dir.path().into(), Draw::Coop, None).open(0).unwrap_err().to_string();
    assert!(message().contains("split_zhou_<Dataset>.json"));
    std::fs::write(dir.path().join("split_zhou_A.json"), r#"{"train": [["x/1.jpg", 0, "cat"], ["x/2.jpg", 0, "dog"]], "test": []}"#)
        .unwrap();
    assert!(message().contains("x/1.jpg is neither here"));
    touch(&dir.path().join("images/x/1.jpg"));
    assert!(message().contains("label 0 is `cat` and, at x/2.jpg, `dog`"));
    std::fs::write(dir.path().join("split_zhou_A.json"), r#"{"train": [["x/1.jpg", 0]]}"#).unwrap();
    assert!(message().contains("expected {\"train\""));
    std::fs::write(dir.path().join("split_zhou_B.json"), "{}").unwrap();
    assert!(message().contains("several splits"));
}

/// One of the CLIP-LoRA recipes through the binary, on a small base and few images: the paper's way of training works as it stands.
#[test]
fn a_clip_lora_recipe_runs_on_a_split_of_coops() {
    let w = World::new();
    let item = |class: &str, label: u32, i: usize| json!([format!("{class}/{i}.png"), label, format!("{class} thing")]);
    let items = |range: std::ops::Range<usize>| -> Value {
        json!(range.flat_map(|i| [item("red", 0, i), item("green", 1, i), item("blue", 2, i)]).collect::<Vec<_>>())
    };
    let split = json!({"train": items(0..5), "val": items(5..7), "test": items(7..10)});
    w.write("split_zhou_DescribableTextures.json", &split.to_string());
    let text = w.json(&["recipes", "clip-lora/dtd"])["text"].as_str().unwrap().to_string();
    w.write("dtd.yaml", &text);
    let small =
        ["--set", "model=base", "--set", "data.coop.root=.", "--set", "data.shots=4", "--set", "train.steps=40", "--set", "train.lr=0.02"];
    let report = w.json(&[&["train", "dtd.yaml"], &small[..]].concat());
    assert!(report["after"]["accuracy"].as_f64().unwrap() > report["before"]["accuracy"].as_f64().unwrap(), "{report}");
    // 12 images make one step an epoch; nothing is chosen but the last weights.
    assert_eq!((&report["steps"], &report["best_epoch"]), (&json!(40), &json!(40)));
    assert_eq!(w.json(&["eval", "runs/clip-lora/dtd"])["examples"], 9);
    assert_eq!(w.json(&["data", "runs/clip-lora/dtd"])["splits"], json!({"train": 12, "val": 12, "test": 9}));
}
