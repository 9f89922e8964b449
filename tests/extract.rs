//! A LoRA of a fully fine-tuned checkpoint.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{Device, Tensor};
use common::World;
use serde_json::{Value, json};

fn number(v: &Value) -> f64 {
    v.as_f64().unwrap_or_else(|| panic!("{v}"))
}

/// A checkpoint whose fully trained layers differ by a matrix of rank 3, and by norms.
fn tuned(w: &World) {
    let mut all = candle_core::safetensors::load(w.path("base/model.safetensors"), &Device::Cpu).unwrap();
    std::fs::create_dir(w.path("tuned")).unwrap();
    for name in ["config.json", "preprocessor_config.json", "tokenizer.json"] {
        std::fs::copy(w.path("base").join(name), w.path("tuned").join(name)).unwrap();
    }
    let mut names: Vec<String> = all.keys().filter(|n| n.contains("vision") && n.ends_with("_proj.weight")).cloned().collect();
    names.sort();
    for (i, name) in names.iter().filter(|n| n.contains("self_attn")).enumerate() {
        let (rows, cols) = all[name].dims2().unwrap();
        let draw = |seed, shape| {
            let mut rng = peft_adapters::rng::rng(seed, &[i as u64]);
            peft_adapters::rng::normal(&mut rng, 0.1, shape, candle_core::DType::F32, &Device::Cpu).unwrap()
        };
        let delta: Tensor = draw(1, (rows, 3)).matmul(&draw(2, (3, cols))).unwrap();
        all.insert(name.clone(), (&all[name] + delta).unwrap());
    }
    for name in ["vision_model.post_layernorm.bias", "vision_model.embeddings.class_embedding", "logit_scale"] {
        let changed = (&all[name] + 0.2).unwrap();
        all.insert(name.into(), changed);
    }
    candle_core::safetensors::save(&all, w.path("tuned/model.safetensors")).unwrap();
}

#[test]
fn a_rank_that_suffices_gives_the_checkpoint_back() {
    let w = World::new();
    tuned(&w);
    let extract = |rest: &[&str]| w.json(&[&["extract", "base", "tuned"], rest].concat());
    let whole = extract(&["--rank", "3", "--rest", "--output", "whole"]);
    let layers = whole["layers"].as_array().unwrap();
    assert_eq!((layers.len(), whole["rest"].as_array().unwrap().len()), (8, 3), "{whole}");
    assert!(layers.iter().all(|l| number(&l["energy"]) > 0.999_99 && l["rank"] == 3), "{whole}");
    assert!(number(&whole["before"]) > 1e-3 && number(&whole["after"]) < 1e-5, "{whole}");
    // Merged it is the checkpoint.
    w.json(&["merge", "--model", "base", "--adapter", "whole", "--output", "merged"]);
    let load = |dir: &str| candle_core::safetensors::load(w.path(dir).join("model.safetensors"), &Device::Cpu).unwrap();
    let (merged, tuned) = (load("merged"), load("tuned"));
    for (name, t) in &tuned {
        let off = (t - &merged[name]).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
        assert!(off < 1e-5, "{name}: {off}");
    }
    // Less of a rank, and without the rest, keeps less.
    let less = extract(&["--rank", "1", "--output", "less"]);
    let energy: Vec<f64> = less["layers"].as_array().unwrap().iter().map(|l| number(&l["energy"])).collect();
    assert!(energy.iter().all(|e| (0.3..0.95).contains(e)), "{energy:?}");
    assert_eq!(less["rest_saved"], json!(false));
    assert!(number(&less["after"]) > 1e-3, "{less}");
    // Alone it is HF PEFT's format.
    let config: Value = serde_json::from_slice(&std::fs::read(w.path("less/adapter_config.json")).unwrap()).unwrap();
    assert_eq!((&config["peft_type"], &config["r"], &config["lora_alpha"]), (&json!("LORA"), &json!(1), &json!(1)));
    // Other targets are part of what is left over.
    let q = extract(&["--rank", "3", "--targets", "q_proj", "--output", "q"]);
    assert_eq!((q["layers"].as_array().unwrap().len(), q["rest"].as_array().unwrap().len()), (2, 9));
    let shown = String::from_utf8(w.peft(&["extract", "base", "tuned", "--rank", "3", "--output", "shown"]).stdout).unwrap();
    for part in ["energy kept", "vision_model.encoder.layers.1.self_attn.v_proj", "3 other tensors have changed, lost", "100.00 %"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
}

#[test]
fn what_cannot_be_extracted_is_said() {
    let w = World::new();
    assert!(w.fails(&["extract", "base", "base", "--rank", "2", "--output", "x"], 2).contains("differs"));
    assert!(w.fails(&["extract", "base", "builtin:tiny", "--rank", "2", "--output", "x"], 2).contains("tensors"));
    assert!(w.fails(&["extract", "base", "base", "--rank", "0", "--output", "x"], 2).contains("at least 1"));
    assert!(w.fails(&["extract", "base", "base", "--rank", "2", "--output", "data"], 2).contains("no adapter"));
    assert!(!w.path("x").exists());
}
