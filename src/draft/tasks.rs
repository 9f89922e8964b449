//! Which tasks a set offers, and how a recipe says each.

use crate::data::{Dataset, Example, ImageRef, Split};
use crate::error::{Error, Result};

/// A task that `peft new` can write.
#[derive(Debug)]
pub(super) struct DraftTask {
    /// Its key in a recipe.
    pub(super) name: &'static str,
    /// What stands before IMAGE… when it is predicted.
    pub(super) ask: &'static str,
    /// What the set has to have, for messages.
    needs: &'static str,
    /// Whether it is chosen where nobody says otherwise.
    offered: fn(&Dataset) -> bool,
    /// Whether it can be learnt from the set at all.
    suits: fn(&Dataset) -> bool,
    /// Its options, and a fusion where it has two inputs: from the set and the prompt around a class name.
    pub(super) lines: fn(&Dataset, &str) -> String,
}

/// The first that a set offers is taken.
pub(super) const TASKS: [DraftTask; 5] = [
    DraftTask {
        name: "match",
        ask: " --text TEXT",
        needs: "a text column",
        offered: |data| any(data, |e| e.fits.is_some()),
        suits: captioned,
        lines: matching,
    },
    DraftTask {
        name: "answer",
        ask: " --question QUESTION",
        needs: "question and answer columns",
        offered: asked,
        suits: asked,
        lines: answer,
    },
    DraftTask {
        name: "classify",
        ask: "",
        needs: "two classes or more, by a label column or one directory a class",
        offered: labelled,
        suits: labelled,
        lines: classify,
    },
    DraftTask { name: "regress", ask: "", needs: "a value column", offered: measured, suits: measured, lines: regress },
    DraftTask {
        name: "retrieve",
        ask: " --labels TEXT,TEXT",
        needs: "a text column, or labels",
        offered: captioned,
        suits: |data| captioned(data) || labelled(data),
        lines: retrieve,
    },
];

/// What somebody wishes, or what the set offers.
///
/// # Errors
/// When there is no such task, or nothing to learn.
pub(super) fn choose(wish: Option<&str>, place: &str, data: &Dataset) -> Result<&'static DraftTask> {
    let Some(wish) = wish else {
        return TASKS.iter().find(|t| (t.offered)(data)).ok_or_else(|| {
            Error::input(place, "has neither two classes nor texts nor values: there is nothing to learn")
                .hint("a table needs a label, text, answer or value column, a directory one directory a class")
        });
    };
    let names = || TASKS.iter().map(|t| t.name).collect::<Vec<_>>().join(", ");
    let task = TASKS.iter().find(|t| t.name == wish);
    let task = task.ok_or_else(|| Error::input("--task", format!("expected one of {}, found `{wish}`", names())))?;
    if (task.suits)(data) {
        return Ok(task);
    }
    Err(Error::input("--task", format!("{wish}: the data lacks {}", task.needs)).hint("`peft data PATH` says what it holds"))
}

fn any(data: &Dataset, has: impl Fn(&Example) -> bool) -> bool {
    [Split::Train, Split::Val, Split::Test].into_iter().any(|s| data.split(s).iter().any(&has))
}

fn captioned(data: &Dataset) -> bool {
    any(data, |e| !e.texts.is_empty())
}

fn pictured(data: &Dataset) -> bool {
    any(data, |e| !matches!(e.image, ImageRef::Missing))
}

fn asked(data: &Dataset) -> bool {
    any(data, |e| e.question.is_some() && !e.answers.is_empty())
}

fn labelled(data: &Dataset) -> bool {
    data.classes.len() > 1 && any(data, |e| e.label.is_some() || e.labels.is_some())
}

fn measured(data: &Dataset) -> bool {
    any(data, |e| e.value.is_some())
}

/// The usual fusion of two inputs.
const FUSION: &str = "fusion:\n  concat: { hidden: 256 }   # cosine, bilinear, cross_attention or transformer in its place\n";

fn matching(data: &Dataset, _: &str) -> String {
    let negatives = match any(data, |e| e.fits.is_some()) {
        true => "given }   # the data says what does not fit",
        false => "random }   # other images' texts do not fit; { hardest: { count: 2 } }: the most similar of the batch",
    };
    format!("  match: {{ negatives: {negatives}\n{FUSION}")
}

fn answer(data: &Dataset, _: &str) -> String {
    let several = any(data, |e| e.answers.len() > 1);
    let options = match (any(data, |e| !e.choices.is_empty()), several) {
        (true, _) => "choose: given }   # each question has choices of its own",
        (false, true) => "loss: bce }   # several annotators: several answers may be right",
        (false, false) => "loss: softmax }   # one of the answers in the training set; bce: several may be right",
    };
    format!("  answer: {{ {options}\n{FUSION}")
}

fn classify(data: &Dataset, template: &str) -> String {
    if any(data, |e| e.labels.is_some()) {
        return "  classify: { labels: multi, head: linear }   # any number of labels; loss: asymmetric where most are absent\n".into();
    }
    if !pictured(data) {
        return "  classify: { inputs: text }   # there are no images\n".into();
    }
    let template = serde_json::Value::from(template);
    format!("  classify: {{ templates: [{template}] }}   # {{}} is the class name; say what the images show\n")
}

fn regress(data: &Dataset, _: &str) -> String {
    match (pictured(data), captioned(data)) {
        (true, true) => format!("  regress: {{ inputs: both }}   # image or text: one alone\n{FUSION}"),
        (false, true) => "  regress: { inputs: text }   # there are no images\n".into(),
        _ => "  regress: { inputs: image }   # loss: { huber: { delta: 1.0 } } where some are far off, ordinal for whole numbers\n".into(),
    }
}

fn retrieve(data: &Dataset, _: &str) -> String {
    match captioned(data) {
        true => "  retrieve: {}   # texts find their images and images their texts\n".into(),
        false => "  retrieve: { pairs: labels }   # images find others of their class\n".into(),
    }
}
