//! `peft merge`.

use std::path::{Path, PathBuf};

use candle_core::DType;
use clap::{Args, ValueEnum};

use super::{Context, predict};
use crate::bundle::bundle;
use crate::classifier::{ClassifierOptions, classifier};
use crate::error::{Error, Result};
use crate::merge::{MergeOptions, merge};
use crate::model::Model;

/// Arguments of `peft merge`.
#[derive(Debug, Args)]
pub(super) struct MergeArgs {
    /// The base: builtin:tiny or a directory
    #[arg(long, value_name = "BASE")]
    model: String,
    /// An adapter directory, with =WEIGHT to fold only a part of it or more; may be repeated.
    /// Without any, the base is written in another dtype
    #[arg(long = "adapter", value_name = "DIR[=WEIGHT]")]
    adapters: Vec<String>,
    /// The directory to write
    #[arg(long, short, value_name = "DIR", required_unless_present = "classifier")]
    output: Option<PathBuf>,
    /// Keep base and adapters unfolded in one directory that every command takes as --model
    #[arg(long, conflicts_with = "classifier")]
    bundle: bool,
    /// In place of a model write the class features [classes, width] to a safetensors file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["output", "dtype"])]
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
    /// Replace a merged model that exists
    #[arg(long)]
    force: bool,
    /// Accept an adapter that was made for another base
    #[arg(long)]
    allow_base_mismatch: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum FileDtype {
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
    let options = MergeOptions {
        model: args.model,
        adapters: args.adapters.iter().map(|a| weighted(a)).collect::<Result<_>>()?,
        output: args.output.unwrap_or_default(),
        dtype: args.dtype.map(Into::into),
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

fn write_classifier(args: &MergeArgs, file: &Path, context: &Context) -> Result<()> {
    let mut model = Model::load(&args.model)?;
    for adapter in &args.adapters {
        model = match weighted(adapter)? {
            (dir, 1.0) => model.with_adapter_of(&dir, args.allow_base_mismatch)?,
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
