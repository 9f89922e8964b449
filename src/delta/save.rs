//! Writing an adapter directory, whole or not at all.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use peft_adapters::{MethodConfig, Param, Patch, Sites};

use super::{Adapters, Manifest, MethodRef, file, named};
use crate::clip::weights;
use crate::error::{Error, Result};
use crate::files;

/// Writes `adapters` to `dir` and returns the bytes of all files.
///
/// # Errors
/// When the disk refuses; the directory is then as it was.
pub fn save(dir: &Path, adapters: &Adapters, sites: &Sites, manifest: &Manifest) -> Result<u64> {
    files::replace_dir(dir, |tmp| {
        let mut manifest = manifest.clone();
        manifest.methods.clear();
        let parts: Vec<_> = adapters.methods.iter().zip(&adapters.ranges).zip(adapters.view.iter().skip(adapters.beneath)).collect();
        let params: Vec<&Param> = adapters.params.iter().collect();
        for (index, ((method, range), patch)) in parts.iter().enumerate() {
            let place = match parts.len() {
                1 => tmp.to_path_buf(),
                _ => tmp.join(format!("{index}-{}", method.name())),
            };
            let digest = write_method(&place, method, *patch, &params[(*range).clone()], sites, &manifest)?;
            if parts.len() > 1 {
                manifest.methods.push(MethodRef { dir: format!("{index}-{}", method.name()), digest });
            }
        }
        let own = &params[adapters.own_from()..];
        if !own.is_empty() {
            weights::save(&tmp.join(file::TASK), &values(own)?)?;
        }
        files::write_json(&tmp.join(file::MANIFEST), &manifest)
    })?;
    Ok(files::dir_size(dir))
}

/// An adapter directory may be replaced, with `force`; anything else that exists may not.
///
/// # Errors
/// When something is in the way.
pub fn check_output(output: &Path, force: bool) -> Result<()> {
    let empty = !output.exists() || output.read_dir().is_ok_and(|mut d| d.next().is_none());
    let ours = [file::CONFIG, file::MANIFEST].iter().any(|f| output.join(f).exists());
    match (empty, ours, force) {
        (true, ..) | (_, true, true) => Ok(()),
        (_, true, false) => Err(Error::input(output.display(), "exists").hint("pass --force to replace it")),
        _ => Err(Error::input(output.display(), "exists and is no adapter").hint("choose another --output")),
    }
}

fn values(params: &[&Param]) -> Result<Vec<(String, Tensor)>> {
    params.iter().map(|p| Ok((p.name.clone(), cpu(p.var.as_tensor())?))).collect()
}

fn cpu(t: &Tensor) -> Result<Tensor> {
    Ok(t.detach().to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?)
}

fn write_method(
    dir: &Path,
    method: &MethodConfig,
    patch: &dyn Patch,
    params: &[&Param],
    sites: &Sites,
    manifest: &Manifest,
) -> Result<String> {
    let tensors = match patch.export()? {
        Some(exported) => exported.into_iter().map(|(n, t)| Ok((n, cpu(&t)?))).collect::<Result<_>>()?,
        None => values(params)?,
    };
    let path = dir.join(file::weights(method.name()));
    weights::save(&path, &tensors)?;
    let mut config = method.to_adapter_config(sites).map_err(|e| named(method, e))?;
    patch.export_config(&mut config)?;
    if let Some(name) = config.get_mut("base_model_name_or_path") {
        *name = manifest.base.name.clone().into();
    }
    files::write_json(&dir.join(file::CONFIG), &config)?;
    let bytes = std::fs::read(&path).map_err(|e| Error::read(&path, e))?;
    Ok(format!("blake3:{}", blake3::hash(&bytes).to_hex()))
}
