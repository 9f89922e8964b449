//! `peft predict`.

use std::fmt::Write as _;
use std::io::BufRead as _;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::{Context, ModelArgs};
use crate::embed::read_lines;
use crate::error::{Error, Result};
use crate::files;
use crate::pool::{self, Defaults, Pool};

pub(super) const EXAMPLES: &str = "\
Examples:
  peft predict --model builtin:tiny --adapter runs/quickstart/adapter photo.png
  peft predict --model path/to/clip --labels cat,dog --template \"a photo of a {}.\" 'photos/*.jpg'
  peft predict --model path/to/clip --jsonl requests.jsonl > answers.jsonl
  find photos -name '*.png' | peft predict --model path/to/clip --labels labels.txt --json -";

/// Arguments of `peft predict`.
#[derive(Debug, Args)]
pub(super) struct PredictArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Labels: a,b,c or a file with one a line; the adapter's classes when left out
    #[arg(long, value_name = "A,B|FILE")]
    labels: Option<String>,
    /// A prompt around the label, such as "a photo of a {}."; may be repeated
    #[arg(long = "template", value_name = "TEXT")]
    templates: Vec<String>,
    /// Labels to show for each image
    #[arg(long, short = 'k', default_value_t = 5, value_name = "K")]
    top: usize,
    /// Requests, one JSON object a line: image, and perhaps adapter and labels, so that each line may have another adapter on
    /// the one base; `-` reads stdin. Answers are JSON lines in the same order
    #[arg(long, value_name = "FILE", conflicts_with = "images")]
    jsonl: Option<PathBuf>,
    /// Image files or glob patterns; `-` reads a list from stdin
    #[arg(required_unless_present = "jsonl", value_name = "IMAGE")]
    images: Vec<String>,
}

pub(super) fn run(args: &PredictArgs, context: &Context) -> Result<()> {
    if let Some(file) = &args.jsonl {
        return answer(args, file, context);
    }
    let images = expand(&args.images)?;
    let labels = args.labels.as_deref().map(labels).transpose()?.unwrap_or_default();
    let model = args.model.open(context)?;
    let ranked = model.predict_with(&images, &labels, &args.templates)?;
    let document: Vec<_> = images
        .iter()
        .zip(&ranked)
        .map(|(image, ranked)| json!({ "image": image.display().to_string(), "predictions": &ranked[..ranked.len().min(args.top)] }))
        .collect();
    context.print(&document, || {
        let mut out = String::new();
        for (image, ranked) in images.iter().zip(&ranked) {
            let _ = writeln!(out, "{}", image.display());
            for r in ranked.iter().take(args.top) {
                let _ = writeln!(out, "  {:>6.2} %  {}", 100.0 * r.probability, r.label);
            }
        }
        out
    })
}

/// A line for each request.
fn answer(args: &PredictArgs, file: &Path, context: &Context) -> Result<()> {
    let text = match file == Path::new("-") {
        true => std::io::read_to_string(std::io::stdin().lock()).map_err(|e| Error::input("stdin", e))?,
        false => files::read_text(file, MAX_REQUESTS)?,
    };
    let requests = pool::requests(&file.display().to_string(), &text)?;
    let labels = args.labels.as_deref().map(labels).transpose()?.unwrap_or_default();
    let mut pool = Pool::new(args.model.open(context)?).allow_base_mismatch(args.model.allow_base_mismatch);
    let answers = pool.answer(&requests, &Defaults { labels, templates: args.templates.clone(), top: Some(args.top) })?;
    let lines = answers.iter().map(|a| serde_json::to_string(a).map(|line| line + "\n")).collect::<std::result::Result<String, _>>();
    let lines = lines.map_err(|e| Error::fault("--jsonl", e))?;
    context.write(&lines)
}

/// The largest file of requests.
const MAX_REQUESTS: u64 = 1 << 30;

/// A value that is an existing file is read, anything else is split at commas.
pub(super) fn labels(value: &str) -> Result<Vec<String>> {
    let path = PathBuf::from(value);
    if path.is_file() {
        return read_lines(&path);
    }
    Ok(value.split(',').map(|l| l.trim().to_string()).collect())
}

/// Paths, globs and `-` to paths, in order.
fn expand(arguments: &[String]) -> Result<Vec<PathBuf>> {
    let mut images = Vec::new();
    for argument in arguments {
        let path = PathBuf::from(argument);
        if argument == "-" {
            for line in std::io::stdin().lock().lines() {
                let line = line.map_err(|e| Error::input("stdin", e))?;
                images.extend(Some(line.trim()).filter(|l| !l.is_empty()).map(PathBuf::from));
            }
        } else if path.exists() || !argument.contains(['*', '?', '[']) {
            images.push(path);
        } else {
            let found = glob::glob(argument).map_err(|e| Error::input(argument, e))?;
            let before = images.len();
            for path in found {
                images.push(path.map_err(|e| Error::input(argument, e))?);
            }
            if images.len() == before {
                return Err(Error::input(argument, "matches no file"));
            }
        }
    }
    if images.is_empty() {
        return Err(Error::input("stdin", "holds no paths"));
    }
    Ok(images)
}
