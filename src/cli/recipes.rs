//! `peft recipes`.

use clap::Args;
use serde_json::json;

use super::{Context, columns};
use crate::builtin::recipes::{RECIPES, summary};
use crate::error::{Error, Result};

pub(super) const EXAMPLES: &str = "\
Examples:
  peft recipes
  peft recipes quickstart > mine.yaml
  peft recipes clip-lora/dtd";

/// Arguments of `peft recipes`.
#[derive(Debug, Args)]
pub(super) struct RecipesArgs {
    /// The recipe to print; all are listed when left out
    name: Option<String>,
}

pub(super) fn run(args: &RecipesArgs, context: &Context) -> Result<()> {
    let Some(name) = &args.name else {
        let all: Vec<_> = RECIPES.iter().map(|(name, text)| json!({ "name": name, "summary": summary(text) })).collect();
        return context.print(&all, || {
            columns(&RECIPES.iter().map(|(name, text)| vec![(*name).to_string(), summary(text).to_string()]).collect::<Vec<_>>(), &[])
        });
    };
    let wanted = name.trim_end_matches(".yaml");
    let (name, text) = RECIPES.iter().find(|(n, _)| *n == wanted).ok_or_else(|| {
        let known: Vec<&str> = RECIPES.iter().map(|(n, _)| *n).collect();
        Error::input(name, format!("there is no such recipe; there are {}", known.join(", ")))
    })?;
    context.print(&json!({ "name": name, "text": text }), || (*text).to_string())
}
