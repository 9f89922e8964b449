//! TensorBoard event files, scalars only: what `tensorboard --logdir runs` shows while a run goes on.
//!
//! A file is a row of TFRecords (length, masked CRC-32C of the length, data, masked CRC-32C of the data), each an `Event`
//! protocol buffer. Four fields of three messages are all that scalars need, so they are encoded by hand.

use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};
use crate::files::Output;

/// An event file that is written to.
#[derive(Debug)]
pub struct Events {
    file: Output,
}

impl Events {
    /// Opens or begins a file. Events from step `from` on are those of a run that was stopped and comes to these steps
    /// again; readers are told to forget them.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn open(path: &Path, from: usize) -> Result<Self> {
        let fail = |e| Error::write(path, e);
        let mut file = Output::update(path)?;
        let mut bytes = Vec::new();
        file.file().read_to_end(&mut bytes).map_err(fail)?;
        let whole = whole_records(&bytes);
        // Readers stop at a record that was torn by a kill, and would never see what comes after it.
        file.set_len(whole as u64)?;
        file.file().seek(SeekFrom::Start(whole as u64)).map_err(fail)?;
        let mut events = Self { file };
        match whole {
            0 => events.write(0, &text(3, b"brain.Event:2"))?,
            // SessionLog { status: START }
            _ => events.write(from, &text(7, &[0x08, 0x01]))?,
        }
        Ok(events)
    }

    /// Adds the values of a step.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn scalars<'t>(&mut self, step: usize, values: impl IntoIterator<Item = (&'t str, f64)>) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut one = text(1, tag.as_bytes());
            // simple_value, a 32-bit field
            one.push(2 << 3 | 5);
            one.extend((value as f32).to_le_bytes());
            summary.extend(text(1, &one));
        }
        self.write(step, &text(5, &summary))
    }

    /// One event: wall time, step and what happened.
    fn write(&mut self, step: usize, what: &[u8]) -> Result<()> {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        // wall_time, a 64-bit field; step, a variable-length one
        let mut event = vec![1 << 3 | 1];
        event.extend(seconds.to_le_bytes());
        event.push(2 << 3);
        varint(&mut event, step as u64);
        event.extend(what);
        self.file.put(&record(&event))
    }

    /// Returns when all that was added is on the disk.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn sync(&self) -> Result<()> {
        self.file.sync()
    }
}

/// A length-delimited field.
fn text(field: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![field << 3 | 2];
    varint(&mut out, bytes.len() as u64);
    out.extend(bytes);
    out
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked(&length), data, &masked(data)].concat()
}

/// A CRC of data that holds CRCs is weak, so TensorFlow rotates and shifts it.
fn masked(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// Bytes up to the end of the last record that is whole.
fn whole_records(bytes: &[u8]) -> usize {
    let mut at = 0;
    loop {
        let Some((length, rest)) = bytes[at..].split_first_chunk::<8>() else { return at };
        let size = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
        if rest.get(..4) != Some(&masked(length)) || size > rest.len().saturating_sub(8) {
            return at;
        }
        let (data, crc) = (&rest[4..4 + size], &rest[4 + size..8 + size]);
        if crc != masked(data) {
            return at;
        }
        at += 16 + size;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// TensorFlow's own check value: the masked CRC of a length of 24 (`tensorboard.compat.tensorflow_stub.pywrap_tensorflow.masked_crc32c`).
    #[test]
    fn the_checksum_is_tensorflows() {
        assert_eq!(u32::from_le_bytes(masked(&24u64.to_le_bytes())), MASKED_24);
    }

    const MASKED_24: u32 = 575_373_219;

    #[test]
    fn a_torn_record_is_cut_off_before_more_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.out.tfevents.x");
        let mut events = Events::open(&path, 0).unwrap();
        events.scalars(1, [("train/loss", 0.5), ("train/lr", 1e-3)]).unwrap();
        let whole = std::fs::read(&path).unwrap();
        events.scalars(300, [("train/loss", 0.25)]).unwrap();
        drop(events);
        let torn = std::fs::read(&path).unwrap();
        std::fs::write(&path, &torn[..torn.len() - 3]).unwrap();
        drop(Events::open(&path, 2).unwrap());
        let again = std::fs::read(&path).unwrap();
        assert!(again.starts_with(&whole) && again.len() > whole.len());
        assert_eq!(whole_records(&again), again.len());
    }
}
