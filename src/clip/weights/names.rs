//! Tensor names of the many CLIP checkpoints, brought to transformers' names.

/// Wrappers that training code puts around the model: `nn.DataParallel`, `torch.compile`, a
/// surrounding module.
const PREFIXES: &[&str] =
    &["module.", "_orig_mod.", "model.", "clip.", "clip_model.", "base_model.", "net.", "network.", "state_dict.", "model_state_dict."];

/// What a name of the model itself begins with.
const ROOTS: &[&str] = &["text_model.", "vision_model.", "visual_projection.", "text_projection.", "logit_scale"];

/// Whether a name is one of a CLIP or its kin, in transformers' layout or another.
pub(super) fn is_of_model(name: &str) -> bool {
    const OTHERS: [&str; 6] = ["visual.", "transformer.", "token_embedding.", "ln_final.", "logit_bias", "text_decoder."];
    ROOTS.iter().chain(&OTHERS).any(|root| name.contains(root))
}

/// Constants that older releases saved among the weights.
const BUFFERS: &[&str] = &["position_ids", "attn_mask", "causal_attention_mask"];

/// The HF name of a tensor, or nothing where it is a buffer that the configuration determines.
pub(super) fn canonical(name: &str) -> Option<String> {
    let last = name.rsplit('.').next().unwrap_or(name);
    if BUFFERS.contains(&last) {
        return None;
    }
    let mut name = unwrapped(name).to_string();
    for tower in ["text_model.", "vision_model."] {
        // A tower that was saved as a model of its own has the tower's name twice.
        while name.strip_prefix(tower).is_some_and(|rest| rest.starts_with(tower)) {
            name.drain(..tower.len());
        }
    }
    // Layer norms as TensorFlow names them; transformers renames them on load, too.
    for (old, new) in [(".gamma", ".weight"), (".beta", ".bias")] {
        if let Some(stem) = name.strip_suffix(old) {
            return Some(format!("{stem}{new}"));
        }
    }
    Some(name)
}

/// Without wrappers, where a name of transformers' model is left.
fn unwrapped(name: &str) -> &str {
    without_wrappers(name, ROOTS)
}

/// Without wrappers, in any order, where what is left begins with one of `roots`; else the name itself.
pub(super) fn without_wrappers<'a>(name: &'a str, roots: &[&str]) -> &'a str {
    let mut rest = name;
    loop {
        if roots.iter().any(|root| rest.starts_with(root)) {
            return rest;
        }
        match PREFIXES.iter().find_map(|prefix| rest.strip_prefix(prefix)) {
            Some(inner) => rest = inner,
            None => return name,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn old_and_wrapped_names_are_understood() {
        for (from, to) in [
            ("logit_scale", "logit_scale"),
            ("module.clip.logit_scale", "logit_scale"),
            ("model.text_model.final_layer_norm.gamma", "text_model.final_layer_norm.weight"),
            ("vision_model.pre_layrnorm.beta", "vision_model.pre_layrnorm.bias"),
            ("_orig_mod.vision_model.vision_model.post_layernorm.bias", "vision_model.post_layernorm.bias"),
            ("model.classifier.weight", "model.classifier.weight"),
        ] {
            assert_eq!(canonical(from).as_deref(), Some(to));
        }
        assert_eq!(canonical("text_model.embeddings.position_ids"), None);
    }
}
