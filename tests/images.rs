//! Images become the pixels that transformers' `CLIPImageProcessorPil` makes of them; see
//! scripts/goldens/images.py.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use peft::clip::decode::{DecodeOptions, decode, decode_rgba, open};
use peft::clip::preprocess::{Background, Preprocess};
use serde::Deserialize;

#[derive(Deserialize)]
struct Goldens {
    configs: BTreeMap<String, serde_json::Value>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    source: String,
    config: String,
    expected: String,
    lossy: bool,
    white: bool,
    orient: bool,
    values: Vec<(usize, f32)>,
}

impl Case {
    fn options(&self) -> DecodeOptions {
        let background = if self.white { Background::White } else { Background::Keep };
        DecodeOptions { background, orient: self.orient, ..DecodeOptions::default() }
    }

    /// Largest and mean difference of 8-bit values.
    fn differences(&self, p: &Preprocess) -> (u8, f64) {
        let found = p.resize_crop(&open(&source(&self.source), &self.options()).unwrap()).unwrap();
        let expected = image::open(data().join("expected").join(&self.expected)).unwrap().into_rgb8();
        assert_eq!(found.dimensions(), expected.dimensions(), "{}", self.expected);
        let all: Vec<u8> = found.iter().zip(expected.iter()).map(|(a, b)| a.abs_diff(*b)).collect();
        let sum: u64 = all.iter().map(|d| u64::from(*d)).sum();
        (all.iter().copied().max().unwrap(), sum as f64 / all.len() as f64)
    }
}

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/images")
}

fn source(name: &str) -> PathBuf {
    data().join("sources").join(name)
}

fn goldens() -> Goldens {
    serde_json::from_slice(&std::fs::read(data().join("cases.json")).unwrap()).unwrap()
}

fn preprocess(goldens: &Goldens, config: &str) -> Preprocess {
    Preprocess::from_json(config, goldens.configs[config].to_string().as_bytes()).unwrap()
}

#[test]
fn pixels_are_those_of_transformers() {
    let goldens = goldens();
    let mut wrong = Vec::new();
    for case in &goldens.cases {
        let (max, mean) = case.differences(&preprocess(&goldens, &case.config));
        println!("{:40} max {max:3}  mean {mean:.4}", case.expected);
        if if case.lossy { mean > 0.5 } else { max > 1 } {
            wrong.push(format!("{}: max {max}, mean {mean:.4}", case.expected));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Every kind of source file is listed by a directory scan.
#[test]
fn normalised_values_are_those_of_transformers() {
    let goldens = goldens();
    for case in goldens.cases.iter().filter(|c| !c.lossy) {
        let p = preprocess(&goldens, &case.config);
        let image = open(&source(&case.source), &case.options()).unwrap();
        let found = p.apply(&image).unwrap();
        let step = if p.do_rescale { 1.0 / 255.0 } else { 1.0 };
        let smallest = if p.do_normalize { p.std.into_iter().fold(1.0, f32::min) } else { 1.0 };
        for (at, expected) in &case.values {
            let off = (found[*at] - expected).abs();
            assert!(off <= step / smallest * 1.001, "{} at {at}: {} for {expected}", case.expected, found[*at]);
        }
    }
}
