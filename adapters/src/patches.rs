//! The patches of one recipe as one.

use candle_core::{Result as TensorResult, Tensor};

use crate::flow::{Branch, ClassFeatures, Embedded, LinearOut, Qkv, Sequence};
use crate::method::{Fold, Patch, Step};
use crate::sites::{SiteId, WeightId};

/// The patches of one recipe, in recipe order.
#[derive(Default)]
pub struct Patches {
    list: Vec<Box<dyn Patch>>,
}

impl std::fmt::Debug for Patches {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Patches({})", self.list.len())
    }
}

impl Patches {
    /// The unpatched model.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// Patches in recipe order.
    #[must_use]
    pub fn new(list: Vec<Box<dyn Patch>>) -> Self {
        Self { list }
    }

    /// Adds a patch that runs after those that are there.
    pub fn push(&mut self, patch: Box<dyn Patch>) {
        self.list.push(patch);
    }

    /// Takes away the patch that runs last.
    pub fn pop(&mut self) -> Option<Box<dyn Patch>> {
        self.list.pop()
    }

    /// Adds all of `others` in front of the patch at `index`.
    pub fn insert(&mut self, index: usize, others: Self) {
        self.list.splice(index..index, others.list);
    }

    /// Adds all of `others` behind those that are there.
    pub fn extend(&mut self, others: Self) {
        self.list.extend(others.list);
    }

    /// The patches in order.
    pub fn iter(&self) -> impl Iterator<Item = &dyn Patch> {
        self.list.iter().map(AsRef::as_ref)
    }

    /// The patches in order, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Box<dyn Patch>> {
        self.list.iter_mut()
    }

    /// See [`Patch::prepare`].
    ///
    /// # Errors
    /// When a patch fails.
    pub fn prepare(&mut self, step: &Step) -> TensorResult<()> {
        self.list.iter_mut().try_for_each(|p| p.prepare(step))
    }

    /// See [`Patch::weight`].
    ///
    /// # Errors
    /// When a patch fails.
    pub fn weight(&self, id: WeightId, value: &Tensor) -> TensorResult<Tensor> {
        self.iter().try_fold(value.clone(), |w, p| p.weight(id, w))
    }

    /// See [`Patch::linear`].
    ///
    /// # Errors
    /// When a patch fails.
    pub fn linear(&self, at: SiteId, y: LinearOut) -> TensorResult<LinearOut> {
        self.iter().try_fold(y, |y, p| p.linear(at, y))
    }

    /// See [`Patch::embedding`].
    ///
    /// # Errors
    /// When a patch fails.
    pub fn embedding(&self, at: SiteId, ids: Option<&Tensor>, rows: Tensor) -> TensorResult<Tensor> {
        self.iter().try_fold(rows, |rows, p| p.embedding(at, ids, rows))
    }

    /// See [`Patch::attention`].
    ///
    /// # Errors
    /// When a patch fails.
    pub fn attention(&self, at: SiteId, qkv: Qkv) -> TensorResult<Qkv> {
        self.iter().try_fold(qkv, |qkv, p| p.attention(at, qkv))
    }

    /// See [`Patch::embed`].
    ///
    /// # Errors
    /// When a patch fails.
    pub fn embed(&self, at: SiteId, embedded: Embedded) -> TensorResult<Embedded> {
        self.iter().try_fold(embedded, |e, p| p.embed(at, e))
    }

    /// See [`Patch::tokens`].
    ///
    /// # Errors
    /// When a patch fails.
    pub fn tokens(&self, at: SiteId, sequence: Sequence) -> TensorResult<Sequence> {
        self.iter().try_fold(sequence, |s, p| p.tokens(at, s))
    }

    /// See [`Patch::branch`].
    ///
    /// # Errors
    /// When a patch fails.
    pub fn branch(&self, at: SiteId, residual: &Tensor, input: &Tensor, output: Tensor) -> TensorResult<Tensor> {
        self.iter().try_fold(output, |output, p| p.branch(at, Branch { residual, input, output }))
    }

    /// See [`Patch::features`].
    ///
    /// # Errors
    /// When a patch fails.
    pub fn features(&self, at: SiteId, features: Tensor) -> TensorResult<Tensor> {
        self.iter().try_fold(features, |f, p| p.features(at, f))
    }

    /// See [`Patch::class_features`].
    ///
    /// # Errors
    /// When a patch fails.
    pub fn class_features(&self, classes: ClassFeatures, images: &Tensor) -> TensorResult<ClassFeatures> {
        self.iter().try_fold(classes, |c, p| p.class_features(c, images))
    }

    /// See [`Patch::logits`].
    ///
    /// # Errors
    /// When a patch fails.
    pub fn logits(&self, logits: Tensor, images: &Tensor) -> TensorResult<Tensor> {
        self.iter().try_fold(logits, |l, p| p.logits(l, images))
    }

    /// See [`Patch::adds_logits`].
    #[must_use]
    pub fn adds_logits(&self) -> bool {
        self.iter().any(Patch::adds_logits)
    }

    /// See [`Patch::per_image`].
    #[must_use]
    pub fn per_image(&self) -> bool {
        self.iter().any(Patch::per_image)
    }

    /// See [`Patch::class_bound`].
    #[must_use]
    pub fn class_bound(&self) -> bool {
        self.iter().any(Patch::class_bound)
    }

    /// The sum of all regularisers.
    ///
    /// # Errors
    /// When a patch fails.
    pub fn regulariser(&self) -> TensorResult<Option<Tensor>> {
        let mut sum: Option<Tensor> = None;
        for patch in self.iter() {
            if let Some(term) = patch.regulariser()? {
                sum = Some(match sum {
                    Some(s) => (s + term)?,
                    None => term,
                });
            }
        }
        Ok(sum)
    }

    /// A base weight with every patch folded in, in order; `None` where nothing changes it.
    ///
    /// # Errors
    /// When a patch fails.
    pub fn fold(&self, id: WeightId, value: &Tensor) -> TensorResult<Option<Tensor>> {
        let own = self.weight(id, value)?;
        let replaced = (own.id() != value.id()).then(|| own.detach());
        Ok(self.fold_onto(id, &own)?.or(replaced))
    }

    /// [`Patches::fold`] onto a weight that the `weight` hooks, perhaps of several adapters, have already replaced.
    ///
    /// # Errors
    /// When a patch fails.
    pub fn fold_onto(&self, id: WeightId, value: &Tensor) -> TensorResult<Option<Tensor>> {
        let mut folded: Option<Tensor> = None;
        for patch in self.iter() {
            let now = folded.as_ref().unwrap_or(value);
            if let Fold::Replace(w) = patch.fold(id, now)? {
                folded = Some(w);
            }
        }
        Ok(folded)
    }
}
