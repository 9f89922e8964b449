//! The safetensors format, read strictly: every byte accounted for, every name once.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;

use candle_core::{DType, Tensor};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::container::{Bytes, Container, Entry, elements};
use crate::error::{Error, Result};
use crate::json;

/// The format's own limit.
const MAX_HEADER: u64 = 100_000_000;

/// The header's key for free text.
pub(super) const METADATA: &str = "__metadata__";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Info {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// The header with names in file order.
struct Header {
    metadata: HashMap<String, String>,
    tensors: Vec<(String, Info)>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
        let mut header = Header { metadata: HashMap::new(), tensors: Vec::new() };
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                header.metadata = map.next_value()?;
            } else {
                let info = map.next_value().map_err(|e| A::Error::custom(format_args!("tensor `{name}`: {e}")))?;
                header.tensors.push((name, info));
            }
        }
        Ok(header)
    }
}

/// Tensors in file order, and the free text of the header.
pub type Contents = (Vec<(String, Tensor)>, HashMap<String, String>);

/// Reads a safetensors file that is in memory: its tensors in file order and its metadata.
///
/// `place` names the file in errors.
///
/// # Errors
/// When the header is damaged, a name occurs twice, tensors overlap, leave holes or do not fill
/// the file exactly, or a type is not supported.
pub fn read_safetensors(place: &str, bytes: &[u8]) -> Result<Contents> {
    let (container, metadata) = open(place, Bytes::Memory(Cow::Borrowed(bytes)))?;
    let tensors = container.entries.iter().map(|entry| Ok((entry.name.clone(), container.tensor(entry)?))).collect::<Result<_>>()?;
    Ok((tensors, metadata))
}

/// Reads and checks the header.
pub(super) fn open<'a>(place: &str, bytes: Bytes<'a>) -> Result<(Container<'a>, HashMap<String, String>)> {
    let damaged = |why: String| {
        Error::input(place, format!("is not a valid safetensors file: {why}")).hint("the file may be incomplete; fetch or save it again")
    };
    let len = bytes.len();
    if len < 8 {
        return Err(damaged(format!("it has {len} bytes, the header's length alone takes 8")));
    }
    let size = bytes.read(0..8)?.iter().rev().fold(0u64, |n, b| (n << 8) | u64::from(*b));
    if size > MAX_HEADER || size > len - 8 {
        return Err(damaged(format!("the header should have {size} bytes, the file has {len}")));
    }
    let header: Header = json::from_slice(&bytes.read(8..8 + size)?).map_err(|e| damaged(format!("header: {e}")))?;
    let mut entries =
        header.tensors.into_iter().map(|(name, info)| entry(name, info)).collect::<std::result::Result<Vec<_>, _>>().map_err(damaged)?;
    let data = len - 8 - size;
    check_layout(&mut entries, data).map_err(damaged)?;
    for e in &mut entries {
        e.range = e.range.start + 8 + size..e.range.end + 8 + size;
    }
    let container = Container { place: place.to_string(), bytes, entries, scalars: Vec::new(), notes: Vec::new() };
    Ok((container, header.metadata))
}

fn entry(name: String, info: Info) -> std::result::Result<Entry, String> {
    let (begin, end) = info.data_offsets;
    let dtype = dtype(&info.dtype);
    if end < begin {
        return Err(format!("tensor `{name}` ends ({end}) before it begins ({begin})"));
    }
    if let Some(count) = elements(&info.shape) {
        let wanted = dtype.as_ref().ok().map(|d| count as u128 * d.size_in_bytes() as u128);
        if wanted.is_some_and(|w| w != u128::from(end - begin)) {
            return Err(format!("tensor `{name}` of type {} and shape {:?} has {} bytes of data", info.dtype, info.shape, end - begin));
        }
    } else {
        return Err(format!("tensor `{name}` has the impossible shape {:?}", info.shape));
    }
    Ok(Entry { name, dtype, shape: info.shape, strides: None, range: begin..end })
}

/// Sorts by position; tensors must follow each other from the first byte to the last.
fn check_layout(entries: &mut [Entry], data: u64) -> std::result::Result<(), String> {
    entries.sort_by_key(|e| (e.range.start, e.range.end));
    let mut position = 0;
    for e in entries.iter() {
        if e.range.start != position {
            let what = if e.range.start < position { "overlaps the one before" } else { "leaves a hole before it" };
            return Err(format!("tensor `{}` {what} (it begins at {}, expected {position})", e.name, e.range.start));
        }
        position = e.range.end;
    }
    if position == data {
        return Ok(());
    }
    let what = if position > data { "is cut off" } else { "has bytes left over" };
    Err(format!("it {what}: the header describes {position} bytes of tensors, there are {data}"))
}

fn dtype(name: &str) -> std::result::Result<DType, String> {
    Ok(match name {
        "F64" => DType::F64,
        "F32" => DType::F32,
        "F16" => DType::F16,
        "BF16" => DType::BF16,
        "I64" => DType::I64,
        "I32" => DType::I32,
        "I16" => DType::I16,
        "U32" => DType::U32,
        "U8" | "BOOL" => DType::U8,
        other => return Err(other.to_string()),
    })
}
