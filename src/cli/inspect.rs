//! `peft inspect`.

use std::fmt::Write as _;

use clap::Args;
use serde_json::Value;

use super::{BaseOptions, Context};
use crate::error::Result;
use crate::inspect::{Inspected, inspect, verify};
use crate::recipe::yaml;

pub(super) const EXAMPLES: &str = "\
Examples:
  peft inspect builtin:tiny
  peft inspect runs/quickstart/adapter
  peft inspect runs/quickstart/adapter --verify --trusted-key release.pub
  peft inspect pets.yaml                             the recipe with every default";

/// Arguments of `peft inspect`.
#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// A base, an adapter, a run directory or a recipe
    path: String,
    /// Compute every digest anew and compare: an adapter's files with its B3SUMS (and --trusted-key's signature), its weights with
    /// its peft.json; a base's weights with nothing that was remembered
    #[arg(long)]
    verify: bool,
    #[command(flatten)]
    options: BaseOptions,
}

pub(super) fn run(args: &InspectArgs, context: &Context) -> Result<()> {
    let mut found = inspect(&args.options.spec(&args.path)?)?;
    if args.verify {
        found.facts.insert("verified".into(), verify(&args.path, &context.trusted()?)?.into());
    }
    let recipe = found.facts.get("recipe").map(yaml).transpose()?;
    context.print(&found, || match &recipe {
        Some(recipe) => described(&found, recipe),
        None => text(&found),
    })
}

/// A recipe with every default, which can be read as a recipe again; what else there is to say of a run stands above it in comments.
fn described(found: &Inspected, recipe: &str) -> String {
    let mut about = found.clone();
    about.facts.retain(|key, _| key != "recipe");
    text(&about).lines().map(|line| format!("# {line}\n")).collect::<String>() + recipe
}

fn text(found: &Inspected) -> String {
    let mut out = format!("{}\n", found.kind);
    for (key, value) in &found.facts {
        let key = key.replace('_', " ");
        match value {
            Value::Null => {}
            Value::String(s) if s.is_empty() => {}
            Value::String(s) => {
                let _ = writeln!(out, "  {key:<22}{s}");
            }
            Value::Array(items) if items.iter().all(Value::is_string) => {
                let items: Vec<&str> = items.iter().filter_map(Value::as_str).collect();
                let _ = writeln!(out, "  {key:<22}{}", items.join(", "));
            }
            other => {
                let _ = writeln!(out, "  {key:<22}{other}");
            }
        }
    }
    for row in &found.tensors {
        let count = if row.count > 1 { format!("  × {}", row.count) } else { String::new() };
        let _ = writeln!(out, "  {:<72} {:?}{count}", row.name, row.shape);
    }
    out
}
