//! One base in memory, several adapters on it, chosen per call.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::model::{Model, Query, Ranked, Told};

/// A model and others on its base, each with an adapter of its own, loaded when first asked for.
///
/// ```
/// # fn main() -> peft::Result<()> {
/// let mut pool = peft::pool::Pool::new(peft::Model::load("builtin:tiny")?);
/// let plain = pool.with(None)?;
/// # assert_eq!(plain.notes().len(), 0);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Pool {
    model: Model,
    members: HashMap<PathBuf, Model>,
    allow_base_mismatch: bool,
}

impl Pool {
    /// `model` answers where no adapter is named.
    #[must_use]
    pub fn new(model: Model) -> Self {
        Self { model, members: HashMap::new(), allow_base_mismatch: false }
    }

    /// Accepts adapters of another base.
    #[must_use]
    pub fn allow_base_mismatch(mut self, allow: bool) -> Self {
        self.allow_base_mismatch = allow;
        self
    }

    /// The base with this adapter alone, or the model itself.
    ///
    /// # Errors
    /// When the adapter cannot be read or does not fit the base.
    pub fn with(&mut self, adapter: Option<&Path>) -> Result<&Model> {
        let Some(adapter) = adapter else { return Ok(&self.model) };
        if !self.members.contains_key(adapter) {
            // What a bundle brings along belongs to its base.
            let base = self.model.base().source.to_string();
            let member = self.model.fork().with_bundled(&base)?.with_adapter_of(adapter, self.allow_base_mismatch)?;
            self.members.insert(adapter.to_path_buf(), member);
        }
        self.members.get(adapter).ok_or_else(|| Error::fault(adapter.display(), "is not loaded"))
    }

    /// Answers in the order of `requests`; what shares adapter and labels goes through the towers together.
    ///
    /// # Errors
    /// With the line, counted from 1, of the first request that cannot be answered.
    pub fn answer(&mut self, requests: &[Request], options: &Defaults) -> Result<Vec<Answer>> {
        let mut groups: Vec<(usize, Vec<usize>)> = Vec::new();
        let mut known: HashMap<(&Option<PathBuf>, &Option<Vec<String>>), usize> = HashMap::new();
        for (i, request) in requests.iter().enumerate() {
            let group = *known.entry((&request.adapter, &request.labels)).or_insert_with(|| {
                groups.push((i, Vec::new()));
                groups.len() - 1
            });
            groups[group].1.push(i);
        }
        let mut answers: Vec<Option<Answer>> = vec![None; requests.len()];
        for (first, members) in groups {
            let at = |i: usize| {
                let line = requests[i].line.max(1);
                move |e: Error| on_line(line, e)
            };
            let request = &requests[first];
            let model = self.with(request.adapter.as_deref()).map_err(at(first))?;
            if model.tells() {
                for (i, told) in members.iter().zip(judged(model, &members, requests)?) {
                    answers[*i] = Some(Answer::told(&requests[*i], told, options.top));
                }
                continue;
            }
            let labels = request.labels.as_deref().unwrap_or(&options.labels);
            let scorer = model.scorer(labels, &options.templates).map_err(at(first))?;
            for part in members.chunks(BATCH) {
                let images = part.iter().map(|i| requests[*i].image().map_err(at(*i))).collect::<Result<Vec<&Path>>>()?;
                let features = match model.embed_images(&images) {
                    Ok(features) => features,
                    // Which of them it was.
                    Err(e) => {
                        let own = part.iter().zip(&images).find_map(|(i, image)| Some(at(*i)(model.embed_images(&[image]).err()?)));
                        return Err(own.unwrap_or(e));
                    }
                };
                for (i, mut predictions) in part.iter().zip(scorer.rank(model, &features)?) {
                    predictions.truncate(options.top.unwrap_or(usize::MAX));
                    answers[*i] = Some(Answer { predictions, ..Answer::to(&requests[*i]) });
                }
            }
        }
        Ok(answers.into_iter().flatten().collect())
    }
}

/// What a task says of some requests; where it cannot, of which one.
fn judged(model: &Model, members: &[usize], requests: &[Request]) -> Result<Vec<Told>> {
    let queries: Vec<Query> = members.iter().map(|i| requests[*i].query()).collect();
    model.tell(&queries).map_err(|e| {
        let one = |(i, query): (&usize, &Query)| Some(on_line(requests[*i].line.max(1), model.tell(std::slice::from_ref(query)).err()?));
        members.iter().zip(&queries).find_map(one).unwrap_or(e)
    })
}

/// Images that go through the tower at once.
const BATCH: usize = 32;

/// A line of `predict --jsonl`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// An image file; only what looks at texts alone can do without.
    #[serde(default)]
    pub image: Option<PathBuf>,
    /// The text that may fit the image.
    #[serde(default)]
    pub text: Option<String>,
    /// What is asked about the image.
    #[serde(default)]
    pub question: Option<String>,
    /// What the answer is to be chosen from.
    #[serde(default)]
    pub choices: Vec<String>,
    /// The adapter to put on the base; the command line's when left out.
    #[serde(default)]
    pub adapter: Option<PathBuf>,
    /// The labels to rank; the command line's, or the adapter's classes, when left out.
    #[serde(default)]
    pub labels: Option<Vec<String>>,
    /// Where it stands, counted from 1, for messages.
    #[serde(skip)]
    pub line: usize,
}

impl Request {
    fn image(&self) -> Result<&Path> {
        self.image.as_deref().ok_or_else(|| Error::input("image", "expected a path, found none"))
    }

    fn query(&self) -> Query {
        let Self { image, text, question, choices, .. } = self.clone();
        Query { image, text, question, choices }
    }
}

/// What holds where a line says nothing.
#[derive(Debug, Clone, Default)]
pub struct Defaults {
    /// Labels; none for the adapter's classes.
    pub labels: Vec<String>,
    /// Prompts; none for the adapter's.
    pub templates: Vec<String>,
    /// How many labels each answer has; all when left out.
    pub top: Option<usize>,
}

/// The answer to a [`Request`].
#[derive(Debug, Clone, Default, Serialize)]
pub struct Answer {
    /// The image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<PathBuf>,
    /// The text that was judged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// What was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub question: Option<String>,
    /// The adapter that was named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<PathBuf>,
    /// The verdict, the answer, the number, where a task gives one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prediction: Option<String>,
    /// Most likely first; of numbers there are none.
    pub predictions: Vec<Ranked>,
}

impl Answer {
    fn to(request: &Request) -> Self {
        let Request { image, text, question, adapter, .. } = request.clone();
        Self { image, text, question, adapter, ..Self::default() }
    }

    fn told(request: &Request, told: Told, top: Option<usize>) -> Self {
        let one = |((label, probability), logit): ((String, f32), f32)| Ranked { label, probability, logit };
        let mut predictions: Vec<Ranked> = told.scores.into_iter().zip(told.logits).map(one).collect();
        Ranked::sort(&mut predictions);
        predictions.truncate(top.unwrap_or(usize::MAX));
        Self { prediction: Some(told.prediction), predictions, ..Self::to(request) }
    }
}

/// Requests, one JSON object a line; empty lines are skipped.
///
/// # Errors
/// With the line, counted from 1, that is none.
pub fn requests(place: &str, text: &str) -> Result<Vec<Request>> {
    let lines = crate::files::lines(text.trim_start_matches('\u{feff}')).enumerate().filter(|(_, l)| !l.trim().is_empty());
    let parsed = lines.map(|(i, line)| match serde_json::from_str::<Request>(line) {
        Ok(request) if request.image.is_none() && request.text.is_none() => {
            Err(Error::input(format!("{place} line {}", i + 1), "expected an image, found none").hint(LINE))
        }
        Ok(request) => Ok(Request { line: i + 1, ..request }),
        Err(e) => Err(Error::input(format!("{place} line {}", i + 1), e).hint(LINE)),
    });
    parsed.collect()
}

const LINE: &str =
    r#"a line is {"image": PATH, "adapter": DIR, "labels": [..]}, or with "text" or "question" and "choices" for tasks on both"#;

fn on_line(line: usize, mut error: Error) -> Error {
    if let Error::Input(problem) | Error::Fault(problem) = &mut error {
        problem.place = format!("line {line}: {}", problem.place);
    }
    error
}
