//! Nothing writes past the layer that the other tests break.

use std::path::Path;

/// What changes a file system.
const CHANGES: [&str; 15] = [
    "fs::write",
    "fs::rename",
    "fs::copy",
    "fs::create_dir",
    "fs::remove",
    "fs::set_permissions",
    "fs::hard_link",
    "fs::symlink(",
    "File::create",
    "File::options",
    "OpenOptions",
    "tempfile_in",
    "tempdir",
    "NamedTempFile",
    "sync_all",
];

#[test]
fn every_change_of_the_file_system_passes_through_one_place() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    for entry in walkdir::WalkDir::new(&src).into_iter().flatten().filter(|e| e.path().extension().is_some_and(|e| e == "rs")) {
        let name = entry.path().strip_prefix(&src).unwrap().display().to_string();
        if ["files/", "faults/"].iter().any(|own| name.starts_with(own)) || name.ends_with("tests.rs") {
            continue;
        }
        let text = std::fs::read_to_string(entry.path()).unwrap();
        let product = text.split("#[cfg(test)]\n#[allow").next().unwrap_or_default();
        let lines = product.lines().enumerate().filter(|(_, l)| !l.trim_start().starts_with("//"));
        found.extend(lines.filter(|(_, l)| CHANGES.iter().any(|c| l.contains(c))).map(|(i, l)| format!("{name}:{}: {}", i + 1, l.trim())));
    }
    assert!(found.is_empty(), "use crate::files for\n{}", found.join("\n"));
}
