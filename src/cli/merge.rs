//! `peft merge`.

use std::path::{Path, PathBuf};

use candle_core::DType;
use clap::{Args, ValueEnum};

use super::combine::{CombineArgs, Rest};
use super::{BaseArgs, Context, predict};
use crate::bundle::bundle;
use crate::classifier::{ClassifierOptions, classifier};
use crate::error::{Error, Result};
use crate::merge::{Layout, MergeOptions, merge};
use crate::model::Model;
use crate::undo::{UndoOptions, undo};

pub(super) const EXAMPLES: &str = "\
Examples:
  peft merge --model path/to/clip --adapter runs/pets/adapter --output pets-clip
  peft merge --model path/to/clip --adapter a=0.5 --adapter b=0.5 --output mix --dtype f16
  peft merge --model path/to/clip --output clip-f16 --dtype f16
  peft merge --model path/to/clip --adapter a=0.7 --adapter b=0.3 --combine svd --svd-rank 16 --output a-and-b
  peft merge --model path/to/clip --adapter a --adapter b --combine ties --density 0.5 --output a-and-b
  peft merge --model pets-clip --undo runs/pets/adapter --output clip-again";

/// Arguments of `peft merge`.
#[derive(Debug, Args)]
pub(super) struct MergeArgs {
    #[command(flatten)]
    base: BaseArgs,
    /// An adapter (a directory, a .pt of CLIP-LoRA, a hub id), with =WEIGHT to fold only a part of it or more; may be repeated.
    /// Without any, the base is written in another dtype
    #[arg(long = "adapter", value_name = "ADAPTER[=WEIGHT]")]
    adapters: Vec<String>,
    /// The directory to write
    #[arg(long, short, value_name = "DIR", required_unless_present = "classifier")]
    output: Option<PathBuf>,
    /// Keep base and adapters unfolded in one directory that every command takes as --model
    #[arg(long, conflicts_with_all = ["classifier", "to"])]
    bundle: bool,
    /// In place of a model write the class features [classes, width] to a safetensors file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["output", "dtype", "to"])]
    classifier: Option<PathBuf>,
    /// With --classifier: labels, a,b,c or a file with one a line; the adapter's classes when left out
    #[arg(long, value_name = "A,B|FILE", requires = "classifier")]
    labels: Option<String>,
    /// With --classifier: a prompt around the label; may be repeated
    #[arg(long = "template", value_name = "TEXT", requires = "classifier")]
    templates: Vec<String>,
    /// The files' dtype; the base's when left out
    #[arg(long, value_enum)]
    dtype: Option<FileDtype>,
    /// Whose layout to write
    #[arg(long, value_enum, default_value_t)]
    to: FileLayout,
    /// Take an adapter out of a merged --model again, as its weight says; of several the last one merged first
    #[arg(long, value_name = "ADAPTER[=WEIGHT]", conflicts_with_all = ["adapters", "bundle", "classifier", "combine"])]
    undo: Option<String>,
    #[command(flatten)]
    combine: CombineArgs,
    /// Replace a merged model, or with --combine an adapter, that exists
    #[arg(long)]
    force: bool,
    /// Accept an adapter that was made for another base
    #[arg(long)]
    allow_base_mismatch: bool,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(super) enum FileLayout {
    /// transformers': config.json, model.safetensors
    #[default]
    Hf,
    /// open_clip's: open_clip_config.json, open_clip_model.safetensors
    #[value(name = "open_clip", alias = "open-clip")]
    OpenClip,
}

impl From<FileLayout> for Layout {
    fn from(layout: FileLayout) -> Self {
        match layout {
            FileLayout::Hf => Self::Hf,
            FileLayout::OpenClip => Self::OpenClip,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum FileDtype {
    F32,
    F16,
    Bf16,
}

impl From<FileDtype> for DType {
    fn from(dtype: FileDtype) -> Self {
        match dtype {
            FileDtype::F32 => Self::F32,
            FileDtype::F16 => Self::F16,
            FileDtype::Bf16 => Self::BF16,
        }
    }
}

pub(super) fn run(args: MergeArgs, context: &Context) -> Result<()> {
    if let Some(file) = &args.classifier {
        return write_classifier(&args, file, context);
    }
    if let Some(adapter) = &args.undo {
        return take_out(&args, adapter, context);
    }
    let adapters = args.adapters.iter().map(|a| weighted(a)).collect::<Result<Vec<_>>>()?;
    let named: Vec<PathBuf> = adapters.iter().map(|(adapter, _)| adapter.clone()).collect();
    let model = args.base.fetched(&named, context)?;
    let adapters = adapters.into_iter().map(|(a, w)| Ok((context.adapter(&a)?, w))).collect::<Result<_>>()?;
    let output = args.output.unwrap_or_default();
    if let Some(how) = args.combine.how() {
        let rest = Rest { model, adapters, output, force: args.force, allow_base_mismatch: args.allow_base_mismatch };
        return args.combine.run(how, rest, context);
    }
    let options = MergeOptions {
        model,
        adapters,
        output,
        dtype: args.dtype.map(Into::into),
        layout: args.to.into(),
        force: args.force,
        allow_base_mismatch: args.allow_base_mismatch,
    };
    if args.bundle {
        let done = bundle(&options)?;
        done.notes.iter().for_each(|note| context.say(&format!("note: {note}")));
        return context.print(&done, || {
            let count = done.adapters.len();
            format!("{}: base and {count} adapters, {}; use it as --model\n", done.output.display(), done.dtype)
        });
    }
    let done = merge(&options)?;
    done.notes.iter().for_each(|note| context.say(&format!("note: {note}")));
    context.print(&done, || {
        format!(
            "{}: {} tensors changed, {}; logits differ from base + adapter by at most {:.1e} ({:.1e} relative, {:.0e} allowed)\n",
            done.output.display(),
            done.changed_tensors,
            done.dtype,
            done.max_abs_diff,
            done.relative_diff,
            done.tolerance
        )
    })
}

fn take_out(args: &MergeArgs, adapter: &str, context: &Context) -> Result<()> {
    let (adapter, weight) = weighted(adapter)?;
    let done = undo(&UndoOptions {
        model: args.base.model.as_ref().map_or_else(|| Err(merged()), |_| args.base.fetched(&[], context))?,
        adapter: context.adapter(&adapter)?,
        weight,
        output: args.output.clone().unwrap_or_default(),
        dtype: args.dtype.map(Into::into),
        layout: args.to.into(),
        force: args.force,
    })?;
    done.notes.iter().for_each(|note| context.say(&format!("note: {note}")));
    context.print(&done, || {
        format!(
            "{}: {} tensors changed, {}; weights are back within {:.1e}, logits with the adapter merged again within {:.1e} ({:.0e} allowed)\n",
            done.output.display(),
            done.changed_tensors,
            done.dtype,
            done.rounding,
            done.relative_diff,
            done.tolerance
        )
    })
}

/// What an adapter names is the base before the merge.
fn merged() -> Error {
    Error::input("--model", "expected the merged model, found none")
        .hint("pass --model with the model that --undo takes the adapter out of")
}

fn write_classifier(args: &MergeArgs, file: &Path, context: &Context) -> Result<()> {
    let named = args.adapters.iter().map(|a| Ok(weighted(a)?.0)).collect::<Result<Vec<_>>>()?;
    let mut model = Model::load(&args.base.fetched(&named, context)?)?;
    for adapter in &args.adapters {
        model = match weighted(adapter)? {
            (adapter, 1.0) => model.with_adapter_of(&context.adapter(&adapter)?, args.allow_base_mismatch)?,
            (_, weight) => return Err(Error::input("--adapter", format!("a classifier takes whole adapters, found the weight {weight}"))),
        };
    }
    let options = ClassifierOptions {
        labels: args.labels.as_deref().map(predict::labels).transpose()?.unwrap_or_default(),
        templates: args.templates.clone(),
        output: file.to_path_buf(),
        force: args.force,
    };
    let done = classifier(&model, &options)?;
    model.notes().iter().chain(&done.notes).for_each(|note| context.say(&format!("note: {note}")));
    context.print(&done, || {
        let (rows, scale) = (done.classes.len(), done.logit_scale);
        format!("{}: weight [{rows}, {}], logit scale {scale:.4}\n", done.output.display(), done.dim)
    })
}

/// `DIR` or `DIR=0.5`; a directory that exists is taken as it is.
fn weighted(argument: &str) -> Result<(PathBuf, f64)> {
    let whole = PathBuf::from(argument);
    match argument.rsplit_once('=') {
        Some((dir, weight)) if !whole.exists() => match weight.parse::<f64>() {
            Ok(w) if w.is_finite() => Ok((dir.into(), w)),
            _ => Err(Error::input("--adapter", format!("`{weight}` is not a finite number")).hint("for example --adapter DIR=0.5")),
        },
        _ => Ok((whole, 1.0)),
    }
}
