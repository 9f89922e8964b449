//! Where the files of a base come from.

use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::config::ClipConfig;
use super::foreign::{self, Foreign, Interpolation};
use super::preprocess::Preprocess;
use super::spec::Spec;
use super::tokenizer::FILES;
use super::weights;
use crate::builtin;
use crate::error::{Error, Result};
use crate::files;
use crate::hub;

/// The largest file that is read whole; weights are read piece by piece. The largest vocabularies have 35 MB.
const MAX_FILE: u64 = 64 << 20;

/// How images become pixels, for transformers up to 4; transformers 5 reads it, too, where [`PROCESSOR`] does not say.
pub(crate) const PREPROCESSOR: &str = "preprocessor_config.json";

/// Where transformers 5 says it, under `image_processor`.
const PROCESSOR: &str = "processor_config.json";

/// A set of named files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A directory in HF layout.
    Dir(PathBuf),
    /// A base inside the binary, by name.
    Builtin(&'static str),
    /// A base whose files are not all as they lie on disk.
    Derived(Arc<Derived>),
}

/// Files that were made from others.
#[derive(Debug, PartialEq, Eq)]
pub struct Derived {
    name: String,
    /// Derived files by name; they hide those of `inner`.
    files: Vec<(String, Vec<u8>)>,
    /// Where other files are, in HF layout.
    inner: Option<Source>,
    /// A checkpoint with the tensor names of OpenAI and open_clip.
    weights: Vec<PathBuf>,
    /// How positions come to be others than the weights have.
    interpolation: Option<Interpolation>,
    notes: Vec<String>,
}

/// Fetches what a base needs and returns its directory and notes. The configuration comes first, so that what is no CLIP is refused
/// before its weights come.
fn fetch(repo: &hub::Repo, progress: &mut hub::Progress<'_>) -> Result<(PathBuf, Vec<String>)> {
    let mut snapshot = hub::Snapshot::open(repo)?;
    let own = match snapshot.get("config.json", progress)? {
        Some(path) if is_transformers(&path)? => {
            ClipConfig::from_json(&format!("{repo} (config.json)"), &files::read(&path, MAX_FILE)?)?;
            true
        }
        _ => false,
    };
    if !own && snapshot.get(foreign::CONFIG, progress)?.is_none() {
        return Err(snapshot.lacks("config.json of a CLIP model"));
    }
    let tokenizer = match snapshot.get("tokenizer.json", progress)? {
        Some(_) => &["tokenizer_config.json", "special_tokens_map.json"][..],
        None => &FILES[1..],
    };
    let preprocessing: &[&str] = if own { &[PREPROCESSOR, PROCESSOR] } else { &[] };
    for name in tokenizer.iter().chain(preprocessing) {
        snapshot.get(name, progress)?;
    }
    let weights: &[&str] = if own { &weights::FILES } else { &foreign::WEIGHTS };
    for name in weights {
        let Some(path) = snapshot.get(name, progress)? else { continue };
        if name.ends_with(".index.json") {
            for shard in weights::shards(&format!("{repo} ({name})"), &files::read(&path, MAX_FILE)?)?.keys() {
                snapshot.get(shard, progress)?.ok_or_else(|| snapshot.lacks(shard))?;
            }
        }
        snapshot.keep()?;
        let dir = snapshot.dir().ok_or_else(|| snapshot.lacks(name))?;
        return Ok((dir, snapshot.notes().to_vec()));
    }
    Err(snapshot.lacks(&format!("weights ({})", weights.join(", "))))
}

/// Whether a `config.json` is transformers', not another library's of the same name.
fn is_transformers(config: &Path) -> Result<bool> {
    let value: serde_json::Value = crate::json::from_slice(&files::read(config, MAX_FILE)?).unwrap_or_default();
    Ok(["model_type", "text_config", "vision_config", "architectures"].iter().any(|key| value.get(key).is_some()))
}

/// What a name turned out to be.
enum Place {
    Builtin(&'static str),
    Dir(PathBuf),
    File(PathBuf),
    Hub(hub::Repo),
}

impl Place {
    /// A path that exists is a path; `owner/name` is a hub id.
    fn of(name: &str) -> Result<Self> {
        if let Some(base) = name.strip_prefix("builtin:") {
            return builtin::BASES.iter().find(|b| **b == base).map(|b| Self::Builtin(b)).ok_or_else(|| {
                Error::input(name, format!("there is no such embedded base; there is builtin:{}", builtin::BASES.join(", builtin:")))
            });
        }
        let path = PathBuf::from(name);
        // A merged model that a kill moved aside comes back.
        if !path.exists() {
            files::recover_dir(&path)?;
        }
        match (path.is_dir(), path.is_file(), hub::Repo::parse(name)) {
            (true, _, _) => Ok(Self::Dir(path)),
            (_, true, _) => Ok(Self::File(path)),
            (_, _, Some(repo)) => Ok(Self::Hub(repo)),
            _ => {
                let found = if path.exists() { "is neither a file nor a directory" } else { "no such directory or file" };
                Err(Error::input(name, found).hint(
                    "a base is a directory in transformers' layout, a checkpoint of OpenAI's or open_clip's, a hub id such as \
                     openai/clip-vit-base-patch32, or builtin:tiny",
                ))
            }
        }
    }
}

impl Source {
    /// Understands `builtin:<name>`, directories, checkpoint files and hub ids, with the options of [`Spec`].
    /// Files of a hub id are fetched where they are not in the cache.
    ///
    /// # Errors
    /// When there is no such base, or it cannot be fetched.
    pub fn resolve(spec: &str) -> Result<Self> {
        Self::resolve_with(spec, &mut |_| Ok(()))
    }

    /// [`Source::resolve`], telling `progress` of what is fetched.
    ///
    /// # Errors
    /// As [`Source::resolve`], and what `progress` returns.
    pub fn resolve_with(spec: &str, progress: &mut hub::Progress<'_>) -> Result<Self> {
        let spec = Spec::parse(spec)?;
        match Place::of(&spec.name)? {
            Place::Builtin(base) => Self::Builtin(base).sized(&spec),
            Place::Dir(dir) => Self::directory(dir, &spec),
            Place::File(file) => Ok(Self::foreign(Foreign::open(&file, &spec)?, &spec)),
            Place::Hub(repo) => {
                let (dir, notes) = fetch(&repo, progress)?;
                let source = Self::directory(dir, &spec)?;
                match notes.is_empty() {
                    true => Ok(source),
                    false => Ok(source.noted(&spec.name, notes)),
                }
            }
        }
    }

    fn directory(dir: PathBuf, spec: &Spec) -> Result<Self> {
        // Repositories that have both are in HF layout, too.
        let config = dir.join("config.json");
        let open_clip = dir.join(foreign::CONFIG).is_file() || (spec.arch.is_some() && !config.is_file());
        if open_clip && !(config.is_file() && is_transformers(&config)?) {
            return Ok(Self::foreign(Foreign::in_dir(&dir, spec)?, spec));
        }
        let source = Self::Dir(dir);
        match source.preprocessing_note()? {
            Some(note) => source.noted(&spec.name, vec![note]).sized(spec),
            None => source.sized(spec),
        }
    }

    /// What to say where a directory does not say how images become pixels, or says it twice.
    fn preprocessing_note(&self) -> Result<Option<String>> {
        let (nested, old) = (self.nested_preprocessor()?, self.read(PREPROCESSOR)?);
        Ok(match (nested, old) {
            (Some((place, nested)), Some(old)) => {
                let (nested, old) = (Preprocess::from_json(&place, &nested)?, Preprocess::from_json(&place, &old).ok());
                (old != Some(nested)).then(|| {
                    format!(
                        "{self}: {PREPROCESSOR} and the `image_processor` of {PROCESSOR} differ; the latter counts, as in transformers 5"
                    )
                })
            }
            (None, None) => Some(format!(
                "{self}: holds neither {PREPROCESSOR} nor the `image_processor` of a {PROCESSOR}; images get CLIP's own preprocessing \
                 (bicubic, centre crop, OpenAI's mean and deviation) at the size of config.json"
            )),
            _ => None,
        })
    }

    /// `image_processor` of transformers 5's file, where there is one.
    fn nested_preprocessor(&self) -> Result<Option<(String, Vec<u8>)>> {
        let Some(bytes) = self.read(PROCESSOR)? else { return Ok(None) };
        let place = self.place(PROCESSOR);
        let value: serde_json::Value = crate::json::from_slice(&bytes).map_err(|e| Error::input(&place, format!("not valid JSON: {e}")))?;
        // Before transformers 5 the file named the processor's class and nothing of its parts.
        let Some(inner) = value.get("image_processor").filter(|v| !v.is_null()) else { return Ok(None) };
        let bytes = serde_json::to_vec_pretty(inner).map_err(|e| Error::fault(&place, e))?;
        Ok(Some((format!("{place}: image_processor"), bytes)))
    }

    /// What says how images become pixels, in the form of `preprocessor_config.json`, and where it stands: `image_processor` of
    /// `processor_config.json` (transformers 5), or else `preprocessor_config.json`. Nothing where there is neither.
    ///
    /// # Errors
    /// When a file cannot be read or `processor_config.json` is not JSON.
    pub fn preprocessor(&self) -> Result<Option<(String, Vec<u8>)>> {
        if let Self::Derived(derived) = self {
            // What was derived hides both files that it was derived from.
            return match (derived.file(PREPROCESSOR), &derived.inner) {
                (Some(bytes), _) => Ok(Some((self.place(PREPROCESSOR), bytes.to_vec()))),
                (None, Some(inner)) => inner.preprocessor(),
                (None, None) => Ok(None),
            };
        }
        match self.nested_preprocessor()? {
            Some(found) => Ok(Some(found)),
            None => Ok(self.read(PREPROCESSOR)?.map(|bytes| (self.place(PREPROCESSOR), bytes.into_owned()))),
        }
    }

    fn foreign(found: Foreign, spec: &Spec) -> Self {
        let Foreign { weights, files, notes } = found;
        let (name, interpolation) = (spec.name.clone(), Some(Interpolation::OpenClip));
        Self::Derived(Arc::new(Derived { name, files, inner: None, weights, interpolation, notes }))
    }

    /// Files in memory.
    pub(super) fn of_files(name: &str, files: Vec<(String, Vec<u8>)>) -> Self {
        let name = name.to_string();
        Self::Derived(Arc::new(Derived { name, files, inner: None, weights: Vec::new(), interpolation: None, notes: Vec::new() }))
    }

    /// The same with more to say about it.
    fn noted(self, name: &str, mut notes: Vec<String>) -> Self {
        notes.extend(self.notes().iter().cloned());
        let (weights, interpolation) = (self.checkpoint().to_vec(), self.interpolation());
        let (name, inner) = (name.to_string(), Some(self));
        Self::Derived(Arc::new(Derived { name, files: Vec::new(), inner, weights, interpolation, notes }))
    }

    /// The same with more to say about it, under the same name.
    pub(super) fn with_notes(self, notes: Vec<String>) -> Self {
        let name = self.to_string();
        self.noted(&name, notes)
    }

    /// A base in HF layout for the image size that is asked for.
    fn sized(self, spec: &Spec) -> Result<Self> {
        if let Some(arch) = &spec.arch {
            return Err(Error::input(&spec.name, format!("is described by its config.json; arch={arch} is for checkpoints that are not")));
        }
        let Some(size) = spec.image_size else { return Ok(self) };
        let (config, preprocess) = (self.require("config.json")?, self.preprocessor()?);
        let (files, note) = foreign::resized_files(&self.to_string(), &config, preprocess, size)?;
        let (name, notes) = (spec.name.clone(), self.notes().iter().cloned().chain(note).collect());
        let interpolation = Some(Interpolation::Transformers);
        Ok(Self::Derived(Arc::new(Derived { name, files, inner: Some(self), weights: Vec::new(), interpolation, notes })))
    }

    /// What is worth knowing about how the files were derived.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        match self {
            Self::Derived(derived) => &derived.notes,
            _ => &[],
        }
    }

    /// Whether files are in the binary.
    pub(crate) fn embedded(&self) -> bool {
        match self {
            Self::Builtin(_) => true,
            Self::Dir(_) => false,
            Self::Derived(derived) => derived.inner.as_ref().is_some_and(Self::embedded),
        }
    }

    /// The files of a checkpoint with the tensor names of OpenAI and open_clip; none in HF layout.
    pub(crate) fn checkpoint(&self) -> &[PathBuf] {
        match self {
            Self::Derived(derived) => &derived.weights,
            _ => &[],
        }
    }

    /// How positions are interpolated where the configuration asks for others than the weights have.
    pub(crate) fn interpolation(&self) -> Option<Interpolation> {
        match self {
            Self::Derived(derived) => derived.interpolation,
            _ => None,
        }
    }

    /// The content of a file, or nothing where there is no such file.
    ///
    /// # Errors
    /// When the file exists and cannot be read.
    pub fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>> {
        match self {
            Self::Builtin(base) => Ok(builtin::file(base, name).map(Cow::Borrowed)),
            Self::Dir(dir) => {
                let path = dir.join(name);
                if path.exists() { files::read(&path, MAX_FILE).map(|bytes| Some(Cow::Owned(bytes))) } else { Ok(None) }
            }
            Self::Derived(derived) => match (derived.file(name), &derived.inner) {
                (Some(bytes), _) => Ok(Some(Cow::Owned(bytes.to_vec()))),
                (None, Some(inner)) => inner.read(name),
                (None, None) => Ok(None),
            },
        }
    }

    /// The content of a file that has to be there.
    ///
    /// # Errors
    /// When it is missing or cannot be read.
    pub fn require(&self, name: &str) -> Result<Cow<'static, [u8]>> {
        self.read(name)?.ok_or_else(|| Error::input(self.place(name), "no such file in this base"))
    }

    /// Where a file lies on disk, if it does.
    #[must_use]
    pub fn path(&self, name: &str) -> Option<PathBuf> {
        match self {
            Self::Builtin(_) => None,
            Self::Dir(dir) => Some(dir.join(name)).filter(|p| p.exists()),
            Self::Derived(derived) => derived.inner.as_ref().filter(|_| derived.file(name).is_none()).and_then(|inner| inner.path(name)),
        }
    }

    /// A file's name for messages.
    #[must_use]
    pub fn place(&self, name: &str) -> String {
        match self {
            Self::Builtin(base) => format!("builtin:{base}/{name}"),
            Self::Dir(dir) => dir.join(name).display().to_string(),
            Self::Derived(derived) => match &derived.inner {
                Some(inner) if derived.file(name).is_none() => inner.place(name),
                _ => format!("{} ({name})", derived.name),
            },
        }
    }
}

impl Derived {
    fn file(&self, name: &str) -> Option<&[u8]> {
        self.files.iter().find(|(n, _)| n == name).map(|(_, bytes)| bytes.as_slice())
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Builtin(base) => write!(f, "builtin:{base}"),
            Self::Dir(dir) => write!(f, "{}", dir.display()),
            Self::Derived(derived) => f.write_str(&derived.name),
        }
    }
}
