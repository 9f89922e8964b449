//! What a run was made of, as digests: checkpoints, reports and adapters carry them, and whoever joins two of these compares them.

use serde::{Deserialize, Serialize};

/// Digests of the parts of a run; an empty one is not known, and is compared with nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Provenance {
    /// Ids, labels, texts and splits of all examples, and the content of their images as far as they were read.
    pub data: String,
    /// Class names in label order.
    pub classes: String,
    /// The base's weights.
    pub base: String,
    /// What the base computes with its weights: heads, activations, epsilons.
    pub architecture: String,
    /// The base's tokeniser.
    pub tokenizer: String,
    /// How images become tensors: the base's preprocessing and the recipe's `images`.
    pub preprocess: String,
}

impl Provenance {
    fn parts(&self) -> [(&'static str, &str); 6] {
        [
            ("the data", self.data.as_str()),
            ("the classes", &self.classes),
            ("the base's weights", &self.base),
            ("what config.json says of the base", &self.architecture),
            ("the tokeniser", &self.tokenizer),
            ("the preprocessing of images", &self.preprocess),
        ]
    }

    /// The parts that differ, by name.
    #[must_use]
    pub fn differing(&self, other: &Self) -> Vec<&'static str> {
        let pairs = self.parts().into_iter().zip(other.parts());
        pairs.filter(|((_, a), (_, b))| !a.is_empty() && !b.is_empty() && a != b).map(|((name, _), _)| name).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_differs_from_nothing() {
        let one = Provenance { data: "a".into(), base: "b".into(), ..Provenance::default() };
        let other = Provenance { data: "c".into(), base: "b".into(), classes: "d".into(), ..Provenance::default() };
        assert_eq!(one.differing(&other), ["the data"]);
        assert!(one.differing(&Provenance::default()).is_empty());
    }
}
