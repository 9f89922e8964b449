//! What was merged comes out again, where that is defined.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use common::World;

fn weights(w: &World, model: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(w.path(model).join("model.safetensors"), &Device::Cpu).unwrap()
}

fn max(t: &Tensor) -> f32 {
    t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// The largest difference of a tensor, relative to the tensor.
fn off(a: &HashMap<String, Tensor>, b: &HashMap<String, Tensor>) -> f32 {
    a.iter().map(|(n, t)| max(&(t - &b[n]).unwrap()) / max(t).max(1e-6)).fold(0.0, f32::max)
}

#[test]
fn base_merge_undo_is_the_base() {
    let w = World::new();
    let base = weights(&w, "base");
    for (name, method) in [
        ("lora", "lora: {rank: 2, targets: [q_proj, fc1, patch_embedding, token_embedding]}"),
        ("vera", "vera: {rank: 4}"),
        ("loha", "loha: {rank: 2}"),
        ("lokr", "lokr: {rank: 2}"),
        ("adalora", "adalora: {init_r: 3, target_r: 2}"),
        ("ia3", "ia3: {}"),
        ("pissa", "pissa: {rank: 2}"),
    ] {
        w.json(&["train", "recipe.yaml", "--set", &format!("method={{{method}}}"), "--set", "train.lr=0.05", "--output", name]);
        for share in ["", "=0.6"] {
            let adapter = format!("{name}/adapter{share}");
            w.json(&["merge", "--model", "base", "--adapter", &adapter, "--output", "merged", "--force"]);
            let done = w.json(&["merge", "--model", "merged", "--undo", &adapter, "--output", "back", "--force"]);
            let (before, after) = (off(&base, &weights(&w, "merged")), off(&base, &weights(&w, "back")));
            assert!(before > 1e-3 && after < 1e-5, "{adapter}: {before}, then {after}");
            assert!(done["changed_tensors"].as_u64().unwrap() > 0 && done["rounding"].as_f64().unwrap() < 1e-5, "{done}");
        }
    }
    // Methods of one adapter, and adapters, in reverse order.
    w.json(&["train", "recipe.yaml", "--set", "method=[{ia3: {}}, {lora: {rank: 2}}]", "--set", "train.lr=0.05", "--output", "two"]);
    w.json(&["merge", "--model", "base", "--adapter", "two/adapter", "--adapter", "lora/adapter", "--output", "merged", "--force"]);
    w.json(&["merge", "--model", "merged", "--undo", "lora/adapter", "--output", "back", "--force"]);
    w.json(&["merge", "--model", "back", "--undo", "two/adapter", "--output", "first"]);
    assert!(off(&base, &weights(&w, "first")) < 1e-5);
}

#[test]
fn what_is_lost_is_not_made_up() {
    let w = World::new();
    for (method, part) in [
        ("full: {targets: [fc1]}", "the old ones are nowhere"),
        ("dora: {rank: 2}", "new length"),
        ("bitfit: {}", "the old ones are nowhere"),
        ("ln_tuning: {}", "the old ones are nowhere"),
        ("svd: {}", "singular values"),
        ("lora: {rank: 2, bias: lora_only}", "the old one is nowhere"),
        ("loha: {rank: 2, modules_to_save: [visual_projection]}", "the old one is nowhere"),
        ("prefix: {}", "never merged"),
    ] {
        let set = format!("method={{{method}}}");
        w.json(&["train", "recipe.yaml", "--set", &set, "--set", "train.epochs=1", "--force"]);
        let message = w.fails(&["merge", "--model", "base", "--undo", "run/adapter", "--output", "back"], 2);
        assert!(message.contains(part) && !w.path("back").exists(), "{method}: {message}");
    }
    w.json(&["train", "recipe.yaml", "--set", "method=ia3", "--force"]);
    let file = w.path("run/adapter/adapter_model.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    let name = tensors.keys().next().unwrap().clone();
    tensors.insert(name.clone(), tensors[&name].zeros_like().unwrap());
    candle_core::safetensors::save(&tensors, &file).unwrap();
    let message = w.fails(&["merge", "--model", "base", "--undo", "run/adapter", "--output", "back"], 2);
    assert!(message.contains("by zero"), "{message}");
}

#[test]
fn less_than_f32_needs_consent() {
    let w = World::new();
    w.json(&["train", "recipe.yaml"]);
    w.json(&["merge", "--model", "base", "--adapter", "run/adapter", "--output", "half", "--dtype", "f16"]);
    let message = w.fails(&["merge", "--model", "half", "--undo", "run/adapter", "--output", "back"], 2);
    assert!(message.contains("f16") && message.contains("--dtype f16"), "{message}");
    let done = w.json(&["merge", "--model", "half", "--undo", "run/adapter", "--output", "back", "--dtype", "f16"]);
    assert!(done["notes"].to_string().contains("rounding"), "{done}");
    let back = weights(&w, "back").into_iter().map(|(n, t)| (n, t.to_dtype(DType::F32).unwrap())).collect();
    let off = off(&weights(&w, "base"), &back);
    assert!(off > 1e-6 && off < 2e-3, "{off}");
}
