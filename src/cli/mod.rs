//! The command line: arguments, rendering and exit codes; no logic of its own.

use std::io::Write as _;
use std::process::ExitCode;

use candle_core::Device;
use clap::{Args, Parser, Subcommand};

use crate::error::{Error, Result};

mod progress;
mod train;

use progress::Progress;

/// Parameter-efficient fine-tuning of CLIP from YAML recipes.
#[derive(Debug, Parser)]
#[command(name = "peft", version, about, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

/// What every verb takes.
#[derive(Debug, Clone, Args)]
struct Global {
    /// Print one JSON document on stdout; text and progress go to stderr
    #[arg(long, global = true)]
    json: bool,
    /// Where to compute: auto, cpu, cuda, cuda:N or metal
    #[arg(long, global = true, default_value = "auto", value_name = "DEVICE")]
    device: String,
    /// Threads of all pools; all cores when left out
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Say nothing but results and errors
    #[arg(long, short, global = true)]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Train what a recipe describes
    Train(train::TrainArgs),
}

/// What a verb needs besides its own arguments.
struct Context {
    global: Global,
    device: Device,
}

impl Context {
    fn progress(&self) -> Progress {
        Progress::new(self.global.quiet)
    }

    /// Writes the result: JSON where it was asked for, text otherwise.
    fn print(&self, json: &impl serde::Serialize, text: impl FnOnce() -> String) -> Result<()> {
        let out = if self.global.json {
            let mut out = serde_json::to_string_pretty(json).map_err(|e| Error::fault("--json", e))?;
            out.push('\n');
            out
        } else {
            text()
        };
        match std::io::stdout().lock().write_all(out.as_bytes()) {
            // The reader of a pipe may have seen enough.
            Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::write("stdout", e)),
            _ => Ok(()),
        }
    }
}

/// Parses the arguments, runs the verb and turns its result into an exit code.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print();
            return ExitCode::from(if e.use_stderr() { 2 } else { 0 });
        }
    };
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "error: {e}");
            ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(3))
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    let threads = cli.global.threads.map(usize::from);
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads.or_else(|| std::thread::available_parallelism().ok().map(Into::into)).unwrap_or(1))
        .build_global()
        .map_err(|e| Error::fault("--threads", e))?;
    let device = crate::device::select(&cli.global.device)?;
    let context = Context { global: cli.global, device };
    match cli.verb {
        Verb::Train(args) => train::run(args, &context),
    }
}
