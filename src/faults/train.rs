//! `peft train`: killed anywhere, gone on with, the same bits.

use super::{World, aborts, changes, command, copy_tree, each, peft, said, strays, succeeds, tree};
use crate::train::checkpoint;

/// Two epochs of two steps, the state saved after each, every file written that there is.
const SETS: [&str; 6] =
    ["--set", "train.epochs=2", "--set", "train.batch=11", "--set", "train.checkpoint_steps=1"];

/// What tells the time or where it lies.
const VARIES: [&str; 5] = ["events.out", "report.html", "report.json", "lock", "state.safetensors"];

fn args<'a>(output: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["train", "recipe.yaml", "--output", output][..], &SETS, more].concat()
}

/// What a killed run may leave: nothing of a file, or the whole of it.
#[track_caller]
fn whole(w: &World, output: &str, before: &World, what: &str) {
    let dir = w.path(output);
    checkpoint::load(&dir.join("checkpoint")).unwrap_or_else(|e| panic!("{what}: {e}"));
    crate::run::read_report(&dir).unwrap_or_else(|e| panic!("{what}: {e}"));
    let adapter = tree(&dir.join("adapter"), &[]);
    assert!(adapter.is_empty() || adapter == tree(&before.path("whole/adapter"), &[]), "{what}: half an adapter");
}

#[test]
fn killed_anywhere_and_resumed_gives_the_same_bits() {
    let w = World::new();
    let points = changes(command("child", w.dir.path(), &[&args("whole", &[])[..], &["--threads", "1", "--quiet"]].concat(), "count"), &w);
    assert!(points.iter().filter(|p| p.contains("(step)")).count() == 4 && points.len() > 60, "{points:#?}");
    let expected = tree(&w.path("whole"), &VARIES);
    each(points.len(), |k| {
        let (name, what) = (format!("run{k}"), format!("killed at {k}, {}", points[k - 1]));
        aborts(&peft(&w, &args(&name, &[]), &format!("abort {k}")), &what);
        whole(&w, &name, &w, &what);
        // Other logging options do not matter to the rest of the run.
        let logging = if k % 2 == 0 { vec!["--resume", "--set", "train.tensorboard=false"] } else { vec!["--resume", "--json"] };
        succeeds(&peft(&w, &args(&name, &logging), ""), &what);
        assert!(tree(&w.path(&name), &VARIES).iter().filter(|(n, _)| *n != "recipe.yaml").eq(expected.iter().filter(|(n, _)| *n != "recipe.yaml")), "{what}");
        assert_eq!(strays(&w.path(&name)), Vec::<String>::new(), "{what}");
        std::fs::remove_dir_all(w.path(&name)).unwrap();
    });
}

#[test]
fn a_run_that_is_replaced_is_the_old_one_or_the_new_one() {
    let w = World::new();
    succeeds(&peft(&w, &args("old", &["--set", "train.seed=9"]), ""), "old");
    succeeds(&peft(&w, &args("new", &[]), ""), "new");
    let (old, new) = (tree(&w.path("old"), &VARIES), tree(&w.path("new"), &VARIES));
    let copy = |name: &str| copy_tree(&w.path("old"), &w.path(name));
    copy("counted");
    let forced = [&args("counted", &["--force"])[..], &["--threads", "1", "--quiet"]].concat();
    let points = changes(command("child", w.dir.path(), &forced, "count"), &w);
    let first = points.iter().position(|p| p.contains("(step)")).unwrap();
    each(first, |k| {
        let (name, what) = (format!("run{k}"), format!("killed at {k}, {}", points[k - 1]));
        copy(&name);
        aborts(&peft(&w, &args(&name, &["--force"]), &format!("abort {k}")), &what);
        let finished = crate::run::read_report(&w.path(&name)).unwrap().is_some();
        assert!(!finished || tree(&w.path(&name), &[&VARIES[..], &[".tmp-"]].concat()) == old, "{what}: neither old nor new");
        let go_on = if finished { "--force" } else { "--resume" };
        succeeds(&peft(&w, &args(&name, &[go_on]), ""), &what);
        let same = |t: &std::collections::BTreeMap<String, Vec<u8>>| t.get("adapter/adapter_model.safetensors").cloned();
        assert_eq!(same(&tree(&w.path(&name), &VARIES)), same(&new), "{what}");
        assert_eq!(strays(&w.path(&name)), Vec::<String>::new(), "{what}");
    });
}

#[test]
fn a_full_disk_ends_a_run_at_once_and_it_goes_on_later() {
    let w = World::new();
    let points = changes(command("child", w.dir.path(), &[&args("whole", &[])[..], &["--threads", "1", "--quiet"]].concat(), "count"), &w);
    let expected = tree(&w.path("whole"), &VARIES);
    each(points.len(), |k| {
        // One failure, or a disk that stays full.
        let (name, what) = (format!("run{k}"), format!("full at {k}, {}", points[k - 1]));
        let fault = format!("fail 28 {k}{}", if k % 2 == 0 { " on" } else { "" });
        let out = peft(&w, &args(&name, &[]), &fault);
        whole(&w, &name, &w, &what);
        if !out.status.success() {
            assert_eq!(out.status.code(), Some(3), "{what}: {}", said(&out));
            assert!(said(&out).contains(&name) && said(&out).contains("os error 28") && said(&out).contains("--resume"), "{what}: {}", said(&out));
            succeeds(&peft(&w, &args(&name, &["--resume"]), ""), &what);
        } else {
            // What may fail without harm: removals, steps, syncs of directories.
            let harmless = ["Remove", "Sync"].iter().any(|op| points[k - 1].starts_with(op));
            assert!(harmless, "{what}: nothing was said");
        }
        assert_eq!(tree(&w.path(&name), &VARIES), expected, "{what}");
        assert_eq!(strays(&w.path(&name)), Vec::<String>::new(), "{what}");
        std::fs::remove_dir_all(w.path(&name)).unwrap();
    });
}

#[test]
fn a_directory_that_is_removed_under_a_run_ends_it() {
    let w = World::new();
    for step in [1, 4] {
        let out = peft(&w, &args("gone", &[]), &format!("gone {step} {}", w.path("gone").display()));
        assert_eq!(out.status.code(), Some(3), "{}", said(&out));
        assert!(said(&out).contains("gone: was removed or replaced"), "{}", said(&out));
        assert!(!w.path("gone").exists(), "nothing is made again");
    }
    succeeds(&peft(&w, &args("gone", &[]), ""), "once more");
}

/// A checkpoint of two seconds (fsyncs of a second each: the file, its directory) may come every 200 seconds.
#[test]
fn checkpoints_are_as_rare_as_they_are_slow() {
    let w = World::new();
    let count = |step: usize, sync: usize, more: &[&str]| {
        let sets = ["train", "recipe.yaml", "--output", "run", "--force", "--threads", "1", "--quiet", "--set", "train.epochs=10"];
        let log = changes(command("child", w.dir.path(), &[&sets[..], more].concat(), &format!("time {step} {sync}")), &w);
        log.iter().filter(|l| l.starts_with("Rename") && l.contains("state.safetensors")).count()
    };
    // Three steps an epoch.
    assert_eq!(count(1000, 1, &[]), 30, "each step may have one");
    assert_eq!(count(1, 0, &[]), 10, "each epoch has one");
    assert_eq!(count(1, 100, &[]), 1, "only the first, whose length is not known before");
    assert_eq!(count(1, 100, &["--set", "train.checkpoint_steps=2"]), 15, "a wish is a wish");
}
