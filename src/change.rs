//! How much of each base weight an adapter changes: ‖ΔW‖, from what it would fold to.

use peft_adapters::{Patches, Sites, Step, Tower};

use crate::error::Result;

/// One weight that changes.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Change {
    /// Which half of the model: `vision`, `text` or `shared`.
    pub tower: String,
    /// The block, from 0; `None` outside blocks.
    pub layer: Option<usize>,
    /// The module within the block, such as `q_proj` or `q_proj.bias`.
    pub module: String,
    /// Frobenius norm of the difference.
    pub norm: f64,
    /// Frobenius norm of the base weight.
    pub base: f64,
}

impl Change {
    /// ‖ΔW‖ / ‖W‖; the norm itself where the base weight is zero.
    #[must_use]
    pub fn relative(&self) -> f64 {
        if self.base > 0.0 { self.norm / self.base } else { self.norm }
    }
}

/// The weights that `patches` change, in model order. Methods that do not fold leave no trace here.
///
/// # Errors
/// When a tensor operation fails.
pub fn changes(sites: &Sites, patches: &mut Patches) -> Result<Vec<Change>> {
    patches.prepare(&Step::eval())?;
    let mut all = Vec::new();
    for (id, weight) in sites.weights() {
        let value = weight.tensor.to_dtype(candle_core::DType::F32)?;
        let Some(new) = patches.fold(id, &value)? else { continue };
        let norm = |t: &candle_core::Tensor| -> Result<f64> { Ok(f64::from(t.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?)) };
        all.push(Change {
            tower: match weight.tower {
                Tower::Vision => "vision",
                Tower::Text => "text",
                Tower::Shared => "shared",
            }
            .into(),
            layer: weight.layer,
            module: module(&weight.name, weight.layer),
            norm: norm(&(new - &value)?)?,
            base: norm(&value)?,
        });
    }
    Ok(all)
}

/// `vision_model.encoder.layers.3.self_attn.q_proj.weight` → `q_proj`.
fn module(name: &str, layer: Option<usize>) -> String {
    let inner = layer.and_then(|l| name.split_once(&format!(".layers.{l}."))).map_or(name, |(_, rest)| rest);
    let inner = inner.strip_suffix(".weight").unwrap_or(inner);
    ["self_attn.", "mlp.", "vision_model.", "text_model."].iter().fold(inner, |m, p| m.strip_prefix(p).unwrap_or(m)).to_string()
}

#[cfg(test)]
mod tests {
    use super::module;

    #[test]
    fn modules_go_by_their_short_names() {
        assert_eq!(module("vision_model.encoder.layers.3.self_attn.q_proj.weight", Some(3)), "q_proj");
        assert_eq!(module("text_model.encoder.layers.11.mlp.fc1.bias", Some(11)), "fc1.bias");
        assert_eq!(module("text_model.final_layer_norm.weight", None), "final_layer_norm");
    }
}
