//! `peft completions`.

use clap::{Args, CommandFactory};
use clap_complete::Shell;
use serde_json::json;

use super::{Cli, Context};
use crate::error::{Error, Result};

pub(super) const EXAMPLES: &str = "\
Examples:
  peft completions bash > ~/.local/share/bash-completion/completions/peft
  peft completions zsh > \"${fpath[1]}/_peft\"
  peft completions fish > ~/.config/fish/completions/peft.fish";

/// Arguments of `peft completions`.
#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

pub(super) fn run(args: &CompletionsArgs, context: &Context) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "peft", &mut script);
    let script = String::from_utf8(script).map_err(|e| Error::fault("completions", e))?;
    context.print(&json!({ "shell": args.shell.to_string(), "script": script }), || script.clone())
}
