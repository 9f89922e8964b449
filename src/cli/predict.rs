//! `peft predict`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::{Context, ModelArgs};
use crate::data::ClassList;
use crate::embed::read_lines;
use crate::error::{Error, Result};
use crate::files;
use crate::inputs::{Inputs, MAX_LIST, Other, SHOWN, unreadable};
use crate::pool::{Answer, Defaults, Pool, Request};
use crate::train::{Event, Observer as _};

mod table;
mod worker;

pub(super) const EXAMPLES: &str = "\
Examples:
  peft predict --model builtin:tiny --adapter runs/quickstart/adapter photo.png
  peft predict --model path/to/clip --labels cat,dog --template \"a photo of a {}.\" 'photos/*.jpg'
  peft predict --model path/to/clip --adapter runs/match/adapter --text \"a red shoe\" photo.png
  peft predict --adapter runs/pets --skip-bad --csv pets.csv photos
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
    #[arg(long, short = 'k', default_value_t = 5, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    top: u32,
    /// Requests, one JSON object a line: image, and perhaps adapter and labels, so that each line may have another adapter on
    /// the one base; `-` reads stdin. Each is answered at once, in the same order, by a JSON line with the answer or an `error`
    #[arg(long, value_name = "FILE", conflicts_with = "images")]
    jsonl: Option<PathBuf>,
    /// Write a table besides: image, label, score, and label_2, score_2… up to --top
    #[arg(long, value_name = "FILE", conflicts_with = "jsonl")]
    csv: Option<PathBuf>,
    /// Leave out images that cannot be read
    #[arg(long, conflicts_with = "jsonl")]
    skip_bad: bool,
    /// Image files, directories, glob patterns ('photos/**/*.jpg'), tables or lists of paths (csv, tsv, jsonl, txt); `-` reads a
    /// list from stdin
    #[arg(required_unless_present_any = ["jsonl", "texts"], value_name = "IMAGE")]
    images: Vec<String>,
}

pub(super) fn run(args: &PredictArgs, context: &Context) -> Result<()> {
    let labels = args.labels.as_deref().map(labels).transpose()?.unwrap_or_default();
    let defaults = Defaults { labels, templates: args.templates.clone(), top: Some(args.top as usize) };
    if let Some(file) = &args.jsonl {
        let pool = Pool::new(args.model.open(context)?).allow_base_mismatch(args.model.allow_base_mismatch);
        return worker::run(pool, &defaults, file, context);
    }
    let found = if args.images.is_empty() { Inputs::default() } else { expand(&args.images)? };
    found.notes.iter().for_each(|note| context.say(&format!("note: {note}")));
    if !found.bad.is_empty() && !args.skip_bad {
        return Err(super::skipping(unreadable(&found.bad)));
    }
    if let Some(csv) = &args.csv {
        check_csv(csv, args, &found.images)?;
    }
    let model = args.model.open(context)?;
    let requests = requests_of(args, found.images)?;
    let asked = !args.texts.is_empty() || !args.questions.is_empty();
    if !args.templates.is_empty() && model.has_own_head() {
        context.say("note: this adapter answers by a trained head, which reads no prompts: --template changes nothing");
    }
    let mut pool = Pool::new(model);
    check(&mut pool, requests.first(), &defaults, asked)?;
    let mut answers = answered(&mut pool, &requests, &defaults, args.skip_bad, context)?;
    answers.extend(found.bad.into_iter().map(|e| (Request::default(), Err(e))));
    show(&answers, args, context)
}

/// What is wrong with all requests alike is told once, before any image is read.
fn check(pool: &mut Pool, first: Option<&Request>, defaults: &Defaults, asked: bool) -> Result<()> {
    let model = pool.with(None)?;
    match (model.tells(), asked) {
        (true, _) => {
            if !defaults.labels.is_empty() {
                model.check_labels(&defaults.labels)?;
            }
            first.map_or(Ok(()), |request| model.check_query(&request.query()))
        }
        (false, true) => Err(Error::input("--text", "this adapter ranks labels, and does not judge an image with a text")
            .hint("pass --labels, or an adapter that was trained to match, answer or regress")),
        (false, false) => pool.prepare(None, &defaults.labels, &defaults.templates).map(drop),
    }
}

type Answered = (Request, Result<Answer>);

/// Answers with a bar; without `skip_bad` all images that cannot be read are one error.
fn answered(pool: &mut Pool, requests: &[Request], defaults: &Defaults, skip_bad: bool, context: &Context) -> Result<Vec<Answered>> {
    let mut progress = context.progress();
    progress.event(Event::Phase("images", Some(requests.len())));
    let (mut all, mut bad) = (Vec::new(), Vec::new());
    for part in requests.chunks(PART) {
        for (request, answer) in part.iter().zip(pool.answers(part, defaults)) {
            match answer {
                Err(e) if e.exit_code() != 2 => return Err(e),
                Err(e) if !skip_bad => bad.push(e),
                answer => all.push((request.clone(), answer)),
            }
        }
        progress.event(Event::Advance(part.len()));
        if bad.len() >= SHOWN {
            break;
        }
    }
    match (bad.len(), requests.len()) {
        (0, _) => Ok(all),
        (_, 1) => Err(bad.remove(0)),
        _ => Err(super::skipping(unreadable(&bad))),
    }
}

/// Requests that are answered before the bar moves.
const PART: usize = 128;

/// Prints answers, and writes the table where one is wanted.
fn show(answers: &[Answered], args: &PredictArgs, context: &Context) -> Result<()> {
    let good: Vec<&Answer> = answers.iter().filter_map(|(_, a)| a.as_ref().ok()).collect();
    if let Some((_, Err(first))) = answers.iter().find(|(_, a)| a.is_err()) {
        let (bad, first) = (answers.len() - good.len(), first.report());
        if good.is_empty() {
            return Err(Error::input("images", format!("none of the {bad} can be read; the first: {}: {}", first.place, first.message)));
        }
        context.say(&format!(
            "note: {bad} of {} images cannot be read and are left out; the first: {}: {}",
            answers.len(),
            first.place,
            first.message
        ));
    }
    if let Some(path) = &args.csv {
        table::write(path, &good)?;
    }
    let document: Vec<serde_json::Value> = answers.iter().map(|(request, answer)| value(request, answer)).collect::<Result<_>>()?;
    context.print(&document, || match &args.csv {
        Some(path) => format!("{} rows in {}\n", good.len(), path.display()),
        None => good.iter().map(|answer| text(answer)).collect(),
    })
}

/// An answer as JSON; of what cannot be answered the error in its place.
fn value(request: &Request, answer: &Result<Answer>) -> Result<serde_json::Value> {
    let value = match answer {
        Ok(answer) => serde_json::to_value(answer),
        Err(e) => {
            let mut map = serde_json::Map::new();
            map.extend(request.id.clone().map(|id| ("id".to_string(), id)));
            map.extend(request.image.as_ref().map(|p| ("image".to_string(), json!(p.display().to_string()))));
            map.extend((request.line > 0).then(|| ("line".to_string(), json!(request.line))));
            map.insert("error".into(), json!(e.report()));
            Ok(map.into())
        }
    };
    value.map_err(|e| Error::fault("--json", e))
}

fn text(answer: &Answer) -> String {
    let mut out = String::new();
    let image = answer.image.as_ref().map(|p| p.display().to_string());
    let text = answer.text.as_ref().or(answer.question.as_ref()).map(|t| format!("\"{t}\""));
    let _ = writeln!(out, "{}", [image, text].into_iter().flatten().collect::<Vec<_>>().join("  "));
    if answer.predictions.is_empty() {
        let _ = writeln!(out, "  {}", answer.prediction.as_deref().unwrap_or_default());
    }
    for r in &answer.predictions {
        let chosen = r.chosen.unwrap_or_else(|| answer.prediction.as_deref() == Some(&r.label));
        let mark = if chosen { "*" } else { " " };
        let _ = writeln!(out, "{mark} {:>6.2} %  {}", 100.0 * r.probability, r.label);
    }
    out
}

/// A table that would replace an image or a list, before any work is done.
fn check_csv(csv: &Path, args: &PredictArgs, images: &[PathBuf]) -> Result<()> {
    let here = csv.canonicalize().ok();
    let same = |path: &Path| here.is_some() && path.canonicalize().ok() == here;
    match csv.is_dir() || args.images.iter().any(|a| same(Path::new(a))) || here.is_some() && images.iter().any(|p| same(p)) {
        true => Err(Error::input("--csv", format!("{} is a directory, or what is read", csv.display())).hint("choose another file")),
        false => Ok(()),
    }
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

/// What the arguments stand for, in order; `-` is a list on stdin.
fn expand(arguments: &[String]) -> Result<Inputs> {
    let mut found = Inputs::default();
    for argument in arguments {
        if argument != "-" {
            found.add(argument, Other::Image)?;
            continue;
        }
        let mut lines = files::Lines::new("stdin", std::io::stdin().lock(), MAX_LIST);
        while let Some((_, line)) = lines.next_line()? {
            found.images.extend(Some(line.trim()).filter(|l| !l.is_empty()).map(PathBuf::from));
        }
    }
    if found.images.is_empty() && found.bad.is_empty() {
        return Err(Error::input("stdin", "holds no paths"));
    }
    Ok(found)
}
