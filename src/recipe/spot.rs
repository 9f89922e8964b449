//! What stands at a place of a recipe's text, for messages.

use serde_json::Value;

/// A value that is not as expected.
#[derive(Debug, PartialEq)]
pub(super) struct Spot {
    /// The key in front of it, where there is one.
    key: Option<String>,
    /// What it is: `the text "x"`, `a list`.
    found: String,
}

/// How sections and options are written that are often written in another way.
const FORMS: [(&str, &str); 18] = [
    ("model", "model: builtin:tiny"),
    ("data", "data: { folder: { root: data/pets } }"),
    ("forget", "forget: { builtin: emoji }"),
    ("folder", "folder: { root: data/pets }"),
    ("table", "table: { path: data/pets.csv }"),
    ("parquet", "parquet: { path: data/*.parquet }"),
    ("coop", "coop: { root: data/caltech-101 }"),
    ("split", "split: { train: 0.7, val: 0.1, test: 0.2 }"),
    ("train", "train: { epochs: 10, lr: 1.0e-3 }"),
    ("early_stopping", "early_stopping: { patience: 8 }"),
    ("augment", "augment: { crop: [0.7, 1.0], flip: true }"),
    ("crop", "crop: [0.7, 1.0]"),
    ("templates", "templates: [\"a photo of a {}.\"]"),
    ("cosine", "cosine: { warmup: 0.05 }"),
    ("images", "images: { background: white }"),
    ("lora", "lora: { rank: 8 }"),
    ("init", "init: { config: builtin:tiny }"),
    ("methods", "methods: { probe: { lr: 1.0e-2 } }"),
];

impl Spot {
    /// What begins at a line and a column, both from 1.
    pub(super) fn at(text: &str, line: usize, column: usize) -> Option<Self> {
        let lines: Vec<&str> = text.lines().collect();
        let own = lines.get(line.checked_sub(1)?)?;
        let from = own.char_indices().nth(column.checked_sub(1)?).map_or(own.len(), |(i, _)| i);
        let (before, rest) = own.split_at(from);
        let above = lines[..line - 1].iter().rev().find(|l| !l.trim().is_empty()).copied().unwrap_or_default();
        let before = if before.trim().trim_matches('-').is_empty() { above } else { before };
        let key = before.trim_end().strip_suffix(':').and_then(last_word);
        Some(Self { key, found: found(rest)? })
    }

    /// A message that begins with what was expected, with what was found and how it is written.
    pub(super) fn complete(&self, message: &str) -> String {
        let composed = message.starts_with("expected a map") || message.starts_with("expected a list");
        let form = self.key.as_ref().filter(|_| composed).and_then(|key| FORMS.iter().find(|(name, _)| name == key));
        let form = form.map(|(_, form)| format!("; for example `{form}`")).unwrap_or_default();
        let found = if message.contains(", found ") { String::new() } else { format!(", found {}", self.found) };
        format!("{message}{found}{form}")
    }
}

fn last_word(text: &str) -> Option<String> {
    let word = text.rsplit(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).next()?;
    (!word.is_empty()).then(|| word.to_string())
}

/// What a value is by its first characters.
fn found(rest: &str) -> Option<String> {
    let rest = rest.trim_start();
    if rest.starts_with('[') || rest.starts_with("- ") || rest == "-" {
        return Some("a list".into());
    }
    if rest.starts_with('{') {
        return Some("a map".into());
    }
    if rest.is_empty() || rest.starts_with('#') {
        return Some("nothing".into());
    }
    let word = match rest.chars().next() {
        Some(quote @ ('"' | '\'')) => rest[1..].split(quote).next().map(quoted)?,
        _ => {
            let word = rest.split([',', ']', '}']).next()?.split(" #").next()?.trim();
            if word.ends_with(':') || word.contains(": ") {
                return Some("a map".into());
            }
            match serde_saphyr::from_str::<Value>(word) {
                Ok(Value::Null) => "nothing".into(),
                Ok(Value::Bool(b)) => format!("the value {b}"),
                Ok(Value::Number(_)) => format!("the number {word}"),
                _ => quoted(word),
            }
        }
    };
    Some(word)
}

fn quoted(text: &str) -> String {
    const SHOWN: usize = 40;
    let short: String = text.chars().take(SHOWN).collect();
    format!("the text {short:?}{}", if text.chars().count() > SHOWN { " …" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_right() {
        let base = [("model", "builtin:tiny"), ("method", "lora"), ("data", "{ builtin: emoji }"), ("task", "classify")];
        for (key, form) in FORMS {
            let part = match key {
                "folder" | "table" | "parquet" | "coop" => format!("data: {{ {form} }}"),
                "split" => format!("data: {{ builtin: emoji, {form} }}"),
                "early_stopping" | "augment" => format!("train: {{ {form} }}"),
                "crop" => format!("train: {{ augment: {{ {form} }} }}"),
                "cosine" => format!("train: {{ schedule: {{ {form} }} }}"),
                "templates" => format!("task: {{ classify: {{ {form} }} }}"),
                "lora" => format!("method: {{ {form} }}"),
                "init" => format!("model: {{ {form} }}\nmethod: full"),
                "methods" => format!("compare: {{ {form} }}"),
                _ => form.to_string(),
            };
            let others = base.iter().filter(|(k, _)| !part.lines().any(|l| l.starts_with(&format!("{k}:"))));
            let text = others.map(|(k, v)| format!("{k}: {v}\n")).collect::<String>() + &part;
            let recipe = crate::recipe::Recipe::parse("r.yaml", &text, "r", &[]);
            assert!(recipe.is_ok(), "{text}\n{:?}", recipe.err());
        }
    }

    #[test]
    fn what_stands_at_a_place_is_named() {
        let text = "train:\n  - a\ndata: { folder: data/x, shots: 3 }\n";
        let spot = |line, column| Spot::at(text, line, column).map(|s| (s.key.unwrap_or_default(), s.found));
        assert_eq!(spot(2, 3), Some(("train".into(), "a list".into())));
        assert_eq!(spot(3, 17), Some(("folder".into(), "the text \"data/x\"".into())));
        assert_eq!(spot(3, 32), Some(("shots".into(), "the number 3".into())));
        assert_eq!(spot(9, 1), None);
    }
}
