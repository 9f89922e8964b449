//! Every change that this program makes to a file system passes here: one place that says where it failed, and one where tests
//! let it fail (`fault`).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A change of the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    /// Of a file or a directory.
    Create,
    Write,
    Sync,
    Rename,
    Remove,
}

/// Test builds may kill the process here, or let the change fail.
pub(super) fn gate(op: Op, path: &Path) -> io::Result<()> {
    #[cfg(all(test, unix, feature = "cli"))]
    super::fault::point(op, path)?;
    let _ = (op, path);
    Ok(())
}

/// A file that is written to.
#[derive(Debug)]
pub(crate) struct Output {
    file: File,
    path: PathBuf,
}

impl Output {
    pub(super) fn new(file: File, path: &Path) -> Self {
        Self { file, path: path.to_path_buf() }
    }

    /// Opens or begins a file whose content stays; written to at its end.
    pub(crate) fn append(path: &Path) -> Result<Self> {
        Self::open(path, OpenOptions::new().create(true).append(true))
    }

    /// Opens or begins a file whose content stays, to be read as well.
    pub(crate) fn update(path: &Path) -> Result<Self> {
        Self::open(path, OpenOptions::new().create(true).read(true).write(true).truncate(false))
    }

    fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        let opened = gate(Op::Create, path).and_then(|()| options.open(path));
        Ok(Self::new(opened.map_err(|e| Error::write(path, e))?, path))
    }

    pub(crate) fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// The whole of `bytes`.
    pub(crate) fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.write_all(bytes).map_err(|e| Error::write(&self.path, e))
    }

    /// Cuts the file off, or makes it longer.
    pub(crate) fn set_len(&mut self, len: u64) -> Result<()> {
        gate(Op::Write, &self.path).and_then(|()| self.file.set_len(len)).map_err(|e| Error::write(&self.path, e))
    }

    /// Returns when the content is on the disk.
    pub(crate) fn sync(&self) -> Result<()> {
        gate(Op::Sync, &self.path).and_then(|()| self.file.sync_all()).map_err(|e| Error::write(&self.path, e))
    }

    /// Whether the path still names this file: nobody has removed or replaced it.
    pub(crate) fn in_place(&self) -> bool {
        is_at(&self.file, &self.path)
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        #[cfg(all(test, unix, feature = "cli"))]
        if super::fault::tears() {
            // What a kill or a full disk leaves of a write.
            self.file.write_all(&bytes[..bytes.len() / 2])?;
        }
        gate(Op::Write, &self.path)?;
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Whether a path names an open file or directory.
pub(super) fn is_at(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let (here, there) = (file.metadata(), fs::symlink_metadata(path));
        here.ok().zip(there.ok()).is_some_and(|(a, b)| a.nlink() > 0 && (a.dev(), a.ino()) == (b.dev(), b.ino()))
    }
    #[cfg(not(unix))]
    {
        let _ = file;
        path.exists()
    }
}

/// Makes a directory and those above it.
pub(crate) fn create_dir_all(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    gate(Op::Create, path).and_then(|()| fs::create_dir_all(path)).map_err(|e| Error::write(path, e))
}

/// Renames within a file system, over what is there, and has it on the disk.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<()> {
    gate(Op::Rename, to).and_then(|()| fs::rename(from, to)).map_err(|e| Error::write(to, e))?;
    sync_dir(&super::parent(to));
    Ok(())
}

/// Lets two paths change places in one go; false where the system cannot.
pub(super) fn exchange(a: &Path, b: &Path) -> io::Result<bool> {
    gate(Op::Rename, b)?;
    #[cfg(any(target_os = "linux", target_vendor = "apple"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        use rustix::io::Errno;
        match renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE) {
            Ok(()) => Ok(true),
            Err(Errno::NOSYS | Errno::INVAL | Errno::NOTSUP) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }
    #[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
    {
        let _ = (a, b);
        Ok(false)
    }
}

/// Removes a file, a link or a directory with all that is in it; nothing happens where there is none.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let gone = fs::symlink_metadata(path).and_then(|meta| {
        gate(Op::Remove, path)?;
        if meta.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
    });
    match gone {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::write(path, e)),
        _ => Ok(()),
    }
}

/// Makes a link to `target`, or a copy of it where links need a privilege, in place of another one; `file` is the same target
/// as seen from here.
#[cfg(feature = "hub")]
pub(crate) fn link(target: &Path, file: &Path, at: &Path) -> Result<()> {
    let fail = |e| Error::write(at, e);
    match gate(Op::Create, at).and_then(|()| point(target, file, at)) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && fs::read_link(at).is_ok_and(|there| there == target) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            remove(at)?;
            point(target, file, at).map_err(fail)
        }
        done => done.map_err(fail),
    }
}

#[cfg(all(unix, feature = "hub"))]
fn point(target: &Path, _file: &Path, at: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, at)
}

#[cfg(all(not(unix), feature = "hub"))]
fn point(_target: &Path, file: &Path, at: &Path) -> io::Result<()> {
    fs::hard_link(file, at).or_else(|_| fs::copy(file, at).map(|_| ()))
}

/// Best effort: not every file system can sync a directory.
pub(super) fn sync_dir(path: &Path) {
    if gate(Op::Sync, path).is_ok()
        && let Ok(dir) = File::open(path)
    {
        let _ = dir.sync_all();
    }
}

/// The time, which tests may let pass.
pub(crate) fn now() -> std::time::Instant {
    #[cfg(all(test, unix, feature = "cli"))]
    return super::fault::now();
    #[cfg(not(all(test, unix, feature = "cli")))]
    std::time::Instant::now()
}

/// A training step is done: tests may end the process between two steps, too.
pub(crate) fn stepped() {
    #[cfg(all(test, unix, feature = "cli"))]
    super::fault::stepped();
}
