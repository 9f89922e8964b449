//! What every verb's help has to say.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use clap::{CommandFactory, Parser};

use super::{Cli, next};
use crate::recipe::Recipe;

/// A line as a shell splits it, quotes and a pipe or redirection at its end included.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), String::new(), None);
    for c in line.chars() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (None, '\'' | '"') => quote = Some(c),
            (None, '>' | '|') => break,
            (None, ' ') => words.push(std::mem::take(&mut word)),
            (_, c) => word.push(c),
        }
    }
    words.push(word);
    words.into_iter().filter(|w| !w.is_empty()).collect()
}

#[test]
fn every_flag_is_documented() {
    let mut command = Cli::command();
    command.build();
    command.clone().debug_assert();
    for verb in command.get_subcommands().filter(|c| c.get_name() != "help") {
        assert!(verb.get_about().is_some(), "{} says nothing about itself", verb.get_name());
        for argument in verb.get_arguments() {
            assert!(argument.get_help().is_some_and(|h| h.to_string().len() > 5), "{} {} has no help", verb.get_name(), argument.get_id());
        }
    }
}

#[test]
fn every_example_is_a_valid_command() {
    let command = Cli::command();
    let mut seen = 0;
    for verb in command.get_subcommands() {
        let help = verb.get_after_help().map(ToString::to_string).unwrap_or_default();
        let before = seen;
        for line in help.lines().filter_map(|l| l.find("peft ").map(|at| &l[at..])) {
            // What it is for stands behind, some way off.
            let line = line.split("    ").next().unwrap_or_default();
            let parsed = Cli::try_parse_from(words(line));
            assert!(parsed.is_ok(), "{}: `{line}`: {}", verb.get_name(), parsed.err().map(|e| e.to_string()).unwrap_or_default());
            seen += 1;
        }
        assert!(seen > before, "{} has no example", verb.get_name());
    }
}

#[test]
fn text_for_people_obeys_no_file() {
    assert_eq!(super::plain("a\u{1b}[2Jb\nc\u{9b}"), "a\\u{1b}[2Jb\nc\\u{9b}");
    let wide = super::columns(&[vec!["c".repeat(70_000), "1".into()], vec!["d".into(), "2".into()]], &[1]);
    assert!(wide.ends_with(&format!("d{}  2\n", " ".repeat(69_999))));
}

/// What a run prints to be typed next, and what `--resume` answers to more epochs, of every recipe in the binary.
#[test]
fn commands_after_a_run_are_valid_and_name_their_files() {
    let (run, file) = (Path::new("my runs/pets 1"), Path::new("my recipes/a b.yaml"));
    for (name, text) in crate::builtin::recipes::RECIPES {
        let recipe = Recipe::parse(name, text, name, &[]).unwrap();
        let mut all = next::commands(&recipe, run, "test");
        all.push(next::begin(&recipe, file, run));
        for line in &all {
            let words = words(line);
            let parsed = Cli::try_parse_from(&words);
            assert!(parsed.is_ok(), "{name}: {line}: {}", parsed.err().unwrap());
            let whole = |w: &String| w.contains("my runs/pets 1");
            assert!(words.iter().any(whole), "{line}");
        }
    }
}
