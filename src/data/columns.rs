//! What a row says about an example: the columns that tables, Parquet files and WebDataset's JSON members share.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::rules::{Field, Mistake, SPLITS, split_of_cell};
use super::{RawExample, Split};
use crate::error::{Error, Result};

/// A row by the names of its columns.
pub(super) type Row = Map<String, Value>;

/// One column, or several: `text: caption`, `text: [title, body]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected the name of a column such as caption, or a list of names")]
pub enum ColumnNames {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl ColumnNames {
    /// All of them.
    #[must_use]
    pub fn names(&self) -> &[String] {
        match self {
            Self::One(name) => std::slice::from_ref(name),
            Self::Many(names) => names,
        }
    }
}

/// Longer texts are refused. CLIP reads some 77 tokens of one, and Parquet stores a text once for all rows that have it.
const MAX_CELL: usize = 1 << 20;

fn longest(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(longest).max().unwrap_or(0),
        _ => 0,
    }
}

/// Stands between the texts of several columns.
const JOIN: &str = ". ";

/// The configuration of a source of rows: its own fields, and which column holds what.
macro_rules! with_columns {
    (
        $(#[$meta:meta])*
        pub struct $name:ident as $key:literal {
            $($(#[$field_meta:meta])* pub $field:ident: $type:ty,)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            $($(#[$field_meta])* pub $field: $type,)*
            /// Column of images. In a table it holds paths relative to the table; a row without one is an example without
            /// image if it has a text or a question. `image` or `file_name` when left out.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub image: Option<String>,
            /// Column of texts: a string, or a list of strings each of which fits by itself. Of several columns the
            /// strings are joined to one text. `text` when left out.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub text: Option<$crate::data::ColumnNames>,
            /// Stands between the texts of several columns; ". " when left out.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub text_join: Option<String>,
            /// Column of class names. `label` when left out, unless `labels` is given.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub label: Option<String>,
            /// Column of several class names: `a|b` (see `label_separator`) or a list. `labels` when left out, unless `label` is given.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub labels: Option<String>,
            /// Stands between the class names of a cell; `|` when left out.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub label_separator: Option<String>,
            /// Column of questions. `question` when left out.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub question: Option<String>,
            /// Column of answers: a string, or those of several annotators (a list; `a|b` in CSV and TSV).
            /// `answer` or `answers` when left out.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub answer: Option<String>,
            /// Column of answers to choose from: `a|b|c` or a list. `choices` when left out.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub choices: Option<String>,
            /// Column of finite numbers. `value` when left out.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub value: Option<String>,
            /// Column that says whether image and text belong together: true, yes, 1 or false, no, 0. `fits` when left out.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub fits: Option<String>,
            /// Column that says train, val or test, or another usual word for one: `Testing`, `dev`, `restval` (Karpathy's, trained
            /// on). 0, 1 and 2 are these three where all occur. `split` when left out.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub split: Option<String>,
            /// What other words in the split column mean: `{ 1: train, 0: test }`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub splits: Option<std::collections::BTreeMap<String, $crate::data::Split>>,
            /// Column whose equal values stay in one split. `group` when left out.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub group: Option<String>,
            /// Column of names for predictions and messages; the image's path, or file and row, when left out.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub id: Option<String>,
        }

        impl $name {
            fn columns(&self) -> $crate::data::columns::Columns {
                let Self {
                    image, text, text_join, label, labels, label_separator, question, answer, choices, value, fits, split, splits, group,
                    id, ..
                } = self.clone();
                $crate::data::columns::Columns {
                    key: $key, image, text, text_join, label, labels, label_separator, question, answer, choices, value, fits, split,
                    splits, group, id,
                }
            }
        }
    };
}
pub(super) use with_columns;

/// Which column holds what.
#[derive(Debug, Clone, Default)]
pub(super) struct Columns {
    /// The source's key in a recipe.
    pub(super) key: &'static str,
    pub(super) image: Option<String>,
    pub(super) text: Option<ColumnNames>,
    pub(super) text_join: Option<String>,
    pub(super) label: Option<String>,
    pub(super) labels: Option<String>,
    pub(super) label_separator: Option<String>,
    pub(super) question: Option<String>,
    pub(super) answer: Option<String>,
    pub(super) choices: Option<String>,
    pub(super) value: Option<String>,
    pub(super) fits: Option<String>,
    pub(super) split: Option<String>,
    pub(super) splits: Option<BTreeMap<String, Split>>,
    pub(super) group: Option<String>,
    pub(super) id: Option<String>,
}

/// A row and where it stands.
#[derive(Clone, Copy)]
pub(super) struct At<'a> {
    pub(super) row: &'a Row,
    /// Names file and row.
    pub(super) place: &'a dyn Fn() -> String,
    /// Whether cells are text without lists, so that `a|b` is how answers are told apart.
    pub(super) flat: bool,
}

impl Columns {
    /// The columns that the recipe names, each with the key that does.
    pub(super) fn named(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let Self { image, label, labels, question, answer, choices, value, fits, split, group, id, .. } = self;
        let single = [
            ("image", image),
            ("label", label),
            ("labels", labels),
            ("question", question),
            ("answer", answer),
            ("choices", choices),
            ("value", value),
            ("fits", fits),
            ("split", split),
            ("group", group),
            ("id", id),
        ];
        let texts = self.text.iter().flat_map(|t| t.names()).map(|name| ("text", name.as_str()));
        single.into_iter().filter_map(|(key, name)| Some((key, name.as_deref()?))).chain(texts)
    }

    /// The columns of one class and of several. Where the recipe names one of them, it is the only one.
    pub(super) fn class_columns(&self) -> [Option<&str>; 2] {
        let usual = self.label.is_none() && self.labels.is_none();
        [self.label.as_deref().or(usual.then_some("label")), self.labels.as_deref().or(usual.then_some("labels"))]
    }

    /// What cannot be right whatever the rows say.
    pub(super) fn check(&self) -> Result<()> {
        match &self.label_separator {
            Some(mark) if mark.is_empty() => {
                Err(Error::input(format!("data.{}.label_separator", self.key), "expected what stands between class names, found nothing"))
            }
            _ => Ok(()),
        }
    }

    /// All that a row says but for the image. Cells that are not what their column holds are among the example's mistakes.
    pub(super) fn example(&self, at: At<'_>) -> Result<RawExample> {
        let [label, labels] = self.class_columns();
        let mut cells = Cells { columns: self, at, mistakes: Vec::new() };
        let mark = self.label_separator.as_deref().unwrap_or(BAR);
        let several = ("labels", &self.labels, labels.as_slice());
        let several = cells.read(Field::Labels, several, &format!("class names as `a{mark}b` or a list"), &|v| list(v, Some(mark)))?;
        // An empty cell says that it belongs to no class.
        let several = several.or_else(|| labels.is_some_and(|name| at.row.contains_key(name)).then(Vec::new));
        let label = cells.read(Field::Label, ("label", &self.label, label.as_slice()), "one class name", &single)?;
        let answers = ("answer", &self.answer, &["answer", "answers"][..]);
        let answers = cells.read(Field::Answer, answers, "an answer or a list of answers", &|v| list(v, at.flat.then_some(BAR)))?;
        let choices = ("choices", &self.choices, &["choices"][..]);
        let choices = cells.read(Field::Choices, choices, "answers as `a|b` or a list", &|v| list(v, Some(BAR)))?;
        let value = ("value", &self.value, &["value"][..]);
        let value = cells.read(Field::Value, value, "a number that is finite in f32", &|v| number(v).ok_or_else(|| shown(v)))?;
        let fits = cells.read(Field::Fits, ("fits", &self.fits, &["fits"]), "true or false", &|v| truth(v).ok_or_else(|| shown(v)))?;
        let question = cells.word(Field::Question, "question", &self.question, &["question"])?;
        let split = cells.read(Field::Place, ("split", &self.split, &["split"]), SPLITS, &|v| self.split(v))?.flatten();
        Ok(RawExample {
            id: cells.word(Field::Place, "id", &self.id, &[])?.unwrap_or_default(),
            texts: cells.texts()?,
            question,
            label: label.filter(|s| !s.is_empty()),
            labels: several,
            value,
            fits,
            answers: answers.unwrap_or_default(),
            choices: choices.unwrap_or_default(),
            group: cells.word(Field::Place, "group", &self.group, &["group"])?,
            split,
            mistakes: cells.mistakes,
            ..Default::default()
        })
    }

    /// The split that a cell names; none where it is empty.
    fn split(&self, value: &Value) -> std::result::Result<Option<Split>, String> {
        let word = single(value)?;
        let own = self.splits.as_ref().and_then(|words| words.get(&word)).copied();
        match own.or_else(|| split_of_cell(&word)) {
            None if !word.is_empty() => Err(format!("`{word}`")),
            split => Ok(split),
        }
    }

    /// The image's cell, as it stands there.
    pub(super) fn image(&self, at: At<'_>) -> Result<Option<Value>> {
        let mut cells = Cells { columns: self, at, mistakes: Vec::new() };
        let found = cells.find(Field::Place, ("image", &self.image, &["image", "file_name"]))?;
        match cells.mistakes.pop() {
            Some(m) => Err(at.wrong(&m.column, &m.expected, &m.found)),
            None => Ok(found.map(|(_, value)| value)),
        }
    }
}

/// A column: its key in a recipe, the name that a recipe gives it, and those that it has when left out.
type Named<'a> = (&'a str, &'a Option<String>, &'a [&'a str]);

/// Reads the cells of a row.
struct Cells<'a> {
    columns: &'a Columns,
    at: At<'a>,
    mistakes: Vec<Mistake>,
}

impl Cells<'_> {
    /// What a column says; a cell that says something else is a mistake.
    fn read<T>(
        &mut self,
        field: Field,
        column: Named<'_>,
        expected: &str,
        parse: &dyn Fn(&Value) -> std::result::Result<T, String>,
    ) -> Result<Option<T>> {
        let Some((name, value)) = self.find(field, column)? else { return Ok(None) };
        Ok(parse(&value).map_err(|found| self.mistake(field, &name, expected, found)).ok())
    }

    /// A text or a number; nothing where it is empty.
    fn word(&mut self, field: Field, key: &str, named: &Option<String>, default: &[&str]) -> Result<Option<String>> {
        let found = self.read(field, (key, named, default), "a text or a number", &single)?;
        Ok(found.filter(|s| !s.is_empty()))
    }

    fn mistake(&mut self, field: Field, column: &str, expected: &str, found: String) {
        self.mistakes.push(self.at.mistake(field, column, expected, found));
    }

    /// A column's name and value in a row; nothing where the cell is empty.
    fn find(&mut self, field: Field, (key, named, default): Named<'_>) -> Result<Option<(String, Value)>> {
        let row = self.at.row;
        if let Some(name) = named.as_ref().filter(|name| !row.contains_key(*name)) {
            let hint = format!("data.{}.{key} names it; {}", self.columns.key, self.at.columns());
            return Err(Error::input((self.at.place)(), format!("there is no column `{name}`")).hint(hint));
        }
        let names = named.as_deref().map_or_else(|| default.to_vec(), |name| vec![name]);
        let Some((name, value)) = names.iter().find_map(|name| Some((*name, row.get(*name).filter(|v| !v.is_null())?))) else {
            return Ok(None);
        };
        match longest(value) {
            bytes if bytes > MAX_CELL => {
                self.mistake(field, name, &format!("at most {MAX_CELL} bytes"), bytes.to_string());
                Ok(None)
            }
            _ => Ok(Some((name.to_string(), value.clone()))),
        }
    }

    fn texts(&mut self) -> Result<Vec<String>> {
        let Some(names) = &self.columns.text else {
            return Ok(self.read(Field::Text, ("text", &None, &["text"]), A_TEXT, &texts)?.unwrap_or_default());
        };
        let (names, mut parts) = (names.names(), Vec::new());
        for name in names {
            let found = self.read(Field::Text, ("text", &Some(name.clone()), &[]), A_TEXT, &texts)?.unwrap_or_default();
            if names.len() > 1 && found.len() > 1 {
                self.mistake(Field::Text, name, "one string, since several columns make one text", "a list".into());
            }
            parts.extend(found);
        }
        if names.len() > 1 && !parts.is_empty() {
            parts = vec![parts.join(self.columns.text_join.as_deref().unwrap_or(JOIN))];
        }
        Ok(parts)
    }
}

/// Stands between names in a cell unless told otherwise.
const BAR: &str = "|";

const A_TEXT: &str = "a string or a list of strings";

impl At<'_> {
    pub(super) fn mistake(&self, field: Field, column: &str, expected: &str, found: String) -> Mistake {
        Mistake { field, column: column.into(), place: (self.place)(), expected: expected.into(), found }
    }

    /// The columns that there are, for messages.
    pub(super) fn columns(&self) -> String {
        match self.row.keys().map(String::as_str).collect::<Vec<_>>() {
            names if names.is_empty() => "there is no column".into(),
            names => format!("the columns are {}", names.join(", ")),
        }
    }

    pub(super) fn wrong(&self, column: &str, expected: &str, found: &str) -> Error {
        Error::input((self.place)(), format!("column `{column}`: expected {expected}, found {found}"))
    }
}

/// What a Parquet file calls cells that are points in time. A cell of a class column is an object with one of these.
pub(super) const TIMES: [&str; 3] = ["dates", "timestamps", "times of day"];

/// A value in a message.
pub(super) fn shown(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = match value {
        Value::Array(_) => return "a list".into(),
        Value::Object(o) => match TIMES.iter().find(|kind| o.contains_key(**kind)) {
            Some(kind) => return format!("{kind}, which have to be written as text to be names"),
            None => return "an object".into(),
        },
        Value::String(s) => format!("`{s}`"),
        other => other.to_string(),
    };
    if text.chars().count() > LONGEST { text.chars().take(LONGEST).chain(['…']).collect() } else { text }
}

/// Whole numbers are exact up to here, 2^53.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// A cell as text; numbers as they are written.
fn single(value: &Value) -> std::result::Result<String, String> {
    match value {
        Value::String(s) => Ok(s.trim().to_string()),
        // Numbers this large are rounded to their neighbours, and two classes would be one.
        Value::Number(n) if n.is_f64() && n.as_f64().is_some_and(|n| n.abs() >= EXACT) => {
            Err(format!("{n}, a number that has to stand in quotes to be told from its neighbours"))
        }
        Value::Number(_) | Value::Bool(_) => Ok(value.to_string()),
        other => Err(shown(other)),
    }
}

/// A list of texts: an array, or a string, which `mark` divides. VQA's annotations hold objects `{answer: …}`.
fn list(value: &Value, mark: Option<&str>) -> std::result::Result<Vec<String>, String> {
    let parts: Vec<String> = match value {
        Value::String(s) if mark.is_some() => s.split(mark.unwrap_or(BAR)).map(|s| s.trim().to_string()).collect(),
        Value::Array(items) => items
            .iter()
            .map(|item| match item {
                Value::Object(o) => o.get("answer").map_or_else(|| Err(shown(item)), single),
                item => single(item),
            })
            .collect::<std::result::Result<_, _>>()?,
        Value::Object(o) => return o.get("answer").filter(|v| !v.is_object()).map_or_else(|| Err(shown(value)), |v| list(v, mark)),
        other => vec![single(other)?],
    };
    Ok(parts.into_iter().filter(|s| !s.is_empty()).collect())
}

fn texts(value: &Value) -> std::result::Result<Vec<String>, String> {
    let one = |v: &Value| v.as_str().map(|s| s.trim().to_string()).ok_or_else(|| shown(v));
    let all = match value {
        Value::Array(items) => items.iter().map(one).collect::<std::result::Result<Vec<_>, _>>()?,
        other => vec![one(other)?],
    };
    Ok(all.into_iter().filter(|s| !s.is_empty()).collect())
}

fn number(value: &Value) -> Option<f64> {
    let number = match value {
        Value::String(s) => s.trim().parse().ok(),
        other => other.as_f64(),
    };
    // What is trained on is f32.
    number.filter(|n| (*n as f32).is_finite())
}

fn truth(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(b) => Some(*b),
        Value::Number(n) => [(0.0, false), (1.0, true)].iter().find(|(v, _)| n.as_f64() == Some(*v)).map(|(_, b)| *b),
        Value::String(s) => match s.trim().to_ascii_lowercase().as_str() {
            "true" | "yes" | "1" => Some(true),
            "false" | "no" | "0" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn read(columns: &Columns, json: &str, flat: bool) -> Result<RawExample> {
        let row: Row = serde_json::from_str(json).unwrap();
        let at = At { row: &row, place: &|| "rows:7".into(), flat };
        let e = columns.example(at)?;
        e.mistakes.first().map_or(Ok(e.clone()), |m| Err(at.wrong(&m.column, &m.expected, &m.found)))
    }

    #[test]
    fn each_column_in_each_of_its_forms() {
        let all = Columns::default();
        let strings = r#"{"text": " a cat ", "label": 3, "labels": "a | b|", "question": "which?", "answer": "x|y", "choices": "x|y|z",
            "value": "-1.5e2", "fits": "Yes", "group": 7, "split": "validation"}"#;
        let e = read(&all, strings, true).unwrap();
        assert_eq!((e.texts, e.label.as_deref(), e.labels), (vec!["a cat".into()], Some("3"), Some(vec!["a".into(), "b".into()])));
        assert_eq!((e.question.as_deref(), e.answers, e.choices.len()), (Some("which?"), vec!["x".to_string(), "y".into()], 3));
        assert_eq!((e.value, e.fits, e.group.as_deref(), e.split), (Some(-150.0), Some(true), Some("7"), Some(Split::Val)));
        // Where there are lists, a bar in an answer is a bar.
        assert_eq!(read(&all, r#"{"answer": "x|y"}"#, false).unwrap().answers, ["x|y"]);
        let lists = r#"{"text": ["a", "b"], "labels": ["a", 2], "answers": [{"answer": "x"}, {"answer": "x"}], "choices": ["u", "v"],
            "value": 3, "fits": 0}"#;
        let e = read(&all, lists, false).unwrap();
        assert_eq!((e.texts.len(), e.labels.unwrap()[1].as_str(), e.answers.len(), e.choices.len()), (2, "2", 2, 2));
        assert_eq!((e.value, e.fits), (Some(3.0), Some(false)));
        // No class is something else than nothing said about classes.
        assert_eq!(read(&all, r#"{"labels": null}"#, false).unwrap().labels, Some(vec![]));
        assert_eq!(read(&all, "{}", false).unwrap().labels, None);
    }

    #[test]
    fn several_columns_make_one_text() {
        let columns = |join: Option<&str>| Columns {
            text: Some(ColumnNames::Many(vec!["title".into(), "body".into()])),
            text_join: join.map(str::to_string),
            ..Default::default()
        };
        assert_eq!(read(&columns(None), r#"{"title": "A", "body": "b"}"#, false).unwrap().texts, ["A. b"]);
        assert_eq!(read(&columns(Some(" ")), r#"{"title": "A", "body": "b"}"#, false).unwrap().texts, ["A b"]);
        assert_eq!(read(&columns(None), r#"{"title": null, "body": "b"}"#, false).unwrap().texts, ["b"]);
        let error = read(&columns(None), r#"{"title": "A"}"#, false).unwrap_err().to_string();
        assert!(error.contains("no column `body`"), "{error}");
        assert!(read(&columns(None), r#"{"title": ["A", "B"], "body": "b"}"#, false).unwrap_err().to_string().contains("one string"));
    }

    #[test]
    fn a_bad_cell_says_where_and_what() {
        for (json, column, expected, found) in [
            (r#"{"value": "high"}"#, "value", "a number that is finite in f32", "`high`"),
            (r#"{"value": "inf"}"#, "value", "a number that is finite in f32", "`inf`"),
            (r#"{"value": [1]}"#, "value", "a number that is finite in f32", "a list"),
            (r#"{"fits": "maybe"}"#, "fits", "true or false", "`maybe`"),
            (r#"{"fits": 2}"#, "fits", "true or false", "2"),
            (r#"{"label": ["a"]}"#, "label", "one class name", "a list"),
            (r#"{"labels": [["a"]]}"#, "labels", "a list", "a list"),
            (r#"{"text": 3}"#, "text", "a string", "3"),
            (r#"{"answer": [{"text": "x"}]}"#, "answer", "a list of answers", "an object"),
            (r#"{"group": {}}"#, "group", "a text or a number", "an object"),
        ] {
            let error = read(&Columns::default(), json, false).unwrap_err().to_string();
            let parts = ["rows:7", &format!("column `{column}`"), expected, &format!("found {found}")].map(str::to_string);
            assert!(parts.iter().all(|p| error.contains(p.as_str())), "{json}: {error}");
        }
    }
}
