//! Real disks that are full or must not be written to, two runs in one directory, and signals.

use std::path::PathBuf;
use std::process::{Command, Output};

use super::train::VARIES;
use super::{World, changes, each, peft, place, said, strays, succeeds, tree, verb};

/// A small file system of its own.
struct Tmpfs(PathBuf);

impl Tmpfs {
    /// Nothing where this user may not mount one.
    fn mount(at: PathBuf, kib: usize) -> Option<Self> {
        std::fs::create_dir(&at).unwrap();
        let size = format!("size={kib}k");
        let done = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(&at).output();
        let done = done.is_ok_and(|out| out.status.success()).then_some(Self(at));
        if done.is_none() {
            eprintln!("left out: no tmpfs can be mounted here");
        }
        done
    }

    fn again(&self, options: &str) {
        let out = Command::new("mount").args(["-o", &format!("remount,{options}")]).arg(&self.0).output().unwrap();
        assert!(out.status.success(), "{}", said(&out));
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

fn train<'a>(output: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["train", "recipe.yaml", "--set", "train.epochs=2", "--output", output][..], more].concat()
}

#[track_caller]
fn refused(out: &Output, place: &str, why: &str) {
    assert_eq!(out.status.code(), Some(3), "{}", said(out));
    let said = said(out);
    assert!(said.contains(place) && said.contains(why) && said.contains("help:"), "{said}");
}

#[test]
fn a_small_disk_of_any_size_ends_a_run_with_what_was_there_before() {
    let w = World::new();
    let Some(large) = Tmpfs::mount(place(&w, "whole").join("disk"), 1 << 16) else { return };
    succeeds(&peft(&w.path("whole"), &train("disk/run", &[]), ""), "whole");
    let expected = tree(&w.path("whole/disk/run"), &VARIES);
    let size: usize = tree(&w.path("whole/disk/run"), &[]).values().map(Vec::len).sum();
    drop(large);
    each(16, |i| {
        let (dir, what) = (place(&w, &format!("at{i}")), format!("{i} of 14 parts"));
        let disk = Tmpfs::mount(dir.join("disk"), (size >> 10) * i / 14 + 4).unwrap();
        let out = peft(&dir, &train("disk/run", &[]), "");
        if !out.status.success() {
            refused(&out, "disk/run", "make room");
            crate::train::checkpoint::load(&dir.join("disk/run/checkpoint")).unwrap();
            disk.again("size=64m");
            succeeds(&peft(&dir, &train("disk/run", &["--resume"]), ""), &what);
        }
        assert_eq!(tree(&dir.join("disk/run"), &VARIES), expected, "{what}");
        assert_eq!(strays(&dir), Vec::<String>::new(), "{what}");
    });
}

#[test]
fn a_read_only_disk_is_said_and_stays_as_it_is() {
    let w = World::new();
    let Some(disk) = Tmpfs::mount(w.path("disk"), 1 << 16) else { return };
    succeeds(&peft(w.dir.path(), &train("disk/run", &[]), ""), "train");
    succeeds(&peft(w.dir.path(), &["merge", "--model", "base", "--adapter", "disk/run/adapter", "--output", "disk/model"], ""), "merge");
    let before = tree(&w.path("disk"), &[]);
    disk.again("ro");
    refused(&peft(w.dir.path(), &train("disk/run", &["--force"]), ""), "disk/run", "Read-only");
    refused(&peft(w.dir.path(), &train("disk/other", &[]), ""), "disk/other", "Read-only");
    let merge = ["merge", "--model", "base", "--adapter", "disk/run/adapter", "--output", "disk/model", "--force"];
    refused(&peft(w.dir.path(), &merge, ""), "disk/model", "Read-only");
    let embed = ["embed", "--model", "base", "--texts", "recipe.yaml", "--output", "disk/texts.safetensors"];
    refused(&peft(w.dir.path(), &embed, ""), "disk/texts.safetensors", "Read-only");
    assert_eq!(tree(&w.path("disk"), &[]), before);
}

/// Rights do not bind root, so the refusal comes from the layer there.
#[test]
fn a_refused_write_is_said() {
    let w = World::new();
    succeeds(&peft(w.dir.path(), &train("run", &[]), ""), "train");
    let before = tree(&w.path("run"), &[]);
    for (error, why) in [(13, "Permission denied"), (30, "Read-only"), (5, "error 5")] {
        let out = peft(w.dir.path(), &train("run", &["--force"]), &format!("fail {error} 1 on"));
        assert!(out.status.code() == Some(3) && said(&out).contains(why) && said(&out).contains("run"), "{}", said(&out));
        assert_eq!(tree(&w.path("run"), &[]), before);
    }
    let (closed, mut rights) = (w.path("closed"), std::fs::metadata(w.dir.path()).unwrap().permissions());
    std::fs::create_dir(&closed).unwrap();
    std::os::unix::fs::PermissionsExt::set_mode(&mut rights, 0o555);
    std::fs::set_permissions(&closed, rights).unwrap();
    if std::fs::write(closed.join("probe"), "").is_err() {
        refused(&peft(w.dir.path(), &train("closed/run", &[]), ""), "closed", "Permission denied");
    }
}

/// The letter of a process's state, `T` for one that stopped.
fn state(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.trim().chars().next()
}

#[test]
#[cfg(target_os = "linux")]
fn a_second_run_in_one_directory_is_refused_and_the_first_goes_on() {
    let w = World::new();
    let (alone, both) = (place(&w, "alone"), place(&w, "both"));
    succeeds(&peft(&alone, &train("run", &[]), ""), "alone");
    // It stops itself (SIGSTOP) after a step and waits.
    let mut first = verb(&both, &train("run", &[]), "signal 2 19 1").spawn().unwrap();
    while state(first.id()) != Some('T') {
        assert!(first.try_wait().unwrap().is_none(), "ended before it stopped");
        std::thread::yield_now();
    }
    for flag in ["--resume", "--force"] {
        refused(&peft(&both, &train("run", &[flag]), ""), "run", &format!("in use by process {}", first.id()));
    }
    assert!(Command::new("kill").args(["-CONT", &first.id().to_string()]).status().unwrap().success());
    succeeds(&first.wait_with_output().unwrap(), "the first");
    assert_eq!(tree(&both.join("run"), &VARIES), tree(&alone.join("run"), &VARIES));
}

#[test]
fn signals_save_the_state_once_and_end_at_once_when_they_come_twice() {
    let w = World::new();
    let whole = place(&w, "whole");
    succeeds(&peft(&whole, &train("run", &[]), ""), "whole");
    for (signal, times) in [(2, 1), (15, 1), (2, 2), (15, 2)] {
        let dir = place(&w, &format!("run{signal}-{times}"));
        // In the middle of the first epoch, where nothing else saves the state.
        let out = peft(&dir, &train("run", &[]), &format!("signal 2 {signal} {times}"));
        assert_eq!(out.status.code(), Some(128 + signal), "{}", said(&out));
        let saved = crate::train::checkpoint::load(&dir.join("run/checkpoint")).unwrap();
        assert_eq!(saved.map(|(_, state)| state.step), (times == 1).then_some(2), "{signal} {times}");
        assert_eq!(said(&out).contains("--resume"), times == 1, "{}", said(&out));
        succeeds(&peft(&dir, &train("run", &["--resume"]), ""), "resumed");
        assert_eq!(tree(&dir.join("run"), &VARIES), tree(&whole.join("run"), &VARIES), "{signal} {times}");
    }
}

/// Activations that are kept between runs are whole or not there.
#[test]
fn a_cache_of_activations_is_whole_or_absent() {
    let w = World::new();
    let sets = ["method={lora: {rank: 2, layers: {last: 1}}}", "train.activation_cache={memory_mib: 0, disk_mib: 10, directory: kept}"];
    let args = ["train", "recipe.yaml", "--force", "--set", "train.epochs=1", "--set", sets[0], "--set", sets[1]];
    let points = changes(verb(w.dir.path(), &args, "count"));
    let own: Vec<usize> = (1..=points.len()).filter(|k| points[k - 1].contains(".f32")).collect();
    let whole = tree(&w.path("kept"), &[]);
    assert!(!own.is_empty() && !whole.is_empty(), "{points:#?}");
    for k in own {
        std::fs::remove_dir_all(w.path("kept")).unwrap();
        peft(w.dir.path(), &args, &format!("abort {k}"));
        let found = tree(&w.path("kept"), &[".tmp-"]);
        assert!(found.iter().all(|(n, b)| whole.get(n) == Some(b)), "killed at {k}");
        succeeds(&peft(w.dir.path(), &args, ""), "again");
        assert_eq!(tree(&w.path("kept"), &[]), whole, "killed at {k}");
    }
}
