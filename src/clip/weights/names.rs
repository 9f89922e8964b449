//! The names that checkpoints of CLIP go by.

/// Wrappers that put a prefix before every name.
const PREFIXES: [&str; 3] = ["module.", "clip.", "model."];

/// The HF name of a tensor, or nothing for buffers that are no weights.
pub(super) fn canonical(name: &str) -> Option<String> {
    let mut name = name;
    while let Some(rest) = PREFIXES.iter().find_map(|p| name.strip_prefix(p)) {
        name = rest;
    }
    // transformers before 4.31 saved these; later ones count positions anew.
    if name.ends_with("position_ids") {
        return None;
    }
    // TensorFlow's names, which old conversions kept.
    let name = match (name.strip_suffix(".gamma"), name.strip_suffix(".beta")) {
        (Some(path), _) => format!("{path}.weight"),
        (_, Some(path)) => format!("{path}.bias"),
        _ => name.to_string(),
    };
    // The misspelling is transformers'; some have put it right.
    Some(name.replace("vision_model.pre_layernorm.", "vision_model.pre_layrnorm."))
}

#[cfg(test)]
mod tests {
    use super::canonical;

    #[test]
    fn wrappers_and_old_names_are_undone() {
        let is = |from: &str, to: &str| assert_eq!(canonical(from).as_deref(), Some(to));
        is("module.clip.logit_scale", "logit_scale");
        is("text_model.final_layer_norm.gamma", "text_model.final_layer_norm.weight");
        is("vision_model.pre_layernorm.bias", "vision_model.pre_layrnorm.bias");
        assert_eq!(canonical("text_model.embeddings.position_ids"), None);
    }
}
