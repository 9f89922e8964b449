//! Many processes over the same files, and signals from outside.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Command, Stdio};

use common::{World, program, read};

fn start(w: &World, args: &[&str]) -> Child {
    let mut command = Command::new(program());
    command.args(args).args(["--threads", "1"]).current_dir(w.dir.path());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits for the end of a run's second epoch; what it says after that.
fn trained(child: &mut Child) -> BufReader<std::process::ChildStderr> {
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("epoch 2 ") {
        line.clear();
        assert!(lines.read_line(&mut line).unwrap() > 0, "it ended by itself");
    }
    lines
}

#[test]
fn many_predictions_share_a_base_and_say_the_same() {
    let w = World::new();
    w.json(&["train", "recipe.yaml", "--set", "train.epochs=1"]);
    let args = ["predict", "--model", "base", "--adapter", "run/adapter", "data/red/0.png", "data/blue/1.png", "--json"];
    let alone = w.peft(&[&args[..], &["--threads", "1"]].concat());
    assert!(alone.status.success());
    let base = read(&w.path("base/model.safetensors"));
    let children: Vec<Child> = (0..12).map(|_| start(&w, &args)).collect();
    for child in children {
        let out = child.wait_with_output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert_eq!(out.stdout, alone.stdout);
    }
    assert_eq!(read(&w.path("base/model.safetensors")), base);
}

/// Each process has the base's large tensors as pages of the file, which all share, and none of its own.
#[test]
#[cfg(target_os = "linux")]
fn a_base_stands_in_memory_once() {
    let w = World::new();
    w.json(&["merge", "--model", "builtin:tiny", "--dtype", "f32", "--output", "large"]);
    let mut child = start(&w, &["train", "recipe.yaml", "--set", "model=large", "--set", "train.epochs=100000"]);
    let _lines = trained(&mut child);
    let maps = std::fs::read_to_string(format!("/proc/{}/smaps", child.id())).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let (mut of_base, mut shared, mut own) = (false, 0, 0);
    for line in maps.lines() {
        let kib = || line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap();
        match line.split_once(':').map(|(key, _)| key) {
            Some("Rss") if of_base => shared += kib(),
            Some("Anonymous") if of_base => own += kib(),
            Some(key) if key.contains('-') => of_base = line.ends_with("large/model.safetensors"),
            _ => {}
        }
    }
    let size = std::fs::metadata(w.path("large/model.safetensors")).unwrap().len() >> 10;
    assert!(own == 0 && shared * 10 > size * 9, "{own} KiB are its own, {shared} of {size} KiB are the file's");
}

/// A model may be replaced while others read it: each reads the old one or the new one.
#[test]
fn a_model_is_replaced_under_its_readers() {
    let w = World::new();
    w.json(&["train", "recipe.yaml", "--set", "train.epochs=1"]);
    let merge = |more: &[&str]| w.json(&[&["merge", "--model", "base", "--output", "model", "--force"][..], more].concat());
    let digest = || w.json(&["inspect", "model"])["facts"]["digest"].clone();
    merge(&[]);
    let old = digest();
    merge(&["--adapter", "run/adapter"]);
    let new = digest();
    merge(&[]);
    let children: Vec<Child> = (0..6).map(|_| start(&w, &["inspect", "model", "--json"])).collect();
    merge(&["--adapter", "run/adapter"]);
    for child in children {
        let out = child.wait_with_output().unwrap();
        // One that opened a file of each may say that they do not belong together; it never computes with a mixture.
        if out.status.success() {
            let found = serde_json::from_slice::<serde_json::Value>(&out.stdout).unwrap()["facts"]["digest"].clone();
            assert!(found == old || found == new);
        } else {
            assert_eq!(out.status.code(), Some(2), "{}", String::from_utf8_lossy(&out.stderr));
        }
    }
    assert_eq!(digest(), new);
}

/// From outside, at a moment that nobody chose: the state is saved, and going on is possible.
#[test]
fn a_signal_from_outside_saves_the_state() {
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let w = World::new();
        let mut child = start(&w, &["train", "recipe.yaml", "--set", "train.epochs=100000", "--set", "train.tensorboard=false"]);
        let mut lines = trained(&mut child);
        assert!(Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status().unwrap().success());
        let mut rest = String::new();
        lines.read_to_string(&mut rest).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(code), "{rest}");
        assert!(rest.contains("go on with --resume"), "{rest}");
        assert!(w.path("run/checkpoint/state.safetensors").exists() && !w.path("run/report.json").exists());
    }
}
