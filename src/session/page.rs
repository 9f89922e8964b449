//! What a run's page shows besides its report.

use std::collections::HashMap;

use super::{RunDir, Session, load};
use crate::change::{Change, changes};
use crate::data::{Example, Split};
use crate::delta::{Adapters, BaseRef};
use crate::error::Result;
use crate::page;
use crate::report::{Prediction, TrainReport};
use crate::train::{Observer, Trainer};

impl Session {
    /// What the adapters change of the base, and which of them do not fold.
    pub(super) fn changed(&self, trainer: &mut Trainer<'_>, observer: &mut dyn Observer) -> Result<(Vec<Change>, Vec<String>)> {
        let again = match self.replaced(trainer.adapters).is_empty() {
            true => None,
            false => Some(load(&self.recipe, self.base.clip.device(), observer)?),
        };
        let Adapters { view, methods, .. } = &mut *trainer.adapters;
        let why =
            view.iter().zip(&*methods).filter_map(|(p, m)| Some(format!("{} does not fold into the base: {}.", m.name(), p.unfoldable()?)));
        let why = why.collect();
        Ok((changes(again.as_ref().unwrap_or(&self.base).clip.sites(), view)?, why))
    }

    /// `report.html`.
    pub(super) fn page(
        &self,
        report: &TrainReport,
        run: &RunDir,
        split: Split,
        changes: &[Change],
        unfoldable: &[String],
    ) -> Result<String> {
        let base = BaseRef::of(&self.base, self.recipe.model.spec());
        let digests = [
            ("program", format!("peft {}", report.version)),
            ("base", base.digest),
            ("tokeniser", base.tokenizer),
            ("preprocessing", base.preprocess),
            ("recipe", format!("blake3:{}", blake3::hash(self.recipe.to_yaml()?.as_bytes()).to_hex())),
        ];
        let mistakes = self.mistakes(report, split)?;
        let (recipe, steps) = (self.recipe.to_yaml()?, run.steps()?);
        page::report(&page::RunPage { report, recipe: &recipe, steps: &steps, mistakes: &mistakes, changes, unfoldable, digests: &digests })
    }

    /// Wrong predictions, the most confident first.
    fn mistakes(&self, report: &TrainReport, split: Split) -> Result<Vec<page::Mistake>> {
        const SHOWN: usize = 24;
        let examples: HashMap<&str, &Example> = self.data.split(split).iter().map(|e| (e.id.as_str(), e)).collect();
        let definition = self.recipe.task.definition();
        // Where there are no class prompts, an example's own text is looked at.
        let (sees, texts) = (definition.reads_images(), definition.templates().is_empty());
        let judged = report.after.iter().filter(|e| e.classification.is_some()).flat_map(|e| &e.predictions);
        // What is judged with several texts is named after the example and the text.
        let example = |id: &str| examples.get(id).or_else(|| examples.get(id.split_once(" with \"")?.0)).copied();
        let all = judged.filter_map(|p| Some((p, example(&p.id)?)));
        let confidence = |p: &Prediction| p.scores.iter().copied().fold(0.0, f32::max);
        let mut wrong: Vec<_> = all.filter(|(p, _)| p.label.as_deref() != Some(&p.prediction)).collect();
        wrong.sort_by(|a, b| confidence(b.0).total_cmp(&confidence(a.0)));
        let one = |(p, example): (&Prediction, &Example)| {
            Ok(page::Mistake {
                id: p.id.clone(),
                image: if sees { Some(page::thumbnail(&self.images.open(example)?)?) } else { None },
                text: if texts { example.texts.first().cloned() } else { None },
                label: p.label.clone().unwrap_or_default(),
                prediction: p.prediction.clone(),
                confidence: confidence(p),
            })
        };
        wrong.into_iter().take(SHOWN).map(one).collect()
    }
}
