//! What tasks get of a tower: pooled features, and every token where they ask for them.

use candle_core::{Result as TensorResult, Tensor};
use peft_adapters::{Patches, Sequence, Tape, rng};

use super::model::{Clip, by_rows};
use super::text::TextBatch;
use super::trunk::Trunk;

/// Images or texts, encoded.
#[derive(Debug, Clone)]
pub struct Encoded {
    /// Projected features, unnormalised, [B, P].
    pub features: Tensor,
    /// The last hidden states after the tower's norm, where they were asked for.
    pub tokens: Option<Tokens>,
}

/// Every token of some images or texts.
#[derive(Debug, Clone)]
pub struct Tokens {
    /// [B, T, D].
    pub x: Tensor,
    /// The pooled token of each row; empty where the first one is.
    pub pool: Vec<u32>,
}

impl Encoded {
    /// Features alone, [B, P].
    #[must_use]
    pub fn pooled(features: Tensor) -> Self {
        Self { features, tokens: None }
    }

    /// These rows, which may come again.
    ///
    /// # Errors
    /// When one is outside.
    pub fn select(&self, rows: &[u32]) -> TensorResult<Self> {
        let index = Tensor::new(rows, self.features.device())?;
        let tokens = self.tokens.as_ref().map(|t| {
            let pool = if t.pool.is_empty() { Vec::new() } else { rows.iter().map(|&r| t.pool[r as usize]).collect() };
            Ok::<_, candle_core::Error>(Tokens { x: t.x.index_select(&index, 0)?, pool })
        });
        Ok(Self { features: self.features.index_select(&index, 0)?, tokens: tokens.transpose()? })
    }
}

impl Clip {
    /// Images embedded, or some patches of each, [B, K] u32. Pixels that nobody else holds are freed.
    ///
    /// # Shapes
    /// `pixels` [B, 3, H, W] → [B, T, D]
    ///
    /// # Errors
    /// When the image size is not the model's.
    pub fn image_entrance(&self, pixels: Tensor, keep: Option<&Tensor>, patches: &Patches) -> TensorResult<Trunk> {
        let here = pixels.to_device(self.device())?.to_dtype(self.dtype())?;
        drop(pixels);
        self.vision().entrance(&here, keep, patches)
    }

    /// Images with all their tokens, from the middle of the tower; `depth` may be the whole tower.
    ///
    /// # Shapes
    /// [B, T, D] → features [B, P], tokens [B, T, D]
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn image_tokens_from<'a>(&'a self, trunk: &Trunk, patches: &'a Patches, tape: Option<&Tape<'a>>) -> TensorResult<Encoded> {
        let tokens = in_groups(trunk, tape, |trunk, tape| self.vision().finish_tokens(trunk, patches, tape))?;
        let features = self.vision().project(&tokens, patches)?;
        Ok(Encoded { features, tokens: Some(Tokens { x: tokens.x, pool: tokens.pool }) })
    }

    /// Texts with all their tokens.
    ///
    /// # Shapes
    /// [N, T] ids → features [N, P], tokens [N, T, D]
    ///
    /// # Errors
    /// When there are more tokens than positions.
    pub fn text_tokens<'a>(&'a self, texts: &TextBatch, patches: &'a Patches, tape: Option<&Tape<'a>>) -> TensorResult<Encoded> {
        let trunk = self.text_trunk(texts, 0, patches)?;
        let tokens = in_groups(&trunk, tape, |trunk, tape| self.text().finish_tokens(trunk, patches, tape))?;
        let features = self.text().project(&tokens, patches)?;
        Ok(Encoded { features, tokens: Some(Tokens { x: tokens.x, pool: tokens.pool }) })
    }
}

/// A tower's blocks, in groups of examples where the tape asks for that.
fn in_groups<'a>(
    trunk: &Trunk,
    tape: Option<&Tape<'a>>,
    run: impl Fn(Trunk, Option<&Tape<'a>>) -> TensorResult<Sequence> + Copy + 'a,
) -> TensorResult<Sequence> {
    let Some((tape, rows)) = tape.and_then(|t| Some((t, t.rows()?))) else { return run(trunk.clone(), tape) };
    let pool = std::cell::RefCell::new(Vec::new());
    let x = by_rows(trunk.x.dim(0)?, rows, |from, count| {
        let part = trunk.narrow(from, count)?;
        let x = part.x.clone();
        let again = move |x: &Tensor, _| {
            let part = Trunk { x: x.clone(), ..part.clone() };
            let Sequence { x, pool } = rng::with_rows(from..from + count, || run(part, None))?;
            Ok((x, pool))
        };
        let (x, own) = tape.segment_in_groups(&x, usize::MAX, again)?;
        pool.borrow_mut().extend(own);
        Ok(x)
    })?;
    Ok(Sequence { x, pool: pool.into_inner() })
}
