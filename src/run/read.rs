//! What a run directory says to those who do not write to it.

use std::path::Path;

use peft_adapters::wording::plain;
use serde_json::{Map, Value};

use super::{EVENTS, FAILURE, LOCK, METRICS, PAGE, PREDICTIONS, RECIPE, REPORT};
use crate::error::{Error, Result};
use crate::files;
use crate::json;
use crate::provenance::Provenance;
use crate::recipe::Recipe;
use crate::report::{Prediction, TrainReport};
use crate::roster::Roster;
use crate::train::StepRecord;

/// The largest file of a run that is read.
pub(super) const MAX_FILE: u64 = 4 << 30;

/// What a run directory's recipe has that `recipe` has not; `None` where they are the same, or where there is no run.
///
/// # Errors
/// When its recipe is broken.
pub fn differs(run: &Path, recipe: &Recipe) -> Result<Option<String>> {
    let place = run.join(RECIPE);
    let before = files::find_text(&place, MAX_FILE)?;
    before.map_or(Ok(None), |before| differing(&place, recipe, &before))
}

/// The first key that differs. What does not matter: where the output lies, what is logged, how often the state is saved, what is
/// compared.
pub(super) fn differing(place: &Path, recipe: &Recipe, before: &str) -> Result<Option<String>> {
    let mut old = Recipe::parse(&place.display().to_string(), before, &recipe.name, &[])?;
    old.output.clone_from(&recipe.output);
    old.train.tensorboard = recipe.train.tensorboard;
    old.train.checkpoint_steps = recipe.train.checkpoint_steps;
    (old.compare, old.forget) = (recipe.compare.clone(), recipe.forget.clone());
    if old == *recipe {
        return Ok(None);
    }
    let flat = |recipe: &Recipe| -> Result<Map<String, Value>> {
        let mut out = Map::new();
        json::flatten("", serde_json::to_value(recipe).map_err(|e| Error::fault(place.display(), e))?, &mut out);
        Ok(out)
    };
    let (old, new) = (flat(&old)?, flat(recipe)?);
    let key = old.keys().chain(new.keys()).find(|key| old.get(*key) != new.get(*key));
    let shown = |value: Option<&Value>| value.map_or("nothing".to_string(), |v| format!("`{v}`"));
    Ok(Some(key.map(|key| format!(": {key} was {}, is {}", shown(old.get(key)), shown(new.get(key)))).unwrap_or_default()))
}

/// Whether a path is one of the files that a run keeps in its directory; its predictions may be made again.
#[must_use]
pub fn is_own_file(run: &Path, path: &Path) -> bool {
    let inside =
        path.parent().map(|dir| if dir.as_os_str().is_empty() { Path::new(".") } else { dir }).and_then(|dir| dir.canonicalize().ok());
    let own = [RECIPE, REPORT, METRICS, PAGE, EVENTS, LOCK, FAILURE];
    inside.is_some() && inside == run.canonicalize().ok() && path.file_name().is_some_and(|name| own.iter().any(|own| name == *own))
}

/// The steps of a run directory.
///
/// # Errors
/// When a line is broken.
pub fn read_steps(run: &Path) -> Result<Vec<StepRecord>> {
    read_lines(&run.join(METRICS))
}

/// The predictions of a run directory.
///
/// # Errors
/// When a line is broken.
pub fn read_predictions(run: &Path) -> Result<Vec<Prediction>> {
    read_lines(&run.join(PREDICTIONS))
}

fn read_lines<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let text = files::read_text(path, MAX_FILE)?;
    let one =
        |(i, line)| serde_json::from_str(line).map_err(|e| Error::input(format!("{}:{}", path.display(), i + 1), plain(&e.to_string())));
    text.lines().enumerate().map(one).collect()
}

/// The report of a run directory, if it is finished.
///
/// # Errors
/// When the file is broken.
pub fn read_report(run: &Path) -> Result<Option<TrainReport>> {
    // Without a recipe there is no run: what else is there is being removed.
    if !run.join(RECIPE).exists() {
        return Ok(None);
    }
    let path = run.join(REPORT);
    let text = files::find_text(&path, MAX_FILE)?;
    text.map(|text| serde_json::from_str(&text).map_err(|e| Error::input(path.display(), plain(&e.to_string())))).transpose()
}

/// What a run was made of, as its report says, or as it was noted when it began; nothing where there is no run.
///
/// # Errors
/// When a file is broken.
pub fn read_made_of(run: &Path) -> Result<Option<Provenance>> {
    if !run.join(RECIPE).exists() {
        return Ok(None);
    }
    match read_report(run)? {
        Some(report) => Ok(Some(report.made_of)),
        None => Ok(Roster::find(run)?.map(|roster| roster.made_of)),
    }
}

/// Why the last attempt at a run failed, if it did.
#[must_use]
pub fn read_failure(run: &Path) -> Option<String> {
    let text = files::read_text(&run.join(FAILURE), 1 << 20).ok()?;
    Some(text.trim().to_string())
}

/// The recipe of a run directory.
///
/// # Errors
/// When it is missing or broken.
pub fn read_recipe(run: &Path) -> Result<Recipe> {
    Recipe::load(&run.join(RECIPE), &[])
}
