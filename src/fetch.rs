//! Transfers as an observer sees them.

use crate::error::{Error, Result};
use crate::hub;
use crate::train::{Event, Observer};

/// Resolves something that may have to be fetched, telling `observer` in kilobytes.
///
/// # Errors
/// What `resolve` returns, or that a signal came.
pub fn fetched<T>(observer: &mut dyn Observer, resolve: impl FnOnce(&mut hub::Progress<'_>) -> Result<T>) -> Result<T> {
    const UNIT: u64 = 1000;
    let (mut file, mut shown) = (String::new(), 0);
    resolve(&mut |transfer| {
        if file != transfer.file {
            (file, shown) = (transfer.file.to_string(), 0);
            let phase = format!("fetching {file} (kB)");
            observer.event(Event::Phase(&phase, (transfer.total > 0).then_some((transfer.total / UNIT) as usize)));
        }
        let done = (transfer.done / UNIT) as usize;
        observer.event(Event::Advance(done.saturating_sub(shown)));
        shown = shown.max(done);
        match observer.stop() {
            Some(signal) => {
                Err(Error::Interrupted { message: format!("stopped while fetching {file}; the next run goes on there"), signal })
            }
            None => Ok(()),
        }
    })
}
