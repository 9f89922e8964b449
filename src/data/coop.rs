//! The few-shot benchmarks of CoOp (Zhou et al. 2022, arXiv 2109.01134) as they lie on people's disks, with CoOp's
//! published splits, and the shots that CoOp and CLIP-LoRA draw from them.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use rand_mt::Mt;
use serde::{Deserialize, Serialize};

use super::folder::{directories, name};
use super::scan::{Links, advice, counted, entries, scan};
use super::{ImageRef, Raw, RawExample, Source, Split};
use crate::error::{Error, Result};
use crate::files;

/// ImageNet-size splits have 50 MB.
const MAX_SPLIT: u64 = 1 << 28;

/// One of CoOp's datasets in its own layout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CoopConfig {
    /// The dataset's directory. It holds `split_zhou_<Dataset>.json`, or FGVC-Aircraft's `variants.txt`, or ImageNet's
    /// `classnames.txt` with `images/train` and `images/val` (or `train` and `val`).
    pub root: PathBuf,
    /// The split file, in `root` or elsewhere; the only `split_zhou_*.json` of `root` when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<PathBuf>,
    /// Where the split's paths start, in `root` or elsewhere; found by looking when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<PathBuf>,
    /// Whose `shots`: both draw k of each class for training and min(k, 4) for validation with Python's generator, in another order.
    #[serde(default)]
    pub draw: Draw,
}

/// The order in which the splits are drawn.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Draw {
    /// Training first (CoOp, CoCoOp, MaPLe).
    #[default]
    Coop,
    /// Validation first (CLIP-LoRA).
    #[serde(rename = "clip-lora")]
    ClipLora,
}

/// Validation never has more shots than this.
const VAL_SHOTS: usize = 4;

impl Source for CoopConfig {
    fn place(&self) -> String {
        self.root.display().to_string()
    }

    fn read(&self) -> Result<Raw> {
        match self.layout()? {
            Layout::Json(path) => self.read_json(&path),
            Layout::Aircraft => self.read_aircraft(),
            Layout::ImageNet => self.read_imagenet(),
        }
    }

    fn read_few(&self, shots: usize, seed: u64) -> Option<Result<Raw>> {
        Some(self.read().map(|raw| self.sample(raw, shots, seed)))
    }
}

/// What lies in `root`.
enum Layout {
    Json(PathBuf),
    Aircraft,
    ImageNet,
}

impl CoopConfig {
    /// A name in `root`, or a path of its own.
    fn inside(&self, path: &Path) -> PathBuf {
        let inner = self.root.join(path);
        if inner.exists() { inner } else { path.to_path_buf() }
    }

    fn layout(&self) -> Result<Layout> {
        if let Some(split) = &self.split {
            return Ok(Layout::Json(self.inside(split)));
        }
        let inner = entries(&self.root).map_err(|e| {
            e.hint("data.coop.root is relative to the working directory; CoOp's DATASETS.md says where each dataset is to be had")
        })?;
        let mut splits: Vec<PathBuf> = inner.into_iter().map(|e| e.path).filter(|p| is_split(&name(p))).collect();
        match splits.len() {
            1 => return Ok(Layout::Json(splits.remove(0))),
            0 if self.root.join("variants.txt").is_file() => return Ok(Layout::Aircraft),
            0 if self.root.join("classnames.txt").is_file() => return Ok(Layout::ImageNet),
            0 => {}
            _ => {
                let names: Vec<String> = splits.iter().map(|p| name(p)).collect();
                return Err(
                    Error::input(self.place(), format!("holds several splits: {}", names.join(", "))).hint("name one with data.coop.split")
                );
            }
        }
        Err(Error::input(self.place(), "holds no split_zhou_<Dataset>.json, no variants.txt (FGVC-Aircraft), no classnames.txt (ImageNet)")
            .hint("CoOp's DATASETS.md says where each is to be had; data.coop.split names a split that lies elsewhere"))
    }

    fn read_json(&self, path: &Path) -> Result<Raw> {
        let text = files::read_text(path, MAX_SPLIT)?;
        let split: SplitFile = crate::json::from_large_slice(text.as_bytes()).map_err(|e| {
            Error::input(path.display(), format!("expected {{\"train\": [[path, label, class name], …], \"val\": …, \"test\": …}}: {e}"))
        })?;
        let first = split.train.first().or(split.test.first()).ok_or_else(|| Error::input(path.display(), "lists no image"))?;
        let images = self.find_images(&first.0)?;
        let mut raw = Raw::default();
        let mut names: BTreeMap<u32, String> = BTreeMap::new();
        for (split, items) in [(Split::Train, &split.train), (Split::Val, &split.val), (Split::Test, &split.test)] {
            for (image, label, class) in items {
                let known = names.entry(*label).or_insert_with(|| class.clone());
                if known != class {
                    return Err(Error::input(path.display(), format!("label {label} is `{known}` and, at {image}, `{class}`")));
                }
                raw.examples.push(example(image.clone(), images.join(image), label.to_string(), split));
            }
        }
        raw.keys = Some(names.keys().map(ToString::to_string).collect());
        raw.classes = Some(names.into_values().collect());
        Ok(raw)
    }

    /// `root`, or the directory in it (or one further down) from which the split's first image is found.
    fn find_images(&self, first: &str) -> Result<PathBuf> {
        if let Some(images) = &self.images {
            return Ok(self.inside(images));
        }
        let holds = |dir: &PathBuf| dir.join(first).is_file();
        if holds(&self.root) {
            return Ok(self.root.clone());
        }
        let mut level = directories(&self.root)?;
        for _ in 0..2 {
            if let Some(found) = level.iter().find(|d| holds(d)) {
                return Ok(found.clone());
            }
            level = level.iter().map(|d| directories(d)).collect::<Result<Vec<_>>>()?.concat();
        }
        Err(Error::input(self.place(), format!("the split's image {first} is neither here nor in a directory below"))
            .hint("unpack the images beside the split, or name their directory with data.coop.images"))
    }

    fn read_aircraft(&self) -> Result<Raw> {
        let images = self.images.as_deref().map_or_else(|| self.root.join("images"), |i| self.inside(i));
        let lines = |file: &str| -> Result<Vec<String>> { files::read_lines(&self.root.join(file), MAX_SPLIT) };
        let mut raw = Raw { classes: Some(lines("variants.txt")?), ..Default::default() };
        for split in [Split::Train, Split::Val, Split::Test] {
            let file = format!("images_variant_{split}.txt");
            for line in lines(&file)? {
                let (image, class) = line.split_once(' ').ok_or_else(|| {
                    Error::input(self.root.join(&file).display(), format!("expected an image and its variant, found `{line}`"))
                })?;
                raw.examples.push(example(format!("{image}.jpg"), images.join(format!("{image}.jpg")), class.into(), split));
            }
        }
        Ok(raw)
    }

    /// What is reported is measured on ImageNet's validation images; ours are taken from the training images.
    fn read_imagenet(&self) -> Result<Raw> {
        let file = self.root.join("classnames.txt");
        let text = files::read_text(&file, MAX_SPLIT)?;
        let lines = files::lines(&text).map(str::trim).filter(|l| !l.is_empty());
        let known: IndexMap<&str, &str> = lines.map(|line| directory_and_name(&file, line)).collect::<Result<_>>()?;
        let images = match &self.images {
            Some(images) => self.inside(images),
            None => Some(self.root.join("images")).filter(|d| d.join("train").is_dir()).unwrap_or_else(|| self.root.clone()),
        };
        let mut raw = Raw::default();
        let mut used: BTreeMap<String, String> = BTreeMap::new();
        let mut left_out: BTreeMap<String, usize> = BTreeMap::new();
        let resolved = images.canonicalize().map_err(|e| Error::read(&images, e))?;
        for (dir, split) in [("train", Split::Train), ("val", Split::Test)] {
            let dir = images.join(dir);
            let before = raw.examples.len();
            for folder in directories(&dir)? {
                let key = name(&folder);
                let class = known.get(key.as_str()).ok_or_else(|| Error::input(file.display(), format!("has no name for {key}")))?;
                used.insert(key.clone(), (*class).to_string());
                let found = scan(&folder, Links::Within(&resolved))?;
                found.left_out.into_iter().for_each(|(extension, n)| *left_out.entry(extension).or_default() += n);
                raw.bad.extend(found.broken);
                raw.examples.extend(found.images.into_iter().map(|path| {
                    let id = path.strip_prefix(&images).unwrap_or(&path).display().to_string();
                    example(id, path, key.clone(), split)
                }));
            }
            if raw.examples.len() == before {
                return Err(Error::input(dir.display(), "has no images in directories n01440764, n01443537, …")
                    .hint("sort the validation images into one directory a class, as the training images are"));
            }
        }
        if !left_out.is_empty() {
            raw.notes.push(format!("files are not read: {}; {}", counted(&left_out), advice(left_out.keys())));
        }
        (raw.keys, raw.classes) = (Some(used.keys().cloned().collect()), Some(used.into_values().collect()));
        Ok(raw)
    }

    /// k of each class for training, min(k, 4) for validation; all of test. The same images as Python's code takes.
    fn sample(&self, raw: Raw, shots: usize, seed: u64) -> Raw {
        let mut python = Python::new(seed);
        let mut by_split: BTreeMap<Split, Vec<RawExample>> = BTreeMap::new();
        for example in raw.examples {
            by_split.entry(example.split.unwrap_or(Split::Train)).or_default().push(example);
        }
        let mut take = |split| by_split.remove(&split).unwrap_or_default();
        let (train, val, test) = (take(Split::Train), take(Split::Val), take(Split::Test));
        let few = shots.min(VAL_SHOTS);
        let (train, val) = if val.is_empty() {
            // ImageNet: one draw gives both.
            let mut both = python.few_shot(&train, shots + few, false);
            let cut = |class: &mut Vec<RawExample>| class.split_off(class.len().saturating_sub(few).min(shots));
            let mut val = both.iter_mut().flat_map(cut).collect::<Vec<_>>();
            val.iter_mut().for_each(|e| e.split = Some(Split::Val));
            (both.concat(), val)
        } else {
            match self.draw {
                Draw::Coop => {
                    let train = python.few_shot(&train, shots, true).concat();
                    (train, python.few_shot(&val, few, true).concat())
                }
                Draw::ClipLora => {
                    let val = python.few_shot(&val, few, true).concat();
                    (python.few_shot(&train, shots, true).concat(), val)
                }
            }
        };
        Raw { examples: [train, val, test].concat(), ..raw }
    }
}

/// `split_zhou_<Dataset>.json`.
#[derive(Deserialize)]
struct SplitFile {
    train: Vec<Item>,
    #[serde(default)]
    val: Vec<Item>,
    test: Vec<Item>,
}

/// Path, label, class name.
type Item = (String, u32, String);

/// Whether a file is one of CoOp's splits.
pub(crate) fn is_split(name: &str) -> bool {
    name.starts_with("split_zhou_") && name.ends_with(".json")
}

fn example(id: String, path: PathBuf, label: String, split: Split) -> RawExample {
    RawExample { id, image: ImageRef::File(path), label: Some(label), split: Some(split), ..Default::default() }
}

/// A line of `classnames.txt`.
fn directory_and_name<'a>(file: &Path, line: &'a str) -> Result<(&'a str, &'a str)> {
    let wrong = || Error::input(file.display(), format!("expected a directory and the name of its class, found `{line}`"));
    line.split_once(' ').ok_or_else(wrong)
}

/// Python's `random`, as far as the drawing of shots goes.
struct Python(Mt);

impl Python {
    /// `random.seed(seed)`.
    fn new(seed: u64) -> Self {
        let (low, high) = (seed as u32, (seed >> 32) as u32);
        Self(Mt::new_with_key(std::iter::once(low).chain((high > 0).then_some(high))))
    }

    /// `random.random()`.
    fn random(&mut self) -> f64 {
        let (a, b) = (self.0.next_u32() >> 5, self.0.next_u32() >> 6);
        (f64::from(a) * 67_108_864.0 + f64::from(b)) / 9_007_199_254_740_992.0
    }

    /// `random._randbelow(n)` for n below 2^32.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let r = (self.0.next_u32() >> (32 - bits)) as usize;
            if r < n {
                return r;
            }
        }
    }

    /// `random.sample(range(n), k)`.
    fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        // What Python weighs is a list against a set in memory.
        let limit = if k > 5 { 21 + 4usize.pow(((k * 3) as f64).log(4.0).ceil() as u32) } else { 21 };
        if n <= limit {
            let mut pool: Vec<usize> = (0..n).collect();
            let draw = |i| {
                let (j, last) = (self.below(n - i), pool[n - i - 1]);
                std::mem::replace(&mut pool[j], last)
            };
            return (0..k).map(draw).collect();
        }
        let mut seen = HashSet::new();
        (0..k)
            .map(|_| {
                loop {
                    let j = self.below(n);
                    if seen.insert(j) {
                        return j;
                    }
                }
            })
            .collect()
    }

    /// `DatasetBase.generate_fewshot_dataset` of CoOp's Dassl: classes in the order in which they occur; a class that
    /// has fewer than k gives some of its images twice, or all of them once where nothing may `repeat`.
    fn few_shot(&mut self, items: &[RawExample], k: usize, repeat: bool) -> Vec<Vec<RawExample>> {
        let mut classes: IndexMap<&str, Vec<&RawExample>> = IndexMap::new();
        for item in items {
            classes.entry(item.label.as_deref().unwrap_or_default()).or_default().push(item);
        }
        let draw = |members: Vec<&RawExample>| {
            let n = members.len();
            let picked = match n >= k || !repeat {
                true => self.sample(n, k.min(n)),
                false => (0..k).map(|_| (self.random() * n as f64) as usize).collect(),
            };
            picked.into_iter().map(|i| members[i].clone()).collect()
        };
        classes.into_values().map(draw).collect()
    }
}
