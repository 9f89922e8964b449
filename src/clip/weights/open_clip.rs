//! Tensors of OpenAI's and open_clip's state dicts under transformers' names, and back.
//!
//! The layouts hold the same numbers. There, attention's three projections are one matrix, `in_proj_weight`, and the two
//! projections into the shared space are stored transposed.

use std::collections::HashMap;

use candle_core::Tensor;

use super::check::list;
use super::container::{Container, Entry};
use super::names;
use crate::error::{Error, Result};

/// The towers there and here.
const TOWERS: [(&str, &str); 2] = [("visual.transformer.resblocks.", "vision_model"), ("transformer.resblocks.", "text_model")];

/// What stands beside the blocks. The misspelling is transformers'.
const SINGLE: [(&str, &str); 9] = [
    ("logit_scale", "logit_scale"),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre", "vision_model.pre_layrnorm"),
    ("visual.ln_post", "vision_model.post_layernorm"),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final", "text_model.final_layer_norm"),
];

/// Stored transposed.
const TRANSPOSED: [(&str, &str); 2] = [("visual.proj", "visual_projection.weight"), ("text_projection", "text_projection.weight")];

/// Inside a block.
const BLOCK: [(&str, &str); 5] = [
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
];

/// Rows of `in_proj_weight`, in order.
const FUSED: [&str; 3] = ["q_proj", "k_proj", "v_proj"];

/// Values that OpenAI's archives keep as buffers.
const SETTINGS: [&str; 3] = ["input_resolution", "context_length", "vocab_size"];

/// What names begin with, in the layouts of OpenAI and open_clip and in transformers', whose names are refused later on.
const ROOTS: [&str; 17] = [
    "visual.",
    "transformer.",
    "token_embedding.",
    "positional_embedding",
    "ln_final.",
    "text_projection",
    "logit_scale",
    "logit_bias",
    "text.",
    "text_decoder.",
    "vision_model.",
    "text_model.",
    "visual_projection.",
    "attn_mask",
    "input_resolution",
    "context_length",
    "vocab_size",
];

/// open_clip's plain name: without the wrappers of training code, and without `text.` of models whose text tower is a
/// module of its own.
fn plain(name: &str) -> &str {
    let name = names::without_wrappers(name, &ROOTS);
    name.strip_prefix("text.").unwrap_or(name)
}

/// Whether a training script put the model into a module of its own, beside which other tensors are other modules'.
fn wrapped(container: &Container<'_>) -> bool {
    container.entries.iter().any(|e| plain(&e.name) == "visual.proj" && e.name != "visual.proj")
}

/// Tensors beside a wrapped model, such as a head or a prompt learner: they are not parts of it.
fn is_beside(name: &str) -> bool {
    let plain = names::without_wrappers(name, &ROOTS);
    !is_setting(plain) && !ROOTS.iter().any(|root| plain.starts_with(root))
}

/// What a checkpoint says besides its weights: names of plain values, and what is left out, as sentences.
pub(super) fn remarks(container: &Container<'_>) -> (Vec<String>, Vec<String>) {
    let mut notes: Vec<String> = container.notes.iter().map(|note| format!("{}: {note}", container.place)).collect();
    if wrapped(container) {
        let beside: Vec<&str> = container.entries.iter().map(|e| e.name.as_str()).filter(|name| is_beside(name)).collect();
        if !beside.is_empty() {
            let (count, list) = (beside.len(), list(&beside));
            notes.push(format!("{}: {count} tensors beside the CLIP model are left out: {list}", container.place));
        }
    }
    (container.scalars.clone(), notes)
}

/// What is no tensor of the model.
fn is_setting(name: &str) -> bool {
    SETTINGS.contains(&name)
}

/// The checkpoint's entries by open_clip's plain names.
pub(super) fn shapes(container: &Container<'_>) -> HashMap<String, Vec<usize>> {
    container.entries.iter().map(|e| (plain(&e.name).to_string(), e.shape.clone())).collect()
}

/// Renames, splits and transposes entries; nothing is read. Unknown names stay, to be listed as unexpected.
pub(super) fn translate(container: &mut Container<'_>) -> Result<()> {
    let (place, wrapped) = (container.place.clone(), wrapped(container));
    let entries = std::mem::take(&mut container.entries);
    for entry in entries {
        let name = plain(&entry.name).to_string();
        if is_setting(&name) || (wrapped && is_beside(&entry.name)) {
            continue;
        }
        if let Some((_, to)) = TRANSPOSED.iter().find(|(from, _)| *from == name) {
            container.entries.push(transposed(&place, entry, to)?);
        } else if let Some((stem, part)) = fused(&name) {
            container.entries.extend(split(&place, &entry, &stem, part)?);
        } else {
            let name = renamed(&name).unwrap_or(name);
            container.entries.push(Entry { name, ..entry });
        }
    }
    Ok(())
}

/// `visual.transformer.resblocks.3.` → (`vision_model.encoder.layers.3`, the rest).
fn block(name: &str) -> Option<(String, &str)> {
    let (tower, rest) = TOWERS.iter().find_map(|(from, to)| Some((to, name.strip_prefix(from)?)))?;
    let (layer, rest) = rest.split_once('.')?;
    layer.parse::<usize>().ok()?;
    Some((format!("{tower}.encoder.layers.{layer}"), rest))
}

fn renamed(name: &str) -> Option<String> {
    // A module's tensors keep what follows its name.
    let within = |table: &[(&str, &str)], name: &str| {
        table.iter().find_map(|(from, to)| {
            let rest = name.strip_prefix(from)?;
            (rest.is_empty() || rest.starts_with('.')).then(|| format!("{to}{rest}"))
        })
    };
    match block(name) {
        Some((layer, rest)) => Some(format!("{layer}.{}", within(&BLOCK, rest)?)),
        None => within(&SINGLE, name),
    }
}

/// The attention of `…attn.in_proj_weight`, and whether it is the weight or the bias.
fn fused(name: &str) -> Option<(String, &'static str)> {
    let (layer, rest) = block(name)?;
    let part = match rest {
        "attn.in_proj_weight" => "weight",
        "attn.in_proj_bias" => "bias",
        _ => return None,
    };
    Some((format!("{layer}.self_attn"), part))
}

/// In elements, also where the tensor is stored row by row.
fn strides(entry: &Entry) -> Vec<usize> {
    entry.strides.clone().unwrap_or_else(|| {
        let mut strides = vec![1; entry.shape.len()];
        for i in (1..entry.shape.len()).rev() {
            strides[i - 1] = strides[i] * entry.shape[i];
        }
        strides
    })
}

fn misshapen(place: &str, entry: &Entry, expected: &str) -> Error {
    Error::input(place, format!("tensor `{}` has the shape {:?}, expected {expected}", entry.name, entry.shape))
}

fn transposed(place: &str, entry: Entry, name: &str) -> Result<Entry> {
    if entry.shape.len() != 2 {
        return Err(misshapen(place, &entry, "a matrix"));
    }
    let mut strides = strides(&entry);
    strides.reverse();
    let shape = entry.shape.iter().rev().copied().collect();
    Ok(Entry { name: name.to_string(), shape, strides: Some(strides), ..entry })
}

/// A third of the rows for each of query, key and value.
fn split(place: &str, entry: &Entry, stem: &str, part: &str) -> Result<Vec<Entry>> {
    let rows = entry.shape.first().copied().unwrap_or(0);
    if rows == 0 || !rows.is_multiple_of(3) || entry.shape.len() > 2 {
        return Err(misshapen(place, entry, "three projections of one width"));
    }
    let third = rows / 3;
    let size = entry.dtype.as_ref().map_or(1, |d| d.size_in_bytes()) as u64;
    let strides = strides(entry);
    let mut shape = entry.shape.clone();
    shape[0] = third;
    // One more than the last element's index; the container has checked that the whole lies inside its file.
    let extent = 1 + shape.iter().zip(&strides).map(|(n, s)| (n.saturating_sub(1) * s) as u64).sum::<u64>();
    Ok(FUSED
        .iter()
        .enumerate()
        .map(|(i, projection)| {
            let start = entry.range.start + (i * third * strides[0]) as u64 * size;
            Entry {
                name: format!("{stem}.{projection}.{part}"),
                dtype: entry.dtype.clone(),
                shape: shape.clone(),
                strides: entry.strides.clone(),
                range: start..start + extent * size,
            }
        })
        .collect())
}

/// A model's tensors as open_clip names and stores them.
///
/// # Errors
/// When a tensor is missing.
pub(crate) fn state_dict(tensors: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>> {
    let by_name: HashMap<&str, &Tensor> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let mut all = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        if let Some((from, _)) = TRANSPOSED.iter().find(|(_, to)| to == name) {
            all.push(((*from).to_string(), tensor.t()?.contiguous()?));
        } else if let Some(stem) = ["weight", "bias"].iter().find_map(|part| Some((name.strip_suffix(&format!(".q_proj.{part}"))?, part))) {
            let (stem, part) = stem;
            let three = FUSED.iter().map(|p| {
                let name = format!("{stem}.{p}.{part}");
                by_name.get(name.as_str()).copied().ok_or_else(|| Error::fault(name, "is missing"))
            });
            let (layer, _) = back(stem).ok_or_else(|| Error::fault(stem, "is no block's attention"))?;
            all.push((format!("{layer}attn.in_proj_{part}"), Tensor::cat(&three.collect::<Result<Vec<_>>>()?, 0)?));
        } else if name.contains(".k_proj.") || name.contains(".v_proj.") {
            continue;
        } else {
            let theirs = unrenamed(name).ok_or_else(|| Error::fault(name, "has no counterpart in open_clip"))?;
            // A scalar there, whatever the file had.
            let tensor = if theirs == "logit_scale" { tensor.reshape(())? } else { tensor.clone() };
            all.push((theirs, tensor));
        }
    }
    Ok(all)
}

/// `vision_model.encoder.layers.3.rest` → (`visual.transformer.resblocks.3.`, `rest`).
fn back(name: &str) -> Option<(String, &str)> {
    let (tower, rest) = TOWERS.iter().find_map(|(from, to)| Some((from, name.strip_prefix(&format!("{to}.encoder.layers."))?)))?;
    let (layer, rest) = rest.split_once('.')?;
    Some((format!("{tower}{layer}."), rest))
}

fn unrenamed(name: &str) -> Option<String> {
    let within = |table: &[(&str, &str)], name: &str| {
        table.iter().find_map(|(to, from)| {
            let rest = name.strip_prefix(from)?;
            (rest.is_empty() || rest.starts_with('.')).then(|| format!("{to}{rest}"))
        })
    };
    match back(name) {
        Some((layer, rest)) => Some(format!("{layer}{}", within(&BLOCK, rest)?)),
        None => within(&SINGLE, name),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_tensor_of_a_clip_has_a_name_on_both_sides() {
        let config = crate::clip::ClipConfig::from_json("config.json", b"{}").unwrap();
        for (name, _) in config.tensors() {
            if TRANSPOSED.iter().any(|(_, to)| *to == name) || FUSED.iter().any(|p| name.contains(p)) {
                continue;
            }
            let theirs = unrenamed(&name).unwrap();
            assert_eq!(renamed(&theirs).as_deref(), Some(name.as_str()), "{theirs}");
        }
        assert_eq!(renamed("visual.attn_pool.query"), None);
        assert_eq!(fused("transformer.resblocks.7.attn.in_proj_bias"), Some(("text_model.encoder.layers.7.self_attn".into(), "bias")));
    }
}
