//! Progress on stderr: a bar on a terminal, plain lines elsewhere; signals.

use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::report::Evaluation;
use crate::train::{Event, Observer, StepRecord};

/// Seconds between plain lines.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// Shows a run and listens to Ctrl-C.
pub(super) struct Progress {
    quiet: bool,
    terminal: bool,
    bar: ProgressBar,
    signal: Arc<AtomicUsize>,
    last: Option<Instant>,
    images: usize,
    since: Instant,
    total: usize,
}

impl Progress {
    pub(super) fn new(quiet: bool) -> Self {
        Self {
            quiet,
            terminal: !quiet && console_is_terminal(),
            bar: ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden()),
            signal: Arc::new(AtomicUsize::new(0)),
            last: None,
            images: 0,
            since: Instant::now(),
            total: 0,
        }
    }

    /// From now on SIGINT and SIGTERM ask for a stop; a second one ends at once.
    pub(super) fn listen(&self) {
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            let seen = Arc::new(std::sync::atomic::AtomicBool::new(false));
            let _ = signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, seen.clone());
            let _ = signal_hook::flag::register(signal, seen);
            let _ = signal_hook::flag::register_usize(signal, self.signal.clone(), signal as usize);
        }
    }

    /// The end of stdin asks for a stop as SIGTERM does.
    pub(super) fn listen_to_stdin(&self) {
        let signal = self.signal.clone();
        let listen = move || {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            signal.store(signal_hook::consts::SIGTERM as usize, Ordering::Relaxed);
        };
        // Without a thread it is not heard; signals are.
        let _ = std::thread::Builder::new().spawn(listen);
    }

    pub(super) fn say(&self, text: &str) {
        if !self.quiet {
            // Whoever closed stderr, or filled its disk, still wants the run.
            let _ = self.bar.suspend(|| writeln!(std::io::stderr(), "{}", super::plain(text)));
        }
    }

    /// Takes the bar away.
    pub(super) fn clear(&self) {
        self.bar.finish_and_clear();
    }

    fn start(&mut self, total: usize, done: usize, template: &str) {
        self.bar.finish_and_clear();
        if !self.terminal {
            return;
        }
        let bar = ProgressBar::new(total as u64).with_style(style(template)).with_position(done as u64);
        self.bar = bar.with_elapsed(Duration::ZERO);
    }

    fn step(&mut self, record: &StepRecord) {
        self.images += record.images;
        let speed = self.images as f64 / self.since.elapsed().as_secs_f64().max(1e-9);
        self.bar.set_position(record.step as u64);
        self.bar.set_message(format!("loss {:.4}  {speed:.0} images/s", record.loss));
        let due = self.last.is_none_or(|l| l.elapsed() >= PLAIN_INTERVAL) || record.step == self.total;
        if !self.terminal && due {
            self.last = Some(Instant::now());
            let left = (self.total - record.step) as f64 * self.since.elapsed().as_secs_f64() / record.step.max(1) as f64;
            self.say(&format!(
                "step {}/{}  epoch {}  loss {:.4}  lr {:.2e}  {speed:.0} images/s  {} left",
                record.step,
                self.total,
                record.epoch,
                record.loss,
                record.lr,
                duration(left)
            ));
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn console_is_terminal() -> bool {
    std::io::IsTerminal::is_terminal(&std::io::stderr())
}

/// `1h 02m`, `3m 20s`, `12s`.
pub(super) fn duration(seconds: f64) -> String {
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m {:02}s", s / 60, s % 60),
        _ => format!("{}h {:02}m", s / 3600, s % 3600 / 60),
    }
}

/// The metrics in one line.
pub(super) fn summary(e: &Evaluation) -> String {
    let mut parts = vec![format!("loss {:.4}", e.loss)];
    parts.extend(e.metrics.iter().map(|(name, value)| format!("{name} {value:.4}")));
    parts.join("  ")
}

impl Observer for Progress {
    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Note(text) => self.say(&format!("note: {text}")),
            Event::Warning(text) => self.say(&format!("warning: {text}")),
            Event::Phase(name, total) => self.start(total.unwrap_or(0), 0, &format!("{name} {{wide_bar}} {{pos}}/{{len}}")),
            Event::Advance(count) => self.bar.inc(count as u64),
            Event::Before(e) => self.say(&format!("before: {}", summary(e))),
            Event::Started { steps, done, trainable, total } => {
                self.say(&format!(
                    "training {trainable} of {total} parameters ({:.2} %), {steps} steps",
                    100.0 * trainable as f64 / total.max(1) as f64
                ));
                if done > 0 {
                    self.say(&format!("resuming after step {done}"));
                }
                (self.total, self.since, self.images) = (steps, Instant::now(), 0);
                self.start(steps, done, "{wide_bar} {pos}/{len}  {msg}  {eta} left");
            }
            Event::Step(record) => self.step(record),
            Event::Epoch(record) => {
                let val = record.val.as_ref().map(|v| format!("  val {}", summary(v))).unwrap_or_default();
                if !self.quiet && (self.terminal || !val.is_empty()) {
                    self.say(&format!("epoch {}  train loss {:.4}{val}", record.epoch, record.train_loss));
                }
            }
        }
    }

    fn stop(&self) -> Option<i32> {
        match self.signal.load(Ordering::Relaxed) {
            0 => None,
            n => i32::try_from(n).ok(),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
