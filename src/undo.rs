//! Taking an adapter out of a merged base again.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use peft_adapters::{Fold, Inverse, Patch, Patches, Step, WeightId};
use serde::Serialize;

use crate::clip::Clip;
use crate::clip::base::Base;
use crate::delta::{Delta, bundled, locate};
use crate::error::{Error, Result};
use crate::merge::{self, Layout, MergeOptions};

/// What to take out.
#[derive(Debug, Clone)]
pub struct UndoOptions {
    /// The merged model.
    pub model: String,
    /// The adapter that was merged into it.
    pub adapter: PathBuf,
    /// The weight that it was merged with.
    pub weight: f64,
    /// Where the base goes.
    pub output: PathBuf,
    /// The files' dtype. Merged files in another type than f32 have lost some of the base; naming a type accepts that.
    pub dtype: Option<DType>,
    /// Whose layout is written.
    pub layout: Layout,
    /// Replace a model that exists.
    pub force: bool,
}

/// What was taken out.
#[derive(Debug, Clone, Serialize)]
pub struct Undone {
    /// Where.
    pub output: PathBuf,
    /// Largest difference of a logit between the merged model and what was written with the adapter merged again, relative to
    /// the largest logit.
    pub relative_diff: f64,
    /// What was allowed.
    pub tolerance: f64,
    /// How many tensors changed.
    pub changed_tensors: usize,
    /// The largest rounding error of a tensor that subtraction leaves, relative to the tensor: f32's epsilon times how much
    /// larger the merged weights are.
    pub rounding: f64,
    /// `F32`, `F16`, `BF16`.
    pub dtype: String,
    /// What is worth knowing.
    pub notes: Vec<String>,
}

/// `peft merge --undo`. Of several adapters the last one merged comes out first. That this adapter was merged with this weight
/// cannot be seen in the weights: the caller has to know.
///
/// # Errors
/// When the adapter does not say what it replaced (whole weights, DoRA, singular values), divides by zero (IA³), or the merged
/// files have less than f32's precision.
pub fn undo(options: &UndoOptions) -> Result<Undone> {
    let UndoOptions { model, adapter, weight, output, dtype, layout, force } = options.clone();
    let as_merge = MergeOptions { model, adapters: vec![(adapter, weight)], output, dtype, layout, force, allow_base_mismatch: true };
    merge::check_output(&as_merge)?;
    if !bundled(&options.model)?.is_empty() {
        return Err(
            Error::input(&options.model, "is a bundle, in which nothing is merged").hint("its adapters are directories of their own")
        );
    }
    let base = Base::load(&options.model, DType::F32, &Device::Cpu)?;
    let mut notes = base.source.notes().to_vec();
    let name = base.file_dtype.as_str();
    let dtype = match (base.file_dtype, options.dtype) {
        (DType::F32 | DType::F64, asked) => asked.unwrap_or(DType::F32),
        (_, Some(asked)) => {
            notes.push(format!("{}: {name} has lost some of the base; it comes back within {name}'s rounding", options.model));
            asked
        }
        _ => {
            let message = format!("its files are {name}, which has lost what the base had beyond that");
            return Err(Error::input(&options.model, message).hint(format!("pass --dtype {name} to have it back within {name}'s rounding")));
        }
    };
    let delta = Delta::read(&locate(&options.adapter)?)?;
    let patches = planned(&delta, &base.clip)?;
    let mut rounding = 0f64;
    let (mut tensors, mut changed_tensors) = (Vec::new(), 0);
    for (id, weight) in base.clip.sites().weights() {
        let taken = taken(&patches, id, &weight.tensor, options.weight)
            .and_then(|t| t.map(|t| Ok((t.to_dtype(dtype)?, merge::max_abs(&t)?))).transpose())
            .map_err(|e| Error::input(options.adapter.display(), format!("{}: {e}", weight.name)))?;
        if let Some((_, most)) = &taken {
            changed_tensors += 1;
            rounding = rounding.max(f64::from(f32::EPSILON) * (merge::max_abs(&weight.tensor)? / most.max(1e-30)).max(1.0));
        }
        tensors.push((weight.name.clone(), taken.map_or_else(|| weight.tensor.to_dtype(dtype), |(t, _)| Ok(t))?));
    }
    let expected = merge::probe(&base.clip, &base.tokenizer, &Patches::none())?;
    let tolerance = merge::tolerance(if base.file_dtype == DType::F32 { dtype } else { base.file_dtype });
    let mut relative_diff = f64::NAN;
    merge::write(&base, &tensors, dtype, options.layout, &options.output, &mut notes, |dir| {
        relative_diff = again(dir, &delta, options.weight, &expected)?;
        match relative_diff <= tolerance {
            true => Ok(()),
            false => Err(Error::Verdict(format!(
                "{}: with the adapter merged again, logits differ by {relative_diff:.2e} (relative), more than {tolerance:.0e}; nothing was written",
                options.output.display()
            ))),
        }
    })?;
    let dtype = dtype.as_str().to_uppercase();
    Ok(Undone { output: options.output.clone(), relative_diff, tolerance, changed_tensors, rounding, dtype, notes })
}

/// The adapter's hooks; refused where a method cannot be taken back.
fn planned(delta: &Delta, clip: &Clip) -> Result<Patches> {
    let place = delta.dir.display();
    let adapters = delta.apply(clip)?;
    for (patch, method) in adapters.view.iter().zip(&adapters.methods) {
        if let Some(why) = patch.unfoldable() {
            return Err(Error::input(place, format!("{} does not fold, so it was never merged: {why}", method.name())));
        }
        if let Inverse::Undefined(why) = patch.inverse() {
            return Err(Error::input(place, format!("{} cannot be taken out of merged weights: {why}", method.name()))
                .hint("keep the base that it was trained on"));
        }
    }
    let mut view = adapters.view;
    view.prepare(&Step::eval())?;
    Ok(view)
}

/// A merged weight without the adapter; nothing where the adapter leaves it alone. The last hook comes out first.
fn taken(patches: &Patches, id: WeightId, merged: &Tensor, share: f64) -> Result<Option<Tensor>> {
    let mut all: Vec<&dyn Patch> = patches.iter().collect();
    all.reverse();
    let mut value: Option<Tensor> = None;
    for patch in &all {
        let folds = |x: &Tensor| -> Result<Option<Tensor>> {
            Ok(match patch.fold(id, x)? {
                Fold::Replace(new) => Some(new),
                Fold::Unchanged => None,
            })
        };
        let from = value.as_ref().unwrap_or(merged).clone();
        value = back(patch.inverse(), &from, share, folds)?.or(value);
    }
    for patch in all {
        let hook = |x: &Tensor| -> Result<Option<Tensor>> {
            let new = patch.weight(id, x.clone())?;
            Ok((new.id() != x.id()).then(|| new.detach()))
        };
        let from = value.as_ref().unwrap_or(merged).clone();
        let Some(at_zero) = hook(&from.zeros_like()?)? else { continue };
        // What adds, adds the same to one as to zero.
        let one = hook(&from.ones_like()?)?.unwrap_or_else(|| at_zero.clone());
        if merge::max_abs(&((one - at_zero)? - 1.0)?)? > 0.5 {
            return Err(Error::input("the adapter", "holds this weight's new value, and the old one is nowhere")
                .hint("keep the base that it was trained on"));
        }
        value = back(patch.inverse(), &from, share, hook)?.or(value);
    }
    Ok(value)
}

/// `w·f(W) + (1 − w)·W` solved for W.
fn back(inverse: Inverse, merged: &Tensor, share: f64, f: impl Fn(&Tensor) -> Result<Option<Tensor>>) -> Result<Option<Tensor>> {
    match inverse {
        Inverse::Divide => {
            let Some(factor) = f(&merged.ones_like()?)? else { return Ok(None) };
            let factor = ((factor - 1.0)? * share)?.affine(1.0, 1.0)?;
            if factor.flatten_all()?.to_vec1::<f32>()?.contains(&0.0) {
                return Err(Error::input("the adapter", "has multiplied values by zero, and what they were is nowhere")
                    .hint("keep the base that it was trained on"));
            }
            Ok(Some((merged / factor)?))
        }
        _ => match f(&merged.zeros_like()?)? {
            Some(added) => Ok(Some((merged - (added * share)?)?)),
            None => Ok(None),
        },
    }
}

/// How far logits are from `expected` when the adapter is merged into what was written.
fn again(dir: &Path, delta: &Delta, weight: f64, expected: &Tensor) -> Result<f64> {
    let base = Base::load(&dir.display().to_string(), DType::F32, &Device::Cpu)?;
    let patches = planned(delta, &base.clip)?;
    let (tensors, _) = merge::folded(&base, &[(patches, weight)], DType::F32)?;
    let clip = Clip::new(base.clip.config(), tensors.into_iter().collect(), DType::F32, &Device::Cpu)?;
    let found = merge::probe(&clip, &base.tokenizer, &Patches::none())?;
    Ok(merge::max_abs(&(expected - found)?)? / merge::max_abs(expected)?.max(1e-12))
}
