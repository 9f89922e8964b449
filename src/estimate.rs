//! How much memory training will take, before it starts.

use crate::clip::ClipConfig;
use crate::delta::Adapters;
use crate::train::TrainConfig;

/// Bytes by what they are for.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Estimate {
    /// Frozen weights.
    pub base: u64,
    /// Trained weights, gradients, optimiser state, averages, best epoch.
    pub trained: u64,
    /// What a step keeps for the backward pass.
    pub activations: u64,
}

impl Estimate {
    /// Everything.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.base + self.trained + self.activations
    }
}

/// Floats that one block keeps for each token: input, two norms, q, k, v, attention, residual, and the MLP twice.
fn per_token(dim: usize, mlp: usize) -> usize {
    8 * dim + 2 * mlp
}

/// Estimates one step. `texts` is how many texts go through the text tower at once.
#[must_use]
pub fn estimate(config: &ClipConfig, adapters: &Adapters, train: &TrainConfig, texts: usize, context: usize) -> Estimate {
    let width = match train.dtype {
        crate::train::Dtype::F32 => 4,
        _ => 2,
    };
    let base: usize = config.tensors().iter().map(|(_, s)| s.iter().product::<usize>()).sum();
    let (v, t) = (&config.vision, &config.text);
    let tokens = (v.image_size / v.patch_size).pow(2) + 1;
    let vision = train.batch * tokens * v.num_hidden_layers * per_token(v.hidden_size, v.intermediate_size);
    let text = texts * context * t.num_hidden_layers * per_token(t.hidden_size, t.intermediate_size);
    let reach = |tower: &str| adapters.params.iter().any(|p| p.name.contains(tower));
    let mut activations = 0;
    for (part, tower) in [(vision, "vision_model"), (text, "text_model")] {
        // Without gradients a tower keeps one block at a time.
        activations += if reach(tower) { part } else { part / 8 };
    }
    let copies = 4 + usize::from(train.ema.is_some());
    Estimate {
        base: (base * width) as u64,
        trained: (adapters.params.count() * 4 * copies) as u64,
        activations: (activations * width) as u64,
    }
}
