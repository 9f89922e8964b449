//! Tars as `webdataset` writes them: members that share a key are one example, in whatever order the tar has them.
//! Nothing is ever unpacked to disk.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::columns::{Columns, Row, with_columns};
use super::members::{GOES_ON, LeftOut, Member, NO_END, TEXTS, extensions, key_and_extension, no_image, passed_over};
use super::parquet::files;
use super::paths::{Paths, common, missing, splits_of};
use super::shards::{Found, Place, Rows, Shard, Shards, StreamOptions, Streaming};
use super::stored::{Address, Shared, Store};
use super::{DataConfig, Dataset, Raw, Reads, Source, check_classes, shards};
use crate::clip::decode;
use crate::error::{Error, Result};
use crate::files as disk;

/// Larger images are refused, as image files are.
const MAX_IMAGE: u64 = 256 << 20;
/// Larger `.txt`, `.cls` and `.json` members are refused.
const MAX_TEXT: u64 = 16 << 20;

/// Long names and PAX records of a member, which the crate reads into memory, are refused when they have more bytes.
const MAX_HEADERS: u64 = 1 << 20;

/// Class names: a list, or a JSON file with one (or with an object `{"0": "cat", …}`).
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(untagged, expecting = "expected a list of class names such as [cat, dog], or a file that holds one")]
pub enum ClassList {
    /// The names in order.
    Names(Vec<String>),
    /// A file.
    File(PathBuf),
}

with_columns! {
    /// Tar shards. Of the members of a key, an image is the image, `.txt` the text, `.cls` the class (a number or a name), and
    /// what stands in `.json` are columns; a member `caption.txt` is the column `caption`.
    pub struct WebDatasetConfig as "webdataset" {
        /// Files, directories, globs, brace ranges such as `shard-{000000..000012}.tar`. Names such as `train-000.tar` and
        /// `val-000.tar` say the split.
        pub path: Paths,
        /// Shards of their own for validation.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub val: Option<Paths>,
        /// Shards of their own for testing.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub test: Option<Paths>,
        /// Names for the numbers in `.cls`, in order: a list, or a JSON file with one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub classes: Option<ClassList>,
        /// Whether the training split is streamed: `true`, `false`, or `auto`, which streams more than 20 000 rows.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub stream: Option<Streaming>,
        /// Rows that are shuffled at a time where it is streamed; 10 000 when left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub buffer: Option<usize>,
        /// Fewer where their images would have more than so many MiB; 256 when left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub buffer_mib: Option<usize>,
    }
}

/// A set of tars.
#[derive(Debug)]
pub(super) struct TarSet {
    place: String,
    columns: Columns,
    classes: Option<Arc<Vec<String>>>,
    options: StreamOptions,
    shards: Vec<Shard>,
    paths: Vec<PathBuf>,
}

impl ClassList {
    /// The names in order.
    ///
    /// # Errors
    /// When the file cannot be read, or holds neither a list nor an object with the numbers from 0 on.
    pub fn names(&self) -> Result<Vec<String>> {
        let path = match self {
            Self::Names(names) => return Ok(names.clone()),
            Self::File(path) => path,
        };
        let wrong = |found: &str| {
            Error::input(path.display(), format!("expected a JSON list of class names or an object {{\"0\": \"cat\", …}}, found {found}"))
        };
        let value = crate::json::from_slice(&disk::read(path, MAX_TEXT)?).map_err(|e| wrong(&format!("no JSON: {e}")))?;
        let names: Option<Vec<String>> = match &value {
            Value::Array(names) => names.iter().map(|n| n.as_str().map(str::to_string)).collect(),
            Value::Object(names) => (0..names.len()).map(|i| Some(names.get(&i.to_string())?.as_str()?.to_string())).collect(),
            _ => None,
        };
        names.ok_or_else(|| wrong("something else"))
    }
}

impl WebDatasetConfig {
    pub(super) fn set(&self) -> Result<TarSet> {
        self.columns().check()?;
        let paths = files(&self.path, self.val.as_ref(), self.test.as_ref(), "webdataset", &["tar"])?;
        if let Some((path, _)) =
            paths.iter().find(|(p, _)| [".gz", ".tgz", ".zst", ".bz2"].iter().any(|e| p.to_string_lossy().ends_with(e)))
        {
            return Err(Error::input(path.display(), "is compressed, so that nothing can be found in its middle")
                .hint("unpack the compression (`gunzip`); images in a tar are compressed anyway"));
        }
        let classes = self.classes.as_ref().map(ClassList::names).transpose()?;
        if let Some(names) = &classes {
            check_classes("data.webdataset.classes", names)?;
        }
        let root = common(&paths.iter().map(|(p, _)| p.clone()).collect::<Vec<_>>());
        let splits = splits_of(&paths, &root, "webdataset")?;
        let shards = paths.iter().zip(splits).map(|((path, _), split)| Shard {
            name: path.strip_prefix(&root).unwrap_or(path).display().to_string(),
            split,
            row_bytes: largest(path),
        });
        Ok(TarSet {
            place: self.path.to_string(),
            columns: self.columns(),
            classes: classes.map(Arc::new),
            options: StreamOptions::new("webdataset", self.stream, self.buffer, self.buffer_mib)?,
            shards: shards.collect(),
            paths: paths.into_iter().map(|(path, _)| path).collect(),
        })
    }
}

/// How many members are looked at to find out how large rows are.
const LOOKED: usize = 64;

/// The mean size of the first images; 0 where there is none.
fn largest(path: &Path) -> u64 {
    let Ok(mut rows) = TarRows::open(path, None, None) else { return 0 };
    let sizes: Vec<u64> = std::iter::from_fn(|| rows.next())
        .take(LOOKED)
        .filter_map(|row| match row.ok()?.image {
            Place::Part([_, size]) => Some(size),
            _ => None,
        })
        .collect();
    sizes.iter().sum::<u64>() / sizes.len().max(1) as u64
}

impl Source for WebDatasetConfig {
    fn place(&self) -> String {
        self.path.to_string()
    }

    fn read(&self) -> Result<Raw> {
        shards::list(Arc::new(self.set()?))
    }

    fn open(&self, config: &DataConfig, draw: Option<(usize, u64)>, reads: Option<&Reads>) -> Option<Result<Dataset>> {
        Some(self.set().and_then(|set| shards::open(config, Arc::new(set), draw, reads)))
    }

    fn has_own_splits(&self) -> bool {
        self.set().is_ok_and(|set| shards::own_splits(Arc::new(set)))
    }
}

impl Store for TarSet {
    fn bytes(&self, at: Address) -> Result<Vec<u8>> {
        let path = self.path(at.shard as usize)?;
        member(&Shared::new(disk::open(path)?), at.part).map_err(|e| Error::input(self.row_place(at), e))
    }

    fn size(&self, at: Address) -> Option<u64> {
        Some(at.part[1])
    }

    fn row_place(&self, at: Address) -> String {
        let path = self.paths.get(at.shard as usize).map(|p| p.display().to_string()).unwrap_or_default();
        format!("{path}: row {}", at.row)
    }
}

impl TarSet {
    fn path(&self, shard: usize) -> Result<&PathBuf> {
        self.paths.get(shard).ok_or_else(|| Error::fault(&self.place, format!("there is no shard {shard}")))
    }
}

impl Shards for TarSet {
    fn place(&self) -> String {
        self.place.clone()
    }

    fn columns(&self) -> &Columns {
        &self.columns
    }

    fn shards(&self) -> &[Shard] {
        &self.shards
    }

    fn classes(&self) -> Option<Vec<String>> {
        self.classes.as_deref().cloned()
    }

    fn options(&self) -> StreamOptions {
        self.options
    }

    fn notes(&self) -> Vec<String> {
        missing(&self.paths)
    }

    fn numbers_rows(&self) -> bool {
        false
    }

    fn rows(&self, shard: usize) -> Result<Box<dyn Rows>> {
        Ok(Box::new(TarRows::open(self.path(shard)?, self.columns.image.clone(), self.classes.clone())?))
    }
}

/// Reads a member's bytes; its end was compared with the file's.
fn member(file: &Shared, [offset, size]: [u64; 2]) -> std::result::Result<Vec<u8>, String> {
    if size > MAX_IMAGE {
        return Err(format!("the image has {size} bytes, expected at most {MAX_IMAGE}"));
    }
    let mut bytes = vec![0; size as usize];
    file.from(offset).read_exact(&mut bytes).map_err(|e| format!("cannot be read: {e}"))?;
    Ok(bytes)
}

/// Tars are padded to records of 10 kB as a rule; a sparse file may have a terabyte of nothing at its end.
const MAX_ZEROS: u64 = 64 << 20;

/// Goes through a tar.
struct TarRows {
    path: PathBuf,
    file: Shared,
    len: u64,
    /// Where the next header is.
    at: u64,
    pending: Option<Member>,
    number: u64,
    image: Option<String>,
    classes: Option<Arc<Vec<String>>>,
    last: Option<[u64; 2]>,
    left_out: LeftOut,
    /// End marks so far, and whether nothing but zeros is behind the last of them.
    archive: usize,
    ended: bool,
    done: bool,
}

impl TarRows {
    fn open(path: &Path, image: Option<String>, classes: Option<Arc<Vec<String>>>) -> Result<Self> {
        let file = Shared::new(disk::open(path)?);
        let len = file.len().map_err(|e| Error::read(path, e))?;
        let path = path.to_path_buf();
        let left_out = LeftOut::default();
        let (archive, ended, done) = (0, false, false);
        Ok(Self { path, file, len, at: 0, pending: None, number: 0, image, classes, last: None, left_out, archive, ended, done })
    }

    /// Where what follows the zeros begins, in whole blocks; the file's end where so many follow that no tool has written them.
    fn behind_zeros(&self, start: u64) -> Result<u64> {
        let mut from = self.file.from(start);
        let (mut at, mut block) = (start, [0; 512 * 64]);
        loop {
            let read = from.read(&mut block).map_err(|e| Error::read(&self.path, e))?;
            match block[..read].iter().position(|b| *b != 0) {
                Some(byte) => return Ok(start + (at + byte as u64 - start) / 512 * 512),
                None if read == 0 || at - start > MAX_ZEROS => return Ok(self.len),
                None => at += read as u64,
            }
        }
    }

    /// Nothing follows.
    fn end(&mut self) {
        if !std::mem::replace(&mut self.ended, true) {
            self.left_out.tell(NO_END, &self.path.display().to_string());
        }
    }

    /// Looks at the sizes of what stands before a member's own header.
    fn check_headers(&self, start: u64) -> Result<()> {
        let mut at = start;
        let mut header = tar::Header::new_old();
        while self.file.from(at).read_exact(header.as_mut_bytes()).is_ok() {
            let kind = header.entry_type();
            let extends =
                kind.is_gnu_longname() || kind.is_gnu_longlink() || kind.is_pax_local_extensions() || kind.is_pax_global_extensions();
            let Some(size) = header.entry_size().ok().filter(|_| extends) else { break };
            at = at.saturating_add(512).saturating_add(size.div_ceil(512).saturating_mul(512));
            if size > MAX_HEADERS || at - start > 4 * MAX_HEADERS {
                let place = format!("{}: byte {start}", self.path.display());
                return Err(Error::input(place, format!("a name or PAX record has {size} bytes, expected at most {MAX_HEADERS}")));
            }
        }
        Ok(())
    }

    /// The next member that belongs to an example.
    fn member(&mut self) -> Result<Option<Member>> {
        loop {
            let start = self.at;
            if start >= self.len {
                self.end();
                return Ok(None);
            }
            self.check_headers(start)?;
            let mut archive = tar::Archive::new(self.file.window(start));
            let broken =
                |e: std::io::Error| Error::input(format!("{}: byte {start}", self.path.display()), format!("is broken or no tar: {e}"));
            let mut entries = archive.entries_with_seek().map_err(broken)?;
            let Some(entry) = entries.next().transpose().map_err(broken)? else {
                let next = self.behind_zeros(start)?;
                // A long name with no member behind it is an end, too.
                self.at = if next == start { self.len } else { next };
                self.ended = self.at >= self.len && next > start;
                self.archive += 1;
                if !self.ended && self.archive == 1 {
                    self.left_out.tell(GOES_ON, &self.path.display().to_string());
                }
                continue;
            };
            let kind = entry.header().entry_type();
            let (offset, size) = (start + entry.raw_file_position(), entry.size());
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            // Links, directories and devices have no content, whatever size they state.
            let link = kind.is_hard_link() || kind.is_symlink();
            let hollow = link || kind.is_dir() || kind.is_character_special() || kind.is_block_special();
            let end = offset.checked_add(if hollow || kind.is_fifo() { 0 } else { size }).filter(|end| *end <= self.len);
            let Some(end) = end else {
                return Err(Error::input(
                    format!("{}: {name}", self.path.display()),
                    format!("is cut off: the member has {size} bytes from {offset} on, the file ends at {}", self.len),
                ));
            };
            // Members are padded to blocks.
            self.at = end.next_multiple_of(512);
            let outside = name.starts_with('/') || name.split('/').any(|part| part == "..");
            let Some((key, extension)) = key_and_extension(&name).filter(|_| (kind.is_file() || link) && !outside) else {
                if let Some(why) = passed_over(&name, kind) {
                    self.left_out.add(why, &name);
                }
                continue;
            };
            let archive = self.archive;
            return Ok(Some(Member { key: key.into(), extension: extension.to_lowercase(), offset, size, link, archive }));
        }
    }

    /// The members of the next key.
    fn group(&mut self) -> Result<Option<Vec<Member>>> {
        let Some(first) = self.pending.take().map_or_else(|| self.member(), |m| Ok(Some(m)))? else { return Ok(None) };
        let mut members = vec![first];
        loop {
            match self.member()? {
                Some(member) if (&member.key, member.archive) == (&members[0].key, members[0].archive) => members.push(member),
                other => {
                    self.pending = other;
                    return Ok(Some(members));
                }
            }
        }
    }

    fn found(&mut self, members: &[Member]) -> Result<Found> {
        let number = self.number;
        let key = members.first().map(|m| m.key.clone()).unwrap_or_default();
        let place = |extension: &str| format!("{}: row {number} ({key}.{extension})", self.path.display());
        let mut seen: HashMap<&str, &Member> = HashMap::new();
        for member in members {
            if seen.insert(&member.extension, member).is_some() {
                return Err(Error::input(place(&member.extension), "occurs twice").hint(format!(
                    "by webdataset's rule all members with the key `{key}`, up to the first dot of a name, are one example"
                )));
            }
            if member.link && (decode::EXTENSIONS.contains(&member.kind()) || TEXTS.contains(&member.kind())) {
                return Err(Error::input(place(&member.extension), "is a link, which has no content of its own")
                    .hint("write the tar with --dereference --hard-dereference"));
            }
        }
        let mut cells = Row::new();
        // Members of their own say more than what stands in the JSON.
        let json = members.iter().filter(|m| m.extension == "json");
        for member in json.chain(members.iter().filter(|m| m.extension != "json")) {
            let (column, kind) = match member.extension.rsplit_once('.') {
                Some((column, kind)) => (column, kind),
                None => ("", member.extension.as_str()),
            };
            if !TEXTS.contains(&kind) {
                continue;
            }
            let wrong = |what: String| Error::input(place(&member.extension), what);
            if member.size > MAX_TEXT {
                return Err(wrong(format!("has {} bytes, expected at most {MAX_TEXT}", member.size)));
            }
            let bytes = self::member(&self.file, [member.offset, member.size]).map_err(wrong)?;
            let text = disk::text(&place(&member.extension), bytes)?;
            match (column, kind) {
                ("", "txt") => _ = cells.insert("text".into(), text.into()),
                (column, "txt") => _ = cells.insert(column.into(), text.into()),
                (column, "cls") => {
                    let column = if column.is_empty() { "label" } else { column };
                    cells.insert(column.into(), self.class(text.trim()).map_err(wrong)?);
                }
                (column, _) => {
                    match (column, crate::json::from_slice(text.as_bytes()).map_err(|e| wrong(format!("expected JSON: {e}")))?) {
                        ("", Value::Object(object)) => cells.extend(object),
                        ("", _) => return Err(wrong("expected a JSON object".into())),
                        (column, value) => _ = cells.insert(column.into(), value),
                    }
                }
            }
        }
        let wanted = self.image.as_deref();
        let is_image = |m: &&Member| wanted.map_or(decode::EXTENSIONS.contains(&m.extension.as_str()), |w| m.extension == w);
        let images: Vec<&Member> = members.iter().filter(is_image).collect();
        if let [_, second, ..] = images.as_slice() {
            let all = images.iter().map(|m| m.extension.as_str()).collect::<Vec<_>>().join(", ");
            return Err(Error::input(place(&second.extension), format!("is a second image of its key, which has the images {all}"))
                .hint(format!("data.webdataset.image says which is read, such as `image: {}`", second.extension)));
        }
        let image = images.first().map(|m| [m.offset, m.size]);
        let row = || format!("{}: row {number}", self.path.display());
        if let Some((message, hint)) = no_image(members, wanted).filter(|_| image.is_none()) {
            return Err(Error::input(row(), message).hint(hint));
        }
        if image.is_none() && cells.is_empty() {
            return Err(Error::input(row(), format!("`{key}` has neither an image nor a text; its members are {}", extensions(members))));
        }
        let unread = |m: &&Member| !TEXTS.contains(&m.kind()) && image != Some([m.offset, m.size]);
        for member in members.iter().filter(unread) {
            let kind: String = member.kind().chars().take(16).collect();
            self.left_out.add(&format!(".{kind}"), &format!("{key}.{}", member.extension));
        }
        self.last = image;
        Ok(Found { number, key: key.clone(), cells, image: image.map_or(Place::None, Place::Part) })
    }

    fn class(&self, text: &str) -> std::result::Result<Value, String> {
        let Some(names) = self.classes.as_deref() else { return Ok(text.into()) };
        match text.parse::<usize>() {
            // As in `datasets`: no label.
            Err(_) if text == "-1" => Ok(Value::Null),
            Ok(i) => names
                .get(i)
                .map(|n| n.as_str().into())
                .ok_or_else(|| format!("expected a class from 0 to {}, found {i}", names.len().saturating_sub(1))),
            Err(_) if names.iter().any(|n| n == text) => Ok(text.into()),
            Err(_) => Err(format!("expected one of the {} classes or its number, found `{text}`", names.len())),
        }
    }
}

impl Rows for TarRows {
    fn next(&mut self) -> Option<Result<Found>> {
        if self.done {
            return None;
        }
        let members = match self.group() {
            // What holds nothing but links is no example, as in webdataset.
            Ok(Some(members)) if members.iter().all(|m| m.link) => {
                members.iter().for_each(|m| self.left_out.add("that are links", &format!("{}.{}", m.key, m.extension)));
                return self.next();
            }
            Ok(members) => members?,
            Err(error) => {
                // Behind a broken header nothing can be found, and the row before it is not complete.
                self.done = true;
                return Some(Err(error));
            }
        };
        let found = self.found(&members);
        self.number += 1;
        Some(found)
    }

    fn left_out(&self) -> LeftOut {
        self.left_out.clone()
    }

    fn image(&mut self) -> Result<Vec<u8>> {
        let place = || format!("{}: row {}", self.path.display(), self.number.saturating_sub(1));
        let part = self.last.ok_or_else(|| Error::input(place(), "has no image"))?;
        member(&self.file, part).map_err(|e| Error::input(place(), e))
    }
}
