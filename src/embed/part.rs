//! Rows until all are there: a directory `.part-<output>` with the rows and a state that says how many of them are on the disk.
//!
//! The state is written when the rows that it counts are; what stands behind them is cut off when a command goes on.

use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Skipped;
use crate::error::{Error, Result};
use crate::files::{self, Output};

const STATE: &str = "state.json";
/// The largest state, which names every image that was left out.
const MAX_STATE: u64 = 1 << 30;

/// How far one of the two matrices is.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Side {
    /// Inputs that are dealt with.
    pub(super) done: usize,
    /// Rows that they gave.
    pub(super) rows: usize,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct State {
    /// What the rows depend on.
    key: String,
    pub(super) images: Side,
    pub(super) texts: Side,
    pub(super) truncated: usize,
    pub(super) skipped: Vec<Skipped>,
}

/// See the module.
pub(super) struct Part {
    dir: PathBuf,
    images: Output,
    texts: Output,
    pub(super) state: State,
}

impl Part {
    /// Where the rows of `output` wait.
    pub(super) fn place(output: &Path) -> PathBuf {
        let name = output.file_name().unwrap_or_default().to_string_lossy();
        output.with_file_name(format!(".part-{name}"))
    }

    /// Opens what an earlier command left where it was of the same `key`, and begins otherwise; with a note on either.
    pub(super) fn open(output: &Path, dim: usize, key: &str) -> Result<(Self, Option<String>)> {
        let dir = Self::place(output);
        files::create_dir_all(&dir)?;
        let file = |name: &str| Output::update(&dir.join(name));
        let (mut images, mut texts) = (file("images")?, file("texts")?);
        if matches!(images.file().try_lock(), Err(std::fs::TryLockError::WouldBlock)) {
            return Err(Error::input(output.display(), "is being written by another command").hint("wait for it, or choose another output"));
        }
        let path = dir.join(STATE);
        let before: Option<State> = match files::find_text(&path, MAX_STATE)? {
            Some(text) => serde_json::from_str(&text).ok(),
            None => None,
        };
        let width = (dim * size_of::<f32>()) as u64;
        let mut whole = |state: &State| {
            let has = |file: &mut Output, side: &Side| file.file().metadata().is_ok_and(|m| m.len() >= side.rows as u64 * width);
            has(&mut images, &state.images) && has(&mut texts, &state.texts)
        };
        let (state, note) = match before {
            Some(state) if state.key == key && whole(&state) => {
                let count = state.images.done + state.texts.done;
                let note = (count > 0).then(|| format!("goes on after {count} inputs that an earlier command has embedded"));
                (state, note)
            }
            other => {
                files::remove(&path)?;
                let note =
                    other.map(|_| "begins again: what an earlier command left was made with other inputs, options or weights".into());
                (State { key: key.into(), ..State::default() }, note)
            }
        };
        for (file, side) in [(&mut images, &state.images), (&mut texts, &state.texts)] {
            let end = side.rows as u64 * width;
            file.set_len(end)?;
            file.file().seek(SeekFrom::Start(end)).map_err(|e| Error::read(&dir, e))?;
        }
        Ok((Self { dir, images, texts, state }, note))
    }

    /// Adds `rows` of the next `inputs` images.
    pub(super) fn add_images(&mut self, bytes: &[u8], rows: usize, inputs: usize) -> Result<()> {
        self.images.put(bytes)?;
        self.state.images = Side { done: self.state.images.done + inputs, rows: self.state.images.rows + rows };
        Ok(())
    }

    /// Adds a row for each of the next texts.
    pub(super) fn add_texts(&mut self, bytes: &[u8], rows: usize) -> Result<()> {
        self.texts.put(bytes)?;
        self.state.texts = Side { done: self.state.texts.done + rows, rows: self.state.texts.rows + rows };
        Ok(())
    }

    /// Returns when the rows so far are on the disk and known to be.
    pub(super) fn sync(&self) -> Result<()> {
        self.images.sync()?;
        self.texts.sync()?;
        files::write_json(&self.dir.join(STATE), &self.state)
    }

    /// Hands the rows of images, or of texts, to `put`, piece by piece.
    pub(super) fn copy(&mut self, images: bool, put: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let file = if images { self.images.file() } else { self.texts.file() };
        let fail = |e| Error::read(&self.dir, e);
        file.seek(SeekFrom::Start(0)).map_err(fail)?;
        let mut piece = vec![0; 1 << 20];
        loop {
            match file.read(&mut piece).map_err(fail)? {
                0 => return Ok(()),
                count => put(&piece[..count])?,
            }
        }
    }

    pub(super) fn remove(self) -> Result<()> {
        files::remove(&self.dir)
    }
}
