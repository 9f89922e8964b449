//! Whether an adapter's weights of a task, such as a head, mean in a recipe what they were trained for.

use serde_json::{Map, Value};

use super::{Session, to_json};
use crate::delta::{Delta, Manifest};
use crate::error::{Error, Result};
use crate::task::TaskConfig;

/// Options that say what a task's own weights are; others are about training.
const SHAPING: [&str; 5] = ["inputs", "labels", "head", "choose", "pairs"];

/// A task's name, with the options that shape its weights.
struct Shape {
    name: String,
    options: Map<String, Value>,
}

impl Shape {
    fn of(task: &Value) -> Option<Self> {
        let (name, options) = match task {
            Value::String(name) => (name.clone(), Map::new()),
            Value::Object(map) => {
                let (name, options) = map.iter().next()?;
                (name.clone(), options.as_object().cloned().unwrap_or_default())
            }
            _ => return None,
        };
        Some(Self { name, options: options.into_iter().filter(|(key, _)| SHAPING.contains(&key.as_str())).collect() })
    }

    /// How the adapter's differs from the recipe's, and what to set in the recipe.
    fn difference(&self, recipe: &Self) -> Option<(String, String)> {
        if self.name != recipe.name {
            let message = format!("is an adapter of `task: {}`, the recipe has `task: {}`", self.name, recipe.name);
            return Some((message, format!("--set task={}", self.name)));
        }
        let (key, own) = self.options.iter().find(|(key, own)| recipe.options.get(*key) != Some(own))?;
        let other = recipe.options.get(key).map_or("nothing".to_string(), plain);
        let message = format!("is an adapter of `task.{}.{key}: {}`, the recipe has {other}", self.name, plain(own));
        Some((message, format!("--set task.{}.{key}={}", self.name, plain(own))))
    }
}

/// A value as a recipe has it.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), ToString::to_string)
}

/// A fusion without what matters in training only.
fn fusion(value: &Value) -> Value {
    let mut value = value.clone();
    if let Some(options) = value.as_object_mut().and_then(|map| map.values_mut().next()).and_then(Value::as_object_mut) {
        options.remove("dropout");
    }
    value
}

impl Session {
    /// Refuses an adapter with weights of a task where the recipe's task would pass them over or take them for something else.
    ///
    /// # Errors
    /// When the tasks differ in what shapes their weights.
    pub(super) fn check_task(&self, delta: &Delta) -> Result<()> {
        let Some(manifest) = &delta.manifest else { return Ok(()) };
        if delta.own.is_empty() && !self.recipe.task.definition().has_own_weights() {
            return Ok(());
        }
        let refused = |message: String, set: &str| {
            Err(Error::input(delta.dir.display(), message)
                .hint(format!("`peft eval RUN` takes the task that the run was trained for; for this recipe set it with {set}")))
        };
        if let Some((message, set)) = self.other_task(manifest)? {
            return refused(message, &set);
        }
        let ours = self.recipe.fusion.as_ref().map(to_json).transpose()?.unwrap_or_default();
        if !manifest.fusion.is_null() && fusion(&manifest.fusion) != fusion(&ours) {
            let message = format!(
                "was trained with `fusion: {}`, the recipe has {}",
                manifest.fusion,
                if ours.is_null() { "none".into() } else { ours.to_string() }
            );
            return refused(message, &format!("--set 'fusion={}'", manifest.fusion));
        }
        Ok(())
    }

    /// Whether a threshold or a temperature of this adapter is one of the recipe's task.
    pub(super) fn is_for_this_task(&self, manifest: &Manifest) -> Result<bool> {
        Ok(self.other_task(manifest)?.is_none())
    }

    /// How the task of an adapter differs from the recipe's; nothing where it does not say or is none that is known.
    fn other_task(&self, manifest: &Manifest) -> Result<Option<(String, String)>> {
        let Ok(theirs) = serde_json::from_value::<TaskConfig>(manifest.task.clone()) else { return Ok(None) };
        let (theirs, ours) = (Shape::of(&to_json(&theirs)?), Shape::of(&to_json(&self.recipe.task)?));
        Ok(theirs.zip(ours).and_then(|(theirs, ours)| theirs.difference(&ours)))
    }
}
