//! How much classes count in a loss.

use std::collections::HashMap;

use indexmap::IndexMap;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use crate::data::Example;
use crate::error::{Error, Result};
use crate::task::TaskParts;

/// How much each class counts: `none`, `balanced`, a number for some classes by name, or one for each in the order of classes.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum ClassWeights {
    /// All alike.
    #[default]
    None,
    /// Inversely to its frequency in training, as scikit-learn's `balanced`: N / (K nₖ) over the K classes that occur; with
    /// several labels N / (2 nₖ) where an example has label k and N / (2 (N − nₖ)) where it has not.
    Balanced,
    /// As given; with several labels for examples that have the label. In the order in which `peft data` shows the classes.
    Given(Vec<f64>),
    /// The same by name; classes that are not named count 1.
    Named(IndexMap<String, f64>),
}

impl Serialize for ClassWeights {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::None => serializer.serialize_str("none"),
            Self::Balanced => serializer.serialize_str("balanced"),
            Self::Given(weights) => weights.serialize(serializer),
            Self::Named(weights) => weights.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for ClassWeights {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(WeightsVisitor)
    }
}

/// A derived untagged enum would say only that nothing matched.
struct WeightsVisitor;

/// A class may be called `7`, which YAML takes for a number.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected the name of a class")]
enum Name {
    Text(String),
    Number(i64),
}

fn positive<E: serde::de::Error>(weight: f64) -> std::result::Result<f64, E> {
    match weight > 0.0 && weight.is_finite() {
        true => Ok(weight),
        false => Err(E::custom(format!("expected a weight above 0, found {weight}"))),
    }
}

impl<'de> Visitor<'de> for WeightsVisitor {
    type Value = ClassWeights;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("`none`, `balanced`, a list of numbers, or numbers by class name such as { cat: 2 }")
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> std::result::Result<ClassWeights, E> {
        match name {
            "none" => Ok(ClassWeights::None),
            "balanced" => Ok(ClassWeights::Balanced),
            other => Err(E::unknown_variant(other, &["none", "balanced"])),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<ClassWeights, A::Error> {
        let mut all = Vec::new();
        while let Some(weight) = seq.next_element::<f64>()? {
            all.push(positive(weight)?);
        }
        Ok(ClassWeights::Given(all))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<ClassWeights, A::Error> {
        let mut all = IndexMap::new();
        while let Some((name, weight)) = map.next_entry::<Name, f64>()? {
            let name = match name {
                Name::Text(name) => name,
                Name::Number(number) => number.to_string(),
            };
            if let Some(first) = all.insert(name.clone(), positive(weight)?) {
                return Err(A::Error::custom(format!("class `{name}` has the weights {first} and {weight}")));
            }
        }
        Ok(ClassWeights::Named(all))
    }
}

/// How much an example counts that has a class, and one that has not.
pub(super) type Weight = (f64, f64);

/// Where the recipe says it.
const KEY: &str = "task.classify.class_weights";

impl ClassWeights {
    /// `None` where all count alike.
    pub(super) fn of(&self, parts: &TaskParts<'_>, several: bool) -> Result<Option<Vec<Weight>>> {
        let classes = parts.classes.len();
        match self {
            Self::None => Ok(None),
            Self::Given(all) if all.len() != classes => {
                Err(Error::input(KEY, format!("expected one for each of {classes} classes, found {}", all.len()))
                    .hint("they are in the order in which `peft data` shows the classes; or give them by name: { cat: 2 }"))
            }
            Self::Given(all) => Ok(Some(all.iter().map(|&w| (w, 1.0)).collect())),
            Self::Named(by_name) => named(by_name, parts.classes).map(Some),
            // A trained task is put together again without its examples, and has no loss.
            Self::Balanced if parts.train.is_none() => Ok(None),
            Self::Balanced => {
                let (mut counts, mut all) = (vec![0; classes], 0);
                parts.visit(&mut |examples| {
                    examples.iter().flat_map(Example::all_labels).for_each(|&l| counts[l as usize] += 1);
                    all += examples.len();
                    Ok(())
                })?;
                Ok(Some(balanced(&counts, all, several)))
            }
        }
    }
}

/// Weights of classes by their names.
pub(super) fn named(by_name: &IndexMap<String, f64>, classes: &[String]) -> Result<Vec<Weight>> {
    let mut count: HashMap<&str, usize> = HashMap::new();
    classes.iter().for_each(|class| *count.entry(class).or_default() += 1);
    for name in by_name.keys() {
        match count.get(name.as_str()) {
            None => {
                return Err(Error::input(KEY, format!("there is no class `{name}` among the {}", classes.len()))
                    .hint("`peft data` shows the classes; one that is not named counts 1"));
            }
            Some(1) => {}
            Some(n) => {
                return Err(Error::input(KEY, format!("{n} classes are called `{name}`")).hint("give a list, in the order of the classes"));
            }
        }
    }
    Ok(classes.iter().map(|class| (by_name.get(class).copied().unwrap_or(1.0), 1.0)).collect())
}

/// Of `counts` among `total` examples.
pub(super) fn balanced(counts: &[usize], total: usize, several: bool) -> Vec<Weight> {
    let all = total as f64;
    let present = counts.iter().filter(|n| **n > 0).count().max(1) as f64;
    let one = |&n: &usize| match (several, n) {
        (false, 0) => (1.0, 1.0),
        (false, n) => (all / (present * n as f64), 1.0),
        (true, n) if n == 0 || n == total => (1.0, 1.0),
        (true, n) => (all / (2.0 * n as f64), all / (2.0 * (all - n as f64))),
    };
    counts.iter().map(one).collect()
}
