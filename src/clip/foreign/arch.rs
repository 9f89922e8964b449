//! What open_clip's configuration says beyond the tensors' shapes: heads, activation, pooling, tokeniser.

use serde_json::{Map, Value};

use crate::clip::clean::Cleaning;
use crate::error::{Error, Result};

/// open_clip's own architectures, as `scripts/open_clip_data.py` wrote them.
const ARCHS: &str = include_str!("archs.json");

/// OpenAI's names of its models, and open_clip's of the same.
const OPENAI: [(&str, &str); 4] = [
    ("ViT-B/32", "ViT-B-32-quickgelu"),
    ("ViT-B/16", "ViT-B-16-quickgelu"),
    ("ViT-L/14", "ViT-L-14-quickgelu"),
    ("ViT-L/14@336px", "ViT-L-14-336-quickgelu"),
];

/// One tower.
#[derive(Debug, Clone)]
pub(super) struct Tower {
    /// transformers' name of the activation.
    pub(super) act: &'static str,
    pub(super) eps: f64,
    /// The rest of the section, whose sizes are compared with the tensors.
    pub(super) sizes: Map<String, Value>,
}

/// An architecture that is a plain CLIP.
#[derive(Debug, Clone)]
pub(super) struct Arch {
    /// What messages call it.
    pub(super) name: String,
    pub(super) vision: Tower,
    pub(super) text: Tower,
    pub(super) embed_dim: Option<usize>,
    /// The end token that pooling looks for; the highest id where there is none.
    pub(super) eos: Option<u64>,
    /// A tokeniser that is not CLIP's.
    pub(super) tokenizer: Option<String>,
    /// What happens to a text first.
    pub(super) cleaning: Cleaning,
}

impl Tower {
    pub(super) fn size(&self, key: &str) -> Option<usize> {
        self.sizes.get(key).and_then(Value::as_u64).map(|n| n as usize)
    }
}

impl Arch {
    /// OpenAI's models: heads of 64, quick GELU.
    pub(super) fn openai() -> Self {
        let tower = || Tower { act: "quick_gelu", eps: 1e-5, sizes: Map::new() };
        Self {
            name: "OpenAI CLIP".into(),
            vision: tower(),
            text: tower(),
            embed_dim: None,
            eos: None,
            tokenizer: None,
            cleaning: Cleaning::Lower,
        }
    }

    /// One of open_clip's architectures, also under OpenAI's names.
    pub(super) fn named(name: &str) -> Result<Self> {
        let all: Map<String, Value> = serde_json::from_str(ARCHS).map_err(|e| Error::fault("archs.json", e))?;
        let key = OPENAI.iter().find(|(n, _)| *n == name).map_or(name, |(_, open_clip)| open_clip);
        let Some(config) = all.get(key) else {
            let best = all.keys().map(|k| (strsim::jaro_winkler(k, name), k)).max_by(|a, b| a.0.total_cmp(&b.0));
            let hint = best.map_or(String::new(), |(_, k)| format!("did you mean {k}? "));
            return Err(Error::input(format!("arch={name}"), "open_clip 3.3 has no such architecture")
                .hint(format!("{hint}the names are those of open_clip.list_models()")));
        };
        Self::from_config(&format!("arch={name}"), key, config)
    }

    /// `open_clip_config.json`, or the bare configuration of a model.
    pub(super) fn from_config(place: &str, name: &str, config: &Value) -> Result<Self> {
        let expected = |what: &str| Error::input(place, format!("expected {what}"));
        let root = config.get("model_cfg").unwrap_or(config).as_object().ok_or_else(|| expected("an object `model_cfg`"))?;
        let section = |key: &str| root.get(key).and_then(Value::as_object).ok_or_else(|| expected(&format!("an object `{key}`")));
        let (vision, text) = (section("vision_cfg")?, section("text_cfg")?);
        if let Some(kind) = other_kind(root, vision, text) {
            return Err(not_clip(place, kind));
        }
        plain(place, "vision_cfg", vision, &VISION)?;
        plain(place, "text_cfg", text, &TEXT)?;
        let quick = root.get("quick_gelu").and_then(Value::as_bool).unwrap_or(false);
        let eos = match text.get("pool_type").and_then(Value::as_str) {
            Some("eos") => Some(text.get("eos_id").and_then(Value::as_u64).unwrap_or(2)),
            _ => None,
        };
        let tokenizer = text.get("hf_tokenizer_name").and_then(Value::as_str).filter(|n| !n.is_empty()).map(ToString::to_string);
        Ok(Self {
            cleaning: cleaning(place, text.get("tokenizer_kwargs"), tokenizer.is_some())?,
            name: name.to_string(),
            vision: tower(place, vision, quick)?,
            text: tower(place, text, quick)?,
            embed_dim: root.get("embed_dim").and_then(Value::as_u64).map(|n| n as usize),
            eos,
            tokenizer,
        })
    }
}

/// How open_clip's tokeniser cleans texts, as its `tokenizer_kwargs` say. Its own lowers the case unless told otherwise; of
/// transformers' tokenisers `foreign` ones do so themselves, or not at all.
fn cleaning(place: &str, kwargs: Option<&Value>, foreign: bool) -> Result<Cleaning> {
    let wrong = |key: &str, found: &Value, expected: &str| {
        Err(Error::input(format!("{place}: text_cfg.tokenizer_kwargs"), format!("`{key}`: only {expected} is supported, found {found}")))
    };
    let mut cleaning = if foreign { Cleaning::Whitespace } else { Cleaning::Lower };
    let empty = Map::new();
    let all = match kwargs {
        None | Some(Value::Null) => &empty,
        Some(Value::Object(all)) => all,
        Some(other) => {
            return Err(Error::input(format!("{place}: text_cfg"), format!("`tokenizer_kwargs`: expected an object, found {other}")));
        }
    };
    for (key, value) in all {
        let named = value.as_str().and_then(Cleaning::named).filter(|c| *c != Cleaning::None);
        cleaning = match (key.as_str(), named) {
            // CLIP's own tokeniser here lowers the case in any event.
            ("clean", Some(found)) if foreign || found != Cleaning::Whitespace => found,
            ("clean", _) if foreign => return wrong(key, value, "lower, whitespace or canonicalize"),
            ("clean", _) => return wrong(key, value, "lower or canonicalize (of CLIP's own tokeniser)"),
            ("strip_sep_token", _) if value == &Value::Bool(false) => cleaning,
            ("strip_sep_token", _) => return wrong(key, value, "false"),
            ("reduction_mask" | "language", _) if value.is_null() || value == "" => cleaning,
            ("reduction_mask" | "language", _) => return wrong(key, value, "null"),
            ("context_length", _) => {
                return Err(Error::input(
                    format!("{place}: text_cfg.tokenizer_kwargs"),
                    format!("`context_length`: {value} is not supported"),
                )
                .hint("text_cfg.context_length says it, to open_clip as well"));
            }
            _ => return Err(Error::input(format!("{place}: text_cfg.tokenizer_kwargs"), format!("`{key}`: {value} is not supported"))),
        };
    }
    Ok(cleaning)
}

/// The refusal of a model that is no CLIP, by what it is.
pub(super) fn not_clip(place: &str, kind: &str) -> Error {
    Error::input(place, format!("is {kind}; only CLIP with a vision transformer and CLIP's text transformer is supported"))
        .hint("plain CLIP models are open_clip's ViT-* and OpenAI's ViT-*, for example openai/clip-vit-base-patch32")
}

fn other_kind(root: &Map<String, Value>, vision: &Map<String, Value>, text: &Map<String, Value>) -> Option<&'static str> {
    let name = |map: &Map<String, Value>, key: &str| map.get(key).and_then(Value::as_str).map(str::to_lowercase);
    let timm = name(vision, "timm_model_name");
    let siglip = timm.as_deref().is_some_and(|n| n.contains("siglip"));
    if siglip || root.get("init_logit_bias").is_some_and(|v| !v.is_null()) {
        return Some("a SigLIP model (sigmoid loss with a bias)");
    }
    if root.get("multimodal_cfg").is_some_and(|v| !v.is_null()) {
        return Some("a CoCa model (it has a text decoder)");
    }
    if timm.is_some() {
        return Some("a model with an image tower of timm's");
    }
    if vision.get("layers").is_some_and(Value::is_array) {
        return Some("a CLIP with a ResNet image tower");
    }
    name(text, "hf_model_name").map(|_| "a model with a text tower of transformers'")
}

/// Keys that must have one of these values, and keys that say no more than sizes or how to train.
struct Keys {
    fixed: &'static [(&'static str, &'static [&'static str])],
    free: &'static [&'static str],
}

const VISION: Keys = Keys {
    fixed: &[
        ("ls_init_value", &["null"]),
        ("attentional_pool", &["false"]),
        ("no_ln_pre", &["false"]),
        ("pool_type", &["\"tok\""]),
        ("block_type", &["null", "\"default\""]),
        ("qk_norm", &["false"]),
        ("scaled_cosine_attn", &["false"]),
        ("scale_heads", &["false"]),
        ("scale_attn_inner", &["false"]),
        ("scale_attn", &["false"]),
        ("scale_fc", &["false"]),
    ],
    // With the class token alone pooled, a norm after pooling is a norm before it.
    free: &[
        "layers",
        "width",
        "head_width",
        "mlp_ratio",
        "patch_size",
        "image_size",
        "patch_dropout",
        "attn_pooler_queries",
        "attn_pooler_heads",
        "pos_embed_type",
        "final_ln_after_pool",
        "output_tokens",
        "act_kwargs",
        "norm_kwargs",
    ],
};

const TEXT: Keys = Keys {
    fixed: &[
        ("tokenizer_mode", &["null", "\"\""]),
        ("ls_init_value", &["null"]),
        ("embed_cls", &["false"]),
        ("no_causal_mask", &["false"]),
        ("pool_type", &["\"argmax\"", "\"eos\""]),
        ("proj_bias", &["false"]),
        ("proj_type", &["\"linear\""]),
        ("block_type", &["null", "\"default\""]),
        ("qk_norm", &["false"]),
        ("scaled_cosine_attn", &["false"]),
        ("scale_heads", &["false"]),
        ("scale_attn_inner", &["false"]),
        ("scale_attn", &["false"]),
        ("scale_fc", &["false"]),
    ],
    free: &[
        "context_length",
        "vocab_size",
        "hf_tokenizer_name",
        "tokenizer_kwargs",
        "width",
        "heads",
        "layers",
        "mlp_ratio",
        "pad_id",
        "eos_id",
        "final_ln_after_pool",
        "output_tokens",
        "act_kwargs",
        "norm_kwargs",
    ],
};

/// Refuses what would change the computation and is not computed here.
fn plain(place: &str, section: &str, map: &Map<String, Value>, keys: &Keys) -> Result<()> {
    for (key, value) in map {
        if keys.free.contains(&key.as_str()) || key.starts_with("timm_") || (key.starts_with("hf_") && section == "text_cfg") {
            continue;
        }
        let found = value.to_string();
        match keys.fixed.iter().find(|(k, _)| k == key) {
            Some((_, legal)) if legal.contains(&found.as_str()) => {}
            Some((_, legal)) => {
                let expected = legal.join(" or ");
                return Err(Error::input(format!("{place}: {section}"), format!("`{key}`: only {expected} is supported, found {found}")));
            }
            None => return Err(Error::input(format!("{place}: {section}"), format!("`{key}`: {found} is not supported"))),
        }
    }
    Ok(())
}

fn tower(place: &str, map: &Map<String, Value>, quick: bool) -> Result<Tower> {
    let kwargs = |key: &str| map.get(key).and_then(Value::as_object).cloned().unwrap_or_default();
    let wrong = |key: &str, found: &Value| Error::input(place, format!("`{key}`: {found} is not supported"));
    let tanh = match kwargs("act_kwargs").get("approximate").and_then(Value::as_str) {
        Some("tanh") => true,
        Some(_) => return Err(wrong("act_kwargs", &map["act_kwargs"])),
        None => false,
    };
    let act = match (quick, tanh) {
        (true, _) => "quick_gelu",
        (false, true) => "gelu_pytorch_tanh",
        (false, false) => "gelu",
    };
    let eps = match kwargs("norm_kwargs").get("eps") {
        None => 1e-5,
        Some(eps) => eps.as_f64().filter(|e| *e > 0.0 && *e < 1.0).ok_or_else(|| wrong("norm_kwargs", eps))?,
    };
    Ok(Tower { act, eps, sizes: map.clone() })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn each_architecture_is_plain_clip_or_refused_by_name() {
        let all: Map<String, Value> = serde_json::from_str(ARCHS).unwrap();
        let mut plain = 0;
        for name in all.keys() {
            match Arch::named(name) {
                Ok(arch) => {
                    plain += 1;
                    assert_eq!(arch.vision.act == "quick_gelu", name.ends_with("quickgelu"), "{name}");
                }
                Err(e) => {
                    let message = e.to_string();
                    let reason = ["SigLIP", "CoCa", "timm", "ResNet", "transformers'", "not supported", "is supported"];
                    assert!(reason.iter().any(|r| message.contains(r)), "{name}: {message}");
                }
            }
        }
        assert!(plain > 30, "{plain}");
        assert_eq!(Arch::named("ViT-B/32").unwrap().vision.act, "quick_gelu");
        assert!(Arch::named("ViT-B-33").unwrap_err().to_string().contains("did you mean ViT-B-32"));
        assert!(Arch::named("ViT-B-16-SigLIP").unwrap_err().to_string().contains("SigLIP"));
    }
}
