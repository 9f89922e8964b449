//! The composition root: a recipe becomes parts, parts become a run.

use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use peft_adapters::saved::base_name;
use peft_adapters::{MethodConfig, Patch, Sites, TaskFacts, ops};
use serde_json::json;

use crate::clip::base::Base;
use crate::clip::source::Source;
use crate::data::{Dataset, Images, Split};
use crate::delta::{self, Adapters, BaseRef, Delta, Manifest, bundled, same_classes};
use crate::error::{Error, Result};
use crate::estimate;
use crate::fetch::fetched;
use crate::provenance::Provenance;
use crate::recipe::{ModelConfig, Recipe};
use crate::report::Evaluation;
use crate::run::RunDir;
use crate::task::{Needs, Task, TaskParts};
use crate::train::{Dtype, Event, FeatureSource, Features, Micro, Observer, Sampling, Trainer, check_finite};

mod check;
mod images;
mod made_of;
mod page;
mod same_task;
mod training;
mod unused;

use training::tell;
pub use training::train;

pub use check::{Checked, Verdict, check};

/// `peft bench recipes/quickstart.yaml`, 2 cores of Zen 3: a step of 0.8 s and 239 MiB in f32, 8.9 s and 737 MiB in bf16, 5.1 s and 727 MiB in f16.
const HALF_ON_CPU: &str = "train.dtype is half precision, which a CPU computes several times slower than f32, and in more memory; leave it \
                           out unless the numbers of half precision are what you want to see";

/// Methods whose learnt vectors stand in for a template's words.
const CONTEXTS: [&str; 3] = ["coop", "cocoop", "maple"];

/// What a recipe names, opened.
pub struct Session {
    /// The recipe.
    pub recipe: Recipe,
    /// The frozen model.
    pub base: Base,
    /// The examples.
    pub data: Dataset,
    /// How images are read.
    pub images: Arc<Images>,
}

impl Session {
    /// Opens the model and the data of a recipe; every image is read once.
    ///
    /// # Errors
    /// When a file is missing or malformed.
    pub fn open(mut recipe: Recipe, device: &Device, observer: &mut dyn Observer) -> Result<Self> {
        images::adopt_beneath(&mut recipe, observer)?;
        let mut data = fetched(observer, |progress| recipe.data.local(progress))?
            .open_for(recipe.train.seed, &recipe.task.definition().needs_of_rows())?;
        let base = load(&recipe, device, observer)?;
        let options = recipe.images.options();
        let images = Arc::new(Images::new(base.preprocess.clone(), options));
        for note in base.source.notes() {
            observer.event(Event::Note(note.clone()));
        }
        if device.is_cpu() && recipe.train.dtype != Dtype::F32 {
            observer.event(Event::Note(HALF_ON_CPU.into()));
        }
        if recipe.task.definition().reads_images() {
            observer.event(Event::Phase("images", None));
            data.verify(&images, recipe.data.skip_bad)?;
        }
        for note in data.notes.iter().cloned().chain(data.overlaps()) {
            observer.event(Event::Note(note));
        }
        Ok(Self { recipe, base, data, images })
    }

    /// [`Session::open`] of what is to be trained.
    ///
    /// # Errors
    /// As [`Session::open`], and when there is nothing to train on.
    pub fn to_train(recipe: Recipe, device: &Device, observer: &mut dyn Observer) -> Result<Self> {
        let session = Self::open(recipe, device, observer)?;
        if session.data.count(Split::Train) == 0 {
            return Err(Error::input("data", "the training split is empty").hint("`peft data` says what each split has"));
        }
        session.tell_unused(observer)?;
        Ok(session)
    }

    /// Plans methods and task.
    ///
    /// # Errors
    /// When one of them does not fit the model or the data.
    pub fn plan(&self) -> Result<(Adapters, Box<dyn Task>)> {
        let recipe = &self.recipe;
        let clip = &self.base.clip;
        let mut adapters = Adapters::plan(&recipe.method, &self.sites(), recipe.train.seed, clip.device())?;
        self.put_beneath(&mut adapters)?;
        let mut init = recipe.train.init_adapter.as_ref().map(|dir| Delta::read(&delta::locate(dir)?)).transpose()?;
        if let Some(init) = &mut init {
            if !init.own.is_empty() {
                self.check_task(init)?;
            }
            init.bring_in_order(&adapters.view, adapters.beneath, &self.data.classes)?;
        }
        let task = self.task(&mut adapters, init.as_ref())?;
        if let Some(init) = init {
            init.fill(&adapters.params)?;
        }
        Ok((adapters, task))
    }

    /// The model's sites with what methods may want to know of the task.
    fn sites(&self) -> Sites {
        let classes = if self.recipe.task.definition().templates().is_empty() { 0 } else { self.data.classes.len() };
        self.base.clip.sites().for_task(TaskFacts { classes, examples: self.data.count(Split::Train) })
    }

    /// The adapters that a bundle brings along.
    fn beneath(&self) -> Result<Vec<PathBuf>> {
        match &self.recipe.model {
            ModelConfig::Pretrained(spec) => bundled(spec),
            _ => Ok(Vec::new()),
        }
    }

    /// What a bundle brings along goes beneath the recipe's methods.
    fn put_beneath(&self, adapters: &mut Adapters) -> Result<()> {
        for dir in self.beneath()? {
            let mut delta = Delta::read(&dir)?;
            if !delta.own.is_empty() {
                return Err(Error::input(dir.display(), "has weights of a task, which a recipe trains or evaluates by itself")
                    .hint("name the base that the bundle was made of, and the adapter by --adapter or train.init_adapter"));
            }
            let reading = delta.apply_to(&self.base.clip, &self.data.classes)?;
            let training = delta.apply(&self.base.clip)?;
            adapters.put_beneath([training.view, reading.view]);
        }
        Ok(())
    }

    /// Builds the task, which adds its own parameters; `known` is an adapter whose answers and thresholds hold.
    fn task(&self, adapters: &mut Adapters, known: Option<&Delta>) -> Result<Box<dyn Task>> {
        let definition = self.recipe.task.definition();
        if adapters.view.per_image() && definition.templates().is_empty() {
            return Err(Error::input("method", "a method that encodes class prompts for each image (cocoop) needs classes")
                .hint("task: classify, or coop in its place"));
        }
        let fits = adapters.view.iter().skip(adapters.beneath).any(Patch::fits);
        if fits && (adapters.view.per_image() || definition.templates().is_empty() || definition.has_own_weights()) {
            return Err(Error::input("method", "tip_adapter needs class prompts that are the same for all images")
                .hint("task: { classify: { head: prompts } }, and no cocoop beside it"));
        }
        let contexts: Vec<&str> = adapters.methods.iter().map(MethodConfig::name).filter(|name| CONTEXTS.contains(name)).collect();
        if contexts.len() > 1 {
            return Err(Error::input(
                "method",
                format!("{} each learn the words around class names, of which there is one set", contexts.join(" and ")),
            )
            .hint("keep one of them"));
        }
        let parts = TaskParts {
            clip: &self.base.clip,
            tokenizer: &self.base.tokenizer,
            classes: &self.data.classes,
            train: Some(&self.data),
            fusion: self.recipe.fusion.as_ref(),
            label_smoothing: self.recipe.train.label_smoothing,
            seed: self.recipe.train.seed,
        };
        let manifest = known.and_then(|d| d.manifest.as_ref());
        let parts = match manifest.filter(|m| definition.own_classes() && !m.classes.is_empty()) {
            Some(m) => TaskParts { classes: &m.classes, train: None, ..parts },
            None => parts,
        };
        self.check_sampling()?;
        let mut task = definition.build(&parts, &mut adapters.params)?;
        // A temperature or threshold was chosen for the adapter's own classes.
        let own = |m: &&Manifest| definition.templates().is_empty() || same_classes(&m.classes, &self.data.classes);
        if let Some(manifest) = manifest.filter(own)
            && self.is_for_this_task(manifest)?
        {
            task.set_scalars(&manifest.scalars);
        }
        for split in [Split::Train, Split::Val, Split::Test] {
            self.data.visit(split, &mut |part| task.check(part))?;
        }
        Ok(task)
    }

    /// Classes can be drawn equally only where it is known which example has which.
    fn check_sampling(&self) -> Result<()> {
        let bad =
            |what: &str, hint: &str| Err(Error::input("train.sampling", format!("balanced draws classes equally, {what}")).hint(hint));
        match self.recipe.train.sampling {
            Sampling::Balanced if self.data.stream.is_some() => {
                bad("which a stream cannot", "data: { parquet: { stream: false } }, or webdataset")
            }
            Sampling::Balanced if self.data.train.iter().all(|e| e.all_labels().is_empty()) => {
                bad("and no example has a class", "leave it out")
            }
            _ => Ok(()),
        }
    }

    /// Puts the parts together.
    ///
    /// # Errors
    /// When a forward pass fails.
    pub fn trainer<'s>(&'s self, adapters: &'s mut Adapters, task: Box<dyn Task>) -> Result<Trainer<'s>> {
        let config = &self.recipe.train;
        let source = FeatureSource {
            images: self.images.clone(),
            batch: config.batch.max(estimate::EVALUATED),
            cache: config.activation_cache.clone(),
            identity: self.identity()?,
            tokens: task.needs() == Needs::Tokens,
        };
        let features = Features::new(source, &self.base.clip, &mut adapters.patches)?;
        let metric = config.early_stopping.as_ref().and_then(|e| e.metric.clone());
        Ok(Trainer {
            base: &self.base,
            adapters,
            task,
            data: &self.data,
            images: self.images.clone(),
            config,
            micro: Micro::of(config),
            metric: metric.unwrap_or_else(|| self.recipe.task.definition().metric().to_string()),
            features,
        })
    }

    /// The base weights that the only method has replaced by its own. With several methods another one may still look at
    /// them.
    fn replaced<'s>(&'s self, adapters: &Adapters) -> Vec<&'s Tensor> {
        let mut patches = adapters.patches.iter();
        let (Some(only), None) = (patches.next(), patches.next()) else { return Vec::new() };
        self.base.clip.sites().weights().filter(|(id, _)| only.replaces(*id)).map(|(_, w)| &w.tensor).collect()
    }

    /// Gives up base weights that training does not need: full fine-tuning has them as its parameters. Nothing but the
    /// trained model can be computed with [`Session::base`] afterwards.
    ///
    /// # Errors
    /// When another thread failed while it held the memory.
    pub fn discard_replaced(&self, adapters: &Adapters) -> Result<()> {
        Ok(self.replaced(adapters).into_iter().try_for_each(ops::discard)?)
    }

    /// Everything that activations of the base depend on, the images apart.
    fn identity(&self) -> Result<String> {
        let base = BaseRef::of(&self.base, "");
        let recipe = &self.recipe;
        Ok(json!([base.digest, base.preprocess, to_json(&recipe.method)?, to_json(&recipe.images)?, recipe.train.dtype]).to_string())
    }

    /// The split that `before` and `after` are measured on.
    fn reported(&self) -> Split {
        if self.data.test.is_empty() { Split::Val } else { Split::Test }
    }

    /// Numbers of the base and of what is added to it.
    #[must_use]
    pub fn total_parameters(&self, adapters: &Adapters) -> usize {
        let sites = self.base.clip.sites();
        let is_base = |name: &str| sites.weight(&base_name(name)).is_some();
        let added: usize = adapters.params.iter().filter(|p| !is_base(&p.name)).map(|p| p.var.elem_count()).sum();
        sites.count() + added
    }

    /// Class names, or the task's own vocabulary.
    fn classes(&self, task: &dyn Task) -> Vec<String> {
        task.classes().unwrap_or(&self.data.classes).to_vec()
    }

    fn manifest(&self, task: &dyn Task, metrics: &Evaluation, made_of: &Provenance) -> Result<Manifest> {
        Ok(Manifest {
            version: env!("CARGO_PKG_VERSION").into(),
            base: BaseRef::of(&self.base, self.recipe.model.spec()),
            made_of: made_of.clone(),
            task: to_json(&self.recipe.task)?,
            fusion: self.recipe.fusion.as_ref().map_or(Ok(serde_json::Value::Null), to_json)?,
            scalars: task.scalars(),
            classes: self.classes(task),
            templates: self.recipe.task.definition().templates().to_vec(),
            images: Some(self.recipe.images.options().pixels()),
            recipe: to_json(&self.recipe)?,
            metrics: json!(metrics.metrics),
            methods: Vec::new(),
        })
    }
}

fn to_json(value: &impl serde::Serialize) -> Result<serde_json::Value> {
    serde_json::to_value(value).map_err(|e| Error::fault("peft.json", e))
}

/// The model of a recipe.
fn load(recipe: &Recipe, device: &Device, observer: &mut dyn Observer) -> Result<Base> {
    let dtype = recipe.train.dtype.into();
    match &recipe.model {
        ModelConfig::Pretrained(spec) => Base::from_source(fetched(observer, |p| Source::resolve_with(spec, p))?, dtype, device),
        ModelConfig::Scratch(s) => Base::random(&s.init.config, recipe.train.seed, dtype, device),
    }
}

/// What `peft eval` evaluates.
#[derive(Debug, Clone)]
pub struct EvalOptions {
    /// An adapter; the run's own where a run is evaluated, none where a recipe is.
    pub adapter: Option<PathBuf>,
    /// Which split.
    pub split: Split,
    /// Whether an adapter of another base is accepted.
    pub allow_base_mismatch: bool,
}

/// `peft eval`: metrics of a split, with an adapter or without. Examples are in the splits that the adapter's run had them in.
///
/// # Errors
/// When the adapter does not fit or the split is empty.
pub fn evaluate(mut recipe: Recipe, options: &EvalOptions, device: &Device, observer: &mut dyn Observer) -> Result<Evaluation> {
    if let Some(adapter) = &options.adapter {
        images::adopt(&mut recipe, adapter, observer)?;
    }
    let mut session = Session::open(recipe, device, observer)?;
    for adapter in session.beneath()?.iter().chain(&options.adapter) {
        session.settle(adapter, observer)?;
    }
    if let Some(adapter) = &options.adapter {
        session.check_task(&Delta::read(adapter)?)?;
    }
    session.evaluate(options, observer)
}

impl Session {
    /// [`evaluate`] for a session that is open.
    ///
    /// # Errors
    /// As [`evaluate`].
    pub fn evaluate(&self, options: &EvalOptions, observer: &mut dyn Observer) -> Result<Evaluation> {
        let device = self.base.clip.device();
        let examples = self.data.count(options.split);
        if examples == 0 {
            return Err(Error::input("--split", format!("the {} split is empty", options.split)));
        }
        let sites = self.base.clip.sites();
        let mut delta = options.adapter.as_deref().map(Delta::read).transpose()?;
        let mut adapters = match &mut delta {
            None => Adapters::plan(&[], sites, 0, device)?,
            Some(delta) => {
                for note in delta.check_base(&self.base, options.allow_base_mismatch)? {
                    observer.event(Event::Note(note));
                }
                let adapters = delta.apply_to(&self.base.clip, &self.data.classes)?;
                tell(&adapters, observer);
                adapters
            }
        };
        self.put_beneath(&mut adapters)?;
        let task = self.task(&mut adapters, delta.as_ref())?;
        if let Some(delta) = delta.filter(|_| adapters.has_own()) {
            delta.fill(&adapters.params)?;
        }
        let bare = options.adapter.is_none();
        let mut trainer = self.trainer(&mut adapters, task)?;
        if bare {
            trainer.calibrate(observer)?;
        }
        observer.event(Event::Phase("evaluate", Some(examples)));
        let found = trainer.evaluate(options.split, observer)?;
        let hint = "the adapter's weights may be too large for this base, or train.dtype too narrow";
        check_finite("evaluation", &found).map_err(|e| e.hint(hint))?;
        Ok(found)
    }
}
