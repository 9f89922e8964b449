//! Checkpoints that are not in transformers' layout: OpenAI's archives and open_clip's state dicts. The files that a
//! directory in HF layout would have beside the weights are derived from the checkpoint.

mod arch;
pub(crate) mod export;
mod resize;
mod vocab;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::clean::{self, Cleaning};
use super::config::ClipConfig;
use super::preprocess::{CROP_ROUNDING, TORCHVISION};
use super::source::Source;
use super::spec::Spec;
use super::tokenizer::Tokenizer;
use super::weights::{self, Outline};
use crate::error::{Error, Result};
use crate::files;
use arch::{Arch, Tower, not_clip};
pub(crate) use resize::{Interpolation, image_positions, text_positions};

/// Files by name.
pub(super) type Files = Vec<(String, Vec<u8>)>;

/// What open_clip calls its configuration.
pub(crate) const CONFIG: &str = "open_clip_config.json";

/// Where open_clip looks for weights in a directory, in its order.
pub(crate) const WEIGHTS: [&str; 10] = [
    "open_clip_model.safetensors",
    "open_clip_model.safetensors.index.json",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.bin.index.json",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
];

/// Configurations are pages of text.
const MAX_CONFIG: u64 = 1 << 20;
const MAX_INDEX: u64 = 64 << 20;

/// Buffers of the module that only OpenAI's archives have.
const OPENAI: [&str; 3] = ["input_resolution", "context_length", "vocab_size"];

/// A checkpoint and what was derived from it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Foreign {
    /// The checkpoint, in one file or several.
    pub(crate) weights: Vec<PathBuf>,
    /// `config.json`, `preprocessor_config.json` and the tokeniser's files.
    pub(crate) files: Files,
    /// What the user should know.
    pub(crate) notes: Vec<String>,
}

type Shapes = HashMap<String, Vec<usize>>;

impl Foreign {
    /// The checkpoint in a directory of open_clip's.
    pub(crate) fn in_dir(dir: &Path, spec: &Spec) -> Result<Self> {
        let Some(name) = WEIGHTS.iter().find(|name| dir.join(name).is_file()) else {
            return Err(Error::input(dir.display(), format!("holds no weights: expected one of {}", WEIGHTS.join(", "))));
        };
        let path = dir.join(name);
        if !name.ends_with(".index.json") {
            return Self::open(&path, spec);
        }
        let shards = weights::shards(&path.display().to_string(), &files::read(&path, MAX_INDEX)?)?;
        Self::read(path.display().to_string(), dir, shards.into_keys().map(|shard| dir.join(shard)).collect(), spec)
    }

    /// A checkpoint file.
    pub(crate) fn open(file: &Path, spec: &Spec) -> Result<Self> {
        Self::read(file.display().to_string(), file.parent().unwrap_or(Path::new(".")), vec![file.to_path_buf()], spec)
    }

    fn read(place: String, dir: &Path, weights: Vec<PathBuf>, spec: &Spec) -> Result<Self> {
        let Outline { mut shapes, scalars, mut notes } = weights::outline(&weights)?;
        // Tensors in OpenAI's archives, integers in dicts that were made of them.
        let mut said = |key: &&str| shapes.remove(*key).is_some() || scalars.iter().any(|s| s == *key);
        let openai = OPENAI.iter().map(|key| usize::from(said(key))).sum::<usize>() == OPENAI.len();
        recognise(&place, &shapes)?;
        let beside = dir.join(CONFIG);
        let side = match beside.is_file() && !openai {
            true => Some(json_object(&beside)?),
            false => None,
        };
        let arch = match (&spec.arch, &side) {
            (Some(name), _) => Arch::named(name)?,
            (None, Some(config)) => Arch::from_config(&beside.display().to_string(), CONFIG, config)?,
            (None, None) if openai => Arch::openai(),
            (None, None) => return Err(unknown_arch(&place)),
        };
        let shape = Shape::read(&place, &shapes, &arch, spec)?;
        let preprocess = side.as_ref().and_then(|s| s.get("preprocess_cfg")).cloned().unwrap_or(Value::Null);
        let mut files = vocab::files(dir, &place, shape.vocab_size, arch.tokenizer.as_deref())?;
        said_cleaning(&mut files, &place, arch.cleaning)?;
        for (name, json) in [
            ("config.json", shape.config(&arch)),
            ("preprocessor_config.json", preprocessor(&beside.display().to_string(), &preprocess, shape.image_size)?),
        ] {
            files.push((name.into(), serde_json::to_vec_pretty(&json).map_err(|e| Error::fault(&place, e))?));
        }
        notes.extend(shape.notes(&place));
        Ok(Self { weights, files, notes })
    }
}

/// Notes in `tokenizer_config.json` how texts are cleaned, unless it says so itself; there it stays when the model is converted.
fn said_cleaning(files: &mut Files, place: &str, cleaning: Cleaning) -> Result<()> {
    const NAME: &str = "tokenizer_config.json";
    let at = files.iter().position(|(name, _)| name == NAME);
    let mut config: Map<String, Value> = match at {
        Some(at) => {
            crate::json::from_slice(&files[at].1).map_err(|e| Error::input(format!("{place} ({NAME})"), format!("not valid JSON: {e}")))?
        }
        None => Map::new(),
    };
    config.entry(clean::KEY).or_insert_with(|| cleaning.name().into());
    let bytes = serde_json::to_vec_pretty(&config).map_err(|e| Error::fault(place, e))?;
    match at {
        Some(at) => files[at].1 = bytes,
        None => files.push((NAME.into(), bytes)),
    }
    Ok(())
}

/// CLIP's own tokeniser for a model.
pub(super) fn clip_tokenizer(config: &ClipConfig) -> Result<Tokenizer> {
    // Whatever the model's vocabulary: only the digest is of interest.
    let text = super::config::TextConfig { vocab_size: usize::MAX, ..config.text.clone() };
    Tokenizer::load(&Source::of_files("CLIP's tokeniser", vocab::embedded()?), &text)
}

fn json_object(path: &Path) -> Result<Value> {
    crate::json::from_slice(&files::read(path, MAX_CONFIG)?).map_err(|e| Error::input(path.display(), format!("not valid JSON: {e}")))
}

fn unknown_arch(place: &str) -> Error {
    Error::input(place, "does not say which architecture it is: heads and activation are not in a state dict").hint(format!(
        "pass --arch (recipe: `model: {{ base: FILE, arch: NAME }}`) with open_clip's name, for example ViT-B-32, or \
         ViT-B-32-quickgelu for weights that derive from OpenAI's; or put {CONFIG} beside it"
    ))
}

/// Refuses by name what is no CLIP of open_clip's or OpenAI's.
fn recognise(place: &str, shapes: &Shapes) -> Result<()> {
    let any = |prefix: &str| shapes.keys().any(|name| name.starts_with(prefix));
    let has = |name: &str| shapes.contains_key(name);
    let kind = match () {
        () if has("logit_bias") || any("vision_model.head.") => "a SigLIP model (sigmoid loss with a bias)",
        () if any("text_decoder.") || any("visual.attn_pool") => "a CoCa model (it has a text decoder)",
        () if any("visual.trunk.") => "a model with an image tower of timm's",
        () if any("visual.layer1.") => "a CLIP with a ResNet image tower",
        () if ["embeddings", "encoder", "shared"].iter().any(|part| any(&format!("transformer.{part}."))) => {
            "a model with a text tower of transformers'"
        }
        () if any("vision_model.") || any("text_model.") => {
            return Err(
                Error::input(place, "has transformers' tensor names").hint("name its directory, with config.json beside the weights")
            );
        }
        () if !has("visual.proj") || !has("visual.conv1.weight") => {
            return Err(Error::input(place, "holds no CLIP model: there is no `visual.proj`")
                .hint("expected a checkpoint of OpenAI's or open_clip's, with both towers"));
        }
        () => return Ok(()),
    };
    Err(not_clip(place, kind))
}

/// Sizes, as the tensors have them.
struct Shape {
    width: usize,
    layers: usize,
    mlp: usize,
    heads: usize,
    patch: usize,
    image_size: usize,
    grid: usize,
    text: [usize; 4],
    context: usize,
    stored_context: usize,
    vocab_size: usize,
    embed_dim: usize,
}

impl Shape {
    fn read(place: &str, shapes: &Shapes, arch: &Arch, spec: &Spec) -> Result<Self> {
        let dim = |name: &str, axis: usize, rank: usize| match shapes.get(name) {
            Some(shape) if shape.len() == rank => Ok(shape[axis]),
            Some(shape) => Err(Error::input(place, format!("tensor `{name}` has the shape {shape:?}, expected {rank} dimensions"))),
            None => Err(Error::input(place, format!("holds no tensor `{name}`"))),
        };
        let layers = |tower: &str| {
            let prefix = format!("{tower}transformer.resblocks.");
            (0..).take_while(|i| shapes.contains_key(&format!("{prefix}{i}.attn.in_proj_weight"))).count()
        };
        let mlp = |tower: &str| dim(&format!("{tower}transformer.resblocks.0.mlp.c_fc.weight"), 0, 2);
        let rows = dim("visual.positional_embedding", 0, 2)?;
        let grid = rows.saturating_sub(1).isqrt();
        let (patch, width) = (dim("visual.conv1.weight", 2, 4)?, dim("visual.conv1.weight", 0, 4)?);
        if grid == 0 || grid * grid + 1 != rows {
            return Err(Error::input(place, format!("{rows} positions of an image are no square and a class token")));
        }
        let (text_width, context) = (dim("positional_embedding", 1, 2)?, dim("positional_embedding", 0, 2)?);
        let size = arch.vision.sizes.get("image_size").filter(|v| !v.is_null());
        let image_size = match (spec.image_size, size) {
            (Some(size), _) => size,
            (None, Some(size)) => square(place, size)?,
            (None, None) => grid * patch,
        };
        let shape = Self {
            width,
            layers: layers("visual."),
            mlp: mlp("visual.")?,
            heads: (width / arch.vision.size("head_width").unwrap_or(64).max(1)).max(1),
            patch,
            image_size,
            grid,
            text: [text_width, layers(""), mlp("")?, arch.text.size("heads").unwrap_or(text_width / 64).max(1)],
            context: arch.text.size("context_length").unwrap_or(context),
            stored_context: context,
            vocab_size: dim("token_embedding.weight", 0, 2)?,
            embed_dim: dim("visual.proj", 1, 2)?,
        };
        shape.compare(place, arch)?;
        Ok(shape)
    }

    /// The named architecture and the tensors must be about the same model.
    fn compare(&self, place: &str, arch: &Arch) -> Result<()> {
        let differs = |tower: &Tower, what: &str, key: &str, found: usize| {
            tower.size(key).filter(|said| *said != found).map(|said| format!("{what} {said}, the tensors {found}"))
        };
        let vision = &arch.vision;
        let said = [
            arch.embed_dim.filter(|d| *d != self.embed_dim).map(|d| format!("an embedding of {d}, the tensors {}", self.embed_dim)),
            differs(vision, "an image tower of width", "width", self.width),
            differs(vision, "an image tower of depth", "layers", self.layers),
            differs(vision, "patches of", "patch_size", self.patch),
            differs(&arch.text, "a text tower of width", "width", self.text[0]),
            differs(&arch.text, "a text tower of depth", "layers", self.text[1]),
            differs(&arch.text, "a vocabulary of", "vocab_size", self.vocab_size),
        ];
        match said.into_iter().flatten().next() {
            None => Ok(()),
            Some(what) => Err(Error::input(place, format!("{} has {what}", arch.name)).hint("name the architecture it was trained as")),
        }
    }

    /// `config.json` as transformers writes it.
    fn config(&self, arch: &Arch) -> Value {
        // With 2 transformers pools at the highest id, which is what open_clip does; it is 49407 where CLIP's vocabulary is whole.
        let eos = arch.eos.unwrap_or(if self.vocab_size == 49408 { 49407 } else { 2 });
        let [width, layers, mlp, heads] = self.text;
        json!({
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": self.embed_dim,
            "logit_scale_init_value": 2.6592,
            "text_config": {
                "model_type": "clip_text_model", "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
                "num_attention_heads": heads, "max_position_embeddings": self.context, "vocab_size": self.vocab_size,
                "hidden_act": arch.text.act, "layer_norm_eps": arch.text.eps, "projection_dim": self.embed_dim,
                "bos_token_id": if self.vocab_size == 49408 { 49406 } else { 0 }, "eos_token_id": eos,
            },
            "vision_config": {
                "model_type": "clip_vision_model", "hidden_size": self.width, "intermediate_size": self.mlp,
                "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "image_size": self.image_size,
                "patch_size": self.patch, "num_channels": 3, "hidden_act": arch.vision.act, "layer_norm_eps": arch.vision.eps,
                "projection_dim": self.embed_dim,
            },
        })
    }

    fn notes(&self, place: &str) -> Vec<String> {
        let mut notes = Vec::new();
        let side = self.image_size / self.patch;
        if side != self.grid {
            notes.push(resized(place, self.grid, side, self.image_size, Interpolation::OpenClip));
        }
        if self.context != self.stored_context {
            let (from, to) = (self.stored_context, self.context);
            notes.push(format!(
                "{place}: text positions interpolated from {from} to {to} tokens (linear, as open_clip's resize_text_pos_embed)"
            ));
        }
        notes
    }
}

/// What a note says of interpolated positions.
fn resized(place: &str, from: usize, to: usize, pixels: usize, how: Interpolation) -> String {
    format!("{place}: image positions interpolated from {from}×{from} to {to}×{to} patches for {pixels} px ({})", how.name())
}

fn square(place: &str, size: &Value) -> Result<usize> {
    let pair = size.as_array().map(Vec::as_slice);
    let side = match pair {
        Some([height, width]) if height == width => height.as_u64(),
        Some(_) => None,
        None => size.as_u64(),
    };
    side.map(|n| n as usize).ok_or_else(|| Error::input(place, format!("`image_size`: expected a square, found {size}")))
}

/// `preprocessor_config.json` that does what open_clip's `preprocess_cfg` says.
fn preprocessor(place: &str, config: &Value, size: usize) -> Result<Value> {
    let get = |key: &str| config.get(key).filter(|v| !v.is_null());
    let wrong = |key: &str, found: &Value| Error::input(format!("{place}: preprocess_cfg"), format!("`{key}`: {found} is not supported"));
    let resample = match get("interpolation").map(|v| (v, v.as_str())) {
        Some((_, Some("bilinear"))) => 2,
        // open_clip takes `random` for bicubic outside training.
        None | Some((_, Some("bicubic" | "random"))) => 3,
        Some((found, _)) => return Err(wrong("interpolation", found)),
    };
    let (crop, resize) = match get("resize_mode").map(|v| (v, v.as_str())) {
        None | Some((_, Some("shortest"))) => (true, json!({ "shortest_edge": size })),
        Some((_, Some("squash"))) => (false, json!({ "height": size, "width": size })),
        Some((found, _)) => return Err(wrong("resize_mode", found)),
    };
    let triple = |key: &str, default: [f64; 3]| match get(key) {
        Some(Value::Number(n)) => json!([n, n, n]),
        Some(other) => other.clone(),
        None => json!(default),
    };
    Ok(json!({
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": true,
        "do_resize": true, "size": resize, "resample": resample,
        "do_center_crop": crop, "crop_size": { "height": size, "width": size }, CROP_ROUNDING: TORCHVISION,
        "do_rescale": true, "rescale_factor": 1.0 / 255.0, "do_normalize": true,
        "image_mean": triple("mean", [0.481_454_66, 0.457_827_5, 0.408_210_73]),
        "image_std": triple("std", [0.268_629_54, 0.261_302_58, 0.275_777_11]),
    }))
}

/// The configuration of a base in HF layout for images of another size, and what to say about it.
pub(super) fn resized_files(
    place: &str,
    config: &[u8],
    preprocess: Option<(String, Vec<u8>)>,
    size: usize,
) -> Result<(Files, Option<String>)> {
    let object = |place: &str, bytes: &[u8]| {
        crate::json::from_slice::<Map<String, Value>>(bytes).map_err(|e| Error::input(place, format!("not valid JSON: {e}")))
    };
    let mut config = object(&format!("{place}/config.json"), config)?;
    let vision = config.entry("vision_config").or_insert_with(|| json!({}));
    let get = |vision: &Value, key: &str, default: u64| vision.get(key).and_then(Value::as_u64).unwrap_or(default).max(1) as usize;
    let (patch, old) = (get(vision, "patch_size", 32), get(vision, "image_size", 224));
    if let Some(vision) = vision.as_object_mut() {
        vision.insert("image_size".into(), size.into());
    }
    let mut preprocess = match preprocess {
        Some((place, bytes)) => object(&place, &bytes)?,
        None => Map::new(),
    };
    let squash = preprocess.get("size").is_some_and(|s| s.get("height").is_some_and(|h| !h.is_null()));
    let square = json!({ "height": size, "width": size });
    preprocess.insert("size".into(), if squash { square.clone() } else { json!({ "shortest_edge": size }) });
    preprocess.insert("crop_size".into(), square);
    let write = |map: Map<String, Value>| serde_json::to_vec_pretty(&map).map_err(|e| Error::fault(place, e));
    let files = vec![("config.json".to_string(), write(config)?), ("preprocessor_config.json".to_string(), write(preprocess)?)];
    let (from, to) = (old / patch, size / patch);
    Ok((files, (from != to).then(|| resized(place, from, to, size, Interpolation::Transformers))))
}
