//! `peft runs`: which runs there are, what came of them, and where their recipes differ.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::json;
use crate::recipe::Recipe;
use crate::run;

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It has its report.
    Finished,
    /// A process is at it.
    Running,
    /// It was stopped, and can go on.
    Unfinished,
    /// It ended with an error, or what it wrote cannot be read.
    Failed,
}

/// A run and its key figures, as far as they are known.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The run directory.
    pub run: PathBuf,
    /// How far it is.
    pub state: State,
    /// `lora`, `lora+bottleneck`, `none`.
    pub method: String,
    /// `classify`, `retrieve`.
    pub task: String,
    /// The number that `before` and `after` are.
    pub metric: Option<String>,
    /// The split that they were measured on.
    pub split: Option<String>,
    /// Without the adapter.
    pub before: Option<f64>,
    /// With it.
    pub after: Option<f64>,
    /// Numbers that were trained.
    pub trainable_parameters: Option<usize>,
    /// Wall-clock time of training.
    pub seconds: Option<f64>,
    /// Why it failed.
    pub reason: Option<String>,
}

/// How far down runs are looked for: `runs/<comparison>/<method>/<seed>` and a little more.
const DEPTH: usize = 6;

/// All runs at or below a directory, in the order of their names.
///
/// # Errors
/// When there is no such directory.
pub fn list(dir: &Path) -> Result<Vec<Row>> {
    if !dir.is_dir() {
        return Err(
            Error::input(dir.display(), "no such directory").hint("runs are written to runs/<recipe name> unless `output` says otherwise")
        );
    }
    let mut rows = Vec::new();
    let mut walk = walkdir::WalkDir::new(dir).max_depth(DEPTH).sort_by_file_name().into_iter();
    while let Some(entry) = walk.next() {
        let Ok(entry) = entry else { continue };
        let hidden = entry.depth() > 0 && entry.file_name().to_string_lossy().starts_with('.');
        if !entry.file_type().is_dir() || hidden {
            if hidden && entry.file_type().is_dir() {
                walk.skip_current_dir();
            }
            continue;
        }
        if entry.path().join("recipe.yaml").is_file() {
            rows.push(row(entry.path()));
            walk.skip_current_dir();
        }
    }
    Ok(rows)
}

fn row(dir: &Path) -> Row {
    let mut row = Row {
        run: dir.to_path_buf(),
        state: if running(dir) { State::Running } else { State::Unfinished },
        method: String::new(),
        task: String::new(),
        metric: None,
        split: None,
        before: None,
        after: None,
        trainable_parameters: None,
        seconds: None,
        reason: run::read_failure(dir),
    };
    if row.reason.is_some() && row.state == State::Unfinished {
        row.state = State::Failed;
    }
    if let Err(e) = fill(&mut row, dir) {
        (row.state, row.reason) = (State::Failed, Some(e.to_string()));
    }
    row
}

fn fill(row: &mut Row, dir: &Path) -> Result<()> {
    let recipe = run::read_recipe(dir)?;
    let methods: Vec<&str> = recipe.method.iter().map(peft_adapters::MethodConfig::name).collect();
    row.method = if methods.is_empty() { "none".into() } else { methods.join("+") };
    row.task = recipe.task.name().into();
    let Some(report) = run::read_report(dir)? else { return Ok(()) };
    let value = |e: &Option<crate::report::Evaluation>| e.as_ref().and_then(|e| e.metric(&report.metric));
    (row.state, row.reason) = (State::Finished, None);
    (row.before, row.after) = (value(&report.before), value(&report.after));
    (row.metric, row.split) = (Some(report.metric), Some(report.split));
    (row.trainable_parameters, row.seconds) = (Some(report.trainable_parameters), Some(report.seconds));
    Ok(())
}

/// Whether a process holds the run's lock.
fn running(dir: &Path) -> bool {
    File::open(dir.join("lock")).is_ok_and(|f| f.try_lock_shared().is_err())
}

/// A key that two recipes do not share, or whose values differ.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// Such as `train.lr`.
    pub key: String,
    /// In the first; nothing where it has no such key.
    pub a: Option<Value>,
    /// In the second.
    pub b: Option<Value>,
}

/// Where the resolved recipes of two runs (or two recipe files) differ, key by key; where they write their results does not count.
///
/// # Errors
/// When one of them is missing or malformed.
pub fn diff(a: &Path, b: &Path) -> Result<Vec<Difference>> {
    let (a, b) = (flat(a)?, flat(b)?);
    let mut keys: Vec<&String> = a.keys().collect();
    keys.extend(b.keys().filter(|k| !a.contains_key(*k)));
    let differing = keys.into_iter().filter(|k| a.get(*k) != b.get(*k));
    Ok(differing.map(|k| Difference { key: k.clone(), a: a.get(k).cloned(), b: b.get(k).cloned() }).collect())
}

fn flat(path: &Path) -> Result<Map<String, Value>> {
    let recipe = if path.is_dir() { run::read_recipe(path)? } else { Recipe::load(path, &[])? };
    let mut value = serde_json::to_value(&recipe).map_err(|e| Error::fault(path.display(), e))?;
    if let Some(map) = value.as_object_mut() {
        map.remove("output");
    }
    let mut out = Map::new();
    json::flatten("", value, &mut out);
    Ok(out)
}
