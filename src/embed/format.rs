//! The files that `embed` writes: NumPy's, or safetensors.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::EmbedOptions;
use super::part::Part;
use crate::error::{Error, Result};
use crate::files::{self, Fresh};

/// Readers of safetensors refuse longer headers.
const MAX_HEADER: usize = 100_000_000;

/// A layout that the output's name asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Npy,
    Safetensors,
}

impl Format {
    pub(super) fn of(options: &EmbedOptions) -> Result<Self> {
        let out = &options.output;
        let extension = out.extension().map(|e| e.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
        match extension.as_str() {
            "npy" if !options.images.is_empty() && options.texts.is_some() => {
                Err(Error::input(out.display(), "a .npy holds one matrix, and there are images and texts")
                    .hint("write two files, or one .safetensors"))
            }
            "npy" => Ok(Self::Npy),
            "safetensors" | "" => Ok(Self::Safetensors),
            other => Err(Error::input(out.display(), format!("expected a name that ends in .npy or .safetensors, found .{other}"))),
        }
    }

    /// Whether the names of the rows can be written, before any work is done.
    pub(super) fn check(self, images: Option<&[PathBuf]>, texts: Option<&[String]>) -> Result<()> {
        let quoted = |s: &str| json!(s).to_string().len();
        // Names stand in a string of JSON, in which quotes are escaped once more.
        let names = images.into_iter().flatten().map(|p| quoted(&p.display().to_string()) + 3);
        let bytes: usize = names.chain(texts.into_iter().flatten().map(|t| quoted(t) + 3)).sum();
        match self == Self::Safetensors && bytes + 4096 > MAX_HEADER {
            true => Err(Error::input("output", format!("the names of the rows take {bytes} bytes, more than a .safetensors may hold"))
                .hint("write a .npy, whose names stand in a file of their own")),
            false => Ok(()),
        }
    }

    /// Writes the output, and returns the file with what the rows are of where that is another one.
    pub(super) fn write(self, out: &Path, part: &mut Part, dim: usize, names: &[Option<Vec<String>>; 2]) -> Result<Option<PathBuf>> {
        match self {
            Self::Npy => npy(out, part, dim, names).map(Some),
            Self::Safetensors => safetensors(out, part, dim, names).map(|()| None),
        }
    }
}

/// The bytes before the rows of a `.npy`, version 1.0: the magic, the header's length, a Python literal filled up to 64 bytes.
fn npy_header(rows: usize, dim: usize) -> Vec<u8> {
    let mut text = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {dim}), }}");
    let fixed = 10;
    let whole = (fixed + text.len() + 1).next_multiple_of(64);
    text.extend(std::iter::repeat_n(' ', whole - fixed - text.len() - 1));
    text.push('\n');
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    header.extend(u16::try_from(text.len()).unwrap_or(u16::MAX).to_le_bytes());
    header.extend(text.as_bytes());
    header
}

fn npy(out: &Path, part: &mut Part, dim: usize, names: &[Option<Vec<String>>; 2]) -> Result<PathBuf> {
    let is_images = names[0].is_some();
    let (key, list) = if is_images { ("image", &names[0]) } else { ("text", &names[1]) };
    let list = list.as_deref().unwrap_or_default();
    let path = out.with_extension("ids.jsonl");
    files::refuse_input("--output", &path)?;
    let mut ids = Fresh::new(&path)?;
    for (i, part) in list.chunks(4096).enumerate() {
        let lines: String = part.iter().enumerate().map(|(j, name)| format!("{}\n", json!({ "row": i * 4096 + j, key: name }))).collect();
        ids.write_all(lines.as_bytes()).map_err(|e| Error::write(&path, e))?;
    }
    files::refuse_input("--output", out)?;
    let mut file = Fresh::new(out)?;
    let mut put = |bytes: &[u8]| file.write_all(bytes).map_err(|e| Error::write(out, e));
    put(&npy_header(list.len(), dim))?;
    part.copy(is_images, &mut put)?;
    ids.settle(false)?;
    file.settle(false)?;
    ids.place()?;
    file.place()?;
    Ok(path)
}

fn safetensors(out: &Path, part: &mut Part, dim: usize, names: &[Option<Vec<String>>; 2]) -> Result<()> {
    let mut metadata = Map::from_iter([("format".to_string(), json!("pt"))]);
    let (mut tensors, mut end) = (Map::new(), 0);
    for (list, [key, tensor]) in names.iter().zip([["images", "image_embeds"], ["texts", "text_embeds"]]) {
        let Some(list) = list else { continue };
        metadata.insert(key.into(), Value::String(json!(list).to_string()));
        let from = end;
        end += list.len() * dim * size_of::<f32>();
        tensors.insert(tensor.into(), json!({ "dtype": "F32", "shape": [list.len(), dim], "data_offsets": [from, end] }));
    }
    let mut all = Map::from_iter([("__metadata__".to_string(), Value::Object(metadata))]);
    all.extend(tensors);
    let mut header = serde_json::to_vec(&all).map_err(|e| Error::fault(out.display(), e))?;
    header.resize(header.len().next_multiple_of(size_of::<u64>()), b' ');
    files::refuse_input("--output", out)?;
    let mut file = Fresh::new(out)?;
    let mut put = |bytes: &[u8]| file.write_all(bytes).map_err(|e| Error::write(out, e));
    put(&(header.len() as u64).to_le_bytes())?;
    put(&header)?;
    for is_images in [true, false] {
        part.copy(is_images, &mut put)?;
    }
    file.publish(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What numpy 2 writes for `np.zeros((3, 512), np.float32)`, byte by byte.
    #[test]
    fn the_header_is_numpys() {
        let expected = format!("\u{1}\0v\0{{'descr': '<f4', 'fortran_order': False, 'shape': (3, 512), }}{}\n", " ".repeat(56));
        let header = npy_header(3, 512);
        assert_eq!(&header[..6], b"\x93NUMPY");
        assert_eq!(&header[6..], expected.as_bytes());
        assert!([0, 7, 1_000_000].iter().all(|n| npy_header(*n, 768).len() == 128));
    }
}
