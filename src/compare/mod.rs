//! `peft compare`: methods side by side under one protocol.
//!
//! Each run is an ordinary run directory, so a comparison that was stopped goes on where it was. Who makes a run is a
//! [`Runner`]'s matter: the command line starts a process for each, which is how memory is measured for each.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::comparison::Comparison;
use crate::data::DataConfig;
use crate::error::{Error, Result};
use crate::files;
use crate::provenance::Provenance;
use crate::recipe::Recipe;
use crate::run;
use crate::train::{Event, Observer};

mod draw;
mod gather;
mod jobs;
mod made_of;
mod plan;
mod stats;
mod write;

pub use jobs::Job;
use made_of::Now;
use plan::{PlannedGroup, PlannedRun};
pub use write::{csv, headings, markdown, table};

/// What `peft compare` compares.
#[derive(Debug, Clone)]
pub struct CompareOptions {
    /// Recipes to be run.
    pub recipes: Vec<Recipe>,
    /// Finished run directories, in place of recipes.
    pub runs: Vec<PathBuf>,
    /// By name; when empty those of the recipe's `compare.methods`, else its own method.
    pub methods: Vec<String>,
    /// The row that others are compared with; `full` when left out, or the first row that has figures where there is no `full`.
    pub reference: Option<String>,
    /// How many, counted from the recipe's.
    pub seeds: usize,
    /// Training examples for each class; the recipe's own when empty.
    pub shots: Vec<usize>,
    /// Learning rates tried for each method; 0 takes the given one.
    pub search: usize,
    /// The budget of each run; the recipe's own when left out.
    pub limit: Option<Limit>,
    /// Where everything goes.
    pub output: PathBuf,
    /// Whether runs with other settings are replaced.
    pub force: bool,
    /// Runs side by side.
    pub jobs: usize,
    /// Threads in all.
    pub threads: usize,
    /// Bytes of memory that runs may take together, where that is known.
    pub memory: Option<u64>,
}

/// How long a run may take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Limit {
    /// Passes over the training split.
    Epochs(usize),
    /// Optimiser steps.
    Steps(usize),
    /// Seconds of steps: as many steps as a measured one suggests.
    Seconds(f64),
}

/// What a run will take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checked {
    /// Bytes of memory.
    pub bytes: u64,
}

/// The set on which forgetting is measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Second {
    /// Its examples.
    pub data: DataConfig,
    /// Prompts around its class names.
    pub templates: Vec<String>,
}

/// The base before training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BaseMeasured {
    /// Metrics and loss on the test split, zero-shot.
    pub zero_shot: Option<BTreeMap<String, f64>>,
    /// Examples of the second set and the accuracy there.
    pub forget: Option<(usize, f64)>,
    /// Why there is none.
    pub forget_failed: Option<String>,
}

/// A run after training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// How fast it predicts.
    pub inference: crate::comparison::Inference,
    /// Accuracy on the second set.
    pub forget: Option<f64>,
    /// Why there is none.
    pub forget_failed: Option<String>,
}

/// Who does the work.
pub trait Runner: Sync {
    /// Checks a recipe without training.
    ///
    /// # Errors
    /// When it does not fit base or data.
    fn check(&self, recipe: &Path) -> Result<Checked>;

    /// Seconds of a step.
    ///
    /// # Errors
    /// When a step fails.
    fn pace(&self, recipe: &Path) -> Result<f64>;

    /// Trains, or goes on training; `stop` gives the signal that asks for an end.
    ///
    /// # Errors
    /// When the run fails.
    fn train(&self, job: &Job, stop: &dyn Fn() -> Option<i32>) -> Result<()>;

    /// Digests of what a run of a recipe would be made of now; empty ones are not compared.
    ///
    /// # Errors
    /// When base or data cannot be read.
    fn made_of(&self, _recipe: &Recipe) -> Result<Provenance> {
        Ok(Provenance::default())
    }

    /// Digests of the second set and of a recipe's base.
    ///
    /// # Errors
    /// When base or data cannot be read.
    fn second_made_of(&self, _recipe: &Recipe, _second: &Second) -> Result<Provenance> {
        Ok(Provenance::default())
    }

    /// Measures the base without adapters.
    ///
    /// # Errors
    /// When base or data cannot be read.
    fn base(&self, recipe: &Recipe, second: &Second) -> Result<BaseMeasured>;

    /// Measures a finished run.
    ///
    /// # Errors
    /// When its adapter cannot be read.
    fn measure(&self, run: &Path, second: &Second) -> Result<Measured>;

    /// Test images as data URIs.
    ///
    /// # Errors
    /// When one cannot be read.
    fn pictures(&self, recipe: &Recipe, ids: &[String]) -> Result<Vec<String>>;
}

/// Files of a comparison, besides its runs and their `recipes/`.
const OURS: [&str; 8] = ["compare.json", "compare.md", "compare.csv", "compare.html", "measured.json", "pace.json", "recipes", "lock"];

/// Runs what is missing, measures, and writes `compare.json`, `.md`, `.csv` and `.html`. With it what to say of runs that failed;
/// they stand in their rows with the reason.
///
/// # Errors
/// When the options do not fit, the disk refuses, or a signal came.
pub fn compare(options: &CompareOptions, runner: &dyn Runner, observer: &mut dyn Observer) -> Result<(Comparison, Option<Error>)> {
    check_options(options)?;
    let mut groups = match options.runs.is_empty() {
        true => plan::plan(options)?,
        false => plan::of_runs(&options.runs)?,
    };
    check_output(&options.output)?;
    files::create_dir_all(&options.output)?;
    let _lock = run::lock(&options.output)?;
    ["", "recipes"].iter().for_each(|dir| files::sweep_all(&options.output.join(dir)));
    if let Some(Limit::Seconds(seconds)) = options.limit {
        paces(&mut groups, seconds, options, runner, observer)?;
    }
    let now = Now::new(runner);
    let failed = train(&groups, options, &now, runner, observer)?;
    let comparison = gather::Gather::new(options, runner, &now)?.all(&groups, &failed, observer)?;
    let failed = verdict(&comparison, &failed);
    Ok((comparison, failed))
}

/// Bad input where all that failed was bad input, a fault otherwise. A learning rate that failed in a search is no failure.
fn verdict(comparison: &Comparison, failed: &BTreeMap<PathBuf, Error>) -> Option<Error> {
    let runs: Vec<_> = comparison.groups.iter().flat_map(|g| &g.rows).flat_map(|r| &r.runs).collect();
    let bad: Vec<_> = runs.iter().filter(|r| r.failed.is_some()).collect();
    let message = format!("{} of {} runs failed; the table says why", bad.len(), runs.len());
    let hint = "the same command runs them again and keeps what is finished";
    let input = bad.iter().all(|r| matches!(failed.get(&r.run), Some(Error::Input(_))));
    let error = if input { Error::input("compare", message) } else { Error::fault("compare", message) };
    (!bad.is_empty()).then(|| error.hint(hint))
}

fn check_options(options: &CompareOptions) -> Result<()> {
    let empty = options.recipes.is_empty() && options.runs.is_empty();
    if empty || !options.recipes.is_empty() && !options.runs.is_empty() {
        return Err(Error::input("peft compare", "expected recipes or finished run directories, one kind of them"));
    }
    if options.shots.contains(&0) {
        return Err(Error::input("--shots", "expected at least 1, found 0"));
    }
    if matches!(options.limit, Some(Limit::Seconds(s)) if !(s > 0.0 && s.is_finite())) {
        return Err(Error::input("--seconds", "expected a number above 0"));
    }
    let once = |place: &str, names: &[String]| match names.iter().enumerate().find(|(i, n)| names[..*i].contains(n)) {
        Some((_, name)) => Err(Error::input(place, format!("`{name}` is named twice"))),
        None => Ok(()),
    };
    once("--methods", &options.methods)?;
    once("--shots", &options.shots.iter().map(ToString::to_string).collect::<Vec<_>>())?;
    once("peft compare", &options.recipes.iter().map(|r| r.name.clone()).collect::<Vec<_>>())?;
    once("peft compare", &options.runs.iter().map(|r| r.display().to_string()).collect::<Vec<_>>())
}

/// Other people's files are never mixed with a comparison.
fn check_output(dir: &Path) -> Result<()> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries.collect::<std::io::Result<Vec<_>>>().map_err(|e| Error::read(dir, e))?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::read(dir, e)),
    };
    let ours = |e: &std::fs::DirEntry| {
        let name = e.file_name().to_string_lossy().into_owned();
        OURS.contains(&name.as_str()) || name.starts_with('.') || e.path().join("recipe.yaml").exists() || e.path().join("lock").exists()
    };
    match entries.into_iter().find(|e| !ours(e)) {
        Some(e) => {
            Err(Error::input(dir.display(), format!("holds `{}`, which is not part of a comparison", e.file_name().to_string_lossy()))
                .hint("choose another directory with --output"))
        }
        None => Ok(()),
    }
}

/// Where the recipe of a run is written for its process.
fn recipe_file(output: &Path, run: &Recipe) -> PathBuf {
    output.join("recipes").join(format!("{}.yaml", run.name))
}

fn write_recipe(output: &Path, run: &Recipe) -> Result<PathBuf> {
    let path = recipe_file(output, run);
    files::write_atomic(&path, run.to_yaml()?.as_bytes())?;
    Ok(path)
}

/// Turns a budget in seconds into steps: a step of each row is measured once and remembered, so that going on gives the same steps.
fn paces(
    groups: &mut [PlannedGroup],
    seconds: f64,
    options: &CompareOptions,
    runner: &dyn Runner,
    observer: &mut dyn Observer,
) -> Result<()> {
    let path = options.output.join("pace.json");
    let mut known: BTreeMap<String, f64> = read_json(&path)?.unwrap_or_default();
    observer.event(Event::Phase("steps measured", Some(groups.iter().map(|g| g.rows.len()).sum())));
    for row in groups.iter_mut().flat_map(|g| &mut g.rows) {
        let Some(first) = row.trials.first().and_then(|t| t.runs.first()).and_then(|r| r.recipe.as_deref()) else { continue };
        let mut timed = first.clone();
        (timed.train.epochs, timed.train.steps) = (None, Some(1));
        let key = blake3::hash(timed.to_yaml()?.as_bytes()).to_hex().to_string();
        let pace = match known.get(&key) {
            Some(pace) => *pace,
            None => match runner.pace(&write_recipe(&options.output, &timed)?) {
                Ok(pace) => {
                    known.insert(key, pace);
                    files::write_json(&path, &known)?;
                    pace
                }
                // A method that cannot make a step fails in its run, too, and is told of there; that run is kept short.
                Err(_) => seconds,
            },
        };
        let steps = (seconds / pace.max(1e-9)).round().clamp(1.0, 1e9) as usize;
        for run in row.trials.iter_mut().flat_map(|t| &mut t.runs).filter_map(|r| r.recipe.as_mut()) {
            run.train.steps = Some(steps);
        }
        observer.event(Event::Advance(1));
    }
    Ok(())
}

/// Makes every run that is not finished. What failed, by directory.
fn train(
    groups: &[PlannedGroup],
    options: &CompareOptions,
    now: &Now<'_>,
    runner: &dyn Runner,
    observer: &mut dyn Observer,
) -> Result<BTreeMap<PathBuf, Error>> {
    let mut failed = BTreeMap::new();
    let mut jobs = Vec::new();
    let rows: Vec<_> = groups.iter().flat_map(|g| &g.rows).collect();
    observer.event(Event::Phase("checked", Some(rows.len())));
    for row in rows {
        let runs = row.trials.iter().flat_map(|t| &t.runs);
        let open = runs.filter_map(|r| to_do(r, options, now, observer).transpose()).collect::<Result<Vec<_>>>()?;
        observer.event(Event::Advance(1));
        let Some((first, _)) = open.first() else { continue };
        let memory = match runner.check(&write_recipe(&options.output, first)?) {
            Ok(checked) => checked.bytes,
            Err(e) => {
                observer.event(Event::Warning(format!("{} cannot be run: {e}", row.method)));
                failed.extend(open.iter().filter_map(|(r, _)| Some((r.output.clone()?, again(&e)))));
                continue;
            }
        };
        for (recipe, replace) in open {
            jobs.push(Job {
                name: recipe.name.clone(),
                recipe: write_recipe(&options.output, recipe)?,
                dir: recipe.output.clone().unwrap_or_default(),
                replace,
                threads: (options.threads / options.jobs.max(1)).max(1),
                memory,
            });
        }
        if let Some(signal) = observer.stop() {
            return Err(Error::Interrupted { message: "stopped before the first run".into(), signal });
        }
    }
    observer.event(Event::Phase("runs", Some(jobs.len())));
    for (job, done) in jobs::run_all(jobs, options.jobs, options.memory, runner, observer)? {
        if let Err(e) = done {
            failed.insert(job.dir, e);
        }
    }
    Ok(failed)
}

/// Whether a run is to be made, and whether it replaces another.
fn to_do<'r>(
    planned: &'r PlannedRun,
    options: &CompareOptions,
    now: &Now<'_>,
    observer: &mut dyn Observer,
) -> Result<Option<(&'r Recipe, bool)>> {
    let Some(recipe) = planned.recipe.as_deref() else { return Ok(None) };
    if let Some(other) = run::differs(&planned.dir, recipe)? {
        return match options.force {
            true => Ok(Some((recipe, true))),
            false => Err(Error::input(planned.dir.display(), format!("is a run with another recipe{other}"))
                .hint("pass --force to replace such runs, or --output DIR for another place")),
        };
    }
    if now.replaces(planned, recipe, observer)? {
        return Ok(Some((recipe, true)));
    }
    Ok(run::read_report(&planned.dir)?.is_none().then_some((recipe, false)))
}

/// One reason for many runs.
fn again(error: &Error) -> Error {
    match error {
        Error::Input(p) => Error::Input(p.clone()),
        other => Error::fault("", other),
    }
}

/// The largest file of a comparison that is read.
const MAX_JSON: u64 = 1 << 30;

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let text = files::find_text(path, MAX_JSON)?;
    text.map(|text| serde_json::from_str(&text).map_err(|e| Error::input(path.display(), e))).transpose()
}
