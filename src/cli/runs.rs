//! `peft runs`.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::progress::duration;
use super::{Context, columns};
use crate::error::Result;
use crate::runs::{Difference, Row, State, diff, list};

pub(super) const EXAMPLES: &str = "\
Examples:
  peft runs
  peft runs runs/comparison --json
  peft runs --diff runs/a runs/b                     or two recipe files";

/// Arguments of `peft runs`.
#[derive(Debug, Args)]
pub(super) struct RunsArgs {
    /// Where to look, also further down
    #[arg(default_value = "runs", value_name = "DIR")]
    directory: PathBuf,
    /// Show where the resolved recipes of two runs (or two recipe files) differ, key by key
    #[arg(long, num_args = 2, value_names = ["A", "B"], conflicts_with = "directory")]
    diff: Option<Vec<PathBuf>>,
}

pub(super) fn run(args: &RunsArgs, context: &Context) -> Result<()> {
    if let Some([a, b]) = args.diff.as_deref() {
        let found = diff(a, b)?;
        let document = json!({ "a": a, "b": b, "differences": found });
        return context.print(&document, || differences(&found, &a.display().to_string(), &b.display().to_string()));
    }
    let rows = list(&args.directory)?;
    context.print(&rows, || match rows.is_empty() {
        true => format!("no runs in {}\n", args.directory.display()),
        false => table(&rows),
    })
}

fn table(rows: &[Row]) -> String {
    let mut lines = vec![["run", "state", "method", "metric", "before", "after", "parameters", "time"].map(String::from).to_vec()];
    let percent = |v: Option<f64>| v.map_or(String::new(), |v| format!("{v:.4}"));
    let mut reasons = String::new();
    for row in rows {
        lines.push(vec![
            row.run.display().to_string(),
            state(row.state).into(),
            row.method.clone(),
            row.metric.clone().unwrap_or_default(),
            percent(row.before),
            percent(row.after),
            row.trainable_parameters.map_or(String::new(), |n| n.to_string()),
            row.seconds.map_or(String::new(), duration),
        ]);
        if let Some(reason) = &row.reason {
            reasons += &format!("{}: {reason}\n", row.run.display());
        }
    }
    columns(&lines, &[4, 5, 6, 7]) + &reasons
}

fn state(state: State) -> &'static str {
    match state {
        State::Finished => "finished",
        State::Running => "running",
        State::Unfinished => "unfinished",
        State::Failed => "failed",
    }
}

fn differences(found: &[Difference], a: &str, b: &str) -> String {
    if found.is_empty() {
        return "the recipes are the same\n".into();
    }
    let mut lines = vec![vec!["key".to_string(), a.into(), b.into()]];
    let value = |v: &Option<Value>| v.as_ref().map_or("–".to_string(), ToString::to_string);
    lines.extend(found.iter().map(|d| vec![d.key.clone(), value(&d.a), value(&d.b)]));
    columns(&lines, &[])
}
