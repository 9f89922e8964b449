//! A small world for tests of the binary: a random base and images that can be told apart.
#![allow(dead_code, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Output;

use candle_core::Device;
use image::{Rgb, RgbImage};
use peft::clip::model::random_weights;
use peft::clip::{ClipConfig, weights};
use peft::train::{Event, Observer};
use serde_json::Value;

const CONFIG: &str = r#"{"model_type": "clip", "projection_dim": 16,
    "text_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": 3000, "max_position_embeddings": 16, "eos_token_id": 2999, "bos_token_id": 2998, "pad_token_id": 2999},
    "vision_config": {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8}}"#;

const PREPROCESS: &str = r#"{"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16},
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}"#;

pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
}

impl World {
    /// A base in `base/`, images in `data/<class>/`, a recipe in `recipe.yaml`.
    pub(crate) fn new() -> Self {
        let world = Self { dir: tempfile::tempdir().unwrap() };
        let base = world.path("base");
        std::fs::create_dir(&base).unwrap();
        std::fs::write(base.join("config.json"), CONFIG).unwrap();
        std::fs::write(base.join("preprocessor_config.json"), PREPROCESS).unwrap();
        std::fs::write(base.join("tokenizer.json"), peft::builtin::file("tiny", "tokenizer.json").unwrap()).unwrap();
        let config = ClipConfig::from_json("config.json", CONFIG.as_bytes()).unwrap();
        let tensors: Vec<_> = random_weights(&config, 1, &Device::Cpu).unwrap().into_iter().collect();
        weights::save(&base.join("model.safetensors"), &tensors).unwrap();
        for (class, colour) in [("red", [230, 30, 20]), ("green", [20, 220, 40]), ("blue", [30, 40, 240])] {
            let dir = world.path("data").join(class);
            std::fs::create_dir_all(&dir).unwrap();
            for i in 0..10u8 {
                let image = RgbImage::from_fn(20, 16, |x, y| Rgb(colour.map(|c: u8| c.wrapping_add((x as u8 * i + y as u8) % 16))));
                image.save(dir.join(format!("{i}.png"))).unwrap();
            }
        }
        world.write("recipe.yaml", &world.recipe("lora: { rank: 2 }"));
        world
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name)
    }

    pub(crate) fn recipe(&self, method: &str) -> String {
        format!(
            "model: base\nmethod: {{ {method} }}\ndata:\n  folder: {{ root: data }}\ntask:\n  classify: {{ templates: [\"a {{}} thing\"] }}\n\
             train: {{ epochs: 4, batch: 8, lr: 1.0e-2, seed: 3 }}\noutput: run\n"
        )
    }

    pub(crate) fn peft(&self, args: &[&str]) -> Output {
        std::process::Command::new(program()).args(args).current_dir(self.dir.path()).output().unwrap()
    }

    /// Runs and expects success; the JSON on stdout.
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let out = self.peft(&[args, &["--json"]].concat());
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice(&out.stdout).unwrap()
    }

    /// Runs and expects an exit code; what stands on stderr.
    pub(crate) fn fails(&self, args: &[&str], code: i32) -> String {
        let out = self.peft(args);
        let message = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(code), "{args:?}: {message}");
        assert!(!message.contains("panicked"), "{args:?}: {message}");
        message
    }
}

/// The binary; it is not there in the library's own tests.
#[allow(clippy::option_env_unwrap)]
pub(crate) fn program() -> &'static str {
    option_env!("CARGO_BIN_EXE_peft").unwrap()
}

pub(crate) fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Asks for a stop after some steps.
pub(crate) struct StopAfter(pub(crate) usize);

impl Observer for StopAfter {
    fn event(&mut self, event: Event<'_>) {
        if matches!(event, Event::Step(_)) {
            self.0 = self.0.saturating_sub(1);
        }
    }

    fn stop(&self) -> Option<i32> {
        (self.0 == 0).then_some(2)
    }
}
