//! The examples of a run with their splits, kept beside it: 32 bytes for each. So `--resume` can say what has changed, and an
//! evaluation counts nothing as test that the run has seen, however much was added to the data since.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use candle_core::{Device, Tensor};

use crate::clip::weights;
use crate::data::{Dataset, Example, ImageRef, Split};
use crate::error::{Error, Result};
use crate::files;
use crate::provenance::Provenance;

/// The file in a run directory.
pub const FILE: &str = "examples.safetensors";
/// The largest one that is read.
const MAX_FILE: u64 = 16 << 30;
/// The tensor of what earlier adapters have seen.
const BEFORE: &str = "before";
/// Its metadata.
const CLASSES: &str = "classes";
const MADE_OF: &str = "made_of";

/// Train first: what was trained on in one row and tested in another has been trained on.
const SPLITS: [Split; 3] = [Split::Train, Split::Val, Split::Test];

/// One example, as the first 8 bytes of blake3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    /// Its name; of a row that has only a number its content, so that rows before it do not make another one of it.
    id: i64,
    /// Names of its classes.
    label: i64,
    /// What else there is to learn of it: texts, question, answers, numbers.
    rest: i64,
    /// Its image's bytes, or its texts where it has no image; 0 where they were not read.
    content: i64,
}

impl Entry {
    fn of(example: &Example, classes: &[String]) -> Self {
        let names = example.all_labels().iter().map(|&l| classes.get(l as usize).map_or("", String::as_str));
        let mut rest: Vec<String> = example.texts.clone();
        rest.extend(example.question.clone());
        rest.push(format!("{:?} {:?}", example.value, example.fits));
        rest.extend(example.answers.iter().chain(&example.choices).cloned());
        let rest = key(rest.iter().map(String::as_str));
        let told = !example.texts.is_empty() || example.question.is_some();
        let content = match (&example.image, example.content) {
            (ImageRef::Missing, _) => rest,
            (_, Some(digest)) => digest.cast_signed(),
            // A task that looks at texts alone reads no images.
            (_, None) if example.by_number && told => rest,
            (_, None) => 0,
        };
        let id = if example.by_number && content != 0 { content } else { key([example.id.as_str()]) };
        Self { id, label: key(names), rest, content }
    }
}

/// The first 8 bytes of blake3 of some texts, each with its length before it.
fn key<'a>(texts: impl IntoIterator<Item = &'a str>) -> i64 {
    let mut hasher = blake3::Hasher::new();
    for text in texts {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    }
    i64::from_le_bytes(hasher.finalize().as_bytes().first_chunk().copied().unwrap_or_default())
}

fn digest(hasher: &blake3::Hasher) -> String {
    format!("blake3:{}", hasher.finalize().to_hex())
}

/// See the module.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Roster {
    /// Digests of these examples and of all else that the run was made of.
    pub made_of: Provenance,
    classes: Vec<String>,
    /// In ascending order, of train, val and test.
    splits: [Vec<Entry>; 3],
    /// What adapters that the run started from had trained on or chosen by.
    before: Vec<Entry>,
}

impl Roster {
    /// The examples of `data`; `made_of` has the digests of the base.
    ///
    /// # Errors
    /// When a shard cannot be read.
    pub fn of(data: &Dataset, made_of: Provenance) -> Result<Self> {
        let mut roster = Self { made_of, classes: data.classes.clone(), ..Self::default() };
        let mut hasher = blake3::Hasher::new();
        for (split, entries) in SPLITS.into_iter().zip(&mut roster.splits) {
            *entries = data.digested(split, &|e| Entry::of(e, &data.classes))?;
            // In the order of the rows, which batches are drawn from.
            hasher.update(&(entries.len() as u64).to_le_bytes());
            entries.iter().flat_map(|e| [e.id, e.label, e.rest, e.content]).for_each(|n| {
                hasher.update(&n.to_le_bytes());
            });
            entries.sort_unstable();
        }
        roster.made_of.data = digest(&hasher);
        let mut hasher = blake3::Hasher::new();
        for class in &data.classes {
            hasher.update(&(class.len() as u64).to_le_bytes());
            hasher.update(class.as_bytes());
        }
        roster.made_of.classes = digest(&hasher);
        Ok(roster)
    }

    /// Takes along what the run of an adapter has seen that this run starts from.
    pub fn inherit(&mut self, init: &Self) {
        self.before = init.splits[..2].iter().flatten().chain(&init.before).copied().collect();
        self.before.sort_unstable();
        self.before.dedup();
    }

    /// How many of a split's examples have been seen by adapters that the run started from.
    #[must_use]
    pub fn seen_before(&self, data: &Dataset, split: Split) -> usize {
        let contents: HashSet<i64> = self.before.iter().map(|e| e.content).filter(|c| *c != 0).collect();
        data.split(split).iter().filter(|e| contents.contains(&Entry::of(e, &data.classes).content)).count()
    }

    /// Writes it into a run directory.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let mut tensors = Vec::new();
        let lists = SPLITS.iter().map(ToString::to_string).zip(&self.splits);
        for (name, entries) in lists.chain((!self.before.is_empty()).then(|| (BEFORE.to_string(), &self.before))) {
            let numbers: Vec<i64> = entries.iter().flat_map(|e| [e.id, e.label, e.rest, e.content]).collect();
            tensors.push((name, Tensor::from_vec(numbers, (entries.len(), 4), &Device::Cpu)?));
        }
        let json = |value: serde_json::Result<String>| value.map_err(|e| Error::fault(FILE, e));
        let metadata = [(CLASSES, json(serde_json::to_string(&self.classes))?), (MADE_OF, json(serde_json::to_string(&self.made_of))?)];
        weights::save_with(&dir.join(FILE), &tensors, metadata.map(|(k, v)| (k.to_string(), v)).into())
    }

    /// Reads that of a run directory; none where the run is older than rosters.
    ///
    /// # Errors
    /// When it is broken.
    pub fn find(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let place = path.display().to_string();
        let (tensors, metadata) = weights::read_safetensors(&place, &files::read(&path, MAX_FILE)?)?;
        let broken = || Error::input(&place, "does not list the examples of a run");
        let mut tensors: HashMap<String, Tensor> = tensors.into_iter().collect();
        let before = tensors.remove(BEFORE);
        let read = |tensor: Option<Tensor>| -> Result<Vec<Entry>> {
            let rows = tensor.and_then(|t| t.to_vec2::<i64>().ok()).ok_or_else(broken)?;
            let one = |row: &Vec<i64>| match row[..] {
                [id, label, rest, content] => Ok(Entry { id, label, rest, content }),
                _ => Err(broken()),
            };
            rows.iter().map(one).collect()
        };
        let mut entries = |split: Split| read(tensors.remove(&split.to_string()));
        let splits = [entries(Split::Train)?, entries(Split::Val)?, entries(Split::Test)?];
        let before = if before.is_some() { read(before)? } else { Vec::new() };
        let text = |name: &str| metadata.get(name).ok_or_else(broken);
        let classes = serde_json::from_str(text(CLASSES)?).map_err(|_| broken())?;
        let made_of = serde_json::from_str(text(MADE_OF)?).map_err(|_| broken())?;
        Ok(Some(Self { made_of, classes, splits, before }))
    }

    fn all(&self) -> impl Iterator<Item = (Split, &Entry)> {
        SPLITS.into_iter().zip(&self.splits).flat_map(|(split, entries)| entries.iter().map(move |e| (split, e)))
    }

    /// What is different in `now`, which was made of `data`; nothing where the runs are of the same.
    ///
    /// # Errors
    /// When a shard cannot be read.
    pub fn differences(&self, now: &Self, data: &Dataset) -> Result<Vec<String>> {
        let parts = self.made_of.differing(&now.made_of);
        let mut told = Vec::new();
        for part in &parts {
            match *part {
                "the data" => told.extend(self.data_differences(now, data)?),
                "the classes" => told.push(class_difference(&self.classes, &now.classes)),
                "the base's weights" => told.push("the base has other weights".into()),
                "the tokeniser" => told.push("the base has another tokeniser".into()),
                "the preprocessing of images" => told.push("images are prepared in another way".into()),
                _ => told.push("the base has another config.json: heads, activations or epsilons".into()),
            }
        }
        Ok(told)
    }

    fn data_differences(&self, now: &Self, data: &Dataset) -> Result<Vec<String>> {
        let ids = |roster: &Self| roster.all().map(|(_, e)| e.id).collect::<HashSet<_>>();
        let (before, after) = (ids(self), ids(now));
        let mut told: Vec<String> = [
            count(after.difference(&before).count(), "is new", "are new"),
            count(before.difference(&after).count(), "is gone", "are gone"),
        ]
        .into_iter()
        .flatten()
        .collect();
        told.extend(self.changed(data, &SPLITS)?);
        if told.is_empty() {
            let what = if self.splits == now.splits { "rows stand in another order" } else { "rows have come or gone" };
            told.push(what.into());
        }
        Ok(told)
    }

    /// A line for each kind of change of examples in these splits of `data` that have kept their id, with the first of the kind.
    ///
    /// # Errors
    /// When a shard cannot be read.
    pub fn changed(&self, data: &Dataset, splits: &[Split]) -> Result<Vec<String>> {
        let one = |(kind, (number, first)): (&str, (usize, String))| {
            let what = count(number, &format!("has {kind}"), &format!("have {kind}"))?;
            Some(format!("{what} ({first})"))
        };
        Ok(self.changes(data, splits)?.into_iter().filter_map(one).collect())
    }

    fn changes(&self, data: &Dataset, splits: &[Split]) -> Result<BTreeMap<&'static str, (usize, String)>> {
        let mut known: HashMap<i64, Vec<(Split, &Entry)>> = HashMap::new();
        self.all().for_each(|(split, e)| known.entry(e.id).or_default().push((split, e)));
        let names: HashMap<i64, &str> = self.classes.iter().map(|n| (key([n.as_str()]), n.as_str())).collect();
        let mut found: BTreeMap<&'static str, (usize, String)> = BTreeMap::new();
        let one = |split: Split, example: &Example| {
            let now = Entry::of(example, &data.classes);
            let (kind, was) = change(known.get(&now.id)?, split, &now)?;
            let label = example.label.and_then(|l| data.classes.get(l as usize));
            let detail = match (kind, names.get(&was.1.label), label) {
                ("another label", Some(was), Some(is)) => format!("{}: {is}, was {was}", example.id),
                ("another split", ..) => format!("{}: {split}, was {}", example.id, was.0),
                _ => example.id.clone(),
            };
            Some((kind, detail))
        };
        for split in splits.iter().copied() {
            data.digested(split, &|e| one(split, e))?
                .into_iter()
                .flatten()
                .for_each(|(kind, detail)| found.entry(kind).or_insert((0, detail)).0 += 1);
        }
        Ok(found)
    }
}

fn count(what: usize, is: &str, are: &str) -> Option<String> {
    match what {
        0 => None,
        1 => Some(format!("1 example {is}")),
        n => Some(format!("{n} examples {are}")),
    }
}

/// What of an example has changed since, where one with its id was there.
fn change<'a>(before: &[(Split, &'a Entry)], split: Split, now: &Entry) -> Option<(&'static str, (Split, &'a Entry))> {
    if before.iter().any(|(s, e)| *s == split && **e == *now) {
        return None;
    }
    let was = *before.first()?;
    let any = |test: &dyn Fn(&Entry) -> bool| before.iter().any(|(_, e)| test(e));
    Some(match () {
        () if !any(&|e| e.label == now.label) => ("another label", was),
        () if !any(&|e| e.content == now.content) => ("another image", was),
        () if !any(&|e| e.rest == now.rest) => ("another text or value", was),
        () => ("another split", was),
    })
}

/// The first class that differs.
fn class_difference(before: &[String], now: &[String]) -> String {
    let at = before.iter().zip(now).position(|(a, b)| a != b);
    let first = at.map(|i| format!("class {} is `{}`, was `{}`", i + 1, now[i], before[i]));
    let numbers = (before.len() != now.len()).then(|| format!("there are {} classes, were {}", now.len(), before.len()));
    numbers.into_iter().chain(first).collect::<Vec<_>>().join("; ")
}

/// What [`Roster::settle`] did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Settled {
    /// Examples that the run has not had.
    pub new: usize,
    /// Examples of the run that are not there any more.
    pub gone: usize,
    /// Examples that were in another split in the run, and are there again.
    pub moved: usize,
}

/// Which split the run had an example in.
struct Known {
    exact: HashMap<(i64, i64), Split>,
    /// The first split and the last one.
    content: HashMap<i64, (Split, Split)>,
    id: HashMap<i64, Split>,
}

impl Known {
    fn new(roster: &Roster) -> Self {
        let mut known = Self { exact: HashMap::new(), content: HashMap::new(), id: HashMap::new() };
        // Train comes first, and stays.
        for (split, e) in roster.all() {
            known.id.entry(e.id).or_insert(split);
            if e.content != 0 {
                known.exact.entry((e.id, e.content)).or_insert(split);
                known.content.entry(e.content).or_insert((split, split)).1 = split;
            }
        }
        known
    }

    /// For an example that is in `fresh` now. The same name counts only where the data is the run's own: `0.png` is a name that many
    /// sets have.
    fn split(&self, e: &Entry, fresh: Split, own: bool) -> Option<Split> {
        // Of rows without names, of which the source has the same in two splits, each stays where it is.
        let nameless = e.id == e.content;
        match (self.exact.get(&(e.id, e.content)), self.content.get(&e.content)) {
            (Some(split), _) if !nameless => Some(*split),
            (_, Some((_, last))) if nameless && *last == fresh => Some(fresh),
            (_, Some((first, _))) => Some(*first),
            _ => self.id.get(&e.id).filter(|_| own).copied(),
        }
    }
}

/// How [`Roster::settle`] takes data.
#[derive(Debug, Clone, Copy)]
pub struct Settling {
    /// It is the run's own data, whose ids count. Otherwise only examples that the run has trained on or chosen by are moved,
    /// which are known by their content.
    pub own: bool,
    /// The training split is drawn, so that others come and go in it.
    pub drawn: bool,
}

impl Roster {
    /// Puts the examples of `data` where the run had them, what is new of a known group with its group. A streamed training
    /// split stays as it is: what belongs to it is left out of the others, and what of it belongs to them is evaluated with them.
    ///
    /// # Errors
    /// When a shard cannot be read.
    pub fn settle(&self, data: &mut Dataset, settling: Settling) -> Result<Settled> {
        let Settling { own, drawn } = settling;
        let known = Known::new(self);
        let mut settled = Settled::default();
        let lists = [std::mem::take(&mut data.train), std::mem::take(&mut data.val), std::mem::take(&mut data.test)];
        let all: Vec<(Split, Example)> = SPLITS.into_iter().zip(lists).flat_map(|(s, l)| l.into_iter().map(move |e| (s, e))).collect();
        let entries: Vec<Entry> = all.iter().map(|(_, e)| Entry::of(e, &data.classes)).collect();
        let mut groups: HashMap<String, Split> = HashMap::new();
        for ((fresh, example), entry) in all.iter().zip(&entries) {
            if let (Some(group), Some(split)) = (&example.group, known.split(entry, *fresh, own)) {
                groups.entry(group.clone()).and_modify(|s| *s = (*s).min(split)).or_insert(split);
            }
        }
        let (mut seen, mut shown) = (HashSet::new(), HashSet::new());
        for ((fresh, example), entry) in all.into_iter().zip(entries) {
            let before = known.split(&entry, fresh, own);
            let group = example.group.as_ref().and_then(|g| groups.get(g)).copied();
            settled.new += usize::from(before.is_none() && !(drawn && fresh == Split::Train));
            seen.insert(entry.id);
            shown.insert(entry.content);
            let split = match before.or(group) {
                Some(split) if own => split,
                Some(split) => split.min(fresh),
                None => fresh,
            };
            settled.moved += usize::from(split != fresh && before.is_some());
            match split {
                // Streamed rows cannot be added to: these are left out.
                Split::Train if data.stream.is_some() => {}
                Split::Train => data.train.push(example),
                Split::Val => data.val.push(example),
                Split::Test => data.test.push(example),
            }
        }
        if let Some(stream) = data.stream.clone().filter(|_| own) {
            // What was held out may be among the rows that a new division would train on.
            let found = stream.digested(data.looked_at, &|example| {
                let entry = Entry::of(&example, &data.classes);
                let split = known.split(&entry, Split::Train, own);
                (entry, split, split.filter(|s| *s != Split::Train).map(|_| example))
            })?;
            for (entry, split, example) in found {
                seen.insert(entry.id);
                shown.insert(entry.content);
                settled.new += usize::from(split.is_none());
                settled.moved += usize::from(example.is_some());
                let list = if split == Some(Split::Val) { &mut data.val } else { &mut data.test };
                list.extend(example);
            }
        }
        let listed = |split: &Split| *split != Split::Train || (own || data.stream.is_none()) && !drawn;
        // Under another name an image is there still.
        let there = |e: &Entry| seen.contains(&e.id) || e.content != 0 && shown.contains(&e.content);
        settled.gone = self.all().filter(|(split, e)| listed(split) && !there(e)).count();
        Ok(settled)
    }

    /// How many of a split's examples the run has trained on or chosen its epoch by.
    #[must_use]
    pub fn seen_in(&self, data: &Dataset, split: Split) -> usize {
        let known = Known::new(self);
        let inherited: HashSet<i64> = self.before.iter().map(|e| e.content).filter(|c| *c != 0).collect();
        let seen = |e: &&Example| {
            let entry = Entry::of(e, &data.classes);
            inherited.contains(&entry.content) || known.split(&entry, Split::Train, false).is_some_and(|s| s < split)
        };
        data.split(split).iter().filter(seen).count()
    }
}
