//! One transformer block, shared by both towers.

use std::cell::Cell;
use std::collections::HashMap;

use candle_core::{Result as TensorResult, Tensor};
use peft_adapters::layers::{LayerNorm, Linear};
use peft_adapters::ops::{self, Activation, AttentionShape};
use peft_adapters::{Patches, Qkv, Sequence, Site, SiteId, SiteKind, Sites, Tape, Tower, rng};

use super::trunk::Trunk;
use crate::error::{Error, Result};

/// Base tensors by HF name, handed out once each while the towers are built.
#[derive(Debug)]
pub struct Tensors(HashMap<String, Tensor>);

impl Tensors {
    /// Wraps a complete set, as [`super::weights`] has checked it.
    #[must_use]
    pub fn new(tensors: HashMap<String, Tensor>) -> Self {
        Self(tensors)
    }

    /// Takes a tensor out.
    ///
    /// # Errors
    /// When it is missing.
    pub fn take(&mut self, name: &str) -> Result<Tensor> {
        self.0.remove(name).ok_or_else(|| Error::input("base weights", format!("tensor `{name}` is missing")))
    }

    /// Takes `<path>.weight` and `<path>.bias`.
    ///
    /// # Errors
    /// When one is missing.
    pub fn pair(&mut self, path: &str) -> Result<(Tensor, Tensor)> {
        Ok((self.take(&format!("{path}.weight"))?, self.take(&format!("{path}.bias"))?))
    }
}

/// What a block needs to know of its tower.
#[derive(Debug, Clone, Copy)]
pub struct BlockShape {
    /// The tower.
    pub tower: Tower,
    /// Model width.
    pub dim: usize,
    /// Attention heads.
    pub heads: usize,
    /// Added to the variance in layer norms.
    pub eps: f64,
    /// The MLP's activation.
    pub act: Activation,
    /// Whether a token sees only itself and earlier tokens.
    pub causal: bool,
}

/// What one forward pass shares between blocks.
#[derive(Debug)]
pub struct Pass<'a> {
    /// The patches.
    pub patches: &'a Patches,
    /// [B, T] u8, 1 where a key may be attended.
    pub key_mask: Option<&'a Tensor>,
    /// Set where the block runs twice. The first time notes whether its last product is its output as it is; if so, the
    /// second time, whose output nobody reads, can do without that product.
    pub plain: Option<&'a Cell<Option<bool>>>,
}

/// Pre-norm residual block: `x + attn(norm(x))`, then `x + mlp(norm(x))`.
#[derive(Debug)]
pub struct Block {
    shape: BlockShape,
    tokens: SiteId,
    norm1: LayerNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    attention: SiteId,
    attention_branch: SiteId,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    mlp_branch: SiteId,
}

impl Block {
    /// Takes the tensors under `path` and registers the sites.
    ///
    /// # Errors
    /// When a tensor is missing or misshapen.
    pub fn new(path: &str, layer: usize, shape: BlockShape, tensors: &mut Tensors, sites: &mut Sites) -> Result<Self> {
        let BlockShape { tower, dim, heads, eps, .. } = shape;
        let layer = Some(layer);
        let at = |sites: &mut Sites, path: String, kind| sites.add(Site { path, tower, layer, kind });
        let tokens = at(sites, path.to_string(), SiteKind::Tokens { dim });
        let mut linear = |sites: &mut Sites, name: &str| -> Result<Linear> {
            let path = format!("{path}.{name}");
            let (w, b) = tensors.pair(&path)?;
            sites.linear(&path, tower, layer, w, Some(b)).map_err(super::method_error)
        };
        let q = linear(sites, "self_attn.q_proj")?;
        let k = linear(sites, "self_attn.k_proj")?;
        let v = linear(sites, "self_attn.v_proj")?;
        let attention = at(sites, format!("{path}.self_attn"), SiteKind::Attention { dim, heads });
        let out = linear(sites, "self_attn.out_proj")?;
        let attention_branch = at(sites, format!("{path}.self_attn"), SiteKind::Branch { dim, mlp: false });
        let fc1 = linear(sites, "mlp.fc1")?;
        let fc2 = linear(sites, "mlp.fc2")?;
        let mlp_branch = at(sites, format!("{path}.mlp"), SiteKind::Branch { dim, mlp: true });
        let mut norm = |name: &str| -> Result<LayerNorm> {
            let path = format!("{path}.{name}");
            Ok(sites.layer_norm(&path, tower, layer, tensors.pair(&path)?, eps))
        };
        Ok(Self {
            shape,
            tokens,
            norm1: norm("layer_norm1")?,
            q,
            k,
            v,
            out,
            attention,
            attention_branch,
            norm2: norm("layer_norm2")?,
            fc1,
            fc2,
            mlp_branch,
        })
    }

    /// The whole sequence.
    ///
    /// # Shapes
    /// `x` [B, T, D] → [B, T, D]
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn forward(&self, sequence: Sequence, pass: &Pass<'_>) -> TensorResult<Sequence> {
        let Sequence { x, pool } = pass.patches.tokens(self.tokens, sequence)?;
        let h = self.norm1.forward(&x, pass.patches)?;
        let x = self.attend(&x, &h, &h, pass.key_mask, self.shape.causal, pass.patches)?;
        Ok(Sequence { x: self.mlp(&x, pass)?, pool })
    }

    /// The last block of a tower that is pooled at one token: everything after the keys and
    /// values is computed for that token only, which changes no result.
    ///
    /// # Shapes
    /// `x` [B, T, D], pooled at `sequence.pool` or at the first token → [B, 1, D]
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn forward_pooled(&self, sequence: Sequence, pass: &Pass<'_>) -> TensorResult<Tensor> {
        let Sequence { x, pool } = pass.patches.tokens(self.tokens, sequence)?;
        let h = self.norm1.forward(&x, pass.patches)?;
        let (batch, len, _) = x.dims3()?;
        let (residual, query) = (pick(&x, &pool)?, pick(&h, &pool)?);
        // A causal query at `p` sees the keys up to `p`; as a key mask since each row has its own.
        let visible = match (self.shape.causal, pass.key_mask) {
            (false, mask) => mask.cloned(),
            (true, mask) => {
                let causal = causal_rows(&pool, batch, len, x.device())?;
                Some(match mask {
                    Some(m) => (causal * m)?,
                    None => causal,
                })
            }
        };
        let x = self.attend(&residual, &query, &h, visible.as_ref(), false, pass.patches)?;
        self.mlp(&x, pass)
    }

    fn attend(
        &self,
        residual: &Tensor,
        query: &Tensor,
        h: &Tensor,
        key_mask: Option<&Tensor>,
        causal: bool,
        patches: &Patches,
    ) -> TensorResult<Tensor> {
        let (q, spare_q) = self.q.forward_sparing(query, patches)?;
        let (k, spare_k) = self.k.forward_sparing(h, patches)?;
        let (v, spare_v) = self.v.forward_sparing(h, patches)?;
        let Qkv { q, k, v, prefix } = patches.attention(self.attention, Qkv { q, k, v, prefix: 0 })?;
        let shape = AttentionShape { heads: self.shape.heads, causal, prefix };
        let key_mask = extend_mask(key_mask, prefix)?;
        let a = ops::attention(&q, &k, &v, &shape, key_mask.as_ref())?;
        let (o, spare) = self.out.forward_sparing(&a, patches)?;
        if spare {
            // Attention's backward pass computes it again.
            ops::release(&a)?;
        }
        let branch = patches.branch(self.attention_branch, residual, query, o.clone())?;
        let (sum, plain) = join(residual, &branch, &o)?;
        if plain && spare_q && spare_k && spare_v && query.id() == h.id() {
            ops::release(h)?;
        }
        Ok(sum)
    }

    fn mlp(&self, x: &Tensor, pass: &Pass<'_>) -> TensorResult<Tensor> {
        let patches = pass.patches;
        let h = self.norm2.forward(x, patches)?;
        let (up, spare_h) = self.fc1.forward_sparing(&h, patches)?;
        let active = ops::activation(&up, self.shape.act)?;
        let (down, spare_active) = match pass.plain.and_then(Cell::get) {
            Some(true) => (self.fc2.forward_unread(&active, patches)?, false),
            _ => self.fc2.forward_sparing(&active, patches)?,
        };
        if spare_active && active.id() != up.id() {
            ops::release(&active)?;
        }
        let branch = patches.branch(self.mlp_branch, x, &h, down.clone())?;
        let (sum, plain) = join(x, &branch, &down)?;
        if let Some(noted) = pass.plain {
            noted.set(Some(plain));
        }
        if plain && spare_h {
            ops::release(&h)?;
        }
        Ok(sum)
    }
}

/// The sum of the residual and a branch, and whether the branch is as the layer gave it. Then no patch has made anything of
/// it, and a sum's backward pass does not read it.
fn join(residual: &Tensor, branch: &Tensor, computed: &Tensor) -> TensorResult<(Tensor, bool)> {
    let sum = ops::add(residual, branch)?;
    let plain = branch.id() == computed.id();
    if plain {
        ops::release(computed)?;
    }
    Ok((sum, plain))
}

/// The blocks that are left of a tower that is pooled at one token: [B, T, D] → [B, 1, D]. With a tape each block is a
/// segment of it.
pub(super) fn pooled<'a>(blocks: &'a [Block], trunk: Trunk, patches: &'a Patches, tape: Option<&Tape<'a>>) -> TensorResult<Tensor> {
    let Trunk { x, pool, mask, depth } = trunk;
    let sequence = Sequence { x, pool };
    let Some((last, others)) = blocks[depth..].split_last() else { return pick(&sequence.x, &sequence.pool) };
    let sequence = walk(others, sequence, mask.as_ref(), patches, tape)?;
    Ok(stage(sequence, mask, patches, tape, |sequence, pass| Ok((last.forward_pooled(sequence, pass)?, Vec::new())))?.0)
}

/// The blocks that are left of a tower, every token to the end. With a tape each block is a segment of it.
pub(super) fn whole<'a>(blocks: &'a [Block], trunk: Trunk, patches: &'a Patches, tape: Option<&Tape<'a>>) -> TensorResult<Sequence> {
    let Trunk { x, pool, mask, depth } = trunk;
    walk(&blocks[depth..], Sequence { x, pool }, mask.as_ref(), patches, tape)
}

fn walk<'a>(
    blocks: &'a [Block],
    mut sequence: Sequence,
    mask: Option<&Tensor>,
    patches: &'a Patches,
    tape: Option<&Tape<'a>>,
) -> TensorResult<Sequence> {
    for block in blocks {
        let (x, pool) = stage(sequence, mask.cloned(), patches, tape, |sequence, pass| {
            let Sequence { x, pool } = block.forward(sequence, pass)?;
            Ok((x, pool))
        })?;
        sequence = Sequence { x, pool };
    }
    Ok(sequence)
}

/// With a tape, so many tokens are in the middle of a block at once.
pub(crate) const GROUP: usize = 4096;

/// One block, as a segment of the tape if there is one.
fn stage<'a>(
    sequence: Sequence,
    mask: Option<Tensor>,
    patches: &'a Patches,
    tape: Option<&Tape<'a>>,
    run: impl Fn(Sequence, &Pass<'_>) -> TensorResult<(Tensor, Vec<u32>)> + 'a,
) -> TensorResult<(Tensor, Vec<u32>)> {
    let Some(tape) = tape else { return run(sequence, &Pass { patches, key_mask: mask.as_ref(), plain: None }) };
    let Sequence { x, pool } = sequence;
    let plain = Cell::new(None);
    tape.segment_in_groups(&x, (GROUP / x.dim(1)?).max(1), move |x, rows| {
        let mask = mask.as_ref().map(|m| m.narrow(0, rows.start, rows.len())).transpose()?;
        let pool = pool.get(rows.clone()).unwrap_or_default().to_vec();
        let pass = Pass { patches, key_mask: mask.as_ref(), plain: Some(&plain) };
        rng::with_rows(rows, || run(Sequence { x: x.clone(), pool }, &pass))
    })
}

/// Prefix keys are always visible.
fn extend_mask(mask: Option<&Tensor>, prefix: usize) -> TensorResult<Option<Tensor>> {
    match mask {
        Some(m) if prefix > 0 => {
            let ones = Tensor::ones((m.dim(0)?, prefix), m.dtype(), m.device())?;
            Tensor::cat(&[&ones, m], 1).map(Some)
        }
        m => Ok(m.cloned()),
    }
}

/// One token of each row: `x` [B, T, D] → [B, 1, D]; the first token where `pool` is empty.
pub(super) fn pick(x: &Tensor, pool: &[u32]) -> TensorResult<Tensor> {
    let (batch, len, dim) = x.dims3()?;
    let rows: Vec<u32> = (0..batch).map(|b| (b * len) as u32 + pool.get(b).copied().unwrap_or(0)).collect();
    let rows = Tensor::from_vec(rows, batch, x.device())?;
    ops::embedding(&x.reshape((batch * len, dim))?, &rows)?.reshape((batch, 1, dim))
}

/// [B, T] u8: 1 up to and including each row's pooled token.
fn causal_rows(pool: &[u32], batch: usize, len: usize, device: &candle_core::Device) -> TensorResult<Tensor> {
    let visible: Vec<u8> = (0..batch)
        .flat_map(|b| {
            let last = pool.get(b).copied().unwrap_or(0) as usize;
            (0..len).map(move |t| u8::from(t <= last))
        })
        .collect();
    Tensor::from_vec(visible, (batch, len), device)
}
