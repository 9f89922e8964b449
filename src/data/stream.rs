//! A training split that is never in memory: shards in an order of their own each epoch, rows through a shuffle buffer.
//!
//! The order follows from the numbers of rows alone, so it can be replayed without opening a shard: that is how a run
//! goes on in the middle of one.

use std::collections::{HashMap, HashSet, VecDeque};

use peft_adapters::rng;
use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::example::content_of;
use super::identity::key_of;
use super::shards::{Gathered, Next, Reading, Rows, StreamOptions, Streaming};
use super::{Example, ImageRef, RawExample, numbered};
use crate::error::{Error, Result};

/// Examples that [`Stream::visit`] hands over at a time.
const CHUNK: usize = 1024;

/// A streamed training split.
#[derive(Debug)]
pub struct Stream {
    reading: Reading,
    /// Rows of each shard.
    counts: Vec<usize>,
    classes: HashMap<String, u32>,
    class_count: usize,
    buffer: usize,
    fixed: bool,
    skip_bad: bool,
}

/// A row of a stream.
#[derive(Debug)]
pub struct Taken {
    /// Its number among all rows, from 0.
    pub index: usize,
    /// What it says; its image is not in memory.
    pub example: Example,
    /// The bytes of its image; nothing where it has none.
    pub image: Option<Result<Vec<u8>>>,
}

impl Stream {
    pub(super) fn new(reading: Reading, counts: Vec<usize>, classes: &[String], options: StreamOptions, skip_bad: bool) -> Self {
        let row = reading.shards.shards().iter().map(|s| s.row_bytes).max().unwrap_or(1).max(1);
        let buffer = (options.bytes / row).clamp(1, options.rows as u64) as usize;
        let numbers = classes.iter().enumerate().map(|(i, n)| (n.clone(), i as u32)).collect();
        let fixed = options.streaming == Streaming::Fixed(true);
        Self { reading, counts, classes: numbers, class_count: classes.len(), buffer, fixed, skip_bad }
    }

    /// Rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.counts.iter().sum()
    }

    /// Whether there is no row.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Rows that are shuffled at a time.
    #[must_use]
    pub fn buffer(&self) -> usize {
        self.buffer
    }

    /// Whether the recipe asked for it (`stream: true`), so that nothing may list the rows to save time.
    #[must_use]
    pub fn is_fixed(&self) -> bool {
        self.fixed
    }

    /// Whether images that cannot be read are left out.
    #[must_use]
    pub fn skips(&self) -> bool {
        self.skip_bad
    }

    pub(super) fn divides(&self) -> bool {
        self.reading.divides()
    }

    fn example(&self, raw: RawExample) -> Result<Example> {
        let find = |name: &str| self.classes.get(name).copied();
        numbered(&self.reading.shards.place(), self.class_count, raw, &find)
    }

    /// Every row once, in the order of the shards, without images; `each` sees some at a time.
    ///
    /// # Errors
    /// What `each` returns, or when a shard has changed.
    pub fn visit(&self, each: &mut dyn FnMut(&[Example]) -> Result<()>) -> Result<()> {
        let mut chunk = Vec::with_capacity(CHUNK);
        self.reading.scan(&mut Gathered::default(), &mut |_, row| {
            // Broken rows were told of when the set was opened.
            let Ok(raw) = row else { return Ok(()) };
            if raw.split == Some(super::Split::Train) {
                chunk.push(self.example(raw)?);
            }
            if chunk.len() == CHUNK {
                each(&chunk)?;
                chunk.clear();
            }
            Ok(())
        })?;
        if chunk.is_empty() { Ok(()) } else { each(&chunk) }
    }

    /// What `each` makes of every row, in the order of the shards, several of which are read at a time. With `images` these are read
    /// once for their digest, and are not kept.
    ///
    /// # Errors
    /// When a shard cannot be read; images that cannot be read are told of when they are trained on, and have no digest here.
    pub(crate) fn digested<T: Send>(&self, images: bool, each: &(dyn Fn(Example) -> T + Sync)) -> Result<Vec<T>> {
        let shards = self.counts.len();
        let parts = (0..shards).into_par_iter().map(|shard| self.digested_shard(shard, images, each)).collect::<Result<Vec<_>>>()?;
        Ok(parts.into_iter().flatten().collect())
    }

    fn digested_shard<T>(&self, shard: usize, images: bool, each: &dyn Fn(Example) -> T) -> Result<Vec<T>> {
        let mut found = Vec::with_capacity(self.counts[shard]);
        if self.counts[shard] == 0 {
            return Ok(found);
        }
        let mut rows = self.reading.shards.rows(shard)?;
        loop {
            let raw = match self.reading.next(shard, &mut *rows, None) {
                Next::End => return Ok(found),
                Next::Row(raw) if raw.split == Some(super::Split::Train) => raw,
                Next::Row(_) | Next::Bad(_) => continue,
            };
            let mut example = self.example(*raw)?;
            example.content = match images.then(|| bytes_of(&example, &mut *rows)).flatten() {
                Some(Ok(bytes)) => Some(content_of(&bytes)),
                Some(Err(error)) if error.exit_code() != 2 => return Err(error),
                _ => None,
            };
            found.push(each(example));
        }
    }

    /// All rows at once, without images, for what needs to see them by number.
    ///
    /// # Errors
    /// When a shard has changed.
    pub fn list(&self) -> Result<Vec<Example>> {
        let mut all = Vec::with_capacity(self.len());
        self.visit(&mut |chunk| {
            all.extend_from_slice(chunk);
            Ok(())
        })?;
        Ok(all)
    }

    /// The rows of an epoch in order, from the one behind `done` on.
    #[must_use]
    pub fn epoch(&self, seed: u64, epoch: usize, shuffle: bool, done: usize) -> Feed<'_> {
        let mut order = Order::new(&self.counts, self.buffer, shuffle.then_some((seed, epoch as u64)));
        for _ in 0..done {
            order.next();
        }
        // Of the rows that were read before, only those that still wait are wanted again.
        let wanted = order.waiting.iter().copied().collect();
        Feed { stream: self, shards: order.shards.clone(), behind: order.drawn, order, wanted, cursor: None, held: HashMap::new(), peak: 0 }
    }
}

/// The order of an epoch: row numbers, none of them read.
struct Order {
    /// Shards in their order: number, first row, rows.
    shards: VecDeque<(usize, usize, usize)>,
    /// Rows of the shards that have not been drawn from.
    ahead: VecDeque<(usize, usize)>,
    waiting: Vec<usize>,
    /// Rows that have come into the buffer.
    drawn: usize,
    capacity: usize,
    rng: Option<ChaCha8Rng>,
}

impl Order {
    fn new(counts: &[usize], capacity: usize, shuffle: Option<(u64, u64)>) -> Self {
        let mut first = 0;
        let mut shards: Vec<(usize, usize, usize)> = Vec::with_capacity(counts.len());
        for (shard, &count) in counts.iter().enumerate() {
            shards.push((shard, first, count));
            first += count;
        }
        if let Some((seed, epoch)) = shuffle {
            shards.shuffle(&mut rng::rng(seed, &[rng::name_key("shards"), epoch]));
        }
        let rng = shuffle.map(|(seed, epoch)| rng::rng(seed, &[rng::name_key("buffer"), epoch]));
        let capacity = if rng.is_some() { capacity } else { 1 };
        let ahead = shards.iter().map(|&(_, first, count)| (first, first + count)).collect();
        Self { shards: shards.into(), ahead, waiting: Vec::new(), drawn: 0, capacity, rng }
    }

    fn incoming(&mut self) -> Option<usize> {
        while let Some((at, end)) = self.ahead.front_mut() {
            if at < end {
                *at += 1;
                self.drawn += 1;
                return Some(*at - 1);
            }
            self.ahead.pop_front();
        }
        None
    }

    fn next(&mut self) -> Option<usize> {
        while self.waiting.len() < self.capacity {
            match self.incoming() {
                Some(row) => self.waiting.push(row),
                None => break,
            }
        }
        if self.waiting.is_empty() {
            return None;
        }
        let count = self.waiting.len();
        let at = self.rng.as_mut().map_or(0, |rng| rng.random_range(0..count as u64) as usize);
        Some(self.waiting.swap_remove(at))
    }
}

/// The rows of an epoch, one after another.
pub struct Feed<'a> {
    stream: &'a Stream,
    order: Order,
    /// Shards that have not been begun.
    shards: VecDeque<(usize, usize, usize)>,
    /// Rows from the beginning of the epoch of which only the wanted ones are read.
    behind: usize,
    wanted: HashSet<usize>,
    cursor: Option<Cursor>,
    held: HashMap<usize, Held>,
    peak: usize,
}

/// A row that waits, and the bytes of its image.
type Held = (Example, Option<Result<Vec<u8>>>);

/// Where reading stands.
struct Cursor {
    shard: usize,
    rows: Box<dyn Rows>,
    /// The next row's number, and the one behind the shard's last.
    next: usize,
    end: usize,
}

impl Feed<'_> {
    /// The most rows that were in memory at a time.
    #[must_use]
    pub fn peak(&self) -> usize {
        self.peak
    }

    /// The next row; nothing at the epoch's end.
    ///
    /// # Errors
    /// When a shard is not what it was when the set was opened. An image that cannot be read is part of the row.
    pub fn next_row(&mut self) -> Result<Option<Taken>> {
        let Some(index) = self.order.next() else { return Ok(None) };
        loop {
            if let Some((example, image)) = self.held.remove(&index) {
                return Ok(Some(Taken { index, example, image }));
            }
            self.read()?;
        }
    }

    /// Reads one more row, and keeps it if it is wanted.
    fn read(&mut self) -> Result<()> {
        let Some(cursor) = &mut self.cursor else { return self.begin() };
        if cursor.next == cursor.end {
            self.cursor = None;
            return Ok(());
        }
        let reading = &self.stream.reading;
        let raw = match reading.next(cursor.shard, &mut *cursor.rows, None) {
            Next::Row(raw) if raw.split == Some(super::Split::Train) => raw,
            Next::Row(_) | Next::Bad(_) => return Ok(()),
            Next::End => return Err(changed(reading, cursor.shard)),
        };
        let index = cursor.next;
        cursor.next += 1;
        let skipped = self.behind > 0 && !self.wanted.remove(&index);
        self.behind = self.behind.saturating_sub(1);
        if skipped {
            return Ok(());
        }
        let mut example = self.stream.example(*raw)?;
        let image = bytes_of(&example, &mut *cursor.rows);
        // Captions of one image are no negatives of it, wherever the splits come from.
        if let (None, Some(Ok(bytes))) = (example.image_key, &image)
            && !example.texts.is_empty()
        {
            example.image_key = Some(key_of(bytes));
        }
        self.held.insert(index, (example, image));
        self.peak = self.peak.max(self.held.len());
        Ok(())
    }

    /// The next shard of which a row is wanted.
    fn begin(&mut self) -> Result<()> {
        loop {
            let Some((shard, first, count)) = self.shards.pop_front() else {
                return Err(Error::fault("stream", "ended before its last row"));
            };
            let end = first + count;
            let passed = count <= self.behind && !(first..end).any(|row| self.wanted.contains(&row));
            if count == 0 || passed {
                self.behind = self.behind.saturating_sub(count);
                continue;
            }
            let rows = self.stream.reading.shards.rows(shard)?;
            self.cursor = Some(Cursor { shard, rows, next: first, end });
            return Ok(());
        }
    }
}

/// The image of the row that `rows` gave last; nothing where it has none.
fn bytes_of(example: &Example, rows: &mut dyn Rows) -> Option<Result<Vec<u8>>> {
    match &example.image {
        ImageRef::Missing => None,
        ImageRef::Stored(_) => Some(rows.image()),
        _ => Some(example.bytes().map(std::borrow::Cow::into_owned)),
    }
}

fn changed(reading: &Reading, shard: usize) -> Error {
    let name = reading.shards.shards().get(shard).map(|s| s.name.clone()).unwrap_or_default();
    Error::fault(format!("{}: {name}", reading.shards.place()), "has fewer rows than when the set was opened")
        .hint("shards must not change while a run reads them")
}
