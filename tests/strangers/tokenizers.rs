//! Tokeniser files.

use std::path::Path;

use peft::clip::ClipConfig;
use peft::clip::source::Source;
use peft::clip::tokenizer::Tokenizer;
use serde_json::{Value, json};

use super::Expect::{Either, Fine, Refused};
use super::{Case, Expect};

fn tiny(name: &str) -> Vec<u8> {
    peft::builtin::file("tiny", name).unwrap().to_vec()
}

/// Loads a directory's tokeniser and encodes a caption.
fn case(name: impl Into<String>, expect: Expect, make: impl FnOnce(&Path) + 'static) -> Case {
    Case::new(name, expect, move |dir| {
        make(dir);
        let source = Source::Dir(dir.to_path_buf());
        Box::new(move || {
            let config = ClipConfig::from_json("config.json", &tiny("config.json"))?;
            let tokenizer = Tokenizer::load(&source, &config.text)?;
            tokenizer.encode(&"a caption of some length, with 12 numbers and  spaces ".repeat(20)).map(drop)
        })
    })
}

fn edited(name: impl Into<String>, expect: Expect, change: impl FnOnce(&mut Value) + 'static) -> Case {
    case(name, expect, move |dir| {
        let mut value: Value = serde_json::from_slice(&tiny("tokenizer.json")).unwrap();
        change(&mut value);
        std::fs::write(dir.join("tokenizer.json"), value.to_string()).unwrap();
    })
}

fn raw(name: impl Into<String>, expect: Expect, bytes: impl Into<Vec<u8>>) -> Case {
    let bytes = bytes.into();
    case(name, expect, move |dir| std::fs::write(dir.join("tokenizer.json"), bytes).unwrap())
}

pub(crate) fn cases() -> Vec<Case> {
    const FILE: &str = "tokenizer.json";
    let whole = tiny(FILE);
    let mut cases = vec![
        edited("as it should be", Fine, |_| ()),
        raw("empty", Refused(FILE), ""),
        raw("a list", Refused(FILE), "[]"),
        raw("an object", Refused("model"), "{}"),
        raw("deep", Refused(FILE), "[".repeat(1 << 20)),
        raw("a million zeros", Refused("values"), format!("{{\"model\": [{}0]}}", "0,".repeat(2 << 20))),
        raw("not UTF-8", Refused(FILE), b"{\"model\": \"\xff\"}".to_vec()),
    ];
    for percent in [1, 25, 50, 75, 99] {
        cases.push(raw(format!("cut at {percent} %"), Refused(FILE), &whole[..whole.len() * percent / 100]));
    }
    for key in ["type", "vocab", "merges", "unk_token", "end_of_word_suffix", "fuse_unk", "byte_fallback", "continuing_subword_prefix"] {
        for odd in ["-1", "1000000000", "\"x\"", "[]", "{}"] {
            let value: Value = serde_json::from_str(odd).unwrap();
            cases.push(edited(format!("model.{key}: {odd}"), Either, move |v| v["model"][key] = value));
        }
    }
    for (key, odd) in
        ["normalizer", "pre_tokenizer", "added_tokens"].iter().flat_map(|k| ["3", "\"x\"", "[1]", "{\"type\": \"x\"}"].map(|o| (*k, o)))
    {
        let value: Value = serde_json::from_str(odd).unwrap();
        cases.push(edited(format!("{key}: {odd}"), Refused(FILE), move |v| v[key] = value));
    }
    cases.extend(growing());
    cases.push(edited("an id beyond the table", Refused("vocab_size"), |v| v["model"]["vocab"]["zzz"] = 1_000_000.into()));
    cases.push(edited("an id of four billion", Refused("vocab_size"), |v| v["model"]["vocab"]["zzz"] = 4_294_967_295u64.into()));
    cases.push(edited("a negative id", Refused(FILE), |v| v["model"]["vocab"]["zzz"] = (-1).into()));
    cases.push(edited("merges of what is not there", Refused(FILE), |v| v["model"]["merges"] = json!(["qq zz"])));
    cases.push(edited("no vocabulary", Refused(FILE), |v| v["model"]["vocab"] = json!({})));
    cases.push(edited("no merges", Either, |v| v["model"]["merges"] = json!([])));
    cases.push(edited("an expression without end", Refused(FILE), |v| v["pre_tokenizer"] = split("(")));
    for slow in ["(a+)+$", "(.*)*x", "(([a-z ])+.)+[0-9]{40}Q", r"(\w+\s?)+\1{20}$"] {
        cases.push(edited(format!("a slow expression {slow}"), Either, move |v| v["pre_tokenizer"] = split(slow)));
    }
    cases.extend(neighbours());
    cases
}

fn split(regex: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false})
}

/// Normalisers that make texts longer, again and again.
fn growing() -> Vec<Case> {
    let replace = |pattern: Value, content: String| json!({"type": "Replace", "pattern": pattern, "content": content});
    let sequence = |items: Vec<Value>| json!({"type": "Sequence", "normalizers": items});
    let twice = replace(json!({"String": "a"}), "aa".into());
    let bombs = [
        ("doubled forty times", sequence(vec![twice.clone(); 40])),
        ("doubled in nested sequences", sequence(vec![sequence(vec![twice; 20]); 2])),
        ("each character a megabyte", replace(json!({"Regex": "."}), "x".repeat(1 << 20))),
        ("what matches nothing", sequence(vec![replace(json!({"Regex": "x*"}), "  ".into()); 20])),
        ("an empty pattern", sequence(vec![replace(json!({"String": ""}), "  ".into()); 20])),
        ("put in front", json!({"type": "Prepend", "prepend": "x".repeat(1 << 20)})),
    ];
    bombs.into_iter().map(|(name, value)| edited(name, Refused("times as long"), move |v| v["normalizer"] = value)).collect()
}

/// `vocab.json` and `merges.txt`, and what stands beside a tokeniser.
fn neighbours() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut pair = |name: &str, expect, vocab: &'static [u8], merges: &'static [u8]| {
        cases.push(case(name, expect, move |dir| {
            std::fs::write(dir.join("vocab.json"), if vocab.is_empty() { tiny("vocab.json") } else { vocab.to_vec() }).unwrap();
            std::fs::write(dir.join("merges.txt"), if merges.is_empty() { tiny("merges.txt") } else { merges.to_vec() }).unwrap();
        }));
    };
    pair("vocabulary and merges", Fine, b"", b"");
    pair("a vocabulary of texts", Refused("expected an id"), b"{\"a\": \"b\"}", b"");
    pair("a vocabulary of fractions", Refused("expected an id"), b"{\"a\": 1.5}", b"");
    pair("a vocabulary of negatives", Refused("expected an id"), b"{\"a\": -1}", b"");
    pair("a vocabulary of huge numbers", Refused("expected an id"), b"{\"a\": 1e300}", b"");
    pair("a list for a vocabulary", Refused("vocab.json"), b"[]", b"");
    pair("merges of three", Refused("merges.txt:2"), b"", b"#version: 0.2\na b c\n");
    pair("merges of one", Refused("merges.txt:1"), b"", b"abc\n");
    pair("merges in Latin-1", Refused("UTF-8"), b"", b"\xe9 a\n");
    pair("merges of the unknown", Refused("vocab.json"), b"", b"qqqq zzzz\n");
    for (name, text) in [("special_tokens_map.json", "[]"), ("tokenizer_config.json", "\"x\""), ("special_tokens_map.json", "{")] {
        cases.push(case(format!("{name}: {text}"), Refused(name), move |dir| {
            std::fs::write(dir.join("tokenizer.json"), tiny("tokenizer.json")).unwrap();
            std::fs::write(dir.join(name), text).unwrap();
        }));
    }
    for odd in ["\"nowhere\"", "{\"content\": \"nowhere\"}"] {
        cases.push(case(format!("eos_token: {odd}"), Refused("nowhere"), move |dir| {
            std::fs::write(dir.join("tokenizer.json"), tiny("tokenizer.json")).unwrap();
            std::fs::write(dir.join("special_tokens_map.json"), format!("{{\"eos_token\": {odd}}}")).unwrap();
        }));
    }
    cases
}
