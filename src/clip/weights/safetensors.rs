//! The safetensors container.

use std::collections::HashMap;
use std::path::Path;

use ::safetensors::SafeTensors;
use candle_core::{Device, Tensor};

use super::Named;
use crate::error::{Error, Result};
use crate::files;

/// Every tensor of a file with the file's metadata.
///
/// # Errors
/// When the file is damaged or holds a dtype that is not supported.
pub fn read_safetensors(place: &str, bytes: &[u8]) -> Result<(Named, HashMap<String, String>)> {
    let damaged = |e: &dyn std::fmt::Display| Error::input(place, format!("is no intact safetensors file: {e}"));
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| damaged(&e))?;
    let file = SafeTensors::deserialize(bytes).map_err(|e| damaged(&e))?;
    let mut all = Vec::new();
    for (name, view) in file.tensors() {
        let dtype = candle_core::DType::try_from(view.dtype())
            .map_err(|_| Error::input(place, format!("`{name}` has the dtype {:?}, which is not supported", view.dtype())))?;
        let tensor = Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &Device::Cpu);
        all.push((name.clone(), tensor.map_err(|e| Error::input(place, format!("`{name}`: {e}")))?));
    }
    Ok((all, header.metadata().clone().unwrap_or_default()))
}

/// Writes tensors with the metadata that transformers looks for.
///
/// # Errors
/// When the disk refuses.
pub fn save(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    save_with(path, tensors, metadata)
}

/// Writes tensors with any metadata.
pub(crate) fn save_with(path: &Path, tensors: &[(String, Tensor)], metadata: HashMap<String, String>) -> Result<()> {
    let named = tensors.iter().map(|(n, t)| (n.as_str(), t));
    let bytes = ::safetensors::serialize(named, Some(metadata)).map_err(|e| Error::fault(path.display(), e))?;
    files::write_atomic(path, &bytes)
}

/// A tensor's bytes as a file holds them.
pub(super) fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    use ::safetensors::View;
    Ok(tensor.contiguous()?.data().into_owned())
}
