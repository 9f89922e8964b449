//! Train, validation and test: fractions, groups, shots.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

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
pub(super) const VAL_FRACTION: f64 = 0.1;

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
        [train, val, test] = apportion(all, &split);
    }
    if val.is_empty() && !train.is_empty() {
        (train, val) = carve(train, VAL_FRACTION, split.seed);
        notes.push(format!("no validation split: {} of the training examples serve as one (seed {})", val.len(), split.seed));
    }
    if let Some((shots, seed)) = draw {
        train = sample(place, &classes, train, shots, seed, &mut notes)?;
    }
    Ok(Dataset { classes, train, val, test, notes, skipped: 0, stream: None, looked_at: false })
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

/// What [`rank`] is of where sets are divided.
pub(super) const DRAW: &str = "split";

/// A number that depends on seed and key alone: neither on the order of rows nor on what else there is.
pub(super) fn rank(what: &str, seed: u64, key: &str) -> u64 {
    let hash = blake3::hash(format!("{what} {seed} {key}").as_bytes());
    u64::from_le_bytes(hash.as_bytes().first_chunk().copied().unwrap_or_default())
}

/// Examples that stay together, by class: a group, or one example. Those of a class are in an order that the seed draws and
/// that is the same however the rows are ordered: by a hash of the group or the id.
fn units(examples: &[Example], seed: u64) -> BTreeMap<u32, Vec<Vec<usize>>> {
    let mut by_key: HashMap<(bool, &str), (u32, Vec<usize>)> = HashMap::new();
    for (i, e) in examples.iter().enumerate() {
        let key = e.group.as_deref().map_or((false, e.id.as_str()), |g| (true, g));
        // The lowest class stands for a group of several, whichever comes first.
        let class = e.all_labels().first().copied().unwrap_or(u32::MAX);
        let unit = by_key.entry(key).or_insert((class, Vec::new()));
        unit.0 = unit.0.min(class);
        unit.1.push(i);
    }
    let mut units: BTreeMap<u32, Vec<_>> = BTreeMap::new();
    for ((grouped, key), (class, members)) in by_key {
        units.entry(class).or_default().push((rank(DRAW, seed, key), key, grouped, members));
    }
    units.values_mut().for_each(|list| list.sort_unstable());
    units.into_iter().map(|(class, list)| (class, list.into_iter().map(|(.., members)| members).collect())).collect()
}

/// Of the units of a class: how many are test, and how many are test or val.
pub(super) fn borders(units: usize, split: &SplitConfig) -> (usize, usize) {
    let (n, most) = (units as f64, units.saturating_sub(1));
    let at_least = |fraction: f64| usize::from(fraction > 0.0);
    let test = ((n * split.test).round() as usize).max(at_least(split.test)).min(most);
    (test, ((n * (split.test + split.val)).round() as usize).max(test + at_least(split.val)).min(most))
}

/// Divides undivided examples. Of each class the first units in their drawn order are test, the next ones val, so that each
/// class has its share exactly, at least one example of each split where it has three, and one of train in any case. One more
/// unit moves at most two others, each across one of the two borders; none goes from train to test.
fn apportion(examples: Examples, split: &SplitConfig) -> [Examples; 3] {
    let mut place = vec![Split::Train; examples.len()];
    for list in units(&examples, split.seed).into_values() {
        let (test, held_out) = borders(list.len(), split);
        for (i, unit) in list.iter().take(held_out).enumerate() {
            let to = if i < test { Split::Test } else { Split::Val };
            unit.iter().for_each(|&example| place[example] = to);
        }
    }
    let mut parts: [Examples; 3] = Default::default();
    for (example, split) in examples.into_iter().zip(place) {
        parts[split as usize].push(example);
    }
    parts
}

/// Takes validation out of train, whole groups at a time, the same share of each class.
fn carve(examples: Examples, fraction: f64, seed: u64) -> (Examples, Examples) {
    let [rest, out, _] = apportion(examples, &SplitConfig { train: 1.0 - fraction, val: fraction, test: 0.0, seed });
    (rest, out)
}

/// `shots` of each class, the first ones in an order that the seed draws.
fn sample(place: &str, classes: &[String], train: Examples, shots: usize, seed: u64, notes: &mut Vec<String>) -> Result<Examples> {
    let mut by_class: BTreeMap<u32, Vec<(u64, &str, usize)>> = BTreeMap::new();
    for (i, e) in train.iter().enumerate() {
        let label = e.label.ok_or_else(|| {
            Error::input("data.shots", format!("`{}` in {place} has no label to count shots by", e.id)).hint("leave `shots` out")
        })?;
        by_class.entry(label).or_default().push((rank("shots", seed, &e.id), &e.id, i));
    }
    let mut keep = vec![false; train.len()];
    for (class, mut list) in by_class {
        list.sort_unstable();
        if list.len() < shots {
            notes.push(format!("class `{}` has {} training examples, fewer than {shots} shots", classes[class as usize], list.len()));
        }
        list.iter().take(shots).for_each(|&(.., i)| keep[i] = true);
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

    /// Where each example is, by id.
    fn places(rows: Vec<(Example, Option<Split>)>, seed: u64) -> BTreeMap<String, Split> {
        let config = DataConfig { split: Some(SplitConfig { seed, ..SplitConfig::default() }), ..DataConfig::default() };
        let d = divide("p", &config, names(3), rows, None).unwrap();
        [Split::Train, Split::Val, Split::Test].iter().flat_map(|&s| d.split(s).iter().map(move |e| (e.id.clone(), s))).collect()
    }

    #[test]
    fn one_more_example_moves_at_most_two_and_none_from_train_to_test() {
        for seed in 0..20 {
            for each in 3..40 {
                let before = places(examples(3, each, |_| None), seed);
                let mut more = examples(3, each, |_| None);
                // In front of all others, as a name that sorts first would be.
                more.insert(0, (Example { id: "new".into(), label: Some(1), ..Default::default() }, None));
                let after = places(more, seed);
                let moved: Vec<_> = before.iter().filter(|(id, s)| after[*id] != **s).map(|(id, s)| (*s, after[id])).collect();
                assert!(moved.len() <= 2, "seed {seed}, {each}: {moved:?}");
                assert!(!moved.contains(&(Split::Train, Split::Test)) && !moved.contains(&(Split::Test, Split::Train)), "{moved:?}");
            }
        }
    }

    #[test]
    fn the_order_of_rows_does_not_matter() {
        let group = |i: usize| i.is_multiple_of(3).then(|| format!("g{}", i / 7));
        let mut turned = examples(3, 30, group);
        turned.reverse();
        assert_eq!(places(examples(3, 30, group), 5), places(turned, 5));
        let shots = |turn: bool| {
            let mut rows = examples(3, 10, |_| None);
            if turn {
                rows.reverse();
            }
            let d = divide("p", &DataConfig::default(), names(3), rows, Some((2, 1))).unwrap();
            d.train.into_iter().map(|e| e.id).collect::<std::collections::BTreeSet<_>>()
        };
        assert_eq!(shots(false), shots(true));
    }

    /// Shares of whole classes, by hand: tests are round(n/5), at least 1; test and val together round(3n/10).
    #[test]
    fn each_class_has_its_share_exactly() {
        for (each, expected) in [(1, [1, 0, 0]), (2, [1, 0, 1]), (3, [1, 1, 1]), (5, [3, 1, 1]), (10, [7, 1, 2]), (100, [70, 10, 20])] {
            let d = divide("p", &DataConfig::default(), names(2), examples(2, each, |_| None), None);
            let d = d.unwrap();
            for class in 0..2 {
                let count = |l: &[Example]| l.iter().filter(|e| e.label == Some(class)).count();
                // Where no class has a validation example, a tenth of train becomes one, too; that is another rule.
                if expected[1] > 0 {
                    assert_eq!([count(&d.train), count(&d.val), count(&d.test)], expected, "{each}");
                }
            }
        }
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
