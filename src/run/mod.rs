//! The run directory: who may write to it, what is in it, whether it goes on.

use std::fs::TryLockError;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::events::Events;
use crate::files::{self, Output};
use crate::recipe::Recipe;
use crate::report::{EpochRecord, Evaluation, Prediction, TrainReport};
use crate::roster;
use crate::train::StepRecord;

mod read;

use read::{MAX_FILE, differing};
pub use read::{differs, is_own_file, read_failure, read_made_of, read_predictions, read_recipe, read_report, read_steps};

const RECIPE: &str = "recipe.yaml";
const REPORT: &str = "report.json";
const METRICS: &str = "metrics.jsonl";
const PREDICTIONS: &str = "predictions.jsonl";
const PAGE: &str = "report.html";
/// TensorBoard looks for `tfevents` in a name.
const EVENTS: &str = "events.out.tfevents.peft";
const LOCK: &str = "lock";
const FAILURE: &str = "failure.txt";
/// The recipe of a run that is being removed.
const REMOVED: &str = ".removed";
/// All that `--force` may remove.
const OURS: [&str; 12] =
    [RECIPE, roster::FILE, REPORT, METRICS, PREDICTIONS, PAGE, EVENTS, LOCK, FAILURE, "adapter", "checkpoint", "model"];

/// What to do with a directory that is not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// Refuse.
    Refuse,
    /// Go on where it stopped.
    Resume,
    /// Start anew.
    Replace,
}

/// A locked run directory.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    lock: Output,
    metrics: Option<Output>,
    events: Option<Events>,
}

/// What was found.
#[derive(Debug)]
pub enum Opened {
    /// To be trained, from a checkpoint if there is one.
    Open(Box<RunDir>),
    /// Done before; nothing is changed.
    Finished(Box<TrainReport>),
}

impl RunDir {
    /// Where the run of a recipe goes.
    #[must_use]
    pub fn place(recipe: &Recipe) -> PathBuf {
        recipe.output.clone().unwrap_or_else(|| Path::new("runs").join(&recipe.name))
    }

    /// Opens and locks the run directory of a recipe.
    ///
    /// # Errors
    /// When it belongs to something else, to another process, or to an unfinished run.
    pub fn open(recipe: &Recipe, existing: Existing) -> Result<Opened> {
        let path = Self::place(recipe);
        let yaml = recipe.to_yaml()?;
        check_ours(&path)?;
        files::create_dir_all(&path)?;
        let lock = lock(&path)?;
        let run = Self { path, lock, metrics: None, events: None };
        run.tidy()?;
        let place = run.path.join(RECIPE);
        let before = || files::find_text(&place, MAX_FILE).map_err(|e| e.hint("pass --force to start anew"));
        match existing {
            Existing::Replace => run.replace(&yaml)?,
            Existing::Refuse | Existing::Resume => match before()? {
                None => {
                    run.check_empty()?;
                    files::write_atomic(&place, yaml.as_bytes())?;
                }
                Some(_) if existing == Existing::Refuse => return Err(run.refused()),
                Some(before) => {
                    run.same_recipe(recipe, &before)?;
                    if let Some(report) = run.report()? {
                        return Ok(Opened::Finished(Box::new(report)));
                    }
                }
            },
        }
        files::remove(&run.path.join(FAILURE))?;
        Ok(Opened::Open(Box::new(run)))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the best adapter goes.
    #[must_use]
    pub fn adapter(&self) -> PathBuf {
        self.path.join("adapter")
    }

    /// Where a model that was trained from random weights goes.
    #[must_use]
    pub fn model(&self) -> PathBuf {
        self.path.join("model")
    }

    /// Where the last state goes.
    #[must_use]
    pub fn checkpoint(&self) -> PathBuf {
        self.path.join("checkpoint")
    }

    /// Gives up what is here, whatever its recipe says, for a new run. Where there is no room for its recipe the old one stays.
    fn replace(&self, yaml: &str) -> Result<()> {
        let place = self.path.join(RECIPE);
        let fresh = files::settled(&place, yaml.as_bytes())?;
        if !files::missing(&place)? {
            files::rename(&place, &self.path.join(REMOVED))?;
        }
        self.clear()?;
        fresh.place()
    }

    /// Finishes what a kill left unfinished.
    fn tidy(&self) -> Result<()> {
        ["", "checkpoint"].iter().for_each(|dir| files::sweep_all(&self.path.join(dir)));
        if self.path.join(REMOVED).exists() { self.clear() } else { Ok(()) }
    }

    /// Without its recipe a directory holds no run: renaming that is what ends the old one, all at once.
    fn clear(&self) -> Result<()> {
        for name in OURS.iter().filter(|n| **n != LOCK).chain([&REMOVED]) {
            files::remove(&self.path.join(name))?;
        }
        Ok(())
    }

    /// Writes go to a directory that is still this run's: one that was removed would be made again, with half of the files.
    ///
    /// # Errors
    /// When it was removed or replaced.
    pub fn check(&self) -> Result<()> {
        match self.lock.in_place() {
            true => Ok(()),
            false => {
                Err(Error::fault(self.path.display(), "was removed or replaced while the run wrote to it").hint("start the run again"))
            }
        }
    }

    /// No kill leaves a run without its recipe, so what is here without one is somebody's, and not to be mixed with a new run.
    fn check_empty(&self) -> Result<()> {
        match OURS.iter().find(|name| **name != LOCK && self.path.join(name).exists()) {
            None => Ok(()),
            Some(name) => Err(Error::input(self.path.display(), format!("holds `{name}`, but no {RECIPE} that says of which run"))
                .hint("pass --force to replace it, or --output DIR for another place")),
        }
    }

    fn refused(&self) -> Error {
        let finished = self.path.join(REPORT).exists();
        let what = if finished { "holds a finished run" } else { "holds an unfinished run" };
        let hint = match finished {
            true => "pass --force to replace it, or --output DIR for another place",
            false => "pass --resume to go on, --force to start anew, or --output DIR for another place",
        };
        Error::input(self.path.display(), what).hint(hint)
    }

    /// Refuses to go on with other settings.
    fn same_recipe(&self, recipe: &Recipe, before: &str) -> Result<()> {
        let place = self.path.join(RECIPE);
        match differing(&place, recipe, before)? {
            None => Ok(()),
            Some(example) => Err(Error::input(place.display(), format!("the unfinished run has another recipe{example}"))
                .hint("resume with the same recipe, or start anew with --force")),
        }
    }

    /// The report of a finished run.
    ///
    /// # Errors
    /// When the file is broken.
    pub fn report(&self) -> Result<Option<TrainReport>> {
        read_report(&self.path)
    }

    /// Drops the lines of steps that the checkpoint does not know, and opens the files for more, with `events`
    /// TensorBoard's as well.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn open_metrics(&mut self, done: usize, events: bool) -> Result<()> {
        let path = self.path.join(METRICS);
        let text = files::find_text(&path, MAX_FILE)?.unwrap_or_default();
        let kept: String = text.lines().take(done).flat_map(|l| [l, "\n"]).collect();
        if kept != text {
            files::write_atomic(&path, kept.as_bytes())?;
        }
        self.metrics = Some(Output::append(&path)?);
        // What came before the first step has step 0.
        let from = if done == 0 { 0 } else { done + 1 };
        self.events = events.then(|| Events::open(&self.path.join(EVENTS), from)).transpose()?;
        Ok(())
    }

    /// Adds a line to `metrics.jsonl`, and an event.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn log(&mut self, record: &StepRecord) -> Result<()> {
        self.check()?;
        let Some(file) = &mut self.metrics else { return Ok(()) };
        let mut line = serde_json::to_string(record).map_err(|e| Error::fault(METRICS, e))?;
        line.push('\n');
        file.put(line.as_bytes())?;
        let Some(events) = &mut self.events else { return Ok(()) };
        let all = [("train/loss", record.loss), ("train/lr", record.lr), ("train/grad_norm", record.grad_norm)];
        events.scalars(record.step, all.into_iter().filter(|(_, v)| v.is_finite()))
    }

    /// Returns when what was logged is on the disk: a checkpoint must not know of steps that `metrics.jsonl` lacks.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn sync(&self) -> Result<()> {
        self.check()?;
        self.metrics.as_ref().map_or(Ok(()), Output::sync)?;
        self.events.as_ref().map_or(Ok(()), Events::sync)
    }

    /// Notes why the run ended early, for whoever lists runs. Signals are no failure.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn note_failure(&self, error: &Error) -> Result<()> {
        match error {
            Error::Interrupted { .. } => Ok(()),
            _ if self.check().is_err() => Ok(()),
            error => files::write_atomic(&self.path.join(FAILURE), format!("{error}\n").as_bytes()),
        }
    }

    /// Adds an event for the end of an epoch.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn log_epoch(&mut self, record: &EpochRecord) -> Result<()> {
        let Some(events) = &mut self.events else { return Ok(()) };
        events.scalars(record.step, [("train/epoch_loss", record.train_loss)])?;
        record.val.as_ref().map_or(Ok(()), |val| self.log_evaluation("val", record.step, val))
    }

    /// Adds an event for a split.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn log_evaluation(&mut self, split: &str, step: usize, found: &Evaluation) -> Result<()> {
        let Some(events) = &mut self.events else { return Ok(()) };
        let tagged: Vec<(String, f64)> = std::iter::once(("loss", &found.loss))
            .chain(found.metrics.iter().map(|(n, v)| (n.as_str(), v)))
            .map(|(n, v)| (format!("{split}/{n}"), *v))
            .collect();
        events.scalars(step, tagged.iter().map(|(tag, v)| (tag.as_str(), *v)))
    }

    /// The steps so far, as `metrics.jsonl` has them.
    ///
    /// # Errors
    /// When the file is broken.
    pub fn steps(&self) -> Result<Vec<StepRecord>> {
        read_steps(&self.path)
    }

    /// Writes the predictions, the page and, as the mark of a finished run, the report.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn finish(&self, report: &TrainReport, predictions: &[Prediction], page: &str) -> Result<()> {
        self.check()?;
        write_predictions(&self.path.join(PREDICTIONS), predictions)?;
        files::write_atomic(&self.path.join(PAGE), page.as_bytes())?;
        files::write_json(&self.path.join(REPORT), report)
    }
}

/// One JSON object a line.
///
/// # Errors
/// When the disk refuses.
pub fn write_predictions(path: &Path, predictions: &[Prediction]) -> Result<()> {
    let mut text = String::new();
    for prediction in predictions {
        text.push_str(&serde_json::to_string(prediction).map_err(|e| Error::fault(path.display(), e))?);
        text.push('\n');
    }
    files::write_atomic(path, text.as_bytes())
}

/// Other people's files are never mixed with a run.
fn check_ours(path: &Path) -> Result<()> {
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => return Err(Error::write(path, e)),
        Err(e) => return Err(Error::input(path.display(), format!("cannot be a run directory: {e}"))),
    };
    let names = entries.map(|e| e.map(|e| e.file_name().to_string_lossy().into_owned())).collect::<std::io::Result<Vec<_>>>();
    let names = names.map_err(|e| Error::read(path, e))?;
    match names.into_iter().find(|n| !OURS.contains(&n.as_str()) && !n.starts_with('.')) {
        Some(name) => Err(Error::input(path.display(), format!("holds `{name}`, which is not part of a run"))
            .hint("choose another directory with --output")),
        None => Ok(()),
    }
}

/// Takes a directory for this process; the lock ends with the file, or with the process, however it ends.
///
/// # Errors
/// When another process has it.
pub(crate) fn lock(dir: &Path) -> Result<Output> {
    let path = dir.join(LOCK);
    let mut output = Output::update(&path)?;
    let fail = |e| Error::write(&path, e);
    match output.file().try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut owner = String::new();
            let _ = output.file().read_to_string(&mut owner);
            let owner = if owner.trim().is_empty() { "another process".into() } else { format!("process {}", owner.trim()) };
            return Err(
                Error::fault(dir.display(), format!("is in use by {owner}")).hint("wait for it, or choose another directory with --output")
            );
        }
        Err(TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Unsupported => {}
        Err(TryLockError::Error(e)) => return Err(fail(e)),
    }
    // A process id, for people.
    output.set_len(0)?;
    output.file().seek(SeekFrom::Start(0)).map_err(fail)?;
    output.put(std::process::id().to_string().as_bytes())?;
    Ok(output)
}
