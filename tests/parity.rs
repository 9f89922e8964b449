//! The towers against transformers (`scripts/goldens/clip.py`) and candle-transformers.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::clip as oracle;
use peft::clip::source::Source;
use peft::clip::{Clip, ClipConfig, TextBatch, weights};
use peft_adapters::Patches;

const CASES: [&str; 7] = ["quick", "gelu", "odd_patches", "margin", "legacy_eos", "eps", "bf16"];

fn dir(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/clip").join(case)
}

fn load(case: &str) -> (Clip, std::collections::HashMap<String, Tensor>) {
    let dir = dir(case);
    let config = ClipConfig::from_json(case, &std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    let found = weights::load(&Source::Dir(dir.clone()), &config).unwrap();
    let clip = Clip::new(&config, found.tensors, DType::F32, &Device::Cpu).unwrap();
    let golden = candle_core::safetensors::load(dir.join("golden.safetensors"), &Device::Cpu).unwrap();
    (clip, golden)
}

fn relative(a: &Tensor, b: &Tensor) -> f32 {
    let max = |t: &Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    max(&(a - b).unwrap()) / max(b)
}

fn ids(golden: &Tensor) -> Vec<Vec<u32>> {
    golden.to_dtype(DType::U32).unwrap().to_vec2().unwrap()
}

#[test]
fn features_and_logits_equal_transformers() {
    for case in CASES {
        let (clip, golden) = load(case);
        let none = Patches::none();
        let batch = TextBatch::new(&ids(&golden["ids"]), None, &clip.config().text, &Device::Cpu).unwrap();
        let images = clip.image_features(&golden["pixels"], &none).unwrap();
        let texts = clip.text_features(&batch, &none).unwrap();
        let logits = clip.logits(&images, &texts, &none).unwrap();
        let masked = clip.text_features(&batch.with_mask(&golden["mask"]).unwrap(), &none).unwrap();
        for (what, ours) in [("image_features", images), ("text_features", texts), ("logits", logits), ("masked_text_features", masked)] {
            let off = relative(&ours, &golden[what]);
            assert!(off < 1e-4, "{case}: {what} differs by {off}");
        }
    }
}

#[test]
fn an_f64_model_keeps_its_precision() {
    let (clip, golden) = load("quick");
    let found = weights::load(&Source::Dir(dir("quick")), clip.config()).unwrap();
    let clip = Clip::new(clip.config(), found.tensors, DType::F64, &Device::Cpu).unwrap();
    let none = Patches::none();
    let batch = TextBatch::new(&ids(&golden["ids"]), None, &clip.config().text, &Device::Cpu).unwrap();
    let images = clip.image_features(&golden["pixels"], &none).unwrap();
    let logits = clip.logits(&images, &clip.text_features(&batch, &none).unwrap(), &none).unwrap();
    assert_eq!(logits.dtype(), DType::F64);
    let off = relative(&logits.to_dtype(DType::F32).unwrap(), &golden["logits"]);
    assert!(off < 1e-5, "{off}");
}

#[test]
fn padding_does_not_change_text_features() {
    let (clip, golden) = load("quick");
    let rows = ids(&golden["ids"]);
    let features = |to| {
        let batch = TextBatch::new(&rows, to, &clip.config().text, &Device::Cpu).unwrap();
        clip.text_features(&batch, &Patches::none()).unwrap()
    };
    assert!(relative(&features(Some(12)), &features(None)) < 1e-6);
}

#[test]
fn candle_transformers_agrees_where_it_applies() {
    // It knows quick_gelu, an epsilon of 1e-5 and the highest id as end of text.
    let (clip, golden) = load("legacy_eos");
    let config = clip.config();
    let theirs = oracle::ClipConfig {
        text_config: oracle::text_model::ClipTextConfig {
            vocab_size: config.text.vocab_size,
            embed_dim: config.text.hidden_size,
            activation: oracle::text_model::Activation::QuickGelu,
            intermediate_size: config.text.intermediate_size,
            max_position_embeddings: config.text.max_position_embeddings,
            pad_with: None,
            num_hidden_layers: config.text.num_hidden_layers,
            num_attention_heads: config.text.num_attention_heads,
            projection_dim: config.projection_dim,
        },
        vision_config: oracle::vision_model::ClipVisionConfig {
            embed_dim: config.vision.hidden_size,
            activation: oracle::text_model::Activation::QuickGelu,
            intermediate_size: config.vision.intermediate_size,
            num_hidden_layers: config.vision.num_hidden_layers,
            num_attention_heads: config.vision.num_attention_heads,
            projection_dim: config.projection_dim,
            num_channels: 3,
            image_size: config.vision.image_size,
            patch_size: config.vision.patch_size,
        },
        logit_scale_init_value: 2.6592,
        image_size: config.vision.image_size,
    };
    let file = std::fs::read(dir("legacy_eos").join("model.safetensors")).unwrap();
    let vb = VarBuilder::from_buffered_safetensors(file, DType::F32, &Device::Cpu).unwrap();
    let model = oracle::ClipModel::new(vb, &theirs).unwrap();
    let images = model.get_image_features(&golden["pixels"]).unwrap();
    let texts = model.get_text_features(&golden["ids"].to_dtype(DType::U32).unwrap()).unwrap();
    let none = Patches::none();
    let batch = TextBatch::new(&ids(&golden["ids"]), None, &config.text, &Device::Cpu).unwrap();
    assert!(relative(&clip.image_features(&golden["pixels"], &none).unwrap(), &images) < 1e-4);
    assert!(relative(&clip.text_features(&batch, &none).unwrap(), &texts) < 1e-4);
}

#[test]
fn random_weights_are_drawn_as_transformers_draws_them() {
    let config = ClipConfig::from_json("init", &std::fs::read(dir("init").join("config.json")).unwrap()).unwrap();
    let theirs: std::collections::HashMap<String, [f64; 2]> =
        serde_json::from_slice(&std::fs::read(dir("init").join("init.json")).unwrap()).unwrap();
    let ours = peft::clip::model::random_weights(&config, 1, &Device::Cpu).unwrap();
    assert_eq!(ours.len(), theirs.len());
    for (name, tensor) in ours {
        let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64;
        let std = (values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
        let [their_mean, their_std] = theirs[&name];
        // Sampling noise of the smallest tensors, and the golden's four decimals.
        let slack = 0.3 * their_std + 1e-4;
        assert!((mean - their_mean).abs() < slack, "{name}: mean {mean} for {their_mean}");
        assert!((std - their_std).abs() < slack, "{name}: deviation {std} for {their_std}");
    }
}
