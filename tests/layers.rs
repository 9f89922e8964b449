//! Who may import whom.
#![allow(clippy::unwrap_used)]

use std::path::Path;

/// Each module and what it may import; `session` and `cli` put everything together, `faults` tests it. What is right about
/// this table is the direction: nothing below knows of recipes, nothing but `cli` of the command line.
const TABLE: [(&str, &[&str]); 50] = [
    ("error", &[]),
    ("named", &[]),
    ("guard", &[]),
    ("builtin", &[]),
    ("provenance", &[]),
    ("interval", &[]),
    ("report", &["interval", "provenance"]),
    ("roster", &["clip", "data", "error", "files", "provenance"]),
    ("device", &["error"]),
    ("memory", &[]),
    ("alloc", &[]),
    ("files", &["error"]),
    ("json", &["error", "files"]),
    ("sign", &["error", "files"]),
    ("hub", &["error", "files"]),
    ("clip", &["alloc", "builtin", "error", "files", "guard", "hub", "json"]),
    ("data", &["builtin", "clip", "error", "files", "guard", "hub", "json"]),
    ("delta", &["clip", "error", "files", "hub", "json", "provenance", "sign"]),
    ("optim", &["error"]),
    ("fusion", &["clip", "error"]),
    ("task", &["clip", "data", "error", "fusion", "named", "report"]),
    ("train", &["clip", "data", "delta", "error", "files", "fusion", "named", "optim", "provenance", "report", "task"]),
    ("recipe", &["clip", "data", "error", "files", "fusion", "named", "task", "train"]),
    ("events", &["error", "files"]),
    ("change", &["error"]),
    ("figures", &["report"]),
    ("comparison", &["figures", "report"]),
    ("page", &["change", "comparison", "error", "figures", "report", "train"]),
    ("fetch", &["error", "hub", "train"]),
    ("run", &["error", "events", "files", "json", "provenance", "recipe", "report", "roster", "train"]),
    ("estimate", &["alloc", "clip", "delta", "train"]),
    ("combine", &["clip", "delta", "error"]),
    ("merge", &["clip", "delta", "error", "files", "json"]),
    ("extract", &["clip", "delta", "error", "merge"]),
    ("undo", &["clip", "delta", "error", "merge"]),
    ("bundle", &["clip", "delta", "error", "files", "merge", "model"]),
    ("classifier", &["clip", "error", "files", "model"]),
    ("model", &["clip", "data", "delta", "error", "fusion", "task"]),
    ("pool", &["error", "files", "model"]),
    ("inputs", &["clip", "data", "error", "files"]),
    ("embed", &["clip", "error", "files", "inputs", "data", "model", "train"]),
    ("inspect", &["clip", "delta", "error", "files", "hub", "recipe", "run", "sign"]),
    ("survey", &["clip", "data", "error", "fetch", "recipe", "task", "train"]),
    ("sheet", &["clip", "data", "error", "files"]),
    ("runs", &["error", "json", "recipe", "report", "run"]),
    ("draft", &["clip", "data", "error", "interval", "recipe"]),
    ("doctor", &["device", "files", "train"]),
    (
        "compare",
        &["comparison", "data", "delta", "error", "figures", "files", "page", "provenance", "recipe", "report", "run", "task", "train"],
    ),
    (
        "measure",
        &[
            "clip",
            "compare",
            "comparison",
            "data",
            "delta",
            "error",
            "merge",
            "page",
            "provenance",
            "recipe",
            "roster",
            "run",
            "session",
            "task",
            "train",
        ],
    ),
    ("bench", &["error", "recipe", "report", "session", "train"]),
];

#[test]
fn imports_follow_the_table() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut seen, mut wrong) = (0, Vec::new());
    for entry in walkdir::WalkDir::new(&src).into_iter().flatten().filter(|e| e.path().extension().is_some_and(|x| x == "rs")) {
        let path = entry.path().strip_prefix(&src).unwrap();
        let module = path.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        let Some((_, allowed)) = TABLE.iter().find(|(name, _)| *name == module) else {
            assert!(["cli", "faults", "lib", "main", "session"].contains(&module), "{module} is not in the table");
            continue;
        };
        let text = std::fs::read_to_string(entry.path()).unwrap();
        for part in text.split("crate::").skip(1) {
            let other: String = part.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
            seen += 1;
            if !(other.is_empty() || other == module || allowed.contains(&other.as_str())) {
                wrong.push(format!("{}: `crate::{other}`, but {module} may import only {allowed:?}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(seen > 100);
}
