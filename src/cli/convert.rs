//! `peft convert`.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::merge::{FileDtype, FileLayout};
use super::{BaseOptions, Context};
use crate::delta;
use crate::error::{Error, Result};
use crate::merge::{MergeOptions, merge};

pub(super) const EXAMPLES: &str = "\
Examples:
  peft convert ViT-B-32.pt --output clip-vit-b32                             OpenAI's archive for transformers
  peft convert epoch_32.pt --arch ViT-B-16 --image-size 288 --output clip    open_clip's training checkpoint, another size
  peft convert lora_weights.pt --output adapter                              a CLIP-LoRA adapter as HF PEFT's";

/// Arguments of `peft convert`.
#[derive(Debug, Args)]
pub(super) struct ConvertArgs {
    /// A checkpoint of OpenAI or open_clip, a directory, a hub id; or an adapter that CLIP-LoRA saved
    #[arg(value_name = "SRC")]
    source: String,
    /// The directory to write
    #[arg(long, short, value_name = "DIR")]
    output: PathBuf,
    #[command(flatten)]
    options: BaseOptions,
    /// The files' dtype; the checkpoint's when left out
    #[arg(long, value_enum)]
    dtype: Option<FileDtype>,
    /// Whose layout to write
    #[arg(long, value_enum, default_value_t)]
    to: FileLayout,
    /// Replace a directory that an earlier conversion wrote
    #[arg(long)]
    force: bool,
}

pub(super) fn run(args: &ConvertArgs, context: &Context) -> Result<()> {
    let source = Path::new(&args.source);
    if source.is_file() && delta::is_clip_lora(source) {
        return adapter(args, source, context);
    }
    let spec = args.options.spec(&args.source)?;
    context.source(&spec)?;
    let done = merge(&MergeOptions {
        model: spec,
        adapters: Vec::new(),
        output: args.output.clone(),
        dtype: args.dtype.map(Into::into),
        layout: args.to.into(),
        force: args.force,
        allow_base_mismatch: false,
    })?;
    done.notes.iter().for_each(|note| context.say(&format!("note: {note}")));
    context.print(&done, || {
        format!(
            "{}: {}, logits differ from {} by at most {:.1e} ({:.1e} relative, {:.0e} allowed)\n",
            done.output.display(),
            done.dtype,
            args.source,
            done.max_abs_diff,
            done.relative_diff,
            done.tolerance
        )
    })
}

fn adapter(args: &ConvertArgs, source: &Path, context: &Context) -> Result<()> {
    if args.output.exists() && !args.force {
        return Err(Error::input(args.output.display(), "exists").hint("pass --force to replace it, or choose another --output"));
    }
    let (method, bytes) = delta::convert(source, &args.output)?;
    context.print(&json!({ "output": args.output, "method": method, "adapter_bytes": bytes }), || {
        format!("{}: {method} adapter in HF PEFT's format, {bytes} bytes\n", args.output.display())
    })
}
