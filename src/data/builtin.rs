//! The icon sets inside the binary.

use peft_adapters::rng;
use rand::Rng;
use serde::Deserialize;

use super::{ImageRef, Raw, RawExample, Source, Split};
use crate::builtin;
use crate::clip::decode::{self, DecodeOptions};
use crate::clip::preprocess::Background;
use crate::error::{Error, Result};

/// `builtin: emoji` or `builtin: emoji-flat`: icons with 20 classes. With `-names` behind it: all
/// icons of the set with their names as texts, every one in the test split, to measure naming. With `-questions`: three questions
/// about each icon with their answers. With `-ink`: how much of the square each icon fills, in per cent.
pub(super) struct Builtin(pub(super) String);

#[derive(Deserialize)]
struct Header {
    classes: Vec<String>,
    items: Vec<Item>,
}

#[derive(Deserialize)]
struct Item {
    id: String,
    name: String,
    label: Option<usize>,
    group: String,
    split: Option<Split>,
    offset: usize,
    len: usize,
}

impl Source for Builtin {
    fn place(&self) -> String {
        format!("builtin:{}", self.0)
    }

    fn read(&self) -> Result<Raw> {
        if let Some(set) = self.0.strip_suffix(NAMES) {
            return names(set);
        }
        if let Some(set) = self.0.strip_suffix(QUESTIONS) {
            return questions(Builtin(set.into()).read()?);
        }
        if let Some(set) = self.0.strip_suffix(INK) {
            return inked(Builtin(set.into()).read()?);
        }
        let (header, bytes) = open(&self.0)?;
        let mut raw = Raw { classes: Some(header.classes.clone()), ..Default::default() };
        // Icons outside the classes have no split: they serve naming, not this task.
        for item in header.items {
            let (Some(label), Some(split)) = (item.label, item.split) else { continue };
            raw.examples.push(RawExample {
                image: ImageRef::Embedded(&bytes[item.offset..item.offset + item.len]),
                id: item.id,
                texts: vec![item.name],
                label: header.classes.get(label).cloned(),
                group: Some(item.group),
                split: Some(split),
                ..Default::default()
            });
        }
        Ok(raw)
    }
}

const NAMES: &str = "-names";

const QUESTIONS: &str = "-questions";

const INK: &str = "-ink";

/// Each icon with its ink: 100 minus the mean brightness on white, in per cent.
fn inked(mut icons: Raw) -> Result<Raw> {
    let options = DecodeOptions { background: Background::White, ..DecodeOptions::default() };
    for icon in &mut icons.examples {
        let ImageRef::Embedded(bytes) = icon.image else { continue };
        let image = decode::decode(&icon.id, bytes, &options)?;
        let light: u64 = image.as_raw().iter().map(|v| u64::from(*v)).sum();
        icon.value = Some(100.0 - 100.0 * light as f64 / (255 * image.as_raw().len().max(1)) as f64);
    }
    Ok(icons)
}

/// Of each icon what it is, whether it is that, and whether it is something else, drawn by its name. Each question is also its
/// text, and the answer its class.
fn questions(icons: Raw) -> Result<Raw> {
    let kinds = icons.classes.unwrap_or_default();
    let mut examples = Vec::with_capacity(3 * icons.examples.len());
    for icon in icons.examples {
        let Some(own) = kinds.iter().position(|k| Some(k) == icon.label.as_ref()) else { continue };
        let draw = rng::rng(0, &[rng::name_key("question"), rng::name_key(&icon.id)]).random_range(1..kinds.len().max(2));
        let other = &kinds[(own + draw) % kinds.len()];
        let asked = [
            ("what is this?".to_string(), kinds[own].as_str()),
            (format!("is this a {}?", kinds[own]), "yes"),
            (format!("is this a {other}?"), "no"),
        ];
        examples.extend(asked.into_iter().enumerate().map(|(i, (question, answer))| RawExample {
            id: format!("{}?{i}", icon.id),
            texts: vec![question.clone()],
            question: Some(question),
            answers: vec![answer.to_string()],
            choices: if i == 0 { kinds.clone() } else { vec!["yes".into(), "no".into()] },
            label: Some(answer.to_string()),
            // Icons without a group of their own: their questions stay together.
            group: Some(icon.group.clone().unwrap_or_else(|| icon.id.clone())),
            ..icon.clone()
        }));
    }
    Ok(Raw { classes: Some(kinds.into_iter().chain(["yes".into(), "no".into()]).collect()), examples, ..Raw::default() })
}

fn names(set: &str) -> Result<Raw> {
    let (header, bytes) = open(set)?;
    let examples = header.items.into_iter().map(|item| RawExample {
        image: ImageRef::Embedded(&bytes[item.offset..item.offset + item.len]),
        id: item.id,
        texts: vec![format!("an icon of a {}", item.name)],
        split: Some(Split::Test),
        ..Default::default()
    });
    Ok(Raw { examples: examples.collect(), ..Default::default() })
}

fn open(name: &str) -> Result<(Header, &'static [u8])> {
    let Some(pack) = builtin::pack(name) else {
        return Err(Error::input(
            "data.builtin",
            format!(
                "there is no embedded set `{name}`; there are {}, each also with -names, -questions or -ink behind it",
                builtin::PACKS.join(", ")
            ),
        ));
    };
    let broken = || Error::fault(format!("builtin:{name}"), "the embedded data is broken");
    let end = pack.iter().position(|b| *b == b'\n').ok_or_else(broken)?;
    let header = serde_json::from_slice(&pack[..end]).map_err(|_| broken())?;
    Ok((header, &pack[end + 1..]))
}
