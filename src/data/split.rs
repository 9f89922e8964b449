//! Train, validation and test: fractions, groups, shots.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use peft_adapters::rng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use super::{DataConfig, Dataset, Example};
use crate::error::{Error, Result};

/// Which part of the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Trained on.
    Train,
    /// Chooses.
    #[serde(alias = "valid", alias = "validation", alias = "dev")]
    Val,
    /// Reported.
    Test,
}

impl Split {
    /// The split that a directory or a cell names.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        match name.to_ascii_lowercase().as_str() {
            "train" | "training" => Some(Self::Train),
            "val" | "valid" | "validation" | "dev" => Some(Self::Val),
            "test" => Some(Self::Test),
            _ => None,
        }
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Train => "train",
            Self::Val => "val",
            Self::Test => "test",
        })
    }
}

/// Fractions of each class (or of all groups where there are no classes).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SplitConfig {
    /// Fraction that is trained on.
    pub train: f64,
    /// Fraction that chooses epoch and learning rate.
    pub val: f64,
    /// Fraction that is reported.
    pub test: f64,
    /// Draws the division; another seed gives another one.
    pub seed: u64,
}

impl Default for SplitConfig {
    fn default() -> Self {
        Self { train: 0.7, val: 0.1, test: 0.2, seed: 0 }
    }
}

/// Where no validation split is given, this much of train becomes one.
const VAL_FRACTION: f64 = 0.1;

impl SplitConfig {
    pub(super) fn check(&self) -> Result<()> {
        let parts = [("train", self.train), ("val", self.val), ("test", self.test)];
        if let Some((key, value)) = parts.iter().find(|(_, v)| !(0.0..=1.0).contains(v)) {
            return Err(Error::input(format!("data.split.{key}"), format!("expected a fraction from 0 to 1, found {value}")));
        }
        let sum: f64 = parts.iter().map(|(_, v)| v).sum();
        if (sum - 1.0).abs() > 1e-6 {
            return Err(Error::input("data.split", format!("train, val and test have to add up to 1, found {sum}")));
        }
        if self.train == 0.0 {
            return Err(Error::input("data.split.train", "expected more than 0"));
        }
        Ok(())
    }
}

type Examples = Vec<Example>;

/// Divides where the source does not, carves out validation, samples shots by a seed unless the source has done so.
pub(super) fn divide(
    place: &str,
    config: &DataConfig,
    classes: Vec<String>,
    labelled: Vec<(Example, Option<Split>)>,
    draw: Option<(usize, u64)>,
) -> Result<Dataset> {
    let mut notes = Vec::new();
    let given = labelled.iter().any(|(_, s)| s.is_some());
    let split = config.split.clone().unwrap_or_default();
    split.check()?;
    let (mut train, mut val, mut test): (Examples, Examples, Examples) = Default::default();
    if given {
        if config.split.is_some() {
            return Err(Error::input("data.split", format!("{place} has splits of its own")).hint("leave `split` out"));
        }
        for (example, split) in labelled {
            match split.unwrap_or(Split::Train) {
                Split::Train => train.push(example),
                Split::Val => val.push(example),
                Split::Test => test.push(example),
            }
        }
        check_disjoint(place, &train, &val, &test)?;
    } else {
        let all: Examples = labelled.into_iter().map(|(e, _)| e).collect();
        let (rest, t) = carve(all, split.test, split.seed, "test");
        let (rest, v) = carve(rest, split.val / (1.0 - split.test).max(1e-9), split.seed, "val");
        (train, val, test) = (rest, v, t);
    }
    if val.is_empty() && !train.is_empty() {
        (train, val) = carve(train, VAL_FRACTION, split.seed, "val");
        notes.push(format!("no validation split: {} of the training examples serve as one (seed {})", val.len(), split.seed));
    }
    if let Some((shots, seed)) = draw {
        train = sample(place, &classes, train, shots, seed, &mut notes)?;
    }
    Ok(Dataset { classes, train, val, test, notes, skipped: 0, stream: None })
}

/// The same file in two splits would be trained on and tested with.
fn check_disjoint(place: &str, train: &[Example], val: &[Example], test: &[Example]) -> Result<()> {
    let mut seen: HashMap<&str, &str> = HashMap::new();
    let mut groups: HashMap<&str, &str> = HashMap::new();
    for (name, list) in [("train", train), ("val", val), ("test", test)] {
        for e in list {
            if let Some(other) = seen.insert(&e.id, name)
                && other != name
            {
                return Err(Error::input(place, format!("`{}` is in {other} and in {name}", e.id)));
            }
            if let Some(group) = &e.group
                && let Some(other) = groups.insert(group, name)
                && other != name
            {
                return Err(Error::input(place, format!("group `{group}` is in {other} and in {name}")));
            }
        }
    }
    Ok(())
}

/// Takes a fraction out, whole groups at a time, the same share of each class.
fn carve(examples: Examples, fraction: f64, seed: u64, what: &str) -> (Examples, Examples) {
    // Units that stay together, by class (of their first example), in source order.
    let mut units: BTreeMap<u32, Vec<Vec<usize>>> = BTreeMap::new();
    let mut by_group: HashMap<&str, (u32, usize)> = HashMap::new();
    for (i, e) in examples.iter().enumerate() {
        let class = e.all_labels().first().copied().unwrap_or(u32::MAX);
        match e.group.as_deref().and_then(|g| by_group.get(g)) {
            Some(&(class, unit)) => {
                if let Some(u) = units.get_mut(&class) {
                    u[unit].push(i);
                }
            }
            None => {
                let list = units.entry(class).or_default();
                if let Some(g) = e.group.as_deref() {
                    by_group.insert(g, (class, list.len()));
                }
                list.push(vec![i]);
            }
        }
    }
    let mut taken = vec![false; examples.len()];
    for (class, mut list) in units {
        list.shuffle(&mut rng::rng(seed, &[rng::name_key(what), u64::from(class)]));
        // At least one of a class stays; at least one goes where the class has two.
        let count = ((list.len() as f64 * fraction).round() as usize).max(usize::from(fraction > 0.0)).min(list.len() - 1);
        list.iter().take(count).flatten().for_each(|&i| taken[i] = true);
    }
    let (mut rest, mut out) = (Vec::new(), Vec::new());
    for (example, taken) in examples.into_iter().zip(taken) {
        if taken { out.push(example) } else { rest.push(example) }
    }
    (rest, out)
}

/// `shots` of each class.
fn sample(place: &str, classes: &[String], train: Examples, shots: usize, seed: u64, notes: &mut Vec<String>) -> Result<Examples> {
    let mut by_class: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (i, e) in train.iter().enumerate() {
        let label = e.label.ok_or_else(|| {
            Error::input("data.shots", format!("`{}` in {place} has no label to count shots by", e.id)).hint("leave `shots` out")
        })?;
        by_class.entry(label).or_default().push(i);
    }
    let mut keep = vec![false; train.len()];
    for (class, mut list) in by_class {
        list.shuffle(&mut rng::rng(seed, &[rng::name_key("shots"), u64::from(class)]));
        if list.len() < shots {
            notes.push(format!("class `{}` has {} training examples, fewer than {shots} shots", classes[class as usize], list.len()));
        }
        list.iter().take(shots).for_each(|&i| keep[i] = true);
    }
    Ok(train.into_iter().zip(keep).filter(|(_, k)| *k).map(|(e, _)| e).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn examples(classes: u32, each: usize, group: impl Fn(usize) -> Option<String>) -> Vec<(Example, Option<Split>)> {
        (0..classes as usize * each)
            .map(|i| {
                let label = Some((i / each) as u32);
                (Example { id: format!("e{i}"), label, group: group(i), ..Default::default() }, None)
            })
            .collect()
    }

    fn names(n: u32) -> Vec<String> {
        (0..n).map(|i| format!("c{i}")).collect()
    }

    #[test]
    fn each_class_is_in_each_split_and_nothing_is_lost() {
        let d = divide("p", &DataConfig::default(), names(3), examples(3, 10, |_| None), None).unwrap();
        assert_eq!((d.train.len(), d.val.len(), d.test.len()), (21, 3, 6));
        for list in [&d.train, &d.val, &d.test] {
            assert_eq!(list.iter().map(|e| e.label.unwrap()).collect::<std::collections::BTreeSet<_>>().len(), 3);
        }
    }

    #[test]
    fn groups_stay_together() {
        let d = divide("p", &DataConfig::default(), names(2), examples(2, 40, |i| Some(format!("g{}", i / 4))), None).unwrap();
        let groups = |l: &[Example]| l.iter().map(|e| e.group.clone().unwrap()).collect::<std::collections::BTreeSet<_>>();
        assert!(groups(&d.train).is_disjoint(&groups(&d.test)));
        assert!(groups(&d.train).is_disjoint(&groups(&d.val)));
        assert_eq!(d.train.len() + d.val.len() + d.test.len(), 80);
    }

    #[test]
    fn shots_follow_the_seed() {
        let ids = |seed| {
            let d = divide("p", &DataConfig::default(), names(3), examples(3, 10, |_| None), Some((2, seed))).unwrap();
            d.train.iter().map(|e| e.id.clone()).collect::<Vec<_>>()
        };
        assert_eq!(ids(1).len(), 6);
        assert_eq!(ids(1), ids(1));
        assert_ne!(ids(1), ids(2));
    }

    #[test]
    fn an_example_in_two_splits_is_refused() {
        let mut all = examples(2, 4, |_| None);
        for (i, e) in all.iter_mut().enumerate() {
            e.1 = Some(if i % 2 == 0 { Split::Train } else { Split::Test });
        }
        all[1].0.id = "e0".into();
        assert!(divide("p", &DataConfig::default(), names(2), all, None).unwrap_err().to_string().contains("`e0`"));
    }
}
