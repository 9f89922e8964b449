//! A file with tensors in it, whatever its format: a list of entries and their bytes.

use std::borrow::Cow;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use crate::alloc;
use crate::error::{Error, Result};
use crate::files;

/// Where the bytes of a file come from.
#[derive(Debug)]
pub(super) enum Bytes<'a> {
    /// On disk, read piece by piece.
    File(PathBuf, u64),
    /// In memory.
    Memory(Cow<'a, [u8]>),
}

impl Bytes<'_> {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let meta = std::fs::metadata(path).map_err(|e| Error::read(path, e))?;
        if !meta.is_file() {
            return Err(Error::input(path.display(), "is not a file"));
        }
        Ok(Self::File(path.to_path_buf(), meta.len()))
    }

    pub(super) fn len(&self) -> u64 {
        match self {
            Self::File(_, len) => *len,
            Self::Memory(bytes) => bytes.len() as u64,
        }
    }

    /// A piece of the file.
    pub(super) fn read(&self, range: Range<u64>) -> Result<Cow<'_, [u8]>> {
        let beyond = || Error::input("tensor data", "reaches beyond the end of the file");
        // Before any memory is asked for.
        if range.end > self.len() {
            return Err(beyond());
        }
        match self {
            Self::Memory(bytes) => bytes.get(range.start as usize..range.end as usize).map(Cow::Borrowed).ok_or_else(beyond),
            Self::File(path, _) => read_piece(path, range).map(Cow::Owned).map_err(|e| Error::read(path, e)),
        }
    }
}

/// Opens anew each time, so that threads do not share a position.
fn at(path: &Path, position: u64) -> std::io::Result<File> {
    let mut file = File::open(path)?;
    files::is_read(&file);
    file.seek(SeekFrom::Start(position))?;
    Ok(file)
}

fn read_piece(path: &Path, range: Range<u64>) -> std::io::Result<Vec<u8>> {
    let file = at(path, range.start)?;
    let len = range.end.saturating_sub(range.start);
    let mut bytes = Vec::with_capacity(len as usize);
    file.take(len).read_to_end(&mut bytes)?;
    if bytes.len() as u64 == len { Ok(bytes) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }
}

/// One tensor of a file.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) name: String,
    /// The file's word for a type that we do not have.
    pub(super) dtype: std::result::Result<DType, String>,
    pub(super) shape: Vec<usize>,
    /// In elements, where the tensor is not stored row by row.
    pub(super) strides: Option<Vec<usize>>,
    /// In the file, checked to be inside.
    pub(super) range: Range<u64>,
}

/// A file and its tensors.
#[derive(Debug)]
pub(super) struct Container<'a> {
    pub(super) place: String,
    pub(super) bytes: Bytes<'a>,
    pub(super) entries: Vec<Entry>,
    /// Names of plain values that stood among the tensors.
    pub(super) scalars: Vec<String>,
    /// What was left out, as sentences.
    pub(super) notes: Vec<String>,
}

impl Container<'_> {
    /// The tensor's bytes, row by row.
    pub(super) fn data(&self, entry: &Entry) -> Result<Cow<'_, [u8]>> {
        data(&self.bytes, entry)
    }

    /// The values of a tensor that lies in the file as it will in memory, without a copy on the way: its pages where these can be had.
    pub(super) fn floats(&self, entry: &Entry) -> Result<Option<Vec<f32>>> {
        let count = (entry.range.end - entry.range.start) / 4;
        match (&self.bytes, &entry.strides, &entry.dtype) {
            (Bytes::File(path, len), None, Ok(DType::F32)) if cfg!(target_endian = "little") && entry.range.end <= *len => {
                let read = at(path, entry.range.start).and_then(|mut file| {
                    if let Some(values) = alloc::floats(&file, entry.range.start, count as usize) {
                        return Ok(values);
                    }
                    let mut values = vec![0f32; count as usize];
                    file.read_exact(bytemuck::cast_slice_mut(&mut values))?;
                    Ok(values)
                });
                read.map(Some).map_err(|e| Error::read(path, e))
            }
            _ => Ok(None),
        }
    }

    /// The tensor, if its type is one of ours.
    pub(super) fn tensor(&self, entry: &Entry) -> Result<Tensor> {
        tensor(&self.place, &self.bytes, entry)
    }
}

fn data<'b>(bytes: &'b Bytes<'_>, entry: &Entry) -> Result<Cow<'b, [u8]>> {
    let bytes = bytes.read(entry.range.clone())?;
    match (&entry.strides, &entry.dtype) {
        (Some(strides), Ok(dtype)) => Ok(Cow::Owned(gather(&bytes, &entry.shape, strides, dtype.size_in_bytes()))),
        _ => Ok(bytes),
    }
}

/// See [`Container::tensor`].
pub(super) fn tensor(place: &str, bytes: &Bytes<'_>, entry: &Entry) -> Result<Tensor> {
    let unsupported = |found| Error::input(place, format!("tensor `{}` has the unsupported type {found}", entry.name));
    let dtype = entry.dtype.clone().map_err(unsupported)?;
    Ok(Tensor::from_raw_buffer(&data(bytes, entry)?, dtype, &entry.shape, &Device::Cpu)?)
}

/// Copies a strided tensor row by row. Offsets lie inside since the extent was checked.
fn gather(bytes: &[u8], shape: &[usize], strides: &[usize], size: usize) -> Vec<u8> {
    let count: usize = shape.iter().product();
    let mut out = Vec::with_capacity(count * size);
    let mut index = vec![0usize; shape.len()];
    for _ in 0..count {
        let at: usize = index.iter().zip(strides).map(|(i, s)| i * s).sum::<usize>() * size;
        out.extend_from_slice(bytes.get(at..at + size).unwrap_or_default());
        for (i, dim) in index.iter_mut().zip(shape).rev() {
            *i += 1;
            if *i < *dim {
                break;
            }
            *i = 0;
        }
    }
    out
}

/// Whether any number is infinite or not a number: its exponent bits are all set.
pub(super) fn non_finite(bytes: &[u8], dtype: DType) -> bool {
    let halves = |mask: u16| bytes.chunks_exact(2).any(|b| u16::from_le_bytes([b[0], b[1]]) & mask == mask);
    match dtype {
        DType::F16 => halves(0x7c00),
        DType::BF16 => halves(0x7f80),
        DType::F32 => bytes.chunks_exact(4).any(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) & 0x7f80_0000 == 0x7f80_0000),
        DType::F64 => bytes.chunks_exact(8).any(|b| !f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]).is_finite()),
        _ => false,
    }
}

/// The number of elements, or nothing where strides could overflow.
pub(super) fn elements(shape: &[usize]) -> Option<usize> {
    let product = shape.iter().filter(|d| **d > 0).try_fold(1usize, |n, d| n.checked_mul(*d))?;
    Some(if shape.contains(&0) { 0 } else { product })
}
