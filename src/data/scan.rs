//! What a directory holds: images, what is passed over by a rule, and what has to be told of.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::clip::decode;
use crate::error::{Error, Result};

/// Directories that programs leave behind; hidden ones (`.thumbnails`, `.ipynb_checkpoints`) besides.
const IGNORED_DIRECTORIES: [&str; 7] =
    ["__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"];
/// Files that programs leave behind; hidden ones (`.DS_Store`) besides.
const IGNORED_FILES: [&str; 4] = ["thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"];
/// Texts that stand beside images.
const IGNORED_EXTENSIONS: [&str; 16] =
    ["txt", "md", "rst", "csv", "tsv", "json", "jsonl", "xml", "yaml", "yml", "html", "htm", "log", "ini", "cfg", "py"];

/// What lies below a directory.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    /// Images by their extension, sorted.
    pub(crate) images: Vec<PathBuf>,
    /// Files that are no image by their extension and that no rule passes over, counted by extension.
    pub(crate) left_out: BTreeMap<String, usize>,
    /// Files that a rule passes over, counted by extension.
    pub(crate) ignored: BTreeMap<String, usize>,
    /// Links that lead nowhere, each with the reason.
    pub(crate) broken: Vec<Error>,
}

/// Which links to directories are followed.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Links<'a> {
    /// All that do not lead back to a directory above them.
    Any,
    /// Besides, none into other parts of this directory, whose images have other labels.
    Within(&'a Path),
}

/// Walks through a directory.
///
/// # Errors
/// When a directory cannot be read, or a link leads to a directory that is read already.
pub(crate) fn scan(dir: &Path, links: Links<'_>) -> Result<Scan> {
    let own = dir.canonicalize().map_err(|e| Error::read(dir, e))?;
    let mut found = Scan::default();
    let mut walk = walkdir::WalkDir::new(dir).follow_links(true).sort_by_file_name().into_iter();
    while let Some(entry) = walk.next() {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => {
                found.broken.extend(broken(dir, error)?);
                continue;
            }
        };
        let is_dir = entry.file_type().is_dir();
        if entry.depth() == 0 && is_dir {
            continue;
        }
        match (is_ignored(&entry.file_name().to_string_lossy(), is_dir), is_dir) {
            (true, true) => walk.skip_current_dir(),
            (true, false) => *found.ignored.entry(extension(entry.path())).or_default() += 1,
            (false, true) if entry.path_is_symlink() => check_link(entry.path(), &own, links)?,
            (false, true) => {}
            (false, false) if is_image(entry.path()) => found.images.push(entry.into_path()),
            (false, false) => *found.left_out.entry(extension(entry.path())).or_default() += 1,
        }
    }
    found.images.sort();
    Ok(found)
}

/// Something in a directory.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) path: PathBuf,
    pub(crate) is_dir: bool,
}

/// What lies in a directory, not below it, sorted by path. A link is what it leads to; one that leads nowhere is a file that is not there.
///
/// # Errors
/// When the directory, or what a link in it leads to, cannot be looked at.
pub(crate) fn entries(dir: &Path) -> Result<Vec<Entry>> {
    let mut list = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| Error::read(dir, e))? {
        let entry = entry.map_err(|e| Error::read(dir, e))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(|e| Error::read(&path, e))?;
        let is_dir = kind.is_dir() || (kind.is_symlink() && leads_to_directory(&path)?);
        list.push(Entry { path, is_dir });
    }
    list.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(list)
}

fn leads_to_directory(link: &Path) -> Result<bool> {
    match std::fs::metadata(link) {
        Ok(meta) => Ok(meta.is_dir()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        // Nobody looks for it where a rule passes over it.
        Err(_) if link.file_name().is_some_and(|n| is_ignored(&n.to_string_lossy(), true)) => Ok(false),
        Err(e) => Err(Error::read(link, e)),
    }
}

/// The images below a directory, sorted; links that lead nowhere; and what was left out, for people.
pub(crate) fn images(dir: &Path) -> Result<(Vec<PathBuf>, Vec<Error>, Option<String>)> {
    let Scan { images, left_out, broken, .. } = scan(dir, Links::Any)?;
    let told = (!left_out.is_empty()).then(|| format!("{}; {}", counted(&left_out), advice(left_out.keys())));
    Ok((images, broken, told))
}

/// What a failed step of a walk means: a link that leads nowhere is told of with the images that cannot be read; one that should be
/// passed over is nothing.
fn broken(dir: &Path, error: walkdir::Error) -> Result<Option<Error>> {
    let path = error.path().unwrap_or(dir).to_path_buf();
    if error.loop_ancestor().is_some() {
        return Err(leads_back(&path));
    }
    let is_link = path.symlink_metadata().is_ok_and(|m| m.is_symlink());
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    match error.io_error().map(std::io::Error::kind) {
        Some(_) if is_link && is_ignored(&name, false) => Ok(None),
        Some(std::io::ErrorKind::NotFound) if is_link => Ok(Some(Error::input(path.display(), "is a link to a file that does not exist"))),
        _ => {
            let cause = error.into_io_error().unwrap_or_else(|| std::io::Error::other("cannot be walked through"));
            Err(Error::read(&path, cause))
        }
    }
}

fn leads_back(path: &Path) -> Error {
    Error::input(path.display(), "links to a directory that it lies in").hint("remove the link")
}

/// Refuses links back to what holds them, and to images that have another label.
pub(crate) fn check_link(path: &Path, own: &Path, links: Links<'_>) -> Result<()> {
    let target = path.canonicalize().map_err(|e| Error::read(path, e))?;
    if own.starts_with(&target) {
        return Err(leads_back(path));
    }
    match links {
        Links::Within(root) if target.starts_with(root) && !target.starts_with(own) => {
            let message = format!("links to {}, whose images belong to another class or split", target.display());
            Err(Error::input(path.display(), message).hint("remove the link: an image would have two labels"))
        }
        _ => Ok(()),
    }
}

/// Whether a file or a directory is passed over, wherever it stands.
pub(crate) fn is_ignored(name: &str, is_dir: bool) -> bool {
    let lower = name.to_ascii_lowercase();
    let extension = lower.rsplit_once('.').map_or("", |(_, e)| e);
    match is_dir {
        _ if name.starts_with('.') => true,
        true => IGNORED_DIRECTORIES.iter().any(|d| d.eq_ignore_ascii_case(name)),
        false => IGNORED_FILES.contains(&lower.as_str()) || IGNORED_EXTENSIONS.contains(&extension),
    }
}

/// Whether the extension is one of an image; hidden files are not.
pub(crate) fn is_image(path: &Path) -> bool {
    let hidden = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
    decode::EXTENSIONS.contains(&extension(path).as_str()) && !hidden
}

fn extension(path: &Path) -> String {
    path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase()).unwrap_or_default()
}

/// `10 .heic, 2 .psd and 1 without an extension`.
pub(crate) fn counted(files: &BTreeMap<String, usize>) -> String {
    let one = |(extension, count): (&String, &usize)| match extension.is_empty() {
        true => format!("{count} without an extension"),
        false => format!("{count} .{extension}"),
    };
    let mut parts: Vec<String> = files.iter().map(one).collect();
    match (parts.pop(), parts.is_empty()) {
        (Some(last), false) => format!("{} and {last}", parts.join(", ")),
        (last, _) => last.unwrap_or_default(),
    }
}

/// What to do about files that are no images by their extension.
pub(crate) fn advice<'a>(extensions: impl IntoIterator<Item = &'a String>) -> String {
    let mut names: Vec<&str> = extensions.into_iter().filter_map(|e| decode::unread(e)).collect();
    names.sort_unstable();
    names.dedup();
    match names.is_empty() {
        true => format!("images end in {}", decode::EXTENSIONS.join(", ")),
        false => format!("{} images cannot be read: convert them to JPEG or PNG", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_programs_leave_behind_is_passed_over() {
        for name in [".thumbnails", ".ipynb_checkpoints", "@eaDir", "__MACOSX"] {
            assert!(is_ignored(name, true), "{name}");
        }
        for name in [".DS_Store", "._cat.jpg", "Thumbs.db", "Desktop.ini", "labels.txt", "cat.JSON"] {
            assert!(is_ignored(name, false), "{name}");
        }
        for (name, dir) in [("cat.txt", true), ("@home", true), ("cat.heic", false), ("cat", false), ("train", true)] {
            assert!(!is_ignored(name, dir), "{name}");
        }
    }

    #[test]
    fn counts_are_read_as_a_list() {
        let counts = BTreeMap::from([("heic".to_string(), 10), ("psd".into(), 2), (String::new(), 1)]);
        assert_eq!(counted(&counts), "1 without an extension, 10 .heic and 2 .psd");
    }
}
