//! JSON from strangers. A value in memory takes some 80 bytes, its text as few as two: what has more values than anything of its
//! kind is refused before memory is asked for.

use std::collections::HashSet;
use std::fmt::Formatter;

use peft_adapters::wording::plain;
use serde::de::{DeserializeOwned, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

/// Values of a configuration, a row or an index; larger vocabularies have half as many. They take at most 80 MiB.
const MAX_VALUES: usize = 1 << 20;

/// Annotations of COCO and VQA have more values, but 14 bytes of text or more for each.
const MIN_DENSITY: usize = 6;

/// Reads a configuration, a row or an index.
///
/// # Errors
/// When it is no such JSON, has a key twice, or has more than 1 048 576 values.
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

/// `{ a: { b: 1 } }` to `a.b = 1`; lists of plain values stay whole, null is no value.
pub(crate) fn flatten(prefix: &str, value: Value, out: &mut Map<String, Value>) {
    let under = |key: &str| if prefix.is_empty() { key.to_string() } else { format!("{prefix}.{key}") };
    match value {
        Value::Null => {}
        Value::Object(map) => map.into_iter().for_each(|(k, v)| flatten(&under(&k), v, out)),
        Value::Array(items) if items.iter().any(Value::is_object) => {
            items.into_iter().enumerate().for_each(|(i, v)| flatten(&under(&i.to_string()), v, out));
        }
        other => {
            out.insert(prefix.to_string(), other);
        }
    }
}

fn within<T: DeserializeOwned>(bytes: &[u8], most: usize) -> Result<T, String> {
    let bytes = crate::files::unmarked("", bytes).map_err(|e| e.to_string().replace("\n  help:", ";"))?;
    // No more values than bytes: nothing to count in what is small.
    if bytes.len() > most && values(bytes) > most {
        return Err(format!("has more than {most} values in {} bytes", bytes.len()));
    }
    if most == MAX_VALUES {
        serde_json::from_slice::<Unique>(bytes).map_err(|e| plain(&e.to_string()))?;
    }
    serde_json::from_slice(bytes).map_err(|e| plain(&e.to_string()))
}

/// Any JSON in which no object has a key twice: of two values the last would count, without a word.
struct Unique;

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Self)
    }
}

impl<'de> Visitor<'de> for Unique {
    type Value = Self;

    fn expecting(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self, A::Error> {
        while items.next_element::<Self>()?.is_some() {}
        Ok(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut pairs: A) -> Result<Self, A::Error> {
        let mut keys = HashSet::new();
        while let Some((key, Self)) = pairs.next_entry::<String, Self>()? {
            if keys.contains(&key) {
                return Err(A::Error::custom(format!("`{key}` occurs twice")));
            }
            keys.insert(key);
        }
        Ok(self)
    }
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
    fn a_key_stands_once_at_any_depth() {
        assert!(from_slice::<Value>(br#"[{"a": 1, "b": {"a": null}}, {"a": 2.5}]"#).is_ok());
        let twice = from_slice::<Value>(br#"[{"b": {"c": true, "a": "x", "c": -1}}]"#).unwrap_err();
        assert!(twice.contains("`c` occurs twice at line 1"), "{twice}");
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
