//! Kills and full disks at every change of the file system, in test builds only.
//!
//! Each test counts the changes that a verb makes, then lets a copy of its own binary end, or fail, at each of them (see
//! `files::fault`) and looks at what is left.
#![allow(clippy::unwrap_used)]

#[path = "../../tests/common/mod.rs"]
mod common;
mod compare;
mod disk;
#[cfg(feature = "hub")]
mod hub;
mod layer;
mod merge;
#[cfg(feature = "hub")]
#[path = "../../tests/common/server.rs"]
mod server;
mod train;
mod verbs;

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::World;

use crate::files::fault;

/// Arguments of a copy, one a line.
const ARGS: &str = "PEFT_TEST_ARGS";
const FAULT: &str = "PEFT_FAULT";
/// Where a copy writes the changes that it made.
const LOG: &str = "PEFT_TEST_LOG";

/// What a copy of this binary runs: a verb.
#[test]
fn child() {
    copy(|args| i32::from(crate::cli::start(std::iter::once("peft").chain(args))));
}

/// Runs `work` and ends the process with what it returns, where this is a copy; else nothing.
fn copy(work: impl FnOnce(std::str::Lines<'_>) -> i32) {
    let Ok(args) = std::env::var(ARGS) else { return };
    if let Ok(text) = std::env::var(FAULT) {
        fault::arm(&text);
    }
    let code = work(args.lines());
    if let Ok(path) = std::env::var(LOG) {
        std::fs::write(path, fault::log().join("\n")).unwrap();
    }
    std::process::exit(code);
}

/// A copy of this binary that runs a test of this module in a directory.
fn command(test: &str, dir: &Path, args: &[&str], fault: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("faults::{test}"), "--nocapture"]).current_dir(dir);
    command.env(ARGS, args.join("\n")).env_remove(FAULT).env("RAYON_NUM_THREADS", "1");
    if !fault.is_empty() {
        command.env(FAULT, fault);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A verb in a copy.
fn verb(dir: &Path, args: &[&str], fault: &str) -> Command {
    command("child", dir, &[args, &["--threads", "1", "--quiet"]].concat(), fault)
}

/// What a verb in a copy comes to.
fn peft(dir: &Path, args: &[&str], fault: &str) -> Output {
    verb(dir, args, fault).output().unwrap()
}

/// A directory with the base, the data and the recipe of a world, so that whatever names a place is the same in each.
fn place(w: &World, name: &str) -> PathBuf {
    let dir = w.path(name);
    std::fs::create_dir(&dir).unwrap();
    for file in ["base", "data", "recipe.yaml"] {
        std::os::unix::fs::symlink(w.path(file), dir.join(file)).unwrap();
    }
    dir
}

fn said(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

#[track_caller]
fn succeeds(out: &Output, what: &str) {
    assert!(out.status.success(), "{what}: {:?} {}", out.status, said(out));
}

/// That a copy ended where it should.
#[track_caller]
fn aborts(out: &Output, what: &str) {
    assert!(out.status.signal().is_some(), "{what}: {:?} {}", out.status, said(out));
}

/// That a copy whose disk was full did without, or said so.
#[track_caller]
fn full(out: &Output, what: &str) {
    assert!(out.status.success() || out.status.code() == Some(3) && said(out).contains("make room"), "{what}: {}", said(out));
}

/// The changes that a command makes.
fn changes(mut command: Command) -> Vec<String> {
    let log = tempfile::NamedTempFile::new().unwrap();
    let out = command.env(LOG, log.path()).output().unwrap();
    succeeds(&out, "counting");
    std::fs::read_to_string(log.path()).unwrap().lines().map(ToString::to_string).collect()
}

/// Checks each of 1 to `count`, a few at a time.
fn each(count: usize, check: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(1);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                loop {
                    let k = next.fetch_add(1, Ordering::SeqCst);
                    if k > count {
                        break;
                    }
                    check(k);
                }
            });
        }
    });
}

/// All files under a directory with their content; without those that `skip` names.
fn tree(dir: &Path, skip: &[&str]) -> BTreeMap<String, Vec<u8>> {
    let entries = walkdir::WalkDir::new(dir).into_iter().flatten().filter(|e| e.file_type().is_file());
    let named = entries.map(|e| (e.path().strip_prefix(dir).unwrap().display().to_string(), e.path().to_path_buf()));
    named.filter(|(name, _)| !skip.iter().any(|s| name.contains(s))).map(|(name, path)| (name, std::fs::read(path).unwrap())).collect()
}

fn copy_tree(from: &Path, to: &Path) {
    for (file, bytes) in tree(from, &[]) {
        let path = to.join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}

/// Temporary names in a directory.
fn strays(dir: &Path) -> Vec<String> {
    let entries = walkdir::WalkDir::new(dir).into_iter().flatten().map(|e| e.path().display().to_string());
    entries.filter(|p| [".tmp-", ".old-", ".part-", ".removed"].iter().any(|s| p.contains(s))).collect()
}
