//! What a step keeps where its operations are compositions of candle's: in half precision, and on any device but the CPU.
//!
//! candle keeps every value between until the backward pass has ended, and gradients that nobody asked for: of frozen matrices, and of
//! each bias, mask and maximum that was broadcast. `adapters/src/ops/portable.rs` has the compositions.

use super::Tower;
use crate::clip::block;
use crate::train::TrainConfig;

/// Bytes of a number in single precision, in which norms and softmax are computed.
const WIDE: usize = 4;

/// What the allocator holds back, as a share, as measured on `builtin:tiny` and ViT-B/32.
pub(super) const SLACK: f64 = 0.15;
/// What blocks of many sizes leave unused of its pages, at most half of them.
const PAGES: usize = 25 << 20;

/// A part of a block.
struct Part {
    /// In names of parameters that enter here.
    names: &'static [&'static str],
    /// Bytes that it keeps of each token.
    bytes: usize,
}

/// Bytes of a tower from forward to backward with numbers of `width` bytes.
pub(super) fn bytes(tower: &Tower<'_>, trained: &[&str], train: &TrainConfig, width: usize) -> usize {
    let rows = match (train.grad_cache, train.checkpointing) {
        (Some(rows), _) => rows,
        (None, true) => (block::GROUP / tower.tokens.max(1)).max(1),
        (None, false) => tower.rows,
    };
    let together = rows.min(tower.rows) * tower.tokens;
    let working = tower.working(rows.min(tower.rows)) * WIDE;
    let Some(first) = tower.below(trained) else { return working };
    let held = tower.layers.saturating_sub(first);
    if held == 0 {
        return working;
    }
    let own = tower.own(trained);
    let parts = parts(tower, width);
    let extra = extra(tower, &own, width);
    // Below what enters first nothing has a gradient.
    let enters = |part: &Part| own.iter().any(|n| tower.layer(n) == first && part.names.iter().any(|p| n.contains(p)));
    let start = parts.iter().position(enters).unwrap_or(0);
    let whole = extra + parts.iter().map(|p| p.bytes).sum::<usize>();
    let lowest = extra + parts[start..].iter().map(|p| p.bytes).sum::<usize>();
    // Gradients of frozen matrices: zeros, the product, and the sum of both, whose room the allocator keeps.
    let matrices = 3 * held * width * (4 * tower.dim * tower.dim + 2 * tower.dim * tower.mlp);
    let kept = match train.checkpointing {
        true => held * tower.rows * tower.tokens * tower.dim * width + together * whole,
        false => together * (lowest + (held - 1) * whole),
    };
    working + matrices + kept + (kept / 2).min(PAGES)
}

/// The parts of a block in the order in which they are computed.
fn parts(tower: &Tower<'_>, width: usize) -> [Part; 8] {
    let (dim, mlp) = (tower.dim, tower.mlp);
    let convert = |bytes: usize| if width < WIDE { bytes } else { 0 };
    // Centred, squared, divided; times the weight, plus the bias, and the gradients of both.
    let norm = dim * (3 * WIDE + 4 * width + convert(WIDE + width));
    // The product, its sum with the bias, the gradient of the bias.
    let linear = |out: usize| 3 * width * out;
    // The product, scaled; shifted by the maximum, its gradient, exponentials, quotients.
    let scores = 2 * width + 4 * WIDE + convert(WIDE + width);
    // Hidden scores lowered, then zeroed, and the gradients of both masks.
    let masks = if tower.causal { 4 * WIDE } else { 0 };
    // q, k, v and k once more by heads; what comes of it, and that with heads side by side.
    let attention = 6 * width * dim + tower.heads * tower.tokens * (scores + masks);
    let sum = width * dim;
    let part = |names, bytes| Part { names, bytes };
    [
        part(&["layer_norm1"], norm),
        part(&["q_proj", "k_proj", "v_proj"], 3 * linear(dim)),
        part(&["prefix_"], attention),
        part(&["out_proj"], linear(dim) + sum),
        part(&["layer_norm2", "self_attn.adapter"], norm),
        part(&["fc1"], linear(mlp)),
        // QuickGELU in five steps.
        part(&["fc2"], 5 * width * mlp + linear(dim)),
        part(&["mlp.adapter"], sum),
    ]
}

/// Bytes of each token that what is trained adds to a block: a product, its scaling and a sum for each branch beside a matrix.
fn extra(tower: &Tower<'_>, own: &[&str], width: usize) -> usize {
    let (dim, mlp) = (tower.dim, tower.mlp);
    let has = |part: &str, kind: &str| own.iter().any(|n| n.contains(part) && n.contains(kind));
    let beside = [("q_proj", dim), ("k_proj", dim), ("v_proj", dim), ("out_proj", dim), ("fc1", mlp), ("fc2", dim)];
    let branches: usize = beside.iter().filter(|(part, _)| has(part, "lora_")).map(|(_, out)| 3 * out).sum();
    let adapters = ["self_attn.adapter_down", "mlp.adapter_down"].iter().filter(|part| has(part, "")).count();
    let prefix = usize::from(has("prefix_", ""));
    width * (branches + (4 * adapters + 4 * prefix) * dim)
}
