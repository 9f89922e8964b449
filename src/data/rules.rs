//! What only a whole set can say about a row: whether a cell that cannot be read matters, whether `0` in a split column is a split,
//! whether -1 is a class or the lack of one, whether a row lacks what others have.

use std::collections::{BTreeMap, BTreeSet};

use super::{ImageRef, RawExample, Split};
use crate::error::Error;

/// What a row may say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Field {
    /// What it shows.
    Image,
    /// Texts that belong to it.
    Text,
    /// What is asked about it.
    Question,
    /// Its one class.
    Label,
    /// Its classes, of which there may be any number.
    Labels,
    /// Answers to the question.
    Answer,
    /// Answers to choose from.
    Choices,
    /// A number.
    Value,
    /// Whether image and text belong together.
    Fits,
    /// How the row is found and divided: image, split, group, id. Whatever the task, a row that is wrong there cannot be used.
    Place,
}

impl Field {
    const ALL: [Self; 9] =
        [Self::Image, Self::Text, Self::Question, Self::Label, Self::Labels, Self::Answer, Self::Choices, Self::Value, Self::Fits];

    /// What a row without it lacks.
    fn called(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Text => "text",
            Self::Question => "question",
            Self::Label => "label",
            Self::Labels => "list of labels",
            Self::Answer => "answer",
            Self::Choices => "choices",
            Self::Value => "number",
            Self::Fits => "word on whether it fits",
            Self::Place => "place",
        }
    }

    /// Whether an example has it. One class is a list of one.
    fn is_in(self, e: &RawExample) -> bool {
        match self {
            Self::Image => e.image != ImageRef::Missing,
            Self::Text => !e.texts.is_empty(),
            Self::Question => e.question.is_some(),
            Self::Label => e.label.is_some(),
            Self::Labels => e.labels.is_some() || e.label.is_some(),
            Self::Answer => !e.answers.is_empty(),
            Self::Choices => !e.choices.is_empty(),
            Self::Value => e.value.is_some(),
            Self::Fits => e.fits.is_some(),
            Self::Place => true,
        }
    }
}

/// A cell that is not what its column holds. It is an error where the task reads the column, and nothing where it does not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mistake {
    pub(super) field: Field,
    pub(super) column: String,
    pub(super) place: String,
    pub(super) expected: String,
    pub(super) found: String,
}

impl Mistake {
    /// Whether what should have been a text or a question is something else, so that the row cannot be taken for an empty one.
    pub(super) fn is_text(&self) -> bool {
        [Field::Text, Field::Question].contains(&self.field)
    }

    pub(super) fn is_split(&self) -> bool {
        self.expected == SPLITS
    }

    /// Whether what should have been the path of an image is something else.
    pub(super) fn is_path(&self) -> bool {
        self.expected == A_PATH
    }

    pub(super) fn error(self) -> Error {
        Error::input(self.place, format!("column `{}`: expected {}, found {}", self.column, self.expected, self.found))
    }
}

/// What the image column of a table holds.
pub(super) const A_PATH: &str = "a path";

/// What a split column holds.
pub(super) const SPLITS: &str = "train, val or test";

/// The split that a cell names: the words of `datasets`, scikit-learn, Kaggle and Karpathy's COCO, where `restval` is trained on.
pub(super) fn split_of_cell(word: &str) -> Option<Split> {
    let plain: String = word.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect();
    let plain = ["set", "split", "data", "images"].iter().find_map(|end| plain.strip_suffix(end)).unwrap_or(&plain);
    match plain {
        "train" | "training" | "trn" | "restval" => Some(Split::Train),
        "val" | "valid" | "validation" | "validate" | "dev" | "devel" | "development" => Some(Split::Val),
        "test" | "testing" | "tst" => Some(Split::Test),
        _ => None,
    }
}

/// Numbers that stand for the splits where a column holds all three; of two nobody knows which is which (CUB has 1 for training).
const NUMBERED: [(&str, Split); 3] = [("0", Split::Train), ("1", Split::Val), ("2", Split::Test)];

fn numbered(word: &str) -> Option<Split> {
    NUMBERED.iter().find(|(number, _)| *number == word).map(|(_, split)| *split)
}

/// What all rows together show.
#[derive(Debug, Default)]
pub(super) struct Seen {
    rows: usize,
    /// Words of the split column that name no split.
    words: BTreeSet<String>,
    /// Rows of each split: with the label -1, with another one, and without.
    labels: BTreeMap<Option<Split>, [usize; 3]>,
    /// Whether every label is a whole number.
    numbers: bool,
    /// Rows that have each of [`Field::ALL`].
    has: [usize; 9],
    /// Whether a row has two labels or more.
    several: bool,
    /// Whether a row has a list of labels.
    lists: bool,
}

/// The label of `datasets` for rows that have none.
const NO_LABEL: &str = "-1";

impl Seen {
    pub(super) fn add(&mut self, e: &RawExample, split: Option<Split>) {
        self.numbers = e.label.iter().all(|l| l.parse::<i64>().is_ok()) && (self.numbers || self.rows == 0);
        self.rows += 1;
        let word = e.mistakes.iter().find(|m| m.is_split()).map(|m| m.found.trim_matches('`').to_string());
        let split = split.or_else(|| numbered(word.as_deref()?));
        self.words.extend(word);
        for (count, field) in self.has.iter_mut().zip(Field::ALL) {
            *count += usize::from(field.is_in(e));
        }
        self.lists |= e.labels.is_some();
        self.several |= e.labels.as_ref().is_some_and(|l| l.len() > 1);
        let kind = match (&e.label, &e.labels) {
            (Some(label), _) if label == NO_LABEL => 0,
            (None, Some(labels)) if matches!(labels.as_slice(), [one] if one == NO_LABEL) => 0,
            (None, None) => 2,
            (None, Some(labels)) if labels.is_empty() => 2,
            _ => 1,
        };
        self.labels.entry(split).or_default()[kind] += 1;
    }

    /// Whether -1 is no class: it is all that one split has, and no other split has it.
    fn minus_is_none(&self) -> bool {
        let whole = |[minus, others, _]: &[usize; 3]| *minus > 0 && *others == 0;
        self.labels.len() > 1
            && self.labels.values().any(whole)
            && self.labels.values().all(|c| c[0] == 0 || whole(c))
            && self.labels.values().any(|c| c[1] > 0)
    }

    pub(super) fn rules(&self, reads: Option<&Reads>) -> Rules {
        let minus_is_none = self.minus_is_none();
        let all = |field: Field| self.has[Field::ALL.iter().position(|f| *f == field).unwrap_or(0)];
        // A task that looks at images has nothing to look at without any.
        let some = |field: &Field| (all(*field) > 0 || *field == Field::Image) && (all(*field) < self.rows || minus_is_none);
        Rules {
            reads: reads.cloned(),
            numbered: NUMBERED.iter().all(|(word, _)| self.words.contains(*word)) && self.words.len() == NUMBERED.len(),
            minus_is_none,
            needed: reads.iter().flat_map(|r| &r.needed).copied().filter(some).collect(),
        }
    }

    /// What a reader should know of rows that can be used.
    pub(super) fn notes(&self, rules: &Rules) -> Vec<String> {
        let mut notes = Vec::new();
        if rules.numbered {
            notes.push("the split column has 0, 1 and 2, which are read as train, val and test".into());
        }
        let of = |split: &Option<Split>| split.map(|s| format!(" of {s}")).unwrap_or_default();
        let labelled = self.labels.values().any(|c| c[1] > 0);
        for (split, [minus, others, none]) in self.labels.iter().filter(|_| labelled) {
            if *minus > 0 && rules.minus_is_none {
                notes.push(format!("all {minus} rows{} have the label -1, which stands for no label", of(split)));
            } else if *minus > 0 && self.numbers {
                notes.push(format!(
                    "{minus} rows{} have the label -1, which is read as a class; where it stands for no label, leave it empty",
                    of(split)
                ));
            }
            if *none > 0 && (*others == 0 || !self.lists) {
                let meaning = if self.lists { "; they count as rows that belong to no class" } else { "" };
                notes.push(format!("{none} rows{} have no label{meaning}", of(split)));
            }
        }
        let without = self.labels.get(&None).map_or(0, |c| c.iter().sum::<usize>());
        if without > 0 && self.labels.len() > 1 && self.words.is_empty() {
            notes.push(format!("{without} rows name no split, and are trained on"));
        }
        notes
    }

    /// A note where lists of labels look as if they were not divided: no row has two, and names hold what divides names elsewhere.
    pub(super) fn undivided(&self, names: &[String]) -> Option<String> {
        if self.several {
            return None;
        }
        for mark in [";", ",", "|", "/", "\t"] {
            let joined: Vec<&String> = names.iter().filter(|n| n.contains(mark)).collect();
            let parts: BTreeSet<&str> = names.iter().flat_map(|n| n.split(mark)).map(str::trim).filter(|p| !p.is_empty()).collect();
            // Where a row has one class by right, names such as `tench, Tinca tinca` are none of several: parts recur in lists only.
            let told = if self.lists {
                joined.iter().any(|n| n.split(mark).filter(|p| !p.trim().is_empty()).count() > 1)
            } else {
                joined.len() > 2 && parts.len() < names.len()
            };
            if let Some(first) = joined.first().filter(|_| told) {
                let mark = if mark == "\t" { "\\t" } else { mark };
                return Some(format!(
                    "no row has two labels, and {} of {} class names hold `{mark}`, such as `{first}`: if they are several labels each, \
                     name the column with `labels` and set `label_separator: \"{mark}\"`",
                    joined.len(),
                    names.len()
                ));
            }
        }
        None
    }
}

/// What a task reads of an example.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reads {
    /// What every example has to have.
    pub needed: Vec<Field>,
    /// What is read where it is there.
    pub also: Vec<Field>,
}

impl Reads {
    fn has(&self, field: Field) -> bool {
        field == Field::Place || self.needed.contains(&field) || self.also.contains(&field)
    }
}

/// How the rows of a set are to be understood.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Rules {
    /// What the task reads; nothing where no task is known.
    reads: Option<Reads>,
    /// Whether 0, 1 and 2 are train, val and test.
    numbered: bool,
    minus_is_none: bool,
    /// What some rows have and the task needs of all.
    needed: Vec<Field>,
}

impl Rules {
    pub(super) fn new(reads: Option<&Reads>) -> Self {
        Self { reads: reads.cloned(), ..Self::default() }
    }

    /// An example as it is to be used, or what is wrong with it. `ignored` gets cells that cannot be read where nobody knows
    /// whether they will be.
    pub(super) fn apply(&self, e: &mut RawExample, ignored: Option<&mut Bad>) -> Result<(), Fault> {
        if self.numbered
            && let Some(at) = e.mistakes.iter().position(Mistake::is_split)
        {
            let word = e.mistakes.swap_remove(at).found;
            e.split = numbered(word.trim_matches('`'));
        }
        let minus =
            self.minus_is_none && e.label.as_deref().or(e.labels.as_ref().and_then(|l| l.first()).map(String::as_str)) == Some(NO_LABEL);
        if minus {
            (e.label, e.labels) = (None, None);
        }
        // Whoever has nothing else to look at reads what should have been a text.
        let bare = e.image == ImageRef::Missing && e.texts.is_empty() && e.question.is_none();
        let matters = |m: &Mistake| bare && m.is_text() || self.reads.as_ref().map_or(m.field == Field::Place, |r| r.has(m.field));
        if let Some(at) = e.mistakes.iter().position(matters) {
            return Err(Fault::Cell(e.mistakes.swap_remove(at)));
        }
        if let Some(field) = self.needed.iter().find(|f| !f.is_in(e)) {
            let place = e.place.take().unwrap_or_else(|| e.id.clone());
            return Err(Fault::Lacks { field: *field, place, split: e.split, minus });
        }
        if let Some(ignored) = ignored.filter(|_| self.reads.is_none()) {
            e.mistakes.drain(..).for_each(|m| ignored.add(Fault::Cell(m)));
        }
        (e.mistakes, e.place) = (Vec::new(), None);
        Ok(())
    }
}

/// Why a row cannot be used.
#[derive(Debug)]
pub(super) enum Fault {
    /// A cell is not what its column holds.
    Cell(Mistake),
    /// It has not what the task needs and other rows have.
    Lacks { field: Field, place: String, split: Option<Split>, minus: bool },
    /// Anything else.
    Row(Error),
}

/// Rows that cannot be used, by what is wrong with them: a column of another type is one thing to repair, however long it is.
#[derive(Debug, Default)]
pub(super) struct Bad {
    pub(super) count: usize,
    kinds: Vec<Kind>,
    /// Kinds that are not kept.
    more: usize,
}

#[derive(Debug)]
struct Kind {
    what: String,
    hint: String,
    /// The first rows, and how many there are.
    places: Vec<String>,
    count: usize,
    /// Different values.
    found: Vec<String>,
}

/// So many kinds are kept, and of each so many places and values.
const KINDS: usize = 50;
const SHOWN: usize = 4;

impl Bad {
    pub(super) fn add(&mut self, fault: Fault) {
        let (what, hint, place, found) = match fault {
            Fault::Cell(m) => {
                let hint =
                    if m.is_split() { "`splits: { WORD: train, … }` beside the column's name says what other words mean" } else { "" };
                (format!("column `{}`: expected {}", m.column, m.expected), hint.to_string(), m.place, Some(m.found))
            }
            Fault::Lacks { field, place, split, minus } => {
                let why = if minus { ": -1 stands for none" } else { "" };
                let split = split.map(|s| format!("in {s}, ")).unwrap_or_default();
                (format!("{split}has no {}{why}", field.called()), String::new(), place, None)
            }
            Fault::Row(Error::Input(p)) => (p.message.clone(), p.hint.clone().unwrap_or_default(), p.place.clone(), None),
            Fault::Row(error) => (error.to_string(), String::new(), String::new(), None),
        };
        self.count += 1;
        let kind = match self.kinds.iter().position(|k| k.what == what) {
            Some(at) => &mut self.kinds[at],
            None if self.kinds.len() == KINDS => return self.more += 1,
            None => {
                self.kinds.push(Kind { what, hint, places: Vec::new(), count: 0, found: Vec::new() });
                let last = self.kinds.len() - 1;
                &mut self.kinds[last]
            }
        };
        kind.count += 1;
        if kind.places.len() < SHOWN {
            kind.places.push(place);
        }
        if let Some(found) = found.filter(|f| kind.found.len() <= SHOWN && !kind.found.contains(f)) {
            kind.found.push(found);
        }
    }

    /// A line for each kind.
    pub(super) fn lines(&self) -> Vec<String> {
        let line = |k: &Kind| {
            let more = if k.found.len() > SHOWN { ", …" } else { "" };
            let found = if k.found.is_empty() {
                String::new()
            } else {
                format!(", found {}{more}", k.found[..k.found.len().min(SHOWN)].join(", "))
            };
            let others = match (k.count - 1, k.places.get(1..).unwrap_or_default()) {
                (0, _) => String::new(),
                (n, places) => format!(" ({n} more rows: {}{})", places.join(", "), if n > places.len() { ", …" } else { "" }),
            };
            let place = k.places.first().filter(|p| !p.is_empty()).map(|p| format!("{p}: ")).unwrap_or_default();
            let hint = if k.hint.is_empty() { String::new() } else { format!("; {}", k.hint) };
            format!("{place}{}{found}{others}{hint}", k.what).replace('\n', " ")
        };
        let mut lines: Vec<String> = self.kinds.iter().map(line).collect();
        if self.more > 0 {
            lines.push(format!("and {} more", self.more));
        }
        lines
    }

    /// All of them as one error; `all` says that there is no other row.
    pub(super) fn error(&self, all: bool) -> Error {
        let lines: String = self.lines().iter().map(|l| format!("\n  {l}")).collect();
        let count = self.count;
        let what = if all { format!("none of {count} rows can be read:") } else { format!("{count} rows cannot be read:") };
        let error = Error::input("data", format!("{what}{lines}"));
        match all {
            true => error.hint("name the columns in the recipe, or repair the rows"),
            false => error.hint("repair or remove them, or set `data: { skip_bad: true }` to leave them out"),
        }
    }

    /// What is said where they are left out.
    pub(super) fn note(&self) -> Option<String> {
        let lines = self.lines();
        (self.count > 0)
            .then(|| format!("skipped {} rows that cannot be read; the first: {}", self.count, lines[..lines.len().min(SHOWN)].join("; ")))
    }
}
