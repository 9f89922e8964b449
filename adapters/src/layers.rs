//! Frozen layers with sites, for models that want to be patched.

use candle_core::{Result, Tensor};

use crate::flow::LinearOut;
use crate::ops;
use crate::patches::Patches;
use crate::sites::{SiteId, WeightId};

/// A linear layer: `y = x Wᵀ + b`, then whatever the patches make of it.
#[derive(Debug, Clone)]
pub struct Linear {
    /// Where the `linear` hook runs.
    pub site: SiteId,
    /// `[out, in]`.
    pub weight: (WeightId, Tensor),
    /// `[out]`.
    pub bias: Option<(WeightId, Tensor)>,
}

impl Linear {
    /// Applies the layer.
    ///
    /// # Shapes
    /// `x` [..., in] → [..., out]
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(&self, x: &Tensor, patches: &Patches) -> Result<Tensor> {
        Ok(self.forward_sparing(x, patches)?.0)
    }

    /// Applies the layer for the sake of its gradient: the values that come out may be wrong.
    ///
    /// # Shapes
    /// `x` [..., in] → [..., out]
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward_unread(&self, x: &Tensor, patches: &Patches) -> Result<Tensor> {
        self.out(x, patches)?.unread()
    }

    /// Applies the layer and tells whether `x` can be [released](ops::release) once nobody else needs it.
    ///
    /// # Shapes
    /// `x` [..., in] → [..., out]
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward_sparing(&self, x: &Tensor, patches: &Patches) -> Result<(Tensor, bool)> {
        let out = self.out(x, patches)?;
        let spare = out.spares(x);
        Ok((out.value()?, spare))
    }

    fn out(&self, x: &Tensor, patches: &Patches) -> Result<LinearOut> {
        let weight = patches.weight(self.weight.0, &self.weight.1)?;
        let bias = match &self.bias {
            Some((id, b)) => Some(patches.weight(*id, b)?),
            None => None,
        };
        patches.linear(self.site, LinearOut::new(x.clone(), weight, bias))
    }
}

/// Layer norm over the last dimension.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    /// `[dim]`.
    pub weight: (WeightId, Tensor),
    /// `[dim]`.
    pub bias: (WeightId, Tensor),
    /// Added to the variance.
    pub eps: f64,
}

impl LayerNorm {
    /// Applies the norm.
    ///
    /// # Shapes
    /// `x` [..., dim] → [..., dim]
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(&self, x: &Tensor, patches: &Patches) -> Result<Tensor> {
        let weight = patches.weight(self.weight.0, &self.weight.1)?;
        let bias = patches.weight(self.bias.0, &self.bias.1)?;
        ops::layer_norm(x, &weight, &bias, self.eps)
    }
}

/// A convolution whose stride is its kernel: `y = cells Kᵀ` over unfolded patches, then whatever the patches make of it.
#[derive(Debug, Clone)]
pub struct PatchConv {
    /// Where the `linear` hook runs.
    pub site: SiteId,
    /// `[out, C, P, P]`.
    pub weight: (WeightId, Tensor),
}

impl PatchConv {
    /// Applies the kernel.
    ///
    /// # Shapes
    /// `cells` [..., C·P·P] → [..., out]
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(&self, cells: &Tensor, patches: &Patches) -> Result<Tensor> {
        let kernel = patches.weight(self.weight.0, &self.weight.1)?.flatten_from(1)?;
        patches.linear(self.site, LinearOut::new(cells.clone(), kernel, None))?.value()
    }
}

/// A table of vectors.
#[derive(Debug, Clone)]
pub struct Embedding {
    /// Where the `embedding` hook runs.
    pub site: SiteId,
    /// `[rows, dim]`.
    pub weight: (WeightId, Tensor),
}

impl Embedding {
    /// Looks ids up.
    ///
    /// # Shapes
    /// `ids` u32 [...] → [..., dim]
    ///
    /// # Errors
    /// When an id is outside the table.
    pub fn forward(&self, ids: &Tensor, patches: &Patches) -> Result<Tensor> {
        let rows = ops::embedding(&patches.weight(self.weight.0, &self.weight.1)?, ids)?;
        patches.embedding(self.site, Some(ids), rows)
    }

    /// The whole table as the patches see it.
    ///
    /// # Errors
    /// When a patch fails.
    pub fn table(&self, patches: &Patches) -> Result<Tensor> {
        let table = patches.weight(self.weight.0, &self.weight.1)?;
        // A view, since candle would hand a frozen summand itself a gradient.
        patches.embedding(self.site, None, table.reshape(table.shape())?)
    }
}
