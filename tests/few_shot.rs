//! Prompt and feature methods against their authors' code (`scripts/reference/few_shot.py`).
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use peft::clip::model::{class_logits, cosine_logits, unit_rows};
use peft::clip::source::Source;
use peft::clip::{Clip, ClipConfig, TextBatch, weights};
use peft::delta::{Adapters, Delta};
use peft_adapters::{ClassFeatures, ClassName, Labelled, Patches, Step};

fn dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/few_shot").join(name)
}

fn base() -> Clip {
    let config = ClipConfig::from_json("base", &std::fs::read(dir("base/config.json")).unwrap()).unwrap();
    let found = weights::load(&Source::Dir(dir("base")), &config).unwrap();
    Clip::new(&config, found.tensors, DType::F32, &Device::Cpu).unwrap()
}

struct Case {
    golden: HashMap<String, Tensor>,
    adapters: Adapters,
}

fn case(clip: &Clip, name: &str) -> Case {
    let golden = candle_core::safetensors::load(dir(name).join("golden.safetensors"), &Device::Cpu).unwrap();
    let mut adapters = Delta::read(&dir(name)).unwrap().apply(clip).unwrap();
    adapters.view.prepare(&Step::eval()).unwrap();
    Case { golden, adapters }
}

fn relative(a: &Tensor, b: &Tensor) -> f32 {
    let max = |t: &Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    max(&(a - b).unwrap()) / max(b)
}

/// Class prompts of the golden, once for each of `times` images.
fn prompts(golden: &HashMap<String, Tensor>, clip: &Clip, times: usize) -> TextBatch {
    let ids: Vec<Vec<u32>> = golden["ids"].to_dtype(DType::U32).unwrap().to_vec2().unwrap();
    let names: Vec<Vec<u32>> = golden["names"].to_dtype(DType::U32).unwrap().to_vec2().unwrap();
    let names: Vec<ClassName> = names.iter().map(|n| ClassName { class: n[0], start: n[1], len: n[2] }).collect();
    TextBatch::new(&vec![ids; times].concat(), None, &clip.config().text, &Device::Cpu).unwrap().with_names(names.repeat(times))
}

fn classes(golden: &HashMap<String, Tensor>, clip: &Clip, images: &Tensor, patches: &Patches) -> ClassFeatures {
    if !patches.per_image() {
        return ClassFeatures::Shared(clip.text_features(&prompts(golden, clip, 1), patches).unwrap());
    }
    let (count, width) = images.dims2().unwrap();
    let batch = prompts(golden, clip, count);
    let each = batch.ids.dim(0).unwrap() / count;
    let own = unit_rows(images).unwrap().unsqueeze(1).unwrap().broadcast_as((count, each, width)).unwrap();
    let batch = batch.with_images(own.reshape((count * each, width)).unwrap());
    ClassFeatures::PerImage(clip.text_features(&batch, patches).unwrap().reshape((count, each, width)).unwrap())
}

#[test]
fn features_and_logits_are_those_of_the_authors_code() {
    let clip = base();
    let all = [
        "vpt_shallow",
        "vpt_deep",
        "coop_end",
        "coop_middle",
        "coop_front",
        "cocoop",
        "maple",
        "maple_shallow",
        "clip_adapter",
        "prolip",
        "tip_adapter",
    ];
    for name in all {
        let Case { golden, adapters } = case(&clip, name);
        let images = clip.image_features(&golden["pixels"], &adapters.view).unwrap();
        let classes = classes(&golden, &clip, &images, &adapters.view);
        let (ClassFeatures::Shared(texts) | ClassFeatures::PerImage(texts)) = &classes;
        let logits = class_logits(&clip, &images, &classes, &adapters.view).unwrap();
        for (found, key) in [(&images, "image_features"), (texts, "text_features"), (&logits, "logits")] {
            let off = relative(found, &golden[key]);
            assert!(off < 1e-4, "{name}: {key}: {off}");
        }
        // The case shows something.
        let plain = clip.image_features(&golden["pixels"], &Patches::none()).unwrap();
        let plain_texts = clip.text_features(&prompts(&golden, &clip, 1), &Patches::none()).unwrap();
        let base = clip.logits(&plain, &plain_texts, &Patches::none()).unwrap();
        assert!(relative(&base, &golden["logits"]) > 1e-2, "{name}");
    }
}

#[test]
fn prolip_is_held_by_the_authors_term() {
    let Case { golden, adapters } = case(&base(), "prolip");
    let found = adapters.view.regulariser().unwrap().unwrap().to_scalar::<f32>().unwrap();
    let expected = golden["regulariser"].to_scalar::<f32>().unwrap();
    assert!((found - expected).abs() < 1e-5 * expected, "{found} {expected}");
}

#[test]
fn tip_adapter_finds_the_factors_that_the_authors_search_finds() {
    let clip = base();
    let Case { golden, adapters } = case(&clip, "tip_adapter");
    let features = golden["val_features"].clone();
    let classes = classes(&golden, &clip, &features, &adapters.view);
    let logits = cosine_logits(&clip, &features, &classes, &adapters.view).unwrap();
    let val = Labelled { features, labels: golden["val_labels"].to_dtype(DType::U32).unwrap(), logits };
    let patch = adapters.view.iter().next().unwrap();
    let found = patch.tune(&val).unwrap().remove(0).1.to_dtype(DType::F32).unwrap();
    assert!(relative(&found, &golden["searched"]) < 1e-6, "{found} {}", golden["searched"]);
}
