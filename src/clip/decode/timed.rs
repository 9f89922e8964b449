//! A file in memory that is handed out in pieces, until time is up: decoders look at no clock, but they all read.

use std::io::{BufRead, Cursor, Error, ErrorKind, Read, Result, Seek, SeekFrom};
use std::time::{Duration, Instant};

/// Bytes between two looks at the clock.
const PIECE: usize = 64 << 10;

/// See the module.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timed<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Up to where it may be read before the next look.
    granted: usize,
    begun: Instant,
    allowed: Duration,
}

impl<'a> Timed<'a> {
    /// `seconds` from now on.
    pub(super) fn new(bytes: &'a [u8], seconds: f64) -> Self {
        let allowed = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        Self { bytes, at: 0, granted: 0, begun: Instant::now(), allowed }
    }

    /// Whether time is up.
    pub(super) fn is_over(&self) -> bool {
        self.begun.elapsed() >= self.allowed
    }
}

impl BufRead for Timed<'_> {
    fn fill_buf(&mut self) -> Result<&[u8]> {
        if self.at >= self.granted {
            if self.is_over() {
                return Err(Error::new(ErrorKind::TimedOut, "time is up"));
            }
            self.granted = (self.at + PIECE).min(self.bytes.len());
        }
        Ok(self.bytes.get(self.at..self.granted).unwrap_or_default())
    }

    fn consume(&mut self, count: usize) {
        self.at += count;
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, out: &mut [u8]) -> Result<usize> {
        let count = self.fill_buf()?.read(out)?;
        self.consume(count);
        Ok(count)
    }
}

impl Seek for Timed<'_> {
    fn seek(&mut self, to: SeekFrom) -> Result<u64> {
        let mut cursor = Cursor::new(self.bytes);
        cursor.set_position(self.at as u64);
        let at = cursor.seek(to)?;
        self.at = usize::try_from(at).unwrap_or(usize::MAX).min(self.bytes.len());
        self.granted = 0;
        Ok(at)
    }
}
