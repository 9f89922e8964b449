//! HF PEFT's adapters here, and ours there (`scripts/goldens/peft_adapters.py`).
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
    let golden = candle_core::safetensors::load(adapter.join("golden.safetensors"), &Device::Cpu).unwrap();
    let mut loaded = Delta::read(adapter).unwrap().apply(clip).unwrap();
    loaded.view.prepare(&Step::eval()).unwrap();
    let ids: Vec<Vec<u32>> = golden["ids"].to_dtype(DType::U32).unwrap().to_vec2().unwrap();
    let batch = TextBatch::new(&ids, None, &clip.config().text, &Device::Cpu).unwrap();
    let images = clip.image_features(&golden["pixels"], &loaded.view).unwrap();
    let texts = clip.text_features(&batch, &loaded.view).unwrap();
    let off = relative(&images, &golden["image_features"]).max(relative(&texts, &golden["text_features"]));
    assert!(off < 1e-4, "{}: {off}", adapter.display());
    loaded
}

#[test]
fn adapters_of_hf_peft_give_its_features() {
    let clip = base();
    for case in ["plain", "patterns", "regex_rslora", "one_layer", "saved_modules", "projections"] {
        let loaded = check(&clip, &dir(case));
        // Written again by us they still are the same adapter.
        let tmp = tempfile::tempdir().unwrap();
        let again = tmp.path().join("again");
        delta::save(&again, &loaded, clip.sites(), &Manifest::default()).unwrap();
        std::fs::copy(dir(case).join("golden.safetensors"), again.join("golden.safetensors")).unwrap();
        check(&clip, &again);
    }
}

/// `tests/data/peft/ours-*` were written by this project and loaded by HF PEFT, which computed their features.
#[test]
fn our_adapters_have_the_features_that_hf_peft_computes() {
    let clip = base();
    let ours: Vec<PathBuf> =
        std::fs::read_dir(dir("")).unwrap().map(|e| e.unwrap().path()).filter(|p| p.display().to_string().contains("/ours-")).collect();
    assert!(ours.len() >= 3, "{ours:?}");
    for adapter in ours {
        check(&clip, &adapter);
    }
}

/// Writes `ours-*` anew, for the script: `cargo test --release --test peft_format -- --ignored`.
#[test]
#[ignore = "writes goldens"]
fn write_ours() {
    let clip = base();
    let recipes = [
        ("ours-towers", "lora: { rank: 3, alpha: 5, targets: [q_proj, fc1], towers: vision }"),
        ("ours-layers", "lora: { rank: 2, alpha: 4, targets: [v_proj, out_proj], layers: { last: 1 }, rslora: true }"),
        (
            "ours-patterns",
            "lora: { rank: 4, targets: [k_proj, fc2, visual_projection], rank_pattern: { fc2: 2, layers.0.self_attn.k_proj: 3 }, alpha_pattern: { k_proj: 7 }, modules_to_save: [final_layer_norm] }",
        ),
    ];
    for (name, yaml) in recipes {
        let method = serde_saphyr::from_str(yaml).unwrap();
        let adapters = delta::Adapters::plan(&[method], clip.sites(), 7, &Device::Cpu).unwrap();
        for p in adapters.params.iter() {
            let mut rng = peft_adapters::rng::rng(8, &[peft_adapters::rng::name_key(&p.name)]);
            let noise = peft_adapters::rng::normal(&mut rng, 0.1, p.var.shape(), DType::F32, &Device::Cpu).unwrap();
            p.var.set(&(p.var.as_tensor().detach() + noise).unwrap()).unwrap();
        }
        delta::save(&dir(name), &adapters, clip.sites(), &Manifest::default()).unwrap();
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
    holds(broken(&config("\"use_dora\": false", "\"use_dora\": true")), "use_dora");
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
