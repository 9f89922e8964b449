#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;

use super::*;
use crate::clip::model::random_weights;

const CONFIG: &str = r#"{"projection_dim": 8, "text_config": {"hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 6, "vocab_size": 20},
    "vision_config": {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 8, "patch_size": 4}}"#;

const TOKENS: &str = "text_model.embeddings.token_embedding.weight";

fn config() -> ClipConfig {
    ClipConfig::from_json("config.json", CONFIG.as_bytes()).unwrap()
}

fn tensors() -> HashMap<String, Tensor> {
    random_weights(&config(), 0, &Device::Cpu).unwrap()
}

fn golden(name: &str) -> (Source, ClipConfig) {
    let source = Source::Dir(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/clip").join(name));
    let config = ClipConfig::from_json("config.json", &source.require("config.json").unwrap()).unwrap();
    (source, config)
}

/// Saves under `model.safetensors` and loads it.
fn round_trip(tensors: HashMap<String, Tensor>) -> Result<Weights> {
    let dir = tempfile::tempdir().unwrap();
    let tensors: Vec<_> = tensors.into_iter().collect();
    save(&dir.path().join("model.safetensors"), &tensors)?;
    load(&Source::Dir(dir.path().into()), &config())
}

/// Loads a directory of these files; the error's text.
fn refusal(files: &[(&str, &[u8])]) -> String {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    let error = load(&Source::Dir(dir.path().into()), &config()).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string()
}

fn header(json: &str, data: usize) -> Vec<u8> {
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

#[test]
fn what_is_saved_is_loaded_with_the_same_digest() {
    let plain = round_trip(tensors()).unwrap();
    assert_eq!(plain.dtype, DType::F32);
    assert_eq!(plain.digest, digest(&tensors()).unwrap());
    assert_eq!(plain.tensors.len(), config().tensors().len());
    for (name, tensor) in tensors() {
        let same = (plain.tensors[&name].eq(&tensor).unwrap().to_dtype(DType::F32).unwrap()).min_all().unwrap();
        assert_eq!(same.to_scalar::<f32>().unwrap(), 1.0, "{name}");
    }
    let mut other = tensors();
    let changed = (&other[TOKENS] + 1e-3).unwrap();
    other.insert(TOKENS.into(), changed);
    assert_ne!(round_trip(other).unwrap().digest, plain.digest);
}

#[test]
fn the_same_content_is_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let metadata = || (0..9).map(|i| (format!("key{i}"), "x".to_string())).collect();
    let written = ["one", "two"].map(|name| {
        let path = dir.path().join(name);
        save_with(&path, &tensors().into_iter().collect::<Vec<_>>(), metadata()).unwrap();
        fs::read(path).unwrap()
    });
    assert!(written[0] == written[1]);
    assert_eq!(read_safetensors("x", &written[0]).unwrap().1, metadata());
}

#[test]
fn wrapped_and_old_names_are_the_same_weights() {
    let mut old: HashMap<String, Tensor> = tensors()
        .into_iter()
        .map(|(name, tensor)| {
            let name = match name.rsplit_once('.') {
                Some((path, "weight")) if path.contains("norm") => format!("{path}.gamma"),
                Some((path, "bias")) if path.contains("norm") => format!("{path}.beta"),
                _ => name,
            };
            (format!("module.clip.{name}"), tensor)
        })
        .collect();
    let scale = old["module.clip.logit_scale"].reshape(1).unwrap();
    old.insert("module.clip.logit_scale".into(), scale);
    let ids = Tensor::arange(0i64, 6, &Device::Cpu).unwrap().reshape((1, 6)).unwrap();
    old.insert("module.clip.text_model.embeddings.position_ids".into(), ids);
    assert_eq!(round_trip(old).unwrap().digest, digest(&tensors()).unwrap());
}

#[test]
fn shards_and_pickles_have_the_digest_of_one_file() {
    for name in ["odd_patches", "margin", "eps"] {
        let (source, config) = golden(name);
        let weights = load(&source, &config).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let tensors: Vec<_> = weights.tensors.into_iter().collect();
        save(&dir.path().join("model.safetensors"), &tensors).unwrap();
        assert_eq!(load(&Source::Dir(dir.path().into()), &config).unwrap().digest, weights.digest, "{name}");
    }
}

#[test]
fn everything_that_does_not_fit_is_in_one_error() {
    let mut bad = tensors();
    bad.remove("visual_projection.weight");
    bad.insert("vision_model.classifier.weight".into(), Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap());
    bad.insert(TOKENS.into(), Tensor::zeros((3, 8), DType::F32, &Device::Cpu).unwrap());
    bad.insert("text_projection.weight".into(), Tensor::zeros((8, 8), DType::I64, &Device::Cpu).unwrap());
    bad.insert("model.logit_scale".into(), Tensor::zeros((), DType::F32, &Device::Cpu).unwrap());
    let message = round_trip(bad).unwrap_err().to_string();
    for part in [
        "1 missing: visual_projection.weight",
        "1 unexpected: vision_model.classifier.weight",
        "token_embedding.weight [3, 8] instead of [20, 8]",
        "not in floating point: text_projection.weight",
        "present twice: logit_scale",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    let message = round_trip(HashMap::new()).unwrap_err().to_string();
    assert!(message.contains("and ") && message.contains(" more") && message.len() < 1000, "{message}");
}

#[test]
fn weights_that_are_no_numbers_are_named() {
    for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut bad = tensors();
            let tensor = Tensor::full(value, (20, 8), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            bad.insert(TOKENS.into(), tensor);
            let message = round_trip(bad).unwrap_err().to_string();
            assert!(message.contains("1 tensors hold") && message.contains(TOKENS), "{message}");
        }
    }
}

#[test]
fn damaged_safetensors_are_refused_with_the_reason() {
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("alone takes 8", b"abc".to_vec()),
        ("header should have", u64::MAX.to_le_bytes().to_vec()),
        ("header should have", 100u64.to_le_bytes().to_vec()),
        ("header:", header("{", 0)),
        ("header:", header("[]", 0)),
        (
            "`a` occurs twice",
            header(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, 8),
        ),
        ("before it begins", header(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#, 4)),
        ("8 bytes of data", header(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}}"#, 8)),
        ("impossible shape", header(r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,0],"data_offsets":[0,0]}}"#, 0)),
        ("tensor `a`", header(r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4)),
        ("is cut off", header(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 4)),
        ("left over", header(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 12)),
        ("leaves a hole", header(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, 8)),
        (
            "overlaps",
            header(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, 8),
        ),
        ("unsupported type F8_E4M3", header(r#"{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}"#, 1)),
    ];
    for (reason, bytes) in cases {
        let message = read_safetensors("bad.safetensors", &bytes).unwrap_err().to_string();
        assert!(message.contains(reason) && message.contains("bad.safetensors"), "{reason}: {message}");
        refusal(&[("model.safetensors", &bytes)]);
    }
}

#[test]
fn tensors_and_metadata_come_back() {
    let json = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BOOL","shape":[3],"data_offsets":[4,7]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#;
    let (tensors, metadata) = read_safetensors("x", &header(json, 7)).unwrap();
    assert_eq!(metadata["format"], "pt");
    let names: Vec<_> = tensors.iter().map(|(name, t)| (name.as_str(), t.dims().len())).collect();
    assert_eq!(names, [("a", 0), ("b", 1)]);
}

#[test]
fn indices_stay_in_their_directory_and_keep_their_promise() {
    let index = |file: &str| format!(r#"{{"weight_map": {{"logit_scale": "{file}"}}}}"#);
    let name = "model.safetensors.index.json";
    for file in ["../x.safetensors", "/etc/x.safetensors", "..", "", "a\\\\b.safetensors", "sub/x.safetensors"] {
        assert!(refusal(&[(name, index(file).as_bytes())]).contains("expected a file beside"), "{file}");
    }
    assert!(refusal(&[(name, index("x.safetensors").as_bytes())]).contains("shard is missing"));
    assert!(refusal(&[(name, index("x.bin").as_bytes())]).contains(".safetensors file"));
    assert!(refusal(&[(name, b"{}")]).contains("weight_map"));
    assert!(refusal(&[(name, b"{")]).contains("JSON"));
    assert!(refusal(&[(name, br#"{"weight_map": {"a": 3}}"#)]).contains("no string"));
    let empty = header("{}", 0);
    assert!(refusal(&[(name, index("x.safetensors").as_bytes()), ("x.safetensors", &empty)]).contains("lacks"));
    assert!(refusal(&[]).contains("holds no weights"));
}

#[test]
fn unsaveable_tensors_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let one = Tensor::ones(1, DType::F32, &Device::Cpu).unwrap();
    let twice = [("a".to_string(), one.clone()), ("a".to_string(), one)];
    assert!(save(&dir.path().join("x"), &twice).is_err());
    let odd = Tensor::from_raw_buffer(&[0], DType::F8E8M0, &[1], &Device::Cpu).unwrap();
    assert!(save(&dir.path().join("x"), &[("a".to_string(), odd)]).is_err());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
