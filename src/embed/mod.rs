//! `peft embed`: features of images and texts in one file, written as they come.
//!
//! Rows go to a directory beside the output (`part`) until all are there, so that memory does not grow with their number and the
//! same command goes on where a kill ended it.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use candle_core::Tensor;

use crate::clip::model::unit_rows;
use crate::data::{is_table, text_cells};
use crate::error::{Error, Report, Result};
use crate::files;
use crate::inputs::{Inputs, MAX_LIST, Other, SHOWN, unreadable};
use crate::model::Model;
use crate::train::{Event, Observer};

mod format;
mod part;

use format::Format;
use part::Part;

/// Images or texts that are embedded at once. Fixed, so that the same rows come out wherever a run was ended.
const CHUNK: usize = 32;

/// Inputs after which the rows so far are on the disk.
const SYNC: usize = if cfg!(test) { 1 } else { 16 } * CHUNK;

/// What to embed.
#[derive(Debug, Clone, Default)]
pub struct EmbedOptions {
    /// Images, directories of them, glob patterns, tables, text files with one path a line.
    pub images: Vec<String>,
    /// A table, or a text file with one text a line; blank lines, and rows without a text, are texts too.
    pub texts: Option<PathBuf>,
    /// The file to write: `.npy` or `.safetensors`.
    pub output: PathBuf,
    /// Divide each row by its Euclidean norm.
    pub normalize: bool,
    /// Leave out images that cannot be read.
    pub skip_bad: bool,
}

/// What was embedded.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Embedded {
    /// The file.
    pub output: PathBuf,
    /// The file of what the rows are of, beside a `.npy`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ids: Option<PathBuf>,
    /// Rows of `image_embeds`.
    pub images: usize,
    /// Rows of `text_embeds`.
    pub texts: usize,
    /// Width of a row.
    pub dim: usize,
    /// Texts that were cut to the model's context.
    pub truncated: usize,
    /// Lines, or rows of a table, without a text; their rows are features of the empty text.
    pub blank: usize,
    /// What was left out: it has no row.
    pub skipped: Vec<Skipped>,
}

/// An image, or a row of a table, without a row.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Skipped {
    /// Its position among the images, from 0; none for a row of a table that names none.
    pub index: Option<usize>,
    /// Why.
    pub error: Report,
}

/// Writes `image_embeds` [N, P] and `text_embeds` [M, P], f32, in input order, with what they are of: in the metadata of a
/// `.safetensors` as JSON arrays under `images` and `texts`; for a `.npy`, which holds one of the two, in `NAME.ids.jsonl`.
///
/// # Errors
/// When an input cannot be read (all of the first images that cannot, at once) or the disk refuses.
pub fn embed(model: &Model, options: &EmbedOptions, observer: &mut dyn Observer) -> Result<Embedded> {
    check_output(options)?;
    let format = Format::of(options)?;
    let mut given = Inputs::default();
    options.images.iter().try_for_each(|images| given.add(images, Other::List))?;
    let texts = options.texts.as_deref().map(|path| read_texts(path, &mut given)).transpose()?;
    given.notes.drain(..).for_each(|note| observer.event(Event::Note(note)));
    if !given.bad.is_empty() && !options.skip_bad {
        return Err(unreadable(&given.bad));
    }
    let images = (!options.images.is_empty()).then_some(given.images);
    if images.is_none() && texts.is_none() {
        return Err(Error::input("embed", "there is nothing to embed").hint("pass --images, --texts or both"));
    }
    format.check(images.as_deref(), texts.as_deref())?;
    let work = Work { model, options, images, texts, format };
    // A user knows the output, not where its rows wait.
    let named = |e: Error| e.moved(&Part::place(&options.output), &options.output);
    let mut part = work.part(observer).map_err(named)?;
    match work.rows(&mut part, observer) {
        Ok(()) => {}
        Err(e) => {
            // What is wrong with the input is not made right by going on; after a fault of the machine the rows are kept.
            if e.exit_code() == 2 {
                part.remove()?;
            }
            return Err(named(e));
        }
    }
    work.finish(part, given.bad).map_err(named)
}

struct Work<'a> {
    model: &'a Model,
    options: &'a EmbedOptions,
    images: Option<Vec<PathBuf>>,
    texts: Option<Vec<String>>,
    format: Format,
}

impl Work<'_> {
    fn dim(&self) -> usize {
        self.model.base().clip.config().projection_dim
    }

    /// The rows that an earlier command of this kind left, or none.
    fn part(&self, observer: &mut dyn Observer) -> Result<Part> {
        let (part, note) = Part::open(&self.options.output, self.dim(), &self.key()?)?;
        if let Some(note) = note {
            observer.event(Event::Note(note));
        }
        Ok(part)
    }

    /// What the rows depend on.
    fn key(&self) -> Result<String> {
        let mut hash = blake3::Hasher::new();
        hash.update(env!("CARGO_PKG_VERSION").as_bytes());
        hash.update(self.model.fingerprint(self.images.is_some(), self.texts.is_some())?.as_bytes());
        hash.update(&[u8::from(self.options.normalize), u8::from(self.options.skip_bad)]);
        for path in self.images.iter().flatten() {
            let meta = std::fs::metadata(path).ok();
            let changed = meta.as_ref().and_then(|m| m.modified().ok()?.duration_since(std::time::UNIX_EPOCH).ok());
            hash.update(format!("{path:?} {:?} {changed:?}\n", meta.map(|m| m.len())).as_bytes());
        }
        self.texts.iter().flatten().for_each(|text| _ = hash.update(format!("{text:?}\n").as_bytes()));
        Ok(hash.finalize().to_hex().to_string())
    }

    fn rows(&self, part: &mut Part, observer: &mut dyn Observer) -> Result<()> {
        if let Some(images) = &self.images {
            self.image_rows(images, part, observer)?;
        }
        if let Some(texts) = &self.texts {
            self.text_rows(texts, part, observer)?;
        }
        part.sync()
    }

    fn image_rows(&self, images: &[PathBuf], part: &mut Part, observer: &mut dyn Observer) -> Result<()> {
        observer.event(Event::Phase("images", Some(images.len())));
        observer.event(Event::Advance(part.state.images.done));
        while part.state.images.done < images.len() {
            let from = part.state.images.done;
            let chunk = &images[from..images.len().min(from + CHUNK)];
            let read = self.model.embed_readable(chunk)?;
            if !read.bad.is_empty() && !self.options.skip_bad {
                let mut bad: Vec<Error> = read.bad.into_iter().map(|(_, e)| e).collect();
                bad.extend(self.model.unreadable(&images[from + chunk.len()..], SHOWN.saturating_sub(bad.len())));
                return Err(unreadable(&bad));
            }
            let skipped = read.bad.iter().map(|(i, e)| Skipped { index: Some(from + i), error: e.report() });
            part.state.skipped.extend(skipped);
            part.add_images(&self.bytes(read.features)?, read.good.len(), chunk.len())?;
            observer.event(Event::Advance(chunk.len()));
            if part.state.images.done.is_multiple_of(SYNC) {
                part.sync()?;
            }
        }
        match part.state.images.rows {
            0 if !images.is_empty() => Err(Error::input("images", format!("none of the {} can be read", images.len()))),
            _ => Ok(()),
        }
    }

    fn text_rows(&self, texts: &[String], part: &mut Part, observer: &mut dyn Observer) -> Result<()> {
        observer.event(Event::Phase("texts", Some(texts.len())));
        observer.event(Event::Advance(part.state.texts.done));
        while part.state.texts.done < texts.len() {
            let from = part.state.texts.done;
            let chunk = &texts[from..texts.len().min(from + CHUNK)];
            let (features, cut) = self.model.embed_texts(chunk)?;
            part.state.truncated += cut;
            part.add_texts(&self.bytes(features)?, chunk.len())?;
            observer.event(Event::Advance(chunk.len()));
            if part.state.texts.done.is_multiple_of(SYNC) {
                part.sync()?;
            }
        }
        Ok(())
    }

    /// Rows as the file has them.
    fn bytes(&self, features: Tensor) -> Result<Vec<u8>> {
        if features.dim(0)? == 0 {
            return Ok(Vec::new());
        }
        let features = if self.options.normalize { unit_rows(&features)? } else { features };
        let numbers = features.to_device(&candle_core::Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(numbers.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    fn finish(self, mut part: Part, bad: Vec<Error>) -> Result<Embedded> {
        let state = part.state.clone();
        let gone: HashSet<usize> = state.skipped.iter().filter_map(|s| s.index).collect();
        let images = self.images.iter().flatten().enumerate().filter(|(i, _)| !gone.contains(i)).map(|(_, p)| p.display().to_string());
        let names = [self.images.is_some().then(|| images.collect()), self.texts.clone()];
        let ids = self.format.write(&self.options.output, &mut part, self.dim(), &names)?;
        part.remove()?;
        let mut skipped: Vec<Skipped> = bad.iter().map(|e| Skipped { index: None, error: e.report() }).collect();
        skipped.extend(state.skipped);
        Ok(Embedded {
            output: self.options.output.clone(),
            ids,
            images: state.images.rows,
            texts: state.texts.rows,
            dim: self.dim(),
            truncated: state.truncated,
            blank: self.texts.iter().flatten().filter(|t| t.is_empty()).count(),
            skipped,
        })
    }
}

/// The lines of a text file, blank ones left out.
///
/// # Errors
/// When the file is missing, no UTF-8, or empty.
pub fn read_lines(path: &Path) -> Result<Vec<String>> {
    files::read_lines(path, MAX_LIST)
}

/// Every row of a table, or every line of a text file, so that rows are lines; white space at their ends says nothing.
fn read_texts(path: &Path, given: &mut Inputs) -> Result<Vec<String>> {
    if is_table(path) {
        let cells = text_cells(path)?;
        if cells.several > 0 {
            given.notes.push(format!("{}: {} rows hold several texts, each of which has a row", path.display(), cells.several));
        }
        // A row that cannot be read is told of once, though images and texts may come from one table.
        let known: HashSet<String> = given.bad.iter().map(ToString::to_string).collect();
        given.bad.extend(cells.bad.into_iter().filter(|e| !known.contains(&e.to_string())));
        return Ok(cells.found);
    }
    let text = files::read_text(path, MAX_LIST)?;
    let lines: Vec<String> = files::lines(&text).map(|l| l.trim_end().to_string()).collect();
    match lines.is_empty() {
        true => Err(Error::input(path.display(), "has no lines")),
        false => Ok(lines),
    }
}

/// An output that would replace what is read, or that cannot be a file, before any work is done.
fn check_output(options: &EmbedOptions) -> Result<()> {
    let out = &options.output;
    if out.is_dir() {
        return Err(Error::input(out.display(), "is a directory, expected a file to write"));
    }
    let same = |path: &Path| path.canonicalize().ok().zip(out.canonicalize().ok()).is_some_and(|(a, b)| a == b);
    let given = options.images.iter().map(Path::new).chain(options.texts.as_deref());
    match given.into_iter().find(|p| same(p)) {
        Some(input) => {
            Err(Error::input(out.display(), format!("would replace the input {}", input.display())).hint("choose another --output"))
        }
        None => Ok(()),
    }
}
