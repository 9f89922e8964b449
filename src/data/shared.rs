//! Rows of shards that show one image, found before the set is divided: without them in memory, and with every image read once.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::identity::{file_key, key_of};
use super::rules::Fault;
use super::shards::{Gathered, Next, Reading, Rows};
use super::{ImageRef, RawExample, Split};
use crate::error::Result;

/// Rows whose image another row of their split shows as well, and what they are one group of.
#[derive(Debug, Default)]
pub(super) struct SharedImages {
    /// The image's key by shard and row; only of images that occur twice.
    rows: HashMap<(u32, u64), u128>,
    /// The group of these images, and of the groups that the source states for them.
    groups: HashMap<Tie, Arc<str>>,
}

/// What makes rows one group.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Tie {
    Image(u128),
    Group(Arc<str>),
}

impl SharedImages {
    /// Reads every image of the set once, but for those in tars whose size tells them apart.
    ///
    /// # Errors
    /// When the machine cannot read a shard; broken rows and images are told of elsewhere.
    pub(super) fn find(reading: &Reading) -> Result<Self> {
        let sizes = sizes(reading)?;
        let mut found = Vec::new();
        each_row(reading, &mut |at, example, rows| {
            let key = match &example.image {
                ImageRef::File(path) => Some(file_key(path)),
                ImageRef::Stored(stored) if stored.size().is_some_and(|size| sizes.get(&size) == Some(&1)) => None,
                ImageRef::Stored(_) => rows.image().ok().map(|bytes| key_of(&bytes)),
                ImageRef::Missing | ImageRef::Embedded(_) => None,
            };
            // Each split by itself: what the source puts apart stays apart.
            let split = example.split.unwrap_or(Split::Train) as u128;
            found.extend(key.map(|key| (key ^ split, at)));
        })?;
        let mut seen = HashSet::new();
        let shared: HashSet<u128> = found.iter().map(|(key, _)| *key).filter(|key| !seen.insert(*key)).collect();
        drop(seen);
        let rows: HashMap<(u32, u64), u128> =
            found.into_iter().filter(|(key, _)| shared.contains(key)).map(|(key, at)| (at, key)).collect();
        let groups = if rows.is_empty() { HashMap::new() } else { groups(reading, &rows)? };
        Ok(Self { rows, groups })
    }

    /// Sets key and group of a row.
    pub(super) fn mark(&self, at: (u32, u64), example: &mut RawExample) {
        example.image_key = self.rows.get(&at).copied();
        let image = example.image_key.and_then(|key| self.groups.get(&Tie::Image(key)));
        let stated = || example.group.as_deref().filter(|_| !self.groups.is_empty()).and_then(|g| self.groups.get(&Tie::Group(g.into())));
        if let Some(group) = image.or_else(stated) {
            example.group = Some(group.to_string());
        }
    }
}

/// How many images have a size, where it is known without reading them.
fn sizes(reading: &Reading) -> Result<HashMap<u64, usize>> {
    let mut sizes: HashMap<u64, usize> = HashMap::new();
    reading.scan(&mut Gathered::default(), &mut |_, row| {
        if let Ok(RawExample { image: ImageRef::Stored(stored), .. }) = &row
            && let Some(size) = stored.size()
        {
            *sizes.entry(size).or_default() += 1;
        }
        Ok(())
    })?;
    Ok(sizes)
}

type EachRow<'a> = &'a mut dyn FnMut((u32, u64), RawExample, &mut dyn Rows);

fn each_row(reading: &Reading, each: EachRow<'_>) -> Result<()> {
    for shard in 0..reading.shards.shards().len() {
        let Ok(mut rows) = reading.shards.rows(shard) else { continue };
        loop {
            match reading.next_at(shard, &mut *rows, None) {
                (number, Next::Row(example)) => each((shard as u32, number), *example, &mut *rows),
                (_, Next::Bad(Fault::Row(error))) if error.exit_code() != 2 => return Err(error),
                (_, Next::Bad(_)) => {}
                (_, Next::End) => break,
            }
        }
    }
    Ok(())
}

/// A name for each image and stated group that are tied to one another: the least of the stated groups, or the image's key.
fn groups(reading: &Reading, rows: &HashMap<(u32, u64), u128>) -> Result<HashMap<Tie, Arc<str>>> {
    let mut above: HashMap<Tie, Tie> = HashMap::new();
    each_row(reading, &mut |at, example, _| {
        let Some(&key) = rows.get(&at) else { return };
        let image = root(&above, Tie::Image(key));
        let group = example.group.as_deref().map(|g| root(&above, Tie::Group(g.into())));
        match (image, group) {
            (a, Some(b)) if a != b => {
                // Groups come above images, the least of them above all.
                let (over, under) = if name(&a) < name(&b) { (a, b) } else { (b, a) };
                above.insert(under, over.clone());
                above.entry(over.clone()).or_insert(over);
            }
            (a, _) => _ = above.entry(a.clone()).or_insert(a),
        }
    })?;
    let ties: Vec<Tie> = above.keys().cloned().chain(rows.values().map(|key| Tie::Image(*key))).collect();
    Ok(ties.into_iter().map(|tie| (tie.clone(), name(&root(&above, tie)).1)).collect())
}

fn root(above: &HashMap<Tie, Tie>, mut tie: Tie) -> Tie {
    while let Some(next) = above.get(&tie).filter(|next| **next != tie) {
        tie = next.clone();
    }
    tie
}

/// Names of groups come before those of images.
fn name(tie: &Tie) -> (bool, Arc<str>) {
    match tie {
        Tie::Group(group) => (false, group.clone()),
        Tie::Image(key) => (true, format!("image {key:032x}").into()),
    }
}
