//! Files and directories under a temporary name until they are whole.
//!
//! A kill leaves them behind. Whoever makes one holds a lock on it, so that the next writer of the same target can tell what
//! was left behind from what another process is writing, and removes it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tempfile::{TempDir, TempPath};

use super::disk::{self, Op, Output, gate, is_at};
use super::parent;
use crate::error::{Error, Result};

/// How temporary names begin; the target's name follows.
const PREFIX: &str = ".tmp-";

/// So much of the target's name, since names have an end.
const NAME: usize = 100;

/// How often a new temporary file may be taken for one that was left behind, in the moment before it is locked.
const TRIES: usize = 10;

/// A file that takes its place when it is whole.
#[derive(Debug)]
pub(crate) struct Fresh {
    output: Output,
    temporary: TempPath,
    target: PathBuf,
}

impl Fresh {
    /// Begins a file beside `target`, or beside what `target` links to.
    pub(crate) fn new(target: &Path) -> Result<Self> {
        let target = &super::through_links(target)?;
        if let Some(what) = fs::metadata(target).ok().filter(|meta| !meta.is_file()) {
            let what = if what.is_dir() { "a directory" } else { "a pipe or a device" };
            return Err(Error::input(target.display(), format!("is {what}, and no file to be written")).hint("choose another name"));
        }
        let dir = parent(target);
        disk::create_dir_all(&dir)?;
        let prefix = prefix(target);
        sweep(&dir, &prefix);
        let begin = || {
            gate(Op::Create, target)?;
            let (file, temporary) = tempfile::Builder::new().prefix(&prefix).tempfile_in(&dir)?.into_parts();
            Ok(held(&file, &temporary).then(|| Self { output: Output::new(file, target), temporary, target: target.to_path_buf() }))
        };
        first(begin).map_err(|e| Error::write(target, e))
    }

    /// Puts the file in its place; only its owner may read it where it is `private`.
    pub(crate) fn publish(self, private: bool) -> Result<()> {
        self.settle(private)?;
        self.place()
    }

    /// Puts what has settled in its place.
    pub(crate) fn place(self) -> Result<()> {
        self.rename().map(|target| disk::sync_dir(&parent(&target)))
    }

    /// Returns when the content is on the disk.
    pub(crate) fn settle(&self, private: bool) -> Result<()> {
        if !private {
            readable(&self.temporary);
        }
        self.output.sync()
    }

    /// Puts what has settled in its place, which is returned: its directory is not synced yet.
    pub(super) fn rename(self) -> Result<PathBuf> {
        let Self { temporary, target, .. } = self;
        let renamed = gate(Op::Rename, &target).and_then(|()| temporary.persist(&target).map_err(|e| e.error));
        renamed.map_err(|e| Error::write(&target, e))?;
        Ok(target)
    }
}

impl Write for Fresh {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.output.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

/// A directory that takes its place when it is whole.
pub(super) struct FreshDir {
    dir: TempDir,
    /// Locked; none where directories cannot be opened.
    handle: Option<File>,
}

impl FreshDir {
    /// Begins a directory beside `target`.
    pub(super) fn new(target: &Path) -> Result<Self> {
        let above = parent(target);
        disk::create_dir_all(&above)?;
        let prefix = prefix(target);
        sweep(&above, &prefix);
        let begin = || {
            gate(Op::Create, target)?;
            let dir = tempfile::Builder::new().prefix(&prefix).tempdir_in(&above)?;
            let handle = File::open(dir.path()).ok();
            let own = handle.as_ref().is_none_or(|handle| held(handle, dir.path()));
            Ok(own.then_some(Self { dir, handle }))
        };
        first(begin).map_err(|e| Error::write(target, e))
    }

    pub(super) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Puts it in its place; a directory that was there goes.
    pub(super) fn publish(self, target: &Path) -> Result<()> {
        let there = self.handle.as_ref().map_or_else(|| self.path().exists(), |handle| is_at(handle, self.path()));
        if !there {
            return Err(Error::fault(parent(target).display(), "was removed while it was written to").hint("run the command again"));
        }
        walkdir::WalkDir::new(self.path()).into_iter().flatten().filter(|e| e.file_type().is_dir()).for_each(|e| disk::sync_dir(e.path()));
        readable(self.path());
        if !target.exists() {
            disk::rename(self.path(), target)?;
            let _ = self.dir.keep();
            return Ok(());
        }
        if disk::exchange(self.path(), target).map_err(|e| Error::write(target, e))? {
            disk::sync_dir(&parent(target));
            // What cannot be removed is taken away by the next writer.
            let _ = disk::remove(self.path());
            return Ok(());
        }
        self.replace(target)
    }

    /// Where nothing can be exchanged: a kill between the two renames leaves the old directory aside, see [`super::recover_dir`].
    fn replace(self, target: &Path) -> Result<()> {
        let old = super::aside(target);
        disk::rename(target, &old)?;
        if let Err(e) = disk::rename(self.path(), target) {
            let _ = fs::rename(&old, target);
            return Err(e);
        }
        let _ = self.dir.keep();
        disk::remove(&old)
    }
}

/// Repeats what lost its file to another process before it was locked.
fn first<T>(mut begin: impl FnMut() -> io::Result<Option<T>>) -> io::Result<T> {
    for _ in 0..TRIES {
        if let Some(begun) = begin()? {
            return Ok(begun);
        }
    }
    Err(io::Error::other("the temporary file was removed"))
}

/// Locks what was just made. Where nothing can be locked nothing is swept either.
fn held(file: &File, path: &Path) -> bool {
    !matches!(file.try_lock(), Err(fs::TryLockError::WouldBlock)) && is_at(file, path)
}

/// Whether this is the name of what is not whole yet.
pub(crate) fn is_temporary(name: &str) -> bool {
    name.starts_with(PREFIX)
}

fn prefix(target: &Path) -> String {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let end = (0..=NAME.min(name.len())).rev().find(|i| name.is_char_boundary(*i)).unwrap_or(0);
    format!("{PREFIX}{}.", &name[..end])
}

/// Removes what killed processes left in a directory that this process alone writes to.
pub(crate) fn sweep_all(dir: &Path) {
    sweep(dir, PREFIX);
}

/// Removes temporary files that nobody holds; what cannot be removed stays.
fn sweep(dir: &Path, prefix: &str) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten().filter(|e| e.file_name().to_string_lossy().starts_with(prefix)) {
        // A pipe would be waited for.
        if !entry.file_type().is_ok_and(|t| t.is_file() || t.is_dir()) {
            continue;
        }
        let path = entry.path();
        let left = File::open(&path).is_ok_and(|file| file.try_lock().is_ok());
        if left {
            let _ = disk::remove(&path);
        }
    }
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
