//! Adapters combined as HF PEFT's `add_weighted_adapter` combines them (`scripts/reference/combine.py`).
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use common::World;
use peft::clip::source::Source;
use peft::clip::{Clip, ClipConfig, weights};
use peft::combine::{How, Joined, join, seeded};
use peft::delta::Delta;
use peft::error::Result;
use peft_adapters::MethodConfig;
use serde_json::{Value, json};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn base() -> Clip {
    let dir = data("peft/base");
    let config = ClipConfig::from_json("base", &std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    let found = weights::load(&Source::Dir(dir), &config).unwrap();
    Clip::new(&config, found.tensors, DType::F32, &Device::Cpu).unwrap()
}

fn cases() -> Value {
    serde_json::from_slice(&std::fs::read(data("combine/cases.json")).unwrap()).unwrap()
}

fn adapters(case: &Value) -> Vec<(Delta, f64)> {
    let weights = case["weights"].as_object().unwrap();
    weights.iter().map(|(name, w)| (Delta::read(&data("combine").join(name)).unwrap(), w.as_f64().unwrap())).collect()
}

fn how(case: &Value) -> How {
    How {
        combine: serde_json::from_value(case["combination_type"].clone()).unwrap(),
        density: case["density"].as_f64(),
        majority_sign: case.get("majority_sign_method").map_or_else(Default::default, |m| serde_json::from_value(m.clone()).unwrap()),
        svd_rank: case["svd_rank"].as_u64().map(|r| r as usize),
    }
}

fn max(t: &Tensor) -> f32 {
    t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

fn values(joined: &Joined) -> HashMap<String, Tensor> {
    joined.adapters.params.iter().map(|p| (p.name.clone(), p.var.as_tensor().clone())).collect()
}

/// B A by module, for what is the same in any basis.
fn products(tensors: &HashMap<String, Tensor>) -> HashMap<String, Tensor> {
    let factors = tensors.iter().filter(|(n, _)| n.contains("lora_A") || n.contains("lora_embedding_A"));
    let matrix = |t: &Tensor| t.flatten_from(1).unwrap();
    factors
        .map(|(name, a)| {
            let b = &tensors[&name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")];
            (name.clone(), matrix(b).matmul(&matrix(a)).unwrap())
        })
        .collect()
}

#[test]
fn every_mode_gives_hf_pefts_adapter() {
    let (clip, cases) = (base(), cases());
    for (name, case) in cases["cases"].as_object().unwrap() {
        let golden = candle_core::safetensors::load(data("combine").join(format!("{name}.safetensors")), &Device::Cpu).unwrap();
        let masks = |tensor: &str, adapter: usize, count: usize| -> Result<Vec<bool>> {
            let mask = &golden[&format!("mask.{tensor}.{adapter}")];
            assert_eq!(mask.elem_count(), count, "{tensor}");
            Ok(mask.flatten_all()?.to_vec1::<u8>()?.into_iter().map(|keep| keep == 1).collect())
        };
        let how = how(case);
        let joined = join(&clip, &adapters(case), &how, &masks).unwrap_or_else(|e| panic!("{name}: {e}"));
        let theirs: HashMap<String, Tensor> =
            golden.iter().filter(|(n, _)| !n.starts_with("mask.")).map(|(n, t)| (n.clone(), t.clone())).collect();
        let ours = values(&joined);
        let names = |m: &HashMap<String, Tensor>| {
            let mut all: Vec<String> = m.keys().cloned().collect();
            all.sort();
            all
        };
        assert_eq!(names(&ours), names(&theirs), "{name}");
        // Singular vectors have either sign.
        let cut = how.combine.decomposes() && case["weights"].as_object().unwrap().len() > 1;
        let (ours, theirs) = if cut { (products(&ours), products(&theirs)) } else { (ours, theirs) };
        for (tensor, expected) in &theirs {
            assert_eq!(ours[tensor].dims(), expected.dims(), "{name}: {tensor}");
            let off = max(&(&ours[tensor] - expected).unwrap()) / max(expected);
            assert!(off < if cut { 1e-5 } else { 1e-6 }, "{name}: {tensor} is off by {off}");
        }
        match &joined.adapters.methods[0] {
            MethodConfig::Lora(c) => assert_eq!((json!(c.rank), c.alpha), (case["r"].clone(), c.rank as f64), "{name}"),
            MethodConfig::Ia3(_) => assert!(name.starts_with("ia3") && case["r"].is_null(), "{name}"),
            other => panic!("{name}: {}", other.name()),
        }
    }
}

#[test]
fn what_hf_peft_refuses_is_refused() {
    let clip = base();
    for (name, case) in cases()["refused"].as_object().unwrap() {
        let error = join(&clip, &adapters(case), &how(case), &seeded(0, 1.0)).unwrap_err();
        assert!(case["error"].as_str().unwrap().contains("same r value"));
        assert!(error.to_string().contains("equal ranks") && error.to_string().contains("svd"), "{name}: {error}");
        assert_eq!(error.exit_code(), 2);
    }
}

/// One method's factors mean nothing to another, nor an input's to an output.
#[test]
fn ia3_combines_with_ia3_by_linear() {
    let (clip, weights) = (base(), json!({ "i": 0.5, "j": 0.5 }));
    let refusal = |weights: &Value, mode: &str| {
        let case = json!({ "weights": weights, "combination_type": mode });
        join(&clip, &adapters(&case), &how(&case), &seeded(0, 1.0)).unwrap_err()
    };
    for (weights, mode, expected) in [(&weights, "svd", "--combine linear"), (&json!({ "a": 0.5, "i": 0.5 }), "linear", "IA³ with IA³")] {
        let error = refusal(weights, mode);
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
    let mut all = adapters(&json!({ "weights": weights }));
    let own = r"vision_model\.encoder\.layers\.0\.mlp\.fc2";
    let of = |feedforward: Value| serde_json::from_value(json!({ "ia3": { "targets": own, "feedforward": feedforward } })).unwrap();
    let name = "base_model.model.vision_model.encoder.layers.0.mlp.fc2.ia3_l".to_string();
    let (hidden, width) = (clip.config().vision.intermediate_size, clip.config().vision.hidden_size);
    let factors = |shape: (usize, usize)| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
    all[0].0.methods = vec![(of(json!(["fc2"])), vec![(name.clone(), factors((1, hidden)))])];
    all[1].0.methods = vec![(of(json!([])), vec![(name, factors((width, 1)))])];
    let error = join(&clip, &all, &how(&json!({ "combination_type": "linear" })), &seeded(0, 1.0)).unwrap_err();
    assert!(error.to_string().contains("scales inputs where another"), "{error}");
}

#[test]
fn masks_are_the_seeds_and_keep_the_density() {
    let kept = |seed, name, adapter| seeded(seed, 0.3)(name, adapter, 10_000).unwrap();
    let one = kept(1, "x", 0);
    assert_eq!(one, kept(1, "x", 0));
    assert!([kept(2, "x", 0), kept(1, "y", 0), kept(1, "x", 1)].iter().all(|other| *other != one));
    let share = one.iter().filter(|k| **k).count() as f64 / 1e4;
    assert!((share - 0.3).abs() < 0.02, "{share}");
}

/// Two adapters trained through the binary; what `cat` makes of them is what merging both makes.
#[test]
fn a_combined_adapter_is_an_adapter() {
    let w = World::new();
    w.json(&["train", "recipe.yaml", "--output", "a"]);
    let wider = ["--set", "method={lora: {rank: 3, targets: [q_proj, fc1], towers: vision}}", "--set", "train.seed=5"];
    w.json(&[&["train", "recipe.yaml", "--output", "b"], &wider[..]].concat());
    let adapters = ["--adapter", "a/adapter=0.7", "--adapter", "b/adapter=-0.4"];
    let merge = |rest: &[&str]| w.json(&[&["merge", "--model", "base"], &adapters[..], rest].concat());
    let done = merge(&["--combine", "cat", "--output", "cat"]);
    assert_eq!((&done["rank"], &done["combine"]), (&json!(5), &json!("cat")));
    let svd = merge(&["--combine", "svd", "--output", "svd", "--svd-rank", "5"]);
    assert!(svd["energy"].as_f64().unwrap() > 0.999_999, "{svd}");
    let less = merge(&["--combine", "svd", "--output", "less", "--svd-rank", "1"]);
    assert!(less["energy"].as_f64().unwrap() < 0.999, "{less}");
    merge(&["--output", "merged"]);
    let features = |args: &[&str]| {
        let out = format!("features{}.safetensors", args.concat().replace('/', "-"));
        w.json(&[&["embed", "--images", "data/red", "--output", &out], args].concat());
        candle_core::safetensors::load(w.path(&out), &Device::Cpu).unwrap()["image_embeds"].clone()
    };
    let expected = features(&["--model", "merged"]);
    for (adapter, tolerance) in [("cat", 1e-5), ("svd", 1e-5)] {
        let off = max(&(features(&["--model", "base", "--adapter", adapter]) - &expected).unwrap());
        assert!(off < tolerance, "{adapter}: {off}");
    }
    assert!(max(&(features(&["--model", "base", "--adapter", "less"]) - &expected).unwrap()) > 1e-4);
    // What both say of their classes holds on.
    let ranked = w.json(&["predict", "--model", "base", "--adapter", "cat", "data/red/0.png"]);
    assert_eq!(ranked[0]["predictions"].as_array().unwrap().len(), 3);

    let fails = |rest: &[&str]| w.fails(&[&["merge", "--model", "base"], &adapters[..], rest].concat(), 2);
    assert!(fails(&["--combine", "linear", "--output", "x"]).contains("equal ranks"));
    assert!(fails(&["--combine", "ties", "--output", "x"]).contains("--density 0.5"));
    assert!(fails(&["--combine", "ties_svd", "--density", "1.5", "--output", "x"]).contains("at most 1"));
    assert!(fails(&["--combine", "svd", "--density", "0.5", "--output", "x"]).contains("keeps everything"));
    assert!(fails(&["--combine", "cat", "--svd-rank", "2", "--output", "x"]).contains("choose a rank"));
    assert!(fails(&["--combine", "cat", "--output", "cat"]).contains("--force"));
    assert!(fails(&["--combine", "cat", "--output", "data"]).contains("no adapter"));
    assert!(fails(&["--combine", "cat", "--output", "a/adapter", "--force"]).contains("one of the adapters"));
    w.json(&["train", "recipe.yaml", "--output", "i", "--set", "method=ia3"]);
    let ia3 = ["merge", "--model", "base", "--adapter", "i/adapter", "--adapter", "a/adapter", "--combine", "cat", "--output", "x"];
    assert!(w.fails(&ia3, 2).contains("expected a LoRA, found ia3"));
    let halves = ["--adapter", "i/adapter=0.5", "--adapter", "i/adapter=0.5", "--combine", "linear", "--output", "halves"];
    assert!(w.json(&[&["merge", "--model", "base"], &halves[..]].concat())["rank"].is_null());
    let [same, expected] = ["halves", "i/adapter"].map(|adapter| features(&["--model", "base", "--adapter", adapter]));
    assert!(max(&(same - &expected).unwrap()) < 1e-6);
    assert!(!w.path("x").exists());
}
