//! What a run was made of, beside what there is now: when it goes on, and when it is evaluated.

use std::path::Path;

use super::{Session, to_json};
use crate::data::Split;
use crate::delta::{self, BaseRef};
use crate::error::{Error, Result};
use crate::provenance::Provenance;
use crate::roster::{Roster, Settling};
use crate::train::{Event, Observer};

impl Session {
    /// The examples with their splits, and digests of all that results depend on.
    ///
    /// # Errors
    /// When a shard cannot be read.
    pub fn roster(&self) -> Result<Roster> {
        let base = BaseRef::of(&self.base, "");
        let pixels = format!("{} {}", base.preprocess, to_json(&self.recipe.images)?);
        let preprocess = format!("blake3:{}", blake3::hash(pixels.as_bytes()).to_hex());
        Roster::of(
            &self.data,
            Provenance {
                base: base.digest,
                architecture: base.architecture,
                tokenizer: base.tokenizer,
                preprocess,
                ..Provenance::default()
            },
        )
    }

    /// Refuses to go on with a run that was begun with something else; `made_of` is what its report says, where it is finished.
    pub(super) fn check_same(&self, dir: &Path, now: &Roster, made_of: Option<&Provenance>) -> Result<bool> {
        let before = Roster::find(dir)?;
        let told = match &before {
            Some(before) => before.differences(now, &self.data)?,
            None => made_of.map(|m| m.differing(&now.made_of)).unwrap_or_default().iter().map(|p| format!("{p} differ")).collect(),
        };
        match told.is_empty() {
            true => Ok(before.is_some()),
            false => Err(Error::input(dir.display(), format!("the run was begun with something else: {}", told.join("; ")))
                .hint("put back what has changed, or begin again with --force")),
        }
    }

    /// Puts examples where the run of an adapter had them, so that none that it has trained on or chosen by is tested with.
    pub(super) fn settle(&mut self, adapter: &Path, observer: &mut dyn Observer) -> Result<()> {
        let Some(manifest) = delta::manifest(adapter)? else { return Ok(()) };
        let roster = roster_of(adapter)?.filter(|r| r.made_of.differing(&manifest.made_of).is_empty());
        let own = manifest.recipe.get("data").is_some_and(|data| to_json(&self.recipe.data).is_ok_and(|now| now == *data));
        let Some(roster) = roster else {
            if let Some(note) = self.unknown(&manifest.made_of)? {
                observer.event(Event::Note(note));
            }
            return Ok(());
        };
        let settled = roster.settle(&mut self.data, Settling { own, drawn: self.recipe.data.shots.is_some() })?;
        let mut told = Vec::new();
        if own && settled.new + settled.gone > 0 {
            told.push(format!("since the run began, {} examples have come and {} have gone", settled.new, settled.gone));
        }
        if own {
            let listed: &[Split] =
                if self.data.stream.is_some() { &[Split::Val, Split::Test] } else { &[Split::Train, Split::Val, Split::Test] };
            told.extend(roster.changed(&self.data, listed)?.into_iter().map(|change| format!("{change} since the run began")));
        }
        if settled.moved > 0 {
            told.push(format!(
                "{} examples stay in the split that the run had them in, so that none it has seen is tested with",
                settled.moved
            ));
        }
        for split in [Split::Val, Split::Test] {
            let seen = roster.seen_before(&self.data, split);
            if seen > 0 {
                let all = self.data.count(split);
                told.push(format!("{seen} of {all} {split} examples were seen by adapters that the run started from"));
            }
        }
        if !told.is_empty() {
            observer.event(Event::Note(told.join("; ")));
        }
        Ok(())
    }

    /// What to say where the run's list of examples is not beside an adapter.
    fn unknown(&self, made_of: &Provenance) -> Result<Option<String>> {
        const SO: &str = "whether it was trained on examples that are evaluated is not known";
        if made_of.data.is_empty() {
            return Ok(Some(format!("the adapter does not say which data it was trained on: {SO}")));
        }
        let differ = made_of.differing(&self.roster()?.made_of).contains(&"the data");
        Ok(differ.then(|| format!("the adapter was trained on other data, and the list of its examples is not beside it: {SO}")))
    }

    /// Warns where an adapter that training starts from is of another base, or has seen what is to be tested with.
    pub(super) fn warn_of_init(&self, now: &mut Roster, observer: &mut dyn Observer) -> Result<()> {
        let Some(init) = &self.recipe.train.init_adapter else { return Ok(()) };
        let dir = delta::locate(init)?;
        let manifest = delta::manifest(&dir)?;
        let base = manifest.as_ref().map(|m| &m.base).filter(|b| !b.digest.is_empty() && b.digest != self.base.digest);
        if let Some(base) = base {
            let message = format!(
                "train.init_adapter was made for {} ({}), this base has other weights ({})",
                base.name, base.digest, self.base.digest
            );
            observer.event(Event::Warning(message));
        }
        let Some(roster) = roster_of(&dir)? else {
            let made_of = manifest.map(|m| m.made_of).unwrap_or_default();
            if let Some(unknown) = self.unknown(&made_of)? {
                observer.event(Event::Warning(format!("train.init_adapter: {unknown}")));
            }
            return Ok(());
        };
        now.inherit(&roster);
        for split in [Split::Val, Split::Test] {
            let seen = roster.seen_in(&self.data, split);
            if seen > 0 {
                let all = self.data.count(split);
                observer
                    .event(Event::Warning(format!("{seen} of {all} {split} examples were seen by train.init_adapter when it was trained")));
            }
        }
        Ok(())
    }
}

/// The list beside an adapter in its run directory.
fn roster_of(adapter: &Path) -> Result<Option<Roster>> {
    let place = adapter.canonicalize().unwrap_or_else(|_| adapter.to_path_buf());
    place.parent().map_or(Ok(None), Roster::find)
}
