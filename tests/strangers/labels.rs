//! Class names: empty, equal to the eye, and look-alikes, which are told of.

use peft::data::{ColumnNames, DataConfig, Dataset, TableConfig, check_classes};
use peft::{Error, Result};

use super::Expect::{Fine, Refused};
use super::{Case, Expect};

fn list(name: impl Into<String>, expect: Expect, names: &[&str]) -> Case {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    Case::new(name, expect, move |_| Box::new(move || check_classes("labels", &names)))
}

/// A table of texts with these labels, each ten times; what is read has to satisfy `then`.
fn table(name: impl Into<String>, expect: Expect, labels: &[&str], then: fn(&Dataset) -> bool) -> Case {
    let row = |(i, label): (usize, &&str)| format!("{}\n", serde_json::json!({"text": format!("text {i}"), "label": label}));
    let rows: String = labels.iter().cycle().take(10 * labels.len()).enumerate().map(row).collect();
    Case::new(name, expect, move |dir| {
        let path = dir.join("x.jsonl");
        std::fs::write(&path, rows).unwrap();
        Box::new(move || -> Result<()> {
            let table = Some(TableConfig { path, text: Some(ColumnNames::One("text".into())), ..Default::default() });
            let data = DataConfig { table, ..Default::default() }.open(0)?;
            if then(&data) { Ok(()) } else { Err(Error::fault("labels", format!("{:?}: {:?}", data.classes, data.notes))) }
        })
    })
}

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = vec![list("two classes", Fine, &["cat", "dog"])];
    for (name, empty) in [
        ("nothing", ""),
        ("a space", " "),
        ("white space", " \t\r\n"),
        ("a space without break", "\u{a0}"),
        ("no width", "\u{200b}"),
        ("a byte-order mark", "\u{feff}"),
        ("a joiner", "\u{200d}"),
        ("a soft hyphen", "\u{ad}"),
        ("a direction", "\u{202e}"),
        ("NUL", "\0"),
    ] {
        cases.push(list(format!("empty: {name}"), Refused("empty"), &["cat", empty]));
    }
    for (name, a, b) in [
        ("twice", "cat", "cat"),
        ("space in front", "cat", " cat"),
        ("space behind", "cat", "cat "),
        ("spaces inside", "a cat", "a  cat"),
        ("a tab", "a cat", "a\tcat"),
        ("case", "cat", "CAT"),
        ("a space without break", "a cat", "a\u{a0}cat"),
        ("composed", "\u{e9}clair", "e\u{301}clair"),
        ("Hangul", "\u{ac00}", "\u{1100}\u{1161}"),
        ("angstrom", "\u{c5}", "\u{212b}"),
        ("no width", "cat", "ca\u{200b}t"),
        ("a soft hyphen", "cat", "ca\u{ad}t"),
        ("a direction", "cat", "\u{202d}cat\u{202c}"),
        ("a variation", "\u{2764}", "\u{2764}\u{fe0f}"),
        ("a tag", "cat", "cat\u{e0041}"),
        ("a line", "a cat", "a\ncat"),
    ] {
        cases.push(list(format!("equal: {name}"), Refused("the same prompt"), &[a, b]));
        // Tables trim their cells, so that some of these are one class there and not two.
        if a != b && a != b.trim() {
            cases.push(table(format!("equal in a table: {name}"), Refused("the same prompt"), &[a, b], |_| true));
        }
    }
    for (name, a, b) in [
        ("Cyrillic a", "cat", "c\u{430}t"),
        ("Greek o", "dog", "d\u{3bf}g"),
        ("O and 0", "O", "0"),
        ("l and 1", "l", "1"),
        ("rn and m", "bum", "burn"),
        ("a ligature", "fish", "\u{fb01}sh"),
        ("full width", "cat", "\u{ff43}\u{ff41}\u{ff54}"),
        ("a circled digit", "1", "\u{2460}"),
        ("mathematical", "cat", "\u{1d41c}\u{1d41a}\u{1d42d}"),
    ] {
        let told = |data: &Dataset| data.classes.len() == 2 && data.notes.iter().any(|n| n.contains("look alike"));
        cases.push(table(format!("look-alikes: {name}"), Fine, &[a, b], told));
    }
    let quiet = |data: &Dataset| !data.notes.iter().any(|n| n.contains("look alike"));
    for names in [
        ["cat", "dog"],
        ["na\u{ef}ve", "naive"],
        ["\u{732b}", "\u{72ac}"],
        ["\u{43a}\u{43e}\u{442}", "\u{441}\u{43e}\u{431}\u{430}\u{43a}\u{430}"],
    ] {
        cases.push(table(format!("different: {names:?}"), Fine, &names, quiet));
    }
    cases
}
