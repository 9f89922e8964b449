#![allow(clippy::unwrap_used)]

use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::clip::ClipConfig;

fn config() -> TextConfig {
    ClipConfig::from_json("config.json", &Source::Builtin("tiny").require("config.json").unwrap()).unwrap().text
}

/// builtin:tiny's `tokenizer.json`, changed.
fn changed(dir: &Path, change: impl FnOnce(&mut Value)) -> Source {
    let bytes = Source::Builtin("tiny").require("tokenizer.json").unwrap();
    let mut json: Value = serde_json::from_slice(&bytes).unwrap();
    change(&mut json);
    std::fs::write(dir.join("tokenizer.json"), json.to_string()).unwrap();
    Source::Dir(dir.into())
}

fn load_changed(change: impl FnOnce(&mut Value)) -> Result<Tokenizer> {
    let dir = tempfile::tempdir().unwrap();
    Tokenizer::load(&changed(dir.path(), change), &config())
}

#[test]
fn truncation_padding_and_post_processing_of_the_file_are_ignored() {
    let plain = Tokenizer::load(&Source::Builtin("tiny"), &config()).unwrap();
    let odd = load_changed(|json| {
        json["truncation"] = json!({ "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0 });
        json["padding"] = json!({ "strategy": { "Fixed": 77 }, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "!" });
        json["post_processor"] = Value::Null;
        json["decoder"] = Value::Null;
        json["model"]["dropout"] = json!(0.5);
        json["model"]["continuing_subword_prefix"] = json!("");
        json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+");
        json["comment"] = json!({ "by": "a tool" });
    })
    .unwrap();
    let text = "a photo of a very small cat with a hat";
    assert_eq!(odd.encode(text).unwrap(), plain.encode(text).unwrap());
    assert_eq!(odd.digest(), plain.digest());
}

#[test]
fn the_digest_sees_what_changes_ids() {
    let plain = Tokenizer::load(&Source::Builtin("tiny"), &config()).unwrap();
    let shorter = load_changed(|json| drop(json["model"]["merges"].as_array_mut().unwrap().pop())).unwrap();
    let cased = load_changed(|json| drop(json["normalizer"]["normalizers"].as_array_mut().unwrap().pop())).unwrap();
    assert_ne!(plain.digest(), shorter.digest());
    assert_ne!(plain.digest(), cased.digest());
}

#[test]
fn a_long_text_keeps_its_end_token() {
    let tokenizer = Tokenizer::load(&Source::Builtin("tiny"), &TextConfig { max_position_embeddings: 5, ..config() }).unwrap();
    let (whole, cut) = tokenizer.encode("x y z").unwrap();
    assert_eq!((whole.len(), cut), (5, false));
    let (ids, cut) = tokenizer.encode("x y z x").unwrap();
    assert_eq!((ids, cut), (whole, true));
}

#[test]
fn special_tokens_have_the_names_that_the_files_give() {
    let dir = tempfile::tempdir().unwrap();
    let source = changed(dir.path(), |_| {});
    std::fs::write(dir.path().join("special_tokens_map.json"), r#"{"eos_token": {"content": "!"}, "bos_token": "?"}"#).unwrap();
    assert_eq!(Tokenizer::load(&source, &config()).unwrap().encode("").unwrap().0, [30, 0]);
    std::fs::write(dir.path().join("special_tokens_map.json"), r#"{"eos_token": "<nowhere>"}"#).unwrap();
    let message = Tokenizer::load(&source, &config()).unwrap_err().to_string();
    assert!(message.contains("<nowhere>"), "{message}");
}

#[test]
fn broken_files_are_refused_with_the_reason() {
    type Change = fn(&mut Value);
    let cases: [(&str, Change); 10] = [
        ("makes the tokenizers library fail", |j| j["normalizer"]["normalizers"][1]["pattern"]["Regex"] = json!("")),
        ("continuing_subword_prefix", |j| j["model"]["continuing_subword_prefix"] = json!("a prefix longer than any piece")),
        ("model", |j| j["model"] = Value::Null),
        ("valid tokeniser", |j| j["model"]["type"] = json!("Oracle")),
        ("valid tokeniser", |j| j["model"]["merges"][0] = json!("zz yy")),
        ("valid tokeniser", |j| j["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!("(")),
        ("vocab_size", |j| j["model"]["vocab"]["surplus"] = json!(3000)),
        ("added token", |j| j["added_tokens"][0]["id"] = json!(7)),
        ("end token", |j| {
            j["model"]["vocab"].as_object_mut().unwrap().remove("<|endoftext|>");
            j["added_tokens"] = json!([]);
        }),
        ("cannot encode", |j| {
            j["model"]["unk_token"] = json!("<absent>");
            j["model"]["vocab"].as_object_mut().unwrap().retain(|token, _| token.len() > 2);
            j["model"]["merges"] = json!([]);
        }),
    ];
    for (expected, change) in cases {
        let error = load_changed(change).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let message = error.to_string();
        assert!(message.contains(expected) && message.contains("tokenizer.json"), "{expected}: {message}");
    }
}

#[test]
fn a_directory_without_a_tokeniser_says_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let source = Source::Dir(dir.path().into());
    let message = |source: &Source| Tokenizer::load(source, &config()).unwrap_err().to_string();
    assert!(message(&source).contains("vocab.json"));
    std::fs::write(dir.path().join("vocab.json"), r#"{"a": 0, "b": "x"}"#).unwrap();
    assert!(message(&source).contains("token `b`"));
    std::fs::write(dir.path().join("vocab.json"), r#"{"a": 0, "b": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}"#).unwrap();
    assert!(message(&source).contains("merges.txt"));
    std::fs::write(dir.path().join("merges.txt"), "#version: 0.2\na b c\n").unwrap();
    assert!(message(&source).contains("merges.txt:2"));
    assert_eq!(Tokenizer::files(&source).unwrap().len(), 2);
}
