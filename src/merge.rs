//! Folding adapters into the base: a complete directory in HF or open_clip layout, checked after it is written.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use peft_adapters::{Patches, rng};
use serde::Serialize;

use crate::clip::base::Base;
use crate::clip::clean::Cleaning;
use crate::clip::decode::PixelOptions;
use crate::clip::preprocess::Rounding;
use crate::clip::source::PREPROCESSOR;
use crate::clip::tokenizer::Tokenizer;
use crate::clip::{Clip, TextBatch, foreign, weights};
use crate::delta::{Delta, Manifest, Vocabulary, bundled, locate, other_vocabulary};
use crate::error::{Error, Result};
use crate::files;

/// Whose layout a model is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// transformers' `save_pretrained`.
    #[default]
    Hf,
    /// open_clip's: its tensor names and `open_clip_config.json`.
    OpenClip,
}

impl Layout {
    /// The configuration and the weights.
    fn files(self) -> [&'static str; 2] {
        match self {
            Self::Hf => ["config.json", "model.safetensors"],
            Self::OpenClip => [foreign::CONFIG, foreign::WEIGHTS[0]],
        }
    }
}

/// What to merge.
#[derive(Debug, Clone)]
pub struct MergeOptions {
    /// The base.
    pub model: String,
    /// Adapter directories, each with a weight (1 is the whole adapter).
    pub adapters: Vec<(PathBuf, f64)>,
    /// Where the merged model goes.
    pub output: PathBuf,
    /// The files' dtype; the base's when left out.
    pub dtype: Option<DType>,
    /// Whose layout is written.
    pub layout: Layout,
    /// Replace a directory that exists.
    pub force: bool,
    /// Accept adapters of another base.
    pub allow_base_mismatch: bool,
}

/// What was merged.
#[derive(Debug, Clone, Serialize)]
pub struct Merged {
    /// Where.
    pub output: PathBuf,
    /// Largest difference of a logit between base + adapter and the merged files.
    pub max_abs_diff: f64,
    /// The same relative to the largest logit.
    pub relative_diff: f64,
    /// What was allowed.
    pub tolerance: f64,
    /// How many tensors changed.
    pub changed_tensors: usize,
    /// `F32`, `F16`, `BF16`.
    pub dtype: String,
    /// `hf` or `open_clip`.
    pub layout: Layout,
    /// What is worth knowing.
    pub notes: Vec<String>,
}

/// Images and texts of the check.
const PROBES: usize = 4;

/// `peft merge`.
///
/// # Errors
/// When an adapter does not fold, or when the reloaded model differs by more than the dtype's rounding explains: the
/// verdict says by how much. Nothing is written then.
pub fn merge(options: &MergeOptions) -> Result<Merged> {
    check_output(options)?;
    let base = Base::load(&options.model, DType::F32, &Device::Cpu)?;
    let dtype = options.dtype.unwrap_or(base.file_dtype);
    let mut notes = base.source.notes().to_vec();
    let Folding { adapters, notes: more, manifests } = adapters(&base, options)?;
    notes.extend(more);
    let pixels = manifests.iter().rev().find_map(Manifest::pixels);
    notes.extend(lost_pixels(&manifests));
    let vocabulary = match Vocabulary::of_adapters(&manifests) {
        own if own.classes.is_empty() => Vocabulary::of(&base.source)?,
        own => own,
    };
    let (vocabulary, said) = vocabulary.in_lines(&base.tokenizer)?;
    notes.extend(said);
    let (tensors, changed_tensors) = folded(&base, &adapters, dtype)?;
    let expected = expected(&base, adapters)?;
    let mut check = Check::default();
    write(&base, &tensors, dtype, options.layout, &options.output, &mut notes, |dir| {
        check = verify(dir, &expected, dtype, &options.output)?;
        vocabulary.write(dir, &base.source.to_string(), pixels)?;
        Ok(())
    })?;
    Ok(Merged {
        output: options.output.clone(),
        max_abs_diff: check.diff,
        relative_diff: check.relative,
        tolerance: check.tolerance,
        changed_tensors,
        dtype: dtype.as_str().to_uppercase(),
        layout: options.layout,
        notes,
    })
}

/// What the check found.
#[derive(Default)]
struct Check {
    diff: f64,
    relative: f64,
    tolerance: f64,
}

/// Loads what was written and compares its logits; the directory is published only if they agree.
fn verify(dir: &Path, expected: &Tensor, dtype: DType, output: &Path) -> Result<Check> {
    let reloaded = Base::load(&dir.display().to_string(), DType::F32, &Device::Cpu)?;
    let found = probe(&reloaded.clip, &reloaded.tokenizer, &Patches::none())?;
    let diff = max_abs(&(expected - &found)?)?;
    let relative = diff / max_abs(expected)?.max(1e-12);
    let tolerance = tolerance(dtype);
    if relative.is_nan() || relative > tolerance {
        return Err(Error::Verdict(format!(
            "{}: the merged model's logits differ by {relative:.2e} (relative), more than {tolerance:.0e} for {}; nothing was written",
            output.display(),
            dtype.as_str()
        )));
    }
    Ok(Check { diff, relative, tolerance })
}

/// How far logits may part by rounding to `dtype`, relative.
pub(crate) fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2e-3,
        DType::BF16 => 2e-2,
        _ => 1e-4,
    }
}

pub(crate) fn check_output(options: &MergeOptions) -> Result<()> {
    let out = &options.output;
    let same = |path: &Path| path.canonicalize().ok().zip(out.canonicalize().ok()).is_some_and(|(a, b)| a == b);
    if same(Path::new(&options.model)) || options.adapters.iter().any(|(a, _)| same(a)) {
        return Err(Error::input(out.display(), "is the base or an adapter itself").hint("choose another --output"));
    }
    if !out.exists() {
        return Ok(());
    }
    let ours = [Layout::Hf, Layout::OpenClip].iter().any(|l| l.files().iter().all(|f| out.join(f).exists()));
    let empty = out.read_dir().is_ok_and(|mut d| d.next().is_none());
    match (empty, options.force && ours) {
        (true, _) | (_, true) => Ok(()),
        _ if ours => Err(Error::input(out.display(), "exists").hint("pass --force to replace it")),
        _ => Err(Error::input(out.display(), "exists and is no merged model").hint("choose another --output")),
    }
}

/// An adapter's hooks and how much of it is folded.
pub(crate) type Weighted = (Patches, f64);

/// What is folded.
struct Folding {
    adapters: Vec<Weighted>,
    notes: Vec<String>,
    manifests: Vec<Manifest>,
}

/// What a plain checkpoint has no place for: how images became pixels.
fn lost_pixels(manifests: &[Manifest]) -> Option<String> {
    let trained = manifests.iter().filter_map(Manifest::pixels).rfind(|p| *p != PixelOptions::default())?;
    Some(format!(
        "the adapter was trained on images with {trained}, which a plain checkpoint cannot say: prepare images the same way, or keep \
         base and adapter together in a bundle"
    ))
}

/// The adapters' hooks with their weights; refused where one does not fold.
fn adapters(base: &Base, options: &MergeOptions) -> Result<Folding> {
    let (mut all, mut notes, mut manifests) = (Vec::new(), Vec::new(), Vec::new());
    // What a bundle brings along was made for the base alone.
    let own = options.adapters.iter().map(|(dir, weight)| (dir.clone(), *weight, options.allow_base_mismatch));
    let beneath = bundled(&options.model)?.into_iter().map(|dir| (dir, 1.0, true));
    for (dir, weight, allow) in &beneath.chain(own).collect::<Vec<_>>() {
        if !weight.is_finite() {
            return Err(Error::input("--adapter", format!("expected a finite weight, found {weight}")));
        }
        let delta = Delta::read(&locate(dir)?)?;
        notes.extend(delta.check_base(base, *allow)?);
        if !delta.own.is_empty() {
            let names: Vec<&str> = delta.own.iter().map(|(n, _)| n.as_str()).collect();
            return Err(Error::input(dir.display(), format!("has a task head ({}), which plain CLIP has no place for", names.join(", ")))
                .hint("keep base and adapter apart, pass --bundle for one directory with both, or --classifier FILE for the head"));
        }
        if let (Some(before), Some(next)) = (manifests.last(), &delta.manifest) {
            notes.extend(other_vocabulary(before, dir, next));
        }
        let mut adapters = delta.apply(&base.clip)?;
        notes.extend_from_slice(adapters.params.notes());
        for (patch, method) in adapters.view.iter().zip(&adapters.methods) {
            if let Some(why) = patch.unfoldable() {
                return Err(Error::input(dir.display(), format!("{} does not fold: {why}", method.name()))
                    .hint("keep base and adapter apart (every command takes --adapter), or pass --bundle for one directory with both"));
            }
        }
        adapters.view.prepare(&peft_adapters::Step::eval())?;
        all.push((adapters.view, *weight));
        manifests.extend(delta.manifest);
    }
    Ok(Folding { adapters: all, notes, manifests })
}

/// All tensors in model order with the adapters folded in, f32 arithmetic, cast to `dtype` at the end.
pub(crate) fn folded(base: &Base, adapters: &[Weighted], dtype: DType) -> Result<(Vec<(String, Tensor)>, usize)> {
    let (mut all, mut changed) = (Vec::new(), 0);
    for (id, weight) in base.clip.sites().weights() {
        let mut value = weight.tensor.clone();
        let mut is_changed = false;
        // As in a forward pass: what replaces weights comes first, whatever the order of the adapters.
        let mut take = |value: &mut Tensor, new: Tensor, share: f64| -> Result<()> {
            is_changed = true;
            // W + w·(W' − W), exact where w is 1.
            *value = if share == 1.0 { new } else { (&*value + ((new - &*value)? * share)?)? };
            Ok(())
        };
        for (patches, share) in adapters {
            let new = patches.weight(id, &value)?;
            if new.id() != value.id() {
                take(&mut value, new.detach(), *share)?;
            }
        }
        for (patches, share) in adapters {
            if let Some(new) = patches.fold_onto(id, &value)? {
                take(&mut value, new, *share)?;
            }
        }
        changed += usize::from(is_changed);
        let cast = value.to_dtype(dtype)?;
        if is_changed && !max_abs(&value)?.is_finite() {
            return Err(Error::input(&weight.name, "is not finite after folding"));
        }
        if !max_abs(&cast)?.is_finite() {
            return Err(Error::input("--dtype", format!("{} does not fit into {}", weight.name, dtype.as_str())).hint("use bf16 or f32"));
        }
        all.push((weight.name.clone(), cast));
    }
    Ok((all, changed))
}

/// The logits that the merged model should give: those of base and adapters, unmerged. A weighted
/// adapter has no unmerged form; there the folded tensors are taken before they are rounded and written.
fn expected(base: &Base, adapters: Vec<Weighted>) -> Result<Tensor> {
    if adapters.iter().all(|(_, w)| *w == 1.0) {
        let mut all = Patches::none();
        adapters.into_iter().for_each(|(p, _)| all.extend(p));
        return probe(&base.clip, &base.tokenizer, &all);
    }
    let (tensors, _) = folded(base, &adapters, DType::F32)?;
    let clip = Clip::new(base.clip.config(), tensors.into_iter().collect(), DType::F32, &Device::Cpu)?;
    probe(&clip, &base.tokenizer, &Patches::none())
}

/// A base with an adapter folded in, in memory, to compute as the base does; the adapter comes back.
///
/// # Errors
/// When a folded weight is not finite.
pub fn folded_clip(base: &Base, patches: Patches) -> Result<(Clip, Patches)> {
    let mut weighted = [(patches, 1.0)];
    let (tensors, _) = folded(base, &weighted, DType::F32)?;
    let clip = Clip::new(base.clip.config(), tensors.into_iter().collect(), base.clip.dtype(), base.clip.device())?;
    Ok((clip, std::mem::take(&mut weighted[0].0)))
}

/// Writes a model that was trained from random weights as a base of its own, f32.
///
/// # Errors
/// When the disk refuses.
pub fn write_trained(base: &Base, patches: Patches, output: &Path) -> Result<()> {
    let (tensors, _) = folded(base, &[(patches, 1.0)], DType::F32)?;
    write(base, &tensors, DType::F32, Layout::Hf, output, &mut Vec::new(), |_| Ok(()))
}

/// Writes a base; `check` sees it before it takes its place.
pub(crate) fn write(
    base: &Base,
    tensors: &[(String, Tensor)],
    dtype: DType,
    layout: Layout,
    output: &Path,
    notes: &mut Vec<String>,
    check: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let [config_file, weights_file] = layout.files();
    let config = match layout {
        Layout::Hf => {
            notes.extend(unsaid(base));
            merged_config(base, dtype)?
        }
        Layout::OpenClip => {
            let (config, unsaid) = foreign::export::config(base)?;
            notes.extend(unsaid);
            config
        }
    };
    files::replace_dir(output, |dir| {
        match layout {
            Layout::Hf => {
                weights::save(&dir.join(weights_file), tensors)?;
                files::write_atomic(&dir.join(PREPROCESSOR), &preprocessor(base)?)?;
            }
            Layout::OpenClip => weights::save(&dir.join(weights_file), &weights::state_dict(tensors)?)?,
        }
        files::write_json(&dir.join(config_file), &config)?;
        for (name, bytes) in Tokenizer::files(&base.source)? {
            files::write_atomic(&dir.join(name), &bytes)?;
        }
        // The directory has a temporary name, which nobody else knows.
        check(dir).map_err(|e| e.moved(dir, output))
    })
}

/// What transformers would do otherwise with a model that comes from OpenAI or open_clip.
fn unsaid(base: &Base) -> Vec<String> {
    let mut notes = Vec::new();
    if base.tokenizer.cleaning() != Cleaning::None {
        notes.push(
            "texts are cleaned as the source cleans them (ftfy, HTML entities), which tokenizer_config.json says; transformers does not \
             clean, so curly quotes, entities and mojibake get other features there"
                .into(),
        );
    }
    if base.preprocess.do_center_crop && base.preprocess.crop_rounding == Rounding::Torchvision {
        notes.push(
            "the centre crop is torchvision's, which preprocessor_config.json says; transformers' lies a pixel aside where an odd margin \
             is cut"
                .into(),
        );
    }
    notes
}

/// The base's own `config.json` with the dtype that is written.
fn merged_config(base: &Base, dtype: DType) -> Result<serde_json::Value> {
    let place = base.source.place("config.json");
    let mut config: serde_json::Value =
        crate::json::from_slice(&base.source.require("config.json")?).map_err(|e| Error::input(place, e))?;
    let name = match dtype {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        _ => "float32",
    };
    if let Some(map) = config.as_object_mut() {
        map.remove("torch_dtype");
        map.insert("dtype".into(), name.into());
        map.entry("architectures").or_insert_with(|| serde_json::json!(["CLIPModel"]));
        map.entry("model_type").or_insert_with(|| "clip".into());
    }
    Ok(config)
}

/// `preprocessor_config.json` alone: transformers 5 reads it where there is no `processor_config.json`, and transformers 4 takes the
/// `image_processor` in such a file for a processor and fails.
fn preprocessor(base: &Base) -> Result<Vec<u8>> {
    match base.source.preprocessor()? {
        Some((_, bytes)) => Ok(bytes),
        None => serde_json::to_vec_pretty(&base.preprocess.to_json()).map_err(|e| Error::fault(PREPROCESSOR, e)),
    }
}

/// Logits of a few fixed random images and texts, [PROBES, PROBES].
pub(crate) fn probe(clip: &Clip, tokenizer: &Tokenizer, patches: &Patches) -> Result<Tensor> {
    let config = clip.config();
    let size = config.vision.image_size;
    let mut rng = rng::rng(17, &[]);
    let pixels = rng::normal(&mut rng, 1.0, (PROBES, 3, size, size), DType::F32, &Device::Cpu)?;
    let texts = ["a photo of a cat.", "red", "two people at work", "12:30"].map(String::from);
    let (ids, _) = tokenizer.encode_all(&texts)?;
    let batch = TextBatch::new(&ids, None, &config.text, clip.device())?;
    let (images, texts) = (clip.image_features(&pixels, patches)?, clip.text_features(&batch, patches)?);
    Ok(clip.logits(&images, &texts, patches)?)
}

pub(crate) fn max_abs(t: &Tensor) -> Result<f64> {
    let values = t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    // NaN has to survive, which `f32::max` would drop.
    Ok(values.iter().fold(0.0, |m, v| if v.is_nan() || f64::is_nan(m) { f64::NAN } else { f64::max(m, f64::from(v.abs())) }))
}
