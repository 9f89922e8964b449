//! Reading an adapter, ours, HF PEFT's or CLIP-LoRA's: whatever does not fit is listed in one error.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use peft_adapters::targets::Towers;
use peft_adapters::{MethodConfig, Params, hf, registry};
use serde_json::Value;

use super::{Adapters, BaseRef, Manifest, clip_lora, file, names};
use crate::clip::Clip;
use crate::clip::base::Base;
use crate::clip::model::all_finite;
use crate::clip::weights::{self, Content};
use crate::error::{Error, Result};
use crate::files;
use crate::sign;

/// The largest adapter file that is read.
const MAX_BYTES: u64 = 64 << 30;

/// The largest configuration; class names of a large set take a few MiB.
const MAX_JSON: u64 = 64 << 20;

/// A configuration may describe this many numbers (64 MiB), or four times as many as its file holds, so that what does not fit is
/// told tensor by tensor and a rank of a million is not.
const SMALL: usize = 16 << 20;

/// An adapter directory's content.
#[derive(Debug)]
pub struct Delta {
    /// Where it is.
    pub dir: PathBuf,
    /// Methods in order of application, each with its tensors.
    pub methods: Vec<(MethodConfig, Vec<(String, Tensor)>)>,
    /// The task's own weights.
    pub own: Vec<(String, Tensor)>,
    /// What the adapter is for; missing in adapters made elsewhere.
    pub manifest: Option<Manifest>,
    /// The encoder that it was made on, where that was no whole CLIP: of the other one nothing is in the files.
    alone: Option<Towers>,
}

impl Delta {
    /// Reads a directory or a file of CLIP-LoRA's; nothing is checked against a base yet. [`super::locate`] finds the
    /// directory of a hub id.
    ///
    /// # Errors
    /// When files are missing or malformed.
    pub fn read(dir: &Path) -> Result<Self> {
        // Reading removes nothing.
        if !dir.exists() {
            files::recover_dir(dir)?;
        }
        let dir = directory_of(dir);
        if dir.is_file() {
            refuse_foreign(dir)?;
            let (config, tensors) = clip_lora::read(dir)?;
            let method = registry::from_adapter_config(&config).map_err(|e| Error::input(dir.display(), e))?;
            return Ok(Self { dir: dir.to_path_buf(), methods: vec![(method, tensors)], own: Vec::new(), manifest: None, alone: None });
        }
        if !dir.is_dir() {
            return Err(Error::input(dir.display(), "no such adapter directory")
                .hint("an adapter is a directory, a .pt of CLIP-LoRA's, or a hub id owner/name"));
        }
        // Every verb reads adapters here, so that none can forget it.
        sign::check_trust(dir)?;
        let manifest = read_manifest(&dir.join(file::MANIFEST))?;
        let mut methods = Vec::new();
        let listed = manifest.as_ref().map(|m| m.methods.clone()).unwrap_or_default();
        for part in &listed {
            let (method, tensors, _) = read_method(&dir.join(&part.dir), Some(&part.digest))?;
            methods.push((method, tensors));
        }
        let mut alone = None;
        if listed.is_empty() && dir.join(file::CONFIG).exists() {
            let (method, tensors, of) = read_method(dir, None)?;
            methods.push((method, tensors));
            alone = of;
        }
        let task = dir.join(file::TASK);
        let own = if task.exists() { read_tensors(&task)?.0 } else { Vec::new() };
        refuse_broken(&task, own.iter())?;
        if methods.is_empty() && own.is_empty() {
            refuse_foreign(&dir.join(DIFFUSERS))?;
            return Err(Error::input(dir.display(), format!("holds no adapter: there is neither {} nor {}", file::CONFIG, file::TASK)));
        }
        Ok(Self { dir: dir.to_path_buf(), methods, own, manifest, alone })
    }

    /// Checks that every tensor is of floats and finite, without a base to apply it to. Returns how many there are.
    ///
    /// # Errors
    /// With all others.
    pub fn check_finite(&self) -> Result<usize> {
        let all = || self.methods.iter().flat_map(|(_, tensors)| tensors);
        refuse_broken(&self.dir, all())?;
        Ok(all().count() + self.own.len())
    }

    /// Checks that the adapter was made for `base`. Returns what is worth a note.
    ///
    /// # Errors
    /// When it was made for another base, unless `allow`.
    pub fn check_base(&self, base: &Base, allow: bool) -> Result<Vec<String>> {
        let place = self.dir.display();
        let Some(manifest) = &self.manifest else {
            return Ok(vec![format!("{place}: no {}: made elsewhere, so its base cannot be checked", file::MANIFEST)]);
        };
        if manifest.base.digest.is_empty() {
            return Ok(vec![format!("{place}: {} names no base, so it cannot be checked", file::MANIFEST)]);
        }
        let other = manifest.base.architecture != base.clip.config().digest() && !manifest.base.architecture.is_empty();
        if manifest.base.digest == base.digest && !other {
            return Ok(self.other_inputs(manifest, base));
        }
        let message = match manifest.base.digest == base.digest {
            true => format!(
                "was trained on these weights with another config.json than {} has: heads, activations or epsilons differ",
                base.source
            ),
            false => format!(
                "was made for {} ({}), this base is {} ({})",
                manifest.base.name,
                short(&manifest.base.digest),
                base.source,
                short(&base.digest)
            ),
        };
        match allow {
            true => Ok(vec![format!("{place}: {message}")]),
            false => Err(Error::input(place, message).hint("name the right base, or pass --allow-base-mismatch")),
        }
    }

    /// What else the base's weights were used with: a tokeniser or preprocessing that is not the same is worth a note.
    fn other_inputs(&self, manifest: &Manifest, base: &Base) -> Vec<String> {
        let here = BaseRef::of(base, "");
        let then =
            [(&manifest.base.tokenizer, &here.tokenizer, "tokeniser"), (&manifest.base.preprocess, &here.preprocess, "preprocessing")];
        let differs = |(then, here, what): &(&String, &String, &str)| {
            (!then.is_empty() && then != here).then(|| format!("{}: was trained with another {what} than this base's", self.dir.display()))
        };
        then.iter().filter_map(differs).collect()
    }

    /// Plans the methods for a model and fills in the tensors.
    ///
    /// # Errors
    /// With every missing, unexpected, misshapen or broken tensor.
    pub fn apply(&self, clip: &Clip) -> Result<Adapters> {
        let methods: Vec<MethodConfig> = self.methods.iter().map(|(m, _)| m.clone()).collect();
        let params = Params::new(0, clip.device()).limited(self.room());
        let adapters = Adapters::plan_in(params, &methods, clip.sites()).map_err(|e| self.placed(e))?;
        let all: Vec<_> = adapters.params.iter().collect();
        for ((_, tensors), range) in self.methods.iter().zip(&adapters.ranges) {
            // `bias: all` and `modules_to_save` name parts of both encoders; those that HF PEFT never saw are the base's.
            let known: HashSet<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
            let there = |name: &str| known.contains(name) || !self.alone.is_some_and(|alone| names::is_beside(alone, name));
            let wanted: Vec<_> = all[range.clone()].iter().copied().filter(|p| there(&p.name)).collect();
            fill(&self.dir.display().to_string(), tensors, &wanted)?;
        }
        Ok(adapters)
    }

    /// How many numbers its configuration may describe.
    pub(crate) fn room(&self) -> usize {
        let tensors = self.methods.iter().flat_map(|(_, tensors)| tensors).chain(&self.own);
        tensors.map(|(_, t)| t.elem_count()).sum::<usize>().saturating_mul(4).max(SMALL)
    }

    /// The configuration that an error is about stands in a file.
    pub(crate) fn placed(&self, error: Error) -> Error {
        match error {
            Error::Input(mut problem) => {
                problem.place = format!("{}: {}", self.dir.display(), problem.place);
                Error::Input(problem)
            }
            other => other,
        }
    }

    /// Fills parameters that were planned from a recipe, `train.init_adapter`.
    ///
    /// # Errors
    /// When methods or tensors differ.
    pub fn fill(&self, params: &Params) -> Result<()> {
        let tensors: Vec<_> = self.methods.iter().flat_map(|(_, t)| t.clone()).chain(self.own.clone()).collect();
        fill(&self.dir.display().to_string(), &tensors, &params.iter().collect::<Vec<_>>())
    }
}

impl Delta {
    /// Fills the parameters of a task.
    ///
    /// # Errors
    /// When tensors differ.
    pub fn fill_own(&self, params: &Params) -> Result<()> {
        fill(&self.dir.join(file::TASK).display().to_string(), &self.own, &params.iter().collect::<Vec<_>>())
    }
}

/// What diffusers calls a LoRA.
const DIFFUSERS: &str = "pytorch_lora_weights.safetensors";

/// The directory of an adapter, where one of its files is named.
fn directory_of(path: &Path) -> &Path {
    let ours = path.file_name().is_some_and(|name| [file::CONFIG, file::WEIGHTS, file::PICKLED].iter().any(|own| name == *own));
    match path.parent() {
        Some(dir) if ours && path.is_file() && path.with_file_name(file::CONFIG).is_file() => {
            if dir.as_os_str().is_empty() {
                Path::new(".")
            } else {
                dir
            }
        }
        _ => path,
    }
}

/// Says whose LoRA a safetensors file is, where it is not HF PEFT's.
fn refuse_foreign(path: &Path) -> Result<()> {
    if !path.is_file() || path.extension().is_none_or(|e| e != "safetensors") {
        return Ok(());
    }
    let (tensors, _) = read_tensors(path)?;
    Err(match names::foreign(tensors.iter().map(|(name, _)| name.as_str())) {
        Some((what, hint)) => Error::input(path.display(), format!("is {what}, which is not read here")).hint(hint),
        None => Error::input(path.display(), format!("is a file of tensors without its {}", file::CONFIG))
            .hint("name the directory that holds both, as HF PEFT's save_pretrained writes it"),
    })
}

fn short(digest: &str) -> &str {
    digest.get(..19).unwrap_or(digest)
}

/// Everything that does not fit, in one error.
fn fill(place: &str, tensors: &[(String, Tensor)], params: &[&peft_adapters::Param]) -> Result<()> {
    let given: HashMap<&str, &Tensor> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let mut wrong = Vec::new();
    for param in params {
        match given.get(param.name.as_str()) {
            None => wrong.push(format!("missing: {}", param.name)),
            Some(t) if t.shape() != param.var.shape() => {
                wrong.push(format!("{}: expected {:?}, found {:?}", param.name, param.var.dims(), t.dims()));
            }
            Some(t) => wrong.extend(broken(&param.name, t)?),
        }
    }
    let mut seen = HashSet::new();
    wrong.extend(tensors.iter().filter(|(n, _)| !seen.insert(n.as_str())).map(|(n, _)| format!("twice: {n}")));
    let expected: HashSet<&str> = params.iter().map(|p| p.name.as_str()).collect();
    wrong.extend(tensors.iter().filter(|(n, _)| !expected.contains(n.as_str())).map(|(n, _)| format!("unexpected: {n}")));
    if !wrong.is_empty() {
        return Err(misfits(place, wrong));
    }
    for param in params {
        if let Some(t) = given.get(param.name.as_str()) {
            param.var.set(&t.to_device(param.var.device())?.to_dtype(param.var.dtype())?)?;
        }
    }
    Ok(())
}

/// Some of each kind: many that are missing do not hide what came in their place.
fn misfits(place: &str, wrong: Vec<String>) -> Error {
    const SHOWN: usize = 20;
    let kinds: [fn(&str) -> bool; 3] = [
        |w| w.starts_with("missing: "),
        |w| w.starts_with("unexpected: "),
        |w| !w.starts_with("missing: ") && !w.starts_with("unexpected: "),
    ];
    let groups: Vec<Vec<&String>> = kinds.iter().map(|is| wrong.iter().filter(|w| is(w)).collect()).collect();
    let present = groups.iter().filter(|g| !g.is_empty()).count().max(1);
    let mut lines = Vec::new();
    for group in groups.iter().filter(|g| !g.is_empty()) {
        let shown = group.len().min(SHOWN / present);
        lines.extend(group[..shown].iter().map(|w| format!("  {w}")));
        if group.len() > shown {
            lines.push(format!("  and {} more like this", group.len() - shown));
        }
    }
    Error::input(place, format!("{} tensors do not fit the model and the configuration:\n{}", wrong.len(), lines.join("\n")))
        .hint("the adapter may belong to another base, or its files may not belong together")
}

/// Integer and non-finite tensors are nobody's weights.
fn broken(name: &str, t: &Tensor) -> Result<Option<String>> {
    if !t.dtype().is_float() {
        return Ok(Some(format!("{name}: expected floats, found {}", t.dtype().as_str())));
    }
    if t.elem_count() == 0 {
        return Ok(None);
    }
    // Parameters are f32, so what f32 cannot hold is broken too.
    Ok((!all_finite(&t.to_dtype(DType::F32)?)?).then(|| format!("{name}: holds values that are not finite in f32")))
}

/// All that is [`broken`], in one error.
fn refuse_broken<'t>(place: &Path, tensors: impl Iterator<Item = &'t (String, Tensor)>) -> Result<()> {
    let wrong: Vec<String> = tensors.filter_map(|(name, t)| broken(name, t).transpose()).collect::<Result<_>>()?;
    if wrong.is_empty() { Ok(()) } else { Err(misfits(&place.display().to_string(), wrong)) }
}

/// What an adapter is for; nothing where it was made elsewhere, or is not there.
///
/// # Errors
/// When `peft.json` is broken.
pub fn manifest(dir: &Path) -> Result<Option<Manifest>> {
    if !dir.exists() {
        files::recover_dir(dir)?;
    }
    if dir.is_dir() { read_manifest(&dir.join(file::MANIFEST)) } else { Ok(None) }
}

fn read_manifest(path: &Path) -> Result<Option<Manifest>> {
    let Some(manifest) = read_json::<Manifest>(path)? else { return Ok(None) };
    let wrong = |what: String| Err(Error::input(path.display(), what));
    for part in &manifest.methods {
        let mut components = Path::new(&part.dir).components();
        if !matches!((components.next(), components.next()), (Some(std::path::Component::Normal(_)), None)) {
            return wrong(format!("`{}` is not a directory name", part.dir));
        }
    }
    if let Some(name) = manifest.classes.iter().find(|name| name.trim().is_empty() || name.contains(char::is_control)) {
        return wrong(format!("classes: {name:?} is no name of a class"));
    }
    match manifest.scalars.get("temperature") {
        Some(t) if *t <= 0.0 => wrong(format!("scalars.temperature: expected a number above 0, found {t}")),
        _ => Ok(Some(manifest)),
    }
}

pub(super) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    if !path.exists() {
        return Ok(None);
    }
    let bytes = files::read(path, MAX_JSON)?;
    crate::json::from_slice(&bytes).map(Some).map_err(|e| Error::input(path.display(), format!("not as expected: {e}")))
}

type Named = Vec<(String, Tensor)>;

fn read_tensors(path: &Path) -> Result<(Named, String)> {
    let bytes = files::read(path, MAX_BYTES)?;
    let (tensors, _) = weights::read_safetensors(&path.display().to_string(), &bytes)?;
    Ok((tensors, format!("blake3:{}", blake3::hash(&bytes).to_hex())))
}

/// HF PEFT's older files, and those saved with `safe_serialization=False`.
fn read_pickled(path: &Path) -> Result<Named> {
    let not_plain = || Error::input(path.display(), "expected a dict of tensors");
    let Content::Map(entries) = weights::read_torch(path)? else { return Err(not_plain()) };
    entries
        .into_iter()
        .map(|(name, value)| match value {
            Content::Tensor(tensor) => Ok((name, tensor)),
            _ => Err(not_plain()),
        })
        .collect()
}

/// Writes an adapter that was made elsewhere as a directory of HF PEFT's. Returns its method and the bytes written.
///
/// # Errors
/// When it is none that is known, or the disk refuses.
pub fn convert(source: &Path, output: &Path) -> Result<(String, u64)> {
    let (config, tensors) = clip_lora::read(source)?;
    let method = registry::from_adapter_config(&config).map_err(|e| Error::input(source.display(), e))?;
    files::replace_dir(output, |dir| {
        weights::save(&dir.join(file::WEIGHTS), &tensors)?;
        files::write_json(&dir.join(file::CONFIG), &config)
    })?;
    Ok((method.name().to_string(), files::dir_size(output)))
}

fn read_method(dir: &Path, digest: Option<&str>) -> Result<(MethodConfig, Named, Option<Towers>)> {
    let path = dir.join(file::CONFIG);
    let mut config: Value = read_json(&path)?.ok_or_else(|| Error::input(path.display(), "no such file"))?;
    let read = |config: &Value| registry::from_adapter_config(config).map_err(|e| Error::input(path.display(), e));
    let mut method = read(&config)?;
    let weights = dir.join(file::weights(method.name()));
    let tensors = match weights.exists() || !dir.join(file::PICKLED).exists() {
        true => {
            let (tensors, found) = read_tensors(&weights)?;
            if let Some(expected) = digest.filter(|expected| *expected != found) {
                return Err(Error::input(weights.display(), format!("expected {expected} as {} says, found {found}", file::MANIFEST)));
            }
            tensors
        }
        false => read_pickled(&dir.join(file::PICKLED))?,
    };
    let mut tensors = names::of_today(tensors);
    let renamed = names::of_whole(&mut config, &mut tensors).map_err(|e| {
        Error::input(path.display(), e)
            .hint("write `\"auto_mapping\": {\"base_model_class\": \"CLIPTextModel\"}` into it, or CLIPVisionModel, whichever was adapted")
    })?;
    if renamed {
        method = read(&config)?;
    }
    let alone = config.as_object().map(hf::towers).filter(|towers| *towers != Towers::Both);
    Ok((method, tensors, alone))
}
