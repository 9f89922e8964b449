//! Signed adapters: what is accepted, and what is refused when something was changed.
#![allow(clippy::unwrap_used)]

mod common;

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
