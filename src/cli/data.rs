//! `peft data`.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;

use super::{Context, columns, size};
use crate::clip::preprocess::Background;
use crate::error::Result;
use crate::files;
use crate::sheet;
use crate::survey::{Copy, Counts, Subject, Survey, survey};

pub(super) const EXAMPLES: &str = "\
Examples:
  peft data data/pets --sheet pets.png
  peft data pets.yaml                                as this recipe reads it, shots included
  peft data captions.jsonl --model path/to/clip      counts tokens with that model's tokeniser
  peft data builtin:emoji --json";

/// Arguments of `peft data`.
#[derive(Debug, Args)]
pub(super) struct DataArgs {
    /// A directory, a table, Parquet files or tars (a glob or a range too), a COCO or VQA file, hub:OWNER/DATASET, builtin:NAME, a recipe or a run
    #[arg(value_name = "PATH")]
    source: String,
    /// Draw a contact sheet: a PNG with up to ten images of each class
    #[arg(long, value_name = "FILE")]
    sheet: Option<PathBuf>,
    /// Whose tokeniser and context captions are measured with; the recipe's, or builtin:tiny, when left out
    #[arg(long, value_name = "BASE")]
    model: Option<String>,
}

/// Entries of a list that are shown to people; --json has all.
const SHOWN: usize = 5;

pub(super) fn run(args: &DataArgs, context: &Context) -> Result<()> {
    let subject = Subject::open(&args.source, args.model.as_deref())?;
    let mut progress = context.progress();
    let (found, data) = survey(&subject, &mut progress)?;
    drop(progress);
    if let Some(file) = &args.sheet {
        files::refuse_input("--sheet", file)?;
        let rows = sheet::draw(&data, &subject.images, file)?;
        let part = if rows < data.classes.len() { format!(", the first {rows} of {} classes", data.classes.len()) } else { String::new() };
        context.say(&format!("contact sheet in {}{part}", file.display()));
    }
    context.print(&found, || text(&found))
}

fn text(found: &Survey) -> String {
    let mut out = String::new();
    let row = |name: &str, c: &Counts| vec![name.to_string(), c.train.to_string(), c.val.to_string(), c.test.to_string()];
    let mut lines = vec![["", "train", "val", "test"].map(String::from).to_vec()];
    lines.extend(found.classes.iter().map(|c| row(&c.name, &c.counts)));
    lines.push(row("all", &found.splits));
    out += &columns(&lines, &[1, 2, 3]);
    let _ = writeln!(out, "\n{} classes, {} of images", found.classes.len(), size(found.bytes));
    let total = |c: &Counts| c.train + c.val + c.test;
    if total(&found.images) < total(&found.splits) && total(&found.images) > 0 {
        let Counts { train, val, test } = found.images;
        let _ = writeln!(out, "images    {} in {} rows: {train} train, {val} val, {test} test", total(&found.images), total(&found.splits));
    }
    for (name, side) in [("width", found.width), ("height", found.height)] {
        if let Some(s) = side {
            let _ = writeln!(out, "{name:<10}{} to {} pixels, median {}", s.min, s.max, s.median);
        }
    }
    if found.transparent > 0 {
        let (count, all) = (found.transparent, total(&found.images));
        let _ = writeln!(out, "{count} of {all} images have transparent parts; {}", becomes(found.background));
    }
    if let Some(c) = &found.captions {
        let t = c.tokens;
        let _ = writeln!(
            out,
            "captions  {}: {} to {} tokens, median {}, of the {} that {} takes",
            c.count, t.min, t.max, t.median, c.context, c.tokenizer
        );
        if c.too_long > 0 {
            let _ = writeln!(
                out,
                "          {} are longer than the context of {} and will be cut; the longest: {}",
                c.too_long, c.context, c.longest
            );
        }
        if c.without > 0 {
            let _ = writeln!(out, "          {} examples have none", c.without);
        }
    }
    let d = &found.duplicates;
    groups(&mut out, "images are in two splits or more: what is tested has been trained on", &d.across_splits);
    groups(&mut out, "images have more than one class", &d.contradicting);
    if d.within_splits > 0 {
        let _ = writeln!(out, "{} images repeat another one of their split", d.within_splits);
    }
    if d.across_splits.is_empty() && d.contradicting.is_empty() && d.within_splits == 0 {
        out += "no duplicates\n";
    }
    if !found.unreadable.is_empty() {
        let _ = writeln!(out, "{} images cannot be read (`skip_bad: true` leaves them out)", found.unreadable.len());
        shown(&mut out, found.unreadable.iter().map(|u| u.reason.clone()), found.unreadable.len());
    }
    found.notes.iter().for_each(|note| out += &format!("note: {note}\n"));
    out
}

/// What a model sees where an image is transparent.
fn becomes(background: Background) -> &'static str {
    match background {
        Background::Keep => "the colours hidden there are read; `images: { background: white }` in a recipe reads white in their place",
        Background::White => "they are read as white",
    }
}

fn groups(out: &mut String, what: &str, groups: &[Vec<Copy>]) {
    if groups.is_empty() {
        return;
    }
    let _ = writeln!(out, "{} {what}", groups.len());
    let copy = |c: &Copy| format!("{} ({}{})", c.id, c.split, c.class.as_ref().map(|c| format!(", {c}")).unwrap_or_default());
    shown(out, groups.iter().map(|g| g.iter().map(copy).collect::<Vec<_>>().join(" = ")), groups.len());
}

fn shown(out: &mut String, lines: impl Iterator<Item = String>, count: usize) {
    lines.take(SHOWN).for_each(|line| *out += &format!("  {line}\n"));
    if count > SHOWN {
        let _ = writeln!(out, "  and {} more; --json lists all", count - SHOWN);
    }
}
