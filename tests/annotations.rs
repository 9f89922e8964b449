//! COCO's captions and VQA's questions in their published layouts.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use peft::data::{DataConfig, Dataset, Example, ImageRef, Split};
use serde_json::{Value, json};

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn json(&self, name: &str, value: &Value) -> &Self {
        self.bytes(name, value.to_string().as_bytes())
    }

    fn bytes(&self, name: &str, bytes: &[u8]) -> &Self {
        std::fs::create_dir_all(self.at(name).parent().unwrap()).unwrap();
        std::fs::write(self.at(name), bytes).unwrap();
        self
    }

    fn locate(&self, name: &str) -> DataConfig {
        DataConfig::locate(&self.at(name).display().to_string()).unwrap()
    }
}

fn all(data: &Dataset) -> Vec<&Example> {
    let mut all: Vec<&Example> = [Split::Train, Split::Val, Split::Test].into_iter().flat_map(|s| data.split(s)).collect();
    all.sort_by(|a, b| a.id.cmp(&b.id));
    all
}

/// `instances_*.json` has more keys; these are what captions have, and some that nobody reads.
fn captions(images: Value, annotations: Value) -> Value {
    json!({"info": {"year": 2014}, "licenses": [], "images": images, "annotations": annotations})
}

#[test]
fn captions_of_an_image_are_its_texts() {
    let files = Files::new();
    let image = |id: u64, set: &str| json!({"id": id, "file_name": format!("COCO_{set}2014_{id:012}.jpg"), "height": 480, "license": 5});
    let caption = |id: u64, image: u64, text: &str| json!({"id": id, "image_id": image, "caption": text});
    files
        .json(
            "annotations/captions_train2014.json",
            &captions(
                json!([image(9, "train"), image(25, "train"), image(30, "train")]),
                json!([caption(1, 25, "a giraffe"), caption(2, 9, "food\n"), caption(3, 25, "two giraffes")]),
            ),
        )
        .json("annotations/captions_val2014.json", &captions(json!([image(42, "val")]), json!([caption(4, 42, "a shoe")])))
        .json("annotations/instances_val2014.json", &json!({"categories": []}))
        .bytes("train2014/COCO_train2014_000000000009.jpg", b"x")
        .bytes("val2014/COCO_val2014_000000000042.jpg", b"y");
    let config = files.locate("annotations");
    assert_eq!(config.kind(), "coco");
    let data = config.open(0).unwrap();
    let found = all(&data);
    // Image 30 has no caption.
    assert_eq!(
        found.iter().map(|e| e.texts.clone()).collect::<Vec<_>>(),
        [vec!["food"], vec!["a giraffe", "two giraffes"], vec!["a shoe"]]
    );
    assert_eq!(
        (found[0].group.as_deref(), &*found[0].bytes().unwrap(), &*found[2].bytes().unwrap()),
        (Some("9"), b"x".as_slice(), b"y".as_slice())
    );
    assert_eq!((data.val.len(), data.val[0].id.as_str()), (1, "COCO_val2014_000000000042.jpg"));
}

#[test]
fn broken_annotations_are_named_together() {
    let files = Files::new();
    let images = json!([{"id": 1, "file_name": "1.jpg"}, {"id": 1, "file_name": "2.jpg"}, {"id": "x"}]);
    let annotations = json!([
        {"image_id": 1, "caption": "fine"}, {"image_id": 1, "caption": "fine too"}, {"image_id": 7, "caption": "no image"}, {"image_id": 1}
    ]);
    files.json("captions.json", &captions(images, annotations));
    let config = files.locate("captions.json");
    let error = config.open(0).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let message = error.to_string();
    for part in [
        "4 rows",
        "image 1: the id 1 occurs twice",
        "image 2: expected {\"id\"",
        "annotation 2: there is no image 7",
        "annotation 3: expected",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    let data = DataConfig { skip_bad: true, ..config }.open(0).unwrap();
    assert_eq!((all(&data).len(), data.skipped), (1, 4));
    files.bytes("broken.json", b"{\"images\": [");
    assert!(DataConfig::locate(&files.at("broken.json").display().to_string()).unwrap_err().to_string().contains("neither COCO"));
}

fn question(id: u64, image: u64, text: &str) -> Value {
    json!({"image_id": image, "question": text, "question_id": id})
}

fn annotation(id: u64, answers: &[&str]) -> Value {
    let answers: Vec<Value> =
        answers.iter().enumerate().map(|(i, a)| json!({"answer": a, "answer_confidence": "yes", "answer_id": i + 1})).collect();
    json!({"question_type": "what", "multiple_choice_answer": "net", "answers": answers, "image_id": 1, "answer_type": "other", "question_id": id})
}

#[test]
fn questions_meet_the_answers_of_their_annotators() {
    let files = Files::new();
    let ten = ["net", "net", "net", "netting", "net", "net", "mesh", "net", "net", "net"];
    let head = |subtype: &str, questions: Value| json!({"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": subtype, "questions": questions});
    files
        .json(
            "v2_OpenEnded_mscoco_train2014_questions.json",
            &head(
                "train2014",
                json!([question(262148000, 262148, "Where is he looking?"), question(262148001, 262148, "What is he on top of?")]),
            ),
        )
        .json(
            "v2_mscoco_train2014_annotations.json",
            &json!({"annotations": [annotation(262148001, &ten), annotation(262148000, &["down"; 10])]}),
        )
        .json("v2_OpenEnded_mscoco_val2014_questions.json", &head("val2014", json!([question(393225000, 393225, "What website?")])))
        .json("v2_mscoco_val2014_annotations.json", &json!({"annotations": [annotation(393225000, &["foodiebaker.com"; 10])]}))
        .bytes("images/train2014/COCO_train2014_000000262148.jpg", b"x");
    let config = files.locate("");
    assert_eq!(config.kind(), "vqa");
    let data = config.open(0).unwrap();
    let found = all(&data);
    assert_eq!(
        (found[1].question.as_deref(), found[1].answers.as_slice()),
        (Some("What is he on top of?"), ten.map(String::from).as_slice())
    );
    // One image, two questions: the image's group keeps them in one split.
    assert_eq!((found[0].group.as_deref(), found[0].image == found[1].image), (Some("262148"), true));
    assert_eq!(&*found[0].bytes().unwrap(), b"x");
    assert_eq!(data.val[0].id, "393225000");
    assert!(matches!(&data.val[0].image, ImageRef::File(p) if p.ends_with("COCO_val2014_000000393225.jpg")));
}

#[test]
fn questions_without_their_answers_are_named() {
    let files = Files::new();
    files.json("questions.json", &json!({"questions": [question(1, 5, "a?"), question(2, 5, "b?"), {"question": "c?"}]}));
    files.json("annotations.json", &json!({"annotations": [annotation(1, &["x"]), annotation(1, &["y"]), annotation(3, &[" "])]}));
    let config = files.locate("questions.json");
    assert!(config.open(0).unwrap_err().to_string().contains("data_subtype"));
    let vqa = |pattern: &str| {
        let mut config = config.clone();
        config.vqa.as_mut().unwrap().pattern = Some(pattern.into());
        config
    };
    assert!(vqa("x.jpg").open(0).unwrap_err().to_string().contains("data.vqa.pattern"));
    let message = vqa("{}.jpg").open(0).unwrap_err().to_string();
    for part in [
        "4 rows",
        "annotation 1: question 1 is answered twice",
        "annotation 2: has no answer",
        "question 1: question_id 2: there is no annotation",
        "question 2: expected",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    // Questions that are to be answered come without annotations.
    let mut config = DataConfig { skip_bad: true, ..vqa("{}.jpg") };
    config.vqa.as_mut().unwrap().annotations = None;
    let data = config.open(0).unwrap();
    assert_eq!(all(&data).len(), 2);
    assert!(all(&data).iter().all(
        |e| e.answers.is_empty() && matches!(&e.image, ImageRef::File(p) if p.file_name() == Path::new("000000000005.jpg").file_name())
    ));
}
