//! Text from strangers: UTF-8 with or without a byte order mark, lines that end as on any system. Everything that reads text or
//! lines of it comes here, so that a mark is never part of a label and another encoding is called by its name.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use super::{open, read};
use crate::error::{Error, Result};

/// UTF-8's byte order mark, which Windows puts at the beginning of a file.
const MARK: &[u8] = b"\xef\xbb\xbf";

/// So many bytes are looked at to tell UTF-16 without a mark: every second byte of it is zero where the text is Latin.
const LOOKED: usize = 4096;

/// A line that is too long is passed over in pieces of so many bytes.
const PIECE: u64 = 1 << 16;

const SAVE: &str = "save it as UTF-8: choose that encoding in the editor or spreadsheet, or run `iconv -f ENCODING -t UTF-8`";

/// The encoding that the first bytes of a file name or show, where it is not UTF-8.
fn foreign(start: &[u8]) -> Option<&'static str> {
    if start.starts_with(b"\xff\xfe\0\0") || start.starts_with(b"\0\0\xfe\xff") {
        return Some("UTF-32");
    }
    if start.starts_with(b"\xff\xfe") || start.starts_with(b"\xfe\xff") {
        return Some("UTF-16");
    }
    let start = &start[..start.len().min(LOOKED)];
    let zeros = |first: usize| start.iter().skip(first).step_by(2).filter(|b| **b == 0).count();
    let most = start.len() / 2;
    // Of text in another script than Latin the blanks and line ends are still zeros, and all on one side.
    let (even, odd) = (zeros(0), zeros(1));
    (most > 0 && even.max(odd) * 4 > most && even.min(odd) * 16 <= even.max(odd)).then_some("UTF-16 without a byte order mark")
}

/// The bytes of a text without a byte order mark.
///
/// # Errors
/// When they are UTF-16 or UTF-32; the message names the encoding.
pub(crate) fn unmarked<'b>(place: &str, bytes: &'b [u8]) -> Result<&'b [u8]> {
    match foreign(bytes) {
        Some(encoding) => Err(Error::input(place, format!("is {encoding}, expected UTF-8")).hint(SAVE)),
        None => Ok(bytes.strip_prefix(MARK).unwrap_or(bytes)),
    }
}

/// Bytes as text, without a byte order mark.
///
/// # Errors
/// When they are not UTF-8: in UTF-16, or with the line and the byte of the first character that is in another encoding.
pub fn text(place: &str, bytes: Vec<u8>) -> Result<String> {
    let bytes = match unmarked(place, &bytes)?.len() {
        length if length == bytes.len() => bytes,
        _ => bytes[MARK.len()..].to_vec(),
    };
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        not_utf8(place, 1 + line_ends(&e.as_bytes()[..at]), Some(at), e.as_bytes()[at])
    })
}

/// The byte of a line that is in another encoding; `at` is where it stands in the file.
pub(crate) fn not_utf8(place: &str, line: usize, at: Option<usize>, byte: u8) -> Error {
    let at = at.map(|at| format!("at {at} ")).unwrap_or_default();
    Error::input(format!("{place}:{line}"), format!("is not UTF-8 text: the byte {at}is {byte:#04x}, as Latin-1 may have it")).hint(SAVE)
}

/// How many lines end in a text, in whichever way.
pub(crate) fn line_ends(text: &[u8]) -> usize {
    let feeds = text.iter().filter(|b| **b == b'\n').count();
    feeds + text.iter().enumerate().filter(|(i, b)| **b == b'\r' && text.get(i + 1) != Some(&b'\n')).count()
}

/// [`read`] of a [`text`].
///
/// # Errors
/// As these two.
pub fn read_text(path: &Path, limit: u64) -> Result<String> {
    text(&path.display().to_string(), read(path, limit)?)
}

/// The lines of a text; they end with a line feed, a carriage return, or both.
pub fn lines(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(text).filter(|t| !t.is_empty());
    std::iter::from_fn(move || {
        let text = rest?;
        let Some(end) = text.find(['\n', '\r']) else { return rest.take() };
        let width = if text[end..].starts_with("\r\n") { 2 } else { 1 };
        rest = Some(&text[end + width..]).filter(|t| !t.is_empty());
        Some(&text[..end])
    })
}

/// The lines of a file without white space at their ends; empty ones are left out.
///
/// # Errors
/// As [`read_text`], and when no line is left.
pub fn read_lines(path: &Path, limit: u64) -> Result<Vec<String>> {
    let text = read_text(path, limit)?;
    let lines: Vec<String> = lines(&text).map(|l| l.trim().to_string()).filter(|l| !l.is_empty()).collect();
    if lines.is_empty() { Err(Error::input(path.display(), "has no lines")) } else { Ok(lines) }
}

/// Opens a text to be read piece by piece, behind its byte order mark.
///
/// # Errors
/// As [`open`], and when it begins as UTF-16 or UTF-32.
pub(crate) fn open_text(path: &Path) -> Result<BufReader<File>> {
    let mut file = BufReader::new(open(path)?);
    let start = file.fill_buf().map_err(|e| Error::read(path, e))?;
    let mark = start.len() - unmarked(&path.display().to_string(), start)?.len();
    file.consume(mark);
    Ok(file)
}

/// The lines of a stream, read when they are wanted: standard input, or a file that is too large to be held.
pub struct Lines<R> {
    inner: R,
    place: String,
    /// Longer lines are refused.
    limit: u64,
    /// The number of the last line, from 1.
    number: usize,
    /// Bytes before the next line.
    at: usize,
    /// Whether nothing can be read behind the last line.
    broken: bool,
    /// Whether the last line was too long, and its rest is still to be passed over.
    within: bool,
    line: Vec<u8>,
}

impl<R: BufRead> Lines<R> {
    /// The lines of `inner`, which messages call `place`, each of at most `limit` bytes.
    pub fn new(place: impl Into<String>, inner: R, limit: u64) -> Self {
        Self { inner, place: place.into(), limit, number: 0, at: 0, broken: false, within: false, line: Vec::new() }
    }

    /// Whether the last line was the end of what can be read: the stream gave way.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Passes over the rest of a line that was too long.
    fn pass(&mut self) -> std::io::Result<()> {
        while self.within {
            self.line.clear();
            let count = self.inner.by_ref().take(PIECE).read_until(b'\n', &mut self.line)?;
            self.within = count > 0 && !self.line.ends_with(b"\n");
            self.at += count;
        }
        Ok(())
    }

    /// The next line with its number, from 1, and without its end.
    ///
    /// # Errors
    /// When it is longer than the limit, not UTF-8, or cannot be read; the next call returns the line behind it.
    pub fn next_line(&mut self) -> Result<Option<(usize, &str)>> {
        self.pass().map_err(|e| {
            self.broken = true;
            Error::read(&self.place, e)
        })?;
        self.line.clear();
        let line = &mut self.line;
        let count = self.inner.by_ref().take(self.limit + 1).read_until(b'\n', line);
        let count = count.map_err(|e| {
            self.broken = true;
            Error::read(&self.place, e)
        })?;
        if count == 0 {
            return Ok(None);
        }
        (self.number, self.at) = (self.number + 1, self.at + count);
        if count as u64 > self.limit {
            self.within = !line.ends_with(b"\n");
            return Err(Error::input(format!("{}:{}", self.place, self.number), format!("the line has more than {} bytes", self.limit)));
        }
        let line = if self.number == 1 { unmarked(&self.place, line)? } else { line };
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        match std::str::from_utf8(line) {
            Ok(line) => Ok(Some((self.number, line))),
            Err(e) => Err(not_utf8(&self.place, self.number, Some(self.at - count + e.valid_up_to()), line[e.valid_up_to()])),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn utf16(text: &str, big: bool) -> Vec<u8> {
        text.encode_utf16().flat_map(|u| if big { u.to_be_bytes() } else { u.to_le_bytes() }).collect()
    }

    #[test]
    fn a_mark_is_no_part_of_the_text() {
        assert_eq!(text("x", b"\xef\xbb\xbfcat\n".to_vec()).unwrap(), "cat\n");
        assert_eq!(text("x", b"cat \xef\xbb\xbf".to_vec()).unwrap(), "cat \u{feff}");
        assert_eq!(text("x", MARK.to_vec()).unwrap(), "");
    }

    #[test]
    fn other_encodings_are_called_by_their_names() {
        for (bytes, name) in [
            ([b"\xff\xfe".to_vec(), utf16("cat", false)].concat(), "is UTF-16,"),
            ([b"\xfe\xff".to_vec(), utf16("cat", true)].concat(), "is UTF-16,"),
            (utf16("cat\ndog\n", false), "is UTF-16 without"),
            (utf16("image,label\n\u{43a}\u{43e}\u{442},1\n", true), "is UTF-16 without"),
            (b"\xff\xfe\0\0c\0\0\0".to_vec(), "is UTF-32"),
            (b"cat\nna\xefve\n".to_vec(), "x:2: is not UTF-8 text: the byte at 6 is 0xef"),
        ] {
            let error = text("x", bytes.clone()).unwrap_err();
            assert!(error.to_string().contains(name) && error.exit_code() == 2, "{error}");
            let mut lines = Lines::new("x", bytes.as_slice(), 100);
            let error = (0..3).find_map(|_| lines.next_line().map(drop).err()).unwrap();
            assert!(error.to_string().contains(name), "{error}");
        }
        // Zeros among other bytes do not make UTF-16.
        assert!(text("x", b"a\0b cat dog bird".to_vec()).is_ok());
    }

    #[test]
    fn lines_end_as_on_any_system() {
        for end in ["\n", "\r\n", "\r"] {
            let text = ["a", "", " b "].map(|l| format!("{l}{end}")).concat();
            assert_eq!(lines(&text).collect::<Vec<_>>(), ["a", "", " b "], "{end:?}");
        }
        assert_eq!(lines("a\n\nb").collect::<Vec<_>>(), ["a", "", "b"]);
        assert_eq!(lines("").count(), 0);
        let mut streamed = Lines::new("x", &b"\xef\xbb\xbfa\r\n\nb"[..], 10);
        let mut found = Vec::new();
        while let Some((number, line)) = streamed.next_line().unwrap() {
            found.push((number, line.to_string()));
        }
        assert_eq!(found, [(1, "a".to_string()), (2, String::new()), (3, "b".into())]);
    }
}
