//! Tables whose cells stand between commas or tabs.

use std::cell::{Cell, RefCell};
use std::collections::{HashSet, VecDeque};
use std::io::{BufRead, Read};
use std::path::Path;
use std::rc::Rc;

use serde_json::Value;

use super::table::{Each, MAX_LINE};
use crate::error::{Error, Result};
use crate::files;

/// Stands behind the last row. Where it is part of a cell, a quote was never closed, and rows went into that cell.
const END: &str = "\u{1}end of the table\u{1}";

/// Refuses rows that are longer than any row: what an open quote makes of a large table. Notes where lines end.
struct Capped<R> {
    inner: R,
    /// Bytes since the last row.
    read: Rc<Cell<u64>>,
    breaks: Rc<RefCell<Breaks>>,
}

impl<R: Read> Read for Capped<R> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(out)?;
        self.read.set(self.read.get() + count as u64);
        self.breaks.borrow_mut().pass(&out[..count]);
        match self.read.get() > MAX_LINE {
            true => Err(std::io::Error::other(format!("a row has more than {MAX_LINE} bytes; is a quote left open?"))),
            false => Ok(count),
        }
    }
}

/// Where lines end among the bytes that were read ahead: the reader of rows counts line feeds, stops between the two bytes of a
/// Windows line end, and passes over blank lines.
#[derive(Debug)]
struct Breaks {
    /// Twice the first byte of each line end, and one more where a second byte belongs to it: an open quote may hold millions.
    ends: VecDeque<u64>,
    /// Bytes that have passed.
    passed: u64,
    /// Whether the last of them was a carriage return.
    after_return: bool,
    /// The line that the last row began in.
    line: usize,
}

impl Breaks {
    /// Of a text that begins in `line`.
    fn from(line: usize) -> Self {
        Self { ends: VecDeque::new(), passed: 0, after_return: false, line }
    }

    fn pass(&mut self, bytes: &[u8]) {
        for (at, byte) in (self.passed..).zip(bytes) {
            match (byte, self.ends.back_mut()) {
                // Of a line end whose first byte was a carriage return.
                (b'\n', Some(end)) if self.after_return && *end == 2 * (at - 1) => *end += 1,
                (b'\n' | b'\r', _) => self.ends.push_back(2 * at),
                _ => {}
            }
            self.after_return = *byte == b'\r';
        }
        self.passed += bytes.len() as u64;
    }

    /// The line in which a row begins that the reader has from byte `at` on.
    fn line(&mut self, mut at: u64) -> usize {
        while let Some(end) = self.ends.front().copied().filter(|end| *end / 2 <= at) {
            self.ends.pop_front();
            (self.line, at) = (self.line + 1, at.max(end / 2 + 1 + end % 2));
        }
        self.line
    }
}

/// What Excel's first line says, `sep=;`, and the line's length; nothing where there is no such line.
fn declared(start: &[u8]) -> Option<(u8, usize)> {
    let line = start.split_inclusive(|b| *b == b'\n').next()?;
    match line.trim_ascii_end() {
        [b's' | b'S', b'e' | b'E', b'p' | b'P', b'=', mark @ (b',' | b';' | b'|' | b':')] => Some((*mark, line.len())),
        // A tab is white space at the end of the line.
        b"sep=" | b"SEP=" | b"Sep=" if line.get(4) == Some(&b'\t') => Some((b'\t', line.len())),
        _ => None,
    }
}

/// What stands between the cells of a header. Where the extension's own mark does not occur, spreadsheets have written another.
pub(super) fn mark_of(start: &[u8], usual: u8) -> u8 {
    let line = start.split(|b| [b'\n', b'\r'].contains(b)).next().unwrap_or_default();
    let mut quoted = false;
    let mut count = [(usual, 0), (b';', 0), (b'\t', 0), (b',', 0), (b'|', 0)];
    for byte in line {
        quoted ^= *byte == b'"';
        count.iter_mut().filter(|(mark, _)| !quoted && mark == byte).for_each(|(_, n)| *n += 1);
    }
    count.into_iter().find(|(_, n)| *n > 0).map_or(usual, |(mark, _)| mark)
}

/// Hands on each row with the line that it begins in.
pub(super) fn delimited(path: &Path, usual: u8, each: Each<'_>) -> Result<()> {
    let mut file = files::open_text(path)?;
    let start = file.fill_buf().map_err(|e| Error::read(path, e))?;
    let (delimiter, passed) = declared(start).unwrap_or_else(|| (mark_of(start, usual), 0));
    file.consume(passed);
    let mut rows = Rows::new(path, file, delimiter, 1 + usize::from(passed > 0));
    let Some((first, header)) = rows.next()? else { return Ok(()) };
    let header: Vec<String> = header?.iter().map(|h| h.trim().to_string()).collect();
    let at = |line: usize, message: String| Error::input(format!("{}:{line}", path.display()), message);
    if header.iter().any(|h| h.contains(END)) {
        return if header.len() == 1 && header[0].len() == END.len() { Ok(()) } else { Err(at(first, UNCLOSED.into())) };
    }
    let mut seen = HashSet::new();
    if let Some(twice) = header.iter().find(|h| !h.is_empty() && !seen.insert(*h)) {
        return Err(at(first, format!("the column `{twice}` occurs twice")));
    }
    while let Some((line, record)) = rows.next()? {
        let record = match record {
            Ok(record) => record,
            Err(e) => {
                each(line, Err(e));
                continue;
            }
        };
        if record.iter().any(|c| c.contains(END)) {
            if record.len() > 1 || record[0].len() > END.len() {
                each(line, Err(at(line, UNCLOSED.into())));
            }
            break;
        }
        if record.len() != header.len() {
            each(line, Err(at(line, format!("expected {} cells as in the header, found {}", header.len(), record.len()))));
            continue;
        }
        let cells = record.iter().map(|c| if c.is_empty() { Value::Null } else { Value::String(c.to_string()) });
        each(line, Ok(&header.iter().cloned().zip(cells).collect()));
    }
    Ok(())
}

const UNCLOSED: &str = "a quote that opens in this row is never closed, so that all rows behind it are one cell";

/// The rows of a file, the header among them, each with the line that it begins in.
struct Rows<'a> {
    path: &'a Path,
    reader: csv::Reader<Box<dyn Read>>,
    read: Rc<Cell<u64>>,
    breaks: Rc<RefCell<Breaks>>,
}

impl<'a> Rows<'a> {
    fn new(path: &'a Path, file: impl Read + 'static, delimiter: u8, line: usize) -> Self {
        let (read, breaks) = (Rc::new(Cell::new(0)), Rc::new(RefCell::new(Breaks::from(line))));
        let inner = file.chain(std::io::Cursor::new(format!("\n{END}\n")));
        let capped: Box<dyn Read> = Box::new(Capped { inner, read: read.clone(), breaks: breaks.clone() });
        let reader = csv::ReaderBuilder::new().delimiter(delimiter).flexible(true).has_headers(false).from_reader(capped);
        Self { path, reader, read, breaks }
    }

    /// The next row, or what is wrong with it.
    fn next(&mut self) -> Result<Option<(usize, Result<csv::StringRecord>)>> {
        self.read.set(0);
        let mut record = csv::ByteRecord::new();
        let more = self.reader.read_byte_record(&mut record);
        let line = self.breaks.borrow_mut().line(record.position().map_or(0, csv::Position::byte));
        match more {
            Ok(true) => {}
            Ok(false) => return Ok(None),
            Err(e) => return Err(Error::input(format!("{}:{line}", self.path.display()), e)),
        }
        let text = csv::StringRecord::from_byte_record(record).map_err(|e| {
            let (cell, good) = (e.utf8_error().field(), e.utf8_error().valid_up_to());
            let record = e.into_byte_record();
            let before: usize = record.iter().take(cell).map(files::line_ends).sum();
            let line = line + before + files::line_ends(&record[cell][..good]);
            files::not_utf8(&self.path.display().to_string(), line, None, record[cell][good])
        });
        Ok(Some((line, text)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The lines of good and of bad rows.
    fn lines(bytes: &[u8]) -> Vec<(usize, Option<String>)> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.csv");
        std::fs::write(&path, bytes).unwrap();
        let mut found = Vec::new();
        delimited(&path, b',', &mut |line, row| found.push((line, row.err().map(|e| e.to_string())))).unwrap();
        found
    }

    #[test]
    fn rows_begin_in_the_lines_that_an_editor_counts() {
        let text = "a,b\nx,1\n\n\"two\nlines, and\n\none\",2\ny,3\nz\nw,4";
        for (end, start) in ["\n", "\r\n", "\r"].into_iter().flat_map(|end| ["", "\u{feff}", "sep=,\n"].map(|start| (end, start))) {
            let above = usize::from(start.starts_with("sep"));
            let found = lines(format!("{start}{text}").replace('\n', end).as_bytes());
            let told: Vec<usize> = found.iter().map(|(line, _)| line - above).collect();
            if end == "\r" && above > 0 {
                continue;
            }
            assert_eq!(told, [2, 4, 8, 9, 10], "{end:?} {start:?}");
            assert!(found[3].1.as_ref().unwrap().contains(&format!("t.csv:{}: expected 2 cells", 9 + above)), "{found:?}");
        }
        // Longer than what is read at once, so that line ends are divided.
        for width in 1..9 {
            let rows: String = (0..20_000).map(|i| format!("{},{}\r\n", "x".repeat(width), i % 7)).collect();
            let found = lines(format!("a,b\r\n{rows}").as_bytes());
            assert!(found.iter().map(|(line, _)| *line).eq(2..20_002), "{width}");
        }
    }

    #[test]
    fn a_byte_of_another_encoding_is_found_in_its_line() {
        for end in ["\n", "\r\n", "\r"] {
            let text = "a,b\nx,1\n\"two\nlines \u{fffd}\",2\ny,3\n".replace('\n', end);
            let at = text.find('\u{fffd}').unwrap();
            let bytes = [&text.as_bytes()[..at], b"\xe9", &text.as_bytes()[at + 3..]].concat();
            let found = lines(&bytes);
            assert_eq!(found.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [2, 3, 5], "{end:?}");
            let message = found[1].1.as_ref().unwrap();
            assert!(message.contains("t.csv:4: ") && message.contains("0xe9"), "{message}");
        }
    }
}
