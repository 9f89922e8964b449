//! What to type after a run.

use std::path::Path;

use crate::error::{Error, Result};
use crate::recipe::{ModelConfig, Recipe};
use crate::report::TrainReport;
use crate::run::{RunDir, differs, read_recipe, read_report};

/// Commands that use what was trained, one a line, ready to be pasted; only names of images, texts and questions are made up.
pub(super) fn lines(recipe: &Recipe, report: &TrainReport) -> String {
    let all = commands(recipe, &report.run, &report.split);
    all.iter().enumerate().map(|(i, line)| format!("{:<10}{line}\n", if i == 0 { "next" } else { "" })).collect()
}

pub(super) fn commands(recipe: &Recipe, run: &Path, split: &str) -> Vec<String> {
    let task = recipe.task.definition();
    let text = match task.name() {
        "answer" => " --question 'what is it?'",
        "retrieve" => " --labels 'a cat,a dog'",
        "match" => " --text 'a red shoe'",
        _ if recipe.fusion.is_some() || !task.reads_images() => " --text 'a red shoe'",
        _ => "",
    };
    let image = if task.reads_images() { " photo.jpg" } else { "" };
    let first = match &recipe.model {
        ModelConfig::Scratch(_) => format!("peft inspect {}", path(&run.join("model"))),
        ModelConfig::Pretrained(base) => {
            let adapter = path(&run.join("adapter"));
            format!("peft predict --model {} --adapter {adapter}{text}{image}", quoted(base))
        }
    };
    vec![first, format!("peft eval {} --split {split}", path(run))]
}

/// A finished run does not go on, since its schedule has ended: whoever asks for more is told how to get it.
///
/// # Errors
/// When the run is finished, and only its length differs from the recipe's.
pub(super) fn refuse_longer(recipe: &Recipe, file: &Path) -> Result<()> {
    let run = RunDir::place(recipe);
    if !run.join("recipe.yaml").exists() || read_report(&run)?.is_none() {
        return Ok(());
    }
    let before = read_recipe(&run)?;
    let length = |r: &Recipe| (r.train.epochs, r.train.steps);
    let mut same = recipe.clone();
    (same.train.epochs, same.train.steps) = length(&before);
    if length(recipe) == length(&before) || differs(&run, &same)?.is_some() {
        return Ok(());
    }
    let name = run.display().to_string();
    let message = format!("the run is finished after {}; the recipe now asks for {}", said(&before), said(recipe));
    let way = format!(
        "a finished run does not go on, but another may begin with its adapter (init_adapter): `{}`; --force trains all of it again",
        begin(recipe, file, &run)
    );
    Err(Error::input(name, message).hint(way))
}

/// The command that trains on from a run's adapter.
pub(super) fn begin(recipe: &Recipe, file: &Path, run: &Path) -> String {
    let sets = [recipe.train.epochs.map(|n| format!("epochs={n}")), recipe.train.steps.map(|n| format!("steps={n}"))];
    let sets: String = sets.into_iter().flatten().map(|set| format!(" --set train.{set}")).collect();
    let start = quoted(&format!("train.init_adapter={}", run.join("adapter").display()));
    let output = quoted(&format!("{}-more", run.display()));
    format!("peft train {}{sets} --set {start} --output {output}", path(file))
}

fn said(recipe: &Recipe) -> String {
    match (recipe.train.epochs, recipe.train.steps) {
        (_, Some(steps)) => format!("{steps} step{}", if steps == 1 { "" } else { "s" }),
        (Some(epochs), _) => format!("{epochs} epoch{}", if epochs == 1 { "" } else { "s" }),
        _ => "the default number of epochs".into(),
    }
}

/// A path as a shell takes it; one that looks like a flag is named from here.
fn path(path: &Path) -> String {
    let name = path.display().to_string();
    quoted(&if name.starts_with('-') { format!("./{name}") } else { name })
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-:@%+=,".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_string(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}
