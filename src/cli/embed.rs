//! `peft embed`.

use std::path::PathBuf;

use clap::Args;

use super::{Context, ModelArgs};
use crate::embed::{EmbedOptions, embed};
use crate::error::Result;

pub(super) const EXAMPLES: &str = "\
Examples:
  peft embed --model path/to/clip --images photos --texts captions.txt --output features.safetensors
  peft embed --model builtin:tiny --adapter runs/quickstart/adapter --images list.txt --normalize -o e.safetensors";

/// Arguments of `peft embed`.
#[derive(Debug, Args)]
pub(super) struct EmbedArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// A directory of images, or a text file with one path a line
    #[arg(long, value_name = "DIR|LIST")]
    images: Option<PathBuf>,
    /// A text file with one text a line
    #[arg(long, value_name = "FILE")]
    texts: Option<PathBuf>,
    /// The safetensors file to write
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Divide each row by its Euclidean norm
    #[arg(long)]
    normalize: bool,
}

pub(super) fn run(args: EmbedArgs, context: &Context) -> Result<()> {
    let model = args.model.open(context)?;
    let options = EmbedOptions { images: args.images, texts: args.texts, output: args.output, normalize: args.normalize };
    let done = embed(&model, &options)?;
    if done.truncated > 0 {
        context.say(&format!("warning: {} texts were longer than the model's context and were cut", done.truncated));
    }
    if done.blank > 0 {
        context.say(&format!("note: {} lines of --texts are blank; their rows are features of the empty text", done.blank));
    }
    context.print(&done, || {
        format!("{} images and {} texts, {} numbers each, in {}\n", done.images, done.texts, done.dim, done.output.display())
    })
}
