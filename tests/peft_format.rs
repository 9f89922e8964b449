//! HF PEFT's adapters here, and ours there, over methods and configurations (`scripts/reference/hf_peft.py`).
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use peft::clip::source::Source;
use peft::clip::{Clip, ClipConfig, TextBatch, weights};
use peft::delta::{self, Delta, Manifest};
use peft_adapters::Step;

fn dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/peft").join(name)
}

fn base() -> Clip {
    let config = ClipConfig::from_json("base", &std::fs::read(dir("base/config.json")).unwrap()).unwrap();
    let found = weights::load(&Source::Dir(dir("base")), &config).unwrap();
    Clip::new(&config, found.tensors, DType::F32, &Device::Cpu).unwrap()
}

fn relative(a: &Tensor, b: &Tensor) -> f32 {
    let max = |t: &Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    max(&(a - b).unwrap()) / max(b)
}

/// Features with the adapter against those that HF PEFT gave.
fn check(clip: &Clip, adapter: &Path) -> delta::Adapters {
    let read = |path: PathBuf| candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let (inputs, golden) = (read(dir("inputs.safetensors")), read(adapter.join("golden.safetensors")));
    let mut loaded = Delta::read(adapter).unwrap().apply(clip).unwrap_or_else(|e| panic!("{}: {e}", adapter.display()));
    loaded.view.prepare(&Step::eval()).unwrap();
    let ids: Vec<Vec<u32>> = inputs["ids"].to_dtype(DType::U32).unwrap().to_vec2().unwrap();
    let batch = TextBatch::new(&ids, None, &clip.config().text, &Device::Cpu).unwrap();
    let images = clip.image_features(&inputs["pixels"], &loaded.view).unwrap();
    let texts = clip.text_features(&batch, &loaded.view).unwrap();
    let off = relative(&images, &golden["image_features"]).max(relative(&texts, &golden["text_features"]));
    assert!(off < 1e-4, "{}: {off}", adapter.display());
    loaded
}

/// The cases under `tests/data/peft` that `ours` says: written by this project, or by HF PEFT.
fn cases(ours: bool) -> Vec<PathBuf> {
    let all = std::fs::read_dir(dir("")).unwrap().map(|e| e.unwrap().path());
    let found: Vec<PathBuf> =
        all.filter(|p| p.join("adapter_config.json").exists() && p.display().to_string().contains("/ours-") == ours).collect();
    assert!(found.len() > 15, "{found:?}");
    found
}

#[test]
fn adapters_of_hf_peft_give_its_features() {
    let clip = base();
    for case in cases(false) {
        let loaded = check(&clip, &case);
        // Written again by us they still are the same adapter.
        let tmp = tempfile::tempdir().unwrap();
        let again = tmp.path().join("again");
        delta::save(&again, &loaded, clip.sites(), &Manifest::default()).unwrap();
        std::fs::copy(case.join("golden.safetensors"), again.join("golden.safetensors")).unwrap();
        check(&clip, &again);
    }
}

/// `tests/data/peft/ours-*` were written by this project and loaded by HF PEFT, which computed their features.
#[test]
fn our_adapters_have_the_features_that_hf_peft_computes() {
    let clip = base();
    for adapter in cases(true) {
        check(&clip, &adapter);
    }
}

const OURS: &[(&str, &str)] = &[
    ("towers", "lora: { rank: 3, alpha: 5, targets: [q_proj, fc1], towers: vision }"),
    ("layers", "lora: { rank: 2, alpha: 4, targets: [v_proj, out_proj], layers: { last: 1 }, rslora: true }"),
    (
        "patterns",
        "lora: { rank: 4, targets: [k_proj, fc2, visual_projection], rank_pattern: { fc2: 2, layers.0.self_attn.k_proj: 3 }, alpha_pattern: { k_proj: 7 }, modules_to_save: [final_layer_norm] }",
    ),
    ("bias", "lora: { rank: 2, targets: [q_proj, fc1], towers: text, bias: all }"),
    ("tables", "lora: { rank: 3, targets: [patch_embedding, token_embedding, position_embedding, fc1], bias: lora_only }"),
    ("plus", "lora_plus: { rank: 2, targets: [v_proj] }"),
    ("dora", "dora: { rank: 3, alpha: 5, targets: [q_proj, fc2, visual_projection], bias: lora_only }"),
    ("dora-tables", "dora: { rank: 2, targets: [patch_embedding, token_embedding, k_proj], rslora: true }"),
    ("pissa", "pissa: { rank: 3, targets: [q_proj, fc1], rank_pattern: { fc1: 2 } }"),
    ("olora", "olora: { rank: 2, rslora: true, alpha_pattern: { v_proj: 3 }, modules_to_save: [text_projection] }"),
    ("ia3", "ia3: {}"),
    ("ia3-towers", "ia3: { targets: [out_proj, fc1], feedforward: [out_proj], towers: vision, layers: [1] }"),
    ("ln", "ln_tuning: { towers: text }"),
    ("ln-all", "ln_tuning: { modules_to_save: [visual_projection] }"),
    ("vera", "vera: { rank: 5, targets: [q_proj, fc1], towers: vision }"),
    ("vera-seed", "vera: { rank: 7, save_projection: false, projection_prng_key: 11, bias: lora_only }"),
    ("loha", "loha: { rank: 3, alpha: 4, targets: [fc1, out_proj], rank_pattern: { fc1: 2 } }"),
    ("lokr", "lokr: { rank: 1, targets: [q_proj, fc2], decompose_both: true, decompose_factor: 4 }"),
    ("lokr-whole", "lokr: { rank: 9, targets: [v_proj, visual_projection] }"),
    ("adalora", "adalora: { init_r: 4, target_r: 2 }"),
    ("adalora-ranks", "adalora: { init_r: 5, target_r: 3, targets: [v_proj, fc1], bias: lora_only }"),
];

/// Writes `ours-*` anew, for the script: `cargo test --test peft_format -- --ignored`.
#[test]
#[ignore = "writes goldens"]
fn write_ours() {
    let clip = base();
    for (name, yaml) in OURS {
        let method = serde_saphyr::from_str(yaml).unwrap();
        let adapters = delta::Adapters::plan(&[method], clip.sites(), 7, &Device::Cpu).unwrap();
        for (i, p) in adapters.params.iter().filter(|p| !p.frozen).enumerate() {
            let mut rng = peft_adapters::rng::rng(8, &[peft_adapters::rng::name_key(&p.name)]);
            let noise = peft_adapters::rng::normal(&mut rng, 0.1, p.var.shape(), DType::F32, &Device::Cpu).unwrap();
            p.var.set(&(p.var.as_tensor().detach() + noise).unwrap()).unwrap();
            if *name == "adalora-ranks" && p.name.ends_with("lora_E") {
                // As training masks them: none of one layer is left.
                let kept: Vec<f32> = (0..5).map(|k| f32::from(u8::from(i != 2 && (i + k) % 3 != 0))).collect();
                let kept = Tensor::from_vec(kept, (5, 1), &Device::Cpu).unwrap();
                p.var.set(&(p.var.as_tensor().detach() * kept).unwrap()).unwrap();
            }
        }
        delta::save(&dir(&format!("ours-{name}")), &adapters, clip.sites(), &Manifest::default()).unwrap();
    }
}

/// HF PEFT's fields that change the result and are not implemented here; a default is no request.
#[test]
fn fields_that_are_not_implemented_are_refused() {
    for (case, key, value) in [
        ("dora", "lora_bias", "true"),
        ("dora", "target_parameters", "[\"q_proj.weight\"]"),
        ("plain", "trainable_token_indices", "[1]"),
        ("plain", "layer_replication", "[[0, 1]]"),
        ("ia3", "fan_in_fan_out", "true"),
        ("ln_tuning", "layers_pattern", "\"h\""),
        ("vera", "fan_in_fan_out", "true"),
        ("loha", "use_effective_conv2d", "true"),
        ("lokr", "use_effective_conv2d", "true"),
        ("adalora", "use_rslora", "true"),
        ("adalora", "alpha_pattern", "{\"q_proj\": 3}"),
        ("adalora", "init_lora_weights", "\"pissa\""),
    ] {
        let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(dir(case).join("adapter_config.json")).unwrap()).unwrap();
        assert!(peft_adapters::registry::from_adapter_config(&config).is_ok(), "{case}");
        config[key] = serde_json::from_str(value).unwrap();
        let message = peft_adapters::registry::from_adapter_config(&config).unwrap_err().to_string();
        assert!(message.contains(key), "{case}: {message}");
    }
}

#[test]
fn adapters_that_do_not_fit_are_refused_in_one_error() {
    let clip = base();
    let broken = |change: &dyn Fn(&Path)| {
        let tmp = tempfile::tempdir().unwrap();
        let copy = tmp.path().join("adapter");
        std::fs::create_dir(&copy).unwrap();
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            std::fs::copy(dir("plain").join(name), copy.join(name)).unwrap();
        }
        change(&copy);
        let error = Delta::read(&copy).and_then(|d| d.apply(&clip)).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        error.to_string()
    };
    let config = |from: &str, to: &str| {
        let (from, to) = (from.to_string(), to.to_string());
        move |d: &Path| {
            let path = d.join("adapter_config.json");
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.contains(&from));
            std::fs::write(path, text.replace(&from, &to)).unwrap();
        }
    };
    let tensors = |change: fn(&mut Vec<(String, Tensor)>)| {
        move |d: &Path| {
            let path = d.join("adapter_model.safetensors");
            let (mut all, _) = weights::read_safetensors("", &std::fs::read(&path).unwrap()).unwrap();
            change(&mut all);
            weights::save(&path, &all).unwrap();
        }
    };
    let holds = |message: String, part: &str| assert!(message.contains(part), "{message}");
    holds(broken(&config("\"r\": 4", "\"r\": 5")), "expected [5, ");
    holds(broken(&config("\"use_dora\": false", "\"use_dora\": true")), "lora_magnitude_vector");
    holds(broken(&config("\"lora_bias\": false", "\"lora_bias\": true")), "lora_bias");
    holds(broken(&config("\"bias\": \"none\"", "\"bias\": \"some\"")), "bias");
    holds(broken(&config("\"init_lora_weights\": true", "\"init_lora_weights\": \"pissa\"")), "path_initial_model_for_weight_conversion");
    holds(broken(&config("\"layers_pattern\": null", "\"layers_pattern\": \"h\"")), "expected `layers`");
    holds(broken(&config("\"peft_type\": \"LORA\"", "\"peft_type\": \"OFT\"")), "OFT");
    holds(broken(&config("\"q_proj\"", "\"query\"")), "unexpected: base_model.model.");
    holds(broken(&tensors(|t| drop(t.pop()))), "missing: ");
    holds(broken(&tensors(|t| t[0].1 = (&t[0].1 * f64::NAN).unwrap())), "not finite");
    holds(broken(&tensors(|t| t[0].1 = t[0].1.to_dtype(DType::I64).unwrap())), "expected floats");
    holds(broken(&|d| std::fs::write(d.join("adapter_model.safetensors"), b"short").unwrap()), "safetensors file");
    holds(broken(&|d| std::fs::write(d.join("adapter_config.json"), b"{").unwrap()), "adapter_config.json");
}
