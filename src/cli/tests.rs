//! What every verb's help has to say.

use clap::{CommandFactory, Parser};

use super::Cli;

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
