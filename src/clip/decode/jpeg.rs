//! Truncated JPEGs: the decoder fills what is missing with grey, which would be trained on.

use crate::error::{Error, Result};

/// Whether the file reaches its end-of-image marker.
pub(super) fn check_complete(place: &str, bytes: &[u8]) -> Result<()> {
    if is_complete(bytes) { Ok(()) } else { Err(Error::input(place, "the image is truncated")) }
}

/// Walks the markers: segments by their length (a thumbnail inside has an end of its own), coded
/// data up to the next marker.
fn is_complete(bytes: &[u8]) -> bool {
    let mut at = 2;
    loop {
        // Coded data, stray bytes and fill bytes are all skipped in the same way.
        let Some(skip) = bytes.get(at..).and_then(|rest| rest.windows(2).position(is_marker)) else {
            return false;
        };
        at += skip;
        match bytes[at + 1] {
            0xD9 => return true,
            0x01 | 0xD8 => at += 2,
            _ => {
                let Some(&[high, low]) = bytes.get(at + 2..at + 4) else { return false };
                at += 2 + usize::from(u16::from_be_bytes([high, low])).max(2);
            }
        }
    }
}

/// Neither an escaped 0xFF, nor a restart marker, nor a fill byte.
fn is_marker(pair: &[u8]) -> bool {
    pair[0] == 0xFF && !matches!(pair[1], 0x00 | 0xFF | 0xD0..=0xD7)
}
