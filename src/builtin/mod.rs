//! What lives in the binary: a small base and two sets of icons.

/// The embedded bases.
pub const BASES: &[&str] = &["tiny"];

/// A file of an embedded base.
#[must_use]
pub fn file(base: &str, name: &str) -> Option<&'static [u8]> {
    FILES.iter().find(|(b, n, _)| *b == base && *n == name).map(|(_, _, bytes)| *bytes)
}

const FILES: &[(&str, &str, &[u8])] = &[];
