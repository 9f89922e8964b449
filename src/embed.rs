//! `peft embed`: features of images and texts in one safetensors file.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::Tensor;

use crate::clip::model::unit_rows;
use crate::clip::weights;
use crate::data::is_image;
use crate::error::{Error, Result};
use crate::files;
use crate::model::Model;

/// The largest list of texts, labels or paths.
const MAX_LIST: u64 = 1 << 30;

/// What to embed.
#[derive(Debug, Clone, Default)]
pub struct EmbedOptions {
    /// A directory of images, or a text file with one path a line.
    pub images: Option<PathBuf>,
    /// A text file with one text a line; blank lines are texts too.
    pub texts: Option<PathBuf>,
    /// The file to write.
    pub output: PathBuf,
    /// Divide each row by its Euclidean norm.
    pub normalize: bool,
}

/// What was embedded.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Embedded {
    /// The file.
    pub output: PathBuf,
    /// Rows of `image_embeds`.
    pub images: usize,
    /// Rows of `text_embeds`.
    pub texts: usize,
    /// Width of a row.
    pub dim: usize,
    /// Texts that were cut to the model's context.
    pub truncated: usize,
    /// Lines without a text, whose rows are features of the empty text.
    pub blank: usize,
}

/// Writes `image_embeds` [N, P] and `text_embeds` [M, P], f32, in input order; their sources stand in
/// the metadata as JSON arrays under `images` and `texts`.
///
/// # Errors
/// When an input cannot be read or the disk refuses.
pub fn embed(model: &Model, options: &EmbedOptions) -> Result<Embedded> {
    check_output(options)?;
    let images = options.images.as_deref().map(list_images).transpose()?;
    let texts = options.texts.as_deref().map(read_texts).transpose()?;
    if images.is_none() && texts.is_none() {
        return Err(Error::input("embed", "there is nothing to embed").hint("pass --images, --texts or both"));
    }
    let mut tensors = Vec::new();
    let mut metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let mut truncated = 0;
    if let Some(images) = &images {
        tensors.push(("image_embeds".to_string(), finished(model.embed_images(images)?, options.normalize)?));
        let names: Vec<String> = images.iter().map(|p| p.display().to_string()).collect();
        metadata.insert("images".into(), json(&names)?);
    }
    if let Some(texts) = &texts {
        let (features, cut) = model.embed_texts(texts)?;
        truncated = cut;
        tensors.push(("text_embeds".to_string(), finished(features, options.normalize)?));
        metadata.insert("texts".into(), json(texts)?);
    }
    weights::save_with(&options.output, &tensors, metadata)?;
    Ok(Embedded {
        output: options.output.clone(),
        images: images.map_or(0, |i| i.len()),
        texts: texts.as_ref().map_or(0, Vec::len),
        dim: model.base().clip.config().projection_dim,
        truncated,
        blank: texts.iter().flatten().filter(|t| t.is_empty()).count(),
    })
}

fn finished(features: Tensor, normalize: bool) -> Result<Tensor> {
    let features = if normalize { unit_rows(&features)? } else { features };
    Ok(features.to_device(&candle_core::Device::Cpu)?.contiguous()?)
}

fn json(list: &[String]) -> Result<String> {
    serde_json::to_string(list).map_err(|e| Error::fault("metadata", e))
}

/// The images of a directory, sorted, or the paths that a text file lists, in its order.
///
/// # Errors
/// When there is none.
pub fn list_images(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(read_lines(path)?.into_iter().map(PathBuf::from).collect());
    }
    let entries = walkdir::WalkDir::new(path).follow_links(true).sort_by_file_name().into_iter().filter_map(std::result::Result::ok);
    let images: Vec<PathBuf> =
        entries.filter(|e| e.file_type().is_file() && is_image(e.path())).map(walkdir::DirEntry::into_path).collect();
    match images.is_empty() {
        true => Err(Error::input(path.display(), "holds no image")),
        false => Ok(images),
    }
}

/// The lines of a text file, blank ones left out.
///
/// # Errors
/// When the file is missing, no UTF-8, or empty.
pub fn read_lines(path: &Path) -> Result<Vec<String>> {
    files::read_lines(path, MAX_LIST)
}

/// Every line of a text file, so that rows are lines; white space at their ends says nothing.
fn read_texts(path: &Path) -> Result<Vec<String>> {
    let text = files::read_text(path, MAX_LIST)?;
    let lines: Vec<String> = files::lines(&text).map(|l| l.trim_end().to_string()).collect();
    match lines.is_empty() {
        true => Err(Error::input(path.display(), "has no lines")),
        false => Ok(lines),
    }
}

/// An output that would replace what is read, or that cannot be a file, before any work is done.
fn check_output(options: &EmbedOptions) -> Result<()> {
    let out = &options.output;
    if out.is_dir() {
        return Err(Error::input(out.display(), "is a directory, expected a file to write"));
    }
    let same = |path: &Path| path.canonicalize().ok().zip(out.canonicalize().ok()).is_some_and(|(a, b)| a == b);
    match [&options.images, &options.texts].into_iter().flatten().find(|p| same(p)) {
        Some(input) => {
            Err(Error::input(out.display(), format!("would replace the input {}", input.display())).hint("choose another --output"))
        }
        None => Ok(()),
    }
}
