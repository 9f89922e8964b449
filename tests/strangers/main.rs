//! Files from strangers: each is read, or refused with its place and the reason; nothing panics, hangs or takes more memory than
//! what is stated for its kind. Cases are made by rules (each field × each perturbation), one module a kind.
//!
//! Each kind runs in a process of its own, so that a crash is one kind's failure and peak memory is its own.
//! `cargo nextest run --test strangers --no-capture` prints the table of README.
#![allow(clippy::unwrap_used)]

mod adapters;
mod bases;
mod checkpoints;
#[path = "../common/mod.rs"]
mod common;
mod images;
mod labels;
mod parquets;
mod recipes;
mod tables;
mod tars;
mod tokenizers;

use std::io::Write;
use std::path::Path;

use peft::Result;

/// What becomes of a file.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Expect {
    /// It is bad input, and the message says this.
    Refused(&'static str),
    /// Nothing is wrong with it.
    Fine,
    /// Either; what counts is that it ends, and how.
    Either,
}

/// Reads what was written.
type Read = Box<dyn FnOnce() -> Result<()>>;

struct Case {
    name: String,
    expect: Expect,
    /// Writes the file into an empty directory.
    make: Box<dyn FnOnce(&Path) -> Read>,
}

impl Case {
    fn new(name: impl Into<String>, expect: Expect, make: impl FnOnce(&Path) -> Read + 'static) -> Self {
        Self { name: name.into(), expect, make: Box::new(make) }
    }
}

/// A kind of file: its cases, and the MiB that reading one of them may take beside what the process has already.
struct Kind {
    name: &'static str,
    cases: fn() -> Vec<Case>,
    bound: u64,
}

const KINDS: &[Kind] = &[
    Kind { name: "safetensors", cases: checkpoints::safetensors, bound: 64 },
    Kind { name: "pickles and zips", cases: checkpoints::pickles, bound: 128 },
    Kind { name: "adapters", cases: adapters::cases, bound: 128 },
    Kind { name: "config and preprocessor", cases: bases::cases, bound: 64 },
    Kind { name: "tokenisers", cases: tokenizers::cases, bound: 64 },
    Kind { name: "images", cases: images::cases, bound: 128 },
    Kind { name: "recipes", cases: recipes::cases, bound: 64 },
    Kind { name: "tables", cases: tables::cases, bound: 128 },
    Kind { name: "annotations", cases: tables::annotations, bound: 128 },
    Kind { name: "tars", cases: tars::cases, bound: 128 },
    Kind { name: "Parquet", cases: parquets::cases, bound: 128 },
    Kind { name: "labels", cases: labels::cases, bound: 16 },
];

/// Names the kind that this process runs.
const CHILD: &str = "PEFT_STRANGERS";

#[test]
fn there_are_enough_cases() {
    let counts: Vec<usize> = KINDS.iter().map(|k| (k.cases)().len()).collect();
    assert!(counts.iter().sum::<usize>() >= 300, "{counts:?}");
}

macro_rules! kinds {
    ($($test:ident: $index:literal,)*) => { $(#[test] fn $test() { run(&KINDS[$index]); })* };
}

kinds! {
    safetensors: 0, pickles_and_zips: 1, adapters_of_others: 2, configs: 3, tokenisers: 4, pictures: 5, yaml: 6, csv_and_jsonl: 7,
    coco_and_vqa: 8, tar_members: 9, parquet: 10, class_names: 11,
}

/// Runs a kind in a process of its own.
fn run(kind: &Kind) {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture", "--test-threads=1"])
        .env(CHILD, kind.name)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let last = text.lines().rfind(|l| l.starts_with("case ")).unwrap_or("no case").to_string();
    let tail: Vec<&str> = text.lines().filter(|l| !l.starts_with("case ")).collect();
    assert!(output.status.success(), "{}: {} at {last}\n{}", kind.name, output.status, tail[tail.len().saturating_sub(60)..].join("\n"));
    let row = text.lines().find(|l| l.starts_with('|')).expect("a row of the table");
    println!("{row}");
}

#[test]
fn child() {
    let Ok(name) = std::env::var(CHILD) else { return };
    peft::guard::hush();
    // Whatever asks for more is stopped before the machine is.
    #[cfg(unix)]
    rlimit::setrlimit(rlimit::Resource::AS, 4 << 30, 4 << 30).unwrap();
    let kind = KINDS.iter().find(|k| k.name == name).unwrap();
    let cases = (kind.cases)();
    let (mut refused, mut wrong, mut peak, tried) = (0, Vec::new(), 0, cases.len());
    for case in cases {
        println!("case {}", case.name);
        std::io::stdout().flush().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let read = (case.make)(dir.path());
        let (outcome, memory) = measured(read);
        peak = peak.max(memory);
        if memory > kind.bound {
            wrong.push(format!("{}: took {memory} MiB, expected at most {}", case.name, kind.bound));
        }
        refused += usize::from(outcome.is_err());
        wrong.extend(judge(&case.name, case.expect, outcome));
    }
    assert!(wrong.is_empty(), "{} of {tried}:\n{}", wrong.len(), wrong.join("\n"));
    println!("| {name} | {tried} | {refused} | {} | {peak} | {} |", tried - refused, kind.bound);
}

/// What is wrong with an outcome.
fn judge(name: &str, expect: Expect, outcome: Result<()>) -> Option<String> {
    match (expect, outcome) {
        (Expect::Refused(part), Ok(())) => Some(format!("{name}: was read, expected a refusal that says `{part}`")),
        (Expect::Fine, Err(e)) => Some(format!("{name}: expected to be read: {e}")),
        (_, Ok(())) => None,
        (_, Err(e)) if e.exit_code() != 2 => Some(format!("{name}: exit code {}: {e}", e.exit_code())),
        (_, Err(peft::Error::Input(p))) if p.place.is_empty() && !p.message.contains(':') => {
            Some(format!("{name}: no place: {}", p.message))
        }
        (Expect::Refused(part), Err(e)) if !e.to_string().contains(part) => Some(format!("{name}: expected `{part}`: {e}")),
        _ => None,
    }
}

/// Runs `read`; the MiB by which the process grew at most, where the system tells.
fn measured(read: Read) -> (Result<()>, u64) {
    // Starts the record of the largest size anew (Linux).
    let counts = std::fs::write("/proc/self/clear_refs", "5").is_ok();
    let before = status("VmRSS");
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(read));
    let peak = if counts { status("VmHWM").saturating_sub(before) >> 10 } else { 0 };
    let outcome = outcome.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
        Err(peft::Error::fault("a panic", text.unwrap_or_default()))
    });
    (outcome, peak)
}

/// A size of this process in KiB.
fn status(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find(|l| l.starts_with(key)).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// JSON values that a field of numbers should not hold.
const ODD: [&str; 11] =
    ["-1", "0", "1.5", "1000000000", "18446744073709551616", "1e300", "\"x\"", "[]", "{}", "true", "[[[[[[[[[[[[0]]]]]]]]]]]]"];
