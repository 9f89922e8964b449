//! `peft bench`.

use std::path::PathBuf;

use clap::Args;

use super::Context;
use crate::bench::{BenchOptions, bench};
use crate::error::Result;
use crate::recipe::Recipe;

pub(super) const EXAMPLES: &str = "\
Examples:
  peft bench recipes/quickstart.yaml --steps 20
  peft bench pets.yaml --floor --set train.batch=64";

/// Arguments of `peft bench`.
#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    /// A recipe file
    recipe: PathBuf,
    /// Change a value of the recipe, such as train.batch=64; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Steps to measure, after one that is not counted
    #[arg(long, default_value_t = 10)]
    steps: usize,
    /// Also measure the arithmetic floor: the same matrix products alone, in turn with the steps
    #[arg(long)]
    floor: bool,
}

pub(super) fn run(args: &BenchArgs, context: &Context) -> Result<()> {
    let recipe = Recipe::load(&args.recipe, &args.sets)?;
    let mut progress = context.progress();
    let found = bench(recipe, BenchOptions { steps: args.steps, floor: args.floor }, &context.device, &mut progress)?;
    drop(progress);
    context.print(&found, || {
        let memory = found.peak_rss_mib.map(|m| format!(", {m:.0} MiB at most")).unwrap_or_default();
        let floor = found.floor.map(|f| {
            format!("floor: {:.4} s a step ({:.1} GFLOP at {:.0} GFLOP/s), of which a step is {:.2} times\n", f.seconds.median, f.gflop, f.gflop_per_second, f.multiple)
        });
        format!(
            "{:.4} s a step (median of {}; fastest {:.4}), {:.1} images/s, {} trainable parameters{memory}\nwaiting for data: {:.4} s a step\n{}",
            found.step_seconds.median, found.steps, found.step_seconds.min, found.images_per_second, found.trainable_parameters, found.data_seconds, floor.unwrap_or_default()
        )
    })
}
