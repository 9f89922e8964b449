//! `peft new`.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};

use clap::Args;
use dialoguer::{Confirm, Input, Select};
use peft_adapters::registry::METHODS;
use serde_json::json;

use super::Context;
use crate::data::{ColumnChoice, DataConfig};
use crate::draft::{Wishes, draft};
use crate::error::{Error, Result};
use crate::files;
use crate::task::prompts;

pub(super) const EXAMPLES: &str = "\
Examples:
  peft new                                           asks, on a terminal
  peft new --data data/pets                          writes pets.yaml
  peft new --data films.csv --label genres --separator ';' --image poster
  peft new memes.yaml --data memes.jsonl --task retrieve --model path/to/clip --method lora";

/// Arguments of `peft new`.
#[derive(Debug, Args)]
pub(super) struct NewArgs {
    /// The recipe to write; named after the data when left out
    #[arg(value_name = "FILE")]
    recipe: Option<PathBuf>,
    /// Your data: a directory, a table or builtin:NAME; asked for when left out
    #[arg(long, value_name = "PATH")]
    data: Option<String>,
    /// The base: builtin:tiny, a directory or a hub id
    #[arg(long, default_value = "builtin:tiny", value_name = "BASE")]
    model: String,
    /// How to adapt it: the name of a method, such as lora
    #[arg(long, default_value = "lora", value_name = "NAME")]
    method: String,
    /// classify, match, answer, retrieve or regress; what the data offers when left out
    #[arg(long, value_name = "TASK")]
    task: Option<String>,
    /// The prompt around a class name
    #[arg(long, default_value = prompts::DEFAULT_TEMPLATE, value_name = "TEXT")]
    template: String,
    /// Training examples of each class; all when left out
    #[arg(long, value_name = "N")]
    shots: Option<usize>,
    /// The column of class names
    #[arg(long, value_name = "COLUMN")]
    label: Option<String>,
    /// The column of texts; given several times, their strings are joined
    #[arg(long, value_name = "COLUMN")]
    text: Vec<String>,
    /// The column of images; of tars the extension of their members
    #[arg(long, value_name = "COLUMN")]
    image: Option<String>,
    /// What stands between class names in a cell, such as ";", where a row has several
    #[arg(long, value_name = "CHARACTER")]
    separator: Option<String>,
    /// Replace a recipe that exists
    #[arg(long)]
    force: bool,
}

pub(super) fn run(mut args: NewArgs, context: &Context) -> Result<()> {
    if args.data.is_none() {
        if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
            return Err(Error::input("--data", "expected a directory, a table or builtin:NAME, found nothing")
                .hint("on a terminal `peft new` asks; here say --data PATH"));
        }
        ask(&mut args).map_err(|e| Error::input("questions", e))?;
    }
    let data = args.data.unwrap_or_default();
    if !METHODS.iter().any(|m| m.name == args.method) {
        let known: Vec<&str> = METHODS.iter().map(|m| m.name).collect();
        return Err(Error::input("--method", format!("there is no method `{}`; there are {}", args.method, known.join(", "))));
    }
    let path = args.recipe.unwrap_or_else(|| PathBuf::from(format!("{}.yaml", stem(&data))));
    if path.exists() && !args.force {
        return Err(Error::input(path.display(), "exists").hint("name another file, or pass --force to replace it"));
    }
    let name = path.file_stem().map_or("recipe".into(), |s| s.to_string_lossy().into_owned());
    let file = path.display().to_string();
    let columns = ColumnChoice { label: args.label, text: args.text, image: args.image, separator: args.separator };
    let wishes =
        Wishes { data, model: args.model, method: args.method, task: args.task, template: args.template, shots: args.shots, columns };
    let found = draft(&wishes, &file, &name)?;
    files::write_atomic(&path, found.text.as_bytes())?;
    if let Some(columns) = &found.columns {
        context.say(&format!("columns found: {}", columns.join(", ")));
    }
    found.notes.iter().for_each(|note| context.say(&format!("note: {note}")));
    let document = json!({ "recipe": path, "draft": found });
    context.print(&document, || format!("{file} is written; next: peft train {file} --check\n"))
}

/// Named after the directory or the file.
fn stem(data: &str) -> String {
    let name = data.trim_start_matches("builtin:").trim_start_matches("hub:");
    let stem = Path::new(name).file_stem().unwrap_or_default().to_string_lossy();
    // Of globs, ranges and revisions only what belongs into a file's name.
    let stem = stem.split(['*', '?', '{', '@']).next().unwrap_or_default().trim_end_matches(['-', '_', '.']);
    if stem.is_empty() { "recipe".into() } else { stem.to_string() }
}

/// The questions that matter; what was said on the command line is their default.
fn ask(args: &mut NewArgs) -> dialoguer::Result<()> {
    let located = |path: &String| DataConfig::locate(path).map(|_| ()).map_err(|e| e.to_string());
    args.data = Some(Input::new().with_prompt("Your images (a directory, a table, builtin:emoji)").validate_with(located).interact_text()?);
    args.model = Input::new().with_prompt("The base (builtin:tiny, a directory, a hub id)").default(args.model.clone()).interact_text()?;
    let names: Vec<&str> = METHODS.iter().map(|m| m.name).collect();
    let first = names.iter().position(|n| *n == args.method).unwrap_or(0);
    args.method = names[Select::new().with_prompt("The method").items(&names).default(first).interact()?].to_string();
    args.template = Input::new().with_prompt("The prompt around a class name").default(args.template.clone()).interact_text()?;
    let number =
        |n: &String| (n.is_empty() || n.parse::<usize>().is_ok_and(|n| n > 0)).then_some(()).ok_or("expected a number from 1, or nothing");
    let shots = Input::<String>::new().with_prompt("Training examples of each class (empty: all)").allow_empty(true);
    let shots = shots.validate_with(number).interact_text()?;
    args.shots = shots.parse().ok();
    let file = args.recipe.clone().unwrap_or_else(|| format!("{}.yaml", stem(args.data.as_deref().unwrap_or("recipe"))).into());
    let file = PathBuf::from(Input::<String>::new().with_prompt("The recipe").default(file.display().to_string()).interact_text()?);
    if file.exists() && !args.force {
        args.force = Confirm::new().with_prompt(format!("{} exists; replace it?", file.display())).default(false).interact()?;
    }
    args.recipe = Some(file);
    Ok(())
}
