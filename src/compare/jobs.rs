//! Runs side by side, as many as memory allows.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use super::Runner;
use crate::error::{Error, Result};
use crate::figures::{metric, words};
use crate::run;
use crate::train::{Event, Observer};

/// How often a signal is looked for.
const LOOK: Duration = Duration::from_millis(50);

/// A run to be made.
#[derive(Debug, Clone)]
pub struct Job {
    /// What it is called.
    pub name: String,
    /// Its recipe file.
    pub recipe: PathBuf,
    /// Its run directory.
    pub dir: PathBuf,
    /// Whether a run with other settings is replaced.
    pub replace: bool,
    /// Threads that it may use.
    pub threads: usize,
    /// Estimated bytes of memory.
    pub memory: u64,
}

/// How a job ended.
pub(super) type Ended = (Job, Result<()>);

/// Runs all jobs, `side_by_side` at once as long as their estimates fit into `memory`. A job that does not fit alone runs alone.
///
/// # Errors
/// When a signal came; running jobs have saved their state then.
pub(super) fn run_all(
    jobs: Vec<Job>,
    side_by_side: usize,
    memory: Option<u64>,
    runner: &dyn Runner,
    observer: &mut dyn Observer,
) -> Result<Vec<Ended>> {
    let signal = AtomicI32::new(0);
    let mut waiting: VecDeque<Job> = jobs.into();
    let (mut running, mut used) = (0usize, 0u64);
    let mut ended = Vec::new();
    std::thread::scope(|scope| {
        let (sender, receiver) = channel::<Ended>();
        loop {
            while running < side_by_side.max(1) && signal.load(Ordering::Relaxed) == 0 {
                let fits = |j: &Job| running == 0 || memory.is_none_or(|m| used + j.memory <= m);
                let Some(at) = waiting.iter().position(fits) else { break };
                let Some(job) = waiting.remove(at) else { break };
                (running, used) = (running + 1, used + job.memory);
                let (own, signal) = (sender.clone(), &signal);
                let lost = job.clone();
                let run = move || {
                    let done = runner.train(&job, &|| Some(signal.load(Ordering::Relaxed)).filter(|s| *s != 0));
                    let _ = own.send((job, done));
                };
                if let Err(e) = std::thread::Builder::new().spawn_scoped(scope, run) {
                    let error = Error::fault("a thread for a run", e).hint("use fewer --jobs, or raise the limit (ulimit -u)");
                    let _ = sender.send((lost, Err(error)));
                }
            }
            if running == 0 {
                break;
            }
            match receiver.recv_timeout(LOOK) {
                Ok((job, done)) => {
                    (running, used) = (running - 1, used - job.memory);
                    told(&job, &done, observer);
                    ended.push((job, done));
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            if let Some(number) = observer.stop() {
                signal.store(number, Ordering::Relaxed);
            }
        }
    });
    match signal.load(Ordering::Relaxed) {
        0 => Ok(ended),
        signal => {
            let done = ended.iter().filter(|(_, r)| r.is_ok()).count();
            let left = waiting.len() + ended.len() - done;
            Err(Error::Interrupted { message: format!("stopped with {left} runs to go; the same command goes on with them"), signal })
        }
    }
}

fn told(job: &Job, done: &Result<()>, observer: &mut dyn Observer) {
    observer.event(Event::Advance(1));
    match done {
        Ok(()) => observer.event(Event::Note(format!("{} is done{}", job.name, figures(job)))),
        Err(Error::Interrupted { .. }) => {}
        Err(e) => observer.event(Event::Warning(format!("{} failed: {e}", job.name))),
    }
}

/// `: test accuracy 47.2 %, 21 s`.
fn figures(job: &Job) -> String {
    let report = run::read_report(&job.dir).ok().flatten();
    let text = report.and_then(|r| {
        let value = r.after.as_ref()?.metric(&r.metric)?;
        Some(format!(": {} {} {}, {:.0} s", r.split, words(&r.metric), metric(&r.metric, value), r.seconds))
    });
    text.unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::compare::{BaseMeasured, Checked, Measured, Second};
    use crate::recipe::Recipe;
    use crate::train::Silent;

    /// Notes how many run at once; jobs named `bad` fail.
    #[derive(Default)]
    struct Counted {
        now: AtomicUsize,
        most: AtomicUsize,
        order: Mutex<Vec<String>>,
    }

    impl Runner for Counted {
        fn check(&self, _: &std::path::Path) -> Result<Checked> {
            Ok(Checked { bytes: 0 })
        }

        fn pace(&self, _: &std::path::Path) -> Result<f64> {
            Ok(1.0)
        }

        fn train(&self, job: &Job, _: &dyn Fn() -> Option<i32>) -> Result<()> {
            let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
            self.most.fetch_max(now, Ordering::SeqCst);
            self.order.lock().unwrap().push(job.name.clone());
            std::thread::yield_now();
            self.now.fetch_sub(1, Ordering::SeqCst);
            if job.name == "bad" { Err(Error::fault("disk", "full")) } else { Ok(()) }
        }

        fn base(&self, _: &Recipe, _: &Second) -> Result<BaseMeasured> {
            Err(Error::fault("", ""))
        }

        fn measure(&self, _: &std::path::Path, _: &Second) -> Result<Measured> {
            Err(Error::fault("", ""))
        }

        fn pictures(&self, _: &Recipe, _: &[String]) -> Result<Vec<String>> {
            Ok(Vec::new())
        }
    }

    fn job(name: &str, memory: u64) -> Job {
        Job { name: name.into(), recipe: PathBuf::new(), dir: PathBuf::new(), replace: false, threads: 1, memory }
    }

    #[test]
    fn jobs_share_the_memory_and_one_failure_stops_no_other() {
        let runner = Counted::default();
        let jobs = vec![job("large", 80), job("larger", 90), job("bad", 30), job("too large", 900), job("small", 10)];
        let ended = run_all(jobs, 4, Some(100), &runner, &mut Silent).unwrap();
        assert_eq!(ended.len(), 5);
        assert_eq!(ended.iter().filter(|(_, r)| r.is_err()).count(), 1);
        assert!(runner.most.load(Ordering::SeqCst) <= 2, "80 + 10 or 30 + 10 fit, no three do");
    }

    struct Stops;

    impl Observer for Stops {
        fn event(&mut self, _: Event<'_>) {}

        fn stop(&self) -> Option<i32> {
            Some(2)
        }
    }

    #[test]
    fn a_signal_starts_nothing_more() {
        let runner = Counted::default();
        let error = run_all((0..9).map(|i| job(&i.to_string(), 1)).collect(), 1, None, &runner, &mut Stops).unwrap_err();
        assert_eq!(error.exit_code(), 130);
        assert!(runner.order.lock().unwrap().len() < 9);
    }
}
