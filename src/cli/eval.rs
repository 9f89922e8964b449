//! `peft eval`.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::Context;
use super::progress::summary;
use crate::data::Split;
use crate::error::{Error, Result};
use crate::figures::interval;
use crate::files;
use crate::recipe::Recipe;
use crate::run;
use crate::session::{EvalOptions, evaluate};

pub(super) const EXAMPLES: &str = "\
Examples:
  peft eval runs/pets                                the run's adapter on the test split
  peft eval pets.yaml                                the bare base
  peft eval pets.yaml --adapter runs/pets/adapter --split val --predictions val.jsonl";

/// Arguments of `peft eval`.
#[derive(Debug, Args)]
pub(super) struct EvalArgs {
    /// A recipe file (the base alone, unless --adapter) or a run directory (its adapter)
    target: PathBuf,
    /// Change a value of the recipe, such as data.builtin=emoji-flat; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// The adapter to evaluate: a directory, a .pt of CLIP-LoRA, or a hub id
    #[arg(long, value_name = "ADAPTER")]
    adapter: Option<PathBuf>,
    /// train, val or test
    #[arg(long, default_value = "test")]
    split: String,
    /// Write one JSON line for each example
    #[arg(long, value_name = "FILE")]
    predictions: Option<PathBuf>,
    /// Accept an adapter that was made for another base
    #[arg(long)]
    allow_base_mismatch: bool,
}

pub(super) fn run(args: EvalArgs, context: &Context) -> Result<()> {
    let split =
        Split::parse(&args.split).ok_or_else(|| Error::input("--split", format!("expected train, val or test, found `{}`", args.split)))?;
    let is_run = args.target.is_dir();
    let file = if is_run { args.target.join("recipe.yaml") } else { args.target.clone() };
    if is_run && !file.exists() {
        return Err(Error::input(args.target.display(), "is no run directory: there is no recipe.yaml"));
    }
    let recipe = Recipe::load(&file, &args.sets)?;
    let same = |path: &PathBuf| path.canonicalize().ok().is_some_and(|path| file.canonicalize().is_ok_and(|file| file == path));
    if args.predictions.as_ref().is_some_and(same) {
        return Err(Error::input("--predictions", "names the recipe itself").hint("choose another file"));
    }
    let of_run = args.predictions.as_ref().is_some_and(|path| is_run && run::is_own_file(&args.target, path));
    if of_run {
        return Err(Error::input("--predictions", "names a file of the run itself").hint("choose another file"));
    }
    let own = args.target.join("adapter");
    let named = args.adapter.map(|name| context.adapter(&name)).transpose()?;
    let adapter = named.or_else(|| is_run.then_some(own));
    let options = EvalOptions { adapter, split, allow_base_mismatch: args.allow_base_mismatch };
    let mut progress = context.progress();
    let found = evaluate(recipe, &options, &context.device, &mut progress)?;
    drop(progress);
    if let Some(path) = &args.predictions {
        files::refuse_input("--predictions", path)?;
        run::write_predictions(path, &found.predictions)?;
    }
    let mut document =
        json!({ "split": args.split, "examples": found.examples, "loss": found.loss, "classification": found.classification });
    let sure = found.accuracy_interval();
    if let Some(map) = document.as_object_mut() {
        map.extend(found.metrics.iter().map(|(k, v)| (k.clone(), json!(v))));
    }
    context.print(&document, || {
        let table = found.classification.as_ref().filter(|_| !context.global.quiet).map(|c| c.text() + "\n").unwrap_or_default();
        let sure = sure.map(|(found, count)| format!("; accuracy of {count}: {} (Wilson)", interval(found))).unwrap_or_default();
        format!("{table}{}: {}{sure}\n", args.split, summary(&found))
    })
}
