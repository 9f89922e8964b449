//! The recipes inside the binary.

/// Name and text of each.
pub const RECIPES: &[(&str, &str)] =
    &[("quickstart", include_str!("../../recipes/quickstart.yaml")), ("pretrain-tiny", include_str!("../../recipes/pretrain-tiny.yaml"))];

/// What a recipe is for: the second line of its head.
#[must_use]
pub fn summary(text: &str) -> &str {
    text.lines().nth(1).map_or("", |l| l.trim_start_matches('#').trim())
}
