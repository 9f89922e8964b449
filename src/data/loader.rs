//! Batches: their order is a function of seed and position, so resuming needs the position only.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use candle_core::{Device, Tensor};
use image::RgbImage;
use peft_adapters::rng;
use rand::seq::SliceRandom;
use rayon::prelude::*;

use super::images::{Cached, Variation};
use super::stream::{Feed, Stream, Taken};
use super::{AugmentConfig, Example, Images};
use crate::error::{Error, Result};

/// Batches that wait ahead of the one in use.
const AHEAD: usize = 2;

/// What one step sees.
#[derive(Debug, Clone)]
pub struct Batch {
    /// [B, 3, H, W] f32 on the CPU.
    pub pixels: Tensor,
    /// Which examples.
    pub examples: Vec<Example>,
    /// The epoch, from 0.
    pub epoch: usize,
    /// Why images were left out of it, where that is allowed.
    pub skipped: Vec<String>,
}

/// How many batches there are and which examples each has.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Examples in the split.
    pub examples: usize,
    /// Examples in a batch; the last one of an epoch may have fewer.
    pub batch: usize,
    /// A new order each epoch.
    pub shuffle: bool,
    /// Leave the incomplete last batch out (contrastive losses want equal batches).
    pub drop_last: bool,
    /// The run's seed.
    pub seed: u64,
    /// The examples of each class where classes are drawn equally often.
    pub balanced: Option<Arc<Vec<Vec<usize>>>>,
}

impl Plan {
    /// Batches in an epoch.
    #[must_use]
    pub fn per_epoch(&self) -> usize {
        let batch = self.batch.max(1);
        match self.drop_last && self.examples >= batch {
            true => self.examples / batch,
            false => self.examples.div_ceil(batch),
        }
    }

    /// The examples of an epoch in order.
    #[must_use]
    pub fn order(&self, epoch: usize) -> Vec<usize> {
        let mut order: Vec<usize> = match &self.balanced {
            Some(classes) => self.drawn(classes, epoch),
            None => (0..self.examples).collect(),
        };
        if self.shuffle || self.balanced.is_some() {
            order.shuffle(&mut rng::rng(self.seed, &[rng::name_key("order"), epoch as u64]));
        }
        order
    }

    /// As many examples as there are, equally many of each class; those of a class in a new order each time around.
    fn drawn(&self, classes: &[Vec<usize>], epoch: usize) -> Vec<usize> {
        let mut order = Vec::with_capacity(self.examples);
        for (at, class) in classes.iter().enumerate().filter(|(_, class)| !class.is_empty()) {
            let mut rng = rng::rng(self.seed, &[rng::name_key("balanced"), epoch as u64, at as u64]);
            // What is left over goes to other classes in each epoch.
            let turn = (at + epoch) % classes.len();
            let mut wanted = self.examples / classes.len() + usize::from(turn < self.examples % classes.len());
            while wanted > 0 {
                let mut own = class.clone();
                own.shuffle(&mut rng);
                order.extend(own.iter().take(wanted));
                wanted -= wanted.min(own.len());
            }
        }
        order
    }

    /// How many examples the batch at `position` has.
    #[must_use]
    pub fn size(&self, position: usize) -> usize {
        let at = position % self.per_epoch().max(1);
        self.examples.saturating_sub(at * self.batch).min(self.batch)
    }

    /// The examples of the batch at `position`, which counts from the start of training.
    #[must_use]
    pub fn indices(&self, position: usize) -> Vec<usize> {
        let (epoch, at) = (position / self.per_epoch().max(1), position % self.per_epoch().max(1));
        self.order(epoch).into_iter().skip(at * self.batch).take(self.batch).collect()
    }
}

/// Everything a loader's thread needs.
#[derive(Debug, Clone)]
pub struct LoaderConfig {
    /// The examples of the split.
    pub examples: Arc<Vec<Example>>,
    /// Reads them.
    pub images: Arc<Images>,
    /// Random transforms.
    pub augment: AugmentConfig,
    /// The order.
    pub plan: Plan,
    /// In place of `examples`.
    pub stream: Option<Arc<Stream>>,
}

/// A batch that waits: as bytes, a quarter of its size as pixels.
#[derive(Debug)]
struct Waiting {
    images: Vec<RgbImage>,
    examples: Vec<Example>,
    epoch: usize,
    skipped: Vec<String>,
}

/// Prepares batches on its own thread, ahead of their use.
#[derive(Debug)]
pub struct Loader {
    images: Arc<Images>,
    receiver: Option<Receiver<Result<Waiting>>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Loader {
    /// Starts at batch `position` and goes on to `end`.
    ///
    /// # Errors
    /// When the system has no thread left, or no memory for one.
    pub fn start(config: LoaderConfig, position: usize, end: usize) -> Result<Self> {
        let (sender, receiver) = sync_channel(AHEAD);
        let images = config.images.clone();
        let work = move || {
            let mut send = |batch: Result<Waiting>| {
                let failed = batch.is_err();
                sender.send(batch).is_ok() && !failed
            };
            match &config.stream {
                Some(stream) => config.flow(stream, position, end, &mut send),
                None => {
                    let cache = Cached::new(config.examples.len());
                    let _ = (position..end).all(|at| send(config.batch(at, &cache)));
                }
            }
        };
        let thread = std::thread::Builder::new().name("loader".into()).spawn(work).map_err(|e| {
            Error::fault("data", format!("no thread can be started to load it: {e}"))
                .hint("memory or processes have a limit that is reached: fewer --threads, or raise it (ulimit -v, ulimit -u)")
        })?;
        Ok(Self { images, receiver: Some(receiver), thread: Some(thread) })
    }

    /// The next batch, or nothing at the end.
    ///
    /// # Errors
    /// When an image cannot be read, or a shard.
    pub fn next_batch(&mut self) -> Result<Option<Batch>> {
        let Some(waiting) = self.receiver.as_ref().and_then(|r| r.recv().ok()).transpose()? else { return Ok(None) };
        let Waiting { images, examples, epoch, skipped } = waiting;
        let pixels = pixels(&self.images, images.len(), |i, out| {
            self.images.preprocess().normalise(&images[i], out);
            Ok(())
        })?;
        Ok(Some(Batch { pixels, examples, epoch, skipped }))
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // The thread ends at its next send.
        self.receiver = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl LoaderConfig {
    fn batch(&self, position: usize, cache: &Cached) -> Result<Waiting> {
        let indices = self.plan.indices(position);
        let epoch = position / self.plan.per_epoch().max(1);
        let vary = Variation { augment: &self.augment, seed: self.plan.seed, epoch: epoch as u64 };
        let images = indices.par_iter().map(|&i| self.images.fetch(i, &self.examples[i], Some(&vary), cache));
        let examples = indices.iter().map(|&i| self.examples[i].clone()).collect();
        Ok(Waiting { images: images.collect::<Result<_>>()?, examples, epoch, skipped: Vec::new() })
    }

    /// Batches of a stream, epoch after epoch, until one cannot be sent.
    fn flow(&self, stream: &Stream, position: usize, end: usize, send: &mut dyn FnMut(Result<Waiting>) -> bool) {
        let each = self.plan.per_epoch().max(1);
        let mut position = position;
        while position < end {
            let epoch = position / each;
            let mut feed = stream.epoch(self.plan.seed, epoch, self.plan.shuffle, (position % each) * self.plan.batch);
            let last = end.min((epoch + 1) * each);
            if !(position..last).all(|at| send(self.next(stream, &mut feed, at, epoch))) {
                return;
            }
            position = last;
        }
    }

    /// The next batch of a stream. A row whose image cannot be read is left out of it, not replaced: the batches behind
    /// it stay what they are.
    fn next(&self, stream: &Stream, feed: &mut Feed<'_>, position: usize, epoch: usize) -> Result<Waiting> {
        let mut rows = Vec::with_capacity(self.plan.batch);
        for _ in 0..self.plan.size(position) {
            rows.push(feed.next_row()?.ok_or_else(|| Error::fault("stream", "ended before the epoch"))?);
        }
        let vary = Variation { augment: &self.augment, seed: self.plan.seed, epoch: epoch as u64 };
        let decode = |row: Taken| {
            let image = match row.image {
                Some(bytes) => bytes.and_then(|b| self.images.decode(row.index, &row.example.place(), &b, Some(&vary))),
                None => self.images.fetch(row.index, &row.example, Some(&vary), &Cached::none()),
            };
            (row.example, image)
        };
        let decoded: Vec<(Example, Result<RgbImage>)> = rows.into_par_iter().map(decode).collect();
        let mut waiting = Waiting { images: Vec::new(), examples: Vec::new(), epoch, skipped: Vec::new() };
        for (example, image) in decoded {
            match image {
                Ok(image) => {
                    waiting.images.push(image);
                    waiting.examples.push(example);
                }
                Err(error) if error.exit_code() != 2 => return Err(error),
                Err(error) if stream.skips() => waiting.skipped.push(error.to_string()),
                Err(error) => return Err(error.hint("`data: { skip_bad: true }` leaves such rows out and counts them")),
            }
        }
        match (waiting.examples.is_empty(), waiting.skipped.first()) {
            (true, Some(first)) => Err(Error::input("data", format!("no image of batch {} can be read; the first: {first}", position + 1))),
            _ => Ok(waiting),
        }
    }
}

/// Loads examples, as they are or varied, into one tensor [B, 3, H, W] on the CPU, in parallel.
///
/// # Errors
/// When an image cannot be read.
pub fn load(images: &Images, examples: &[Example], indices: &[usize], vary: Option<&Variation<'_>>, cache: &Cached) -> Result<Tensor> {
    pixels(images, indices.len(), |at, out| {
        let index = indices[at];
        images.preprocess().normalise(&images.fetch(index, &examples[index], vary, cache)?, out);
        Ok(())
    })
}

/// [count, 3, H, W], each image written by `fill` on some thread.
fn pixels(images: &Images, count: usize, fill: impl Fn(usize, &mut [f32]) -> Result<()> + Sync) -> Result<Tensor> {
    let (height, width) = images.size();
    let each = 3 * height * width;
    let mut pixels = vec![0f32; count * each];
    pixels.par_chunks_mut(each).enumerate().try_for_each(|(i, out)| fill(i, out))?;
    Tensor::from_vec(pixels, (count, 3, height, width), &Device::Cpu).map_err(Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(examples: usize, batch: usize) -> Plan {
        Plan { examples, batch, shuffle: true, drop_last: false, seed: 3, balanced: None }
    }

    #[test]
    fn an_epoch_sees_every_example_once() {
        let plan = plan(23, 5);
        let mut seen: Vec<usize> = (0..plan.per_epoch()).flat_map(|p| plan.indices(p)).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..23).collect::<Vec<_>>());
        assert_ne!(plan.order(0), plan.order(1));
        assert!((0..2 * plan.per_epoch()).all(|p| plan.size(p) == plan.indices(p).len()));
    }

    /// One class has 20 of 23 examples: of 23 draws it gets 7 or 8, as the others do, and the next epoch draws others.
    #[test]
    fn balanced_epochs_draw_classes_equally() {
        let classes = vec![(0..20).collect(), vec![20], vec![21, 22]];
        let plan = Plan { balanced: Some(Arc::new(classes.clone())), ..plan(23, 5) };
        for epoch in 0..3 {
            let order = plan.order(epoch);
            assert_eq!((order.len(), plan.order(epoch)), (23, order.clone()));
            for class in &classes {
                let drawn = order.iter().filter(|i| class.contains(i)).count();
                assert!((7..=8).contains(&drawn), "{drawn} of {class:?}");
            }
            // Of a large class none comes twice.
            let large: std::collections::HashSet<_> = order.iter().filter(|i| **i < 20).collect();
            assert_eq!(large.len(), order.iter().filter(|i| **i < 20).count());
        }
        assert_ne!(plan.order(0), plan.order(1));
        assert!((0..2 * plan.per_epoch()).all(|p| plan.size(p) == plan.indices(p).len()));
    }

    #[test]
    fn dropping_the_last_batch_never_leaves_nothing() {
        assert_eq!(Plan { drop_last: true, ..plan(23, 5) }.per_epoch(), 4);
        assert_eq!(Plan { drop_last: true, ..plan(3, 5) }.per_epoch(), 1);
    }
}
