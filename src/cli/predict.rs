//! `peft predict`.

use std::fmt::Write as _;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::{Context, ModelArgs};
use crate::data::ClassList;
use crate::embed::read_lines;
use crate::error::{Error, Result};
use crate::files;
use crate::model::Model;
use crate::pool::{self, Defaults, Pool, Request};

pub(super) const EXAMPLES: &str = "\
Examples:
  peft predict --model builtin:tiny --adapter runs/quickstart/adapter photo.png
  peft predict --model path/to/clip --labels cat,dog --template \"a photo of a {}.\" 'photos/*.jpg'
  peft predict --model path/to/clip --adapter runs/match/adapter --text \"a red shoe\" photo.png
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
    /// A text that may fit the images, for adapters that were trained to match or to regress; may be repeated
    #[arg(long = "text", value_name = "TEXT", conflicts_with_all = ["labels", "jsonl"])]
    texts: Vec<String>,
    /// A question about the images, for adapters that were trained to answer; may be repeated
    #[arg(long = "question", value_name = "TEXT", conflicts_with_all = ["labels", "jsonl", "texts"])]
    questions: Vec<String>,
    /// Answers to choose from: a,b,c or a file with one a line
    #[arg(long, value_name = "A,B|FILE", requires = "questions")]
    choices: Option<String>,
    /// Labels to show for each image
    #[arg(long, short = 'k', default_value_t = 5, value_name = "K")]
    top: usize,
    /// Requests, one JSON object a line: image, and perhaps adapter and labels, so that each line may have another adapter on
    /// the one base; `-` reads stdin. Answers are JSON lines in the same order
    #[arg(long, value_name = "FILE", conflicts_with = "images")]
    jsonl: Option<PathBuf>,
    /// Image files or glob patterns; `-` reads a list from stdin
    #[arg(required_unless_present_any = ["jsonl", "texts"], value_name = "IMAGE")]
    images: Vec<String>,
}

pub(super) fn run(args: &PredictArgs, context: &Context) -> Result<()> {
    if let Some(file) = &args.jsonl {
        return answer(args, file, context);
    }
    let images = if args.images.is_empty() { Vec::new() } else { expand(&args.images)? };
    if !args.texts.is_empty() || !args.questions.is_empty() {
        return judge(args, images, context);
    }
    let labels = args.labels.as_deref().map(labels).transpose()?.unwrap_or_default();
    let model = args.model.open(context)?;
    if model.tells() && labels.is_empty() {
        // What looks at images alone needs nothing else.
        return print_told(&requests_of(args, images)?, model, args, context);
    }
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

/// Every image with every text or question.
fn requests_of(args: &PredictArgs, images: Vec<PathBuf>) -> Result<Vec<Request>> {
    let choices = args.choices.as_deref().map(labels).transpose()?.unwrap_or_default();
    let texts = args.texts.iter().map(|t| Request { text: Some(t.clone()), ..Request::default() });
    let questions = args.questions.iter().map(|q| Request { question: Some(q.clone()), choices: choices.clone(), ..Request::default() });
    let mut asked: Vec<Request> = texts.chain(questions).collect();
    if asked.is_empty() {
        asked.push(Request::default());
    }
    if images.is_empty() {
        return Ok(asked);
    }
    Ok(images.iter().flat_map(|image| asked.iter().map(move |r| Request { image: Some(image.clone()), ..r.clone() })).collect())
}

fn judge(args: &PredictArgs, images: Vec<PathBuf>, context: &Context) -> Result<()> {
    print_told(&requests_of(args, images)?, args.model.open(context)?, args, context)
}

fn print_told(requests: &[Request], model: Model, args: &PredictArgs, context: &Context) -> Result<()> {
    if !model.tells() {
        return Err(Error::input("--text", "this adapter ranks labels, and does not judge an image with a text")
            .hint("pass --labels, or an adapter that was trained to match, answer or regress"));
    }
    let answers = Pool::new(model).answer(requests, &Defaults { top: Some(args.top), ..Defaults::default() })?;
    context.print(&answers, || {
        let mut out = String::new();
        for answer in &answers {
            let image = answer.image.as_ref().map(|p| p.display().to_string());
            let text = answer.text.as_ref().or(answer.question.as_ref()).map(|t| format!("\"{t}\""));
            let _ = writeln!(out, "{}", [image, text].into_iter().flatten().collect::<Vec<_>>().join("  "));
            if answer.predictions.is_empty() {
                let _ = writeln!(out, "  {}", answer.prediction.as_deref().unwrap_or_default());
            }
            for r in &answer.predictions {
                let mark = if answer.prediction.as_deref() == Some(&r.label) { "*" } else { " " };
                let _ = writeln!(out, "{mark} {:>6.2} %  {}", 100.0 * r.probability, r.label);
            }
        }
        out
    })
}

/// A line for each request.
fn answer(args: &PredictArgs, file: &Path, context: &Context) -> Result<()> {
    let text = match file == Path::new("-") {
        true => stdin()?,
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

/// All requests that are piped in.
fn stdin() -> Result<String> {
    let mut bytes = Vec::new();
    std::io::stdin().lock().take(MAX_REQUESTS + 1).read_to_end(&mut bytes).map_err(|e| Error::input("stdin", e))?;
    match bytes.len() as u64 > MAX_REQUESTS {
        true => Err(Error::input("stdin", format!("has more than {MAX_REQUESTS} bytes of requests"))),
        false => files::text("stdin", bytes),
    }
}

/// What is, or is named like, a file is read; anything else is split at commas.
pub(super) fn labels(value: &str) -> Result<Vec<String>> {
    let path = PathBuf::from(value);
    let text = path.extension().is_some_and(|e| ["txt", "csv", "tsv", "json", "jsonl", "list"].iter().any(|known| e == *known));
    if path.exists() || !value.contains(',') && (text || value.contains(std::path::MAIN_SEPARATOR)) {
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("json")) {
            return ClassList::File(path).names();
        }
        return read_lines(&path).map_err(|e| e.hint("--labels takes a file with one label a line, or a,b,c"));
    }
    Ok(value.split(',').map(|l| l.trim().to_string()).collect())
}

/// Paths, globs and `-` to paths, in order.
fn expand(arguments: &[String]) -> Result<Vec<PathBuf>> {
    let mut images = Vec::new();
    for argument in arguments {
        let path = PathBuf::from(argument);
        if argument == "-" {
            let mut lines = files::Lines::new("stdin", std::io::stdin().lock(), MAX_REQUESTS);
            while let Some((_, line)) = lines.next()? {
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
