//! Checkpoint files: what HF transformers saves, in any of its containers, under its names; and what OpenAI and open_clip
//! save, brought to these names.

mod check;
mod container;
mod names;
mod open_clip;
mod pickle;
mod plain;
mod safetensors;
mod torch;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use ::safetensors::tensor::{TensorInfo, View};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde_json::Value;

use super::config::ClipConfig;
use super::foreign;
use super::source::Source;
use crate::error::{Error, Result};
use crate::files::Fresh;
use crate::json;
use check::Chosen;
use container::{Bytes, Container};
pub(crate) use open_clip::state_dict;
pub(crate) use plain::{Content, read_torch};
pub use safetensors::{Contents, read_safetensors};

/// The tensors of a base.
#[derive(Debug, Clone)]
pub struct Weights {
    /// By HF name, in the file's type, on the CPU.
    pub tensors: HashMap<String, Tensor>,
    /// The floating type that most tensors have.
    pub dtype: DType,
    /// `blake3:<hex>`, see [`digest`].
    pub digest: String,
    /// What of the files is left out, as sentences.
    pub notes: Vec<String>,
}

/// Where weights may be, in transformers' order of preference.
pub(crate) const FILES: [&str; 4] =
    ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"];

/// Reads a base's weights: one file or shards, safetensors or PyTorch's own format.
///
/// The set must be complete: exactly the tensors of `config`, in floating types, all finite.
/// Buffers such as `position_ids` are left out.
///
/// # Errors
/// When no weights are there, a file is damaged, or tensors are missing, unexpected, misshapen,
/// of another type or not finite; all such tensors are listed in one error.
pub fn load(source: &Source, config: &ClipConfig) -> Result<Weights> {
    let containers = open(source)?;
    // What a single file holds besides its weights has been told with its outline.
    let told = source.checkpoint().is_empty();
    let mut notes: Vec<String> =
        containers.iter().filter(|_| told).flat_map(|c| c.notes.iter().map(move |note| format!("{}: {note}", c.place))).collect();
    let (chosen, beside) = check::choose(source, &containers, config)?;
    notes.extend(beside);
    let read = chosen.par_iter().map(read).collect::<Result<Vec<_>>>()?;
    check::finite(source, chosen.iter().zip(&read).filter(|(_, r)| !r.finite).map(|(c, _)| c.name.as_str()))?;
    let mut parts: Vec<_> = chosen.iter().zip(&read).map(|(c, r)| (c.name.as_str(), &r.tensor, r.hash)).collect();
    let digest = combine(&mut parts)?;
    let dtype = common_dtype(read.iter().map(|r| r.tensor.dtype()));
    let tensors = chosen.into_iter().zip(read).map(|(c, r)| (c.name, r.tensor)).collect();
    Ok(Weights { tensors, dtype, digest, notes })
}

struct Read {
    tensor: Tensor,
    hash: blake3::Hash,
    finite: bool,
}

fn read(chosen: &Chosen<'_>) -> Result<Read> {
    if chosen.shape != chosen.entry.shape && chosen.resize.is_some() {
        return resized(chosen);
    }
    if let Some(values) = chosen.container.floats(chosen.entry)? {
        let bytes: &[u8] = bytemuck::cast_slice(&values);
        let (hash, finite) = (blake3::hash(bytes), !container::non_finite(bytes, chosen.dtype));
        return Ok(Read { tensor: Tensor::from_vec(values, chosen.shape.as_slice(), &Device::Cpu)?, hash, finite });
    }
    let bytes = chosen.container.data(chosen.entry)?;
    let finite = !container::non_finite(&bytes, chosen.dtype);
    let tensor = Tensor::from_raw_buffer(&bytes, chosen.dtype, &chosen.shape, &Device::Cpu)?;
    Ok(Read { tensor, hash: blake3::hash(&bytes), finite })
}

/// Positional embeddings for another number of positions, in the file's type.
fn resized(chosen: &Chosen<'_>) -> Result<Read> {
    let table = chosen.container.tensor(chosen.entry)?;
    let rows = chosen.shape.first().copied().unwrap_or(0);
    let tensor = match chosen.resize {
        Some(how) if chosen.name.starts_with("vision_model.") => foreign::image_positions(&table, rows.saturating_sub(1).isqrt(), how)?,
        _ => foreign::text_positions(&table, rows)?,
    };
    let tensor = tensor.to_dtype(chosen.dtype)?;
    let bytes = tensor.data();
    Ok(Read { finite: !container::non_finite(&bytes, chosen.dtype), hash: blake3::hash(&bytes), tensor: tensor.clone() })
}

fn common_dtype(dtypes: impl Iterator<Item = DType>) -> DType {
    let mut counts = BTreeMap::new();
    for dtype in dtypes {
        counts.entry(dtype.as_str()).or_insert((0usize, dtype)).0 += 1;
    }
    counts.into_values().max_by_key(|(n, _)| *n).map_or(DType::F32, |(_, dtype)| dtype)
}

/// What a checkpoint of OpenAI's or open_clip's holds.
pub(crate) struct Outline {
    /// The shapes of its tensors by open_clip's names.
    pub(crate) shapes: HashMap<String, Vec<usize>>,
    /// Names of plain values among the tensors.
    pub(crate) scalars: Vec<String>,
    /// What of it is left out, as sentences.
    pub(crate) notes: Vec<String>,
}

/// Looks into a checkpoint; no weight is read.
///
/// # Errors
/// When the file is damaged or of an unknown kind.
pub(crate) fn outline(files: &[PathBuf]) -> Result<Outline> {
    let containers = files.iter().map(|file| open_path(file)).collect::<Result<Vec<_>>>()?;
    let (scalars, notes): (Vec<_>, Vec<_>) = containers.iter().map(open_clip::remarks).unzip();
    let shapes = containers.iter().flat_map(open_clip::shapes).collect();
    Ok(Outline { shapes, scalars: scalars.concat(), notes: notes.concat() })
}

/// A file by its content: zip archives are PyTorch's, anything else has to be safetensors.
fn open_path(path: &Path) -> Result<Container<'static>> {
    let (place, bytes) = (path.display().to_string(), Bytes::open(path)?);
    let named = path.extension().is_some_and(|e| e == "safetensors");
    let zipped = bytes.len() >= 2 && bytes.read(0..2)?[..] == *b"PK";
    if named && !zipped { safetensors::open(&place, bytes).map(|(c, _)| c) } else { torch::open(&place, bytes) }
}

/// Opens the first kind of weights that is there.
fn open(source: &Source) -> Result<Vec<Container<'static>>> {
    let checkpoint = source.checkpoint().iter().map(|file| {
        let mut container = open_path(file)?;
        open_clip::translate(&mut container)?;
        Ok(container)
    });
    let checkpoint = checkpoint.collect::<Result<Vec<_>>>()?;
    if !checkpoint.is_empty() {
        return Ok(checkpoint);
    }
    for name in FILES {
        if !exists(source, name)? {
            continue;
        }
        return if name.ends_with(".index.json") { open_shards(source, name) } else { Ok(vec![open_file(source, name)?]) };
    }
    Err(Error::input(source, format!("holds no weights: expected one of {}", FILES.join(", ")))
        .hint("a base is a directory as transformers' save_pretrained writes it"))
}

fn exists(source: &Source, name: &str) -> Result<bool> {
    Ok(source.path(name).is_some() || (source.embedded() && source.read(name)?.is_some()))
}

fn open_file(source: &Source, name: &str) -> Result<Container<'static>> {
    let bytes = match source.path(name) {
        Some(path) => Bytes::open(&path)?,
        None => Bytes::Memory(source.require(name)?),
    };
    let place = source.place(name);
    if name.ends_with(".safetensors") { safetensors::open(&place, bytes).map(|(c, _)| c) } else { torch::open(&place, bytes) }
}

/// Opens the shards that an index names and checks that each holds what it should.
fn open_shards(source: &Source, index: &str) -> Result<Vec<Container<'static>>> {
    let place = source.place(index);
    let shards = shards(&place, &source.require(index)?)?;
    let extension = if index.starts_with("model.") { ".safetensors" } else { ".bin" };
    let mut containers = Vec::with_capacity(shards.len());
    for (file, tensors) in shards {
        if !file.ends_with(extension) {
            return Err(Error::input(&place, format!("names the shard `{file}`, expected a {extension} file")));
        }
        if !exists(source, &file)? {
            return Err(Error::input(
                source.place(&file),
                format!("this shard is missing; {index} names it for {} tensors", tensors.len()),
            )
            .hint("fetch the base again, with all its files"));
        }
        let container = open_file(source, &file)?;
        let held: BTreeSet<String> = container.entries.iter().map(|e| e.name.clone()).collect();
        let lacking: Vec<&String> = tensors.difference(&held).collect();
        if !lacking.is_empty() {
            return Err(Error::input(source.place(&file), format!("lacks what {index} promises: {}", check::list(&lacking))));
        }
        containers.push(container);
    }
    Ok(containers)
}

/// The files that an index names, each with its tensors.
pub(crate) fn shards(place: &str, index: &[u8]) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let json: Value = json::from_slice(index).map_err(|e| Error::input(place, format!("not valid JSON: {e}")))?;
    let Some(map) = json.get("weight_map").and_then(Value::as_object).filter(|m| !m.is_empty()) else {
        return Err(Error::input(place, "expected an object `weight_map` of tensors and their files"));
    };
    let mut shards: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (tensor, file) in map {
        let file = file.as_str().ok_or_else(|| Error::input(place, format!("the file of `{tensor}` is no string")))?;
        shards.entry(shard_name(place, file)?.to_string()).or_default().insert(tensor.clone());
    }
    Ok(shards)
}

/// Shards lie beside their index, nowhere else.
fn shard_name<'a>(place: &str, file: &'a str) -> Result<&'a str> {
    if file.is_empty() || file.starts_with('.') || file.contains(['/', '\\', ':', '\0']) {
        return Err(Error::input(place, format!("names the shard `{file}`, expected a file beside the index")));
    }
    Ok(file)
}

/// What identifies a set of weights, whatever file it came from: `blake3:<hex>`.
///
/// blake3 over the tensors sorted by name; each contributes its name, a zero byte, its type and
/// shape as safetensors writes them (`F32[64,32]`), a zero byte, and the blake3 of its
/// little-endian bytes. Hashing each tensor by itself lets threads share the work.
///
/// # Errors
/// When a tensor's type cannot be saved.
pub fn digest(tensors: &HashMap<String, Tensor>) -> Result<String> {
    let mut parts = tensors
        .par_iter()
        .map(|(name, tensor)| {
            let tensor = plain("digest", name, tensor)?;
            Ok((name.as_str(), tensor.clone(), blake3::hash(&tensor.data())))
        })
        .collect::<Result<Vec<_>>>()?;
    let mut parts: Vec<_> = parts.iter_mut().map(|(name, tensor, hash)| (*name, &*tensor, *hash)).collect();
    combine(&mut parts)
}

fn combine(parts: &mut [(&str, &Tensor, blake3::Hash)]) -> Result<String> {
    parts.sort_by_key(|(name, ..)| *name);
    let mut hasher = blake3::Hasher::new();
    for (name, tensor, hash) in parts {
        let shape: Vec<String> = tensor.dims().iter().map(ToString::to_string).collect();
        hasher.update(format!("{name}\0{}[{}]\0", type_name("digest", name, tensor)?, shape.join(",")).as_bytes());
        hasher.update(hash.as_bytes());
    }
    Ok(format!("blake3:{}", hasher.finalize().to_hex()))
}

/// The format's name of a type, for those that both candle and the format have.
fn type_name(place: &str, name: &str, tensor: &Tensor) -> Result<&'static str> {
    Ok(match tensor.dtype() {
        DType::F64 => "F64",
        DType::F32 => "F32",
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        DType::I64 => "I64",
        DType::I32 => "I32",
        DType::I16 => "I16",
        DType::U32 => "U32",
        DType::U8 => "U8",
        other => return Err(Error::fault(place, format!("tensor `{name}` has the type {}, which cannot be saved", other.as_str()))),
    })
}

/// On the CPU, and of a type that candle's serialisation knows (it panics on others).
fn plain(place: &str, name: &str, tensor: &Tensor) -> Result<Tensor> {
    type_name(place, name, tensor)?;
    Ok(tensor.to_device(&Device::Cpu)?)
}

/// Writes tensors as safetensors with the metadata `{"format": "pt"}`, atomically.
///
/// # Errors
/// When two tensors have one name, a type cannot be saved, or the file cannot be written.
pub fn save(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    save_with(path, tensors, HashMap::from([("format".to_string(), "pt".to_string())]))
}

/// [`save`] with other metadata. One tensor after the other: the file never stands in memory as a whole.
pub(crate) fn save_with(path: &Path, tensors: &[(String, Tensor)], metadata: HashMap<String, String>) -> Result<()> {
    let place = path.display().to_string();
    let mut sorted = BTreeMap::new();
    for (name, tensor) in tensors {
        if sorted.insert(name.as_str(), plain(&place, name, tensor)?).is_some() {
            return Err(Error::fault(&place, format!("two tensors are named `{name}`")));
        }
    }
    // The order of the library's own writer: wider types first, so that every tensor is aligned.
    let mut sorted: Vec<(&str, Tensor)> = sorted.into_iter().collect();
    sorted.sort_by_key(|(_, tensor)| Reverse(View::dtype(tensor)));
    let header = header(&sorted, metadata).map_err(|e| Error::fault(&place, e))?;
    let mut file = Fresh::new(path)?;
    let mut put = |bytes: &[u8]| file.write_all(bytes).map_err(|e| Error::write(path, e));
    put(&(header.len() as u64).to_le_bytes())?;
    put(&header)?;
    sorted.iter().try_for_each(|(_, tensor)| put(&tensor.data()))?;
    file.publish(false)
}

/// The JSON in front of the tensors, filled up to whole words. Keys have an order, so the same content is the same bytes.
fn header(tensors: &[(&str, Tensor)], metadata: HashMap<String, String>) -> serde_json::Result<Vec<u8>> {
    let metadata: BTreeMap<String, String> = metadata.into_iter().collect();
    let mut all = serde_json::Map::new();
    all.insert(safetensors::METADATA.into(), serde_json::to_value(metadata)?);
    let mut end = 0;
    for (name, tensor) in tensors {
        let from = end;
        end += tensor.data_len();
        let info = TensorInfo { dtype: View::dtype(tensor), shape: tensor.dims().to_vec(), data_offsets: (from, end) };
        all.insert((*name).into(), serde_json::to_value(info)?);
    }
    let mut json = serde_json::to_vec(&all)?;
    json.resize(json.len().next_multiple_of(size_of::<u64>()), b' ');
    Ok(json)
}

#[cfg(test)]
mod tests;
