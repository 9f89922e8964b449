//! Base and adapters as one directory that every command takes as a base: for what does not fold.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use peft_adapters::rng;
use serde::Serialize;

use crate::clip::base::{BUNDLE, Base};
use crate::delta::{Bundle, Bundled, Manifest, Vocabulary, bundle_digest, bundle_files, bundled, manifest};
use crate::error::{Error, Result};
use crate::files;
use crate::merge::{self, Layout, MergeOptions};
use crate::model::Model;

/// What was bundled.
#[derive(Debug, Clone, Serialize)]
pub struct Done {
    /// Where.
    pub output: PathBuf,
    /// The adapters in it, in order of application.
    pub adapters: Vec<PathBuf>,
    /// Largest difference of a logit between base + adapters and the bundle, relative to the largest logit.
    pub relative_diff: f64,
    /// `F32`, `F16`, `BF16`: the base's files.
    pub dtype: String,
    /// What is worth knowing.
    pub notes: Vec<String>,
}

/// Images of the check.
const PROBES: usize = 3;

/// `peft merge --bundle`. The base's own files stay what they are, so that other programs can load it without the adapters.
///
/// # Errors
/// When an adapter does not fit, has a weight other than 1, or the bundle's logits differ from those of base and adapters.
pub fn bundle(options: &MergeOptions) -> Result<Done> {
    merge::check_output(options)?;
    if options.adapters.is_empty() {
        return Err(Error::input("--bundle", "expected at least one --adapter"));
    }
    if let Some((dir, weight)) = options.adapters.iter().find(|(_, w)| *w != 1.0) {
        let message = format!("a bundle keeps adapters as they are, so the weight {weight} has no meaning");
        return Err(Error::input(dir.display(), message).hint("leave =WEIGHT out"));
    }
    let base = Base::load(&options.model, DType::F32, &Device::Cpu)?;
    let dtype = options.dtype.unwrap_or(base.file_dtype);
    let before: Vec<PathBuf> = bundled(&options.model)?;
    let own = options.adapters.iter().map(|(dir, _)| dir.clone());
    let (sources, mut parts): (Vec<PathBuf>, Vec<Bundled>) = (before.into_iter().chain(own).collect(), Vec::new());
    let mut model = Model::load(&options.model)?;
    for (dir, _) in &options.adapters {
        model = model.with_adapter_of(dir, options.allow_base_mismatch)?;
    }
    let expected = probe(&model)?;
    let (tensors, _) = merge::folded(&base, &[], dtype)?;
    let (mut relative_diff, mut notes) = (f64::NAN, model.notes().to_vec());
    // Whatever cannot be a line is in the adapters themselves.
    let vocabulary = match vocabulary(&sources, &base)?.in_lines(&base.tokenizer) {
        Ok((vocabulary, said)) => {
            notes.extend(said);
            vocabulary
        }
        Err(error) => {
            notes.push(format!("labels.txt and templates.txt are not written: {}", error.report().message));
            Vocabulary::default()
        }
    };
    merge::write(&base, &tensors, dtype, Layout::Hf, &options.output, &mut notes, |dir: &Path| {
        for (i, source) in sources.iter().enumerate() {
            let part = PathBuf::from("adapters").join(i.to_string());
            copy(source, &dir.join(&part))?;
            parts.push(Bundled { digest: bundle_digest(&dir.join(&part))?, dir: part });
        }
        let bundle = Bundle { version: env!("CARGO_PKG_VERSION").into(), adapters: std::mem::take(&mut parts) };
        files::write_json(&dir.join(BUNDLE), &bundle)?;
        vocabulary.write(dir, &base.source.to_string(), Some(model.image_options().pixels()))?;
        relative_diff = check(dir, &expected, dtype)?;
        Ok(())
    })?;
    Ok(Done { output: options.output.clone(), adapters: sources, relative_diff, dtype: dtype.as_str().to_uppercase(), notes })
}

/// Classes and templates of the last adapter that has any, or of the base.
fn vocabulary(adapters: &[PathBuf], base: &Base) -> Result<Vocabulary> {
    let manifests: Vec<Manifest> = adapters.iter().map(|dir| manifest(dir)).filter_map(Result::transpose).collect::<Result<_>>()?;
    match Vocabulary::of_adapters(&manifests) {
        own if own.classes.is_empty() => Vocabulary::of(&base.source),
        own => Ok(own),
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    for name in bundle_files(from)? {
        let target = to.join(&name);
        let bytes = std::fs::read(from.join(&name)).map_err(|e| Error::read(from.join(&name), e))?;
        files::write_atomic(&target, &bytes)?;
    }
    Ok(())
}

/// Logits of random images for the adapters' classes, or for a few labels.
fn probe(model: &Model) -> Result<Tensor> {
    let size = model.base().clip.config().vision.image_size;
    let pixels = rng::normal(&mut rng::rng(17, &[]), 1.0, (PROBES, 3, size, size), DType::F32, &Device::Cpu)?;
    if model.tells() {
        return model.outputs(&pixels, &(0..PROBES).map(|i| ["a cat", "red", "12:30"][i % 3].to_string()).collect::<Vec<_>>());
    }
    let known = model.manifest().is_some_and(|m| !m.classes.is_empty());
    let labels: Vec<String> = if known { Vec::new() } else { ["cat", "red", "12:30"].map(String::from).to_vec() };
    let features = model.base().clip.image_features(&pixels, model.patches())?;
    model.scorer(&labels, &[])?.logits(model, &features)
}

/// The bundle as a base gives what base and adapters gave.
fn check(dir: &Path, expected: &Tensor, dtype: DType) -> Result<f64> {
    let found = probe(&Model::load(&dir.display().to_string())?)?;
    // What a task has no output for is not a number on either side.
    let there = expected.eq(expected)?;
    let (expected, found) = (there.where_cond(expected, &expected.zeros_like()?)?, there.where_cond(&found, &found.zeros_like()?)?);
    let relative = merge::max_abs(&(&expected - found)?)? / merge::max_abs(&expected)?.max(1e-12);
    let tolerance = merge::tolerance(dtype);
    match relative <= tolerance {
        true => Ok(relative),
        false => Err(Error::Verdict(format!(
            "the bundle's logits differ by {relative:.2e} (relative), more than {tolerance:.0e} for {}; nothing was written",
            dtype.as_str()
        ))),
    }
}
