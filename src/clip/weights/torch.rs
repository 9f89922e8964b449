//! `pytorch_model.bin`, `.pt`: a zip archive of one pickle and raw storages. TorchScript archives are
//! the same with code beside it, which is left alone.

use std::cell::Cell;
use std::collections::HashMap;
use std::io::{Cursor, Read, Seek};
use std::ops::Range;

use zip::{CompressionMethod, ZipArchive};

use candle_core::Tensor;

use super::container::{self, Bytes, Container, Entry, elements};
use super::pickle::{self, Node, Rebuilt, StateDict};
use crate::error::{Error, Result};

/// A CLIP's pickle has some 100 kB.
const MAX_PICKLE: u64 = 16 << 20;

/// Tied weights share a storage; otherwise tensors have no more bytes than their file. More would make a small file large in memory.
const MAX_SHARED: u64 = 2;

/// Where each record lies, or why that is of no use.
type Records = HashMap<String, std::result::Result<Range<u64>, String>>;

/// An archive whose pickle was not looked at yet.
struct Archive<'a> {
    place: String,
    bytes: Bytes<'a>,
    records: Records,
    prefix: String,
    pickle: Range<u64>,
}

/// Reads the archive's directory and its pickle.
pub(super) fn open<'a>(place: &str, bytes: Bytes<'a>) -> Result<Container<'a>> {
    let archive = Archive::open(place, bytes)?;
    let tensors = pickle::state_dict(&archive.bytes.read(archive.pickle.clone())?)
        .map_err(|why| refuse(place, format!("its pickle was refused: {why}")))?;
    archive.container(tensors)
}

/// Plain data around tensors: the content, whose tensors are entries of the container by name.
pub(super) fn open_tree<'a>(place: &str, bytes: Bytes<'a>) -> Result<(Node, Archived<'a>)> {
    let archive = Archive::open(place, bytes)?;
    let tree = pickle::tree(&archive.bytes.read(archive.pickle.clone())?)
        .map_err(|why| refuse(place, format!("its pickle was refused: {why}")))?;
    Ok((tree, Archived { archive, read: Cell::new(0) }))
}

/// What tensors of a tree are read from.
pub(super) struct Archived<'a> {
    archive: Archive<'a>,
    /// Bytes of all tensors so far.
    read: Cell<u64>,
}

impl Archived<'_> {
    /// One tensor.
    pub(super) fn tensor(&self, rebuilt: &Rebuilt) -> Result<Tensor> {
        let archive = &self.archive;
        let len = archive.bytes.len();
        let entry = entry(rebuilt.clone(), &archive.prefix, &archive.records, len).map_err(|why| refuse(&archive.place, why))?;
        self.read.set(self.read.get().saturating_add(entry.range.end - entry.range.start));
        archive.check_shared(self.read.get())?;
        container::tensor(&archive.place, &archive.bytes, &entry)
    }
}

fn refuse(place: &str, why: String) -> Error {
    Error::input(place, format!("is not a usable PyTorch checkpoint: {why}")).hint(HINT)
}

impl<'a> Archive<'a> {
    fn open(place: &str, bytes: Bytes<'a>) -> Result<Self> {
        let refuse = |why: String| refuse(place, why);
        if bytes.len() >= 4 && bytes.read(0..2)?[..] != *b"PK" {
            return Err(refuse("it is no zip archive (PyTorch before 1.6 wrote another format), or it is damaged".into()));
        }
        let records = match &bytes {
            Bytes::File(path, _) => records(std::fs::File::open(path).map_err(|e| Error::read(path, e))?),
            Bytes::Memory(bytes) => records(Cursor::new(bytes)),
        }
        .map_err(refuse)?;
        let (prefix, pickle) = pickle_record(&records).map_err(refuse)?;
        if pickle.end > bytes.len() {
            return Err(refuse("it is cut off".into()));
        }
        if let Some(order) = records.get(&format!("{prefix}byteorder"))
            && bytes.read(order.clone().map_err(refuse)?)?[..] != *b"little"
        {
            return Err(refuse("its numbers are big-endian".into()));
        }
        Ok(Self { place: place.to_string(), bytes, records, prefix, pickle })
    }

    fn check_shared(&self, total: u64) -> Result<()> {
        match total / MAX_SHARED > self.bytes.len() {
            true => Err(refuse(&self.place, format!("its tensors have {total} bytes, many of them in one storage"))),
            false => Ok(()),
        }
    }

    fn container(self, found: StateDict) -> Result<Container<'a>> {
        let StateDict { tensors, scalars, notes } = found;
        let entries: Vec<Entry> = tensors
            .into_iter()
            .map(|tensor| entry(tensor, &self.prefix, &self.records, self.bytes.len()))
            .collect::<std::result::Result<_, _>>()
            .map_err(|why| refuse(&self.place, why))?;
        self.check_shared(entries.iter().map(|e| e.range.end - e.range.start).sum())?;
        Ok(Container { place: self.place, bytes: self.bytes, entries, scalars, notes })
    }
}

const HINT: &str =
    "convert it where it was made: `safetensors.torch.save_file(torch.load(file, weights_only=True), \"model.safetensors\")`";

/// Where the archive's records lie. PyTorch stores tensors uncompressed, so a record is a piece of the file;
/// the code in a TorchScript archive is compressed, and not needed.
fn records(file: impl Read + Seek) -> std::result::Result<Records, String> {
    let mut archive = ZipArchive::new(file).map_err(|e| e.to_string())?;
    let mut records = Records::with_capacity(archive.len());
    for i in 0..archive.len() {
        let record = archive.by_index_raw(i).map_err(|e| e.to_string())?;
        let name = String::from_utf8_lossy(record.name_raw()).into_owned();
        let range = if record.compression() != CompressionMethod::Stored || record.encrypted() {
            Err(format!("record `{name}` is compressed or encrypted"))
        } else {
            let start = record.data_start().ok_or_else(|| format!("record `{name}` has no data"))?;
            let end = start.checked_add(record.size()).ok_or_else(|| format!("record `{name}` is too large"))?;
            Ok(start..end)
        };
        if records.insert(name.clone(), range).is_some() {
            return Err(format!("record `{name}` occurs twice"));
        }
    }
    Ok(records)
}

/// The directory inside the archive, and its `data.pkl`.
fn pickle_record(records: &Records) -> std::result::Result<(String, Range<u64>), String> {
    let mut found = records.iter().filter_map(|(name, range)| Some((name.strip_suffix("data.pkl")?, range)));
    let Some((prefix, range)) = found.find(|(prefix, _)| prefix.is_empty() || prefix.ends_with('/')) else {
        return Err("the archive holds no data.pkl".into());
    };
    let range = range.clone()?;
    if range.end - range.start > MAX_PICKLE {
        return Err(format!("its pickle is larger than {MAX_PICKLE} bytes"));
    }
    Ok((prefix.to_string(), range))
}

fn entry(t: Rebuilt, prefix: &str, records: &Records, len: u64) -> std::result::Result<Entry, String> {
    let outside = || format!("tensor `{}` lies outside its storage", t.name);
    let record = records.get(&format!("{prefix}data/{}", t.key)).ok_or_else(|| format!("the storage of tensor `{}` is missing", t.name))?;
    let record = record.clone()?;
    if record.end > len {
        return Err(format!("it is cut off: the storage of tensor `{}` is not complete", t.name));
    }
    let Ok(dtype) = t.dtype else {
        return Ok(Entry { name: t.name, dtype: t.dtype, shape: t.shape, strides: None, range: record });
    };
    let size = dtype.size_in_bytes() as u64;
    let count = elements(&t.shape).ok_or_else(outside)? as u64;
    let extent = if count == 0 { 0 } else { extent(&t.shape, &t.strides).ok_or_else(outside)? };
    let start = (t.offset as u64).checked_mul(size).and_then(|o| o.checked_add(record.start)).ok_or_else(outside)?;
    let end = extent.checked_mul(size).and_then(|e| e.checked_add(start)).ok_or_else(outside)?;
    // A stride of zero repeats elements; only so can a tensor be larger than its file.
    if end > record.end || count > extent {
        return Err(outside());
    }
    let strides = (!contiguous(&t.shape, &t.strides)).then_some(t.strides);
    Ok(Entry { name: t.name, dtype: Ok(dtype), shape: t.shape, strides, range: start..end })
}

/// One more than the largest element index.
fn extent(shape: &[usize], strides: &[usize]) -> Option<u64> {
    shape.iter().zip(strides).try_fold(1u64, |last, (dim, stride)| {
        let step = (*dim as u64).checked_sub(1)?.checked_mul(*stride as u64)?;
        last.checked_add(step)
    })
}

fn contiguous(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1;
    shape.iter().zip(strides).rev().all(|(dim, stride)| {
        let fits = *dim == 1 || *stride == expected;
        expected *= dim;
        fits
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::borrow::Cow;
    use std::io::Write;

    use super::*;

    /// An archive as PyTorch's, around a pickle and one storage of 16 bytes.
    fn archive(pickle: &[u8], compression: CompressionMethod) -> Vec<u8> {
        let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
        let options = zip::write::SimpleFileOptions::default().compression_method(compression);
        for (name, bytes) in [("archive/data.pkl", pickle), ("archive/data/0", &[0u8; 16])] {
            zip.start_file(name, options).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap().into_inner()
    }

    /// `{"w": tensor}` with this offset, shape and strides; all below 256.
    fn pickle(offset: u8, shape: &[u8], strides: &[u8]) -> Vec<u8> {
        let tuple = |sizes: &[u8]| [b"(".to_vec(), sizes.iter().flat_map(|n| [b'K', *n]).collect(), b"t".to_vec()].concat();
        [
            b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n".to_vec(),
            b"X\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ".to_vec(),
            vec![b'K', offset],
            tuple(shape),
            tuple(strides),
            b"\x89ccollections\nOrderedDict\n)RtRs.".to_vec(),
        ]
        .concat()
    }

    fn refusal(bytes: &[u8]) -> String {
        let error = open("x.bin", Bytes::Memory(Cow::Borrowed(bytes))).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    }

    #[test]
    fn strides_are_followed_and_bounds_kept() {
        let stored = |p: &[u8]| archive(p, CompressionMethod::Stored);
        for (offset, shape, strides) in [(0, &[2u8, 2][..], &[1u8, 2][..]), (1, &[3], &[1]), (0, &[], &[]), (4, &[0], &[1])] {
            let bytes = stored(&pickle(offset, shape, strides));
            let container = open("x.bin", Bytes::Memory(Cow::Borrowed(&bytes))).unwrap();
            let tensor = container.tensor(&container.entries[0]).unwrap();
            assert_eq!(tensor.dims(), shape.iter().map(|n| usize::from(*n)).collect::<Vec<_>>());
        }
        for (offset, shape, strides) in [(1, &[2u8, 2][..], &[2u8, 1][..]), (0, &[200, 200], &[0, 0]), (5, &[1], &[1]), (0, &[3], &[2])] {
            assert!(refusal(&stored(&pickle(offset, shape, strides))).contains("outside its storage"));
        }
        assert!(refusal(&stored(&pickle(0, &[2, 2], &[1]))).contains("more dimensions"));
    }

    /// `__torch__.A`'s object whose attributes follow.
    const OBJECT: &[u8] = b"\x80\x02c__torch__.A\nB\n)\x81q\x01}";

    #[test]
    fn a_scripted_module_is_its_attributes() {
        let inner = pickle(0, &[2, 2], &[2, 1]);
        // The tensor of the state dict above, without its dict.
        let tensor = inner.strip_prefix(b"\x80\x02}X\x01\0\0\0w").unwrap().strip_suffix(b"s.").unwrap();
        let module = [
            OBJECT,
            b"(X\x05\0\0\0childc__torch__.C\nD\n)\x81}X\x01\0\0\0w",
            tensor,
            b"sbX\x04\0\0\0listctorch.jit._pickle\nbuild_intlist\n(]tRub.",
        ]
        .concat();
        let bytes = archive(&module, CompressionMethod::Stored);
        let container = open("x.pt", Bytes::Memory(Cow::Borrowed(&bytes))).unwrap();
        let names: Vec<&str> = container.entries.iter().map(|e| e.name.as_str()).collect();
        assert_eq!(names, ["child.w"]);
    }

    #[test]
    fn scripted_modules_cannot_loop_or_make_objects_of_anything() {
        let own = [OBJECT, b"X\x01\0\0\0ah\x01sb."].concat();
        assert!(refusal(&archive(&own, CompressionMethod::Stored)).contains("nested too deeply"));
        let other = b"\x80\x02ccollections\nOrderedDict\n)\x81.";
        assert!(refusal(&archive(other, CompressionMethod::Stored)).contains("no class of a TorchScript"));
    }

    #[test]
    fn pickles_that_do_more_than_rebuild_tensors_are_refused() {
        let cases: [(&str, &[u8]); 9] = [
            ("posix.system", b"cposix\nsystem\n(X\x02\0\0\0idtR."),
            ("builtins.eval", b"\x80\x04X\x08\0\0\0builtinsX\x04\0\0\0eval\x93."),
            ("opcode 0x69", b"(X\x02\0\0\0idios\nsystem\n."),
            ("ends too early", b"\x80"),
            ("ends too early", b"X\xff\xff\xff\xffabc"),
            ("operand", b"R."),
            ("no state dict", b"K\x01."),
            ("is no tensor", b"}X\x01\0\0\0aK\x01s."),
            ("never stored", b"h\x07."),
        ];
        for (reason, pickle) in cases {
            let message = refusal(&archive(pickle, CompressionMethod::Stored));
            assert!(message.contains(reason), "{reason}: {message}");
        }
        let deep = [vec![b')'], vec![0x85; 1_000_000], b".".to_vec()].concat();
        assert!(refusal(&archive(&deep, CompressionMethod::Stored)).contains("too deeply"));
    }

    /// What is named and not known is made, filled and called without anything happening, and is no tensor.
    #[test]
    fn foreign_objects_beside_weights_are_left_alone() {
        let inner = pickle(0, &[2, 2], &[2, 1]);
        let tensor = inner.strip_prefix(b"\x80\x02}X\x01\0\0\0w").unwrap().strip_suffix(b"s.").unwrap();
        let key = |name: &str| [b"X".to_vec(), (name.len() as u32).to_le_bytes().to_vec(), name.as_bytes().to_vec()].concat();
        let foreign: [&[u8]; 6] = [
            b"cargparse\nNamespace\n)\x81}X\x01\0\0\0aK\x01sb",
            b"cmine\nDict\n)\x81(X\x01\0\0\0aK\x01u",
            b"cmine\nList\n)\x81(K\x01e",
            b"cmine\nmake\n(K\x01tR)R",
            b"cmine\nSet\n)\x81(K\x01\x90",
            b"cmine\nWith\n)}\x92Nb",
        ];
        for value in foreign {
            let wrapped = [b"\x80\x04}(", &*key("odd"), value, &*key("state_dict"), b"}", &*key("w"), tensor, b"su."].concat();
            let flat = [b"\x80\x04}(", &*key("odd"), value, &*key("w"), tensor, b"u."].concat();
            for pickled in [wrapped, flat] {
                let bytes = archive(&pickled, CompressionMethod::Stored);
                let container = open("x.pt", Bytes::Memory(Cow::Borrowed(&bytes))).unwrap();
                assert_eq!(container.entries.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(), ["w"]);
                assert!(container.notes.iter().any(|n| n.contains("`odd`")), "{:?}", container.notes);
            }
        }
        let alone = archive(b"cmine\nModel\n)\x81}b.", CompressionMethod::Stored);
        assert!(refusal(&alone).contains("mine.Model"));
    }

    #[test]
    fn other_archives_are_refused() {
        assert!(refusal(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.").contains("no zip archive"));
        assert!(refusal(b"").contains("usable"));
        assert!(refusal(b"PK\x03\x04").contains("usable"));
        let whole = archive(&pickle(0, &[4], &[1]), CompressionMethod::Stored);
        for cut in 0..whole.len() {
            refusal(&whole[..cut]);
        }
    }

    #[test]
    fn garbled_archives_never_panic() {
        let whole = archive(&pickle(0, &[4], &[1]), CompressionMethod::Stored);
        for at in 0..whole.len() {
            for value in [0, 1, 0x28, 0x7f, 0x80, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] = value;
                if let Ok(container) = open("x.bin", Bytes::Memory(Cow::Borrowed(&bytes))) {
                    for entry in &container.entries {
                        _ = container.tensor(entry);
                    }
                }
            }
        }
    }
}
