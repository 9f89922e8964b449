//! JSON from strangers. A value in memory takes some 80 bytes, its text as few as two: what has more values than anything of its
//! kind is refused before memory is asked for.

use serde::de::DeserializeOwned;

/// Values of a configuration, a row or an index; larger vocabularies have half as many. They take at most 80 MiB.
const MAX_VALUES: usize = 1 << 20;

/// Annotations of COCO and VQA have more values, but 14 bytes of text or more for each.
const MIN_DENSITY: usize = 6;

/// Reads a configuration, a row or an index.
///
/// # Errors
/// When it is no such JSON, or has more than 1 048 576 values.
pub(crate) fn from_slice<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    within(bytes, MAX_VALUES)
}

/// Reads a large file of annotations.
///
/// # Errors
/// When it is no such JSON, or has more values than one in six bytes, beyond what [`from_slice`] reads.
pub(crate) fn from_large_slice<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    within(bytes, MAX_VALUES.max(bytes.len() / MIN_DENSITY))
}

fn within<T: DeserializeOwned>(bytes: &[u8], most: usize) -> Result<T, String> {
    // No more values than bytes: nothing to count in what is small.
    if bytes.len() > most && values(bytes) > most {
        return Err(format!("has more than {most} values in {} bytes", bytes.len()));
    }
    serde_json::from_slice(bytes).map_err(|e| e.to_string())
}

/// An upper bound of the number of values, keys included.
fn values(bytes: &[u8]) -> usize {
    let (mut count, mut quoted, mut escaped) = (1, false, false);
    for byte in bytes {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = quoted,
            b'"' => quoted = !quoted,
            b',' | b':' | b'[' | b'{' if !quoted => count += 1,
            _ => {}
        }
    }
    count
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn values_are_counted_outside_of_strings() {
        assert_eq!(values(br#"{"a, [b": [1, 2, "\",:"], "c": {}}"#), 9);
        assert_eq!(values(b"3"), 1);
    }

    #[test]
    fn many_tiny_values_are_refused_and_a_long_text_is_not() {
        let tiny = format!("[{}0]", "0,".repeat(MAX_VALUES));
        assert!(from_slice::<Value>(tiny.as_bytes()).unwrap_err().contains("more than 1048576 values"));
        assert!(from_large_slice::<Value>(tiny.as_bytes()).is_err());
        let long = format!("[\"{}\"]", ",".repeat(2 * MAX_VALUES));
        assert!(from_slice::<Value>(long.as_bytes()).is_ok());
    }
}
