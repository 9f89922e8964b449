//! `peft train`: killed anywhere, gone on with, the same bits.

use std::path::Path;

use super::{World, aborts, changes, copy_tree, each, peft, place, said, strays, succeeds, tree, verb};
use crate::train::checkpoint;

/// What tells the time.
pub(super) const VARIES: [&str; 5] = ["events.out", "report.html", "report.json", "lock", "state.safetensors"];

/// Two epochs of two steps, the state saved after each.
fn args<'a>(more: &[&'a str]) -> Vec<&'a str> {
    let small = ["train", "recipe.yaml", "--set", "train.epochs=2", "--set", "train.batch=11", "--set", "train.checkpoint_steps=1"];
    [&small[..], more].concat()
}

/// A run that nothing happened to, and the changes that it made.
fn whole(w: &World) -> (std::path::PathBuf, Vec<String>) {
    let dir = place(w, "whole");
    let points = changes(verb(&dir, &args(&[]), "count"));
    assert!(points.iter().filter(|p| p.contains("(step)")).count() == 4 && points.len() > 60, "{points:#?}");
    (dir.join("run"), points)
}

/// What a run that was ended may leave: nothing of a file, or the whole of it.
#[track_caller]
fn no_halves(run: &Path, whole: &Path, what: &str) {
    checkpoint::load(&run.join("checkpoint")).unwrap_or_else(|e| panic!("{what}: {e}"));
    crate::run::read_report(run).unwrap_or_else(|e| panic!("{what}: {e}"));
    let adapter = tree(&run.join("adapter"), &[]);
    assert!(adapter.is_empty() || adapter == tree(&whole.join("adapter"), &[]), "{what}: half an adapter");
}

#[track_caller]
fn no_strays(dir: &Path, what: &str) {
    assert_eq!(strays(dir), Vec::<String>::new(), "{what}");
}

#[test]
fn killed_anywhere_and_resumed_gives_the_same_bits() {
    let w = World::new();
    let (whole, points) = whole(&w);
    each(points.len(), |k| {
        let (dir, what) = (place(&w, &format!("at{k}")), format!("killed at {k}, {}", points[k - 1]));
        aborts(&peft(&dir, &args(&[]), &format!("abort {k}")), &what);
        no_halves(&dir.join("run"), &whole, &what);
        // Other logging options do not matter; the recipe that is kept names them.
        let (more, skip) = match k % 2 {
            0 => (&["--resume", "--json", "--set", "train.tensorboard=false"][..], &["recipe.yaml", "peft.json"][..]),
            _ => (&["--resume"][..], &[][..]),
        };
        succeeds(&peft(&dir, &args(more), ""), &what);
        let skip = [&VARIES[..], skip].concat();
        assert_eq!(tree(&dir.join("run"), &skip), tree(&whole, &skip), "{what}");
        no_strays(&dir, &what);
        std::fs::remove_dir_all(dir).unwrap();
    });
}

#[test]
fn a_run_that_is_replaced_is_the_old_one_or_the_new_one() {
    let w = World::new();
    let (new, _) = whole(&w);
    let old = place(&w, "old").join("run");
    succeeds(&peft(&w.path("old"), &args(&["--set", "train.seed=9"]), ""), "old");
    copy_tree(&old, &place(&w, "counted").join("run"));
    let points = changes(verb(&w.path("counted"), &args(&["--force"]), "count"));
    let first = points.iter().position(|p| p.contains("(step)")).unwrap();
    each(first, |k| {
        let (dir, what) = (place(&w, &format!("at{k}")), format!("killed at {k}, {}", points[k - 1]));
        let run = dir.join("run");
        copy_tree(&old, &run);
        aborts(&peft(&dir, &args(&["--force"]), &format!("abort {k}")), &what);
        let finished = crate::run::read_report(&run).unwrap().is_some();
        let skip = [&VARIES[..], &[".tmp-"]].concat();
        assert!(!finished || tree(&run, &skip) == tree(&old, &skip), "{what}: neither old nor new");
        succeeds(&peft(&dir, &args(&[if finished { "--force" } else { "--resume" }]), ""), &what);
        assert_eq!(tree(&run, &VARIES), tree(&new, &VARIES), "{what}");
        no_strays(&dir, &what);
        std::fs::remove_dir_all(dir).unwrap();
    });
}

#[test]
fn a_run_is_not_given_up_for_one_that_finds_no_room() {
    let w = World::new();
    let old = place(&w, "old").join("run");
    succeeds(&peft(&w.path("old"), &args(&[]), ""), "old");
    copy_tree(&old, &place(&w, "counted").join("run"));
    let points = changes(verb(&w.path("counted"), &args(&["--force"]), "count"));
    let given_up = points.iter().position(|p| p.starts_with("Rename")).unwrap() + 1;
    assert!(given_up > 4, "{points:#?}");
    for k in 1..=given_up {
        let (dir, what) = (place(&w, &format!("at{k}")), format!("full at {k}, {}", points[k - 1]));
        copy_tree(&old, &dir.join("run"));
        let out = peft(&dir, &args(&["--force"]), &format!("fail 28 {k} on"));
        assert_eq!(out.status.code(), Some(3), "{what}: {}", said(&out));
        assert_eq!(tree(&dir.join("run"), &["lock"]), tree(&old, &["lock"]), "{what}");
    }
}

#[test]
fn a_full_disk_ends_a_run_at_once_and_it_goes_on_later() {
    let w = World::new();
    let (whole, points) = whole(&w);
    each(points.len(), |k| {
        // One failure, or a disk that stays full.
        let (dir, what) = (place(&w, &format!("at{k}")), format!("full at {k}, {}", points[k - 1]));
        let out = peft(&dir, &args(&[]), &format!("fail 28 {k}{}", if k % 2 == 0 { " on" } else { "" }));
        no_halves(&dir.join("run"), &whole, &what);
        if out.status.success() {
            // Removals need no room, and a directory need not be synced.
            assert!(["Remove", "Sync"].iter().any(|op| points[k - 1].starts_with(op)), "{what}: nothing was said");
        } else {
            let message = said(&out);
            assert_eq!(out.status.code(), Some(3), "{what}: {message}");
            assert!(["run", "os error 28", "--resume"].iter().all(|part| message.contains(part)), "{what}: {message}");
            succeeds(&peft(&dir, &args(&["--resume"]), ""), &what);
        }
        assert_eq!(tree(&dir.join("run"), &VARIES), tree(&whole, &VARIES), "{what}");
        no_strays(&dir, &what);
        std::fs::remove_dir_all(dir).unwrap();
    });
}

#[test]
fn a_directory_that_is_removed_under_a_run_ends_it() {
    let w = World::new();
    let run = w.path("run");
    for step in [1, 4] {
        let out = peft(w.dir.path(), &args(&[]), &format!("gone {step} {}", run.display()));
        assert_eq!(out.status.code(), Some(3), "{}", said(&out));
        assert!(said(&out).contains("run: was removed or replaced"), "{}", said(&out));
        assert!(!run.exists(), "nothing is made again");
    }
    succeeds(&peft(w.dir.path(), &args(&[]), ""), "once more");
}

/// The clock is the test's: steps and syncs take so many seconds.
#[test]
fn checkpoints_are_as_rare_as_they_are_slow() {
    let w = World::new();
    let count = |step: usize, sync: usize, more: &[&str]| {
        let all = [&["train", "recipe.yaml", "--force", "--set", "train.epochs=10"][..], more].concat();
        let log = changes(verb(w.dir.path(), &all, &format!("time {step} {sync}")));
        log.iter().filter(|l| l.starts_with("Rename") && l.contains("state.safetensors")).count()
    };
    // Three steps an epoch.
    assert_eq!(count(1000, 1, &[]), 30, "each step may have one");
    assert_eq!(count(1, 0, &[]), 10, "each epoch has one");
    assert_eq!(count(1, 100, &[]), 1, "only the first, whose length is not known before");
    assert_eq!(count(1, 100, &["--set", "train.checkpoint_steps=2"]), 15, "a wish is a wish");
}
