//! A base with adapters on it: what a service loads.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use peft_adapters::{Patches, Step};

use crate::clip::base::Base;
use crate::clip::decode::{self, DecodeOptions};
use crate::clip::model::{all_finite, unit_rows};
use crate::data::check_classes;
use crate::delta::{Adapters, Delta, Manifest, Vocabulary, bundled, class_order, locate, other_vocabulary};
use crate::error::{Error, Result};
pub use crate::task::Told;
use crate::task::prompts::{self, Pad, Prompts};
use crate::task::{Forward, HEAD};

mod readable;
mod reading;
mod scorer;
mod teller;
mod together;

pub use readable::Readable;
use reading::ImageReading;
pub use reading::PixelChoice;
use scorer::Classes;
pub use scorer::{Ranked, Scorer};
pub use teller::Query;
use teller::Teller;
use together::Part;

/// Images that go through the tower at once.
const BATCH: usize = 32;

/// A frozen base and the adapters that change it. [`Model::fork`] puts other adapters on the same base.
///
/// ```
/// # fn main() -> peft::Result<()> {
/// # let dir = std::env::temp_dir().join(format!("peft-doc-{}", std::process::id()));
/// # let _ = std::fs::remove_dir_all(&dir);
/// # for name in ["clock/1.png", "clock/2.png", "clock/3.png", "heart/1.png", "heart/2.png", "heart/3.png"] {
/// #     peft::files::write_atomic(&dir.join("images").join(name), peft::builtin::sample())?;
/// # }
/// # let photo = dir.join("images/clock/1.png");
/// # let data = format!("data: {{ folder: {{ root: '{}' }} }}", dir.join("images").display());
/// # let recipe = format!("{{ model: 'builtin:tiny', method: lora, {data}, task: classify, train: {{ steps: 1 }} }}");
/// # let mut recipe = peft::recipe::Recipe::parse("recipe", &recipe, "recipe", &[])?;
/// # recipe.output = Some(dir.join("run"));
/// # peft::session::train(recipe, peft::run::Existing::Refuse, &candle_core::Device::Cpu, &mut peft::train::Silent)?;
/// # let adapter = dir.join("run/adapter");
/// let model = peft::Model::load("builtin:tiny")?.with_adapter(&adapter)?;
/// let ranked = model.predict(&[&photo], &["clock", "heart", "building"])?;
/// println!("{} {:.2}", ranked[0][0].label, ranked[0][0].probability);
/// # assert_eq!(ranked[0].len(), 3);
/// # std::fs::remove_dir_all(&dir).ok();
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Model {
    base: Arc<Base>,
    adapters: Vec<Adapters>,
    /// Of those that did not come with a bundle: a head that was trained on a bundle takes the place of the bundle's.
    parts: Vec<Part>,
    patches: Patches,
    manifest: Option<Manifest>,
    head: Option<[Tensor; 2]>,
    teller: Option<Teller>,
    /// The classes that an adapter's method is bound to.
    bound: Option<Vec<String>>,
    /// The classes of the linear head, row by row.
    head_classes: Vec<String>,
    /// Classes and templates that a merged base has beside its weights.
    own: Vocabulary,
    images: ImageReading,
    notes: Vec<String>,
}

impl Model {
    /// Loads a base on the CPU in f32: `builtin:tiny`, a directory, a checkpoint file or a hub id.
    ///
    /// # Errors
    /// When a file is missing or malformed.
    pub fn load(base: &str) -> Result<Self> {
        Self::load_on(base, DType::F32, &Device::Cpu)
    }

    /// Loads a base to compute in `dtype` on `device`.
    ///
    /// # Errors
    /// When a file is missing or malformed.
    pub fn load_on(base: &str, dtype: DType, device: &Device) -> Result<Self> {
        Self::from_base(Base::load(base, dtype, device)?).with_bundled(base)
    }

    /// With the adapters that a bundle brings along; `base` is where the base came from.
    ///
    /// # Errors
    /// When one of them does not fit.
    pub fn with_bundled(mut self, base: &str) -> Result<Self> {
        self.own = Vocabulary::of(&self.base.source)?;
        let notes = self.notes.clone();
        // They were made for the base alone, which the bundle's digest is not.
        for dir in bundled(base)? {
            self = self.with_adapter_of(&dir, true)?;
            self.parts.clear();
        }
        Ok(Self { notes, ..self })
    }

    /// A model without adapters.
    #[must_use]
    pub fn from_base(base: impl Into<Arc<Base>>) -> Self {
        let base = base.into();
        let notes = base.source.notes().to_vec();
        Self {
            base,
            adapters: Vec::new(),
            parts: Vec::new(),
            patches: Patches::none(),
            manifest: None,
            head: None,
            teller: None,
            bound: None,
            head_classes: Vec::new(),
            own: Vocabulary::default(),
            images: ImageReading::default(),
            notes,
        }
    }

    /// Another model on the same base, without adapters. The base stays in memory once, however many models share it.
    #[must_use]
    pub fn fork(&self) -> Self {
        let mut fork = Self::from_base(self.base.clone());
        fork.own = self.own.clone();
        fork.images = self.images.without_adapters();
        fork
    }

    /// Puts an adapter (a directory, a `.pt` of CLIP-LoRA's, a hub id) on top of what is there.
    ///
    /// # Errors
    /// When it does not fit the base.
    pub fn with_adapter(self, dir: impl AsRef<Path>) -> Result<Self> {
        self.with_adapter_of(dir.as_ref(), false)
    }

    /// [`Model::with_adapter`], also for adapters of another base where `allow_mismatch`.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn with_adapter_of(mut self, dir: &Path, allow_mismatch: bool) -> Result<Self> {
        let mut delta = Delta::read(&locate(dir)?)?;
        self.notes.extend(delta.check_base(&self.base, allow_mismatch)?);
        let mut adapters = match self.fixed_classes(&delta) {
            Some(classes) => delta.apply_to(&self.base.clip, &classes)?,
            None => delta.apply(&self.base.clip)?,
        };
        if let (Some(before), Some(next)) = (&self.manifest, &delta.manifest) {
            self.notes.extend(other_vocabulary(before, dir, next));
        }
        self.notes.extend(self.replaced_task(dir, &delta));
        self.notes.extend(self.images.adopt(dir, delta.manifest.as_ref().and_then(Manifest::pixels)));
        self.notes.extend_from_slice(adapters.params.notes());
        adapters.view.prepare(&Step::eval())?;
        if adapters.view.class_bound() && !delta.classes().is_empty() {
            self.bound = Some(delta.classes().to_vec());
        }
        let teller = Teller::of(&delta, &self.base)?;
        self.join(Part::of(dir, &delta, &adapters, teller.is_some()))?;
        self.patches.extend(std::mem::take(&mut adapters.view));
        self.adapters.push(adapters);
        self.teller = teller.or(self.teller);
        if self.teller.is_some() {
            self.manifest = delta.manifest.or(self.manifest);
            return Ok(self);
        }
        let own = |name: &str| delta.own.iter().find(|(n, _)| n == name).map(|(_, t)| t.to_device(self.base.clip.device()));
        if let (Some(weight), Some(bias)) = (own(HEAD[0]), own(HEAD[1])) {
            self.head = Some(self.checked_head(dir, weight?, bias?, delta.manifest.as_ref())?);
            self.head_classes = delta.classes().to_vec();
        }
        self.manifest = delta.manifest.or(self.manifest);
        Ok(self)
    }

    /// What to say where an adapter's head or task takes the place of that of one before it.
    fn replaced_task(&self, dir: &Path, next: &Delta) -> Option<String> {
        let there = self.head.is_some() || self.teller.is_some();
        (there && !next.own.is_empty()).then(|| format!("{}: its head takes the place of that of the adapter before it", dir.display()))
    }

    /// The classes that what is already there is bound to, where the next adapter shares them: a head takes the place of a head.
    fn fixed_classes(&self, next: &Delta) -> Option<Vec<String>> {
        let head = Some(&self.head_classes).filter(|c| !c.is_empty() && !next.has_class_rows());
        self.bound.as_ref().or(head).cloned()
    }

    fn checked_head(&self, dir: &Path, weight: Tensor, bias: Tensor, manifest: Option<&Manifest>) -> Result<[Tensor; 2]> {
        let classes = manifest.map_or(0, |m| m.classes.len());
        let dim = self.base.clip.config().projection_dim;
        if weight.dims() != [classes, dim] || bias.dims() != [classes] {
            return Err(Error::input(
                dir.join("task.safetensors").display(),
                format!(
                    "expected {} {:?} and {} [{classes}], found {:?} and {:?}",
                    HEAD[0],
                    [classes, dim],
                    HEAD[1],
                    weight.dims(),
                    bias.dims()
                ),
            ));
        }
        Ok([weight.to_dtype(DType::F32)?, bias.to_dtype(DType::F32)?])
    }

    /// How image files are decoded, whatever the adapters were trained with; a note says where that differs.
    #[must_use]
    pub fn with_images(self, options: DecodeOptions) -> Self {
        let DecodeOptions { background, orient, .. } = options;
        let mut model = self.with_pixels(PixelChoice { background: Some(background), orient: Some(orient) });
        model.images.limits = options;
        model
    }

    /// What holds in place of the options that the adapters were trained with; a note says where that differs.
    #[must_use]
    pub fn with_pixels(mut self, choice: PixelChoice) -> Self {
        self.images.choice = choice;
        self.notes.extend(self.images.overruled());
        self
    }

    /// How image files are decoded: as the last adapter was trained, unless [`Model::with_images`] or [`Model::with_pixels`] says
    /// otherwise. Who decodes images by themselves ([`Model::embed_pixels`]) does it with these.
    #[must_use]
    pub fn image_options(&self) -> DecodeOptions {
        self.images.options()
    }

    /// The frozen part.
    #[must_use]
    pub fn base(&self) -> &Base {
        &self.base
    }

    /// Whether answers come from a trained head, so that templates of the caller's mean nothing.
    #[must_use]
    pub fn has_own_head(&self) -> bool {
        self.head.is_some() || self.tells()
    }

    /// What changes it.
    #[must_use]
    pub fn patches(&self) -> &Patches {
        &self.patches
    }

    /// What the last adapter says of itself.
    #[must_use]
    pub fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    /// What a user should know about the adapters.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Projected features of image files, unnormalised, f32.
    ///
    /// # Shapes
    /// N paths → [N, P]
    ///
    /// # Errors
    /// When an image cannot be read.
    pub fn embed_images(&self, paths: &[impl AsRef<Path> + Sync]) -> Result<Tensor> {
        self.embed(paths, |p| self.pixels_of(p.as_ref()))
    }

    fn pixels_of(&self, path: &Path) -> Result<Vec<f32>> {
        decode::open(path, &self.images.options()).and_then(|image| self.base.preprocess.apply(&image))
    }

    /// Projected features of images in memory, unnormalised, f32.
    ///
    /// # Shapes
    /// N images → [N, P]
    ///
    /// # Errors
    /// When one has no pixels.
    pub fn embed_pixels(&self, images: &[RgbImage]) -> Result<Tensor> {
        self.embed(images, |image| self.base.preprocess.apply(image))
    }

    fn embed<T: Sync>(&self, images: &[T], pixels: impl Fn(&T) -> Result<Vec<f32>> + Sync) -> Result<Tensor> {
        use rayon::prelude::*;
        let (height, width) = self.base.preprocess.output_size();
        let mut parts = Vec::new();
        for chunk in images.chunks(BATCH) {
            let pixels: Vec<Vec<f32>> = chunk.par_iter().map(&pixels).collect::<Result<_>>()?;
            let pixels = Tensor::from_vec(pixels.concat(), (chunk.len(), 3, height, width), &Device::Cpu)?;
            parts.push(self.finite("image", self.base.clip.image_features(&pixels, &self.patches)?.to_dtype(DType::F32)?)?);
        }
        self.joined(&parts)
    }

    /// Projected features of texts, unnormalised, f32; texts beyond the context are cut and counted.
    ///
    /// # Shapes
    /// M texts → [M, P]
    ///
    /// # Errors
    /// When the tokeniser fails.
    pub fn embed_texts(&self, texts: &[String]) -> Result<(Tensor, usize)> {
        if texts.is_empty() {
            return Ok((self.joined(&[])?, 0));
        }
        if self.patches.per_image() {
            return Err(Error::input("texts", "this adapter encodes a text anew for each image (cocoop), so a text alone has no feature")
                .hint("rank labels for images with `predict`"));
        }
        let prompts = Prompts::new(&self.base.tokenizer, texts, Pad::Longest)?;
        let features = prompts.features(&Forward::eval(&self.base.clip, &self.patches)).map_err(|e| match &self.bound {
            Some(_) => Error::input("texts", e).hint("class-specific context is for the adapter's own classes: use `predict`"),
            None => e,
        })?;
        let features = features.to_dtype(DType::F32)?;
        Ok((self.finite("text", features)?, prompts.truncated))
    }

    fn joined(&self, parts: &[Tensor]) -> Result<Tensor> {
        match parts.is_empty() {
            true => Ok(Tensor::zeros((0, self.base.clip.config().projection_dim), DType::F32, self.base.clip.device())?),
            false => Ok(Tensor::cat(parts, 0)?),
        }
    }

    /// For each image all labels, most likely first. The adapter's templates apply, or CLIP's own.
    ///
    /// With no labels the adapter's classes are meant.
    ///
    /// # Errors
    /// When an image cannot be read, or there are no labels.
    pub fn predict(&self, images: &[impl AsRef<Path> + Sync], labels: &[&str]) -> Result<Vec<Vec<Ranked>>> {
        let labels: Vec<String> = labels.iter().map(ToString::to_string).collect();
        self.predict_with(images, &labels, &[])
    }

    /// [`Model::predict`] with templates of the caller's.
    ///
    /// # Errors
    /// As [`Model::predict`].
    pub fn predict_with(&self, images: &[impl AsRef<Path> + Sync], labels: &[String], templates: &[String]) -> Result<Vec<Vec<Ranked>>> {
        let scorer = self.scorer(labels, templates)?;
        let features = self.embed_images(images)?;
        scorer.rank(self, &features)
    }

    /// Prepares the text side once for many images.
    ///
    /// # Errors
    /// When there are no labels, or a head knows others.
    pub fn scorer(&self, labels: &[String], templates: &[String]) -> Result<Scorer> {
        if self.teller.is_some() {
            return Err(Error::input("predict", "this adapter does not rank labels: it judges an image with a text")
                .hint("pass --text or --question, or requests with --jsonl"));
        }
        let known = self.known_classes();
        let labels = if labels.is_empty() { known.clone() } else { labels.to_vec() };
        if labels.is_empty() {
            return Err(Error::input("--labels", "expected at least one label; the adapter stores no classes")
                .hint("pass --labels a,b or a file with one label a line"));
        }
        // What an adapter was trained with is not wrong here: ImageNet has two classes `sunglasses`.
        if labels != known {
            check_classes("--labels", &labels)?;
        }
        // What is held for each class is computed in its own order, and comes out in the order that is asked for.
        let (shown, mut order) = (labels.clone(), None);
        let mut labels = labels;
        if self.bound.is_some() || self.head.is_some() {
            order = class_order(&known, &shown).map_err(|differ| self.other_labels(&differ))?;
            labels = known;
        }
        if self.head.is_some() {
            return Ok(Scorer { labels: shown, order, templates: Vec::new(), classes: Classes::Head });
        }
        let own = self.manifest.as_ref().map_or(&self.own.templates, |m| &m.templates).clone();
        let templates = match (templates.is_empty(), own.is_empty()) {
            (false, _) => templates.to_vec(),
            (true, false) => own,
            (true, true) => vec![prompts::DEFAULT_TEMPLATE.to_string()],
        };
        templates.iter().try_for_each(|t| prompts::check_template("--template", t))?;
        let prompts = Prompts::of_classes(&self.base.tokenizer, &labels, &templates, Pad::Longest)?;
        if self.patches.per_image() {
            return Ok(Scorer { classes: Classes::PerImage(Box::new(prompts)), templates, labels: shown, order });
        }
        let classes = prompts.class_features(&Forward::eval(&self.base.clip, &self.patches)).map_err(|e| self.of_classes(e))?;
        Ok(Scorer { classes: Classes::Shared(self.finite("text", classes)?), templates, labels: shown, order })
    }

    /// Features that can be ranked: they are finite, and so is their length.
    pub(crate) fn finite(&self, what: &str, features: Tensor) -> Result<Tensor> {
        if all_finite(&features)? && all_finite(&unit_rows(&features)?)? {
            return Ok(features);
        }
        let error = Error::fault(format!("{what} features"), "are not finite, or too large for their length to be a number");
        Err(match self.base.extreme()? {
            Some((name, value)) => {
                error.hint(format!("{} holds values up to {value:.1e} in `{name}`: the file is damaged", self.base.source))
            }
            None => error.hint("the adapter's weights may be too large for this base, or --dtype too narrow"),
        })
    }

    /// The classes of the adapters, or those that a merged base brings along, in the order in which the model holds them.
    fn known_classes(&self) -> Vec<String> {
        let head = Some(&self.head_classes).filter(|c| !c.is_empty());
        let adapter = self.manifest.as_ref().map(|m| &m.classes).filter(|c| !c.is_empty());
        self.bound.as_ref().or(head).or(adapter).unwrap_or(&self.own.classes).clone()
    }

    fn other_labels(&self, differ: &str) -> Error {
        let what =
            if self.head.is_some() { "has a linear head, which knows" } else { "holds something for each of its classes, and knows" };
        Error::input("--labels", format!("this adapter {what} only its own classes ({differ})"))
            .hint("leave the labels out, or name all of its classes, in any order")
    }

    /// What fails where an adapter is bound to classes that it does not name (one without `peft.json`) is the labels' fault; where
    /// it names them, its own.
    fn of_classes(&self, error: Error) -> Error {
        match (self.patches.class_bound() && self.bound.is_none(), &error) {
            (true, Error::Tensor(e)) => Error::input("--labels", e).hint("this adapter does not say for which classes it was made"),
            (false, Error::Tensor(e)) if self.patches.class_bound() => Error::input("the adapter", e)
                .hint("its files do not belong together: peft.json names other classes than its tensors are for"),
            _ => error,
        }
    }
}
