//! Rows in shards: what Parquet files and tars have in common. A set is walked once when it is opened, without its images,
//! to find classes, numbers and broken rows; small sets are then listed, large training splits streamed.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Debug;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::columns::{At, Columns, Row};
use super::members::LeftOut;
use super::rules::{Bad, Fault, Mistake, Rules, Seen};
use super::shared::SharedImages;
use super::stored::{Address, Store, Stored};
use super::stream::Stream;
use super::{DataConfig, Dataset, Example, ImageRef, Raw, RawExample, Reads, Split, SplitConfig, classes, identity, split};
use crate::error::{Error, Result};

/// Training splits with more rows than this are streamed unless told otherwise.
const LISTED: usize = 20_000;

/// Whether the training split is streamed: `true`, `false`, or `auto` (the default), which streams more than 20 000 rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected true, false or auto")]
pub enum Streaming {
    /// Always, or never.
    Fixed(bool),
    /// As the number of rows says.
    Named(Auto),
}

impl Default for Streaming {
    fn default() -> Self {
        Self::Named(Auto::Auto)
    }
}

/// `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Auto {
    /// As the number of rows says.
    Auto,
}

/// How a set of shards is streamed.
#[derive(Debug, Clone, Copy)]
pub(super) struct StreamOptions {
    pub(super) streaming: Streaming,
    /// Rows that are shuffled at a time.
    pub(super) rows: usize,
    /// Bytes that they may have.
    pub(super) bytes: u64,
}

/// Rows that are shuffled at a time, unless told otherwise.
const BUFFER: usize = 10_000;
/// Their images have at most so many MiB, unless told otherwise.
const BUFFER_MIB: usize = 256;

impl StreamOptions {
    pub(super) fn new(place: &str, streaming: Option<Streaming>, rows: Option<usize>, mib: Option<usize>) -> Result<Self> {
        for (key, value) in [("buffer", rows), ("buffer_mib", mib)] {
            if value == Some(0) {
                return Err(Error::input(format!("data.{place}.{key}"), "expected at least 1, found 0"));
            }
        }
        Ok(Self { streaming: streaming.unwrap_or_default(), rows: rows.unwrap_or(BUFFER), bytes: (mib.unwrap_or(BUFFER_MIB) as u64) << 20 })
    }
}

/// One file of rows.
#[derive(Debug)]
pub(super) struct Shard {
    /// Its name in identifiers, relative to what all shards have in common.
    pub(super) name: String,
    /// What its name says.
    pub(super) split: Option<Split>,
    /// Bytes of a row, the image included, on average.
    pub(super) row_bytes: u64,
}

/// A set of shards.
pub(super) trait Shards: Store {
    fn place(&self) -> String;
    fn columns(&self) -> &Columns;
    fn shards(&self) -> &[Shard];
    /// Class names in order, where the set fixes them.
    fn classes(&self) -> Option<Vec<String>>;
    fn options(&self) -> StreamOptions;
    /// What a user should know of the shards as files.
    fn notes(&self) -> Vec<String>;
    /// Whether keys are numbers of rows, which are others where a row comes in before them.
    fn numbers_rows(&self) -> bool;
    /// A shard from its first row on.
    fn rows(&self, shard: usize) -> Result<Box<dyn Rows>>;
}

/// The rows of a shard, one after another.
pub(super) trait Rows {
    /// The next row without its image. A broken row is an error, and reading goes on behind it where that can be.
    fn next(&mut self) -> Option<Result<Found>>;
    /// What was passed over on the way to the row that `next` gave last.
    fn left_out(&self) -> LeftOut {
        LeftOut::default()
    }
    /// The image of the row that `next` gave last.
    fn image(&mut self) -> Result<Vec<u8>>;
}

/// A row without its image.
#[derive(Debug)]
pub(super) struct Found {
    /// From 0, in the shard.
    pub(super) number: u64,
    /// Its name in the shard.
    pub(super) key: String,
    /// Columns and cells.
    pub(super) cells: Row,
    pub(super) image: Place,
}

/// Where a row's image is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Place {
    None,
    File(std::path::PathBuf),
    Part([u64; 2]),
}

/// Which split a row belongs to.
#[derive(Debug, Clone, Default)]
struct Division {
    /// Whether the set has no splits of its own.
    divides: bool,
    seed: u64,
    /// Rows or groups that are not trained on though the set does not say so, by the hash of id or group: 16 bytes for each.
    held_out: HashMap<u64, Split>,
}

impl Division {
    fn split(&self, own: Option<Split>, key: &str) -> Split {
        match own.filter(|_| !self.divides) {
            None | Some(Split::Train) if self.held_out.is_empty() => Split::Train,
            None | Some(Split::Train) => self.held_out.get(&split::rank(split::DRAW, self.seed, key)).copied().unwrap_or(Split::Train),
            Some(split) => split,
        }
    }

    /// The division of a set that is not divided yet.
    fn of(reading: &Reading, own: bool, fractions: &SplitConfig) -> Result<Arc<Self>> {
        let held_out = if own { HashMap::new() } else { Self::draw(reading, fractions)? };
        Ok(Arc::new(Self { divides: !own, seed: fractions.seed, held_out }))
    }

    /// Draws what is held out of the rows that would be trained on, as lists are divided: class by class, without the rows in
    /// memory.
    fn draw(reading: &Reading, fractions: &SplitConfig) -> Result<HashMap<u64, Split>> {
        let mut numbers: HashMap<String, usize> = HashMap::new();
        let mut names: Vec<String> = Vec::new();
        // The lowest class of each unit; the empty name, which no class has, is that of rows without one.
        let mut units: HashMap<u64, usize> = HashMap::new();
        reading.scan(&mut Gathered::default(), &mut |_, row| {
            let Ok(example) = row else { return Ok(()) };
            if example.split != Some(Split::Train) {
                return Ok(());
            }
            let class = example.label.iter().chain(example.labels.iter().flatten()).min().map_or("", String::as_str);
            let number = numbers.get(class).copied().unwrap_or_else(|| {
                names.push(class.to_string());
                numbers.insert(class.to_string(), names.len() - 1);
                names.len() - 1
            });
            let unit = split::rank(split::DRAW, fractions.seed, example.group.as_deref().unwrap_or(&example.id));
            let lowest = units.entry(unit).or_insert(number);
            if names[number] < names[*lowest] {
                *lowest = number;
            }
            Ok(())
        })?;
        let mut classes: Vec<Vec<u64>> = vec![Vec::new(); names.len()];
        units.into_iter().for_each(|(unit, class)| classes[class].push(unit));
        let mut held_out = HashMap::new();
        for mut list in classes {
            list.sort_unstable();
            let (test, all) = split::borders(list.len(), fractions);
            let place = |i| if i < test { Split::Test } else { Split::Val };
            held_out.extend(list.into_iter().take(all).enumerate().map(|(i, unit)| (unit, place(i))));
        }
        Ok(held_out)
    }
}

/// A set of shards and how it is divided.
#[derive(Debug, Clone)]
pub(super) struct Reading {
    pub(super) shards: Arc<dyn Shards>,
    store: Arc<dyn Store>,
    rules: Rules,
    division: Arc<Division>,
    /// Rows that show one image; empty where nothing is divided.
    same: Arc<SharedImages>,
}

/// What [`Reading::next`] gives.
pub(super) enum Next {
    /// An example; its split is set.
    Row(Box<RawExample>),
    Bad(Fault),
    End,
}

impl Reading {
    fn new<S: Shards + 'static>(shards: Arc<S>) -> Self {
        Self { store: shards.clone(), shards, rules: Rules::default(), division: Arc::default(), same: Arc::default() }
    }

    /// Whether names of shards, or a column, say what is trained on and what is tested.
    fn has_own_splits(&self) -> bool {
        let shards = self.shards.shards();
        let column = self.shards.columns().split.as_deref().unwrap_or("split");
        let says = |found: Found| found.cells.get(column).is_some_and(|v| !v.is_null());
        let first = (0..shards.len()).find_map(|s| self.shards.rows(s).ok()?.next()?.ok());
        shards.iter().any(|s| s.split.is_some()) || first.is_some_and(says)
    }

    /// The next row of a shard; `seen` looks at it before the rules change it.
    pub(super) fn next(&self, shard: usize, rows: &mut dyn Rows, seen: Option<&mut Gathered>) -> Next {
        self.next_at(shard, rows, seen).1
    }

    /// The next row of a shard and its number there.
    pub(super) fn next_at(&self, shard: usize, rows: &mut dyn Rows, seen: Option<&mut Gathered>) -> (u64, Next) {
        let found = match rows.next() {
            None => return (0, Next::End),
            Some(Err(error)) => return (0, Next::Bad(Fault::Row(error))),
            Some(Ok(found)) => found,
        };
        let number = found.number;
        match self.example(shard, found, seen) {
            Ok(example) => (number, Next::Row(Box::new(example))),
            Err(fault) => (number, Next::Bad(fault)),
        }
    }

    fn example(&self, shard: usize, found: Found, seen: Option<&mut Gathered>) -> std::result::Result<RawExample, Fault> {
        let Shard { name, split, .. } = &self.shards.shards()[shard];
        let number = found.number;
        let (mut example, key) = self.raw(shard, found).map_err(Fault::Row)?;
        let ignored = seen.map(|seen| {
            seen.rows.add(&example, example.split.or(*split));
            &mut seen.ignored
        });
        self.rules.apply(&mut example, ignored)?;
        self.same.mark((shard as u32, number), &mut example);
        if example.id.is_empty() {
            (example.id, example.by_number) = (format!("{name}:{key}"), self.shards.numbers_rows());
        }
        let group = example.group.as_deref().unwrap_or(&example.id);
        example.split = Some(self.division.split(example.split.or(*split), group));
        Ok(example)
    }

    /// A row as it stands there, and its key.
    fn raw(&self, shard: usize, found: Found) -> Result<(RawExample, String)> {
        let address = Address { shard: shard as u32, row: found.number, part: [0; 2] };
        let place = || self.store.row_place(address);
        let at = At { row: &found.cells, place: &place, flat: false };
        let mut example = self.shards.columns().example(at)?;
        example.image = match found.image {
            Place::Part(part) => ImageRef::Stored(Stored::new(self.store.clone(), Address { part, ..address })),
            Place::File(path) => ImageRef::File(path),
            Place::None if example.texts.is_empty() && example.question.is_none() && !example.mistakes.iter().any(Mistake::is_text) => {
                return Err(Error::input(place(), format!("has neither an image nor a text; {}", at.columns())));
            }
            Place::None => ImageRef::Missing,
        };
        example.place = Some(place());
        Ok((example, found.key))
    }

    /// Every row of every shard, without images.
    pub(super) fn scan(
        &self,
        seen: &mut Gathered,
        each: &mut dyn FnMut(usize, std::result::Result<RawExample, Fault>) -> Result<()>,
    ) -> Result<()> {
        for shard in 0..self.shards.shards().len() {
            let mut rows = match self.shards.rows(shard) {
                Ok(rows) => rows,
                Err(error) => {
                    each(shard, Err(Fault::Row(error)))?;
                    continue;
                }
            };
            loop {
                match self.next(shard, &mut *rows, Some(seen)) {
                    Next::Row(example) => each(shard, Ok(*example))?,
                    Next::Bad(fault) => each(shard, Err(fault))?,
                    Next::End => break,
                }
            }
            seen.left_out.join(&rows.left_out());
        }
        Ok(())
    }
}

/// What is noted on the way through all rows.
#[derive(Default)]
pub(super) struct Gathered {
    rows: Seen,
    /// Cells that cannot be read and perhaps need not be.
    ignored: Bad,
    /// What belongs to no row, or is not read of one.
    left_out: LeftOut,
}

/// Texts of rows that stay in memory have at most so many bytes: Parquet stores a text once, however many rows have it.
const MAX_TEXTS: usize = 1 << 30;

fn text_bytes(e: &RawExample) -> usize {
    let lists = [&e.texts, &e.answers, &e.choices].into_iter().flatten().chain(e.labels.iter().flatten());
    lists.chain([&e.question, &e.label, &e.group].into_iter().flatten()).chain([&e.id]).map(String::len).sum()
}

fn too_much_text(place: &str) -> Error {
    Error::input(place, format!("the texts of its rows have more than {MAX_TEXTS} bytes"))
        .hint("CLIP reads some 77 tokens of a text; shorten them, or stream the training split (`stream: true`)")
}

/// What one walk over all rows finds.
#[derive(Default)]
struct Walk {
    /// Rows of each shard that are trained on.
    train: Vec<usize>,
    listed: Vec<RawExample>,
    held_out: Vec<RawExample>,
    streamed: bool,
    /// Bytes of what is listed.
    texts: usize,
    names: BTreeSet<String>,
    bad: Bad,
    seen: Gathered,
}

fn walk(reading: &Reading, streaming: Streaming) -> Result<Walk> {
    let shards = reading.shards.shards().len();
    let mut walk = Walk { train: vec![0; shards], streamed: streaming == Streaming::Fixed(true), ..Default::default() };
    let fixed = reading.shards.classes().is_some();
    let mut seen = Gathered::default();
    reading.scan(&mut seen, &mut |shard, row| {
        let example = match row {
            Ok(example) => example,
            Err(fault) => {
                walk.bad.add(fault);
                return Ok(());
            }
        };
        if !fixed {
            for name in example.label.iter().chain(example.labels.iter().flatten()) {
                if !walk.names.contains(name) {
                    walk.names.insert(name.clone());
                }
            }
        }
        let kept = example.split != Some(Split::Train) || !walk.streamed;
        walk.texts += if kept { text_bytes(&example) } else { 0 };
        if walk.texts > MAX_TEXTS {
            return Err(too_much_text(&reading.shards.place()));
        }
        if example.split != Some(Split::Train) {
            walk.held_out.push(example);
            return Ok(());
        }
        walk.train[shard] += 1;
        if !walk.streamed {
            walk.listed.push(example);
        }
        if streaming == Streaming::default() && walk.listed.len() > LISTED {
            walk.streamed = true;
            walk.listed = Vec::new();
        }
        Ok(())
    })?;
    walk.seen = seen;
    Ok(walk)
}

/// Every row of a set, undivided.
pub(super) fn list<S: Shards + 'static>(shards: Arc<S>) -> Result<Raw> {
    let mut raw = Raw { classes: shards.classes(), ..Default::default() };
    let (place, told, mut texts) = (shards.place(), shards.notes(), 0);
    let mut seen = Gathered::default();
    Reading::new(shards).scan(&mut seen, &mut |_, row| {
        match row {
            Ok(example) => {
                texts += text_bytes(&example);
                if texts > MAX_TEXTS {
                    return Err(too_much_text(&place));
                }
                raw.examples.push(example);
            }
            Err(Fault::Row(error)) => raw.bad.push(error),
            Err(_) => {}
        }
        Ok(())
    })?;
    raw.notes.extend(seen.left_out.notes());
    raw.notes.extend(told);
    Ok(raw)
}

/// Whether a set says itself what is trained on and what is tested.
pub(super) fn own_splits<S: Shards + 'static>(shards: Arc<S>) -> bool {
    Reading::new(shards).has_own_splits()
}

/// Opens a set of shards: lists what is evaluated, lists or streams what is trained on.
pub(super) fn open<S: Shards + 'static>(
    config: &DataConfig,
    shards: Arc<S>,
    draw: Option<(usize, u64)>,
    reads: Option<&Reads>,
) -> Result<Dataset> {
    let mut reading = Reading::new(shards);
    reading.rules = Rules::new(reads);
    let place = reading.shards.place();
    let own = reading.has_own_splits();
    if own && config.split.is_some() {
        return Err(Error::input("data.split", format!("{place} has splits of its own")).hint("leave `split` out"));
    }
    let fractions = config.split.clone().unwrap_or_default();
    fractions.check()?;
    let mut same = false;
    if !own {
        (reading.same, same) = (Arc::new(SharedImages::find(&reading)?), true);
    }
    reading.division = Division::of(&reading, own, &fractions)?;
    let mut carved = false;
    let mut notes = Vec::new();
    let mut options = reading.shards.options();
    if draw.is_some() && options.streaming != Streaming::Fixed(false) {
        if options.streaming == Streaming::Fixed(true) {
            notes.push("`shots` are drawn from a list, so the training split is not streamed".into());
        }
        options.streaming = Streaming::Fixed(false);
    }
    let mut found = walk(&reading, options.streaming)?;
    let rules = found.seen.rows.rules(reads);
    if rules != reading.rules {
        // Rows that are read in another way are grouped and drawn once more, from the whole set.
        (reading.rules, reading.division) = (rules, Arc::default());
        if same {
            reading.same = Arc::new(SharedImages::find(&reading)?);
        }
        reading.division = Division::of(&reading, own, &fractions)?;
        found = walk(&reading, options.streaming)?;
    }
    if !found.held_out.iter().any(|e| e.split == Some(Split::Val)) {
        if !same {
            (reading.same, same) = (Arc::new(SharedImages::find(&reading)?), true);
        }
        let part = SplitConfig { train: 1.0 - split::VAL_FRACTION, val: split::VAL_FRACTION, test: 0.0, seed: fractions.seed };
        let mut division = Division::clone(&reading.division);
        division.held_out.extend(Division::draw(&reading, &part)?);
        (reading.division, carved) = (Arc::new(division), true);
        found = walk(&reading, options.streaming)?;
    }
    let mut walk = found;
    let total: usize = walk.train.iter().sum();
    let none = total + walk.held_out.len() == 0;
    if walk.bad.count > 0 && (!config.skip_bad || none) {
        return Err(walk.bad.error(none));
    }
    if none {
        return Err(Error::input(place, "there is no row"));
    }
    notes.extend(walk.bad.note());
    notes.extend(walk.seen.rows.notes(&reading.rules));
    notes.extend(walk.seen.ignored.lines());
    notes.extend(walk.seen.left_out.notes());
    notes.extend(reading.shards.notes());
    if carved {
        let count = walk.held_out.iter().filter(|e| e.split == Some(Split::Val)).count();
        notes.push(format!("no validation split: {count} of the training examples serve as one (seed {})", fractions.seed));
    }
    let names = reading.shards.classes().unwrap_or_else(|| ordered(std::mem::take(&mut walk.names)));
    notes.extend(walk.seen.rows.undivided(&names));
    let mut examples = std::mem::take(&mut walk.listed);
    examples.append(&mut walk.held_out);
    if !same {
        notes.extend(identity::join(&place, &mut examples)?);
    }
    let raw = Raw { classes: Some(names), examples, ..Default::default() };
    let (classes, placed, told) = classes(&place, raw)?;
    let plain = DataConfig { split: None, ..config.clone() };
    let mut data = split::divide(&place, &plain, classes, placed, draw)?;
    (data.skipped, data.notes) = (walk.bad.count, [notes, data.notes, told].concat());
    if walk.streamed {
        let stream = Stream::new(reading, walk.train, &data.classes, options, config.skip_bad);
        check_groups(&place, &data, &stream)?;
        data.notes.push(format!("{total} training rows are streamed through a buffer of {}", stream.buffer()));
        data.stream = Some(Arc::new(stream));
    }
    Ok(data)
}

/// Numbers in their order, anything else by the alphabet.
fn ordered(names: BTreeSet<String>) -> Vec<String> {
    let mut names: Vec<String> = names.into_iter().collect();
    if names.iter().all(|n| n.parse::<u64>().is_ok()) {
        names.sort_by_key(|n| n.parse::<u64>().unwrap_or(0));
    }
    names
}

/// A group may not be trained on and evaluated. Only what is evaluated is in memory.
fn check_groups(place: &str, data: &Dataset, stream: &Stream) -> Result<()> {
    let mut groups: HashMap<&str, Split> = HashMap::new();
    for split in [Split::Val, Split::Test] {
        groups.extend(data.split(split).iter().filter_map(|e| Some((e.group.as_deref()?, split))));
    }
    if groups.is_empty() || stream.divides() {
        return Ok(());
    }
    stream.visit(&mut |chunk: &[Example]| {
        for group in chunk.iter().filter_map(|e| e.group.as_deref()) {
            if let Some(split) = groups.get(group) {
                return Err(Error::input(place, format!("group `{group}` is in train and in {split}")));
            }
        }
        Ok(())
    })
}

impl Reading {
    /// Whether splits follow from keys, so that no group can be in two.
    pub(super) fn divides(&self) -> bool {
        self.division.divides
    }
}
