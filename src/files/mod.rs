//! Atomic writes: what is on disk is the previous state or the next, never a mixture.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write as _};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::{Error, Result};

mod disk;
#[cfg(all(test, unix, feature = "cli"))]
pub(crate) mod fault;
mod fresh;
mod inputs;
mod text;

#[cfg(feature = "hub")]
pub(crate) use disk::link;
pub(crate) use disk::{Output, create_dir_all, now, remove, rename, stepped};
use fresh::FreshDir;
pub(crate) use fresh::{Fresh, is_temporary, sweep_all};
pub(crate) use inputs::is_read;
pub use inputs::refuse_input;
pub use text::{Lines, lines, read_lines, read_text, text};
pub(crate) use text::{line_ends, not_utf8, open_text, unmarked};

/// Reads a file of at most `limit` bytes. Pipes and devices, which may never end, are refused.
///
/// # Errors
/// When it is missing, no regular file, larger, or cannot be read.
pub fn read(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = open(path)?;
    let too_large = |size: u64| Err(Error::input(path.display(), format!("has {size} bytes, expected at most {limit}")));
    let size = file.metadata().map_err(|e| Error::read(path, e))?.len();
    if size > limit {
        return too_large(size);
    }
    let mut bytes = Vec::new();
    let room = usize::try_from(size).ok().and_then(|size| bytes.try_reserve_exact(size).ok());
    room.ok_or_else(|| Error::fault(path.display(), format!("has {size} bytes, more than there is memory for")))?;
    // The file may grow while it is read.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|e| Error::read(path, e))?;
    if bytes.len() as u64 > limit { too_large(bytes.len() as u64) } else { Ok(bytes) }
}

/// Opens a file to be read piece by piece. Pipes and devices, which may never end, are refused.
///
/// # Errors
/// When it is missing, no regular file, or cannot be opened.
pub fn open(path: &Path) -> Result<File> {
    let meta = fs::metadata(path).map_err(|e| Error::read(path, e))?;
    if !meta.is_file() {
        let found = if meta.is_dir() { "is a directory" } else { "is a pipe or a device" };
        return Err(Error::input(path.display(), format!("{found}, expected a file")));
    }
    let file = File::open(path).map_err(|e| Error::read(path, e))?;
    is_read(&file);
    Ok(file)
}

/// [`read_text`] of a file that may be missing.
///
/// # Errors
/// As [`read_text`], but for a missing file.
pub fn find_text(path: &Path, limit: u64) -> Result<Option<String>> {
    if missing(path)? { Ok(None) } else { read_text(path, limit).map(Some) }
}

/// Whether there is no such file. That it cannot be told is an error: what is taken for missing may be written anew.
///
/// # Errors
/// When it cannot be told.
pub fn missing(path: &Path) -> Result<bool> {
    path.try_exists().map(|there| !there).map_err(|e| Error::read(path, e))
}

/// Writes `bytes` under a temporary name in the same directory, syncs and renames.
///
/// # Errors
/// When the directory cannot be made or written.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write(path, bytes, false)
}

fn write(path: &Path, bytes: &[u8], private: bool) -> Result<()> {
    let mut fresh = Fresh::new(path)?;
    fresh.write_all(bytes).map_err(|e| Error::write(path, e))?;
    fresh.publish(private)
}

/// [`write_atomic`] of files that belong together: none takes its place before all are on the disk, so that only a kill between two
/// renames leaves some of them old.
///
/// # Errors
/// As [`write_atomic`].
pub fn write_together(files: &[(PathBuf, Vec<u8>)]) -> Result<()> {
    let all = files.iter().map(|(path, bytes)| settled(path, bytes)).collect::<Result<Vec<_>>>()?;
    let places = all.into_iter().map(Fresh::rename).collect::<Result<Vec<_>>>()?;
    let dirs: BTreeSet<PathBuf> = places.iter().map(|place| parent(place)).collect();
    dirs.iter().for_each(|dir| disk::sync_dir(dir));
    Ok(())
}

/// A file on the disk that has yet to take its place.
pub(crate) fn settled(path: &Path, bytes: &[u8]) -> Result<Fresh> {
    let mut fresh = Fresh::new(path)?;
    fresh.write_all(bytes).map_err(|e| Error::write(path, e))?;
    fresh.settle(false)?;
    Ok(fresh)
}

/// [`write_atomic`] of a file that only its owner may read.
///
/// # Errors
/// As [`write_atomic`].
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    write(path, bytes, true)
}

/// Writes pretty JSON with a final newline.
///
/// # Errors
/// As [`write_atomic`].
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    write_atomic(path, &json(path, value)?)
}

/// What [`write_json`] writes to `path`.
pub(crate) fn json(path: &Path, value: &impl Serialize) -> Result<Vec<u8>> {
    let mut text = serde_json::to_string_pretty(value).map_err(|e| Error::fault(path.display(), e))?;
    text.push('\n');
    Ok(text.into_bytes())
}

/// Fills a temporary sibling of `target` and lets it take its place.
///
/// Where the system can exchange two directories in one go, the target is there at all times. Elsewhere the old one is moved
/// aside first; a kill in between leaves it under `.old-<name>`, from where [`recover_dir`] brings it back. A target that is a
/// symbolic link stays one: the directory that it points to is replaced.
///
/// # Errors
/// What `fill` returns, or when the file system refuses; the target is then as it was.
pub fn replace_dir(target: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let target = &through_links(target)?;
    recover_dir(target)?;
    let fresh = FreshDir::new(target)?;
    fill(fresh.path())?;
    fresh.publish(target)
}

/// Finishes a [`replace_dir`] that was killed: the moved-aside directory comes back where the new
/// one did not arrive, and goes away where it did.
///
/// # Errors
/// When the file system refuses.
pub fn recover_dir(target: &Path) -> Result<()> {
    let target = &through_links(target)?;
    let old = aside(target);
    match (old.exists(), target.exists()) {
        (false, _) => Ok(()),
        (true, true) => disk::remove(&old),
        (true, false) => disk::rename(&old, target),
    }
}

/// The bytes of all files under a directory; what cannot be read counts nothing.
#[must_use]
pub fn dir_size(dir: &Path) -> u64 {
    let entries = walkdir::WalkDir::new(dir).into_iter().filter_map(std::result::Result::ok);
    entries.filter_map(|e| e.metadata().ok()).filter(fs::Metadata::is_file).map(|m| m.len()).sum()
}

/// As many links as Linux follows.
const MAX_LINKS: usize = 40;

/// What a symbolic link points to, which need not exist; any other path is itself. Writing goes through links, as a shell's `>`
/// does, so that the link stays.
fn through_links(path: &Path) -> Result<PathBuf> {
    let mut place = path.to_path_buf();
    for _ in 0..MAX_LINKS {
        match fs::read_link(&place) {
            Ok(to) => place = parent(&place).join(to),
            // Not a link, or nothing yet.
            Err(_) => return Ok(place),
        }
    }
    Err(Error::input(path.display(), "is a symbolic link that leads in a circle").hint("choose another name"))
}

fn aside(target: &Path) -> PathBuf {
    let name = target.file_name().map_or_else(|| "dir".into(), |n| n.to_string_lossy().into_owned());
    target.with_file_name(format!(".old-{name}"))
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_fill_leaves_the_old_directory() {
        let tmp = tempfile::tempdir().unwrap();
        let target = tmp.path().join("adapter");
        replace_dir(&target, |d| write_atomic(&d.join("a"), b"1")).unwrap();
        let failed = replace_dir(&target, |d| {
            write_atomic(&d.join("a"), b"2")?;
            Err(Error::fault("disk", "full"))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read(target.join("a")).unwrap(), b"1");
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn links_stay_and_what_they_point_to_is_written() {
        let tmp = tempfile::tempdir().unwrap();
        let at = |name: &str| tmp.path().join(name);
        fs::create_dir(at("far")).unwrap();
        for (link, to) in [("dir", "far/dir"), ("again", "dir"), ("file", "far/file"), ("circle", "circle")] {
            std::os::unix::fs::symlink(to, at(link)).unwrap();
        }
        for content in [b"1", b"2"] {
            replace_dir(&at("again"), |d| write_atomic(&d.join("a"), content)).unwrap();
            write_atomic(&at("file"), content).unwrap();
            assert_eq!((fs::read(at("far/dir/a")).unwrap(), fs::read(at("far/file")).unwrap()), (content.to_vec(), content.to_vec()));
        }
        assert!(["dir", "again", "file"].iter().all(|link| at(link).is_symlink()));
        assert_eq!(write_atomic(&at("circle"), b"1").unwrap_err().exit_code(), 2);
        assert_eq!(fs::read_dir(at("far")).unwrap().count(), 2);
    }

    #[test]
    fn a_kill_between_the_renames_is_recovered() {
        let tmp = tempfile::tempdir().unwrap();
        let target = tmp.path().join("adapter");
        replace_dir(&target, |d| write_atomic(&d.join("a"), b"1")).unwrap();
        fs::rename(&target, aside(&target)).unwrap();
        recover_dir(&target).unwrap();
        assert_eq!(fs::read(target.join("a")).unwrap(), b"1");
    }

    #[test]
    fn what_a_kill_left_goes_with_the_next_write_and_what_others_write_stays() {
        let tmp = tempfile::tempdir().unwrap();
        let (file, dir) = (tmp.path().join("a"), tmp.path().join("d"));
        for left in [".tmp-a.killed", ".tmp-b.killed"] {
            fs::write(tmp.path().join(left), "half").unwrap();
        }
        fs::create_dir(tmp.path().join(".tmp-d.killed")).unwrap();
        let (other, begun) = (Fresh::new(&file).unwrap(), FreshDir::new(&dir).unwrap());
        write_atomic(&file, b"1").unwrap();
        replace_dir(&dir, |_| Ok(())).unwrap();
        let mut names: Vec<_> = fs::read_dir(tmp.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|n| n.starts_with('.'));
        assert!(names.len() == 3 && names.contains(&".tmp-b.killed".to_string()), "{names:?}");
        other.publish(false).unwrap();
        begun.publish(&dir).unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"");
    }

    #[test]
    fn a_directory_that_was_removed_meanwhile_is_not_published_in_part() {
        let tmp = tempfile::tempdir().unwrap();
        let target = tmp.path().join("above/model");
        let error = replace_dir(&target, |d| {
            write_atomic(&d.join("a"), b"1")?;
            fs::remove_dir_all(tmp.path().join("above")).unwrap();
            write_atomic(&d.join("b"), b"2")
        });
        let error = error.unwrap_err();
        assert!(error.exit_code() == 3 && error.to_string().contains("removed"), "{error}");
        assert!(!target.exists());
    }
}
