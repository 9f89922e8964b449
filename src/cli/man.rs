//! `peft man`.

use std::path::{Path, PathBuf};

use clap::{Args, CommandFactory};
use clap_mangen::Man;
use serde_json::json;

use super::{Cli, Context};
use crate::error::{Error, Result};
use crate::files;

pub(super) const EXAMPLES: &str = "\
Examples:
  peft man ~/.local/share/man/man1                   then `man peft-train`";

/// Arguments of `peft man`.
#[derive(Debug, Args)]
pub(super) struct ManArgs {
    /// The directory for peft.1 and a page for each verb; made if it is not there
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

pub(super) fn run(args: &ManArgs, context: &Context) -> Result<()> {
    let mut command = Cli::command();
    // Gives each verb its full name.
    command.build();
    let mut pages = vec![write(&args.directory, &command)?];
    for verb in command.get_subcommands().filter(|c| c.get_name() != "help") {
        pages.push(write(&args.directory, verb)?);
    }
    context.print(&json!({ "pages": pages }), || format!("{} pages in {}\n", pages.len(), args.directory.display()))
}

fn write(directory: &Path, command: &clap::Command) -> Result<PathBuf> {
    let path = directory.join(format!("{}.1", command.get_display_name().unwrap_or(command.get_name())));
    let mut page = Vec::new();
    Man::new(command.clone()).render(&mut page).map_err(|e| Error::fault(path.display(), e))?;
    files::write_atomic(&path, &page)?;
    Ok(path)
}
