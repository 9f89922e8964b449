//! VQA v2 (Goyal et al. 2017, arXiv 1612.00837): questions, and in another file the answers of ten annotators to each.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::coco::{Entry, find, read_json};
use super::identity::numbered_apart;
use super::{ImageRef, Raw, RawExample, Source, Split};
use crate::error::{Error, Result};

/// Question and annotation files of VQA, one pair for each split. An example is a question; its image is the group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VqaConfig {
    /// `v2_OpenEnded_mscoco_train2014_questions.json`.
    pub questions: PathBuf,
    /// `v2_mscoco_train2014_annotations.json`; questions to be answered have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<PathBuf>,
    /// Where the images are; looked for beside the questions and beside their directory when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<PathBuf>,
    /// What images are called: `{}` is the number with 12 digits. `COCO_<data_subtype>_{}.jpg` when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pattern: Option<String>,
    /// Files of their own for validation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub val: Option<VqaFiles>,
    /// Files of their own for testing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test: Option<VqaFiles>,
}

/// The files of a split.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VqaFiles {
    /// The questions.
    pub questions: PathBuf,
    /// The answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<PathBuf>,
    /// As for training when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<PathBuf>,
}

impl Source for VqaConfig {
    fn place(&self) -> String {
        self.questions.display().to_string()
    }

    fn read(&self) -> Result<Raw> {
        let Self { questions, annotations, images, .. } = self.clone();
        let own = (self.val.is_some() || self.test.is_some()).then_some(Split::Train);
        let train = VqaFiles { questions, annotations, images };
        let mut raw = Raw::default();
        for (files, split) in [(Some(&train), own), (self.val.as_ref(), Some(Split::Val)), (self.test.as_ref(), Some(Split::Test))] {
            if let Some(files) = files {
                self.split(files, split, &mut raw)?;
            }
        }
        numbered_apart(&mut raw.examples);
        Ok(raw)
    }
}

#[derive(Deserialize)]
struct Questions {
    questions: Vec<Entry<Question>>,
    #[serde(default)]
    data_subtype: Option<String>,
}

#[derive(Deserialize)]
struct Question {
    question_id: u64,
    image_id: u64,
    question: String,
    #[serde(default)]
    multiple_choices: Vec<String>,
}

#[derive(Deserialize)]
struct Annotations {
    annotations: Vec<Entry<Annotation>>,
}

#[derive(Deserialize)]
struct Annotation {
    question_id: u64,
    answers: Vec<Answer>,
}

#[derive(Deserialize)]
struct Answer {
    answer: String,
}

impl VqaConfig {
    fn split(&self, files: &VqaFiles, split: Option<Split>, raw: &mut Raw) -> Result<()> {
        let mut answers = match &files.annotations {
            Some(path) => Some((path, answers(path, &mut raw.bad)?)),
            None => None,
        };
        let path = &files.questions;
        let file: Questions = read_json(path, "{\"questions\": […]}")?;
        let pattern = self.pattern(path, file.data_subtype.as_deref())?;
        let mut root = None;
        for (i, question) in file.questions.into_iter().enumerate() {
            let place = || format!("{}: question {i}", path.display());
            let expected = "{\"question_id\": number, \"image_id\": number, \"question\": string}";
            let Some(q) = question.checked(&place, expected, &mut raw.bad) else { continue };
            let own = match &mut answers {
                None => Vec::new(),
                Some((path, answers)) => match answers.remove(&q.question_id) {
                    Some(own) => own,
                    None => {
                        let message =
                            format!("question_id {}: there is no annotation in {}, or it was taken before", q.question_id, path.display());
                        raw.bad.push(Error::input(place(), message));
                        continue;
                    }
                },
            };
            let name = pattern.replace("{}", &format!("{:012}", q.image_id));
            let images = files.images.as_ref().or(self.images.as_ref());
            let root = root.get_or_insert_with(|| images.cloned().unwrap_or_else(|| find(path, &name)));
            raw.examples.push(RawExample {
                id: q.question_id.to_string(),
                image: ImageRef::File(root.join(&name)),
                question: Some(q.question.trim().to_string()),
                answers: own,
                choices: q.multiple_choices,
                group: Some(q.image_id.to_string()),
                split,
                ..Default::default()
            });
        }
        Ok(())
    }

    fn pattern(&self, path: &Path, subtype: Option<&str>) -> Result<String> {
        match (&self.pattern, subtype) {
            (Some(pattern), _) if !pattern.contains("{}") => {
                Err(Error::input("data.vqa.pattern", format!("expected {{}} where the image's number stands, found `{pattern}`")))
            }
            (Some(pattern), _) => Ok(pattern.clone()),
            (None, Some(subtype)) => Ok(format!("COCO_{subtype}_{{}}.jpg")),
            (None, None) => Err(Error::input(path.display(), "does not say which images it is about (data_subtype)")
                .hint("data.vqa.pattern does, for example COCO_val2014_{}.jpg")),
        }
    }
}

fn answers(path: &Path, bad: &mut Vec<Error>) -> Result<HashMap<u64, Vec<String>>> {
    let file: Annotations = read_json(path, "{\"annotations\": […]}")?;
    let mut all = HashMap::with_capacity(file.annotations.len());
    for (i, annotation) in file.annotations.into_iter().enumerate() {
        let place = || format!("{}: annotation {i}", path.display());
        let expected = "{\"question_id\": number, \"answers\": [{\"answer\": string}, …]}";
        let Some(a) = annotation.checked(&place, expected, bad) else { continue };
        let texts: Vec<String> = a.answers.into_iter().map(|a| a.answer.trim().to_string()).filter(|a| !a.is_empty()).collect();
        if texts.is_empty() {
            bad.push(Error::input(place(), "has no answer"));
        } else if all.insert(a.question_id, texts).is_some() {
            bad.push(Error::input(place(), format!("question {} is answered twice", a.question_id)));
        }
    }
    Ok(all)
}
