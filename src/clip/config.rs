//! `config.json` of a CLIP model, as transformers 4 and 5 write it.

use peft_adapters::ops::Activation;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// Sizes beyond these are mistakes or attacks, not CLIP models.
const MAX_SIZE: usize = 1 << 20;
/// No image is larger on its way into a model.
const MAX_IMAGE_SIDE: usize = 8192;
const MAX_PARAMETERS: usize = 20_000_000_000;

/// The text encoder's shape.
#[derive(Debug, Clone, PartialEq)]
pub struct TextConfig {
    /// Width.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Context length in tokens.
    pub max_position_embeddings: usize,
    /// Rows of the token table.
    pub vocab_size: usize,
    /// Added to the variance in layer norms.
    pub layer_norm_eps: f64,
    /// The MLP's activation.
    pub hidden_act: Activation,
    /// End of text; 2 is the legacy value that stands for "the highest id".
    pub eos_token_id: u32,
    /// Begin of text.
    pub bos_token_id: u32,
    /// Padding.
    pub pad_token_id: u32,
}

/// The image encoder's shape.
#[derive(Debug, Clone, PartialEq)]
pub struct VisionConfig {
    /// Width.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Side of the square input in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Colour channels.
    pub num_channels: usize,
    /// Added to the variance in layer norms.
    pub layer_norm_eps: f64,
    /// The MLP's activation.
    pub hidden_act: Activation,
}

/// A CLIP model's shape.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipConfig {
    /// The text encoder.
    pub text: TextConfig,
    /// The image encoder.
    pub vision: VisionConfig,
    /// Width of the shared space.
    pub projection_dim: usize,
    /// The logit scale's initial logarithm.
    pub logit_scale_init_value: f64,
}

impl ClipConfig {
    /// blake3 of what the shapes of the weights do not show and results depend on.
    #[must_use]
    pub fn digest(&self) -> String {
        let (t, v) = (&self.text, &self.vision);
        let towers = [
            json!([t.num_attention_heads, t.layer_norm_eps, t.hidden_act]),
            json!([v.num_attention_heads, v.layer_norm_eps, v.hidden_act, v.image_size, v.patch_size]),
        ];
        format!("blake3:{}", blake3::hash(json!(towers).to_string().as_bytes()).to_hex())
    }
}

/// One JSON object with the place it came from.
struct Section<'a> {
    place: String,
    map: Option<&'a Map<String, Value>>,
}

impl Section<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.map.and_then(|m| m.get(key)).filter(|v| !v.is_null())
    }

    fn size(&self, key: &str, default: usize) -> Result<usize> {
        let Some(value) = self.get(key) else { return Ok(default) };
        match value.as_u64() {
            Some(n) if n >= 1 && n as usize <= MAX_SIZE => Ok(n as usize),
            _ => Err(self.wrong(key, &format!("an integer from 1 to {MAX_SIZE}"), value)),
        }
    }

    fn id(&self, key: &str, default: u32) -> Result<u32> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_u64().and_then(|n| u32::try_from(n).ok()).ok_or_else(|| self.wrong(key, "a token id", value))
    }

    fn number(&self, key: &str, default: f64) -> Result<f64> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_f64().filter(|x| x.is_finite()).ok_or_else(|| self.wrong(key, "a number", value))
    }

    fn eps(&self) -> Result<f64> {
        let eps = self.number("layer_norm_eps", 1e-5)?;
        if eps > 0.0 && eps < 1.0 {
            return Ok(eps);
        }
        Err(self.wrong("layer_norm_eps", "a number in (0, 1)", &json!(eps)))
    }

    fn act(&self) -> Result<Activation> {
        let Some(value) = self.get("hidden_act") else { return Ok(Activation::QuickGelu) };
        match value.as_str() {
            Some("quick_gelu") => Ok(Activation::QuickGelu),
            Some("gelu") => Ok(Activation::Gelu),
            Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_fast") => Ok(Activation::GeluTanh),
            Some("relu") => Ok(Activation::Relu),
            Some("silu" | "swish") => Ok(Activation::Silu),
            Some("tanh") => Ok(Activation::Tanh),
            _ => Err(self.wrong("hidden_act", "quick_gelu, gelu, gelu_new, relu, silu or tanh", value)),
        }
    }

    fn wrong(&self, key: &str, expected: &str, found: &Value) -> Error {
        Error::input(&self.place, format!("`{key}`: expected {expected}, found {found}"))
    }
}

impl ClipConfig {
    /// Reads `config.json`; what is missing has transformers' defaults (those of ViT-B/32).
    ///
    /// # Errors
    /// When it is no JSON object, or a size is out of range or inconsistent.
    pub fn from_json(place: &str, bytes: &[u8]) -> Result<Self> {
        let value: Value = crate::json::from_slice(bytes).map_err(|e| Error::input(place, format!("not valid JSON: {e}")))?;
        let Some(root) = value.as_object() else {
            return Err(Error::input(place, "expected a JSON object"));
        };
        if let Some(kind) = root.get("model_type").and_then(Value::as_str)
            && kind != "clip"
        {
            let what = match kind {
                "siglip" | "siglip2" => ": SigLIP (sigmoid loss with a bias, no class token) is not supported",
                _ => "",
            };
            return Err(Error::input(place, format!("`model_type`: expected \"clip\", found \"{kind}\"{what}"))
                .hint("name a whole CLIP model (both towers), for example openai/clip-vit-base-patch32"));
        }
        let top = Section { place: place.to_string(), map: Some(root) };
        let section = |name: &str| Section {
            place: format!("{place}: {name}"),
            // transformers once wrote `<name>_dict`, which then overrides.
            map: [format!("{name}_dict"), name.to_string()].iter().find_map(|key| root.get(key).and_then(Value::as_object)),
        };
        let (text, vision) = (section("text_config"), section("vision_config"));
        let config = Self {
            text: TextConfig::read(&text)?,
            vision: VisionConfig::read(&vision)?,
            projection_dim: top.size("projection_dim", 512)?,
            logit_scale_init_value: top.number("logit_scale_init_value", 2.6592)?,
        };
        config.check(place)?;
        Ok(config)
    }

    fn check(&self, place: &str) -> Result<()> {
        let (t, v) = (&self.text, &self.vision);
        for (name, dim, heads) in
            [("text_config", t.hidden_size, t.num_attention_heads), ("vision_config", v.hidden_size, v.num_attention_heads)]
        {
            if dim % heads != 0 {
                return Err(Error::input(
                    format!("{place}: {name}"),
                    format!("`hidden_size` {dim} is not a multiple of `num_attention_heads` {heads}"),
                ));
            }
        }
        if v.patch_size > v.image_size {
            return Err(Error::input(
                format!("{place}: vision_config"),
                format!("`patch_size` {} is larger than `image_size` {}", v.patch_size, v.image_size),
            ));
        }
        if v.image_size > MAX_IMAGE_SIDE {
            return Err(Error::input(
                format!("{place}: vision_config"),
                format!("`image_size`: expected at most {MAX_IMAGE_SIDE}, found {}", v.image_size),
            ));
        }
        if v.num_channels != 3 {
            return Err(Error::input(
                format!("{place}: vision_config"),
                format!("`num_channels`: expected 3 (RGB), found {}", v.num_channels),
            ));
        }
        if v.num_hidden_layers > 1000 || t.num_hidden_layers > 1000 {
            return Err(Error::input(place, "`num_hidden_layers`: expected at most 1000"));
        }
        let total = self
            .tensors()
            .iter()
            .try_fold(0usize, |sum, (_, shape)| shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).and_then(|n| sum.checked_add(n)))
            .filter(|n| *n <= MAX_PARAMETERS);
        match total {
            Some(_) => Ok(()),
            None => Err(Error::input(place, format!("describes more than {MAX_PARAMETERS} parameters"))),
        }
    }

    /// Every tensor of the model: HF name and shape, in model order.
    #[must_use]
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (t, v) = (&self.text, &self.vision);
        let side = v.image_size / v.patch_size;
        let vision = "vision_model";
        let mut all = vec![
            ("logit_scale".to_string(), vec![]),
            (format!("{vision}.embeddings.class_embedding"), vec![v.hidden_size]),
            (format!("{vision}.embeddings.patch_embedding.weight"), vec![v.hidden_size, v.num_channels, v.patch_size, v.patch_size]),
            (format!("{vision}.embeddings.position_embedding.weight"), vec![side * side + 1, v.hidden_size]),
        ];
        // The misspelling is transformers'.
        norm(&mut all, "vision_model.pre_layrnorm", v.hidden_size);
        blocks(&mut all, vision, v.num_hidden_layers, v.hidden_size, v.intermediate_size);
        norm(&mut all, "vision_model.post_layernorm", v.hidden_size);
        all.push(("visual_projection.weight".into(), vec![self.projection_dim, v.hidden_size]));
        let text = "text_model";
        all.push((format!("{text}.embeddings.token_embedding.weight"), vec![t.vocab_size, t.hidden_size]));
        all.push((format!("{text}.embeddings.position_embedding.weight"), vec![t.max_position_embeddings, t.hidden_size]));
        blocks(&mut all, text, t.num_hidden_layers, t.hidden_size, t.intermediate_size);
        norm(&mut all, "text_model.final_layer_norm", t.hidden_size);
        all.push(("text_projection.weight".into(), vec![self.projection_dim, t.hidden_size]));
        all
    }
}

fn norm(all: &mut Vec<(String, Vec<usize>)>, path: &str, dim: usize) {
    all.push((format!("{path}.weight"), vec![dim]));
    all.push((format!("{path}.bias"), vec![dim]));
}

fn blocks(all: &mut Vec<(String, Vec<usize>)>, tower: &str, depth: usize, dim: usize, mlp: usize) {
    for layer in 0..depth {
        let path = format!("{tower}.encoder.layers.{layer}");
        let mut linear = |name: &str, out: usize, input: usize| {
            all.push((format!("{path}.{name}.weight"), vec![out, input]));
            all.push((format!("{path}.{name}.bias"), vec![out]));
        };
        for name in ["k_proj", "v_proj", "q_proj", "out_proj"] {
            linear(&format!("self_attn.{name}"), dim, dim);
        }
        linear("mlp.fc1", mlp, dim);
        linear("mlp.fc2", dim, mlp);
        norm(all, &format!("{path}.layer_norm1"), dim);
        norm(all, &format!("{path}.layer_norm2"), dim);
    }
}

impl TextConfig {
    fn read(s: &Section<'_>) -> Result<Self> {
        Ok(Self {
            hidden_size: s.size("hidden_size", 512)?,
            intermediate_size: s.size("intermediate_size", 2048)?,
            num_hidden_layers: s.size("num_hidden_layers", 12)?,
            num_attention_heads: s.size("num_attention_heads", 8)?,
            max_position_embeddings: s.size("max_position_embeddings", 77)?,
            vocab_size: s.size("vocab_size", 49408)?,
            layer_norm_eps: s.eps()?,
            hidden_act: s.act()?,
            eos_token_id: s.id("eos_token_id", 49407)?,
            bos_token_id: s.id("bos_token_id", 49406)?,
            pad_token_id: s.id("pad_token_id", 1)?,
        })
    }
}

impl VisionConfig {
    fn read(s: &Section<'_>) -> Result<Self> {
        Ok(Self {
            hidden_size: s.size("hidden_size", 768)?,
            intermediate_size: s.size("intermediate_size", 3072)?,
            num_hidden_layers: s.size("num_hidden_layers", 12)?,
            num_attention_heads: s.size("num_attention_heads", 12)?,
            image_size: s.size("image_size", 224)?,
            patch_size: s.size("patch_size", 32)?,
            num_channels: s.size("num_channels", 3)?,
            layer_norm_eps: s.eps()?,
            hidden_act: s.act()?,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_config_is_vit_b_32() {
        let config = ClipConfig::from_json("config.json", b"{}").unwrap();
        let parameters: usize = config.tensors().iter().map(|(_, s)| s.iter().product::<usize>()).sum();
        assert_eq!(parameters, 151_277_313);
    }

    #[test]
    fn nonsense_is_refused_with_the_key() {
        for (json, key) in [
            (r#"{"text_config": {"hidden_size": 0}}"#, "hidden_size"),
            (r#"{"text_config": {"hidden_size": 100, "num_attention_heads": 3}}"#, "num_attention_heads"),
            (r#"{"vision_config": {"patch_size": 300}}"#, "patch_size"),
            (r#"{"vision_config": {"hidden_act": "mish"}}"#, "hidden_act"),
            (r#"{"vision_config": {"layer_norm_eps": -1}}"#, "layer_norm_eps"),
            (r#"{"model_type": "siglip"}"#, "model_type"),
            (r#"{"projection_dim": "x"}"#, "projection_dim"),
            (r#"{"text_config": {"vocab_size": 1000000, "hidden_size": 1000000, "num_attention_heads": 1}}"#, "parameters"),
            ("[]", "object"),
            ("{", "JSON"),
        ] {
            let message = ClipConfig::from_json("config.json", json.as_bytes()).unwrap_err().to_string();
            assert!(message.contains(key), "{json}: {message}");
        }
    }
}
