//! `peft embed`.

use std::path::PathBuf;

use clap::Args;

use super::{Context, ModelArgs};
use crate::embed::{EmbedOptions, embed};
use crate::error::Result;

pub(super) const EXAMPLES: &str = "\
Examples:
  peft embed --model path/to/clip --images photos --texts captions.txt --output features.safetensors
  peft embed --model path/to/clip --images 'photos/**/*.jpg' --skip-bad --output features.npy
  peft embed --model builtin:tiny --adapter runs/quickstart/adapter --images list.txt --normalize -o e.safetensors";

/// Arguments of `peft embed`.
#[derive(Debug, Args)]
pub(super) struct EmbedArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// A directory of images, a glob pattern ('photos/**/*.jpg'), a table (csv, tsv, jsonl) with a column of paths, or a text
    /// file with one path a line; may be repeated
    #[arg(long, value_name = "DIR|GLOB|TABLE|LIST")]
    images: Vec<String>,
    /// A text file with one text a line, or a table with a column of texts; a row for each line or row, blank ones too
    #[arg(long, value_name = "FILE")]
    texts: Option<PathBuf>,
    /// The file to write: .safetensors, or .npy with NAME.ids.jsonl beside it. The same command goes on where a kill ended it
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Divide each row by its Euclidean norm
    #[arg(long)]
    normalize: bool,
    /// Leave out images, and rows of tables, that cannot be read: they have no row
    #[arg(long)]
    skip_bad: bool,
}

pub(super) fn run(args: EmbedArgs, context: &Context) -> Result<()> {
    let model = args.model.open(context)?;
    if model.tells() {
        context.say(
            "note: this adapter judges an image together with a text; rows are features of its towers without its head \
             (`peft predict --text` or `--question` judges pairs)",
        );
    }
    let EmbedArgs { images, texts, output, normalize, skip_bad, .. } = args;
    let both = (!images.is_empty(), texts.is_some());
    let options = EmbedOptions { images, texts, output, normalize, skip_bad };
    let mut progress = context.progress();
    let done = embed(&model, &options, &mut progress).map_err(|e| if skip_bad { e } else { super::skipping(e) })?;
    drop(progress);
    if done.truncated > 0 {
        context.say(&format!("warning: {} texts were longer than the model's context and were cut", done.truncated));
    }
    if done.blank > 0 {
        context.say(&format!("note: {} lines or rows of --texts are blank, and are embedded as the empty text", done.blank));
    }
    if let Some(first) = done.skipped.first() {
        let (count, error) = (done.skipped.len(), &first.error);
        let apart = if both == (true, true) { "; images and texts no longer stand row by row" } else { "" };
        context.say(&format!("note: {count} inputs cannot be read and have no row{apart}; the first: {}: {}", error.place, error.message));
    }
    context.print(&done, || {
        format!("{} images and {} texts, {} numbers each, in {}\n", done.images, done.texts, done.dim, done.output.display())
    })
}
