//! `peft compare`.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, presets};

use super::Context;
use super::jobs::Processes;
use crate::compare::{self, CompareOptions, Limit, compare};
use crate::comparison::{Comparison, remarks};
use crate::error::{Error, Result};
use crate::recipe::Recipe;

pub(super) const EXAMPLES: &str = "\
Examples:
  peft compare recipes/quickstart.yaml --methods full,lora,prefix,bottleneck --seeds 3
  peft compare pets.yaml --methods lora,full --shots 1,4,16 --search 5     learning rates chosen on validation
  peft compare runs/a runs/b                                               finished runs";

/// Arguments of `peft compare`.
#[derive(Debug, Args)]
pub(super) struct CompareArgs {
    /// Recipe files, or finished run directories
    #[arg(required = true, value_name = "RECIPE")]
    targets: Vec<PathBuf>,
    /// Methods, such as full,lora,prefix,bottleneck; probe is a linear head; those of the recipe's compare section, or its own, when left out
    #[arg(long, value_delimiter = ',', value_name = "NAME,…")]
    methods: Vec<String>,
    /// Runs of each method, with seeds counted from the recipe's
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    seeds: u16,
    /// Training examples for each class, such as 1,4,16; the recipe's own when left out
    #[arg(long, value_delimiter = ',', value_name = "N,…")]
    shots: Vec<usize>,
    /// Try K learning rates for each method, all seeds each, and choose by validation; K × seeds runs a method
    #[arg(long, default_value_t = 0, value_name = "K", value_parser = clap::value_parser!(u16).range(0..=100))]
    search: u16,
    /// Give each run this many epochs
    #[arg(long, value_name = "N", conflicts_with_all = ["steps", "seconds"])]
    epochs: Option<usize>,
    /// Give each run this many steps
    #[arg(long, value_name = "N", conflicts_with = "seconds")]
    steps: Option<usize>,
    /// Give each run as many steps as fit into this many seconds; a step of each method is measured first
    #[arg(long, value_name = "S")]
    seconds: Option<f64>,
    /// The row that others are compared with; `full` when left out, or the first row where there is no `full`
    #[arg(long, value_name = "NAME")]
    reference: Option<String>,
    /// Runs side by side, fewer where memory does not suffice; they share the threads
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    jobs: u16,
    /// Where runs and tables go; runs/<recipe>-compare when left out
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Replace runs that have another recipe; finished ones that fit are kept
    #[arg(long)]
    force: bool,
    /// Change a value of the recipes, such as train.batch=64; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

pub(super) fn run(args: CompareArgs, context: &Context) -> Result<()> {
    let options = options(args, context)?;
    let global = &context.global;
    let runner = Processes::new(context.device.clone(), global.device.clone(), (options.threads / options.jobs).max(1));
    let mut progress = context.progress();
    progress.listen();
    let (comparison, failed) = compare(&options, &runner, &mut progress)?;
    drop(progress);
    context.print(&comparison, || text(&comparison, &options))?;
    failed.map_or(Ok(()), Err)
}

fn options(args: CompareArgs, context: &Context) -> Result<CompareOptions> {
    let (runs, files): (Vec<PathBuf>, Vec<PathBuf>) = args.targets.into_iter().partition(|t| t.is_dir());
    if let Some(dir) = runs.iter().find(|d| !d.join("recipe.yaml").exists()) {
        return Err(Error::input(dir.display(), "is no run directory: there is no recipe.yaml"));
    }
    let given = [
        ("--methods", !args.methods.is_empty()),
        ("--shots", !args.shots.is_empty()),
        ("--search", args.search > 0),
        ("--set", !args.sets.is_empty()),
    ];
    if let Some((flag, _)) = given.iter().find(|(_, g)| *g && !runs.is_empty()) {
        return Err(Error::input(flag, "finished runs are compared as they are").hint("name a recipe to run something"));
    }
    let recipes = files.iter().map(|f| Recipe::load(f, &args.sets)).collect::<Result<Vec<_>>>()?;
    let limits = [args.epochs.map(Limit::Epochs), args.steps.map(Limit::Steps), args.seconds.map(Limit::Seconds)];
    let name = match (recipes.as_slice(), runs.as_slice()) {
        ([one], _) => format!("{}-compare", one.name),
        _ => "compare".to_string(),
    };
    Ok(CompareOptions {
        recipes,
        runs,
        methods: args.methods,
        reference: args.reference,
        seeds: args.seeds.into(),
        shots: args.shots,
        search: args.search.into(),
        limit: limits.into_iter().flatten().next(),
        output: args.output.unwrap_or_else(|| PathBuf::from("runs").join(name)),
        force: args.force,
        jobs: args.jobs.into(),
        threads: context.global.threads.map_or_else(|| std::thread::available_parallelism().map_or(1, Into::into), usize::from),
        memory: free_memory(),
    })
}

/// What is free, in this process's group where it is limited; a tenth is left to others.
fn free_memory() -> Option<u64> {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let all = system.available_memory();
    let free = system.cgroup_limits().map_or(all, |group| group.free_memory.min(all));
    (free > 0).then_some(free / 10 * 9)
}

fn text(comparison: &Comparison, options: &CompareOptions) -> String {
    let mut out = String::new();
    for group in &comparison.groups {
        let mut table = Table::new();
        table
            .load_style(presets::NOTHING.header_separator(LineStyle::none().fill('─').junction('─')))
            .set_content_arrangement(ContentArrangement::Dynamic);
        table.set_header(compare::headings(group));
        table.add_rows(compare::table(group));
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let _ = writeln!(out, "{}\n{table}", group.name);
        remarks(group).iter().for_each(|r| {
            let _ = writeln!(out, "{r}");
        });
        out.push('\n');
    }
    comparison.notes.iter().for_each(|n| {
        let _ = writeln!(out, "{n}");
    });
    let _ = writeln!(out, "{}", options.output.join("compare.html").display());
    out
}
