//! Whether adapters on one another all have a part in the answers.

use std::path::{Path, PathBuf};

use super::Model;
use crate::delta::{Adapters, Delta};
use crate::error::{Error, Result};
use crate::task::HEAD;

/// How an adapter takes part in answers, where that can exclude another's.
#[derive(Debug, Clone)]
pub(super) struct Part {
    dir: PathBuf,
    /// A linear head: it looks at images alone.
    head: bool,
    /// A task of its own, which does not rank labels.
    tells: bool,
    /// Of these, one that scores class prompts all the same, each by a threshold.
    by_prompts: bool,
    /// Adds to the logits of class prompts.
    adds_logits: bool,
    /// Changes nothing but how texts are encoded.
    of_texts: bool,
}

impl Part {
    pub(super) fn of(dir: &Path, delta: &Delta, adapters: &Adapters, tells: bool) -> Self {
        let head = delta.own.iter().any(|(name, _)| name == HEAD[0]);
        let mut names = adapters.params.iter().map(|p| p.name.as_str()).peekable();
        let of_texts = names.peek().is_some() && names.all(|name| name.contains("text_model."));
        Self {
            dir: dir.to_path_buf(),
            head,
            tells,
            adds_logits: adapters.view.adds_logits(),
            by_prompts: !head && delta.has_class_rows(),
            of_texts,
        }
    }

    fn judges(&self) -> bool {
        self.head || self.tells
    }

    /// Why one of the two would have no part in any answer.
    fn excludes(&self, other: &Self) -> Option<String> {
        let two = other.dir.display();
        if self.judges() && other.judges() {
            return Some(format!("has a trained head or task, and so has {two}: only one of them can answer"));
        }
        let pairs = [(self, other), (other, self)];
        let (judge, _) = pairs.into_iter().find(|(a, b)| a.judges() && !a.by_prompts && b.adds_logits)?;
        Some(if judge.dir == self.dir {
            format!("answers by its trained head or task, which leaves out what {two} adds to the scores of class prompts")
        } else {
            format!("adds to the scores of class prompts, which {two} leaves out, since it answers by its trained head or task")
        })
    }
}

impl Model {
    /// Takes in an adapter's part.
    ///
    /// # Errors
    /// When it and one before it cannot both have a part in the answers.
    pub(super) fn join(&mut self, part: Part) -> Result<()> {
        for other in &self.parts {
            if let Some(why) = part.excludes(other) {
                return Err(Error::input(part.dir.display(), why).hint("name one of the two"));
            }
            if let Some((texts, head)) = [(&part, other), (other, &part)].into_iter().find(|(a, b)| a.of_texts && b.head && !b.tells) {
                self.notes.push(format!(
                    "{}: changes texts alone, and the head of {} looks at images alone, so that it changes nothing here",
                    texts.dir.display(),
                    head.dir.display()
                ));
            }
        }
        self.parts.push(part);
        Ok(())
    }
}
