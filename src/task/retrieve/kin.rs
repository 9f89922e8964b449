//! What belongs together in a batch, and what is a negative of what.

use std::collections::HashSet;

use peft_adapters::rng;

use crate::data::Example;

/// How the rows and columns of a square of similarities belong together.
#[derive(Debug)]
pub(super) struct Kin {
    pub(super) count: usize,
    positive: Vec<bool>,
    /// What is neither is left out: an image and itself.
    negative: Vec<bool>,
    /// Columns are of another kind than rows, so that both ways count.
    pub(super) both_ways: bool,
}

/// What an example shows, quick to compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shown {
    /// Its group, or itself.
    group: u64,
    image: Option<u128>,
}

impl Shown {
    pub(super) fn of(e: &Example) -> Self {
        Self { group: rng::name_key(e.group.as_deref().unwrap_or(&e.id)), image: e.image_key }
    }

    /// Whether both show the same image.
    pub(super) fn is_image_of(&self, other: &Self) -> bool {
        self.image.is_some() && self.image == other.image
    }

    /// Whether both show the same image, or images of one group.
    pub(super) fn belongs(&self, other: &Self) -> bool {
        self.group == other.group || self.is_image_of(other)
    }
}

impl Kin {
    /// Images and texts, one of each example. An image's positives are its own text, those of its group, and whatever else is one
    /// of its captions ("an icon of a mammal", drawn for another mammal); all others are negatives.
    pub(super) fn of_texts(examples: &[&Example], texts: &[&str]) -> Self {
        let drawn: Vec<(Shown, u64)> = examples.iter().zip(texts).map(|(e, t)| (Shown::of(e), rng::name_key(t))).collect();
        let of_image = |(at, image): (usize, &&Example)| {
            let captions: HashSet<u64> = image.texts.iter().map(|t| rng::name_key(t)).collect();
            let own = drawn[at];
            let belongs = |&(shown, text): &(Shown, u64)| shown.belongs(&own.0) || text == own.1 || captions.contains(&text);
            drawn.iter().map(belongs).collect::<Vec<_>>()
        };
        let positive: Vec<bool> = examples.iter().enumerate().flat_map(of_image).collect();
        Self { count: examples.len(), negative: positive.iter().map(|p| !p).collect(), positive, both_ways: true }
    }

    /// Images among themselves: those of a class, or of a group, belong together. An image and itself are left out, in another
    /// row as well.
    pub(super) fn of_labels(examples: &[&Example]) -> Self {
        let keys: Vec<(Shown, Option<u32>)> = examples.iter().map(|e| (Shown::of(e), e.label)).collect();
        let count = keys.len();
        let same = |i: usize, j: usize| keys[i].0.belongs(&keys[j].0) || keys[i].1.is_some() && keys[i].1 == keys[j].1;
        let other = |i: usize, j: usize| i != j && !keys[i].0.is_image_of(&keys[j].0);
        let all = |of: &dyn Fn(usize, usize) -> bool| (0..count * count).map(|at| of(at / count, at % count)).collect();
        Self {
            count,
            positive: all(&|i, j| other(i, j) && same(i, j)),
            negative: all(&|i, j| other(i, j) && !same(i, j)),
            both_ways: false,
        }
    }

    fn at(&self, i: usize, j: usize, turned: bool) -> usize {
        if turned { j * self.count + i } else { i * self.count + j }
    }

    pub(super) fn positive(&self, i: usize, j: usize, turned: bool) -> bool {
        self.positive[self.at(i, j, turned)]
    }

    pub(super) fn negative(&self, i: usize, j: usize, turned: bool) -> bool {
        self.negative[self.at(i, j, turned)]
    }

    /// Of each row what `of` says, row by row; `turned` exchanges rows and columns.
    pub(super) fn table(&self, of: impl Fn(usize, usize) -> f64) -> Vec<f64> {
        (0..self.count).flat_map(|i| (0..self.count).map(move |j| (i, j))).map(|(i, j)| of(i, j)).collect()
    }

    /// Row i spreads 1 over its positives; all 0 where it has none.
    pub(super) fn targets(&self, turned: bool) -> Vec<f32> {
        let row = |i: usize| {
            let share = 1.0 / (0..self.count).filter(|&j| self.positive(i, j, turned)).count().max(1) as f32;
            (0..self.count).map(move |j| if self.positive(i, j, turned) { share } else { 0.0 })
        };
        (0..self.count).flat_map(row).collect()
    }

    /// Rows that have a positive.
    pub(super) fn anchors(&self) -> usize {
        (0..self.count).filter(|&i| (0..self.count).any(|j| self.positive(i, j, false))).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(id: &str, group: Option<&str>, texts: &[&str]) -> Example {
        let texts = texts.iter().map(ToString::to_string).collect();
        Example { id: id.into(), texts, group: group.map(Into::into), ..Default::default() }
    }

    #[test]
    fn groups_and_equal_texts_are_no_negatives() {
        let all = [example("a", Some("g"), &[]), example("b", Some("g"), &[]), example("c", None, &[]), example("d", None, &[])];
        let references: Vec<&Example> = all.iter().collect();
        let kin = Kin::of_texts(&references, &["one", "two", "same", "same"]);
        let t = kin.targets(false);
        assert_eq!(&t[0..4], &[0.5, 0.5, 0.0, 0.0]);
        assert_eq!(&t[8..12], &[0.0, 0.0, 0.5, 0.5]);
        assert!(!kin.negative(0, 1, false) && !kin.negative(3, 2, true) && kin.negative(0, 2, false));
    }

    /// The cat's caption "a mammal" is also one of the dog's, which drew "a dog" this time.
    #[test]
    fn a_text_that_is_also_anothers_caption_is_no_negative_of_it() {
        let all = [example("cat", None, &["a cat", "a mammal"]), example("dog", None, &["a dog", "a mammal"])];
        let references: Vec<&Example> = all.iter().collect();
        let kin = Kin::of_texts(&references, &["a mammal", "a dog"]);
        assert_eq!(kin.targets(false), [1.0, 0.0, 0.5, 0.5]);
        assert_eq!(kin.targets(true), [0.5, 0.5, 0.0, 1.0]);
    }

    /// Two rows of one image, each with a caption, and another image: the captions are each other's positives.
    #[test]
    fn captions_of_one_image_are_no_negatives() {
        let of = |id: &str, image: u128| Example { image_key: Some(image), ..example(id, None, &[]) };
        let all = [of("a:1", 7), of("a:2", 7), of("b", 8)];
        let kin = Kin::of_texts(&all.iter().collect::<Vec<_>>(), &["one", "two", "three"]);
        assert_eq!(kin.targets(false), [0.5, 0.5, 0.0, 0.5, 0.5, 0.0, 0.0, 0.0, 1.0]);
        assert!(!kin.negative(0, 1, false) && kin.negative(0, 2, false));
        let kin = Kin::of_labels(&all.iter().collect::<Vec<_>>());
        assert!(!kin.positive(0, 1, false) && !kin.negative(0, 1, false) && kin.negative(0, 2, false));
    }

    #[test]
    fn images_of_a_class_or_a_group_belong_together_and_none_to_itself() {
        let of = |id: &str, group: Option<&str>, label| Example { label: Some(label), ..example(id, group, &[]) };
        let all = [of("a", None, 0), of("b", None, 0), of("c", Some("g"), 1), of("d", Some("g"), 2), of("e", None, 3)];
        let kin = Kin::of_labels(&all.iter().collect::<Vec<_>>());
        assert!((0..5).all(|i| !kin.positive(i, i, false) && !kin.negative(i, i, false)));
        assert!(kin.positive(0, 1, false) && kin.positive(2, 3, false) && kin.negative(0, 2, false) && kin.negative(4, 3, false));
        assert_eq!(kin.anchors(), 4);
    }
}
