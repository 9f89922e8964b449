//! What validation and test share with training and should not, and what they ask that training does not have.

use std::collections::HashMap;

use super::example::content_of;
use super::{Dataset, Example, ImageRef, Split};

/// Classes that are named; the others are counted.
const SHOWN: usize = 5;

/// What makes two examples the same to who is tested: the image's bytes; without images the texts.
fn seen(e: &Example) -> Option<(bool, u64)> {
    if e.image != ImageRef::Missing {
        return e.content.map(|c| (true, c));
    }
    let texts: Vec<&str> = e.question.iter().chain(&e.texts).map(String::as_str).collect();
    (!texts.is_empty()).then(|| (false, content_of(texts.join("\u{1f}").as_bytes())))
}

impl Dataset {
    /// A note for validation and test each, where some of their examples are trained on too: as copies under other names, or as rows
    /// that occur twice. Contents are known once images have been verified; what is streamed is not looked through.
    #[must_use]
    pub fn overlaps(&self) -> Vec<String> {
        let trained: HashMap<(bool, u64), &str> = self.train.iter().filter_map(|e| Some((seen(e)?, e.id.as_str()))).collect();
        [Split::Val, Split::Test].into_iter().filter_map(|split| self.overlap(split, &trained)).collect()
    }

    /// Examples of each class in a split, in label order; one with several labels counts for each. None of a streamed one.
    #[must_use]
    pub fn class_counts(&self, split: Split) -> Vec<usize> {
        let mut counts = vec![0; self.classes.len()];
        self.split(split).iter().flat_map(Example::all_labels).for_each(|label| counts[*label as usize] += 1);
        counts
    }

    /// A note where examples are tested whose class nobody trains.
    #[must_use]
    pub fn untrained(&self) -> Option<String> {
        if self.stream.is_some() {
            return None;
        }
        let (trained, tested) = (self.class_counts(Split::Train), self.class_counts(Split::Test));
        let lacking: Vec<String> = (0..self.classes.len())
            .filter(|class| trained[*class] == 0 && tested[*class] > 0)
            .map(|class| format!("`{}` ({})", self.classes[class], tested[class]))
            .collect();
        let more = if lacking.len() > SHOWN { format!(" and {} more", lacking.len() - SHOWN) } else { String::new() };
        let shown = lacking[..lacking.len().min(SHOWN)].join(", ");
        (!lacking.is_empty()).then(|| format!("{} classes have test examples and no training example: {shown}{more}", lacking.len()))
    }

    fn overlap(&self, split: Split, trained: &HashMap<(bool, u64), &str>) -> Option<String> {
        let all = self.split(split);
        let both: Vec<(&Example, &str)> = all.iter().filter_map(|e| Some((e, *trained.get(&seen(e)?)?))).collect();
        let (first, other) = both.first()?;
        let what = if first.image == ImageRef::Missing { "have texts" } else { "show images" };
        Some(format!(
            "{} of {} {split} examples {what} that are trained on as well, so that their figures are too good (the first: {} = {other}); \
             `peft data` lists copies",
            both.len(),
            all.len(),
            first.id
        ))
    }
}
