//! Reading a recipe: YAML text, `--set`, and errors that show the place and the nearest key.

use std::path::Path;

use peft_adapters::wording::plain;
use serde_json::Value;

use super::spot::Spot;
use super::{Recipe, nulls};
use crate::error::{Error, Result};
use crate::files;

/// A recipe is a page of text; anything larger is a mistake.
const MAX_BYTES: u64 = 1 << 20;

impl Recipe {
    /// Reads a recipe file, applies `sets` (`train.lr=1e-3`) and fills in what follows from the file's name.
    ///
    /// # Errors
    /// With line, column, snippet and the nearest valid key where the file is wrong.
    pub fn load(path: &Path, sets: &[String]) -> Result<Self> {
        let text = files::read_text(path, MAX_BYTES).map_err(|e| match path.exists() {
            true => e,
            false => e.hint("`peft recipes` lists those in the binary, `peft new` writes one for your data"),
        })?;
        let name = path.file_stem().map_or("recipe".into(), |s| s.to_string_lossy().into_owned());
        Self::parse(&path.display().to_string(), &text, &name, sets)
    }

    /// Reads a recipe from text; `place` stands in messages, `name` names the run directory.
    ///
    /// # Errors
    /// As [`Recipe::load`].
    pub fn parse(place: &str, text: &str, name: &str, sets: &[String]) -> Result<Self> {
        let text = text.trim_start_matches('\u{feff}');
        let whole = serde_saphyr::from_str::<Self>(text);
        let mut recipe = match (whole, sets.is_empty()) {
            (Ok(recipe), true) => recipe,
            // A recipe may lack what `--set` gives, and `key: null` is as good as leaving the key out: only the outcome counts.
            (whole, _) => nulls::apply(place, text, sets, whole.err())?,
        };
        recipe.name = name.to_string();
        if recipe.output.is_none() {
            recipe.output = Some(Path::new("runs").join(name));
        }
        recipe.validate(place)?;
        Ok(recipe)
    }

    /// The recipe with every default written out.
    ///
    /// # Errors
    /// When it cannot be written as YAML.
    pub fn to_yaml(&self) -> Result<String> {
        // By way of JSON, which leaves absent options out.
        let unwritable = |e| Error::input("recipe", e).hint("choose paths, --output among them, whose names are UTF-8");
        yaml(&serde_json::to_value(self).map_err(unwritable)?)
    }
}

/// A recipe that was read before, as YAML.
///
/// # Errors
/// When it cannot be written as YAML.
pub fn yaml(recipe: &Value) -> Result<String> {
    let mut value = recipe.clone();
    prune(&mut value);
    serde_saphyr::to_string(&value).map_err(|e| Error::fault("recipe", e))
}

/// Drops nulls, which stand for "left out".
fn prune(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, v| !v.is_null());
            map.values_mut().for_each(prune);
        }
        Value::Array(items) => items.iter_mut().for_each(prune),
        _ => {}
    }
}

pub(super) fn message(error: &serde_saphyr::Error) -> String {
    let text = error.without_snippet().to_string();
    // The position follows on the same line.
    let text = text.rsplit_once(" at line ").map_or(text.as_str(), |(head, _)| head);
    // What the crate's users may do about it is not what a recipe's author may.
    let text = text.split(", set DuplicateKeyPolicy").next().unwrap_or(text);
    if text.starts_with("invalid u") || text.starts_with("invalid usize") {
        return "expected a whole number from 0".into();
    }
    if text.contains("from_str_multiple") || text.contains("multiple documents") {
        return "expected one YAML document, found several".into();
    }
    if text.starts_with("expected mapping end") {
        return "expected one key here, found more; several methods are written as a list: [{ lora: { … } }, { bottleneck: { … } }]".into();
    }
    if text == "unexpected end of input" {
        return "expected a recipe, found nothing".into();
    }
    plain(text)
}

/// serde's message with the file's name, what stands there, the snippet and the nearest valid key.
pub(super) fn explain(place: &str, text: &str, error: &serde_saphyr::Error) -> Error {
    let at = error.location().map(|l| (l.line() as usize, l.column() as usize));
    let position = at.map(|(line, column)| format!(":{line}:{column}")).unwrap_or_default();
    // Under the caret the message would stand once more.
    let caret = |l: &str| l.rfind('^').filter(|_| l.trim_start().starts_with('|')).map_or(l.len(), |at| at + 1);
    let snippet: Vec<String> = error.to_string().lines().skip(2).map(|l| format!("  {}", &l[..caret(l)])).collect();
    let mut message = message(error);
    let hint = nearest(&message);
    let spot = at.and_then(|(line, column)| Spot::at(text, line, column));
    if let Some(spot) = spot.filter(|_| message.starts_with("expected ")) {
        message = spot.complete(&message);
    }
    if !snippet.is_empty() {
        message = format!("{message}\n{}", snippet.join("\n"));
    }
    let error = Error::input(format!("{place}{position}"), message);
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

/// "unknown field `epochz`, expected one of lr, epochs" → "did you mean `epochs`?".
fn nearest(message: &str) -> Option<String> {
    let (_, rest) = message.split_once("unknown ")?;
    let found = rest.split('`').nth(1)?;
    let (_, expected) = rest.split_once("expected ")?;
    let known: Vec<&str> =
        expected.trim_start_matches("one of ").split([',', '`']).map(str::trim).filter(|s| !s.is_empty() && *s != "or").collect();
    let best = known.iter().map(|k| (strsim::jaro_winkler(found, k), k)).max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 > 0.7).then(|| format!("did you mean `{}`?", best.1))
}
