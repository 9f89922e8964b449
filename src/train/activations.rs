//! Activations below the first trained block, computed once for a whole split.
//!
//! They are used only where they are the same in every epoch: without augmentation and patch dropout.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::clip::{Clip, Trunk};
use crate::error::{Error, Result};
use crate::files::Fresh;

/// `activation_cache: { memory_mib: 1024, disk_mib: 0, directory: runs/activations }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CacheConfig {
    /// Splits up to this size are kept in memory. 0: none.
    pub memory_mib: usize,
    /// Larger ones up to this size are kept on disk and found again by later runs on the same base and data. 0: none.
    pub disk_mib: usize,
    /// Where.
    pub directory: PathBuf,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self { memory_mib: 1024, disk_mib: 0, directory: "runs/activations".into() }
    }
}

/// Where a split's activations go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Memory,
    Disk,
    /// Nowhere: they are too large.
    None,
}

impl CacheConfig {
    /// The place for `count` sequences of `each` floats.
    pub(super) fn place(&self, count: usize, each: usize) -> Place {
        let mib = (count as u64 * each as u64 * 4).div_ceil(1 << 20);
        match mib {
            m if m <= self.memory_mib as u64 => Place::Memory,
            m if m <= self.disk_mib as u64 => Place::Disk,
            _ => Place::None,
        }
    }
}

/// The activations of one split, a row of `tokens × dim` floats for each example.
#[derive(Debug)]
pub struct Bank {
    depth: usize,
    tokens: usize,
    dim: usize,
    rows: Rows,
}

#[derive(Debug)]
enum Rows {
    Memory(Vec<f32>),
    Disk(Mutex<File>, PathBuf),
}

impl Bank {
    /// The examples `indices` on their way through the tower of `clip`.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn trunk(&self, indices: &[usize], clip: &Clip) -> Result<Trunk> {
        let x = self.gather(indices, clip.dtype(), clip.device())?;
        Ok(Trunk { x, pool: Vec::new(), mask: None, depth: self.depth })
    }

    /// Rows of the examples `indices`, [B, T, D].
    fn gather(&self, indices: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        let each = self.tokens * self.dim;
        let mut values = vec![0f32; indices.len() * each];
        for (out, &i) in values.chunks_exact_mut(each).zip(indices) {
            match &self.rows {
                Rows::Memory(all) => out.copy_from_slice(&all[i * each..(i + 1) * each]),
                Rows::Disk(file, path) => read_row(file, i, out).map_err(|e| Error::fault(path.display(), e))?,
            }
        }
        Ok(Tensor::from_vec(values, (indices.len(), self.tokens, self.dim), device)?.to_dtype(dtype)?)
    }
}

fn read_row(file: &Mutex<File>, row: usize, out: &mut [f32]) -> std::io::Result<()> {
    let mut bytes = vec![0u8; out.len() * 4];
    {
        let mut file = file.lock().map_err(|_| std::io::Error::other("another thread failed while reading"))?;
        file.seek(SeekFrom::Start(row as u64 * bytes.len() as u64))?;
        file.read_exact(&mut bytes)?;
    }
    for (value, four) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *value = f32::from_le_bytes(*four);
    }
    Ok(())
}

/// Takes sequences in order and becomes a [`Bank`].
pub(super) struct Builder {
    depth: usize,
    tokens: usize,
    dim: usize,
    count: usize,
    target: Target,
}

enum Target {
    Memory(Vec<f32>),
    Disk(Fresh, PathBuf),
}

impl Builder {
    /// For `count` examples; `file` where they go to disk.
    pub(super) fn new(count: usize, depth: usize, [tokens, dim]: [usize; 2], file: Option<&Path>) -> Result<Self> {
        let target = match file {
            None => Target::Memory(Vec::with_capacity(count * tokens * dim)),
            Some(path) => Target::Disk(Fresh::new(path)?, path.to_path_buf()),
        };
        Ok(Self { depth, tokens, dim, count, target })
    }

    /// The next sequences, [B, T, D].
    pub(super) fn push(&mut self, x: &Tensor) -> Result<()> {
        let values = x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        match &mut self.target {
            Target::Memory(all) => all.extend(values),
            Target::Disk(file, path) => {
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                file.write_all(&bytes).map_err(|e| Error::write(path, e))?;
            }
        }
        Ok(())
    }

    /// All of them.
    pub(super) fn finish(self) -> Result<Bank> {
        let Self { depth, tokens, dim, count, target } = self;
        match target {
            Target::Memory(all) => Ok(Bank { depth, tokens, dim, rows: Rows::Memory(all) }),
            Target::Disk(file, path) => {
                file.publish(false)?;
                open(&path, count, depth, [tokens, dim])?.ok_or_else(|| Error::fault(path.display(), "has the wrong size"))
            }
        }
    }
}

/// What an earlier run left, if it is whole: the file is renamed into place when it is complete.
pub(super) fn open(path: &Path, count: usize, depth: usize, [tokens, dim]: [usize; 2]) -> Result<Option<Bank>> {
    let Ok(file) = File::open(path) else { return Ok(None) };
    let len = file.metadata().map_err(|e| Error::fault(path.display(), e))?.len();
    let whole = len == count as u64 * tokens as u64 * dim as u64 * 4;
    Ok(whole.then(|| Bank { depth, tokens, dim, rows: Rows::Disk(Mutex::new(file), path.to_path_buf()) }))
}
