//! `--set KEY=VALUE` on a recipe, and keys that are null: each has its default, as if it were left out.

use serde_json::{Map, Value};

use super::Recipe;
use super::load::{explain, message};
use crate::error::{Error, Result};

/// What holds a name with options: a name without them has its default options.
const NAMED: [&str; 7] = ["method", "task", "fusion", "optimizer", "schedule", "loss", "negatives"];

/// Events that aliases may stand for in a recipe that is read as a tree.
const MAX_UNFOLDED: usize = 50_000;

/// The recipe of a file's text with `sets` applied; `unset` is what was wrong with the file before.
///
/// # Errors
/// With the file's own position where the fault was there before.
pub(super) fn apply(place: &str, text: &str, sets: &[String], unset: Option<serde_saphyr::Error>) -> Result<Recipe> {
    // Aliases and merge keys unfold in memory here: a recipe needs few of them.
    let limits = serde_saphyr::options! { alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: MAX_UNFOLDED } };
    let mut value: Value = serde_saphyr::from_str_with_options(text, limits).map_err(|e| explain(place, text, &e))?;
    let mut nulls = Vec::new();
    for set in sets {
        let (key, raw) = set
            .split_once('=')
            .ok_or_else(|| Error::input("--set", format!("expected KEY=VALUE, found `{set}`")).hint("for example --set train.lr=1e-3"))?;
        if raw.trim().is_empty() {
            return Err(Error::input("--set", format!("expected a value, found `{set}`"))
                .hint(format!("--set {key}=null takes it back to its default")));
        }
        let new: Value = serde_saphyr::from_str(raw).map_err(|e| explain(&format!("--set {key}"), raw, &e))?;
        if new.is_null() {
            erase(&mut value, key)?;
            nulls.push((format!("--set {key}"), key.to_string()));
        } else {
            assign(&mut value, key, new)?;
        }
    }
    settle(&mut value, "", &mut |key| nulls.push((place.to_string(), key)));
    let place_of_set = match sets {
        [] => place.to_string(),
        sets => format!("{place} with --set {}", sets.join(" --set ")),
    };
    let resolved = serde_saphyr::to_string(&value).map_err(|e| Error::fault(place, e))?;
    let recipe = serde_saphyr::from_str(&resolved).map_err(|e| match unset {
        // The file was wrong before: its own position is the better one.
        Some(before) if sets.is_empty() || message(&before) == message(&e) => explain(place, text, &before),
        _ => explain(&place_of_set, &resolved, &e),
    })?;
    nulls.into_iter().try_for_each(|(place, key)| known(&value, &place, &key))?;
    Ok(recipe)
}

/// A null is no reason to take a key that there is not.
fn known(value: &Value, place: &str, key: &str) -> Result<()> {
    let mut with = value.clone();
    choose(&mut with, key);
    assign(&mut with, key, Value::Null)?;
    let text = serde_saphyr::to_string(&with).map_err(|e| Error::fault(place, e))?;
    match serde_saphyr::from_str::<Recipe>(&text) {
        // Without this key it was a recipe, so that any part of the key may be the unknown one.
        Err(e) if ["unknown field `", "unknown name `"].iter().any(|m| message(&e).contains(m)) => Err(explain(place, &text, &e)),
        _ => Ok(()),
    }
}

/// Where the key says another name than the value has (`method.prefix.length` of a `lora`), that name stands alone.
fn choose(mut at: &mut Value, key: &str) {
    let parts: Vec<&str> = key.split('.').collect();
    for pair in parts.windows(2) {
        let Some(next) = at.get_mut(pair[0]) else { return };
        let items = next.is_array();
        if NAMED.contains(&pair[0]) && !items && next.get(pair[1]).is_none() {
            *next = Value::Object(Map::from_iter([(pair[1].to_string(), Value::Object(Map::new()))]));
        }
        at = next;
    }
}

/// Takes nulls out of maps and names each; the only option of a name becomes the name's defaults.
fn settle(value: &mut Value, path: &str, found: &mut impl FnMut(String)) {
    let name = path.rsplit('.').find(|part| part.parse::<usize>().is_err()).unwrap_or_default();
    let below = |key: &str| if path.is_empty() { key.to_string() } else { format!("{path}.{key}") };
    match value {
        Value::Object(map) => {
            if NAMED.contains(&name) && map.len() == 1 {
                map.values_mut().filter(|v| v.is_null()).for_each(|v| *v = Value::Object(Map::new()));
            }
            let nulls: Vec<String> = map.iter().filter(|(_, v)| v.is_null()).map(|(k, _)| below(k)).collect();
            map.retain(|_, v| !v.is_null());
            nulls.into_iter().for_each(&mut *found);
            map.iter_mut().for_each(|(key, value)| settle(value, &below(key), found));
        }
        Value::Array(items) => items.iter_mut().enumerate().for_each(|(i, item)| settle(item, &below(&i.to_string()), found)),
        _ => {}
    }
}

/// Makes `a.b.c` null where it is there, and nothing on the way to it.
fn erase(at: &mut Value, key: &str) -> Result<()> {
    let (part, rest) = split(key)?;
    let next = match at {
        Value::Array(items) => {
            let len = items.len();
            let item = part.parse::<usize>().ok().and_then(|i| items.get_mut(i));
            Some(item.ok_or_else(|| in_list(part, len))?)
        }
        Value::Object(map) => map.get_mut(part),
        _ => None,
    };
    match (next, rest) {
        (Some(next), Some(rest)) => erase(next, rest),
        (Some(next), None) => {
            *next = Value::Null;
            Ok(())
        }
        (None, _) => Ok(()),
    }
}

/// Sets `a.b.c` or `a.0.b`, making maps on the way.
fn assign(at: &mut Value, key: &str, new: Value) -> Result<()> {
    let (part, rest) = split(key)?;
    let next = match (at, part.parse::<usize>()) {
        (Value::Array(items), index) => {
            let len = items.len();
            index.ok().and_then(|i| items.get_mut(i)).ok_or_else(|| in_list(part, len))?
        }
        (at, _) => {
            if !at.is_object() {
                *at = Value::Object(Map::new());
            }
            let Value::Object(map) = at else { return Ok(()) };
            map.entry(part).or_insert(Value::Null)
        }
    };
    match rest {
        Some(rest) => assign(next, rest, new),
        None => {
            *next = new;
            Ok(())
        }
    }
}

fn split(key: &str) -> Result<(&str, Option<&str>)> {
    let (part, rest) = key.split_once('.').map_or((key, None), |(part, rest)| (part, Some(rest)));
    match part.is_empty() {
        true => Err(Error::input("--set", format!("`{key}` is not a key such as train.lr"))),
        false => Ok((part, rest)),
    }
}

fn in_list(part: &str, len: usize) -> Error {
    Error::input("--set", format!("the list has {len} items, there is no {part}"))
        .hint("an item of a list is named by its number from 0, as in method.0.lora.rank=4")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "model: builtin:tiny\nmethod: { lora: { rank: 4 } }\ndata: { builtin: emoji }\ntask: classify\n\
                        train: { epochs: 3, batch: 8, early_stopping: { patience: 2 }, augment: { flip: true } }\n";

    fn parse(text: &str, sets: &[&str]) -> Result<Recipe> {
        let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
        Recipe::parse("r.yaml", text, "r", &sets)
    }

    #[test]
    fn null_is_a_default() {
        let plain = TEXT.replace("batch: 8, early_stopping: { patience: 2 }, augment: { flip: true }", "clip_norm: 1.0");
        let expected = parse(&plain, &["train.clip_norm=null"]).ok();
        assert!(expected.is_some());
        let sets = ["train.batch=null", "train.early_stopping=null", "train.augment=null"];
        assert_eq!(parse(TEXT, &sets).ok(), expected);
        let file = TEXT.replace("8", "null").replace("{ patience: 2 }", "null").replace("{ flip: true }", "~");
        assert_eq!(parse(&file, &[]).ok(), expected, "{file}");
        // What is not there is not made on the way to the key.
        assert_eq!(
            parse(&plain, &["train.clip_norm=null", "train.augment.flip=null", "train.early_stopping.patience=null"]).ok(),
            expected
        );
        let lora = parse(TEXT, &["method=lora"]).ok();
        assert_eq!(parse(TEXT, &["method.lora=null"]).ok(), lora);
        assert_eq!(parse(TEXT, &["method.lora.rank=null"]).ok(), lora);
    }

    #[test]
    fn null_excuses_no_unknown_key() {
        for set in ["train.epochz=null", "trian.epochs=null", "method.lora.rnak=null", "train.augment.flop=null"] {
            let message = parse(TEXT, &[set]).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(message.contains("unknown field"), "{set}: {message}");
        }
        for set in ["method.lroa=null", "method.lroa.rank=null", "method.0=null", "task.clasify=null", "train.schedule.cosin=null"] {
            let message = parse(TEXT, &[set]).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(message.contains("unknown name"), "{set}: {message}");
        }
        for set in ["method.prefix.length=null", "train.schedule.cosine.warmup=null", "train.optimizer.adamw=null"] {
            assert_eq!(parse(TEXT, &[set]).ok(), parse(TEXT, &[]).ok(), "{set}");
        }
        assert!(parse(&(TEXT.to_string() + "outptu: null\n"), &[]).is_err());
        assert!(parse(TEXT, &["model=null"]).is_err() && parse(TEXT, &["train.lr="]).is_err());
        // A list's items are named by numbers; the list is not replaced by what was meant for one of them.
        assert!(parse(TEXT, &["method=[lora, ia3]", "method.lora.rank=2"]).is_err());
    }

    /// Each section and each kind of option, with each kind of value: no message speaks of serde's data model.
    #[test]
    fn messages_are_for_people() {
        const RAW: [&str; 12] = [
            "mapping start",
            "sequence start",
            "scalar",
            "invalid type",
            "untagged",
            "variant",
            "expected struct",
            "EOF",
            "enum",
            "usize",
            "f64",
            "unit value",
        ];
        let keys = [
            "model",
            "model.base",
            "method",
            "method.lora",
            "method.lora.rank",
            "method.lora.targets",
            "data",
            "data.builtin",
            "data.split",
            "data.split.train",
            "data.shots",
            "data.skip_bad",
            "data.parquet.path",
            "task",
            "task.classify.templates",
            "task.classify.head",
            "train",
            "train.epochs",
            "train.lr",
            "train.dtype",
            "train.augment",
            "train.augment.crop",
            "train.early_stopping",
            "train.schedule",
            "train.optimizer.adamw",
            "train.tensorboard",
            "images",
            "images.background",
            "compare.methods",
            "compare.methods.a",
            "forget",
            "output",
            "fusion",
            "fusion.concat.hidden",
        ];
        let mut refused = 0;
        for key in keys {
            for value in ["x", "[x]", "3", "1.5", "-1", "true", "{}", "{ x: 1 }", "[1, [2]]", "null"] {
                let Err(error) = parse(TEXT, &[&format!("{key}={value}")]) else { continue };
                refused += 1;
                let message = error.to_string();
                // The snippet holds what somebody wrote.
                let said = message.lines().next().unwrap_or_default();
                assert!(!RAW.iter().any(|raw| said.contains(raw)), "{key}={value}: {said}");
            }
        }
        assert!(refused > 150, "{refused}");
    }
}
