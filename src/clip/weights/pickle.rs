//! `pytorch_model.bin`: candle's reader rebuilds tensors and runs nothing.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use candle_core::pickle::PthTensors;

use super::Named;
use crate::error::{Error, Result};

/// All tensors of a torch file.
///
/// # Errors
/// When the file is no torch file of plain tensors.
pub(super) fn read(place: &str, path: &Path) -> Result<Named> {
    let wrong = |message: String| {
        Error::input(place, format!("is no torch file of plain tensors: {message}"))
            .hint("save it as safetensors: model.save_pretrained(DIR, safe_serialization=True)")
    };
    // The reader indexes into what the file claims; whatever it trips over is the file's fault.
    let read = || -> candle_core::Result<Named> {
        let file = PthTensors::new(path, None)?;
        let mut all = Vec::new();
        for name in file.tensor_infos().keys() {
            if let Some(tensor) = file.get(name)? {
                all.push((name.clone(), tensor));
            }
        }
        Ok(all)
    };
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(Ok(tensors)) if !tensors.is_empty() => Ok(tensors),
        Ok(Ok(_)) => Err(wrong("it holds none".into())),
        Ok(Err(e)) => Err(wrong(e.to_string())),
        Err(_) => Err(wrong("it is damaged".into())),
    }
}
