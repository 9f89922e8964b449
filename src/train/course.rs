//! The course of a run: step after step, epoch after epoch, and which of them is kept.

use std::path::Path;
use std::time::Instant;

use super::observer::{Event, Observer, StepRecord};
use super::pace::Pace;
use super::{Best, Micro, Run, Stepper, TrainConfig, Trainer, assign, check_finite, snapshot};
use crate::data::Split;
use crate::error::{Error, Result};
use crate::files;
use crate::report::{self, EpochRecord, Evaluation};

/// Images that were left out are named up to this number.
const SHOWN: usize = 20;

impl Trainer<'_> {
    pub(super) fn steps(&mut self, run: &mut Run, total: usize, checkpoints: Option<&Path>, observer: &mut dyn Observer) -> Result<()> {
        let mut stepper = Stepper::new(self, run.state.step, total, observer)?;
        let mut pace = Pace::new(files::now());
        while run.state.step < total && !run.state.stopped_early {
            let start = Instant::now();
            let Some(record) = self.step_that_fits(&mut stepper, run, observer)? else {
                stepper = Stepper::new(self, run.state.step, total, observer)?;
                continue;
            };
            run.state.step_seconds += start.elapsed().as_secs_f64();
            run.state.images += record.images;
            tell(&mut stepper, run, observer);
            observer.event(Event::Step(&record));
            files::stepped();
            let epoch_done = run.state.step.is_multiple_of(stepper.steps_per_epoch()) || run.state.step == total;
            if epoch_done {
                self.end_epoch(run, record.epoch, record.epoch % self.config.evaluate_every == 0 || run.state.step == total, observer)?;
            }
            observer.failed()?;
            let stop = observer.stop();
            let wished = stop.is_some() || self.config.checkpoint_steps.is_some_and(|n| run.state.step.is_multiple_of(n));
            let from = files::now();
            if let Some(dir) = checkpoints.filter(|_| wished || pace.due(epoch_done, from)) {
                observer.saving()?;
                self.save(run, dir)?;
                pace.wrote(from, files::now());
            }
            if let Some(signal) = stop.filter(|_| run.state.step < total) {
                return Err(interrupted(run, total, signal, checkpoints.is_some()));
            }
        }
        Ok(())
    }

    /// One step; `None` where the device's memory did not suffice and a smaller micro-batch is to be tried.
    fn step_that_fits(&mut self, stepper: &mut Stepper, run: &mut Run, observer: &mut dyn Observer) -> Result<Option<StepRecord>> {
        let error = match stepper.step(self, run) {
            Ok(record) => return Ok(Some(record)),
            Err(error) => error,
        };
        if !error.is_out_of_memory() || !stepper.untouched() {
            return Err(error);
        }
        let smaller = if self.config.auto_batch { self.micro.split() } else { None };
        let Some(smaller) = smaller else { return Err(no_memory(self.config, self.micro, &error)) };
        observer.event(Event::Warning(format!(
            "step {}: the device is out of memory with {}; now {smaller}",
            run.state.step + 1,
            self.micro
        )));
        self.micro = smaller;
        run.state.micro = Some(smaller);
        Ok(None)
    }

    fn end_epoch(&mut self, run: &mut Run, epoch: usize, validate: bool, observer: &mut dyn Observer) -> Result<()> {
        let (sum, count) = std::mem::take(&mut run.state.epoch_loss);
        let mut record = EpochRecord { epoch, step: run.state.step, train_loss: sum / count as f64, val: None };
        if validate && !self.data.val.is_empty() {
            if let Some(ema) = &mut run.ema {
                ema.swap_in(&self.adapters.params)?;
            }
            let mut val = self.evaluate(Split::Val, observer)?;
            run.lost = !val.loss.is_finite();
            check_finite(&format!("validation after epoch {epoch}"), &val)?;
            self.judge(run, epoch, &val, observer)?;
            if let Some(ema) = &mut run.ema {
                ema.swap_out(&self.adapters.params)?;
            }
            // The history keeps numbers only.
            (val.predictions, val.classification) = (Vec::new(), None);
            record.val = Some(val);
        }
        observer.event(Event::Epoch(&record));
        run.state.epochs.push(record);
        Ok(())
    }

    /// The number that chooses the best epoch has to be defined on validation. Where the recipe names none, the loss takes the place of
    /// the task's own.
    pub(super) fn choose_metric(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let val = &self.data.val;
        if val.is_empty() || !self.task.undefined(val).contains(&self.metric.as_str()) {
            return Ok(());
        }
        let why = format!("`{}` is undefined on the {} validation examples, which are all of one kind", self.metric, val.len());
        if self.config.early_stopping.as_ref().is_some_and(|e| e.metric.is_some()) {
            return Err(
                Error::input("train.early_stopping.metric", why).hint("name another, such as loss, or give validation other examples")
            );
        }
        observer.event(Event::Note(format!("{why}; the best epoch is the one with the lowest loss")));
        self.metric = "loss".into();
        Ok(())
    }

    /// Keeps the best epoch: higher metric (lower for losses and errors), then lower loss, then the earlier one. One on which the metric
    /// is undefined is never the best: all predictions may have been the same.
    fn judge(&self, run: &mut Run, epoch: usize, val: &Evaluation, observer: &mut dyn Observer) -> Result<()> {
        let Some(metric) = val.metric(&self.metric) else {
            observer.event(Event::Note(format!("epoch {epoch}: `{}` is undefined, so that this epoch is not the best", self.metric)));
            self.go_without(run);
            return Ok(());
        };
        let sign = if report::lower_is_better(&self.metric) { -1.0 } else { 1.0 };
        let better = run.state.best.as_ref().is_none_or(|b| {
            let (new, old) = (sign * metric, sign * b.metric);
            new > old || (new == old && val.loss < b.loss)
        });
        if better {
            run.state.best = Some(Best { epoch, metric, loss: val.loss });
            run.best = Some(snapshot(&self.adapters.params)?);
            run.state.without_improvement = 0;
        } else {
            self.go_without(run);
        }
        Ok(())
    }

    /// A validation without improvement.
    fn go_without(&self, run: &mut Run) {
        run.state.without_improvement += 1;
        let patience = self.config.early_stopping.as_ref().map_or(0, |e| e.patience);
        run.state.stopped_early = patience > 0 && run.state.without_improvement >= patience;
    }

    /// After numbers have ended a run: puts the parameters of the best epoch so far in place and says what it reached on
    /// validation, if there is one.
    ///
    /// # Errors
    /// When parameters cannot be set.
    pub fn keep_best(&mut self, run: &mut Run) -> Result<Option<Evaluation>> {
        let found = run.state.best.as_ref().and_then(|b| run.state.epochs.iter().find(|e| e.epoch == b.epoch)?.val.clone());
        if found.is_some() {
            self.finish(run)?;
        }
        Ok(found)
    }

    /// The parameters of the best epoch; the last ones (their average) where nothing was validated.
    pub(super) fn finish(&mut self, run: &mut Run) -> Result<()> {
        match (&run.best, &mut run.ema) {
            (Some(best), _) => assign(&self.adapters.params, best),
            (None, Some(ema)) => ema.swap_in(&self.adapters.params),
            (None, None) => Ok(()),
        }
    }
}

/// Passes on what the last step had to say.
fn tell(stepper: &mut Stepper, run: &mut Run, observer: &mut dyn Observer) {
    for reason in stepper.take_skipped() {
        run.state.skipped += 1;
        if run.state.skipped <= SHOWN {
            observer.event(Event::Note(format!("left out: {}", reason.replace('\n', " "))));
        }
    }
    stepper.take_warnings().into_iter().for_each(|warning| observer.event(Event::Warning(warning)));
}

fn no_memory(config: &TrainConfig, micro: Micro, error: &Error) -> Error {
    let hint = match (config.auto_batch, micro.batch) {
        (_, 1) => "use `train.checkpointing: true`, or a smaller model",
        (true, _) | (false, _) if config.checkpointing => "lower train.batch, or let `train.auto_batch: true` find one",
        _ => "lower train.batch, let `train.auto_batch: true` find one, or use `train.checkpointing: true`",
    };
    Error::fault("train.batch", format!("the device is out of memory with {micro}: {error}")).hint(hint)
}

fn interrupted(run: &Run, total: usize, signal: i32, saved: bool) -> Error {
    let what = if saved { "the state is saved; go on with --resume" } else { "nothing was saved" };
    Error::Interrupted { message: format!("stopped after step {} of {total}; {what}", run.state.step), signal }
}
