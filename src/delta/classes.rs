//! What an adapter holds for each class, when the classes stand in another order: names decide, never positions.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use peft_adapters::Patches;
use serde_json::Value;

use super::{Adapters, Delta, Manifest};
use crate::clip::Clip;
use crate::error::{Error, Result};

/// The task's own tensors that hold a row or a number for each class of a classification.
const CLASS_ROWS: [&str; 3] = ["head.weight", "head.bias", "prompts.threshold"];

/// How many class names a message lists.
const SHOWN: usize = 5;

/// Whether two lists hold the same class names, in any order.
#[must_use]
pub fn same_classes(a: &[String], b: &[String]) -> bool {
    class_order(a, b).is_ok()
}

/// Where each of the classes `asked` stands in `known`: class i of the new order is class `order[i]` of the old one. `None` where
/// the order is the same.
///
/// # Errors
/// With a sentence that says which classes are missing and which are new, when the names differ.
pub fn class_order(known: &[String], asked: &[String]) -> std::result::Result<Option<Vec<u32>>, String> {
    if known == asked {
        return Ok(None);
    }
    let places: HashMap<&str, u32> = known.iter().zip(0..).map(|(name, i)| (name.as_str(), i)).collect();
    let names: HashSet<&str> = asked.iter().map(String::as_str).collect();
    let missing: Vec<&str> = known.iter().map(String::as_str).filter(|n| !names.contains(n)).collect();
    let new: Vec<&str> = asked.iter().map(String::as_str).filter(|n| !places.contains_key(n)).collect();
    if !missing.is_empty() || !new.is_empty() {
        let part = |what: &str, names: &[&str]| (!names.is_empty()).then(|| format!("{what}: {}", some(names)));
        return Err([part("missing", &missing), part("new", &new)].into_iter().flatten().collect::<Vec<_>>().join("; "));
    }
    if places.len() != known.len() || names.len() != asked.len() {
        return Err("some have the same name, so that names do not say which is which in another order".into());
    }
    Ok(Some(asked.iter().filter_map(|name| places.get(name.as_str()).copied()).collect()))
}

/// What to say where an adapter lies on another that was trained for other classes: weights add up, names of classes do not.
#[must_use]
pub fn other_vocabulary(before: &Manifest, dir: &Path, next: &Manifest) -> Option<String> {
    if before.classes.is_empty() || next.classes.is_empty() {
        return None;
    }
    let differ = class_order(&before.classes, &next.classes).err()?;
    Some(format!(
        "{}: was trained for other classes than the adapter before it ({differ}); the last one's are meant where no labels are given",
        dir.display()
    ))
}

fn some(names: &[&str]) -> String {
    let shown: Vec<String> = names.iter().take(SHOWN).map(|n| format!("`{n}`")).collect();
    match names.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

impl Delta {
    /// The classes that the adapter names.
    #[must_use]
    pub fn classes(&self) -> &[String] {
        self.manifest.as_ref().map(|m| m.classes.as_slice()).unwrap_or_default()
    }

    /// Whether the adapter's task has weights for each class: a linear head, thresholds of cosines.
    #[must_use]
    pub fn has_class_rows(&self) -> bool {
        let classify = match self.manifest.as_ref().map(|m| &m.task) {
            Some(Value::String(name)) => name == "classify",
            Some(Value::Object(map)) => map.contains_key("classify"),
            _ => false,
        };
        classify && self.own.iter().any(|(name, _)| CLASS_ROWS.contains(&name.as_str()))
    }

    /// [`Delta::apply`], for the classes of some data or labels: what the adapter holds for each class is brought into their order.
    ///
    /// # Errors
    /// As [`Delta::apply`], and when the adapter is bound to other classes.
    pub fn apply_to(&mut self, clip: &Clip, classes: &[String]) -> Result<Adapters> {
        let adapters = self.apply(clip)?;
        if self.bring_in_order(&adapters.view, 0, classes)? { self.apply(clip) } else { Ok(adapters) }
    }

    /// Brings what is held for each class into the order of `classes`; the hooks of the adapter's methods are those of `view` after
    /// the first `beneath`. Returns whether anything has moved.
    ///
    /// # Errors
    /// When the adapter is bound to other classes than `classes`.
    pub fn bring_in_order(&mut self, view: &Patches, beneath: usize, classes: &[String]) -> Result<bool> {
        let rows = self.has_class_rows();
        let bound = rows || view.iter().skip(beneath).any(peft_adapters::Patch::class_bound);
        if !bound || self.classes().is_empty() {
            return Ok(false);
        }
        let known = self.classes();
        let Some(order) = class_order(known, classes).map_err(|differ| self.other_classes(&differ))? else { return Ok(false) };
        for ((_, tensors), patch) in self.methods.iter_mut().zip(view.iter().skip(beneath)) {
            for (name, tensor) in tensors {
                if let Some(moved) = patch.reorder_classes(name, tensor, &order)? {
                    *tensor = moved;
                }
            }
        }
        for (name, tensor) in self.own.iter_mut().filter(|(name, _)| rows && CLASS_ROWS.contains(&name.as_str())) {
            if tensor.dims().first() != Some(&order.len()) {
                let message = format!("{name}: expected a row for each of {} classes, found {:?}", order.len(), tensor.dims());
                return Err(Error::input(self.dir.display(), message));
            }
            *tensor = tensor.index_select(&candle_core::Tensor::new(order.as_slice(), tensor.device())?, 0)?;
        }
        if let Some(manifest) = &mut self.manifest {
            manifest.classes = classes.to_vec();
        }
        Ok(true)
    }

    fn other_classes(&self, differ: &str) -> Error {
        let message = format!("holds something for each of its {} classes, and these are others ({differ})", self.classes().len());
        Error::input(self.dir.display(), message)
            .hint("use it with the classes that it was trained for, in any order; a method without class weights (lora) takes any classes")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<String> {
        text.split(' ').map(String::from).collect()
    }

    #[test]
    fn names_say_where_a_class_stands() {
        assert_eq!(class_order(&names("a b c"), &names("a b c")), Ok(None));
        assert_eq!(class_order(&names("a b c"), &names("c a b")), Ok(Some(vec![2, 0, 1])));
    }

    #[test]
    fn other_names_are_told() {
        let told = |asked: &str| class_order(&names("a b c"), &names(asked)).unwrap_err();
        assert!(told("a b").contains("missing: `c`"));
        assert!(told("a b c d").contains("new: `d`"));
        assert!(told("a x c").contains("`b`") && told("a x c").contains("`x`"));
        assert!(!told("a b c c").is_empty(), "a class twice");
        assert!(class_order(&names("a a b"), &names("b a a")).is_err());
        assert!(class_order(&names("a a b"), &names("a a b")).is_ok());
    }
}
