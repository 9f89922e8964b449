//! `peft train`.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::progress::{duration, summary};
use super::{Context, next};
use crate::error::Result;
use crate::figures::{interval, metric, words};
use crate::recipe::Recipe;
use crate::report::{Evaluation, TrainReport};
use crate::run::Existing;
use crate::session;

pub(super) const EXAMPLES: &str = "\
Examples:
  peft train recipes/quickstart.yaml
  peft train pets.yaml --check                       opens everything, trains nothing
  peft train pets.yaml --set train.lr=5e-4 --output runs/pets-lr5e-4
  peft train pets.yaml --resume                      goes on after Ctrl-C or a crash";

/// Arguments of `peft train`.
#[derive(Debug, Args)]
pub(super) struct TrainArgs {
    /// A recipe file
    recipe: PathBuf,
    /// Change a value of the recipe, such as train.lr=1e-3; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// The run directory, in place of the recipe's
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Go on where an earlier run stopped
    #[arg(long, conflicts_with = "force")]
    resume: bool,
    /// Replace an earlier run
    #[arg(long)]
    force: bool,
    /// Check model, data, classes and targets, estimate memory, print the resolved recipe; train nothing
    #[arg(long)]
    check: bool,
    /// Stop as after SIGTERM when stdin ends: so a process that started this one takes it along, however it ends
    #[arg(long, hide = true)]
    stop_with_stdin: bool,
}

pub(super) fn run(args: TrainArgs, context: &Context) -> Result<()> {
    let file = args.recipe.clone();
    let mut recipe = Recipe::load(&args.recipe, &args.sets)?;
    if let Some(output) = args.output {
        recipe.output = Some(output);
    }
    let existing = match (args.resume, args.force) {
        (true, _) => Existing::Resume,
        (_, true) => Existing::Replace,
        _ => Existing::Refuse,
    };
    let mut progress = context.progress();
    if args.check {
        let checked = session::check(recipe, &context.device, &mut progress)?;
        drop(progress);
        let yaml = checked.recipe.to_yaml()?;
        return context.print(&checked, || check_text(&checked, &yaml));
    }
    if existing == Existing::Resume {
        next::refuse_longer(&recipe, &file)?;
    }
    let asked = recipe.clone();
    progress.listen();
    if args.stop_with_stdin {
        progress.listen_to_stdin();
    }
    let (report, finished_before) = session::train(recipe, existing, &context.device, &mut progress)?;
    if finished_before {
        progress.say("this run was finished before; nothing was changed");
    }
    context.print(&document(&report), || match context.global.quiet {
        true => measured(&report),
        false => text(&report) + &next::lines(&asked, &report),
    })
}

fn check_text(checked: &session::Checked, yaml: &str) -> String {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let [train, val, test] = checked.examples;
    let streamed = if checked.streamed { " (streamed)" } else { "" };
    let m = &checked.memory;
    format!(
        "{yaml}\n# {train} training{streamed}, {val} validation and {test} test examples; {} classes; {} texts encoded a step\n\
         # {} of {} parameters are trained, {} steps\n\
         # about {:.0} MiB: {:.0} for the base, {:.0} for what is trained, {:.0} for activations, {:.0} for images and the program\n{}{}",
        checked.classes.len(),
        checked.texts_per_step,
        checked.trainable_parameters,
        checked.total_parameters,
        checked.steps,
        mib(m.total()),
        mib(m.base),
        mib(m.trained),
        mib(m.activations),
        mib(m.other),
        short(checked),
        checked.micro.map(|m| format!("# train.auto_batch: {m}\n")).unwrap_or_default(),
    )
}

/// What is to be said where memory may not suffice.
fn short(checked: &session::Checked) -> String {
    let Some(there) = &checked.available else { return String::new() };
    let mib = there.bytes >> 20;
    let way = "lower train.batch, or use `train.auto_batch: true` or `train.checkpointing: true`";
    match checked.verdict {
        session::Verdict::TooLarge => format!("# warning: {mib} MiB are left ({}), which is too little: {way}\n", there.bound),
        session::Verdict::Tight => format!("# warning: {mib} MiB are left ({}), which may be too little: {way}\n", there.bound),
        _ => format!("# {mib} MiB are left ({})\n", there.bound),
    }
}

fn document(report: &TrainReport) -> Value {
    let numbers = |e: &Option<Evaluation>| {
        e.as_ref().map(|e| {
            let mut all = serde_json::Map::from_iter(e.metrics.iter().map(|(k, v)| (k.clone(), json!(v))));
            all.insert("loss".into(), json!(e.loss));
            all.insert("examples".into(), json!(e.examples));
            Value::Object(all)
        })
    };
    json!({
        "before": numbers(&report.before),
        "after": numbers(&report.after),
        "split": report.split,
        "trainable_parameters": report.trainable_parameters,
        "total_parameters": report.total_parameters,
        "adapter_bytes": report.adapter_bytes,
        "seconds": report.seconds,
        "peak_rss_mib": report.peak_rss_mib,
        "steps": report.steps,
        "epochs": report.epochs.len(),
        "best_epoch": report.best_epoch,
        "stopped_early": report.stopped_early,
        "accuracy_interval": report.after.as_ref().and_then(Evaluation::accuracy_interval).map(|(found, _)| found),
        "numbers": report.numbers,
        "micro": report.micro,
        "run": report.run,
    })
}

fn text(report: &TrainReport) -> String {
    let mut out = String::new();
    if let Some(table) = report.after.as_ref().and_then(|a| a.classification.as_ref()) {
        let _ = writeln!(out, "{}", table.text());
    }
    out += &measured(report);
    let _ = writeln!(out, "epochs    {}", epochs(report));
    let share = 100.0 * report.trainable_parameters as f64 / report.total_parameters.max(1) as f64;
    let _ = writeln!(out, "trained   {} of {} parameters ({share:.2} %)", report.trainable_parameters, report.total_parameters);
    let _ = writeln!(out, "adapter   {} bytes in {}", report.adapter_bytes, report.run.join("adapter").display());
    let memory = report.peak_rss_mib.map(|m| format!(", {m:.0} MiB at most")).unwrap_or_default();
    let _ = writeln!(out, "report    {}", report.run.join("report.html").display());
    let _ = writeln!(out, "time      {}{memory}", duration(report.seconds));
    out
}

/// The figures before and after, and on how many examples of which split they were measured.
fn measured(report: &TrainReport) -> String {
    let mut out = String::new();
    for (name, evaluation) in [("before", &report.before), ("after", &report.after)] {
        if let Some(e) = evaluation {
            let _ = writeln!(out, "{name:<10}{}", summary(e));
        }
    }
    let Some(after) = &report.after else { return out };
    let split = match report.split.as_str() {
        "val" => "validation",
        split => split,
    };
    let _ = write!(out, "measured  on {} examples of the {split} split", after.examples);
    if let Some(((found, count), accuracy)) = after.accuracy_interval().zip(after.metric("accuracy")) {
        let of = if count == after.examples { String::new() } else { format!(" of {count}") };
        let _ = write!(out, "; accuracy{of} {}, {} (Wilson)", metric("accuracy", accuracy), interval(found));
    }
    out.push('\n');
    out
}

/// `stopped early at epoch 23, best 15 kept`.
fn epochs(report: &TrainReport) -> String {
    let done = report.epochs.len();
    let ended = if report.stopped_early { format!("stopped early at epoch {done}") } else { done.to_string() };
    match report.best_epoch {
        Some(best) => format!("{ended}, best {best} kept (by {})", words(&report.metric)),
        None => ended,
    }
}
