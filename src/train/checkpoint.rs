//! The state of a run between two steps: one file, written whole or not at all.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Shape, Tensor};
use serde::{Deserialize, Serialize};

use super::health::Health;
use super::micro::Micro;
use crate::clip::model::all_finite;
use crate::clip::weights;
use crate::error::{Error, Result};
use crate::files;
use crate::provenance::Provenance;
use crate::report::{EpochRecord, Evaluation};

/// The file inside `checkpoint/`.
pub const FILE: &str = "state.safetensors";
const KEY: &str = "state";
/// The largest one that is read.
const MAX_FILE: u64 = 64 << 30;

/// Everything that is no tensor.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Optimiser steps done; the loader's position and all randomness follow from it.
    pub step: usize,
    /// Sum and number of the losses of the unfinished epoch.
    pub epoch_loss: (f64, usize),
    /// Finished epochs.
    pub epochs: Vec<EpochRecord>,
    /// The best one so far.
    pub best: Option<Best>,
    /// Validations since then.
    pub without_improvement: usize,
    /// Whether early stopping said so.
    pub stopped_early: bool,
    /// The test split before training.
    pub before: Option<Evaluation>,
    /// Seconds of earlier sessions.
    pub seconds: f64,
    /// Seconds of steps alone, waiting for images included.
    #[serde(default)]
    pub step_seconds: f64,
    /// Images that steps have seen.
    #[serde(default)]
    pub images: usize,
    /// Images that a stream left out.
    #[serde(default)]
    pub skipped: usize,
    /// How the numbers behave.
    #[serde(default)]
    pub health: Health,
    /// What `train.auto_batch` has come to, where that is not what the recipe says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro: Option<Micro>,
    /// What the run is made of.
    #[serde(default)]
    pub made_of: Provenance,
}

/// The best epoch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// From 1.
    pub epoch: usize,
    /// Its metric.
    pub metric: f64,
    /// Its validation loss, which breaks ties.
    pub loss: f64,
}

/// Writes tensors and state.
///
/// # Errors
/// When the disk refuses.
pub fn save(dir: &Path, tensors: &[(String, Tensor)], state: &State) -> Result<()> {
    let json = serde_json::to_string(state).map_err(|e| Error::fault("checkpoint", e))?;
    let metadata = HashMap::from([(KEY.to_string(), json)]);
    weights::save_with(&dir.join(FILE), tensors, metadata)
}

/// Reads them back; nothing where no checkpoint was written yet.
///
/// # Errors
/// When the file is there and broken.
pub fn load(dir: &Path) -> Result<Option<(HashMap<String, Tensor>, State)>> {
    let path = dir.join(FILE);
    if files::missing(&path)? {
        return Ok(None);
    }
    let bytes = files::read(&path, MAX_FILE)?;
    let place = path.display().to_string();
    let (tensors, metadata) = weights::read_safetensors(&place, &bytes)?;
    for (name, value) in tensors.iter().filter(|(_, value)| value.dtype().is_float() && value.elem_count() > 0) {
        if !all_finite(value)? {
            return Err(Error::input(&place, format!("`{name}` holds values that are not finite")).hint("start anew with --force"));
        }
    }
    let state = metadata
        .get(KEY)
        .and_then(|json| serde_json::from_str(json).ok())
        .ok_or_else(|| Error::input(&place, "is not a checkpoint of this program").hint("start anew with --force"))?;
    Ok(Some((tensors.into_iter().collect(), state)))
}

/// Refuses a state from beyond the run's end.
///
/// # Errors
/// When more steps are done than there are.
pub(super) fn check_step(dir: &Path, done: usize, total: usize) -> Result<()> {
    match done <= total {
        true => Ok(()),
        false => {
            Err(Error::input(dir.join(FILE).display(), format!("says that {done} steps of {total} are done"))
                .hint("start anew with --force"))
        }
    }
}

/// Refuses what is not the value of a parameter.
///
/// # Errors
/// When its shape is another.
pub(super) fn check_shape(dir: &Path, name: &str, value: &Tensor, shape: &Shape) -> Result<()> {
    match value.shape() == shape {
        true => Ok(()),
        false => {
            Err(Error::input(dir.join(FILE).display(), format!("`{name}` has the shape {:?}, expected {:?}", value.dims(), shape.dims()))
                .hint("start anew with --force"))
        }
    }
}
