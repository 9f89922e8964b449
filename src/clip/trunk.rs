//! A tower in two parts: the blocks that nothing trained reaches, whose output can be kept, and the rest.

use candle_core::{Result as TensorResult, Tensor};
use peft_adapters::{Patches, Sequence};

use super::block::{Block, Pass};

/// Sequences on their way through a tower.
#[derive(Debug, Clone)]
pub struct Trunk {
    /// What enters block `depth`, [B, T, D].
    pub x: Tensor,
    /// The pooled position of each row; empty where the first token is.
    pub pool: Vec<u32>,
    /// [B, T] u8, 1 for tokens.
    pub mask: Option<Tensor>,
    /// How many blocks are behind them.
    pub depth: usize,
}

impl Trunk {
    /// Rows `from..from + count`.
    ///
    /// # Errors
    /// When the range is outside.
    pub fn narrow(&self, from: usize, count: usize) -> TensorResult<Self> {
        Ok(Self {
            x: self.x.narrow(0, from, count)?,
            pool: if self.pool.is_empty() { Vec::new() } else { self.pool[from..from + count].to_vec() },
            mask: self.mask.as_ref().map(|m| m.narrow(0, from, count)).transpose()?,
            depth: self.depth,
        })
    }

    /// Goes through `depth` more blocks.
    pub(super) fn through(self, blocks: &[Block], patches: &Patches) -> TensorResult<Self> {
        let pass = Pass { patches, key_mask: self.mask.as_ref(), plain: None };
        let mut sequence = Sequence { x: self.x, pool: self.pool };
        for block in blocks {
            sequence = block.forward(sequence, &pass)?;
        }
        Ok(Self { x: sequence.x, pool: sequence.pool, depth: self.depth + blocks.len(), mask: self.mask })
    }

    /// How many of `blocks` come before the first whose output depends on what is trained. The last block is never
    /// among them: it is pooled.
    pub(super) fn constant(mut self, blocks: &[Block], patches: &Patches) -> TensorResult<usize> {
        let mut depth = 0;
        while !self.x.track_op() && depth + 1 < blocks.len() {
            self = self.through(&blocks[depth..=depth], patches)?;
            depth += usize::from(!self.x.track_op());
        }
        Ok(depth)
    }
}
