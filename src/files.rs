//! Atomic writes: what is on disk is the previous state or the next, never a mixture.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::{Error, Result};

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
    let mut bytes = Vec::with_capacity(size as usize);
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
    File::open(path).map_err(|e| Error::read(path, e))
}

/// [`read`] of text in UTF-8.
///
/// # Errors
/// As [`read`], and when it is no UTF-8.
pub fn read_text(path: &Path, limit: u64) -> Result<String> {
    String::from_utf8(read(path, limit)?)
        .map_err(|e| Error::input(path.display(), format!("is not UTF-8 text: the byte at {} is not", e.utf8_error().valid_up_to())))
}

/// Writes `bytes` under a temporary name in the same directory, syncs and renames.
///
/// # Errors
/// When the directory cannot be made or written.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write(path, bytes, readable)
}

/// [`write_atomic`] of what `fill` writes to the path that it gets.
///
/// # Errors
/// As [`write_atomic`], and what `fill` returns.
pub fn write_with(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    publish(path, |file| fill(file.path()), readable)
}

fn write(path: &Path, bytes: &[u8], rights: impl Fn(&Path)) -> Result<()> {
    publish(path, |file| file.write_all(bytes).map_err(|e| Error::write(path, e)), rights)
}

fn publish(path: &Path, fill: impl FnOnce(&mut tempfile::NamedTempFile) -> Result<()>, rights: impl Fn(&Path)) -> Result<()> {
    let parent = parent(path);
    fs::create_dir_all(&parent).map_err(|e| Error::write(&parent, e))?;
    let mut file = tempfile::Builder::new().prefix(".tmp-").tempfile_in(&parent).map_err(|e| Error::write(path, e))?;
    fill(&mut file)?;
    // By its name: `fill` may have put another file in the place of the handle's.
    let written = fs::OpenOptions::new().write(true).open(file.path());
    written.and_then(|f| f.sync_all()).map_err(|e| Error::write(path, e))?;
    rights(file.path());
    file.persist(path).map_err(|e| Error::write(path, e.error))?;
    sync_dir(&parent);
    Ok(())
}

/// Temporary files are private; what is published has the usual rights.
fn readable(path: &Path) {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = if path.is_dir() { 0o755 } else { 0o644 };
        let _ = fs::set_permissions(path, fs::Permissions::from_mode(mode));
    }
    #[cfg(not(unix))]
    let _ = path;
}

/// [`write_atomic`] of a file that only its owner may read.
///
/// # Errors
/// As [`write_atomic`].
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    write(path, bytes, |_| ())
}

/// Writes pretty JSON with a final newline.
///
/// # Errors
/// As [`write_atomic`].
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).map_err(|e| Error::fault(path.display(), e))?;
    text.push('\n');
    write_atomic(path, text.as_bytes())
}

/// Fills a temporary sibling of `target` and renames it into place.
///
/// An existing directory is moved aside first and removed at the end; a kill in between leaves it
/// under `.old-<name>`, from where [`recover_dir`] brings it back.
///
/// # Errors
/// What `fill` returns, or when the file system refuses; the target is then as it was.
pub fn replace_dir(target: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let parent = parent(target);
    fs::create_dir_all(&parent).map_err(|e| Error::write(&parent, e))?;
    recover_dir(target)?;
    let fresh = tempfile::Builder::new().prefix(".tmp-").tempdir_in(&parent).map_err(|e| Error::write(target, e))?;
    fill(fresh.path())?;
    sync_tree(fresh.path());
    readable(fresh.path());
    let old = aside(target);
    let had_old = target.exists();
    if had_old {
        fs::rename(target, &old).map_err(|e| Error::write(target, e))?;
    }
    let fresh = fresh.keep();
    if let Err(e) = fs::rename(&fresh, target) {
        if had_old {
            let _ = fs::rename(&old, target);
        }
        let _ = fs::remove_dir_all(&fresh);
        return Err(Error::write(target, e));
    }
    sync_dir(&parent);
    if had_old {
        fs::remove_dir_all(&old).map_err(|e| Error::write(&old, e))?;
    }
    Ok(())
}

/// Finishes a [`replace_dir`] that was killed: the moved-aside directory comes back where the new
/// one did not arrive, and goes away where it did.
///
/// # Errors
/// When the file system refuses.
pub fn recover_dir(target: &Path) -> Result<()> {
    let old = aside(target);
    if !old.exists() {
        return Ok(());
    }
    if target.exists() {
        fs::remove_dir_all(&old).map_err(|e| Error::write(&old, e))
    } else {
        fs::rename(&old, target).map_err(|e| Error::write(target, e))
    }
}

/// The bytes of all files under a directory; what cannot be read counts nothing.
#[must_use]
pub fn dir_size(dir: &Path) -> u64 {
    let entries = walkdir::WalkDir::new(dir).into_iter().filter_map(std::result::Result::ok);
    entries.filter_map(|e| e.metadata().ok()).filter(fs::Metadata::is_file).map(|m| m.len()).sum()
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

/// Best effort: not every file system can sync a directory.
fn sync_dir(path: &Path) {
    if let Ok(dir) = File::open(path) {
        let _ = dir.sync_all();
    }
}

fn sync_tree(root: &Path) {
    for entry in walkdir::WalkDir::new(root).into_iter().flatten() {
        sync_dir(entry.path());
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

    #[test]
    fn a_kill_between_the_renames_is_recovered() {
        let tmp = tempfile::tempdir().unwrap();
        let target = tmp.path().join("adapter");
        replace_dir(&target, |d| write_atomic(&d.join("a"), b"1")).unwrap();
        fs::rename(&target, aside(&target)).unwrap();
        recover_dir(&target).unwrap();
        assert_eq!(fs::read(target.join("a")).unwrap(), b"1");
    }
}
