//! `predict --jsonl`: a line in, a line out, for as long as lines come.

use std::io::{BufRead, Write as _};
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use super::value;
use crate::cli::Context;
use crate::error::{Error, Result};
use crate::files;
use crate::pool::{Defaults, Pool, Request, parse};

/// The longest line.
const MAX_LINE: u64 = 16 << 20;

/// Lines that are answered together where so many are there already.
const BATCH: usize = 32;

/// A line's number and its request, or what is wrong with it.
type Line = (usize, Result<Request>);

/// Answers each line at once: lines that have come meanwhile go through the towers together, and none waits for the next. What is
/// wrong with a line is its answer, so that whoever writes the lines lives with it.
pub(super) fn run(mut pool: Pool, defaults: &Defaults, file: &Path, context: &Context) -> Result<()> {
    let lines = listen(file)?;
    let (mut count, mut bad) = (0, 0);
    while let Ok(first) = lines.recv() {
        let mut batch = vec![first];
        batch.extend(lines.try_iter().take(BATCH - 1));
        count += batch.len();
        let (text, wrong) = answer(&mut pool, defaults, batch)?;
        bad += wrong;
        let mut out = std::io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Ok(()) => {}
            // Whoever asked has gone.
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            Err(e) => return Err(Error::write("stdout", e)),
        }
    }
    if bad > 0 {
        context.say(&format!("note: {bad} of {count} lines could not be answered; their answers are errors"));
    }
    Ok(())
}

/// Lines in the order of `batch`, and how many of them are errors.
fn answer(pool: &mut Pool, defaults: &Defaults, batch: Vec<Line>) -> Result<(String, usize)> {
    let requests: Vec<Request> = batch.iter().filter_map(|(_, line)| line.as_ref().ok().cloned()).collect();
    let mut answers = requests.iter().zip(pool.answers(&requests, defaults));
    let (mut text, mut bad) = (String::new(), 0);
    for (number, line) in batch {
        let value = match line {
            Err(e) => {
                bad += 1;
                value(&Request { line: number, ..Request::default() }, &Err(e))?
            }
            Ok(_) => {
                let Some((request, answer)) = answers.next() else { continue };
                bad += usize::from(answer.is_err());
                value(request, &answer)?
            }
        };
        text += &value.to_string();
        text.push('\n');
    }
    Ok((text, bad))
}

/// Reads lines on a thread of its own, a few ahead.
fn listen(file: &Path) -> Result<Receiver<Line>> {
    let (sender, lines) = sync_channel(2 * BATCH);
    let place = file.display().to_string();
    let opened = if file == Path::new("-") { None } else { Some(files::open_text(file)?) };
    let read = move || match opened {
        Some(file) => send(files::Lines::new(place.clone(), file, MAX_LINE), &place, &sender),
        None => send(files::Lines::new("stdin", std::io::stdin().lock(), MAX_LINE), "stdin", &sender),
    };
    std::thread::Builder::new().spawn(read).map_err(|e| Error::fault("--jsonl", e))?;
    Ok(lines)
}

fn send<R: BufRead>(mut lines: files::Lines<R>, place: &str, sender: &SyncSender<Line>) {
    let mut last = 0;
    loop {
        let line = match lines.next_line() {
            Ok(None) => return,
            Ok(Some((number, line))) => {
                last = number;
                if line.trim().is_empty() {
                    continue;
                }
                (number, parse(&format!("{place} line {number}"), number, line))
            }
            Err(e) => {
                last += 1;
                (last, Err(e))
            }
        };
        // A stream that cannot be read has no next line.
        let over = matches!(&line.1, Err(e) if lines.is_broken() || e.exit_code() != 2);
        if sender.send(line).is_err() || over {
            return;
        }
    }
}
