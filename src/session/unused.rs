//! Options of a recipe that nothing comes of.

use peft_adapters::targets::is_suffix;
use serde_json::Value;

use super::{Session, to_json};
use crate::error::Result;
use crate::train::{Event, Observer};

/// Keys of a method whose lists name modules.
const NAMES: [&str; 2] = ["targets", "exclude"];

impl Session {
    /// Says which of the recipe's words name nothing, or change nothing.
    ///
    /// # Errors
    /// When the recipe cannot be written as JSON.
    pub(super) fn tell_unused(&self, observer: &mut dyn Observer) -> Result<()> {
        let mut told = Vec::new();
        for method in &self.recipe.method {
            let name = method.name();
            let value = to_json(method)?;
            for key in NAMES {
                let listed = value.get(name).and_then(|options| options.get(key)).and_then(Value::as_array);
                let idle = listed.into_iter().flatten().filter_map(Value::as_str).filter(|module| !self.has_module(module));
                told.extend(idle.map(|module| format!("method.{name}.{key}: `{module}` names no module of this model")));
            }
        }
        told.extend(self.recipe.task.definition().unused());
        told.extend(self.data.untrained());
        told.into_iter().for_each(|note| observer.event(Event::Note(note)));
        Ok(())
    }

    fn has_module(&self, name: &str) -> bool {
        self.base.clip.sites().iter().any(|(_, site)| is_suffix(&site.path, name))
    }
}
