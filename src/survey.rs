//! `peft data`: what a source of examples holds, before anything is learnt from it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use rayon::prelude::*;
use serde::Serialize;

use crate::clip::base::Parts;
use crate::clip::decode::{self, DecodeOptions};
use crate::clip::preprocess::Background;
use crate::data::{DataConfig, Dataset, Example, Field, ImageRef, Split};
use crate::error::Result;
use crate::fetch::fetched;
use crate::recipe::Recipe;
use crate::task::{TaskConfig, cut_texts, longer_than_context};
use crate::train::{Event, Observer};

/// What to look at.
#[derive(Debug, Clone)]
pub struct Subject {
    /// The source, as a recipe would name it.
    pub data: DataConfig,
    /// How its images are read.
    pub images: DecodeOptions,
    /// Whose tokeniser counts.
    pub model: String,
    /// Draws shots.
    pub seed: u64,
    /// The task of the recipe, whose texts are counted; of a source alone all texts are.
    pub task: Option<TaskConfig>,
}

/// Images that go through the decoders between two reports of progress.
const CHUNK: usize = 256;

/// What a source holds.
#[derive(Debug, Clone, Serialize)]
pub struct Survey {
    /// The source's key in a recipe: `folder`, `table`, `parquet`, …
    pub kind: &'static str,
    /// Examples of each split.
    pub splits: Counts,
    /// Different images of each split. There are fewer than examples where an image has several rows: captions, questions.
    pub images: Counts,
    /// Examples of each class and split, in label order.
    pub classes: Vec<ClassCounts>,
    /// Image files in bytes, altogether.
    pub bytes: u64,
    /// Pixels across; nothing where no image can be read.
    pub width: Option<Spread>,
    /// Pixels down.
    pub height: Option<Spread>,
    /// The texts, if there are any.
    pub captions: Option<Captions>,
    /// Images that occur more than once.
    pub duplicates: Duplicates,
    /// Different images with transparent parts.
    pub transparent: usize,
    /// What becomes of those parts.
    pub background: Background,
    /// Images that cannot be read.
    pub unreadable: Vec<Unreadable>,
    /// What reading the source had to say.
    pub notes: Vec<String>,
}

/// Numbers of examples.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Trained on.
    pub train: usize,
    /// Chooses.
    pub val: usize,
    /// Reported.
    pub test: usize,
}

/// Numbers of examples of a class.
#[derive(Debug, Clone, Serialize)]
pub struct ClassCounts {
    /// The class.
    pub name: String,
    /// Its examples.
    #[serde(flatten)]
    pub counts: Counts,
}

/// Least, middle and greatest value.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The least.
    pub min: usize,
    /// As many are below as above; the mean of two where their number is even.
    pub median: f64,
    /// The greatest.
    pub max: usize,
}

/// Texts, counted in tokens with begin and end.
#[derive(Debug, Clone, Serialize)]
pub struct Captions {
    /// How many.
    pub count: usize,
    /// Their lengths.
    pub tokens: Spread,
    /// Tokens that the model takes in.
    pub context: usize,
    /// Different texts that will be cut.
    pub too_long: usize,
    /// The longest, or its beginning.
    pub longest: String,
    /// The model whose tokeniser counted.
    pub tokenizer: String,
    /// Examples without any text.
    pub without: usize,
}

/// Images with the same bytes.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Duplicates {
    /// Groups of equal images in different splits: what is tested has been trained on.
    pub across_splits: Vec<Vec<Copy>>,
    /// Groups of equal images with different classes.
    pub contradicting: Vec<Vec<Copy>>,
    /// Images that repeat another one of their split.
    pub within_splits: usize,
}

/// One of several equal images.
#[derive(Debug, Clone, Serialize)]
pub struct Copy {
    /// Where it is.
    pub split: Split,
    /// Its name.
    pub id: String,
    /// Its class.
    pub class: Option<String>,
}

/// An image that cannot be read.
#[derive(Debug, Clone, Serialize)]
pub struct Unreadable {
    /// Where it is.
    pub split: Split,
    /// Its name.
    pub id: String,
    /// Why.
    pub reason: String,
}

impl Subject {
    /// What `path` names: a recipe or a run (then its model and image settings count), or anything that [`DataConfig::locate`] finds.
    ///
    /// # Errors
    /// When it is neither.
    pub fn open(path: &str, model: Option<&str>) -> Result<Self> {
        let place = Path::new(path);
        let inner = place.join("recipe.yaml");
        let place = if inner.is_file() { inner.as_path() } else { place };
        if place.is_file() && place.extension().is_some_and(|e| e == "yaml" || e == "yml") {
            let recipe = Recipe::load(place, &[])?;
            let images = recipe.images.options();
            let model = model.unwrap_or(recipe.model.spec()).to_string();
            return Ok(Self { data: recipe.data, images, model, seed: recipe.train.seed, task: Some(recipe.task) });
        }
        let model = model.unwrap_or("builtin:tiny").to_string();
        Ok(Self { data: DataConfig::locate(path)?, images: DecodeOptions::default(), model, seed: 0, task: None })
    }
}

const SPLITS: [Split; 3] = [Split::Train, Split::Val, Split::Test];

/// Reads every image and every text of a source once.
///
/// # Errors
/// When the source is missing or malformed, or the tokeniser cannot be read. Images that cannot be read are part of the result.
pub fn survey(subject: &Subject, observer: &mut dyn Observer) -> Result<(Survey, Dataset)> {
    let source = fetched(observer, |progress| subject.data.local(progress))?;
    // Every image is looked at, and compared with the others.
    let config = DataConfig { skip_bad: true, ..source.listed() };
    let mut data = match &subject.task {
        Some(task) => config.open_for(subject.seed, &task.definition().needs_of_rows())?,
        None => config.open(subject.seed)?,
    };
    if !source.has_own_splits() {
        let split = source.split.clone().unwrap_or_default();
        let fractions = format!("{}, {}, {} (seed {})", split.train, split.val, split.test, split.seed);
        data.notes.push(format!("the source has no splits of its own; `data.split` divides it: {fractions}"));
    }
    let all: Vec<(Split, &Example)> = SPLITS.into_iter().flat_map(|s| data.split(s).iter().map(move |e| (s, e))).collect();
    observer.event(Event::Phase("images", Some(all.len())));
    let mut seen = Vec::with_capacity(all.len());
    for chunk in all.chunks(CHUNK) {
        seen.extend(chunk.par_iter().map(|(_, e)| look(e, &subject.images)).collect::<Vec<_>>());
        observer.event(Event::Advance(chunk.len()));
    }
    let mut unreadable = Vec::new();
    let mut fine: Vec<(Split, &Example, Look)> = Vec::new();
    for ((split, e), look) in all.iter().copied().zip(seen) {
        match look {
            Ok(look) => fine.push((split, e, look)),
            Err(error) => unreadable.push(Unreadable { split, id: e.id.clone(), reason: error.to_string() }),
        }
    }
    // An image that several rows show is one.
    let mut known = HashSet::new();
    fine.retain(|(split, e, look)| known.insert((*split, shown(e, look))));
    let side = |f: &dyn Fn(&Look) -> u32| Spread::of(fine.iter().map(|(.., l)| f(l) as usize).collect());
    let survey = Survey {
        kind: subject.data.kind(),
        splits: Counts { train: data.train.len(), val: data.val.len(), test: data.test.len() },
        images: images(&data),
        classes: classes(&data),
        bytes: fine.iter().map(|(.., l)| l.bytes).sum(),
        width: side(&|l| l.width),
        height: side(&|l| l.height),
        captions: captions(&data, subject)?,
        duplicates: duplicates(&fine, &data.classes),
        transparent: fine.iter().filter(|(.., l)| l.transparent).count(),
        background: subject.images.background,
        unreadable,
        notes: data.notes.iter().cloned().chain(cut(&data, subject)?).collect(),
    };
    Ok((survey, data))
}

/// What one image shows.
struct Look {
    hash: blake3::Hash,
    bytes: u64,
    width: u32,
    height: u32,
    transparent: bool,
}

fn look(example: &Example, options: &DecodeOptions) -> Result<Look> {
    let bytes = example.bytes_within(options.max_bytes)?;
    let image = decode::decode_rgba(&example.id, &bytes, options)?;
    Ok(Look {
        hash: blake3::hash(&bytes),
        bytes: bytes.len() as u64,
        width: image.width(),
        height: image.height(),
        transparent: decode::is_transparent(&image),
    })
}

impl Spread {
    fn of(mut values: Vec<usize>) -> Option<Self> {
        values.sort_unstable();
        let (&min, &max) = (values.first()?, values.last()?);
        let middle = values.len() / 2;
        let median = match values.len() % 2 {
            1 => values[middle] as f64,
            _ => (values[middle - 1] + values[middle]) as f64 / 2.0,
        };
        Some(Self { min, median, max })
    }
}

fn classes(data: &Dataset) -> Vec<ClassCounts> {
    let [train, val, test] = SPLITS.map(|split| data.class_counts(split));
    let counts = |class: usize| Counts { train: train[class], val: val[class], test: test[class] };
    data.classes.iter().cloned().enumerate().map(|(class, name)| ClassCounts { name, counts: counts(class) }).collect()
}

fn captions(data: &Dataset, subject: &Subject) -> Result<Option<Captions>> {
    let all = || SPLITS.into_iter().flat_map(|s| data.split(s));
    let texts: Vec<&String> = all().flat_map(|e| &e.texts).collect();
    if texts.is_empty() {
        return Ok(None);
    }
    let tokenizer = Parts::load(&subject.model)?.tokenizer;
    let lengths: Vec<usize> = texts.par_iter().map(|t| tokenizer.count(t)).collect::<Result<_>>()?;
    let longest = lengths.iter().zip(&texts).max_by_key(|(n, _)| **n).map(|(_, t)| t.chars().take(200).collect()).unwrap_or_default();
    let too_long = match subject.task.as_ref().filter(|t| reads_texts(t)) {
        Some(task) => cut_texts(task.definition(), &tokenizer, data)?,
        None => lengths.iter().zip(&texts).filter(|(n, _)| **n > tokenizer.context()).map(|(_, t)| t).collect::<HashSet<_>>().len(),
    };
    Ok(Spread::of(lengths).map(|tokens| Captions {
        count: texts.len(),
        tokens,
        context: tokenizer.context(),
        too_long,
        longest,
        tokenizer: subject.model.clone(),
        without: all().filter(|e| e.texts.is_empty()).count(),
    }))
}

fn reads_texts(task: &TaskConfig) -> bool {
    task.definition().reads().needed.contains(&Field::Text)
}

/// What is cut besides the examples' texts: a recipe's class prompts, questions with their choices.
fn cut(data: &Dataset, subject: &Subject) -> Result<Option<String>> {
    let questions = || SPLITS.into_iter().flat_map(|s| data.split(s)).filter_map(|e| e.question.clone()).collect::<Vec<_>>();
    let (count, what) = match &subject.task {
        Some(task) if reads_texts(task) => return Ok(None),
        None if questions().is_empty() => return Ok(None),
        None => {
            let mut cut = HashSet::new();
            longer_than_context(&Parts::load(&subject.model)?.tokenizer, questions(), &mut cut)?;
            (cut.len(), "questions")
        }
        Some(task) => {
            let task = task.definition();
            let what = if task.texts(&data.classes, &[]).0.is_empty() { "questions" } else { "class prompts" };
            (cut_texts(task, &Parts::load(&subject.model)?.tokenizer, data)?, what)
        }
    };
    Ok((count > 0).then(|| format!("{count} {what} are longer than the model's context and will be cut")))
}

/// What tells images apart: the file, or the bytes in a shard where rows say different things of one image.
fn shown(e: &Example, look: &Look) -> (Option<u128>, Option<blake3::Hash>, String) {
    let says = !e.texts.is_empty() || e.question.is_some();
    match (&e.image, e.image_key) {
        (ImageRef::File(_), Some(key)) => (Some(key), None, label_of(e)),
        (ImageRef::Stored(_), _) if says => (None, Some(look.hash), label_of(e)),
        _ => (None, None, e.id.clone()),
    }
}

/// One image with two classes is a contradiction that has to be told of.
fn label_of(e: &Example) -> String {
    e.all_labels().iter().map(|l| format!("{l} ")).collect()
}

fn images(data: &Dataset) -> Counts {
    let [train, val, test] = SPLITS.map(|split| {
        let mut seen = HashSet::new();
        data.split(split).iter().filter(|e| e.image != ImageRef::Missing && e.image_key.is_none_or(|key| seen.insert(key))).count()
    });
    Counts { train, val, test }
}

fn duplicates(images: &[(Split, &Example, Look)], classes: &[String]) -> Duplicates {
    let mut groups: HashMap<blake3::Hash, Vec<(Split, &Example)>> = HashMap::new();
    for (split, example, look) in images {
        groups.entry(look.hash).or_default().push((*split, example));
    }
    let copies = |group: &[(Split, &Example)]| -> Vec<Copy> {
        let class = |e: &Example| {
            let names: Vec<&str> = e.all_labels().iter().map(|l| classes[*l as usize].as_str()).collect();
            (!names.is_empty()).then(|| names.join("|"))
        };
        group.iter().map(|(split, e)| Copy { split: *split, id: e.id.clone(), class: class(e) }).collect()
    };
    let mut found = Duplicates::default();
    // In the order of names, so that two looks at the same data say the same.
    let groups: BTreeMap<&str, &Vec<(Split, &Example)>> =
        groups.values().filter(|g| g.len() > 1).map(|g| (g[0].1.id.as_str(), g)).collect();
    for group in groups.values() {
        let splits: HashSet<Split> = group.iter().map(|(s, _)| *s).collect();
        let labels: HashSet<&[u32]> = group.iter().map(|(_, e)| e.all_labels()).collect();
        if splits.len() > 1 {
            found.across_splits.push(copies(group));
        }
        if labels.len() > 1 {
            found.contradicting.push(copies(group));
        }
        found.within_splits += group.len() - splits.len();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_lies_between_the_two_in_the_middle() {
        assert_eq!(Spread::of(vec![9, 1, 4]), Some(Spread { min: 1, median: 4.0, max: 9 }));
        assert_eq!(Spread::of(vec![9, 1, 4, 5]), Some(Spread { min: 1, median: 4.5, max: 9 }));
        assert_eq!(Spread::of(Vec::new()), None);
    }
}
