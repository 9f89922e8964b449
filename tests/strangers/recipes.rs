//! Recipes: YAML bombs, depth, numbers that are none, and what is no YAML.

use peft::recipe::Recipe;

use super::Expect::{Either, Fine, Refused};
use super::{Case, Expect};

const GOOD: &str = "model: builtin:tiny\nmethod: { lora: { rank: 2 } }\ndata: { builtin: emoji }\ntask: { classify: { templates: ['a {}'] } }\n\
                    train: { epochs: 4, batch: 8, lr: 1.0e-2, seed: 3 }\n";

fn case(name: impl Into<String>, expect: Expect, text: impl Into<Vec<u8>>) -> Case {
    let text = text.into();
    Case::new(name, expect, move |dir| {
        let path = dir.join("recipe.yaml");
        std::fs::write(&path, text).unwrap();
        Box::new(move || Recipe::load(&path, &[]).map(drop))
    })
}

/// Numbers of a recipe and the YAML around them.
const FIELDS: [(&str, &str); 22] = [
    ("train.epochs", "train: { epochs: @ }"),
    ("train.steps", "train: { steps: @ }"),
    ("train.batch", "train: { batch: @ }"),
    ("train.accumulate", "train: { accumulate: @ }"),
    ("train.lr", "train: { lr: @ }"),
    ("train.seed", "train: { seed: @ }"),
    ("train.clip_norm", "train: { clip_norm: @ }"),
    ("train.evaluate_every", "train: { evaluate_every: @ }"),
    ("train.checkpoint_steps", "train: { checkpoint_steps: @ }"),
    ("train.label_smoothing", "train: { label_smoothing: @ }"),
    ("train.ema", "train: { ema: @ }"),
    ("train.early_stopping.patience", "train: { early_stopping: { patience: @ } }"),
    ("train.schedule.cosine.warmup", "train: { schedule: { cosine: { warmup: @ } } }"),
    ("train.optimizer.adamw.eps", "train: { optimizer: { adamw: { eps: @ } } }"),
    ("train.optimizer.sgd.momentum", "train: { optimizer: { sgd: { momentum: @ } } }"),
    ("train.augment.rotate", "train: { augment: { rotate: @ } }"),
    ("train.activation_cache.memory_mib", "train: { activation_cache: { memory_mib: @ } }"),
    ("images.max_pixels", "images: { max_pixels: @ }"),
    ("images.max_bytes", "images: { max_bytes: @ }"),
    ("images.max_seconds", "images: { max_seconds: @ }"),
    ("data.shots", "data: { builtin: emoji, shots: @ }"),
    ("data.split.test", "data: { builtin: emoji, split: { test: @ } }"),
];

const NUMBERS: [&str; 10] =
    ["-1", "1.5", "1e999", ".nan", "-.inf", "18446744073709551616", "0x7fffffffffffffffffff", "[]", "{ a: 1 }", "'1'"];

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = vec![case("as it should be", Fine, GOOD)];
    for (name, yaml) in FIELDS {
        let key = name.split('.').next().unwrap();
        let rest: String = GOOD.lines().filter(|l| !l.starts_with(key)).map(|l| format!("{l}\n")).collect();
        for number in NUMBERS {
            let text = format!("{rest}{}\n", yaml.replace('@', number));
            // Each of these is out of every field's range but where a fraction, or a text of digits, is a number.
            let expect = if key == "data" || ["-1", "1.5", "'1'", "18446744073709551616"].contains(&number) {
                Either
            } else {
                Refused("recipe.yaml")
            };
            cases.push(case(format!("{name}: {number}"), expect, text));
        }
    }
    cases.extend(bombs());
    for (name, text) in [
        ("empty", ""),
        ("a list", "[1, 2"),
        ("a number", "3"),
        ("NUL", "\0"),
        ("controls", "\u{1}\u{2}: \u{7f}"),
        ("a tab", "model:\n\t- x"),
        ("two documents", "a: 1\n---\nb: 2\n"),
        ("no such alias", "model: *nowhere"),
        ("an alias of itself", "&a [*a]"),
        ("a tag of Python", "!!python/object/apply:os.system [id]"),
        ("a tag of Ruby", "--- !ruby/object:Gem::Installer\ni: x\n"),
        ("binary", "model: !!binary AAAA"),
        ("an unclosed quote", "model: \"builtin:tiny\nmethod: none\n"),
        ("an unclosed brace", "model: { a: 1"),
        ("HTML", "<!doctype html><p>404"),
        ("JSON", "{\"model\": 1}"),
        ("a key twice", "model: a\nmodel: b\n"),
        ("a complex key", "? [a]\n: b\n"),
        ("a directive", "%YAML 9.9\n---\nmodel: a\n"),
        ("an open directive", "%TAG\n"),
        ("null", "~"),
        ("right to left", "\u{202e}ledom: x"),
    ] {
        cases.push(case(name, Refused("recipe.yaml"), text));
    }
    cases.push(case("a mark of the encoding", Fine, format!("\u{feff}{GOOD}")));
    cases.push(case("lines of Windows", Fine, GOOD.replace('\n', "\r\n")));
    cases.push(case("UTF-16", Refused("UTF-8"), format!("\u{feff}{GOOD}").encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>()));
    cases.push(case("Latin-1", Refused("UTF-8"), [GOOD.as_bytes(), b"output: caf\xe9\n"].concat()));
    cases.push(case("a megabyte too much", Refused("expected at most"), "#".repeat((1 << 20) + 1)));
    for percent in (5..100).step_by(5) {
        let cut: String = GOOD.chars().take(GOOD.len() * percent / 100).collect();
        cases.push(case(format!("cut at {percent} %"), Either, cut));
    }
    cases
}

fn bombs() -> Vec<Case> {
    let mut laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_string();
    for i in 1..12 {
        let refs = vec![format!("*a{}", i - 1); 10].join(", ");
        laughs.push_str(&format!("a{i}: &a{i} [{refs}]\n"));
    }
    let long = "x".repeat(400_000);
    let merges: String =
        (1..12).map(|i| format!("m{i}: &m{i}\n  <<: [{}]\n  k{i}: 1\n", vec![format!("*m{}", i - 1); 10].join(", "))).collect();
    let many = |one: &dyn Fn(usize) -> String, count: usize| (0..count).map(one).collect::<String>();
    let refused = |name: &str, text: String| case(name, Refused("recipe.yaml"), text);
    let mut cases = vec![
        refused("a billion laughs", laughs.clone()),
        refused("a billion laughs in a template", format!("{laughs}{}", GOOD.replace("'a {}'", "*a11"))),
        refused("a long text ten thousand times", format!("a: &a {long}\nb: [{}]\n", vec!["*a"; 10_000].join(", "))),
        refused("merge keys", format!("m0: &m0 {{ x: 1 }}\n{merges}")),
        refused("a hundred thousand anchors", many(&|i| format!("a{i}: &a{i} x\n"), 50_000)),
        refused("a hundred thousand keys", many(&|i| format!("k{i}: 1\n"), 100_000)),
        refused("a long key", format!("{long}: 1\n{GOOD}")),
        refused("a long number", format!("{GOOD}output: [{}]\n", "9".repeat(400_000))),
        refused("an endless comment", format!("#{}", "x".repeat(900_000))),
        refused("a hundred thousand items", format!("model: [{}]\n", vec!["a"; 100_000].join(","))),
        refused("escapes", format!("model: \"{}\n", "\\u0041".repeat(100_000))),
    ];
    for (name, open, close) in
        [("lists", "[", "]"), ("maps", "{a: ", "}"), ("dashes", "- ", ""), ("questions", "? ", ""), ("mixed", "[{a: ", "}]")]
    {
        for depth in [200, 10_000, 100_000] {
            cases.push(refused(&format!("{name}, {depth} deep"), format!("{}x{}", open.repeat(depth), close.repeat(depth))));
        }
    }
    let nested = (0..2000).map(|i| format!("{}a:\n", " ".repeat(i))).take(1000).collect::<String>();
    cases.push(refused("indented a thousand deep", nested));
    cases
}
