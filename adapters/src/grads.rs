//! Gradients as methods see them.

use std::collections::HashMap;

use candle_core::{Result, Tensor};

/// Gradients of one step by parameter name.
#[derive(Debug)]
pub struct Grads {
    by_name: HashMap<String, Tensor>,
    scale: f64,
}

impl Grads {
    /// Gradients that the optimiser took `scale` times.
    #[must_use]
    pub fn new(by_name: HashMap<String, Tensor>, scale: f64) -> Self {
        Self { by_name, scale }
    }

    /// The gradient of a parameter, clipped as the optimiser saw it.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn get(&self, name: &str) -> Result<Option<Tensor>> {
        match self.by_name.get(name) {
            Some(grad) if self.scale != 1.0 => (grad * self.scale).map(Some),
            found => Ok(found.cloned()),
        }
    }
}
