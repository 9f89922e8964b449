//! `open_clip_config.json` of a model in HF layout.

use peft_adapters::ops::Activation;
use serde_json::{Map, Value, json};

use crate::clip::base::Base;
use crate::clip::clean::Cleaning;
use crate::clip::config::ClipConfig;
use crate::clip::preprocess::{Preprocess, Resample, ResizeTo, Rounding};
use crate::error::{Error, Result};

/// The configuration that makes open_clip build this model, and what it cannot say.
///
/// # Errors
/// When open_clip has no such model.
pub(crate) fn config(base: &Base) -> Result<(Value, Vec<String>)> {
    let config = base.clip.config();
    let (v, t) = (&config.vision, &config.text);
    let [vision_act, text_act] = [v.hidden_act, t.hidden_act];
    let quick = match (vision_act, text_act) {
        (Activation::QuickGelu, Activation::QuickGelu) => true,
        (Activation::Gelu | Activation::GeluTanh, Activation::Gelu | Activation::GeluTanh) => false,
        _ => {
            return Err(Error::input(
                &base.source,
                format!("activations {vision_act:?} and {text_act:?} have no counterpart in open_clip"),
            )
            .hint("open_clip has quick_gelu in both towers, or gelu"));
        }
    };
    let mut vision = object(json!({
        "image_size": v.image_size, "layers": v.num_hidden_layers, "width": v.hidden_size,
        "head_width": v.hidden_size / v.num_attention_heads, "patch_size": v.patch_size,
        "mlp_ratio": ratio(v.hidden_size, v.intermediate_size),
    }));
    extras(&mut vision, vision_act, v.layer_norm_eps);
    let mut text = object(json!({
        "context_length": t.max_position_embeddings, "vocab_size": t.vocab_size, "width": t.hidden_size,
        "heads": t.num_attention_heads, "layers": t.num_hidden_layers, "mlp_ratio": ratio(t.hidden_size, t.intermediate_size),
    }));
    extras(&mut text, text_act, t.layer_norm_eps);
    // open_clip pools at the highest id, as transformers does where the end token is 2.
    if t.eos_token_id != 2 && t.eos_token_id as usize + 1 != t.vocab_size {
        text.insert("pool_type".into(), "eos".into());
        text.insert("eos_id".into(), t.eos_token_id.into());
    }
    if base.tokenizer.pipeline() != super::clip_tokenizer(config)?.pipeline() {
        // With any name open_clip takes the tokeniser that lies beside this file.
        text.insert("hf_tokenizer_name".into(), base.source.to_string().into());
    }
    // What open_clip does unless told otherwise; CLIP's own tokeniser lowers the case here in any event.
    let same = match text.contains_key("hf_tokenizer_name") {
        true => &[Cleaning::None, Cleaning::Whitespace][..],
        false => &[Cleaning::None, Cleaning::Lower, Cleaning::Whitespace],
    };
    if !same.contains(&base.tokenizer.cleaning()) {
        text.insert("tokenizer_kwargs".into(), json!({ "clean": base.tokenizer.cleaning().name() }));
    }
    let mut model = object(json!({ "embed_dim": config.projection_dim, "vision_cfg": vision, "text_cfg": text }));
    if quick {
        model.insert("quick_gelu".into(), true.into());
    }
    let (preprocess, mut notes) = preprocess(&base.preprocess, config);
    if base.tokenizer.cleaning() == Cleaning::None {
        notes.push("open_clip repairs texts before it splits them (ftfy, HTML entities), which this base does not do".into());
    }
    if base.preprocess.do_center_crop && base.preprocess.crop_rounding == Rounding::Transformers {
        notes.push("open_clip's centre crop lies a pixel from this base's where an odd margin is cut".into());
    }
    Ok((json!({ "model_cfg": model, "preprocess_cfg": preprocess }), notes))
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// What is left out where it has open_clip's default.
fn extras(tower: &mut Map<String, Value>, act: Activation, eps: f64) {
    if matches!(act, Activation::GeluTanh) {
        tower.insert("act_kwargs".into(), json!({ "approximate": "tanh" }));
    }
    if eps != 1e-5 {
        tower.insert("norm_kwargs".into(), json!({ "eps": eps }));
    }
}

/// open_clip's MLP has `int(width * ratio)` channels.
fn ratio(width: usize, mlp: usize) -> f64 {
    let exact = mlp as f64 / width as f64;
    if (width as f64 * exact) as usize == mlp { exact } else { (mlp as f64 + 0.5) / width as f64 }
}

fn preprocess(p: &Preprocess, config: &ClipConfig) -> (Value, Vec<String>) {
    let size = config.vision.image_size;
    let decimal = |values: [f32; 3]| values.map(|x| x.to_string().parse::<f64>().unwrap_or(f64::from(x)));
    let (mode, same) = match p.size {
        ResizeTo::ShortestEdge(edge) => ("shortest", edge == size && p.do_center_crop),
        ResizeTo::Exact { height, width } => ("squash", height == size && width == size),
    };
    let interpolation = if p.resample == Resample::Bilinear { "bilinear" } else { "bicubic" };
    let known = matches!(p.resample, Resample::Bilinear | Resample::Bicubic);
    let plain = p.do_resize && p.do_rescale && p.do_normalize && (p.rescale_factor * 255.0 - 1.0).abs() < 1e-6;
    let mut notes = Vec::new();
    if !(same && known && plain) {
        notes.push("preprocess_cfg cannot say all of preprocessor_config.json; open_clip's own transform will differ".to_string());
    }
    let json = json!({ "mean": decimal(p.mean), "std": decimal(p.std), "interpolation": interpolation, "resize_mode": mode });
    (json, notes)
}
