//! COCO's captions: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::identity::{name_in, numbered_apart};
use super::paths::common;
use super::{ImageRef, Raw, RawExample, Source, Split};
use crate::error::{Error, Result};
use crate::{files, json};

/// Larger annotation files are refused; VQA v2 has 400 MB.
const MAX_JSON: u64 = 2 << 30;

/// Caption files of COCO, one for each split. All captions of an image are its texts; the image is the group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CocoConfig {
    /// `captions_train2017.json`.
    pub path: PathBuf,
    /// A file of its own for validation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub val: Option<PathBuf>,
    /// A file of its own for testing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test: Option<PathBuf>,
    /// Where the images are; looked for beside the file and beside its directory when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<PathBuf>,
}

impl Source for CocoConfig {
    fn place(&self) -> String {
        self.path.display().to_string()
    }

    fn read(&self) -> Result<Raw> {
        let mut raw = Raw::default();
        let own = (self.val.is_some() || self.test.is_some()).then_some(Split::Train);
        let mut roots = Vec::new();
        for (path, split) in [(Some(&self.path), own), (self.val.as_ref(), Some(Split::Val)), (self.test.as_ref(), Some(Split::Test))] {
            if let Some(path) = path {
                roots.extend(read(path, self.images.as_deref(), split, &mut raw)?);
            }
        }
        numbered_apart(&mut raw.examples);
        // Two directories may have images of the same name.
        let mut names = HashSet::new();
        if roots.len() > 1 && !raw.examples.iter().all(|e| names.insert(e.id.clone())) {
            let root = common(&roots.iter().map(|root| root.join("image")).collect::<Vec<_>>());
            for example in &mut raw.examples {
                if let ImageRef::File(path) = &example.image {
                    example.id = name_in(&root, path);
                }
            }
        }
        Ok(raw)
    }
}

/// An entry as it should be, or as it is.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum Entry<T> {
    Fine(T),
    Bad(Value),
}

impl<T> Entry<T> {
    /// The entry; a bad one goes to `bad` with its place and what was expected.
    pub(super) fn checked(self, place: &dyn Fn() -> String, expected: &str, bad: &mut Vec<Error>) -> Option<T> {
        match self {
            Self::Fine(entry) => Some(entry),
            Self::Bad(found) => {
                let found: String = found.to_string().chars().take(80).collect();
                bad.push(Error::input(place(), format!("expected {expected}, found {found}")));
                None
            }
        }
    }
}

#[derive(Deserialize)]
struct Captions {
    images: Vec<Entry<Image>>,
    annotations: Vec<Entry<Caption>>,
}

#[derive(Deserialize)]
struct Image {
    id: u64,
    file_name: String,
}

#[derive(Deserialize)]
struct Caption {
    image_id: u64,
    caption: String,
}

/// What an annotation file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Captions,
    Questions,
    Other,
}

/// Finds out by its keys.
pub(super) fn kind(path: &Path) -> Result<Kind> {
    #[derive(Deserialize)]
    struct Keys {
        images: Option<serde::de::IgnoredAny>,
        annotations: Option<serde::de::IgnoredAny>,
        questions: Option<serde::de::IgnoredAny>,
    }
    Ok(match json::from_large_slice(&files::read(path, MAX_JSON)?) {
        Ok(Keys { questions: Some(_), .. }) => Kind::Questions,
        Ok(Keys { images: Some(_), annotations: Some(_), .. }) => Kind::Captions,
        _ => Kind::Other,
    })
}

/// Reads an annotation file.
pub(super) fn read_json<T: serde::de::DeserializeOwned>(path: &Path, expected: &str) -> Result<T> {
    let bytes = files::read(path, MAX_JSON)?;
    json::from_large_slice(&bytes).map_err(|e| Error::input(path.display(), format!("expected {expected}: {e}")))
}

/// Reads one file; what comes back is the directory of its images.
fn read(path: &Path, images: Option<&Path>, split: Option<Split>, raw: &mut Raw) -> Result<Option<PathBuf>> {
    let file: Captions = read_json(path, "{\"images\": […], \"annotations\": […]}")?;
    let mut index: HashMap<u64, usize> = HashMap::new();
    let mut root = None;
    for (i, image) in file.images.into_iter().enumerate() {
        let place = || format!("{}: image {i}", path.display());
        let Some(Image { id, file_name }) = image.checked(&place, "{\"id\": number, \"file_name\": string}", &mut raw.bad) else {
            continue;
        };
        if index.contains_key(&id) {
            raw.bad.push(Error::input(place(), format!("the id {id} occurs twice")));
            continue;
        }
        index.insert(id, raw.examples.len());
        let root = root.get_or_insert_with(|| images.map_or_else(|| find(path, &file_name), Path::to_path_buf));
        let image = ImageRef::File(root.join(&file_name));
        raw.examples.push(RawExample { id: file_name, image, group: Some(id.to_string()), split, ..Default::default() });
    }
    for (i, caption) in file.annotations.into_iter().enumerate() {
        let place = || format!("{}: annotation {i}", path.display());
        let expected = "{\"image_id\": number, \"caption\": string}";
        let Some(Caption { image_id, caption }) = caption.checked(&place, expected, &mut raw.bad) else { continue };
        match index.get(&image_id).and_then(|&at| raw.examples.get_mut(at)) {
            Some(_) if caption.trim().is_empty() => raw.bad.push(Error::input(place(), "the caption is empty")),
            Some(example) => example.texts.push(caption.trim().to_string()),
            None => raw.bad.push(Error::input(place(), format!("there is no image {image_id}"))),
        }
    }
    // Images without captions have nothing to say; COCO's test images are such.
    raw.examples.retain(|e| !e.texts.is_empty());
    Ok(root)
}

/// The directory from which an image is found: the file's own, one beside it or one level up, or one below these.
pub(super) fn find(path: &Path, image: &str) -> PathBuf {
    let beside = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_path_buf();
    let above = beside.join("..");
    for root in [&beside, &above] {
        let below = super::folder::directories(root).unwrap_or_default();
        let deeper = below.iter().flat_map(|d| super::folder::directories(d).unwrap_or_default());
        if let Some(found) = std::iter::once(root.clone()).chain(below.clone()).chain(deeper).find(|d| d.join(image).is_file()) {
            return found;
        }
    }
    beside
}
