//! A training run, from an empty directory or a checkpoint to its report.

use std::path::Path;

use candle_core::Device;

use super::Session;
use crate::data::Split;
use crate::delta::{self, Adapters};
use crate::error::{Error, Result};
use crate::merge;
use crate::recipe::{ModelConfig, Recipe};
use crate::report::{Evaluation, TrainReport, peak_rss_mib};
use crate::run::{Existing, Opened, RunDir};
use crate::task::cut_texts;
use crate::train::{Event, Micro, Observer, Run, Trainer, check_finite};

/// Passes events on and writes steps and epochs to `metrics.jsonl` and for TensorBoard.
struct Logged<'a> {
    inner: &'a mut dyn Observer,
    run: RunDir,
    failed: Option<Error>,
}

impl Observer for Logged<'_> {
    fn event(&mut self, event: Event<'_>) {
        let logged = match &event {
            Event::Step(record) => self.run.log(record),
            Event::Epoch(record) => self.run.log_epoch(record),
            _ => Ok(()),
        };
        if let Err(e) = logged {
            self.failed.get_or_insert(e);
        }
        self.inner.event(event);
    }

    fn failed(&mut self) -> Result<()> {
        self.failed.take().map_or(Ok(()), Err)
    }

    fn saving(&mut self) -> Result<()> {
        self.run.sync()
    }

    fn stop(&self) -> Option<i32> {
        self.inner.stop()
    }
}

/// `peft train`: the whole run. Returns the report and whether the run was finished before.
///
/// # Errors
/// When the recipe does not fit, a step fails, the disk refuses, or a signal came.
pub fn train(recipe: Recipe, existing: Existing, device: &Device, observer: &mut dyn Observer) -> Result<(TrainReport, bool)> {
    // What can be wrong with the recipe comes before anything is written.
    let session = Session::to_train(recipe, device, observer)?;
    let (mut adapters, task) = session.plan()?;
    tell(&adapters, observer);
    session.discard_replaced(&adapters)?;
    let micro = session.fitting(&mut adapters, &*task, observer)?;
    let mut trainer = session.trainer(&mut adapters, task)?;
    trainer.micro = micro;
    trainer.adapters.check_steps(trainer.total_steps())?;
    let mut roster = session.roster()?;
    session.warn_of_init(&mut roster, observer)?;
    let run = match RunDir::open(&session.recipe, existing)? {
        Opened::Finished(report) => {
            session.check_same(&RunDir::place(&session.recipe), &roster, Some(&report.made_of))?;
            return Ok((*report, true));
        }
        Opened::Open(run) => run,
    };
    let known = session.check_same(run.path(), &roster, None)?;
    if !known {
        roster.save(run.path())?;
    }
    let mut state = trainer.begin()?;
    if micro != Micro::of(&session.recipe.train) {
        state.set_micro(micro);
    }
    if existing == Existing::Resume {
        trainer.resume(&mut state, &run.checkpoint())?;
        if !known && state.state().step > 0 {
            observer.event(Event::Note("the run does not say what data and base it was begun with, so they cannot be compared".into()));
        }
        if trainer.micro != micro {
            observer.event(Event::Note(format!("the run goes on with {}, as it began", trainer.micro)));
        }
    }
    state.set_made_of(run.path(), roster.made_of)?;
    let mut logged = Logged { inner: observer, run: *run, failed: None };
    logged.run.open_metrics(state.state().step, session.recipe.train.tensorboard)?;
    let done = session.execute(&mut trainer, &mut state, &mut logged);
    if let Err(e) = &done {
        // The disk may be what failed; the error itself is the one to report.
        let _ = logged.run.note_failure(e);
    }
    Ok((done?, false))
}

impl Session {
    fn execute(&self, trainer: &mut Trainer<'_>, run: &mut Run, logged: &mut Logged<'_>) -> Result<TrainReport> {
        let split = self.reported();
        if run.state().before.is_none() {
            trainer.calibrate(logged)?;
            logged.event(Event::Phase("before", Some(self.data.split(split).len())));
            let before = trainer.evaluate_unless_stopped(split, logged)?;
            check_finite("evaluation before training", &before)?;
            logged.run.log_evaluation(&split.to_string(), run.state().step, &before)?;
            run.set_before(before);
        }
        if let Some(before) = &run.state().before {
            logged.event(Event::Before(before));
        }
        logged.event(Event::Started {
            steps: trainer.total_steps(),
            done: run.state().step,
            trainable: trainer.adapters.params.count(),
            total: self.total_parameters(trainer.adapters),
        });
        let checkpoint = logged.run.checkpoint();
        if let Err(error) = trainer.train(run, Some(&checkpoint), logged) {
            self.keep_best(trainer, run, logged)?;
            return Err(error);
        }
        if run.state().health.numbers.skipped_steps > 0 {
            let count = run.state().health.numbers.skipped_steps;
            logged.event(Event::Warning(format!("{count} steps were left out, since their loss or gradients were not finite")));
        }
        logged.run.check()?;
        logged.event(Event::Phase("after", Some(self.data.split(split).len())));
        let after = trainer.evaluate_unless_stopped(split, logged)?;
        check_finite("evaluation after training", &after)?;
        logged.run.log_evaluation(&split.to_string(), run.state().step, &after)?;
        let definition = self.recipe.task.definition();
        let cut = cut_texts(definition, &self.base.tokenizer, &self.data)?;
        if cut > 0 {
            let prompts = !definition.texts(&self.data.classes, &[]).0.is_empty();
            let what = if prompts { "class prompts" } else { "texts" };
            logged.event(Event::Warning(format!("{cut} {what} are longer than the model's context and were cut")));
        }
        let (changes, unfoldable) = self.changed(trainer, logged)?;
        logged.run.check()?;
        let bytes = delta::save(
            &logged.run.adapter(),
            trainer.adapters,
            &self.sites(),
            &self.manifest(&*trainer.task, &after, &run.state().made_of)?,
        )?;
        if matches!(self.recipe.model, ModelConfig::Scratch(_)) {
            merge::write_trained(&self.base, std::mem::take(&mut trainer.adapters.view), &logged.run.model())?;
        }
        let report = self.report(trainer, run, split, after, bytes, logged.run.path());
        let predictions = report.after.as_ref().map_or(&[][..], |e| &e.predictions);
        let page = self.page(&report, &logged.run, split, &trainer.task.scalars(), &changes, &unfoldable)?;
        logged.run.finish(&report, predictions, &page)?;
        Ok(report)
    }

    /// Numbers have ended the run: its best epoch so far becomes the adapter, which can be evaluated and started from.
    fn keep_best(&self, trainer: &mut Trainer<'_>, run: &mut Run, logged: &mut Logged<'_>) -> Result<()> {
        if !run.is_lost() {
            return Ok(());
        }
        let Some(best) = trainer.keep_best(run)? else { return Ok(()) };
        logged.run.check()?;
        let dir = logged.run.adapter();
        delta::save(&dir, trainer.adapters, &self.sites(), &self.manifest(&*trainer.task, &best, &run.state().made_of)?)?;
        let epoch = run.state().best.as_ref().map_or(0, |b| b.epoch);
        logged.event(Event::Note(format!("the best epoch so far, {epoch}, is kept in {}", dir.display())));
        Ok(())
    }

    fn report(&self, trainer: &Trainer<'_>, run: &Run, split: Split, after: Evaluation, bytes: u64, path: &Path) -> TrainReport {
        let state = run.state();
        TrainReport {
            version: env!("CARGO_PKG_VERSION").into(),
            recipe: self.recipe.name.clone(),
            method: trainer.adapters.label(),
            task: self.recipe.task.name().into(),
            base: self.recipe.model.spec().into(),
            base_digest: self.base.digest.clone(),
            made_of: state.made_of.clone(),
            classes: self.classes(&*trainer.task),
            metric: trainer.metric.clone(),
            split: split.to_string(),
            before: state.before.clone(),
            after: Some(after),
            epochs: state.epochs.clone(),
            best_epoch: state.best.as_ref().map(|b| b.epoch),
            steps: state.step,
            stopped_early: state.stopped_early,
            trainable_parameters: trainer.adapters.params.count(),
            total_parameters: self.total_parameters(trainer.adapters),
            adapter_bytes: bytes,
            seconds: run.seconds(),
            step_seconds: state.step_seconds,
            images: state.images,
            peak_rss_mib: peak_rss_mib(),
            examples: [Split::Train, Split::Val, Split::Test].map(|s| self.data.count(s)),
            skipped_images: self.data.skipped + state.skipped,
            numbers: state.health.numbers,
            micro: state.micro.map(|m| [m.batch, m.accumulate]),
            device: crate::device::name(self.base.clip.device()),
            run: path.to_path_buf(),
        }
    }
}

/// What planning had to tell.
pub(super) fn tell(adapters: &Adapters, observer: &mut dyn Observer) {
    adapters.params.notes().iter().for_each(|note| observer.event(Event::Note(note.clone())));
}
