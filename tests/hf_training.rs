//! Twenty steps of each method of HF PEFT's, against its own losses (`scripts/reference/hf_peft.py train`).
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{D, DType, Device, Tensor};
use peft::clip::source::Source;
use peft::clip::{Clip, ClipConfig, TextBatch, weights};
use peft::delta::{Adapters, Delta};
use peft::optim::{AdamWConfig, OptimizerConfig};
use peft_adapters::{Grads, Patches, Step};

const RATE: f64 = 5e-3;

const CASES: &[(&str, &str)] = &[
    ("lora", "lora: { rank: 4, alpha: 8 }"),
    ("lora_plus", "lora_plus: { rank: 4, alpha: 8 }"),
    ("dora", "dora: { rank: 4, alpha: 8, targets: [q_proj, k_proj, v_proj, fc1] }"),
    ("pissa", "pissa: { rank: 3, alpha: 6 }"),
    ("olora", "olora: { rank: 3, alpha: 6 }"),
    ("ia3", "ia3: {}"),
    ("ln_tuning", "ln_tuning: {}"),
    ("vera", "vera: { rank: 6 }"),
    ("loha", "loha: { rank: 3, alpha: 6 }"),
    ("lokr", "lokr: { rank: 1, alpha: 2 }"),
    ("adalora", "adalora: { init_r: 4, target_r: 2, alpha: 8, tinit: 3, tfinal: 4, delta_t: 2, orth_reg_weight: 0.1 }"),
];

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/peft").join(name)
}

struct World {
    clip: Clip,
    pixels: Tensor,
    texts: TextBatch,
}

impl World {
    fn new() -> Self {
        let config = ClipConfig::from_json("base", &std::fs::read(data("base/config.json")).unwrap()).unwrap();
        let found = weights::load(&Source::Dir(data("base")), &config).unwrap();
        let inputs = candle_core::safetensors::load(data("inputs.safetensors"), &Device::Cpu).unwrap();
        let ids: Vec<Vec<u32>> = inputs["ids"].to_dtype(DType::U32).unwrap().to_vec2().unwrap();
        let texts = TextBatch::new(&ids, None, &config.text, &Device::Cpu).unwrap();
        let clip = Clip::new(&config, found.tensors, DType::F32, &Device::Cpu).unwrap();
        Self { clip, pixels: inputs["pixels"].clone(), texts }
    }

    fn features(&self, patches: &Patches) -> (Tensor, Tensor) {
        (self.clip.image_features(&self.pixels, patches).unwrap(), self.clip.text_features(&self.texts, patches).unwrap())
    }

    /// CLIP's loss, both directions, and what methods add to it.
    fn loss(&self, patches: &Patches) -> Tensor {
        let (images, texts) = self.features(patches);
        let logits = self.clip.logits(&images, &texts, patches).unwrap();
        let entropy = |logits: &Tensor| {
            let rows = logits.log_sum_exp(D::Minus1).unwrap();
            let eye = Tensor::eye(logits.dim(0).unwrap(), DType::F32, &Device::Cpu).unwrap();
            let own = (logits * eye).unwrap().sum(D::Minus1).unwrap();
            (rows - own).unwrap().mean_all().unwrap()
        };
        let both = ((entropy(&logits) + entropy(&logits.t().unwrap())).unwrap() / 2.0).unwrap();
        match patches.regulariser().unwrap() {
            Some(term) => (both + term).unwrap(),
            None => both,
        }
    }
}

fn train(world: &World, adapters: &mut Adapters, steps: usize) -> Vec<f32> {
    let config = OptimizerConfig::AdamW(AdamWConfig { weight_decay: 0.0, ..Default::default() });
    let mut optimizer = config.build(&adapters.params).unwrap();
    let step = |step| {
        adapters.patches.prepare(&Step { training: true, seed: 0, step: step as u64 }).unwrap();
        let loss = world.loss(&adapters.patches);
        let store = loss.backward().unwrap();
        let grads: Vec<_> = adapters.params.iter().map(|p| store.get(&p.var).cloned()).collect();
        optimizer.step(&adapters.params, &grads, RATE, 1.0).unwrap();
        let named: HashMap<_, _> = adapters.params.iter().zip(grads).filter_map(|(p, g)| Some((p.name.clone(), g?))).collect();
        let grads = Grads::new(named, 1.0);
        adapters.patches.iter_mut().for_each(|p| p.after_backward(step + 1, steps, &grads).unwrap());
        loss.to_scalar::<f32>().unwrap()
    };
    (0..steps).map(step).collect()
}

fn off(a: &Tensor, b: &Tensor) -> f32 {
    let max = |t: &Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    max(&(a - b).unwrap()) / max(b)
}

#[test]
fn losses_follow_hf_pefts() {
    let world = World::new();
    let expected: HashMap<String, Vec<f32>> = serde_json::from_slice(&std::fs::read(data("train/losses.json")).unwrap()).unwrap();
    assert_eq!(expected.len(), CASES.len());
    for (name, yaml) in CASES {
        let method = serde_saphyr::from_str(yaml).unwrap();
        let mut adapters = Adapters::plan(&[method], world.clip.sites(), 0, &Device::Cpu).unwrap();
        let start = data("train").join(name);
        if start.join("adapter_config.json").exists() {
            Delta::read(&start).unwrap().fill(&adapters.params).unwrap();
        }
        let expected = &expected[*name];
        let found = train(&world, &mut adapters, expected.len());
        let apart = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart < 2e-4, "{name}: {apart:e}\n{found:?}\n{expected:?}");
        assert!(expected[0] - expected[expected.len() - 1] > 0.3, "{name}: the loss hardly moves");
        adapters.view.prepare(&Step::eval()).unwrap();
        let golden = candle_core::safetensors::load(start.join("golden.safetensors"), &Device::Cpu).unwrap();
        let (images, texts) = world.features(&adapters.view);
        let off = off(&images, &golden["image_features"]).max(off(&texts, &golden["text_features"]));
        assert!(off < 2e-3, "{name}: {off}");
    }
}
