//! One base in memory, several adapters on it, chosen per call.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use peft_adapters::wording::plain;

use crate::error::{Error, Result};
use crate::model::{Model, Query, Ranked, Scorer, Told};

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
    scorers: HashMap<Prepared, Scorer>,
    allow_base_mismatch: bool,
}

impl Pool {
    /// `model` answers where no adapter is named.
    #[must_use]
    pub fn new(model: Model) -> Self {
        Self { model, members: HashMap::new(), scorers: HashMap::new(), allow_base_mismatch: false }
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
        let answers = self.answers(requests, options);
        answers.into_iter().zip(requests).map(|(answer, request)| answer.map_err(|e| on_line(request.line.max(1), e))).collect()
    }

    /// [`Pool::answer`] where each request has an answer or an error of its own.
    pub fn answers(&mut self, requests: &[Request], options: &Defaults) -> Vec<Result<Answer>> {
        let mut groups: Vec<Vec<usize>> = Vec::new();
        let mut known: HashMap<(&Option<PathBuf>, &Option<Vec<String>>), usize> = HashMap::new();
        for (i, request) in requests.iter().enumerate() {
            let group = *known.entry((&request.adapter, &request.labels)).or_insert_with(|| {
                groups.push(Vec::new());
                groups.len() - 1
            });
            groups[group].push(i);
        }
        let mut answers: Vec<Option<Result<Answer>>> = requests.iter().map(|_| None).collect();
        for part in groups.iter().flat_map(|members| members.chunks(BATCH)) {
            let together: Vec<&Request> = part.iter().map(|i| &requests[*i]).collect();
            for (i, answer) in part.iter().zip(self.part(&together, options)) {
                answers[*i] = Some(answer);
            }
        }
        answers.into_iter().flatten().collect()
    }

    /// Answers for a batch of the same adapter and labels. Where they cannot be answered together, each is by itself.
    fn part(&mut self, requests: &[&Request], options: &Defaults) -> Vec<Result<Answer>> {
        match self.together(requests, options) {
            Ok(answers) => answers,
            Err(e) if requests.len() == 1 => vec![Err(e)],
            Err(_) => requests.iter().flat_map(|request| self.part(&[request], options)).collect(),
        }
    }

    fn together(&mut self, requests: &[&Request], options: &Defaults) -> Result<Vec<Result<Answer>>> {
        let Some(first) = requests.first() else { return Ok(Vec::new()) };
        let adapter = first.adapter.as_deref();
        if self.with(adapter)?.tells() {
            if let Some(labels) = &first.labels {
                self.with(adapter)?.check_labels(labels)?;
            }
            let queries: Vec<Query> = requests.iter().map(|r| r.query()).collect();
            let told = self.with(adapter)?.tell(&queries)?;
            return Ok(requests.iter().zip(told).map(|(request, told)| Ok(Answer::told(request, told, options.top))).collect());
        }
        if let Some(key) = requests.iter().find_map(|r| r.asks()) {
            return Err(Error::input(key, "this adapter ranks labels, and does not judge an image with a text").hint(LINE));
        }
        let labels = first.labels.as_deref().unwrap_or(&options.labels);
        let key = self.prepare(adapter, labels, &options.templates)?;
        let paths = requests.iter().map(|r| r.image()).collect::<Result<Vec<&Path>>>()?;
        let model = adapter.and_then(|a| self.members.get(a)).unwrap_or(&self.model);
        let scorer = self.scorers.get(&key).ok_or_else(|| Error::fault("labels", "are not prepared"))?;
        let read = model.embed_readable(&paths)?;
        let mut ranked = scorer.rank(model, &read.features)?.into_iter();
        let mut bad: HashMap<usize, Error> = read.bad.into_iter().collect();
        let one = |(i, request): (usize, &&Request)| match bad.remove(&i) {
            Some(error) => Some(Err(error)),
            None => ranked.next().map(|mut predictions| {
                predictions.truncate(options.top.unwrap_or(usize::MAX));
                Ok(Answer { predictions, ..Answer::to(request) })
            }),
        };
        Ok(requests.iter().enumerate().filter_map(one).collect())
    }

    /// Encodes labels for an adapter, once; they are kept for the next requests.
    ///
    /// # Errors
    /// When there are none, or the adapter knows others.
    pub fn prepare(&mut self, adapter: Option<&Path>, labels: &[String], templates: &[String]) -> Result<Prepared> {
        let key = (adapter.map(Path::to_path_buf), labels.to_vec(), templates.to_vec());
        if !self.scorers.contains_key(&key) {
            let scorer = self.with(adapter)?.scorer(labels, templates)?;
            if self.scorers.len() >= KEPT {
                self.scorers.clear();
            }
            self.scorers.insert(key.clone(), scorer);
        }
        Ok(key)
    }
}

/// What labels were prepared for: an adapter, the labels, the templates.
pub type Prepared = (Option<PathBuf>, Vec<String>, Vec<String>);

/// So many lists of labels stay encoded.
const KEPT: usize = 64;

/// Images that go through the tower at once.
const BATCH: usize = 32;

/// A line of `predict --jsonl`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Whatever the answer is to be known by; it comes back as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<serde_json::Value>,
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

    /// What only a task that answers by itself can answer.
    fn asks(&self) -> Option<&'static str> {
        let given = [("text", self.text.is_some()), ("question", self.question.is_some()), ("choices", !self.choices.is_empty())];
        given.into_iter().find_map(|(key, given)| given.then_some(key))
    }

    /// What it asks of a task that answers by itself.
    #[must_use]
    pub fn query(&self) -> Query {
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
    /// The request's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<serde_json::Value>,
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
        let Request { id, image, text, question, adapter, .. } = request.clone();
        Self { id, image, text, question, adapter, ..Self::default() }
    }

    fn told(request: &Request, told: Told, top: Option<usize>) -> Self {
        let chosen = told.chosen.into_iter().map(Some).chain(std::iter::repeat(None));
        let one =
            |(((label, probability), logit), chosen): (((String, f32), f32), Option<bool>)| Ranked { label, probability, logit, chosen };
        let mut predictions: Vec<Ranked> = told.scores.into_iter().zip(told.logits).zip(chosen).map(one).collect();
        Ranked::sort(&mut predictions);
        // Thresholds differ from class to class, so that what passes its own is not always among the likeliest.
        let mut rank = 0..;
        predictions.retain(|p| rank.next().is_some_and(|i| i < top.unwrap_or(usize::MAX)) || p.chosen == Some(true));
        Self { prediction: Some(told.prediction), predictions, ..Self::to(request) }
    }
}

/// Requests, one JSON object a line; empty lines are skipped.
///
/// # Errors
/// With the line, counted from 1, that is none.
pub fn requests(place: &str, text: &str) -> Result<Vec<Request>> {
    let lines = crate::files::lines(text.trim_start_matches('\u{feff}')).enumerate().filter(|(_, l)| !l.trim().is_empty());
    lines.map(|(i, line)| parse(&format!("{place} line {}", i + 1), i + 1, line)).collect()
}

/// The request of one line.
///
/// # Errors
/// With `place`, when it is none.
pub fn parse(place: &str, number: usize, line: &str) -> Result<Request> {
    match serde_json::from_str::<Request>(line) {
        Ok(request) if request.image.is_none() && request.text.is_none() => {
            Err(Error::input(place, "expected an image, found none").hint(LINE))
        }
        Ok(request) => Ok(Request { line: number, ..request }),
        Err(e) => Err(Error::input(place, plain(&e.to_string())).hint(LINE)),
    }
}

const LINE: &str =
    r#"a line is {"image": PATH, "adapter": DIR, "labels": [..]}, or with "text" or "question" and "choices" for tasks on both"#;

fn on_line(line: usize, mut error: Error) -> Error {
    if let Error::Input(problem) | Error::Fault(problem) = &mut error {
        problem.place = format!("line {line}: {}", problem.place);
    }
    error
}
