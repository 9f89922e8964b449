//! `peft extract`.

use std::path::PathBuf;

use clap::Args;
use peft_adapters::targets::Targets;

use super::{Context, columns, size};
use crate::error::Result;
use crate::extract::{ExtractOptions, Extracted, extract};

pub(super) const EXAMPLES: &str = "\
Examples:
  peft extract path/to/clip path/to/tuned --rank 16 --output tuned-lora
  peft extract path/to/clip tuned.pt --rank 4 --targets q_proj,v_proj --rest --output tuned-lora";

/// Arguments of `peft extract`.
#[derive(Debug, Args)]
pub(super) struct ExtractArgs {
    /// The base that the checkpoint was trained from: as --model of other verbs
    #[arg(value_name = "BASE")]
    base: String,
    /// The fully fine-tuned checkpoint
    #[arg(value_name = "TUNED")]
    tuned: String,
    /// The rank: higher keeps more, in a larger file
    #[arg(long, value_name = "R")]
    rank: usize,
    /// Linear layers: names a,b or a regex over the whole path; all when left out
    #[arg(long, value_name = "A,B|REGEX")]
    targets: Option<String>,
    /// Save whole what else has changed (biases, norms, embeddings), as `full` does, in a directory beside the LoRA's; it is
    /// reported and lost otherwise
    #[arg(long)]
    rest: bool,
    /// The adapter directory to write
    #[arg(long, short, value_name = "DIR")]
    output: PathBuf,
    /// Replace an adapter that exists
    #[arg(long)]
    force: bool,
}

pub(super) fn run(args: ExtractArgs, context: &Context) -> Result<()> {
    context.source(&args.base)?;
    context.source(&args.tuned)?;
    let done = extract(&ExtractOptions {
        base: args.base,
        tuned: args.tuned,
        rank: args.rank,
        targets: args.targets.map(|t| targets(&t)),
        rest: args.rest,
        output: args.output,
        force: args.force,
    })?;
    context.print(&done, || text(&done))
}

/// Names are plain words; anything else is a regex.
fn targets(value: &str) -> Targets {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_.,".contains(c);
    match value == Targets::ALL_LINEAR || !value.chars().all(plain) {
        true => Targets::Pattern(value.to_string()),
        false => Targets::Names(value.split(',').filter(|n| !n.is_empty()).map(String::from).collect()),
    }
}

fn text(done: &Extracted) -> String {
    let head = ["layer", "rank", "change", "energy kept"].map(String::from).to_vec();
    let percent = |x: f64| format!("{:.2} %", 100.0 * x);
    let rows = done.layers.iter().map(|l| vec![l.path.clone(), l.rank.to_string(), percent(l.change), percent(l.energy)]);
    let mut out = columns(&std::iter::once(head).chain(rows).collect::<Vec<_>>(), &[1, 2, 3]);
    if !done.rest.is_empty() {
        let what = if done.rest_saved { "saved whole beside it" } else { "lost; --rest saves it whole" };
        out += &format!("\n{} other tensors have changed, {what}:\n", done.rest.len());
        let rows: Vec<_> = done.rest.iter().map(|o| vec![format!("  {}", o.name), percent(o.change)]).collect();
        out += &columns(&rows, &[1]);
    }
    out + &format!(
        "\n{}: rank {} keeps {} of the difference; logits differ from the checkpoint's by {:.1e} (relative), the base's by {:.1e}; {}\n",
        done.output.display(),
        done.rank,
        percent(done.energy),
        done.after,
        done.before,
        size(done.adapter_bytes)
    )
}
