//! What runs would be made of now: a kept run, or a kept figure, of something else is made again.

use std::cell::RefCell;
use std::collections::BTreeMap;

use serde_json::json;

use super::{PlannedRun, Runner, Second};
use crate::error::{Error, Result};
use crate::provenance::Provenance;
use crate::recipe::{ModelConfig, Recipe};
use crate::run;
use crate::train::{Event, Observer};

/// Base and data as they are now; each is opened once.
pub(super) struct Now<'a> {
    runner: &'a dyn Runner,
    known: RefCell<BTreeMap<String, std::result::Result<Provenance, String>>>,
}

impl<'a> Now<'a> {
    pub(super) fn new(runner: &'a dyn Runner) -> Self {
        Self { runner, known: RefCell::default() }
    }

    fn once(&self, key: &serde_json::Value, make: impl FnOnce() -> Result<Provenance>) -> Result<Provenance> {
        let key = key.to_string();
        let known = self.known.borrow().get(&key).cloned();
        let found = known.unwrap_or_else(|| make().map_err(|e| e.to_string()));
        self.known.borrow_mut().insert(key, found.clone());
        found.map_err(|e| Error::input("", e))
    }

    /// What a run of a recipe would be made of.
    pub(super) fn of(&self, recipe: &Recipe) -> Result<Provenance> {
        // Which examples are drawn, and what random weights are, depends on the seed.
        let seeded = recipe.data.shots.is_some() || matches!(recipe.model, ModelConfig::Scratch(_));
        let seed = seeded.then_some(recipe.train.seed);
        self.once(&json!([recipe.model, recipe.data, recipe.images, recipe.task, seed]), || self.runner.made_of(recipe))
    }

    /// The base and the second set, as a key of what is measured there.
    pub(super) fn second(&self, recipe: &Recipe, second: &Second) -> Option<Provenance> {
        if second.data.builtin.is_some() {
            // It is inside the program, whose version is part of each key.
            return self.of(recipe).ok().map(|p| Provenance {
                base: p.base,
                tokenizer: p.tokenizer,
                preprocess: p.preprocess,
                ..Provenance::default()
            });
        }
        self.once(&json!([recipe.model, recipe.images, recipe.train.seed, second]), || self.runner.second_made_of(recipe, second)).ok()
    }

    /// Whether what is kept of a run was made of something else; says so.
    pub(super) fn replaces(&self, planned: &PlannedRun, recipe: &Recipe, observer: &mut dyn Observer) -> Result<bool> {
        let Some(before) = run::read_made_of(&planned.dir)? else { return Ok(false) };
        let place = planned.dir.display();
        let now = match self.of(recipe) {
            Ok(now) => now,
            Err(e) => {
                let note = format!("{place}: whether it was made of the data and the base that are there now is not known: {e}");
                observer.event(Event::Warning(note));
                return Ok(false);
            }
        };
        if before.data.is_empty() && !now.data.is_empty() {
            observer.event(Event::Warning(format!("{place}: does not say which data it was made of, so that cannot be compared")));
        }
        let differing = before.differing(&now);
        if !differing.is_empty() {
            observer.event(Event::Warning(format!("{place}: made again, since {} changed after it was made", differing.join(" and "))));
        }
        Ok(!differing.is_empty())
    }
}
