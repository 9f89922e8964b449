//! Faults on purpose, in test builds only: the process ends, or a change fails, at the k-th change of the file system.
//!
//! A test starts its own binary again, see the module `faults`, and tells the copy by `PEFT_FAULT` what is to go wrong:
//! `count` nothing, `abort K` an end without goodbye, `fail ERRNO K` an error at one change, `fail ERRNO K on` at this one and all
//! that follow, `gone K PATH` a path that is removed after step K, `signal K N TIMES` a signal N to itself
//! after step K, `time STEP SYNC` steps and syncs that last so many seconds.

#![allow(clippy::unwrap_used)]

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use super::disk::Op;

/// What goes wrong.
#[derive(Debug)]
enum Plan {
    Count,
    Abort(usize),
    Fail { error: i32, at: usize, on: bool },
    Gone(usize, PathBuf),
    Signal(usize, i32, usize),
    Time { step: u64, sync: u64 },
}

static PLAN: OnceLock<Plan> = OnceLock::new();
static POINTS: AtomicUsize = AtomicUsize::new(0);
static STEPS: AtomicUsize = AtomicUsize::new(0);
static SECONDS: AtomicU64 = AtomicU64::new(0);
static LOG: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Reads `PEFT_FAULT`.
pub(crate) fn arm(text: &str) {
    let words: Vec<&str> = text.split_whitespace().collect();
    let number = |i: usize| words[i].parse::<usize>().unwrap();
    let plan = match words[0] {
        "count" => Plan::Count,
        "abort" => Plan::Abort(number(1)),
        "fail" => Plan::Fail { error: number(1) as i32, at: number(2), on: words.len() > 3 },
        "gone" => Plan::Gone(number(1), words[2].into()),
        "signal" => Plan::Signal(number(1), number(2) as i32, number(3)),
        "time" => Plan::Time { step: number(1) as u64, sync: number(2) as u64 },
        other => panic!("{other}"),
    };
    PLAN.set(plan).unwrap();
}

/// The changes so far, for messages of tests.
pub(crate) fn log() -> Vec<String> {
    LOG.lock().unwrap().clone()
}

/// A change is about to be made.
pub(super) fn point(op: Op, path: &Path) -> io::Result<()> {
    let Some(plan) = PLAN.get() else { return Ok(()) };
    let now = POINTS.fetch_add(1, Ordering::SeqCst) + 1;
    match plan {
        Plan::Count => LOG.lock().unwrap().push(format!("{op:?} {}", path.display())),
        Plan::Abort(at) if now == *at => std::process::abort(),
        // Room is never wanting for a removal.
        Plan::Fail { error, at, on } if op != Op::Remove && (now == *at || *on && now > *at) => {
            return Err(io::Error::from_raw_os_error(*error));
        }
        Plan::Time { sync, .. } if op == Op::Sync => _ = SECONDS.fetch_add(*sync, Ordering::SeqCst),
        _ => {}
    }
    if matches!(plan, Plan::Time { .. }) {
        LOG.lock().unwrap().push(format!("{op:?} {}", path.display()));
    }
    Ok(())
}

/// Whether the next write goes wrong: half of it is written before.
pub(super) fn tears() -> bool {
    let next = POINTS.load(Ordering::SeqCst) + 1;
    match PLAN.get() {
        Some(Plan::Abort(at) | Plan::Fail { at, on: false, .. }) => next == *at,
        Some(Plan::Fail { at, on: true, .. }) => next >= *at,
        _ => false,
    }
}

/// A training step is done.
pub(super) fn stepped() {
    let step = STEPS.fetch_add(1, Ordering::SeqCst) + 1;
    match PLAN.get() {
        Some(Plan::Gone(at, path)) if step == *at => std::fs::remove_dir_all(path).unwrap(),
        Some(Plan::Signal(at, number, times)) if step == *at => {
            (0..*times).for_each(|_| signal_hook::low_level::raise(*number).unwrap());
        }
        Some(Plan::Time { step, .. }) => _ = SECONDS.fetch_add(*step, Ordering::SeqCst),
        // Between two steps as well.
        Some(_) => _ = point(Op::Remove, Path::new("(step)")),
        None => {}
    }
}

/// The time; where a test plans it, it passes only by what steps and syncs take.
pub(super) fn now() -> Instant {
    static START: OnceLock<Instant> = OnceLock::new();
    match PLAN.get() {
        Some(Plan::Time { .. }) => *START.get_or_init(Instant::now) + Duration::from_secs(SECONDS.load(Ordering::SeqCst)),
        _ => Instant::now(),
    }
}
