//! Members of tars: which belong together, which are read, and which are passed over.

use std::collections::BTreeMap;

use crate::clip::decode;

/// A member of a tar.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) key: String,
    /// All behind the first dot, in lower case.
    pub(super) extension: String,
    pub(super) offset: u64,
    pub(super) size: u64,
    /// Whether it is a link, which has no content of its own.
    pub(super) link: bool,
    /// How many end marks stand before it: tars may be written one behind the other.
    pub(super) archive: usize,
}

impl Member {
    /// Its last extension, by which webdataset's decoders go.
    pub(super) fn kind(&self) -> &str {
        self.extension.rsplit('.').next().unwrap_or_default()
    }
}

/// Members that are read besides images.
pub(super) const TEXTS: [&str; 3] = ["txt", "cls", "json"];

/// Formats of images that are not read.
const UNREAD: [&str; 16] =
    ["heic", "heif", "avif", "jxl", "jp2", "j2k", "ppm", "pgm", "pbm", "pnm", "tga", "svg", "ico", "exr", "hdr", "psd"];

/// Why an example has no image although one of its members looks like one, and what to do about it.
pub(super) fn no_image(members: &[Member], wanted: Option<&str>) -> Option<(String, String)> {
    let looks = |m: &&Member| decode::EXTENSIONS.contains(&m.kind()) || UNREAD.contains(&m.kind());
    let found = members.iter().find(looks)?;
    let (key, extension) = (&found.key, &found.extension);
    Some(match wanted {
        Some(wanted) => {
            (format!("has no member `{wanted}`; its members are {}", extensions(members)), "data.webdataset.image names it".into())
        }
        None if extension == found.kind() => {
            (format!("`{key}.{extension}` is an image in a format that is not read"), "convert it to png or jpg".into())
        }
        None => (
            format!(
                "`{key}.{extension}` is not taken for its image: by webdataset's rule the key ends at the first dot of a name, so that \
                 this is the member `{extension}` of the example `{key}`"
            ),
            format!("write the name without dots before the extension, or set data.webdataset.image: {extension}"),
        ),
    })
}

pub(super) fn extensions(members: &[Member]) -> String {
    members.iter().map(|m| m.extension.as_str()).collect::<Vec<_>>().join(", ")
}

/// The part of a name before the first dot of its last component, and the part behind it, as webdataset's
/// `base_plus_ext` has it; nothing where there is no dot, or it comes first, as in what macOS adds (`._0001.jpg`), or where
/// webdataset passes over the member (`__meta__`).
pub(super) fn key_and_extension(name: &str) -> Option<(&str, &str)> {
    let first = name.split('/').next().unwrap_or_default();
    if first.len() >= 4 && first.starts_with("__") && first.ends_with("__") {
        return None;
    }
    let base = name.rfind('/').map_or(0, |i| i + 1);
    let dot = name[base..].find('.').filter(|d| *d > 0)? + base;
    Some((&name[..dot], &name[dot + 1..]))
}

/// Members that are not read, by the reason: how many, and the first one's name.
#[derive(Debug, Clone, Default)]
pub(super) struct LeftOut {
    members: BTreeMap<String, (usize, String)>,
    /// What is said of whole tars: how many, and the first one's path.
    tars: BTreeMap<&'static str, (usize, String)>,
}

/// A tar with members behind its end mark.
pub(super) const GOES_ON: &str =
    "tars go on behind an end mark, as those do that were written one behind the other, and are read to their last byte";
/// A tar that ends where a member does.
pub(super) const NO_END: &str = "tars have no end mark, so that they may be cut off and members may be missing";

impl LeftOut {
    /// Different reasons that are told apart; there are as many as extensions.
    const REASONS: usize = 16;

    pub(super) fn add(&mut self, why: &str, name: &str) {
        self.put(why, 1, name);
    }

    pub(super) fn join(&mut self, other: &Self) {
        other.members.iter().for_each(|(why, (count, name))| self.put(why, *count, name));
        other.tars.iter().for_each(|(what, (count, path))| self.say(what, *count, path));
    }

    /// Says something of a whole tar.
    pub(super) fn tell(&mut self, what: &'static str, path: &str) {
        self.say(what, 1, path);
    }

    fn say(&mut self, what: &'static str, count: usize, path: &str) {
        self.tars.entry(what).or_insert_with(|| (0, path.to_string())).0 += count;
    }

    fn put(&mut self, why: &str, count: usize, name: &str) {
        let known = self.members.contains_key(why) || self.members.len() < Self::REASONS;
        let short = || name.chars().take(80).collect();
        self.members.entry(if known { why } else { "of other kinds" }.into()).or_insert_with(|| (0, short())).0 += count;
    }

    /// What was passed over, and by which rule.
    pub(super) fn notes(&self) -> Vec<String> {
        let total: usize = self.members.values().map(|(count, _)| count).sum();
        let parts: Vec<String> = self.members.iter().map(|(why, (count, first))| format!("{count} {why} (the first: `{first}`)")).collect();
        let members = (total > 0).then(|| {
            format!("{total} members of tars are not read: {}; read are one image, .txt, .cls and .json of each key", parts.join(", "))
        });
        members.into_iter().chain(self.tars.iter().map(|(what, (count, path))| format!("{count} {what} (the first: {path})"))).collect()
    }
}

/// By which rule a member belongs to no example; nothing for directories, which hold none.
pub(super) fn passed_over(name: &str, kind: tar::EntryType) -> Option<&'static str> {
    let base = name.rsplit('/').next().unwrap_or_default();
    Some(match () {
        () if kind.is_dir() => return None,
        () if kind.is_character_special() || kind.is_block_special() || kind.is_fifo() => "that are no files",
        () if name.starts_with('/') || name.split('/').any(|part| part == "..") => "whose names lead out of the tar",
        () if base.starts_with('.') => "whose names begin with a dot",
        () if !base.contains('.') => "without an extension",
        () => "that webdataset passes over (`__name__`)",
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// `tests/data/sets/keys.json` is what webdataset's `base_plus_ext` gives.
    #[test]
    fn keys_end_at_the_first_dot_of_the_last_component() {
        let golden = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/sets/keys.json"));
        let golden: Vec<(String, Option<String>, Option<String>)> = serde_json::from_str(golden).unwrap();
        assert!(golden.len() > 10);
        for (name, key, extension) in golden {
            assert_eq!(key_and_extension(&name), key.as_deref().zip(extension.as_deref()), "{name}");
        }
        // Unlike webdataset, which takes the directory for the key, what macOS adds is passed over.
        for name in ["dir/.hidden", "dir/._0001.jpg", "__meta__", "__meta__/a.png"] {
            assert_eq!(key_and_extension(name), None, "{name}");
        }
    }
}
