//! Parameters that a task does not compute with.

use candle_core::Tensor;
use peft_adapters::Params;

/// The towers, as names of parameters say them.
const TOWERS: [(&str, &str); 2] = [("text_model", "text"), ("vision_model", "image")];

/// A warning where no trained parameter of a tower, and there are some, has a gradient after the first step.
pub(super) fn warning(params: &Params, grads: &[Option<Tensor>]) -> Option<String> {
    let idle = |tower: &str| {
        let own = || params.iter().zip(grads).filter(|(p, _)| p.name.contains(tower));
        let count: usize = own().map(|(p, _)| p.var.elem_count()).sum();
        (count > 0 && own().all(|(_, grad)| grad.is_none())).then_some(count)
    };
    let told: Vec<String> = TOWERS
        .iter()
        .filter_map(|(part, tower)| Some(format!("{} of the trained numbers are in the {tower} tower", idle(part)?)))
        .collect();
    (!told.is_empty()).then(|| {
        format!(
            "{}, with which this task does not compute: they stay as they are; `towers` in the method's options leaves them out",
            told.join(", ")
        )
    })
}
