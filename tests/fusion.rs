//! Fusions against torch's modules (`scripts/goldens/fusion.py`) and finite differences.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use peft::clip::{Clip, ClipConfig, Encoded, Tokens};
use peft::fusion::{Both, Fuse, FusionConfig, FusionParts, Inputs, Pass};
use peft_adapters::Params;

const FUSIONS: [(&str, &str); 5] = [
    ("cosine", "{}"),
    ("concat", r#"{"hidden": 7}"#),
    ("bilinear", r#"{"rank": 7}"#),
    ("cross_attention", r#"{"layers": 2, "dim": 12, "heads": 3, "feedforward": 20}"#),
    ("transformer", r#"{"layers": 2, "dim": 12, "heads": 3, "feedforward": 20}"#),
];

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn clip() -> Clip {
    let config = ClipConfig::from_json("config.json", &std::fs::read(data("clip/quick/config.json")).unwrap()).unwrap();
    let tensors = candle_core::safetensors::load(data("clip/quick/model.safetensors"), &Device::Cpu).unwrap();
    let known: std::collections::HashSet<String> = config.tensors().into_iter().map(|(name, _)| name).collect();
    Clip::new(&config, tensors.into_iter().filter(|(n, _)| known.contains(n)).collect(), DType::F32, &Device::Cpu).unwrap()
}

/// A fusion with the golden's weights in `dtype`, and its inputs as leaves.
struct Case {
    golden: HashMap<String, Tensor>,
    params: Params,
    fusion: Box<dyn Fuse>,
    inputs: HashMap<&'static str, Var>,
}

impl Case {
    fn new(name: &str, options: &str, dtype: DType) -> Self {
        let golden = candle_core::safetensors::load(data(&format!("fusion/{name}.safetensors")), &Device::Cpu).unwrap();
        let config: FusionConfig = serde_json::from_str(&format!("{{\"{name}\": {options}}}")).unwrap();
        let mut params = Params::with_dtype(0, dtype, &Device::Cpu);
        let fusion = config.build(&FusionParts { clip: &clip(), inputs: Inputs::Both }, &mut params).unwrap();
        for p in params.iter() {
            p.var.set(&golden[&p.name].to_dtype(dtype).unwrap()).unwrap();
        }
        assert_eq!(params.len(), golden.keys().filter(|k| k.starts_with("fusion.")).count(), "{name}");
        let leaf = |n| (n, Var::from_tensor(&golden[n].to_dtype(dtype).unwrap()).unwrap());
        let inputs = ["image", "text", "image_tokens", "text_tokens", "scale"].map(leaf).into();
        Self { golden, params, fusion, inputs }
    }

    fn output(&self) -> Tensor {
        let at = |n: &str| self.inputs[n].as_tensor().clone();
        let pool = self.golden["pool"].to_dtype(DType::U32).unwrap().to_vec1::<u32>().unwrap();
        let images = Encoded { features: at("image"), tokens: Some(Tokens { x: at("image_tokens"), pool: Vec::new() }) };
        let texts = Encoded { features: at("text"), tokens: Some(Tokens { x: at("text_tokens"), pool }) };
        let pass = Pass { training: true, seed: 0, position: 0 };
        self.fusion.fuse(&Both { images: &images, texts: &texts, scale: &at("scale") }, &pass).unwrap()
    }

    fn loss(&self) -> Tensor {
        let y = self.output();
        (&y * self.golden["cotangent"].to_dtype(y.dtype()).unwrap()).unwrap().sum_all().unwrap()
    }

    /// Everything that may have a gradient.
    fn leaves(&self) -> Vec<(String, Var)> {
        let weights = self.params.iter().map(|p| (p.name.clone(), p.var.clone()));
        weights.chain(self.inputs.iter().map(|(n, v)| ((*n).to_string(), v.clone()))).collect()
    }
}

fn far(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_dtype(DType::F64).unwrap(), b.to_dtype(DType::F64).unwrap());
    let largest = b.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap();
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap() / (1.0 + largest)
}

#[test]
fn values_and_gradients_are_torchs() {
    for (name, options) in FUSIONS {
        let case = Case::new(name, options, DType::F32);
        let output = case.output();
        assert_eq!(output.dims(), [3, case.fusion.width()], "{name}");
        assert!(far(&output, &case.golden["output"]) < 1e-5, "{name}");
        let grads = case.loss().backward().unwrap();
        for (leaf, var) in case.leaves() {
            match (grads.get(&var), case.golden.get(&format!("grad.{leaf}"))) {
                (Some(found), Some(expected)) => assert!(far(found, expected) < 1e-5, "{name} {leaf}: {}", far(found, expected)),
                (found, expected) => assert_eq!(found.is_some(), expected.is_some(), "{name} {leaf}"),
            }
        }
    }
}

#[test]
fn gradients_are_finite_differences() {
    const STEP: f64 = 1e-5;
    for (name, options) in FUSIONS {
        let case = Case::new(name, options, DType::F64);
        let grads = case.loss().backward().unwrap();
        for (leaf, var) in case.leaves() {
            let Some(found) = grads.get(&var) else { continue };
            let found = found.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let before = var.as_tensor().copy().unwrap();
            let values = before.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            // A few of each: the rest takes the same path.
            for i in (0..values.len()).step_by(values.len().div_ceil(3)) {
                let at = |by: f64| {
                    let mut moved = values.clone();
                    moved[i] += by;
                    var.set(&Tensor::from_vec(moved, before.shape(), &Device::Cpu).unwrap()).unwrap();
                    case.loss().to_scalar::<f64>().unwrap()
                };
                let expected = (at(STEP) - at(-STEP)) / (2.0 * STEP);
                var.set(&before).unwrap();
                assert!((found[i] - expected).abs() < 1e-5 * (1.0 + expected.abs()), "{name} {leaf}[{i}]: {} {expected}", found[i]);
            }
        }
    }
}

/// What stands behind the last word of a text is padding, and changes nothing.
#[test]
fn padding_is_not_seen() {
    for (name, options) in &FUSIONS[3..] {
        let case = Case::new(name, options, DType::F32);
        let before = case.output();
        let noise = case.golden["text_tokens"].affine(-3.0, 1.0).unwrap();
        let own = &case.inputs["text_tokens"];
        // Row 1 ends at token 2, row 2 at token 0.
        let mixed = |row: usize, last: usize| {
            let own = own.as_tensor().narrow(0, row, 1).unwrap().narrow(1, 0, last + 1).unwrap();
            Tensor::cat(&[&own, &noise.narrow(0, row, 1).unwrap().narrow(1, last + 1, 5 - last).unwrap()], 1).unwrap()
        };
        let all = [own.as_tensor().narrow(0, 0, 1).unwrap().copy().unwrap(), mixed(1, 2), mixed(2, 0)];
        own.set(&Tensor::cat(&all, 0).unwrap()).unwrap();
        assert!(far(&case.output(), &before) < 1e-6, "{name}");
        own.set(&noise).unwrap();
        assert!(far(&case.output(), &before) > 1e-3, "{name}");
    }
}
