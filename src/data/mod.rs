//! Examples: where they come from, which split they are in, how they become batches.
//!
//! A source is one file with a `Source` implementation and one line in `DataConfig::source`.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::hub;

pub mod augment;
mod bare;
mod builtin;
mod captions;
mod cells;
mod choose;
mod coco;
mod columns;
mod coop;
mod delimited;
mod example;
mod folder;
mod identity;
pub mod images;
mod labels;
pub mod loader;
mod locate;
mod members;
mod metadata;
mod overlap;
mod parquet;
mod paths;
mod rules;
mod scan;
mod shards;
mod shared;
mod split;
mod stored;
pub mod stream;
mod table;
mod vqa;
mod webdataset;

pub use augment::AugmentConfig;
pub(crate) use cells::{image_cells, is_table, text_cells};
pub use choose::ColumnChoice;
pub use coco::CocoConfig;
pub use columns::ColumnNames;
pub(crate) use coop::is_split;
pub use coop::{CoopConfig, Draw};
pub use example::{Example, ImageRef};
pub use folder::FolderConfig;
pub use images::Images;
pub use labels::check_classes;
pub use loader::{Batch, Loader, Plan};
pub use parquet::ParquetConfig;
pub use paths::Paths;
pub use rules::{Field, Reads};
pub(crate) use scan::images as scan_images;
pub use shards::{Auto, Streaming};
pub use split::{Split, SplitConfig};
pub use stored::Stored;
pub use stream::Stream;
pub use table::TableConfig;
pub use vqa::{VqaConfig, VqaFiles};
pub use webdataset::{ClassList, WebDatasetConfig};

use rules::{Bad, Fault, Seen};

/// Where examples come from: exactly one source, and how it is divided.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Images in one directory a class.
    #[serde(default, deserialize_with = "bare::source")]
    pub folder: Option<FolderConfig>,
    /// A CSV, TSV or JSONL file, a text file of captions, or a directory with `metadata.jsonl` or `metadata.csv`.
    #[serde(default, deserialize_with = "bare::source")]
    pub table: Option<TableConfig>,
    /// Parquet files as Hugging Face `datasets` writes them.
    #[serde(default, deserialize_with = "bare::source", skip_serializing_if = "Option::is_none")]
    pub parquet: Option<ParquetConfig>,
    /// Tars as `webdataset` writes them.
    #[serde(default, deserialize_with = "bare::source", skip_serializing_if = "Option::is_none")]
    pub webdataset: Option<WebDatasetConfig>,
    /// COCO's captions.
    #[serde(default, deserialize_with = "bare::source", skip_serializing_if = "Option::is_none")]
    pub coco: Option<CocoConfig>,
    /// Questions and answers of VQA v2.
    #[serde(default, deserialize_with = "bare::source", skip_serializing_if = "Option::is_none")]
    pub vqa: Option<VqaConfig>,
    /// One of CoOp's few-shot benchmarks in its own layout.
    #[serde(default, deserialize_with = "bare::source", skip_serializing_if = "Option::is_none")]
    pub coop: Option<CoopConfig>,
    /// Data inside the binary: `emoji` or `emoji-flat`.
    #[serde(default)]
    pub builtin: Option<String>,
    /// Fractions of a source that has no splits of its own.
    #[serde(default)]
    pub split: Option<SplitConfig>,
    /// Training examples for each class, drawn by `train.seed`; all when left out.
    #[serde(default)]
    pub shots: Option<usize>,
    /// Leave unreadable images and rows out and count them; otherwise all of them are listed in one error.
    #[serde(default)]
    pub skip_bad: bool,
}

/// A labelled, divided set.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// Class names in label order.
    pub classes: Vec<String>,
    /// What is trained on.
    pub train: Vec<Example>,
    /// What chooses (epoch, learning rate).
    pub val: Vec<Example>,
    /// What is reported.
    pub test: Vec<Example>,
    /// What a user should know: classes with fewer shots than asked, a split that was made.
    pub notes: Vec<String>,
    /// How many unreadable images and rows were left out.
    pub skipped: usize,
    /// What is trained on where it is streamed; `train` is empty then.
    pub stream: Option<Arc<Stream>>,
    /// Whether images are read at all: [`Dataset::verify`] was called.
    pub looked_at: bool,
}

/// An example as a source gives it: as [`Example`], with the names of classes.
#[derive(Debug, Clone, Default)]
pub(crate) struct RawExample {
    pub(crate) id: String,
    pub(crate) by_number: bool,
    pub(crate) image: ImageRef,
    pub(crate) texts: Vec<String>,
    pub(crate) question: Option<String>,
    pub(crate) label: Option<String>,
    pub(crate) labels: Option<Vec<String>>,
    pub(crate) value: Option<f64>,
    pub(crate) fits: Option<bool>,
    pub(crate) answers: Vec<String>,
    pub(crate) choices: Vec<String>,
    pub(crate) group: Option<String>,
    pub(crate) image_key: Option<u128>,
    pub(crate) split: Option<Split>,
    /// Cells that are not what their columns hold; none where the example was checked.
    pub(crate) mistakes: Vec<rules::Mistake>,
    /// File and row, where its name does not say these; nothing where the example was checked.
    pub(crate) place: Option<String>,
}

/// What a source gives.
#[derive(Debug, Default)]
pub(crate) struct Raw {
    /// Class names in order, where the source fixes them.
    pub(crate) classes: Option<Vec<String>>,
    /// What the examples call each class, where that is not its name: ImageNet has two classes `sunglasses`.
    pub(crate) keys: Option<Vec<String>>,
    pub(crate) examples: Vec<RawExample>,
    /// Rows that cannot be read, each with the reason.
    pub(crate) bad: Vec<Error>,
    /// What a user should know.
    pub(crate) notes: Vec<String>,
}

/// A place where examples come from.
pub(crate) trait Source {
    /// What it is called in messages.
    fn place(&self) -> String;
    /// Lists the examples; images are not opened.
    fn read(&self) -> Result<Raw>;
    /// Opens a source of shards, which divides its rows itself and may stream them.
    fn open(&self, _config: &DataConfig, _draw: Option<(usize, u64)>, _reads: Option<&Reads>) -> Option<Result<Dataset>> {
        None
    }
    /// Whether it says itself what is trained on and what is tested.
    fn has_own_splits(&self) -> bool {
        self.read().is_ok_and(|raw| raw.examples.iter().any(|e| e.split.is_some() || e.mistakes.iter().any(rules::Mistake::is_split)))
    }
    /// Lists them with `shots` of each class for training, where the source has its own way of drawing them.
    fn read_few(&self, _shots: usize, _seed: u64) -> Option<Result<Raw>> {
        None
    }
}

impl DataConfig {
    fn source(&self) -> Result<Box<dyn Source>> {
        let sources: [Option<Box<dyn Source>>; 8] = [
            self.folder.clone().map(|c| Box::new(c) as Box<dyn Source>),
            self.table.clone().map(|c| Box::new(c) as Box<dyn Source>),
            self.parquet.clone().map(|c| Box::new(c) as Box<dyn Source>),
            self.webdataset.clone().map(|c| Box::new(c) as Box<dyn Source>),
            self.coco.clone().map(|c| Box::new(c) as Box<dyn Source>),
            self.vqa.clone().map(|c| Box::new(c) as Box<dyn Source>),
            self.coop.clone().map(|c| Box::new(c) as Box<dyn Source>),
            self.builtin.clone().map(|name| Box::new(builtin::Builtin(name)) as Box<dyn Source>),
        ];
        let mut given: Vec<_> = sources.into_iter().flatten().collect();
        match (given.pop(), given.is_empty()) {
            (Some(one), true) => Ok(one),
            (found, _) => Err(Error::input(
                "data",
                format!("expected exactly one source, found {}", given.len() + usize::from(found.is_some())),
            )
            .hint(
                "give one of `folder: { root: DIR }`, `table: { path: FILE }`, `parquet: { path: FILES }`, `webdataset: { path: FILES }`, \
                           `coco: { path: FILE }`, `vqa: { questions: FILE }`, `coop: { root: DIR }`, `builtin: emoji`",
            )),
        }
    }

    /// The same data with nothing streamed.
    #[must_use]
    pub fn listed(&self) -> Self {
        let mut listed = self.clone();
        let never = Some(Streaming::Fixed(false));
        listed.parquet.iter_mut().for_each(|p| p.stream = never);
        listed.webdataset.iter_mut().for_each(|w| w.stream = never);
        listed
    }

    /// The same data with what lies on the hub fetched; `open` wants it so.
    ///
    /// # Errors
    /// When the hub cannot be reached, refuses, or holds no such files.
    pub fn local(&self, progress: &mut hub::Progress<'_>) -> Result<Self> {
        let mut local = self.clone();
        if let Some(p) = &mut local.parquet {
            for paths in [Some(&mut p.path), p.val.as_mut(), p.test.as_mut()].into_iter().flatten().filter(|p| p.is_remote()) {
                *paths = paths.local("data.parquet.path", &["parquet"], progress)?;
            }
        }
        if let Some(w) = &mut local.webdataset {
            for paths in [Some(&mut w.path), w.val.as_mut(), w.test.as_mut()].into_iter().flatten().filter(|p| p.is_remote()) {
                *paths = paths.local("data.webdataset.path", &["tar"], progress)?;
            }
        }
        Ok(local)
    }

    /// [`DataConfig::open_for`] of no task in particular: cells that are not what their columns hold are told of in a note.
    ///
    /// # Errors
    /// As [`DataConfig::open_for`].
    pub fn open(&self, seed: u64) -> Result<Dataset> {
        self.open_as(seed, None)
    }

    /// Reads, divides and samples; `seed` draws the shots. Of each row only what the task `reads` has to be right.
    ///
    /// # Errors
    /// When the source is missing or malformed, rows lack what the task needs, or a split has nothing to show.
    pub fn open_for(&self, seed: u64, reads: &Reads) -> Result<Dataset> {
        self.open_as(seed, Some(reads))
    }

    fn open_as(&self, seed: u64, reads: Option<&Reads>) -> Result<Dataset> {
        if self.shots == Some(0) {
            return Err(Error::input("data.shots", "expected at least 1, found 0").hint("leave it out to use all examples"));
        }
        let source = self.source()?;
        let place = source.place();
        if let Some(data) = source.open(self, self.shots.map(|shots| (shots, seed)), reads) {
            return data;
        }
        let own = self.shots.and_then(|shots| source.read_few(shots, seed));
        let draw = self.shots.filter(|_| own.is_none()).map(|shots| (shots, seed));
        let mut raw = own.unwrap_or_else(|| source.read())?;
        let said = std::mem::take(&mut raw.notes);
        let (bad, notes) = checked(&mut raw, reads);
        if bad.count > 0 && (!self.skip_bad || raw.examples.is_empty()) {
            return Err(bad.error(raw.examples.is_empty()));
        }
        if raw.examples.is_empty() {
            return Err(Error::input(place, "there is no image"));
        }
        let same = identity::join(&place, &mut raw.examples)?;
        let (classes, labelled, told) = classes(&place, raw)?;
        let mut data = split::divide(&place, self, classes, labelled, draw)?;
        data.skipped += bad.count;
        data.notes.extend([said, same, told, notes, bad.note().into_iter().collect()].concat());
        Ok(data)
    }
}

/// Leaves the examples that can be used, as they are to be understood; what is wrong with the others, and notes.
fn checked(raw: &mut Raw, reads: Option<&Reads>) -> (Bad, Vec<String>) {
    let mut seen = Seen::default();
    raw.examples.iter().for_each(|e| seen.add(e, e.split));
    let rules = seen.rules(reads);
    let (mut bad, mut ignored) = (Bad::default(), Bad::default());
    raw.bad.drain(..).for_each(|e| bad.add(Fault::Row(e)));
    raw.examples.retain_mut(|e| rules.apply(e, Some(&mut ignored)).map_err(|fault| bad.add(fault)).is_ok());
    let names: BTreeSet<&String> = raw.examples.iter().flat_map(|e| e.label.iter().chain(e.labels.iter().flatten())).collect();
    let names: Vec<String> = names.into_iter().cloned().collect();
    let mut notes = seen.notes(&rules);
    notes.extend(seen.undivided(&names).filter(|_| raw.keys.is_none()));
    notes.extend(ignored.lines());
    (bad, notes)
}

/// An example and the split that its source put it in.
type Placed = (Example, Option<Split>);

/// Numbers the labels; names are sorted where the source does not fix them.
fn classes(place: &str, raw: Raw) -> Result<(Vec<String>, Vec<Placed>, Vec<String>)> {
    let names = match raw.classes {
        Some(names) => names,
        None => {
            let of = |e: &RawExample| e.label.iter().chain(e.labels.iter().flatten()).cloned().collect::<Vec<_>>();
            let mut names: Vec<String> = raw.examples.iter().flat_map(of).collect();
            names.sort();
            names.dedup();
            names
        }
    };
    let keys = raw.keys.as_ref().unwrap_or(&names);
    let same = check_classes(place, &names);
    let told = match (same, &raw.keys) {
        // Whoever has keys knows that names are not unique.
        (Err(Error::Input(p)), Some(_)) => Some(p.message),
        (same, _) => same.map(|()| None)?,
    };
    let index: HashMap<&str, u32> = keys.iter().enumerate().map(|(i, n)| (n.as_str(), i as u32)).collect();
    let find = |name: &str| index.get(name).copied();
    let number = |e: RawExample| Ok((e.split, numbered(place, names.len(), e, &find)?));
    let examples: Vec<(Option<Split>, Example)> = raw.examples.into_iter().map(number).collect::<Result<_>>()?;
    let examples = examples.into_iter().map(|(split, e)| (e, split)).collect();
    let notes = told.into_iter().chain(labels::look_alikes(&names)).collect();
    Ok((names, examples, notes))
}

/// An example with the numbers of its classes, of which there are `count`.
fn numbered(place: &str, count: usize, e: RawExample, find: &dyn Fn(&str) -> Option<u32>) -> Result<Example> {
    let find = |name: &String| {
        find(name).ok_or_else(|| Error::input(format!("{place}: {}", e.id), format!("label `{name}` is not among the {count} classes")))
    };
    let label = e.label.as_ref().map(find).transpose()?;
    let mut labels = e.labels.as_ref().map(|all| all.iter().map(find).collect::<Result<Vec<u32>>>()).transpose()?;
    if let Some(labels) = &mut labels {
        labels.sort_unstable();
        labels.dedup();
    }
    let RawExample { id, by_number, image, texts, question, value, fits, answers, choices, group, image_key, .. } = e;
    Ok(Example { id, by_number, image, texts, question, label, labels, value, fits, answers, choices, group, image_key, content: None })
}

impl Dataset {
    /// The examples of a split.
    #[must_use]
    pub fn split(&self, split: Split) -> &[Example] {
        match split {
            Split::Train => &self.train,
            Split::Val => &self.val,
            Split::Test => &self.test,
        }
    }

    /// How many examples a split has, streamed ones included.
    #[must_use]
    pub fn count(&self, split: Split) -> usize {
        match &self.stream {
            Some(stream) if split == Split::Train => stream.len(),
            _ => self.split(split).len(),
        }
    }

    /// Every example of a split without its image, a part at a time; a listed split comes as one.
    ///
    /// # Errors
    /// What `each` returns, or when a shard cannot be read.
    pub fn visit(&self, split: Split, each: &mut dyn FnMut(&[Example]) -> Result<()>) -> Result<()> {
        match &self.stream {
            Some(stream) if split == Split::Train => stream.visit(each),
            _ => each(self.split(split)),
        }
    }

    /// What `each` makes of every example of a split, in their order, with digests of images where these are read at all.
    ///
    /// # Errors
    /// When a shard cannot be read.
    pub(crate) fn digested<T: Send>(&self, split: Split, each: &(dyn Fn(&Example) -> T + Sync)) -> Result<Vec<T>> {
        match &self.stream {
            Some(stream) if split == Split::Train => stream.digested(self.looked_at, &|e| each(&e)),
            _ => Ok(self.split(split).iter().map(each).collect()),
        }
    }

    /// The examples of a split; streamed ones are listed, without their images.
    ///
    /// # Errors
    /// When a shard cannot be read.
    pub fn listed(&self, split: Split) -> Result<Cow<'_, [Example]>> {
        match &self.stream {
            Some(stream) if split == Split::Train => stream.list().map(Cow::Owned),
            _ => Ok(Cow::Borrowed(self.split(split))),
        }
    }

    /// Opens every image once, in parallel, and leaves out or lists those that cannot be read.
    ///
    /// # Errors
    /// With all unreadable images at once, unless `skip_bad`.
    pub fn verify(&mut self, images: &Arc<Images>, skip_bad: bool) -> Result<()> {
        const ALL: [Split; 3] = [Split::Train, Split::Val, Split::Test];
        self.looked_at = true;
        let mut bad = [&mut self.train, &mut self.val, &mut self.test].map(|list| images.verify(list));
        // The machine's fault says nothing of an image.
        if let Some((list, at)) = bad.iter_mut().find_map(|list| list.iter().position(|(_, e)| e.exit_code() != 2).map(|at| (list, at))) {
            return Err(list.swap_remove(at).1);
        }
        if !skip_bad && bad.iter().any(|b| !b.is_empty()) {
            let bad: Vec<Error> = bad.into_iter().flatten().map(|(_, e)| e).collect();
            return Err(unreadable("images", bad.len(), &bad));
        }
        for (split, bad) in ALL.into_iter().zip(bad).filter(|(_, bad)| !bad.is_empty()) {
            let drop: std::collections::HashSet<usize> = bad.iter().map(|(i, _)| *i).collect();
            let list = match split {
                Split::Train => &mut self.train,
                Split::Val => &mut self.val,
                Split::Test => &mut self.test,
            };
            let mut index = 0;
            list.retain(|_| {
                index += 1;
                !drop.contains(&(index - 1))
            });
            self.skipped += bad.len();
            self.notes.push(format!("skipped {} unreadable images of {split}; the first: {}", bad.len(), bad[0].1));
        }
        Ok(())
    }
}

/// All at once, so that one pass of repair is enough.
fn unreadable(what: &str, count: usize, bad: &[Error]) -> Error {
    const SHOWN: usize = 50;
    let mut lines: Vec<String> = bad.iter().take(SHOWN).map(|e| format!("  {}", e.to_string().replace('\n', " "))).collect();
    if count > lines.len() {
        lines.push(format!("  and {} more", count - lines.len()));
    }
    Error::input("data", format!("{count} {what} cannot be read:\n{}", lines.join("\n")))
        .hint("repair or remove them, or set `data: { skip_bad: true }` to leave them out")
}
