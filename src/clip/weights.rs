//! Checkpoint files.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::config::ClipConfig;
use super::source::Source;
use crate::error::{Error, Result};

/// A complete set.
#[derive(Debug)]
pub struct Weights {
    /// By HF name, in the file's dtype.
    pub tensors: HashMap<String, Tensor>,
    /// The dtype that most have.
    pub dtype: DType,
    /// blake3.
    pub digest: String,
}

/// Loads.
///
/// # Errors
/// When missing.
pub fn load(source: &Source, config: &ClipConfig) -> Result<Weights> {
    let place = source.place("model.safetensors");
    let bytes = source.require("model.safetensors")?;
    let (tensors, _) = read_safetensors(&place, &bytes)?;
    let mut tensors: HashMap<String, Tensor> = tensors.into_iter().collect();
    tensors.retain(|n, _| !n.ends_with("position_ids"));
    for (name, shape) in config.tensors() {
        if tensors.get(&name).is_none_or(|t| t.dims() != shape.as_slice()) {
            return Err(Error::input(&place, format!("`{name}` is missing or misshapen")));
        }
    }
    let digest = digest(&tensors)?;
    let dtype = tensors.get("visual_projection.weight").map_or(DType::F32, Tensor::dtype);
    Ok(Weights { tensors, dtype, digest })
}

/// Digest.
///
/// # Errors
/// When a tensor cannot be read.
pub fn digest(tensors: &HashMap<String, Tensor>) -> Result<String> {
    let mut names: Vec<&String> = tensors.keys().collect();
    names.sort();
    let mut hasher = blake3::Hasher::new();
    for name in names {
        hasher.update(name.as_bytes());
        let t = &tensors[name];
        hasher.update(format!("{:?}{:?}", t.dtype(), t.dims()).as_bytes());
        for v in t.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()? {
            hasher.update(&v.to_le_bytes());
        }
    }
    Ok(format!("blake3:{}", hasher.finalize().to_hex()))
}

/// Writes.
///
/// # Errors
/// When the disk refuses.
pub fn save(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let named = tensors.iter().map(|(n, t)| (n.as_str(), t));
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let bytes = safetensors::serialize(named, Some(metadata)).map_err(|e| Error::fault(path.display(), e))?;
    crate::files::write_atomic(path, &bytes)
}

type Named = Vec<(String, Tensor)>;

/// Reads.
///
/// # Errors
/// When malformed.
pub fn read_safetensors(place: &str, bytes: &[u8]) -> Result<(Named, HashMap<String, String>)> {
    let (_, metadata) = safetensors::SafeTensors::read_metadata(bytes).map_err(|e| Error::input(place, e))?;
    let tensors = candle_core::safetensors::load_buffer(bytes, &Device::Cpu).map_err(|e| Error::input(place, e))?;
    Ok((tensors.into_iter().collect(), metadata.metadata().clone().unwrap_or_default()))
}
