//! What a run's page shows besides its report.

use std::collections::HashMap;

use super::{RunDir, Session, load};
use crate::change::{Change, changes};
use crate::data::{Example, ImageRef, Split};
use crate::delta::{Adapters, BaseRef};
use crate::error::Result;
use crate::page;
use crate::report::{Prediction, TrainReport};
use crate::task::normalise;
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

    /// Wrong predictions, the worst first.
    fn mistakes(&self, report: &TrainReport, split: Split) -> Result<Vec<page::Mistake>> {
        const SHOWN: usize = 24;
        let examples: HashMap<&str, &Example> = self.data.split(split).iter().map(|e| (e.id.as_str(), e)).collect();
        let definition = self.recipe.task.definition();
        let judged = report.after.iter().flat_map(|e| &e.predictions);
        // What is judged with several texts is named after the example and the text.
        let example = |id: &str| examples.get(id).or_else(|| examples.get(parts(id)?.0)).copied();
        let mut wrong: Vec<_> = judged.filter_map(|p| Some((p, example(&p.id)?, amiss(definition.name(), p)?))).collect();
        wrong.sort_by(|a, b| b.2.total_cmp(&a.2));
        let one = |(p, example, _): (&Prediction, &Example, f64)| {
            // Where there are class prompts, or the text itself is sought, an example's own text is not looked at.
            let text = match definition.templates().is_empty() && definition.name() != "retrieve" {
                true => parts(&p.id).map(|found| found.1).or(example.question.as_deref()).or(example.texts.first().map(String::as_str)),
                false => None,
            };
            let sees = definition.reads_images() && !matches!(example.image, ImageRef::Missing);
            Ok(page::Mistake {
                id: p.id.clone(),
                image: if sees { Some(page::thumbnail(&self.images.open(example)?)?) } else { None },
                text: text.map(String::from),
                label: p.label.clone().unwrap_or_default(),
                prediction: p.prediction.clone(),
                confidence: p.scores.iter().copied().reduce(f32::max),
            })
        };
        wrong.into_iter().take(SHOWN).map(one).collect()
    }
}

/// An example and one of the texts that it was judged with.
fn parts(id: &str) -> Option<(&str, &str)> {
    let (example, text) = id.split_once(" with \"")?;
    Some((example, text.strip_suffix('"')?))
}

/// How bad a prediction is: the error of a number, the confidence in what is wrong; nothing where it is right.
fn amiss(task: &str, p: &Prediction) -> Option<f64> {
    let label = p.label.as_deref().unwrap_or_default();
    let wrong = match task {
        "regress" => return Some((label.parse::<f64>().ok()? - p.prediction.parse::<f64>().ok()?).abs()),
        // As the VQA challenge compares them; the label is already.
        "answer" => label != normalise(&p.prediction),
        _ => label != p.prediction,
    };
    wrong.then(|| p.scores.iter().copied().reduce(f32::max).map_or(0.0, f64::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prediction(label: &str, prediction: &str, scores: &[f32]) -> Prediction {
        Prediction { id: "a".into(), label: Some(label.into()), prediction: prediction.into(), scores: scores.to_vec(), logits: Vec::new() }
    }

    #[test]
    fn errors_of_numbers_and_wrong_words_are_amiss() {
        assert_eq!(amiss("regress", &prediction("2", "3.5", &[])), Some(1.5));
        assert_eq!(amiss("classify", &prediction("cat", "dog", &[0.25, 0.75])), Some(0.75));
        assert_eq!(amiss("classify", &prediction("cat", "cat", &[0.75, 0.25])), None);
        assert_eq!(amiss("classify", &prediction("dog", "The Dog.", &[1.0])), Some(1.0));
        assert_eq!(amiss("answer", &prediction("dog", "The Dog.", &[1.0])), None);
    }

    #[test]
    fn the_text_that_was_judged_is_found_again() {
        assert_eq!(parts("ambulance with \"a \"red\" bus\""), Some(("ambulance", "a \"red\" bus")));
        assert_eq!(parts("ambulance"), None);
    }
}
