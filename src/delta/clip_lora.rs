//! Adapters of the CLIP-LoRA repository (Zanella & Ben Ayed 2024, arXiv 2405.18541): one `.pt` of
//! `{weights: {layer_<i>: {q_proj: {w_lora_A, w_lora_B}, …}}, metadata: {r, alpha, encoder, params, position}}`.
//!
//! Its update is α/√r · B A, rsLoRA's scaling. Layers are numbered through both encoders, the text's first.

use std::path::Path;

use candle_core::{DType, Tensor};
use serde_json::{Value, json};

use crate::clip::weights::{self, Content};
use crate::error::{Error, Result};
use crate::sign;

/// Its names of the projections, and HF's.
const PARTS: [(&str, &str); 4] = [("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("proj", "out_proj")];

/// Layers of a tower of twelve by the name of their position; `all` is every layer that is there.
const POSITIONS: [(&str, &[usize]); 9] = [
    ("top", &[11]),
    ("top1", &[11]),
    ("top2", &[10, 11]),
    ("top3", &[9, 10, 11]),
    ("bottom", &[0, 1, 2, 3]),
    ("mid", &[4, 5, 6, 7]),
    ("up", &[8, 9, 10, 11]),
    ("half-up", &[6, 7, 8, 9, 10, 11]),
    ("half-bottom", &[0, 1, 2, 3, 4, 5]),
];

/// An adapter as HF PEFT would store it: the configuration and the tensors.
pub(super) type Imported = (Value, Vec<(String, Tensor)>);

/// Larger than any adapter on attention.
const MAX_BYTES: u64 = 1 << 30;

/// One layer: its projections with A and B.
type Layer = Vec<(&'static str, [Tensor; 2])>;

/// Whether a file is an adapter of CLIP-LoRA's, and no model.
#[must_use]
pub fn is_clip_lora(path: &Path) -> bool {
    let small = path.metadata().is_ok_and(|m| m.len() < MAX_BYTES);
    small && weights::read_torch(path).is_ok_and(|c| c.get("weights").is_some() && c.get("metadata").is_some())
}

/// Reads a file of CLIP-LoRA's. Every verb that takes one comes through here, so that none reads what no trusted key has signed.
///
/// # Errors
/// When it is none, or incomplete, or no trusted key has signed it where keys were named.
pub(super) fn read(path: &Path) -> Result<Imported> {
    sign::check_trust(path)?;
    let place = path.display().to_string();
    let content = weights::read_torch(path)?;
    let (Some(Content::Map(layers)), Some(metadata)) = (content.get("weights"), content.get("metadata")) else {
        return Err(Error::input(&place, "is no adapter of CLIP-LoRA's: expected a dict with `weights` and `metadata`")
            .hint("an adapter is a directory with adapter_config.json, or a .pt that CLIP-LoRA saved"));
    };
    let wrong = |key: &str, what: &str| Error::input(&place, format!("`metadata.{key}`: expected {what}"));
    let number = |key: &str| metadata.get(key).and_then(Content::number).filter(|n| *n > 0.0);
    let text = |key: &str| match metadata.get(key) {
        Some(Content::Text(text)) => Ok(text.as_str()),
        _ => Err(wrong(key, "a string")),
    };
    let rank = number("r").filter(|r| r.fract() == 0.0).ok_or_else(|| wrong("r", "a whole number from 1"))? as usize;
    let alpha = number("alpha").ok_or_else(|| wrong("alpha", "a number above 0"))?;
    let layers = (0..layers.len())
        .map(|i| {
            let name = format!("layer_{i}");
            let found = layers.iter().find(|(n, _)| *n == name).ok_or_else(|| Error::input(&place, format!("`weights` lacks {name}")))?;
            layer(&place, &name, &found.1, rank)
        })
        .collect::<Result<Vec<_>>>()?;
    let places = places(&place, text("encoder")?, text("position")?, &layers)?;
    let mut tensors = Vec::new();
    for (path, layer) in places.iter().zip(&layers) {
        for (part, [a, b]) in layer {
            let name = format!("base_model.model.{path}.self_attn.{part}");
            tensors.push((format!("{name}.lora_A.weight"), a.clone()));
            tensors.push((format!("{name}.lora_B.weight"), b.clone()));
        }
    }
    let targets: Vec<String> =
        places.iter().zip(&layers).flat_map(|(p, l)| l.iter().map(move |(part, _)| format!("{p}.self_attn.{part}"))).collect();
    Ok((config(rank, alpha, &targets), tensors))
}

fn layer(place: &str, name: &str, content: &Content, rank: usize) -> Result<Layer> {
    let Content::Map(entries) = content else { return Err(Error::input(place, format!("{name} is no dict"))) };
    if let Some((unknown, _)) = entries.iter().find(|(n, _)| PARTS.iter().all(|(part, _)| part != n)) {
        return Err(Error::input(place, format!("{name} has the unknown part `{unknown}`")));
    }
    let mut found = Vec::new();
    for (theirs, ours) in PARTS {
        let Some(part) = content.get(theirs) else { continue };
        let matrix = |key: &str, axis: usize| match part.get(key) {
            Some(Content::Tensor(t)) if t.rank() == 2 && t.dims()[axis] == rank => Ok(t.to_dtype(DType::F32)?),
            Some(Content::Tensor(t)) => {
                Err(Error::input(place, format!("{name}.{theirs}.{key} has the shape {:?}; `metadata.r` says rank {rank}", t.dims())))
            }
            _ => Err(Error::input(place, format!("{name}.{theirs} lacks the tensor {key}"))),
        };
        found.push((ours, [matrix("w_lora_A", 0)?, matrix("w_lora_B", 1)?]));
    }
    match found.is_empty() {
        true => Err(Error::input(place, format!("{name} holds no tensors"))),
        false => Ok(found),
    }
}

/// The path of each layer's block.
fn places(place: &str, encoder: &str, position: &str, layers: &[Layer]) -> Result<Vec<String>> {
    // The text's tower is narrower in every CLIP that CLIP-LoRA trains.
    let width = |layer: &Layer| layer.first().map_or(0, |(_, [a, _])| a.dims()[1]);
    let texts = match encoder {
        "text" => layers.len(),
        "vision" => 0,
        "both" => match layers.iter().position(|l| width(l) != width(&layers[0])) {
            Some(change) => change,
            None if layers.len().is_multiple_of(2) => layers.len() / 2,
            None => return Err(Error::input(place, "cannot tell the text's layers from the image's: all have one width")),
        },
        other => return Err(Error::input(place, format!("`metadata.encoder`: expected text, vision or both, found {other}"))),
    };
    let tower = |name: &str, count: usize| -> Result<Vec<String>> {
        let indices: Vec<usize> = match POSITIONS.iter().find(|(p, _)| *p == position) {
            _ if count == 0 => Vec::new(),
            None if position == "all" => (0..count).collect(),
            Some((_, indices)) if indices.len() == count => indices.to_vec(),
            Some((_, indices)) => {
                return Err(Error::input(place, format!("`metadata.position` {position} means {} layers, found {count}", indices.len())));
            }
            None => return Err(Error::input(place, format!("`metadata.position`: {position} is none of CLIP-LoRA's"))),
        };
        Ok(indices.into_iter().map(|i| format!("{name}.encoder.layers.{i}")).collect())
    };
    let mut all = tower("text_model", texts)?;
    all.extend(tower("vision_model", layers.len() - texts)?);
    Ok(all)
}

/// `adapter_config.json` of HF PEFT.
fn config(rank: usize, alpha: f64, targets: &[String]) -> Value {
    json!({
        "peft_type": "LORA",
        "task_type": null,
        "inference_mode": true,
        "auto_mapping": { "base_model_class": "CLIPModel", "parent_library": "transformers.models.clip.modeling_clip" },
        "base_model_name_or_path": null,
        "revision": null,
        "r": rank,
        "lora_alpha": if alpha.fract() == 0.0 { json!(alpha as i64) } else { json!(alpha) },
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "use_rslora": true,
        "use_dora": false,
        "target_modules": targets,
        "exclude_modules": null,
        "modules_to_save": null,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": null,
    })
}
