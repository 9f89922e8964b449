//! What a run's page shows besides its report.

use std::collections::{BTreeMap, HashMap};

use super::{RunDir, Session, load};
use crate::change::{Change, changes};
use crate::data::{Example, ImageRef, Split};
use crate::delta::{Adapters, BaseRef};
use crate::error::Result;
use crate::page;
use crate::report::{Prediction, TrainReport};
use crate::task::{LOGIT_THRESHOLD, normalise};
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
        scalars: &BTreeMap<String, f64>,
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
        let mistakes = self.mistakes(report, split, &Verdicts { task: self.recipe.task.name(), scalars, classes: &report.classes })?;
        let (recipe, steps) = (self.recipe.to_yaml()?, run.steps()?);
        page::report(&page::RunPage { report, recipe: &recipe, steps: &steps, mistakes: &mistakes, changes, unfoldable, digests: &digests })
    }

    /// Wrong predictions, the worst first.
    fn mistakes(&self, report: &TrainReport, split: Split, verdicts: &Verdicts<'_>) -> Result<Vec<page::Mistake>> {
        const SHOWN: usize = 24;
        let list = self.data.split(split);
        let examples: HashMap<&str, &Example> = list.iter().map(|e| (e.id.as_str(), e)).collect();
        let definition = self.recipe.task.definition();
        let judged = report.after.as_ref().map_or(&[][..], |e| &e.predictions);
        // Several pairs or questions may be about one image, after which they are named: then the order tells them apart.
        let in_order = judged.len() == list.len() && judged.iter().zip(list).all(|(p, e)| p.id == e.id);
        // What is judged with several texts is named after the example and the text.
        let example = |id: &str| examples.get(id).or_else(|| examples.get(parts(id)?.0)).copied();
        let of = |i: usize, id: &str| if in_order { list.get(i) } else { example(id) };
        let judged = judged.iter().enumerate();
        let mut wrong: Vec<_> = judged.filter_map(|(i, p)| Some((p, of(i, &p.id)?, verdicts.amiss(p)?))).collect();
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
                confidence: verdicts.confidence(p),
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

/// How verdicts came about.
struct Verdicts<'a> {
    task: &'a str,
    /// Thresholds and the temperature.
    scalars: &'a BTreeMap<String, f64>,
    classes: &'a [String],
}

impl Verdicts<'_> {
    /// How bad a prediction is: the error of a number, how far a logit is on the wrong side; nothing where it is right. Probabilities
    /// do not tell: in f32 those of large logits are equal.
    fn amiss(&self, p: &Prediction) -> Option<f64> {
        let label = p.label.as_deref().unwrap_or_default();
        let wrong = match self.task {
            "regress" => return Some((label.parse::<f64>().ok()? - p.prediction.parse::<f64>().ok()?).abs()),
            // As the VQA challenge compares them; the label is already.
            "answer" => label != normalise(&p.prediction),
            _ => label != p.prediction,
        };
        wrong.then(|| self.far(p, label))
    }

    fn far(&self, p: &Prediction, label: &str) -> f64 {
        let logits: Vec<f64> = p.logits.iter().map(|z| f64::from(*z)).collect();
        match (self.task, self.threshold("")) {
            ("match", threshold) if logits.len() == 2 => (logits[1] - threshold.unwrap_or(0.0)).abs(),
            ("classify", threshold) if threshold.is_some() || self.has_thresholds() => {
                let own: Vec<&str> = label.split('|').collect();
                let margin = |(z, class): (&f64, &String)| {
                    let limit = self.threshold(class).or(threshold).unwrap_or(0.0);
                    ((*z >= limit) != own.contains(&class.as_str())).then_some((z - limit).abs())
                };
                logits.iter().zip(self.classes).filter_map(margin).fold(0.0, f64::max)
            }
            _ if logits.len() > 1 => self.log_odds(p, &logits),
            _ => p.scores.iter().copied().reduce(f32::max).map_or(0.0, f64::from),
        }
    }

    /// What orders examples as the largest probability does.
    fn log_odds(&self, p: &Prediction, logits: &[f64]) -> f64 {
        let first = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap_or(0);
        // Where each answer is a yes or no by itself, others say nothing of it.
        if (p.scores.iter().sum::<f32>() - 1.0).abs() > 1e-2 {
            return logits[first];
        }
        let temperature = self.scalars.get("temperature").copied().unwrap_or(1.0);
        let others = || (0..logits.len()).filter(|i| *i != first).map(|i| logits[i] / temperature);
        let most = others().fold(f64::NEG_INFINITY, f64::max);
        logits[first] / temperature - most - others().map(|z| (z - most).exp()).sum::<f64>().ln()
    }

    /// The threshold of a class, or that of all where it is the empty name.
    fn threshold(&self, class: &str) -> Option<f64> {
        let key = if class.is_empty() { LOGIT_THRESHOLD.to_string() } else { format!("{LOGIT_THRESHOLD}/{class}") };
        self.scalars.get(&key).copied()
    }

    fn has_thresholds(&self) -> bool {
        self.scalars.keys().any(|key| key.starts_with(LOGIT_THRESHOLD))
    }

    /// The probability of what was predicted, or the largest where several may be.
    fn confidence(&self, p: &Prediction) -> Option<f32> {
        let predicted = self.classes.iter().position(|c| *c == p.prediction).filter(|_| self.task == "match");
        predicted.and_then(|i| p.scores.get(i).copied()).or_else(|| p.scores.iter().copied().reduce(f32::max))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prediction(label: &str, prediction: &str, scores: &[f32]) -> Prediction {
        Prediction { id: "a".into(), label: Some(label.into()), prediction: prediction.into(), scores: scores.to_vec(), logits: Vec::new() }
    }

    #[test]
    fn errors_of_numbers_and_wrong_words_are_amiss() {
        let amiss = |task: &str, p: &Prediction| Verdicts { task, scalars: &BTreeMap::new(), classes: &[] }.amiss(p);
        assert_eq!(amiss("regress", &prediction("2", "3.5", &[])), Some(1.5));
        assert_eq!(amiss("classify", &prediction("cat", "dog", &[0.25, 0.75])), Some(0.75));
        assert_eq!(amiss("classify", &prediction("cat", "cat", &[0.75, 0.25])), None);
        assert_eq!(amiss("classify", &prediction("dog", "The Dog.", &[1.0])), Some(1.0));
        assert_eq!(amiss("answer", &prediction("dog", "The Dog.", &[1.0])), None);
    }

    /// Above a logit of 17 probabilities are equal in f32; how bad a mistake is follows from logits and thresholds.
    #[test]
    fn mistakes_whose_probabilities_are_equal_are_told_apart() {
        let (fits, none) = (["does not fit".to_string(), "fits".into()], BTreeMap::new());
        let at = BTreeMap::from([(LOGIT_THRESHOLD.to_string(), 25.0)]);
        let pair = |z: f32, label: &str, predicted: &str| Prediction { logits: vec![-z, z], ..prediction(label, predicted, &[0.0, 1.0]) };
        let verdicts = Verdicts { task: "match", scalars: &at, classes: &fits };
        assert_eq!(verdicts.amiss(&pair(60.0, "does not fit", "fits")), Some(35.0));
        assert_eq!(verdicts.amiss(&pair(26.0, "does not fit", "fits")), Some(1.0));
        assert_eq!(verdicts.amiss(&pair(18.0, "fits", "does not fit")), Some(7.0));
        assert_eq!(verdicts.confidence(&pair(18.0, "fits", "does not fit")), Some(0.0));
        let of_one = |z: [f32; 3]| Prediction { logits: z.to_vec(), ..prediction("a", "b", &[0.0, 1.0, 0.0]) };
        let classify = Verdicts { task: "classify", scalars: &none, classes: &[] };
        let [more, less] = [[0.0, 90.0, 1.0], [0.0, 40.0, 30.0]].map(|z| classify.amiss(&of_one(z)).unwrap_or(f64::NAN));
        assert!(more > 80.0 && (9.0..10.0).contains(&less), "{more} {less}");
        let classes = ["a".to_string(), "b".into(), "c".into()];
        let each = BTreeMap::from([("logit_threshold/a".to_string(), 30.0), ("logit_threshold/b".into(), -5.0)]);
        let several = Verdicts { task: "classify", scalars: &each, classes: &classes };
        let p = Prediction { logits: vec![20.0, 10.0, -4.0], ..prediction("a|b|c", "b", &[1.0, 1.0, 0.0]) };
        assert_eq!(several.amiss(&p), Some(10.0));
    }

    #[test]
    fn the_text_that_was_judged_is_found_again() {
        assert_eq!(parts("ambulance with \"a \"red\" bus\""), Some(("ambulance", "a \"red\" bus")));
        assert_eq!(parts("ambulance"), None);
    }
}
