//! What `peft compare` measures besides training: speed of inference, and what was forgotten.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use peft_adapters::{ClassFeatures, Patches, Step, rng};

use crate::clip::Clip;
use crate::clip::base::{Base, Parts};
use crate::clip::model::class_logits;
use crate::compare::{BaseMeasured, Measured, Second};
use crate::comparison::Inference;
use crate::data::{Images, Split};
use crate::delta::Delta;
use crate::error::{Error, Result};
use crate::merge;
use crate::page;
use crate::provenance::Provenance;
use crate::recipe::{ModelConfig, Recipe};
use crate::run;
use crate::session::{EvalOptions, Session};
use crate::task::prompts::{Pad, Prompts};
use crate::task::{ClassifyConfig, Forward, Head, TaskConfig};
use crate::train::Silent;

/// Images at once.
const BATCH: usize = 32;

/// Seconds that a measurement goes on at least, and rounds at most.
const AT_LEAST: f64 = 1.0;
const ROUNDS: usize = 25;

/// Measures one run after another; the base and the second set stay open in between.
#[derive(Default)]
pub struct Measurer {
    open: Mutex<Option<(String, Session)>>,
}

impl std::fmt::Debug for Measurer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Measurer")
    }
}

impl Measurer {
    /// The base of a recipe: zero-shot on its test split and on the second set, and its speed.
    ///
    /// # Errors
    /// When base or data cannot be read.
    pub fn base(&self, recipe: &Recipe, second: &Second, device: &Device) -> Result<BaseMeasured> {
        let mut zero_shot = None;
        if matches!(recipe.model, ModelConfig::Pretrained(_)) {
            let mut bare = bare(recipe);
            if let TaskConfig::Classify(c) = &mut bare.task {
                c.head = Head::Prompts;
            }
            let session = Session::open(bare, device, &mut Silent)?;
            let split = if session.data.test.is_empty() { Split::Val } else { Split::Test };
            let found = session.evaluate(&options(None, split), &mut Silent)?;
            let loss = [("loss".to_string(), found.loss)];
            zero_shot = Some(found.metrics.into_iter().chain(loss).collect::<BTreeMap<_, _>>());
        }
        let forget = self.second(recipe, second, device, |session| {
            let found = session.evaluate(&options(None, Split::Test), &mut Silent)?;
            Ok((found.examples, found.metrics.get("accuracy").copied().unwrap_or(0.0)))
        });
        let (forget, forget_failed) = told(forget);
        Ok(BaseMeasured { zero_shot, forget, forget_failed })
    }

    /// A finished run: its accuracy on the second set, and its speed beside the base and folded into it.
    ///
    /// # Errors
    /// When its adapter cannot be read.
    pub fn run(&self, dir: &Path, second: &Second, device: &Device) -> Result<Measured> {
        let recipe = run::read_recipe(dir)?;
        let adapter = dir.join("adapter");
        let forget = self.second(&recipe, second, device, |session| {
            let found = session.evaluate(&options(Some(&adapter), Split::Test), &mut Silent)?;
            Ok(found.metrics.get("accuracy").copied().unwrap_or(0.0))
        });
        let (forget, forget_failed) = told(forget);
        Ok(Measured { inference: inference(&recipe, &adapter, &second.templates, device)?, forget, forget_failed })
    }

    /// Digests of the second set and of a recipe's base.
    ///
    /// # Errors
    /// When base or data cannot be read.
    pub fn second_made_of(&self, recipe: &Recipe, second: &Second, device: &Device) -> Result<Provenance> {
        self.second(recipe, second, device, |session| Ok(session.roster()?.made_of))
    }

    /// Works on the second set with a recipe's base, opened before or now.
    fn second<T>(&self, recipe: &Recipe, second: &Second, device: &Device, work: impl FnOnce(&Session) -> Result<T>) -> Result<T> {
        let mut own = bare(recipe);
        own.data = second.data.clone();
        own.task = TaskConfig::Classify(ClassifyConfig { templates: second.templates.clone(), ..ClassifyConfig::default() });
        // Nothing of how it was trained matters here, so that all runs share one session.
        (own.train, own.name) = (crate::train::TrainConfig { dtype: recipe.train.dtype, ..Default::default() }, String::new());
        let key = own.to_yaml()?;
        let mut open = self.open.lock().map_err(|_| Error::fault("measure", "a measurement before failed"))?;
        let session = match open.take() {
            Some((k, session)) if k == key => session,
            _ => Session::open(own, device, &mut Silent)?,
        };
        let (_, session) = open.insert((key, session));
        work(session)
    }
}

/// Digests of what a run of a recipe would be made of now.
///
/// # Errors
/// When base or data cannot be read.
pub fn made_of(recipe: &Recipe, device: &Device) -> Result<Provenance> {
    Ok(Session::open(bare(recipe), device, &mut Silent)?.roster()?.made_of)
}

fn told<T>(found: Result<T>) -> (Option<T>, Option<String>) {
    match found {
        Ok(found) => (Some(found), None),
        Err(e) => (None, Some(e.to_string())),
    }
}

fn options(adapter: Option<&Path>, split: Split) -> EvalOptions {
    EvalOptions { adapter: adapter.map(Path::to_path_buf), split, allow_base_mismatch: false }
}

/// The recipe without what is trained.
fn bare(recipe: &Recipe) -> Recipe {
    Recipe { method: Vec::new(), compare: None, forget: None, output: None, ..recipe.clone() }
}

fn base_of(recipe: &Recipe, device: &Device) -> Result<Base> {
    let dtype = recipe.train.dtype.into();
    match &recipe.model {
        ModelConfig::Pretrained(spec) => Base::load(spec, dtype, device),
        ModelConfig::Scratch(s) => Base::random(&s.init.config, recipe.train.seed, dtype, device),
    }
}

/// Class features, computed once as a service would.
fn classes(base: &Base, templates: &[String], patches: &Patches) -> Result<Tensor> {
    const NAMES: [&str; 10] = ["cat", "dog", "car", "house", "tree", "person", "chair", "boat", "bird", "clock"];
    let prompts = Prompts::of_classes(&base.tokenizer, &NAMES.map(String::from), templates, Pad::Longest)?;
    prompts.class_features(&Forward::eval(&base.clip, patches))
}

fn inference(recipe: &Recipe, adapter: &Path, templates: &[String], device: &Device) -> Result<Inference> {
    let base = base_of(recipe, device)?;
    let delta = Delta::read(adapter)?;
    delta.check_base(&base, false)?;
    let mut adapters = delta.apply(&base.clip)?;
    let mut patches = std::mem::take(&mut adapters.view);
    patches.prepare(&Step::eval())?;
    let why = patches.iter().find_map(|p| p.unfoldable().map(ToString::to_string));
    let unfoldable = why.or_else(|| (!delta.own.is_empty()).then(|| "it has a task head, which plain CLIP has no place for".into()));
    let classes = classes(&base, templates, &patches)?;
    let (merged, patches) = match &unfoldable {
        Some(_) => (None, patches),
        None => merge::folded_clip(&base, patches).map(|(clip, patches)| (Some(clip), patches))?,
    };
    let none = Patches::none();
    let mut models = vec![(&base.clip, &none, &classes), (&base.clip, &patches, &classes)];
    models.extend(merged.as_ref().map(|clip| (clip, &none, &classes)));
    let found = medians(&base, &models)?;
    Ok(Inference { batch: BATCH, base_ms: found[0], unmerged_ms: found[1], merged_ms: found.get(2).copied(), unfoldable })
}

/// A model to be timed: towers, what changes them, class features.
type Timed<'a> = (&'a Clip, &'a Patches, &'a Tensor);

/// Medians in milliseconds an image, the models taken in turn after one round that does not count.
fn medians(base: &Base, models: &[Timed<'_>]) -> Result<Vec<f64>> {
    let size = base.clip.config().vision.image_size;
    let mut rng = rng::rng(17, &[]);
    let pixels = rng::normal(&mut rng, 1.0, (BATCH, 3, size, size), DType::F32, &Device::Cpu)?;
    let one = |(clip, patches, classes): &Timed<'_>| -> Result<f64> {
        let start = Instant::now();
        let features = clip.image_features(&pixels, patches)?;
        let classes = patches.class_features(ClassFeatures::Shared((*classes).clone()), &features)?;
        // Reading a number waits for the device.
        class_logits(clip, &features, &classes, patches)?.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?;
        Ok(start.elapsed().as_secs_f64())
    };
    models.iter().try_for_each(|m| one(m).map(drop))?;
    let mut times = vec![Vec::new(); models.len()];
    let started = Instant::now();
    while times[0].len() < 3 || (started.elapsed().as_secs_f64() < AT_LEAST && times[0].len() < ROUNDS) {
        for (model, times) in models.iter().zip(&mut times) {
            times.push(one(model)?);
        }
    }
    let median = |mut t: Vec<f64>| {
        t.sort_by(f64::total_cmp);
        1e3 * t[t.len() / 2] / BATCH as f64
    };
    Ok(times.into_iter().map(median).collect())
}

/// Test images of a recipe as data URIs.
///
/// # Errors
/// When one is missing or cannot be read.
pub fn pictures(recipe: &Recipe, ids: &[String]) -> Result<Vec<String>> {
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let data = recipe.data.open_for(recipe.train.seed, &recipe.task.definition().needs_of_rows())?;
    let options = recipe.images.options();
    let images = Images::new(Parts::load(recipe.model.spec())?.preprocess, options);
    let one = |id: &String| {
        let example = data.test.iter().chain(&data.val).find(|e| e.id == *id);
        let example = example.ok_or_else(|| Error::input(id, "is not in the test split any more"))?;
        page::thumbnail(&images.open(example)?)
    };
    ids.iter().map(one).collect()
}
