//! The command line: arguments, rendering and exit codes; no logic of its own.

use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use candle_core::Device;
use clap::{Args, Parser, Subcommand};

use crate::clip::base::Base;
use crate::clip::preprocess::Background;
use crate::clip::source::Source;
use crate::clip::spec::Spec;
use crate::delta::{locate_with, named_base};
use crate::error::{Error, Result};
use crate::fetch::fetched;
use crate::model::{Model, PixelChoice};
use crate::sign::{PublicKey, public_key};

mod bench;
mod combine;
mod compare;
mod completions;
mod convert;
mod data;
mod doctor;
mod embed;
mod eval;
mod extract;
mod inspect;
mod jobs;
mod man;
mod merge;
mod new;
mod next;
mod predict;
mod progress;
mod recipes;
mod runs;
mod sign;
#[cfg(test)]
mod tests;
mod train;

use progress::Progress;

/// Parameter-efficient fine-tuning of CLIP from YAML recipes.
#[derive(Debug, Parser)]
#[command(name = "peft", version, about, max_term_width = 100, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

const EXAMPLES: &str = "\
Examples:
  peft train recipes/quickstart.yaml     adapts an embedded CLIP to embedded images
  peft new --data data/pets              writes a recipe for your own
  peft help train                        says more about a verb

Exit codes: 0 done, 1 a check failed, 2 bad input, 3 a fault of the machine, 130 and 143 after a signal.";

/// So that a verb's own options stand together.
const GLOBAL: &str = "Options of every verb";

/// What every verb takes.
#[derive(Debug, Clone, Args)]
struct Global {
    /// Print one JSON document on stdout; text and progress go to stderr
    #[arg(long, global = true, help_heading = GLOBAL)]
    json: bool,
    /// Where to compute: auto, cpu, cuda, cuda:N or metal
    #[arg(long, global = true, default_value = "auto", value_name = "DEVICE", help_heading = GLOBAL)]
    device: String,
    /// Threads of all pools; all cores when left out
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = GLOBAL)]
    threads: Option<u16>,
    /// Read only adapters that this key has signed: a .pub file of minisign's or its line; may be repeated
    #[arg(long = "trusted-key", global = true, value_name = "KEY", help_heading = GLOBAL)]
    trusted_keys: Vec<String>,
    /// Print no progress, notes, tables or advice: only results and errors
    #[arg(long, short, global = true, help_heading = GLOBAL)]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Train what a recipe describes
    #[command(after_help = train::EXAMPLES)]
    Train(train::TrainArgs),
    /// Evaluate a base, an adapter or a run on a labelled split
    #[command(after_help = eval::EXAMPLES)]
    Eval(eval::EvalArgs),
    /// Rank labels for images
    #[command(after_help = predict::EXAMPLES)]
    Predict(predict::PredictArgs),
    /// Write features of images and texts
    #[command(after_help = embed::EXAMPLES)]
    Embed(embed::EmbedArgs),
    /// Write a checkpoint of another layout as transformers or HF PEFT would have saved it
    #[command(after_help = convert::EXAMPLES)]
    Convert(convert::ConvertArgs),
    /// Fold adapters into the base
    #[command(after_help = merge::EXAMPLES)]
    Merge(merge::MergeArgs),
    /// Make a LoRA of a fully fine-tuned checkpoint
    #[command(after_help = extract::EXAMPLES)]
    Extract(extract::ExtractArgs),
    /// Run methods side by side under one protocol, and say what each reaches, costs and forgets
    #[command(after_help = compare::EXAMPLES)]
    Compare(compare::CompareArgs),
    /// Describe a base, an adapter, a run or a recipe
    #[command(after_help = inspect::EXAMPLES)]
    Inspect(inspect::InspectArgs),
    /// Sign an adapter, or make a key pair
    #[command(after_help = sign::EXAMPLES)]
    Sign(sign::SignArgs),
    /// Show what data holds: counts, sizes, captions, duplicates, unreadable files
    #[command(after_help = data::EXAMPLES)]
    Data(data::DataArgs),
    /// Write a commented recipe for your data
    #[command(after_help = new::EXAMPLES)]
    New(new::NewArgs),
    /// List runs with their key figures, or show where two recipes differ
    #[command(after_help = runs::EXAMPLES)]
    Runs(runs::RunsArgs),
    /// Time training steps
    #[command(after_help = bench::EXAMPLES)]
    Bench(bench::BenchArgs),
    /// List the embedded recipes, or print one
    #[command(after_help = recipes::EXAMPLES)]
    Recipes(recipes::RecipesArgs),
    /// Say what this machine has, and what would be used
    #[command(after_help = doctor::EXAMPLES)]
    Doctor(doctor::DoctorArgs),
    /// Print a shell's completions
    #[command(after_help = completions::EXAMPLES)]
    Completions(completions::CompletionsArgs),
    /// Write man pages
    #[command(after_help = man::EXAMPLES)]
    Man(man::ManArgs),
}

/// What names a base.
#[derive(Debug, Args)]
struct BaseArgs {
    /// The base: builtin:tiny, a directory, a checkpoint of OpenAI or open_clip, or a hub id owner/name[@revision]; the one that
    /// the adapter names when left out
    #[arg(long, value_name = "BASE")]
    model: Option<String>,
    #[command(flatten)]
    options: BaseOptions,
}

/// What a base's files may leave open.
#[derive(Debug, Args)]
struct BaseOptions {
    /// open_clip's name of the architecture, for checkpoints that do not say it (ViT-B-32, ViT-L-14-quickgelu)
    #[arg(long, value_name = "NAME")]
    arch: Option<String>,
    /// Another input size in pixels; positional embeddings are interpolated
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=8192))]
    image_size: Option<u16>,
}

impl BaseOptions {
    /// The name with these options.
    fn spec(&self, name: &str) -> Result<String> {
        Spec::with(name, self.arch.as_deref(), self.image_size.map(usize::from))
    }
}

impl BaseArgs {
    /// The base's name with its options; what has to be fetched is fetched, with a bar.
    fn fetched(&self, adapters: &[PathBuf], context: &Context) -> Result<String> {
        let spec = self.spec(adapters, context)?;
        context.source(&spec)?;
        Ok(spec)
    }

    /// The base's name with its options; the first adapter that names a base says it where --model does not.
    fn spec(&self, adapters: &[PathBuf], context: &Context) -> Result<String> {
        if let Some(model) = &self.model {
            return self.options.spec(model);
        }
        let lacks = |e: Error| e.hint("pass --model with the base that the adapter was trained on");
        for adapter in adapters {
            // Whose signature is wanted has to be checked before anything that it says is followed.
            let adapter = context.adapter(adapter)?;
            crate::sign::check_trust(&adapter)?;
            if let Some(name) = named_base(&adapter).map_err(lacks)? {
                context.say(&format!("note: --model is left out: the base is {name}, as {} names it", adapter.display()));
                return self.options.spec(&name);
            }
        }
        // What is no adapter cannot name a base; that is the fault to tell of.
        adapters.iter().try_for_each(|adapter| crate::delta::Delta::read(&context.adapter(adapter)?).map(drop))?;
        Err(lacks(match adapters {
            [] => Error::input("--model", "expected a base, found none, and no --adapter that could name it"),
            _ => Error::input("--model", "expected a base, found none, and the adapter names none either"),
        }))
    }
}

/// What verbs that use a model take.
#[derive(Debug, Args)]
struct ModelArgs {
    #[command(flatten)]
    base: BaseArgs,
    /// An adapter: a directory, a run (its adapter), a .pt of CLIP-LoRA, or a hub id; may be repeated
    #[arg(long = "adapter", value_name = "ADAPTER")]
    adapters: Vec<PathBuf>,
    /// Accept an adapter that was made for another base
    #[arg(long)]
    allow_base_mismatch: bool,
    /// Transparent images: keep drops the alpha channel, white composites; as the adapter was trained, or keep, when left out
    #[arg(long, value_parser = ["keep", "white"])]
    background: Option<String>,
    /// Leave EXIF orientation unapplied, whatever the adapter was trained with
    #[arg(long)]
    no_orient: bool,
    /// Apply EXIF orientation, whatever the adapter was trained with
    #[arg(long, conflicts_with = "no_orient")]
    orient: bool,
}

impl ModelArgs {
    fn open(&self, context: &Context) -> Result<Model> {
        let spec = self.base.spec(&self.adapters, context)?;
        let base = Base::from_source(context.source(&spec)?, candle_core::DType::F32, &context.device)?;
        let mut model = Model::from_base(base).with_pixels(self.pixels()).with_bundled(&spec)?;
        for adapter in &self.adapters {
            model = model.with_adapter_of(&context.adapter(adapter)?, self.allow_base_mismatch)?;
        }
        model.notes().iter().for_each(|note| context.say(&format!("note: {note}")));
        Ok(model)
    }

    /// What the flags say of images.
    fn pixels(&self) -> PixelChoice {
        let background = self.background.as_deref().map(|b| if b == "white" { Background::White } else { Background::Keep });
        let orient = match (self.orient, self.no_orient) {
            (false, false) => None,
            (orient, _) => Some(orient),
        };
        PixelChoice { background, orient }
    }
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

    /// A base's files, fetched with a bar where they have to be.
    fn source(&self, spec: &str) -> Result<Source> {
        let mut progress = self.progress();
        let source = fetched(&mut progress, |p| Source::resolve_with(spec, p));
        progress.clear();
        source
    }

    /// The keys of --trusted-key.
    fn trusted(&self) -> Result<Vec<PublicKey>> {
        self.global.trusted_keys.iter().map(|key| public_key(key)).collect()
    }

    /// An adapter's files, fetched with a bar where they have to be.
    fn adapter(&self, name: &Path) -> Result<PathBuf> {
        let mut progress = self.progress();
        let path = fetched(&mut progress, |p| locate_with(name, p));
        progress.clear();
        path
    }

    /// A line for people, on stderr.
    fn say(&self, text: &str) {
        if !self.global.quiet {
            let _ = writeln!(std::io::stderr(), "{}", plain(text));
        }
    }

    /// Writes the result: JSON where it was asked for, text otherwise.
    fn print(&self, json: &impl serde::Serialize, text: impl FnOnce() -> String) -> Result<()> {
        let out = if self.global.json {
            let mut out = serde_json::to_string_pretty(json).map_err(|e| Error::fault("--json", e))?;
            out.push('\n');
            out
        } else {
            plain(&text())
        };
        self.write(&out)
    }

    /// Writes to stdout as it is.
    fn write(&self, out: &str) -> Result<()> {
        match std::io::stdout().lock().write_all(out.as_bytes()) {
            // The reader of a pipe may have seen enough.
            Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::write("stdout", e)),
            _ => Ok(()),
        }
    }
}

/// The way out of images that cannot be read.
fn skipping(error: Error) -> Error {
    match &error {
        Error::Input(problem) if problem.place == "images" => error.hint("repair or remove them, or pass --skip-bad to leave them out"),
        _ => error,
    }
}

/// What names from files say to people: a terminal would obey their control characters.
fn plain(text: &str) -> String {
    let one = |c: char| if c.is_control() && c != '\n' { c.escape_default().collect::<String>() } else { c.to_string() };
    if text.chars().any(|c| c.is_control() && c != '\n') { text.chars().map(one).collect() } else { text.to_string() }
}

/// Rows as lines, each column as wide as its widest cell; the first row is the head. Cells of `right` columns end together.
fn columns(rows: &[Vec<String>], right: &[usize]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let wide = |s: &String| s.chars().count();
    let widths: Vec<usize> = (0..count).map(|c| rows.iter().filter_map(|r| r.get(c)).map(wide).max().unwrap_or(0)).collect();
    // Not by `{:>width$}`, whose widths end at 65535.
    let cell = |(c, text): (usize, &String)| {
        let room = " ".repeat(widths[c] - wide(text));
        if right.contains(&c) { room + text } else { text.clone() + &room }
    };
    let line = |row: &Vec<String>| row.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ").trim_end().to_string() + "\n";
    rows.iter().map(line).collect()
}

/// Bytes for people: `331 kB`, `1.7 GB`.
fn size(bytes: u64) -> String {
    let steps = [(1_000_000_000, "GB"), (1_000_000, "MB"), (1_000, "kB")];
    match steps.iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, name)) => {
            let value = bytes as f64 / *unit as f64;
            format!("{value:.*} {name}", usize::from(value < 10.0))
        }
        None => format!("{bytes} B"),
    }
}

/// Parses the arguments, runs the verb and turns its result into an exit code.
#[must_use]
pub fn main() -> ExitCode {
    ExitCode::from(start(std::env::args_os()))
}

/// [`main`] with its arguments, the program's name first.
pub(crate) fn start(args: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> u8 {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print();
            return if e.use_stderr() { 2 } else { 0 };
        }
    };
    match run(cli) {
        Ok(()) => 0,
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "error: {}", plain(&e.to_string()));
            u8::try_from(e.exit_code()).unwrap_or(3)
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    let threads = cli.global.threads.map(usize::from);
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads.unwrap_or_else(|| crate::memory::threads(std::thread::available_parallelism().map_or(1, Into::into))))
        .build_global()
        .map_err(|e| Error::fault("--threads", e).hint("use fewer --threads, or raise the limits (ulimit -u, ulimit -v)"))?;
    let device = crate::device::select(&cli.global.device)?;
    let context = Context { global: cli.global, device };
    crate::sign::require(context.trusted()?);
    match cli.verb {
        Verb::Train(args) => train::run(args, &context),
        Verb::Eval(args) => eval::run(args, &context),
        Verb::Predict(args) => predict::run(&args, &context),
        Verb::Embed(args) => embed::run(args, &context),
        Verb::Convert(args) => convert::run(&args, &context),
        Verb::Merge(args) => merge::run(args, &context),
        Verb::Extract(args) => extract::run(args, &context),
        Verb::Compare(args) => compare::run(args, &context),
        Verb::Sign(args) => sign::run(&args, &context),
        Verb::Inspect(args) => inspect::run(&args, &context),
        Verb::Data(args) => data::run(&args, &context),
        Verb::New(args) => new::run(args, &context),
        Verb::Runs(args) => runs::run(&args, &context),
        Verb::Bench(args) => bench::run(&args, &context),
        Verb::Recipes(args) => recipes::run(&args, &context),
        Verb::Doctor(args) => doctor::run(&args, &context),
        Verb::Completions(args) => completions::run(&args, &context),
        Verb::Man(args) => man::run(&args, &context),
    }
}
