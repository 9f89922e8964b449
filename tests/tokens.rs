//! The tokeniser against transformers' CLIPTokenizer (`scripts/goldens/tokens.py`).
#![allow(clippy::unwrap_used)]

use std::path::Path;

use peft::clip::ClipConfig;
use peft::clip::source::Source;
use peft::clip::tokenizer::Tokenizer;
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
}

fn check(source: &Source) -> String {
    let place = source.place("config.json");
    let config = ClipConfig::from_json(&place, peft::builtin::file("tiny", "config.json").unwrap()).unwrap();
    let tokenizer = Tokenizer::load(source, &config.text).unwrap();
    let cases: Vec<Case> = serde_json::from_str(include_str!("data/tokens.json")).unwrap();
    assert!(cases.len() >= 200);
    let mut cut = 0;
    for case in &cases {
        let (ids, truncated) = tokenizer.encode(&case.text).unwrap();
        assert_eq!(ids, case.ids, "{:?}", case.text);
        cut += usize::from(truncated);
    }
    let texts: Vec<String> = cases.iter().map(|c| c.text.clone()).collect();
    let (all, counted) = tokenizer.encode_all(&texts).unwrap();
    assert_eq!(counted, cut);
    assert!(cut >= 5 && all.iter().zip(&cases).all(|(a, c)| *a == c.ids));
    tokenizer.digest().to_string()
}

#[test]
fn ids_equal_transformers_from_either_kind_of_files() {
    let whole = check(&Source::Builtin("tiny"));
    let dir = tempfile::tempdir().unwrap();
    for name in ["vocab.json", "merges.txt"] {
        std::fs::write(dir.path().join(name), peft::builtin::file("tiny", name).unwrap()).unwrap();
    }
    assert_eq!(check(&Source::Dir(dir.path().to_path_buf())), whole);
}

#[test]
fn a_tokeniser_larger_than_the_model_is_refused() {
    let source = Source::Builtin("tiny");
    let config = ClipConfig::from_json("config.json", br#"{"text_config": {"vocab_size": 100}}"#).unwrap();
    let message = Tokenizer::load(&source, &config.text).unwrap_err().to_string();
    assert!(message.contains("2999") && message.contains("100"), "{message}");
    assert!(Tokenizer::load(&Source::Dir(Path::new("/nonexistent").into()), &config.text).is_err());
}
