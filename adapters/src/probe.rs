//! Looking for the place where a forward pass stops being finite.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Result as TensorResult, Tensor};

use crate::flow::{Branch, Embedded, LinearOut, Qkv, Sequence};
use crate::method::{Fold, Patch};
use crate::sites::{SiteId, WeightId};

/// A patch that changes nothing and remembers the first site whose values are not finite. It reads every value that passes,
/// so it is for a pass after the fact; push it behind the patches in question and keep a clone to ask.
#[derive(Debug, Clone, Default)]
pub struct Probe(Arc<Mutex<Option<Found>>>);

/// Where values were not finite for the first time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The site.
    pub site: SiteId,
    /// What of it: `input`, `output`.
    pub what: &'static str,
    /// Rows of the first dimension, an image or a text each, that have such values.
    pub rows: Vec<usize>,
    /// Rows in all.
    pub of: usize,
}

impl Probe {
    /// The first site, if there was one.
    #[must_use]
    pub fn found(&self) -> Option<Found> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn look(&self, site: SiteId, what: &'static str, value: &Tensor) -> TensorResult<()> {
        let mut found = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if found.is_none() {
            let rows = non_finite_rows(value)?;
            if !rows.is_empty() {
                *found = Some(Found { site, what, rows, of: value.dims().first().copied().unwrap_or(1) });
            }
        }
        Ok(())
    }
}

/// Rows of the first dimension that hold an infinity or a NaN.
///
/// # Shapes
/// [N, …]; a scalar counts as one row
///
/// # Errors
/// When the tensor cannot be read.
pub fn non_finite_rows(value: &Tensor) -> TensorResult<Vec<usize>> {
    let rows = value.dims().first().copied().unwrap_or(1);
    if value.elem_count() == 0 {
        return Ok(Vec::new());
    }
    let value = value.detach().to_dtype(DType::F32)?.reshape((rows, ()))?;
    // A finite value times zero is zero, everything else NaN.
    let sums = (value * 0.0)?.sum(1)?.to_vec1::<f32>()?;
    Ok(sums.iter().enumerate().filter(|(_, s)| **s != 0.0).map(|(row, _)| row).collect())
}

impl Patch for Probe {
    fn linear(&self, at: SiteId, y: LinearOut) -> TensorResult<LinearOut> {
        self.look(at, "input", y.x())?;
        y.map(|y| self.look(at, "output", &y).map(|()| y))
    }

    fn embedding(&self, at: SiteId, ids: Option<&Tensor>, rows: Tensor) -> TensorResult<Tensor> {
        if ids.is_some() {
            self.look(at, "output", &rows)?;
        }
        Ok(rows)
    }

    fn attention(&self, at: SiteId, qkv: Qkv) -> TensorResult<Qkv> {
        [&qkv.q, &qkv.k, &qkv.v].into_iter().try_for_each(|t| self.look(at, "input", t))?;
        Ok(qkv)
    }

    fn embed(&self, at: SiteId, embedded: Embedded) -> TensorResult<Embedded> {
        self.look(at, "input", &embedded.x)?;
        Ok(embedded)
    }

    fn tokens(&self, at: SiteId, sequence: Sequence) -> TensorResult<Sequence> {
        self.look(at, "input", &sequence.x)?;
        Ok(sequence)
    }

    fn branch(&self, at: SiteId, branch: Branch<'_>) -> TensorResult<Tensor> {
        self.look(at, "output", &branch.output)?;
        Ok(branch.output)
    }

    fn features(&self, at: SiteId, features: Tensor) -> TensorResult<Tensor> {
        self.look(at, "output", &features)?;
        Ok(features)
    }

    fn fold(&self, _id: WeightId, _value: &Tensor) -> TensorResult<Fold> {
        Ok(Fold::Unchanged)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::layers::Linear;
    use crate::sites::{Sites, Tower};
    use crate::{Patches, ops};

    /// Two layers, of which the second has an infinite weight in the output's last column: rows that do not use it stay finite.
    #[test]
    fn the_first_place_and_its_rows_are_found() {
        let mut sites = Sites::new();
        let mut layer = |name: &str, values: [f32; 4]| -> Linear {
            let weight = Tensor::from_slice(&values, (2, 2), &Device::Cpu).unwrap();
            sites.linear(name, Tower::Vision, Some(0), weight, None).unwrap()
        };
        let (sound, broken) = (layer("sound", [1.0, 0.0, 0.0, 1.0]), layer("broken", [1.0, 0.0, 0.0, 3e38]));
        let probe = Probe::default();
        let patches = Patches::new(vec![Box::new(probe.clone())]);
        let x = Tensor::from_slice(&[1f32, 0.0, 1.0, 9.0, 1.0, 0.5], (3, 2), &Device::Cpu).unwrap();
        let y = sound.forward(&x, &patches).unwrap();
        assert_eq!(probe.found(), None);
        let y = broken.forward(&y, &patches).unwrap();
        assert_eq!(probe.found(), Some(Found { site: broken.site, what: "output", rows: vec![1], of: 3 }));
        // Later places do not take its place.
        sound.forward(&ops::add(&y, &y).unwrap(), &patches).unwrap();
        assert_eq!(probe.found().unwrap().site, broken.site);
    }
}
