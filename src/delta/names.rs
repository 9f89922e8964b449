//! Names of tensors in adapter files of HF PEFT's history and of other trainers.

use std::collections::HashSet;

use candle_core::Tensor;
use peft_adapters::targets::Towers;
use serde_json::{Value, json};

/// Names as HF PEFT 0.21 reads them.
///
/// The name of the adapter in it, `.default`, goes. Where all biases are trained and a module is saved whole, HF PEFT writes the
/// module's bias three times; its own reading takes the one under the module's name. Before 0.5 the bias of a layer with an update
/// stood beside the update (`q_proj.bias`), since then it stands inside (`q_proj.base_layer.bias`).
pub(super) fn of_today(tensors: Vec<(String, Tensor)>) -> Vec<(String, Tensor)> {
    let mut all: Vec<(String, Tensor)> = tensors.into_iter().map(|(name, t)| (without_adapter(&name), t)).collect();
    all.retain(|(name, _)| !name.contains(".original_module."));
    let names: HashSet<String> = all.iter().map(|(name, _)| name.clone()).collect();
    all.retain(|(name, _)| !name.contains(SAVED) || !names.contains(&name.replace(SAVED, ".")));
    for (name, _) in &mut all {
        *name = name.replace(SAVED, ".");
        let Some(owner) = name.strip_suffix(".bias") else { continue };
        let updated = UPDATES.iter().any(|update| names.contains(&format!("{owner}.{update}")));
        let inside = format!("{owner}.base_layer.bias");
        if updated && !names.contains(&inside) {
            *name = inside;
        }
    }
    all
}

/// Between a module that is saved whole and its tensors.
const SAVED: &str = ".modules_to_save.";

/// What stands beside a bias that is inside today.
const UPDATES: [&str; 3] = ["lora_A.weight", "lora_embedding_A", "vera_lambda_b"];

/// Where tensors begin in HF PEFT's files.
const START: &str = "base_model.model.";

/// What stands at the top of one of CLIP's encoders, where it is a model of its own.
const TOP: [&str; 5] = ["encoder.", "embeddings.", "final_layer_norm.", "pre_layrnorm.", "post_layernorm."];

/// transformers 5 has `CLIPTextModel` and `CLIPVisionModel` without the step `text_model` or `vision_model` in their names; it comes
/// back here, in tensors and in what the configuration says of names. Returns whether anything was renamed.
///
/// # Errors
/// When nothing says which encoder is meant.
pub(super) fn of_whole(config: &mut Value, tensors: &mut [(String, Tensor)]) -> Result<bool, String> {
    let bare = |name: &str| name.strip_prefix(START).is_some_and(|n| TOP.iter().any(|top| n.starts_with(top)));
    if !tensors.iter().any(|(name, _)| bare(name)) {
        return Ok(false);
    }
    let class = config["auto_mapping"]["base_model_class"].as_str().unwrap_or_default();
    let any = |parts: &[&str]| tensors.iter().any(|(name, _)| parts.iter().any(|part| name.contains(part)));
    let (step, class) = match class {
        c if c.starts_with("CLIPText") => ("text_model", "CLIPTextModel"),
        c if c.starts_with("CLIPVision") => ("vision_model", "CLIPVisionModel"),
        _ if any(&["final_layer_norm.", "token_embedding."]) => ("text_model", "CLIPTextModel"),
        _ if any(&["pre_layrnorm.", "post_layernorm.", "patch_embedding.", "class_embedding"]) => ("vision_model", "CLIPVisionModel"),
        _ => return Err("has the names of one of CLIP's encoders alone, and `auto_mapping` does not say of which".into()),
    };
    for (name, _) in tensors.iter_mut().filter(|(name, _)| bare(name)) {
        *name = format!("{START}{step}.{}", &name[START.len()..]);
    }
    config["auto_mapping"] = json!({ "base_model_class": class });
    for key in ["target_modules", "exclude_modules", "feedforward_modules"] {
        // A regular expression matches whole paths; names match their ends.
        if let Some(pattern) = config[key].as_str().filter(|p| *p != "all-linear").map(|p| format!("{step}\\.(?:{p})")) {
            config[key] = pattern.into();
        }
    }
    for key in ["rank_pattern", "alpha_pattern"] {
        let Some(patterns) = config[key].as_object_mut() else { continue };
        let whole = |name: &str| match name.strip_prefix('^') {
            Some(rest) => format!("^{step}\\.{rest}"),
            None if TOP.iter().any(|top| name.starts_with(top)) => format!("{step}.{name}"),
            None => name.to_string(),
        };
        *patterns = std::mem::take(patterns).into_iter().map(|(name, value)| (whole(&name), value)).collect();
    }
    Ok(true)
}

/// Whether a tensor belongs to the encoder that an adapter of one alone was not made on.
pub(super) fn is_beside(alone: Towers, name: &str) -> bool {
    let name = name.strip_prefix(START).unwrap_or(name);
    match alone {
        Towers::Text => ["vision_model.", "visual_projection."].iter().any(|part| name.starts_with(part)),
        Towers::Vision => ["text_model.", "text_projection."].iter().any(|part| name.starts_with(part)),
        Towers::Both => false,
    }
}

fn without_adapter(name: &str) -> String {
    name.strip_suffix(".default").unwrap_or(name).replace(".default.", ".")
}

/// Which other program's LoRA these names are, where they are not HF PEFT's, and what to do.
pub(super) fn foreign<'n>(mut names: impl Iterator<Item = &'n str>) -> Option<(&'static str, &'static str)> {
    const TRAIN: &str = "only adapters of CLIP's encoders in HF PEFT's format are read";
    names.find_map(|name| {
        let kohya = ["lora_te_", "lora_te1_", "lora_te2_", "lora_unet_"].iter().any(|start| name.starts_with(start));
        match name {
            _ if kohya && ["hada_w", "lokr_w"].iter().any(|part| name.contains(part)) => {
                Some(("a LyCORIS adapter of Stable Diffusion in kohya's names", TRAIN))
            }
            _ if kohya => Some((
                "a LoRA of Stable Diffusion in kohya's names (sd-scripts, A1111)",
                "diffusers' `pipe.load_lora_weights` and then `pipe.text_encoder.save_pretrained` write the text encoder's part in HF PEFT's \
                 format",
            )),
            _ if name.contains(".lora_linear_layer.") || name.contains(".processor.") || name.starts_with("unet.") || name.starts_with("text_encoder.") => {
                Some((
                    "a LoRA of Stable Diffusion in diffusers' names",
                    "`pipe.load_lora_weights` and `pipe.text_encoder.save_pretrained` write the text encoder's part in HF PEFT's format",
                ))
            }
            _ => None,
        }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn renamed(names: &[&str]) -> Vec<String> {
        let one = |name: &&str| (name.to_string(), Tensor::zeros(1, candle_core::DType::F32, &Device::Cpu).unwrap());
        of_today(names.iter().map(one).collect()).into_iter().map(|(name, _)| name).collect()
    }

    /// As HF PEFT 0.4 and 0.21 write them.
    #[test]
    fn older_names_are_todays() {
        assert_eq!(
            renamed(&["m.q_proj.lora_A.default.weight", "m.q_proj.bias", "m.k_proj.bias"]),
            ["m.q_proj.lora_A.weight", "m.q_proj.base_layer.bias", "m.k_proj.bias"]
        );
        let thrice = ["m.norm.bias", "m.norm.modules_to_save.bias", "m.norm.original_module.bias", "m.norm.weight"];
        assert_eq!(renamed(&thrice), ["m.norm.bias", "m.norm.weight"]);
        assert_eq!(renamed(&["m.norm.modules_to_save.default.weight"]), ["m.norm.weight"]);
    }

    /// Where the configuration does not say which encoder the names are of, parts that only one has do.
    #[test]
    fn encoders_are_told_by_what_they_have() {
        let one = |name: &str| (format!("base_model.model.{name}"), Tensor::zeros(1, candle_core::DType::F32, &Device::Cpu).unwrap());
        let queries = "encoder.layers.0.self_attn.q_proj.lora_A.weight";
        for (other, class, step) in [
            ("final_layer_norm.bias", "", "text_model"),
            ("pre_layrnorm.weight", "", "vision_model"),
            ("encoder.layers.1.layer_norm1.bias", "CLIPVisionModel", "vision_model"),
        ] {
            let (mut config, mut tensors) = (json!({ "auto_mapping": { "base_model_class": class } }), vec![one(queries), one(other)]);
            assert_eq!(of_whole(&mut config, &mut tensors), Ok(true), "{other}");
            assert_eq!(tensors[0].0, format!("base_model.model.{step}.{queries}"));
            assert_eq!(tensors[1].0, format!("base_model.model.{step}.{other}"));
        }
        assert!(of_whole(&mut json!({ "auto_mapping": null }), &mut [one(queries)]).is_err());
        let whole = "text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight";
        assert_eq!(of_whole(&mut json!({}), &mut [one(whole)]), Ok(false));
    }

    #[test]
    fn other_trainers_are_named() {
        for (name, part) in [
            ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "kohya"),
            ("lora_unet_down_blocks_0.hada_w1_a", "LyCORIS"),
            ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight", "diffusers"),
            ("unet.up_blocks.0.attn1.processor.to_q_lora.down.weight", "diffusers"),
        ] {
            assert!(foreign([name].into_iter()).unwrap().0.contains(part), "{name}");
        }
        assert!(foreign(["base_model.model.q_proj.lora_A.weight"].into_iter()).is_none());
    }
}
