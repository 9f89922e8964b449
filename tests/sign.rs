//! Signed adapters: what is accepted, and what is refused when something was changed.
#![allow(clippy::unwrap_used)]

mod common;

/// An adapter that CLIP-LoRA saved.
const CLIP_LORA: &str = "tests/data/open_clip/clip_lora/lora_weights.pt";

use common::World;

/// An adapter signed by `release.key`, and another key pair.
fn signed() -> World {
    let world = World::new();
    world.json(&["train", "recipe.yaml", "--set", "train.epochs=1"]);
    world.json(&["sign", "--generate", "release"]);
    world.json(&["sign", "--generate", "other"]);
    world.json(&["sign", "run/adapter", "--key", "release.key"]);
    world
}

const PREDICT: [&str; 7] = ["predict", "--model", "base", "--adapter", "run/adapter", "data/red/1.png", "--trusted-key"];

#[test]
fn a_signed_adapter_is_read_and_any_change_is_refused() {
    let world = signed();
    let with = |key: &'static str| [&PREDICT[..], &[key]].concat();
    world.json(&with("release.pub"));
    let line = std::fs::read_to_string(world.path("release.pub")).unwrap().lines().nth(1).unwrap().to_string();
    world.json(&[&PREDICT[..], &[line.as_str()]].concat());
    assert!(world.fails(&with("other.pub"), 2).contains("not signed by a trusted key"));
    let checked = world.json(&["inspect", "run/adapter", "--verify", "--trusted-key", "release.pub"]);
    assert!(checked["facts"]["verified"][0].as_str().unwrap().contains("signed by a trusted key"), "{checked}");

    let config = world.path("run/adapter/adapter_config.json");
    let before = std::fs::read(&config).unwrap();
    std::fs::write(&config, [&before[..], b" "].concat()).unwrap();
    assert!(world.fails(&with("release.pub"), 2).contains("changed: adapter_config.json"));
    assert!(world.fails(&["inspect", "run/adapter", "--verify"], 2).contains("changed: adapter_config.json"));
    std::fs::write(&config, &before).unwrap();
    std::fs::write(world.path("run/adapter/more.txt"), "x").unwrap();
    assert!(world.fails(&with("release.pub"), 2).contains("unexpected: more.txt"));
    std::fs::remove_file(world.path("run/adapter/more.txt")).unwrap();

    // Digests that were made to fit are not signed.
    let sums = world.path("run/adapter/B3SUMS");
    let text = std::fs::read_to_string(&sums).unwrap();
    std::fs::write(&sums, text.replace('a', "b")).unwrap();
    assert!(world.fails(&with("release.pub"), 2).contains("has changed since"));
    std::fs::remove_file(&sums).unwrap();
    assert!(world.fails(&with("release.pub"), 2).contains("is not signed"));
    // Without the key nobody asks.
    world.json(&PREDICT[..6]);
}

/// A new verb that reads adapters belongs here.
#[test]
fn no_verb_reads_an_unsigned_adapter_where_a_key_is_named() {
    let world = World::new();
    world.json(&["train", "recipe.yaml", "--set", "train.epochs=1"]);
    world.json(&["sign", "--generate", "release"]);
    world.json(&["merge", "--model", "base", "--adapter", "run/adapter", "--output", "merged"]);
    world.json(&["merge", "--model", "base", "--adapter", "run/adapter", "--bundle", "--output", "bundle"]);
    world.write("lines.jsonl", "{\"image\": \"data/red/1.png\", \"adapter\": \"run/adapter\"}\n");
    std::fs::copy(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(CLIP_LORA), world.path("foreign.pt")).unwrap();
    for verb in [
        "predict --model base --adapter run/adapter data/red/1.png",
        "predict --model base --jsonl lines.jsonl",
        "predict --model bundle data/red/1.png",
        "embed --model base --adapter run/adapter --output e.safetensors --images data/red",
        "eval run",
        "inspect run/adapter",
        "inspect foreign.pt",
        "merge --model base --adapter run/adapter --output out",
        "merge --model base --adapter run/adapter --bundle --output out",
        "merge --model base --adapter run/adapter --adapter run/adapter --combine svd --output out",
        "merge --model merged --undo run/adapter --output out",
        "train recipe.yaml --force --set train.init_adapter=run/adapter",
        "convert foreign.pt --output out",
    ] {
        let args: Vec<&str> = verb.split(' ').chain(["--trusted-key", "release.pub"]).collect();
        // A line of requests has its error as its answer.
        let answered = verb.contains("--jsonl");
        let message = if answered { String::from_utf8(world.peft(&args).stdout).unwrap() } else { world.fails(&args, 2) };
        assert!(message.contains("is not signed") && !message.contains("predictions"), "{verb}: {message}");
        assert!(!world.path("out").exists(), "{verb}");
    }
}

#[cfg(unix)]
#[test]
fn a_link_to_a_signed_directory_is_as_good_as_the_directory() {
    let world = signed();
    std::os::unix::fs::symlink("run/adapter", world.path("link")).unwrap();
    let predict = ["predict", "--model", "base", "--adapter", "link", "data/red/1.png", "--trusted-key", "release.pub"];
    world.json(&predict);
    // What is behind a link inside is signed too.
    std::fs::rename(world.path("run/adapter/adapter_config.json"), world.path("config.json")).unwrap();
    std::os::unix::fs::symlink("../../config.json", world.path("run/adapter/adapter_config.json")).unwrap();
    world.json(&predict);
    world.write("config.json", "{}");
    assert!(world.fails(&predict, 2).contains("changed: adapter_config.json"));
}

#[test]
fn secret_keys_are_private_and_may_be_encrypted() {
    let world = World::new();
    world.json(&["sign", "--generate", "plain"]);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        assert_eq!(std::fs::metadata(world.path("plain.key")).unwrap().permissions().mode() & 0o777, 0o600);
    }
    assert!(world.fails(&["sign", "--generate", "plain"], 2).contains("exists"));
    // A kill left the secret key alone.
    let public = std::fs::read(world.path("plain.pub")).unwrap();
    std::fs::remove_file(world.path("plain.pub")).unwrap();
    world.json(&["sign", "--generate", "plain"]);
    assert_eq!(std::fs::read(world.path("plain.pub")).unwrap(), public);
    let sealed = std::process::Command::new(env!("CARGO_BIN_EXE_peft"))
        .args(["sign", "--generate", "sealed"])
        .env("PEFT_KEY_PASSWORD", "secret")
        .current_dir(world.path("."))
        .status();
    assert!(sealed.unwrap().success());
    assert!(world.fails(&["sign", "recipe.yaml", "--key", "sealed.key"], 2).contains("PEFT_KEY_PASSWORD"));
    assert!(world.fails(&["sign", "recipe.yaml", "--key", "recipe.yaml"], 2).contains("cannot be used to sign"));
    assert!(world.fails(&["inspect", "recipe.yaml", "--trusted-key", "recipe.yaml"], 2).contains("no public key"));
}
