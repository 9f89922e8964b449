//! Which files this process has read, so that no output that a user names takes the place of one.

use std::collections::HashSet;
use std::fs::File;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};

/// Device and number of each file.
static READ: Mutex<Option<HashSet<(u64, u64)>>> = Mutex::new(None);

#[cfg(unix)]
fn identity(meta: &std::fs::Metadata) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    Some((meta.dev(), meta.ino()))
}

#[cfg(not(unix))]
fn identity(_: &std::fs::Metadata) -> Option<(u64, u64)> {
    None
}

/// Remembers a file that has been opened to be read.
pub(crate) fn is_read(file: &File) {
    if let Some(id) = file.metadata().ok().as_ref().and_then(identity) {
        READ.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(HashSet::new).insert(id);
    }
}

/// Refuses an output, which `option` names, that is a file this process has read: an image, a table, a base, an adapter.
///
/// # Errors
/// When it is one.
pub fn refuse_input(option: &str, output: &Path) -> Result<()> {
    let id = std::fs::metadata(output).ok().as_ref().and_then(identity);
    let read = READ.lock().unwrap_or_else(PoisonError::into_inner);
    match id.zip(read.as_ref()).is_some_and(|(id, read)| read.contains(&id)) {
        true => Err(Error::input(option, format!("{} is a file that this command reads", output.display())).hint("choose another file")),
        false => Ok(()),
    }
}
