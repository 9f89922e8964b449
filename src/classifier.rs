//! The text side of a classifier as a matrix that any CLIP user can apply.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use peft_adapters::{ClassFeatures, Patches, rng};
use serde::Serialize;

use crate::clip::model::{class_logits, cosine_logits, unit_rows};
use crate::clip::weights;
use crate::error::{Error, Result};
use crate::files;
use crate::model::Model;

/// What to write.
#[derive(Debug, Clone, Default)]
pub struct ClassifierOptions {
    /// Class names; the adapter's when empty.
    pub labels: Vec<String>,
    /// Prompts around class names; the adapter's, or CLIP's own, when empty.
    pub templates: Vec<String>,
    /// The safetensors file.
    pub output: PathBuf,
    /// Replace a file that exists.
    pub force: bool,
}

/// What was written.
#[derive(Debug, Clone, Serialize)]
pub struct Written {
    /// Where.
    pub output: PathBuf,
    /// Rows of `weight`, in order.
    pub classes: Vec<String>,
    /// Columns of `weight`: the projection's width.
    pub dim: usize,
    /// What cosines are multiplied by; 1 with a linear head, whose weights hold the scale.
    pub logit_scale: f64,
    /// What is worth knowing.
    pub notes: Vec<String>,
}

/// Writes `weight` [C, P] f32: normalised class features, or a linear head's weights with its `bias` [C]. Then
/// logits = logit_scale · x/‖x‖ · weightᵀ + bias for an image feature x, a temperature that was fitted included. The metadata holds `classes` (a JSON list), `logit_scale`
/// and `templates`.
///
/// # Errors
/// When the adapters' logits are no such product (cocoop, tip_adapter), there are no classes, or the disk refuses.
pub fn classifier(model: &Model, options: &ClassifierOptions) -> Result<Written> {
    let out = &options.output;
    if out.is_dir() || (out.exists() && !options.force) {
        return Err(Error::input(out.display(), "exists").hint("pass --force to replace a file, or choose another name"));
    }
    let scorer = model.scorer(&options.labels, &options.templates)?;
    let Some((weight, bias)) = scorer.matrix(model)? else {
        return Err(Error::input("--classifier", "these class features differ from image to image (cocoop), which no matrix holds")
            .hint("pass --bundle to keep base and adapter together"));
    };
    let notes = notes(model, &weight, bias.is_some())?;
    // Whoever applies the matrix knows no temperature.
    let temperature = scorer.temperature(model);
    let scale = match bias {
        Some(_) => 1.0,
        None => f64::from(model.base().clip.logit_scale(model.patches())?.to_dtype(DType::F32)?.to_scalar::<f32>()?) / temperature,
    };
    let weight = if bias.is_some() { (weight / temperature)? } else { unit_rows(&weight)? };
    let dim = weight.dim(1)?;
    let mut tensors = vec![("weight".to_string(), on_cpu(&weight)?)];
    if let Some(bias) = bias {
        tensors.push(("bias".into(), on_cpu(&(bias / temperature)?)?));
    }
    let json = |list: &[String]| serde_json::to_string(list).map_err(|e| Error::fault("metadata", e));
    let metadata = HashMap::from([
        ("classes".to_string(), json(scorer.labels())?),
        ("logit_scale".to_string(), scale.to_string()),
        ("templates".to_string(), json(scorer.templates())?),
    ]);
    files::refuse_input("--classifier", out)?;
    weights::save_with(out, &tensors, metadata)?;
    Ok(Written { output: out.clone(), classes: scorer.labels().to_vec(), dim, logit_scale: scale, notes })
}

fn on_cpu(t: &Tensor) -> Result<Tensor> {
    Ok(t.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.contiguous()?)
}

/// Refuses what a matrix leaves out; notes what it takes for granted.
fn notes(model: &Model, weight: &Tensor, head: bool) -> Result<Vec<String>> {
    let (clip, patches) = (&model.base().clip, model.patches());
    let size = clip.config().vision.image_size;
    let pixels = rng::normal(&mut rng::rng(17, &[]), 1.0, (2, 3, size, size), DType::F32, &Device::Cpu)?;
    let images = clip.image_features(&pixels, patches)?;
    let differ = |a: &Tensor, b: &Tensor| -> Result<bool> {
        let off = (a.to_dtype(DType::F32)? - b.to_dtype(DType::F32)?)?.abs()?.max_all()?;
        Ok(off.to_scalar::<f32>()? > 1e-6)
    };
    let classes = ClassFeatures::Shared(weight.clone());
    if !head && differ(&class_logits(clip, &images, &classes, patches)?, &cosine_logits(clip, &images, &classes, patches)?)? {
        return Err(Error::input("--classifier", "an adapter adds to the logits what no matrix holds (tip_adapter)")
            .hint("pass --bundle to keep base and adapter together"));
    }
    Ok(match differ(&images, &clip.image_features(&pixels, &Patches::none())?)? {
        true => vec!["the adapters change image features too: apply the matrix to features of base and adapters".to_string()],
        false => Vec::new(),
    })
}
