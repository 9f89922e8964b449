//! The footer and the pages' headers, before the crate reads them: it believes the sizes that they state, and passes over a list of
//! four billion items that are not there one by one.

use std::io::{BufReader, Read, Result};
use std::path::Path;

use parquet::file::reader::{FileReader, SerializedFileReader};

use crate::data::stored::Shared;
use crate::error::Error;

/// Pages up to this size may be of anything.
const FREE: u64 = 64 << 20;

/// How many times larger a page may become beyond that. Images do not shrink, texts five to ten times.
const MAX_RATIO: u64 = 32;

/// A header holds the smallest and the largest value at most.
const MAX_HEADER: u64 = 16 << 20;

/// The largest footer: a hundred thousand columns in row groups.
const MAX_FOOTER: u64 = 256 << 20;

/// Structs and lists in each other; a page's header has two, the footer seven.
const MAX_DEPTH: usize = 16;

/// The footer's length and the format's name end a file.
const END: u64 = 8;

/// Looks at the footer; what is no footer at all the crate refuses.
pub(super) fn check_footer(path: &Path, file: &Shared, size: u64) -> std::result::Result<(), Error> {
    let mut end = [0; END as usize];
    let from = size.saturating_sub(END);
    file.from(from).read_exact(&mut end).map_err(|_| Error::input(path.display(), format!("is no Parquet: it has {size} bytes")))?;
    let len = u64::from(u32::from_le_bytes([end[0], end[1], end[2], end[3]]));
    if !end.ends_with(b"PAR1") || len > from {
        return Ok(());
    }
    let most = len.min(MAX_FOOTER);
    Compact::new(file, from - len, most, 64 << 10).structure(0, &mut |_, _| ()).map_err(|_| {
        Error::input(path.display(), format!("is broken: the {len} bytes before its last {END} are no footer"))
            .hint("the file may be incomplete; fetch or write it again")
    })
}

/// Looks at the pages of the columns that `is_read` names.
pub(super) fn check(
    path: &Path,
    file: &Shared,
    reader: &SerializedFileReader<Shared>,
    is_read: &dyn Fn(&str) -> bool,
) -> std::result::Result<(), Error> {
    for column in reader.metadata().row_groups().iter().filter(|g| g.num_rows() > 0).flat_map(|g| g.columns()) {
        let name = column.column_path().parts().first().map_or("", String::as_str);
        if !is_read(name) {
            continue;
        }
        let first = column.dictionary_page_offset().map_or(column.data_page_offset(), |at| at.min(column.data_page_offset()));
        let (Ok(mut at), Ok(len)) = (u64::try_from(first), u64::try_from(column.compressed_size())) else { continue };
        let end = at.saturating_add(len);
        while at < end {
            let page = header(file, at, end - at).map_err(|_| {
                Error::input(path.display(), format!("is broken: byte {at} is no header of a page of column `{name}`"))
                    .hint("the file may be incomplete; fetch or write it again")
            })?;
            if page.unpacked > FREE && page.unpacked / MAX_RATIO > page.packed {
                let message = format!("a page of column `{name}` has {} bytes in {}", page.unpacked, page.packed);
                return Err(
                    Error::input(path.display(), message).hint("the file is built to fill the memory, or holds the same again and again")
                );
            }
            at = at.saturating_add(page.header).saturating_add(page.packed).max(at + 1);
        }
    }
    Ok(())
}

/// What a page's header says, and its own size.
#[derive(Default)]
struct Page {
    header: u64,
    unpacked: u64,
    packed: u64,
}

fn header(file: &Shared, at: u64, most: u64) -> Result<Page> {
    let mut reader = Compact::new(file, at, most.min(MAX_HEADER), 512);
    let mut page = Page::default();
    reader.structure(0, &mut |field, value| match field {
        2 => page.unpacked = value,
        3 => page.packed = value,
        _ => {}
    })?;
    page.header = reader.read;
    Ok(page)
}

/// Thrift's compact protocol, of which integers are kept and all else is passed over.
struct Compact {
    inner: BufReader<Shared>,
    read: u64,
    /// Bytes that may be read; what is counted takes one at least.
    most: u64,
}

fn broken() -> std::io::Error {
    std::io::ErrorKind::InvalidData.into()
}

impl Compact {
    fn new(file: &Shared, at: u64, most: u64, buffer: usize) -> Self {
        Self { inner: BufReader::with_capacity(buffer, file.from(at)), read: 0, most }
    }

    fn byte(&mut self) -> Result<u8> {
        let mut byte = [0];
        self.inner.read_exact(&mut byte)?;
        self.take(1)?;
        Ok(byte[0])
    }

    fn varint(&mut self) -> Result<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(broken())
    }

    /// A number that may be negative, which no size is.
    fn number(&mut self) -> Result<u64> {
        let raw = self.varint()?;
        Ok(if raw & 1 == 0 { raw >> 1 } else { 0 })
    }

    fn skip(&mut self, bytes: u64) -> Result<()> {
        self.take(bytes)?;
        self.inner.seek_relative(i64::try_from(bytes).map_err(|_| broken())?)
    }

    fn take(&mut self, bytes: u64) -> Result<()> {
        self.read = self.read.checked_add(bytes).filter(|read| *read <= self.most).ok_or_else(broken)?;
        Ok(())
    }

    fn structure(&mut self, depth: usize, each: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let mut field = 0u64;
        loop {
            let head = self.byte()?;
            if head == 0 {
                return Ok(());
            }
            field = match head >> 4 {
                0 => self.number()?,
                step => field + u64::from(step),
            };
            match head & 0x0f {
                // A truth stands in its type.
                1 | 2 => {}
                4..=6 => {
                    let value = self.number()?;
                    each(field, value);
                }
                kind => self.pass(kind, depth)?,
            }
        }
    }

    /// Passes over a value.
    fn pass(&mut self, kind: u8, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            return Err(broken());
        }
        match kind {
            1..=3 => self.byte().map(drop),
            4..=6 => self.varint().map(drop),
            7 => self.skip(8),
            8 => {
                let len = self.varint()?;
                self.skip(len)
            }
            9 | 10 => {
                let head = self.byte()?;
                let count = if head >> 4 == 15 { self.varint()? } else { u64::from(head >> 4) };
                (0..count).try_for_each(|_| self.pass(head & 0x0f, depth + 1))
            }
            12 => self.structure(depth + 1, &mut |_, _| ()),
            _ => Err(broken()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A data page of 300 bytes from 200, with statistics and a nested header, as the format has it.
    #[test]
    fn sizes_stand_in_the_header() {
        let bytes = [
            0x15, 0x00, 0x15, 0xd8, 0x04, 0x15, 0x90, 0x03, // type 0, 300 unpacked, 200 packed
            0x2c, 0x15, 0x02, 0x15, 0x00, 0x15, 0x06, 0x15, 0x06, 0x1c, 0x18, 0x03, b'a', b'b', b'c', 0x11, 0x00,
            0x00, // a header of its own
            0x00, 0xff,
        ];
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"PAR1").unwrap();
        file.write_all(&bytes).unwrap();
        let file = Shared::new(file);
        let page = header(&file, 4, 1 << 20).unwrap();
        // A list of 2^63 numbers of eight bytes.
        let mut endless = tempfile::tempfile().unwrap();
        endless.write_all(&[0x19, 0xf7, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 0x00]).unwrap();
        assert!(header(&Shared::new(endless), 0, u64::MAX).is_err());
        assert_eq!((page.unpacked, page.packed, page.header), (300, 200, bytes.len() as u64 - 1));
        assert!(header(&file, 4 + bytes.len() as u64, 1 << 20).is_err(), "nothing is there");
        assert!(header(&file, 4, 20).is_err(), "longer than its column");
    }

    #[test]
    fn a_footer_counts_what_is_there() {
        let path = Path::new("x.parquet");
        let refusal = |footer: &[u8]| {
            let mut bytes = [b"PAR1", footer].concat();
            bytes.extend(u32::try_from(footer.len()).unwrap().to_le_bytes());
            bytes.extend(b"PAR1");
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&bytes).unwrap();
            check_footer(path, &Shared::new(file), bytes.len() as u64).err().map(|e| e.to_string())
        };
        // Field 20 is no field of a footer: a list of three truths, of two billion.
        assert_eq!(refusal(&[0x05, 0x28, 0x02, 0x09, 0x28, 0x31, 1, 2, 1, 0]), None);
        let endless = refusal(&[0x05, 0x28, 0x02, 0x09, 0x28, 0xf1, 0xff, 0xff, 0xff, 0xff, 0x07, 0]).unwrap();
        assert!(endless.contains("no footer"), "{endless}");
        let short = check_footer(path, &Shared::new(tempfile::tempfile().unwrap()), 0).unwrap_err().to_string();
        assert!(short.contains("0 bytes"), "{short}");
    }
}
