//! Checkpoint files in HF layout: safetensors or pickle, whole or in shards.

use std::collections::{BTreeSet, HashMap};

use candle_core::{DType, Tensor};
use serde::Deserialize;

use super::config::ClipConfig;
use super::source::Source;
use crate::error::{Error, Result};

mod names;
mod pickle;
mod safetensors;

pub(crate) use safetensors::save_with;
pub use safetensors::{read_safetensors, save};

/// A complete set of weights.
#[derive(Debug)]
pub struct Weights {
    /// By HF name, in the file's dtype, on the CPU.
    pub tensors: HashMap<String, Tensor>,
    /// The dtype that most numbers have.
    pub dtype: DType,
    /// blake3 over names, dtypes, shapes and bytes.
    pub digest: String,
}

type Named = Vec<(String, Tensor)>;

/// Whole files in the order in which transformers looks for them.
const WHOLE: [&str; 2] = ["model.safetensors", "pytorch_model.bin"];

/// Loads the weights of a base and checks them against its configuration.
///
/// # Errors
/// When no weights are found, a file is malformed, or tensors are missing, unexpected, misshapen or not
/// finite; all of these are listed in one error.
pub fn load(source: &Source, config: &ClipConfig) -> Result<Weights> {
    let (place, found) = read(source)?;
    let mut tensors = HashMap::with_capacity(found.len());
    let mut wrong = Vec::new();
    for (name, tensor) in found {
        let Some(name) = names::canonical(&name) else { continue };
        let tensor = if name == "logit_scale" { tensor.flatten_all()?.squeeze(0).unwrap_or(tensor) } else { tensor };
        if tensors.insert(name.clone(), tensor).is_some() {
            wrong.push(format!("twice: {name}"));
        }
    }
    wrong.extend(misfits(&tensors, config));
    if !wrong.is_empty() {
        return Err(listed(&place, wrong));
    }
    let broken = not_finite(&tensors)?;
    if !broken.is_empty() {
        return Err(listed(&place, broken));
    }
    Ok(Weights { dtype: main_dtype(&tensors), digest: digest(&tensors)?, tensors })
}

/// The tensors of the first kind of file that is there.
fn read(source: &Source) -> Result<(String, Named)> {
    for name in WHOLE {
        if let Some(tensors) = read_file(source, name)? {
            return Ok((source.place(name), tensors));
        }
        let index = format!("{name}.index.json");
        if let Some(bytes) = source.read(&index)? {
            let place = source.place(&index);
            return Ok((place.clone(), read_shards(source, &place, &bytes)?));
        }
    }
    Err(Error::input(source, format!("has no weights; expected {} or {}, whole or with an index", WHOLE[0], WHOLE[1])))
}

fn read_file(source: &Source, name: &str) -> Result<Option<Named>> {
    let place = source.place(name);
    if name.ends_with(".bin") {
        return source.path(name).map(|path| pickle::read(&place, &path)).transpose();
    }
    let Some(bytes) = source.read(name)? else { return Ok(None) };
    Ok(Some(read_safetensors(&place, &bytes)?.0))
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

fn read_shards(source: &Source, place: &str, bytes: &[u8]) -> Result<Named> {
    let index: Index = serde_json::from_slice(bytes).map_err(|e| Error::input(place, format!("not a weight index: {e}")))?;
    let files: BTreeSet<&String> = index.weight_map.values().collect();
    let mut all = Vec::new();
    for file in files {
        if file.contains(['/', '\\']) || file.starts_with('.') {
            return Err(Error::input(place, format!("`{file}` is not a file name beside it")));
        }
        let tensors =
            read_file(source, file)?.ok_or_else(|| Error::input(source.place(file), format!("no such file, but {place} names it")))?;
        all.extend(tensors);
    }
    let found: BTreeSet<&String> = all.iter().map(|(n, _)| n).collect();
    match index.weight_map.keys().find(|n| !found.contains(n)) {
        Some(name) => Err(Error::input(place, format!("`{name}` is in none of the files"))),
        None => Ok(all),
    }
}

/// Missing, unexpected, misshapen and non-float tensors.
fn misfits(tensors: &HashMap<String, Tensor>, config: &ClipConfig) -> Vec<String> {
    let expected = config.tensors();
    let mut wrong = Vec::new();
    for (name, shape) in &expected {
        match tensors.get(name) {
            None => wrong.push(format!("missing: {name} {shape:?}")),
            Some(t) if t.dims() != shape.as_slice() => wrong.push(format!("{name}: expected {shape:?}, found {:?}", t.dims())),
            Some(t) if !t.dtype().is_float() => wrong.push(format!("{name}: expected floats, found {}", t.dtype().as_str())),
            Some(_) => {}
        }
    }
    let known: BTreeSet<&String> = expected.iter().map(|(n, _)| n).collect();
    let mut extra: Vec<&String> = tensors.keys().filter(|n| !known.contains(n)).collect();
    extra.sort();
    wrong.extend(extra.iter().map(|n| format!("unexpected: {n}")));
    wrong
}

fn not_finite(tensors: &HashMap<String, Tensor>) -> Result<Vec<String>> {
    use rayon::prelude::*;
    let check = |(name, t): (&String, &Tensor)| -> Result<Option<String>> {
        Ok((!finite(t)?).then(|| format!("{name}: holds values that are not finite")))
    };
    let mut wrong = tensors.par_iter().map(check).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect::<Vec<_>>();
    wrong.sort();
    Ok(wrong)
}

fn finite(t: &Tensor) -> Result<bool> {
    let flat = t.flatten_all()?;
    Ok(match t.dtype() {
        DType::F32 => flat.to_vec1::<f32>()?.iter().all(|v| v.is_finite()),
        _ => flat.to_dtype(DType::F64)?.to_vec1::<f64>()?.iter().all(|v| v.is_finite()),
    })
}

fn listed(place: &str, wrong: Vec<String>) -> Error {
    const SHOWN: usize = 20;
    let mut lines: Vec<String> = wrong.iter().take(SHOWN).map(|w| format!("  {w}")).collect();
    if wrong.len() > SHOWN {
        lines.push(format!("  and {} more", wrong.len() - SHOWN));
    }
    Error::input(place, format!("{} tensors are not as config.json says:\n{}", wrong.len(), lines.join("\n")))
        .hint("the weights and config.json may belong to different models")
}

fn main_dtype(tensors: &HashMap<String, Tensor>) -> DType {
    let mut counts: HashMap<&'static str, (usize, DType)> = HashMap::new();
    for t in tensors.values() {
        counts.entry(t.dtype().as_str()).or_insert((0, t.dtype())).0 += t.elem_count();
    }
    counts.into_values().max_by_key(|(count, dtype)| (*count, dtype.as_str())).map_or(DType::F32, |(_, dtype)| dtype)
}

/// blake3 over the sorted (name, dtype, shape, bytes): the same weights in another container have the
/// same digest.
///
/// # Errors
/// When a tensor has a dtype that no file holds.
pub fn digest(tensors: &HashMap<String, Tensor>) -> Result<String> {
    let mut names: Vec<&String> = tensors.keys().collect();
    names.sort();
    let mut hasher = blake3::Hasher::new();
    for name in names {
        let tensor = &tensors[name];
        hasher.update(format!("{name}\0{}\0{:?}\0", tensor.dtype().as_str(), tensor.dims()).as_bytes());
        hasher.update_rayon(&safetensors::bytes(tensor)?);
    }
    Ok(format!("blake3:{}", hasher.finalize().to_hex()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::clip::model::random_weights;
    use candle_core::Device;

    fn config() -> ClipConfig {
        let json = br#"{"projection_dim": 8,
            "text_config": {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20},
            "vision_config": {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}}"#;
        ClipConfig::from_json("config.json", json).unwrap()
    }

    fn weights() -> HashMap<String, Tensor> {
        random_weights(&config(), 0, &Device::Cpu).unwrap()
    }

    fn written(change: impl FnOnce(&mut HashMap<String, Tensor>)) -> Result<Weights> {
        let mut tensors = weights();
        change(&mut tensors);
        let dir = tempfile::tempdir().unwrap();
        let named: Named = tensors.into_iter().collect();
        save(&dir.path().join("model.safetensors"), &named).unwrap();
        load(&Source::Dir(dir.path().to_path_buf()), &config())
    }

    #[test]
    fn what_is_written_is_read_with_the_same_digest() {
        let read = written(|t| {
            t.insert("text_model.embeddings.position_ids".into(), Tensor::zeros((1, 77), DType::I64, &Device::Cpu).unwrap());
        });
        assert_eq!(read.unwrap().digest, digest(&weights()).unwrap());
    }

    #[test]
    fn everything_wrong_is_listed_at_once() {
        let message = written(|t| {
            t.remove("visual_projection.weight");
            t.insert("extra".into(), Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap());
            t.insert("text_projection.weight".into(), Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap());
        });
        let message = message.unwrap_err().to_string();
        for part in ["missing: visual_projection.weight", "unexpected: extra", "text_projection.weight: expected [8, 8]"] {
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn non_finite_weights_are_named() {
        let message = written(|t| {
            let bad = Tensor::full(f32::NAN, 8, &Device::Cpu).unwrap();
            t.insert("text_model.final_layer_norm.bias".into(), bad);
        });
        assert!(message.unwrap_err().to_string().contains("text_model.final_layer_norm.bias: holds"));
    }

    #[test]
    fn shards_are_joined_and_may_not_lie_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let named: Named = weights().into_iter().collect();
        let (first, second) = named.split_at(10);
        let map = |f: &str, part: &[(String, Tensor)]| {
            part.iter().map(|(n, _)| (n.clone(), f.into())).collect::<Vec<(String, serde_json::Value)>>()
        };
        let write = |second_name: &str| {
            save(&dir.path().join("a.safetensors"), first).unwrap();
            save(&dir.path().join("b.safetensors"), second).unwrap();
            let all: serde_json::Map<_, _> = map("a.safetensors", first).into_iter().chain(map(second_name, second)).collect();
            std::fs::write(dir.path().join("model.safetensors.index.json"), serde_json::json!({ "weight_map": all }).to_string()).unwrap();
            load(&Source::Dir(dir.path().to_path_buf()), &config())
        };
        assert_eq!(write("b.safetensors").unwrap().digest, digest(&weights()).unwrap());
        assert!(write("../b.safetensors").unwrap_err().to_string().contains("beside it"));
        assert!(write("c.safetensors").unwrap_err().to_string().contains("no such file"));
    }

    #[test]
    fn damaged_files_are_refused() {
        for bytes in [&b""[..], b"12345678", b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", b"\x02\0\0\0\0\0\0\0[]"] {
            let dir = tempfile::tempdir().unwrap();
            for name in WHOLE {
                std::fs::write(dir.path().join(name), bytes).unwrap();
                assert_eq!(load(&Source::Dir(dir.path().to_path_buf()), &config()).unwrap_err().exit_code(), 2);
                std::fs::remove_file(dir.path().join(name)).unwrap();
            }
        }
    }
}
