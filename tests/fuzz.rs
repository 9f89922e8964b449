//! The fuzzer's targets without the fuzzer: the corpus, what the fuzzer found, and some thousands of changed copies, always the same.
#![allow(clippy::unwrap_used)]

#[path = "../fuzz/src/lib.rs"]
#[allow(clippy::expect_used, missing_docs, unreachable_pub)]
mod targets;

use std::io::Read as _;
use std::path::{Path, PathBuf};

use peft_adapters::rng;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use targets::TARGETS;

/// Changed copies for each target, unless `PEFT_MUTATIONS` says another number.
const MUTATIONS: usize = 1000;

/// Longer inputs are for the fuzzer.
const LONGEST: usize = 16 << 10;

/// Files of the tests themselves that are seeds as they are.
const SHARED: [(&str, &[&str]); 3] = [
    ("image", &["tests/data/images/sources"]),
    ("tar", &["tests/data/sets/wds"]),
    ("parquet", &["tests/data/sets/codecs", "tests/data/sets/hf"]),
];

fn files(dir: &Path) -> Vec<Vec<u8>> {
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).filter(|p| p.is_file()).collect();
    paths.sort();
    paths.iter().map(|p| std::fs::read(p).unwrap()).collect()
}

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let own = files(&root.join("fuzz/corpus").join(target));
    assert!(!own.is_empty(), "fuzz/corpus/{target} is empty");
    let shared = SHARED.iter().filter(|(name, _)| *name == target).flat_map(|(_, dirs)| *dirs).flat_map(|d| files(&root.join(d)));
    own.into_iter().chain(shared).filter(|bytes| bytes.len() <= LONGEST).collect()
}

/// What the fuzzer found to reach other code than the corpus.
fn found(target: &str) -> Vec<Vec<u8>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/found").join(target).with_extension("tar.gz");
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(std::fs::File::open(path).unwrap()));
    let bytes = |entry: std::io::Result<tar::Entry<'_, _>>| {
        let mut bytes = Vec::new();
        entry.unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    };
    archive.entries().unwrap().map(bytes).collect()
}

fn replay(name: &str) {
    peft::guard::hush();
    let (_, target) = TARGETS.into_iter().find(|(n, _)| *n == name).unwrap();
    let attempt = |what: &str, i: usize, bytes: &[u8]| {
        // Where it is to be found after a hang or an abort.
        std::fs::write(Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{name}")), bytes).unwrap();
        let outcome = std::panic::catch_unwind(|| target(bytes));
        assert!(outcome.is_ok(), "{name}, {what} {i}: {:?}", String::from_utf8_lossy(&bytes[..bytes.len().min(400)]));
    };
    let seeds = seeds(name);
    seeds.iter().enumerate().for_each(|(i, bytes)| attempt("seed", i, bytes));
    found(name).iter().enumerate().for_each(|(i, bytes)| attempt("found input", i, bytes));
    let count = std::env::var("PEFT_MUTATIONS").map_or(MUTATIONS, |n| n.parse().unwrap());
    for i in 0..count {
        let mut rng = rng::rng(7, &[rng::name_key(name), i as u64]);
        attempt("mutation", i, &mutated(&seeds, &mut rng));
    }
}

/// A number that parsers trip over.
fn odd(rng: &mut ChaCha8Rng) -> u64 {
    const ODD: [u64; 12] = [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 1 << 63, u64::MAX];
    ODD[rng.random_range(0..ODD.len())]
}

/// A seed with one to four changes.
fn mutated(seeds: &[Vec<u8>], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut bytes = seeds[rng.random_range(0..seeds.len())].clone();
    for _ in 0..rng.random_range(1..5) {
        change(&mut bytes, seeds, rng);
        bytes.truncate(4 * LONGEST);
    }
    bytes
}

fn change(bytes: &mut Vec<u8>, seeds: &[Vec<u8>], rng: &mut ChaCha8Rng) {
    let len = bytes.len();
    let at = rng.random_range(0..len + 1);
    let some = |rng: &mut ChaCha8Rng| rng.random_range(0..(len - at).min(64) + 1);
    match rng.random_range(0..9) {
        0 if at < len => bytes[at] ^= 1 << rng.random_range(0..8),
        1 if at < len => bytes[at] = odd(rng) as u8,
        2 => bytes.truncate(at),
        3 => {
            let end = at + some(rng);
            drop(bytes.drain(at..end));
        }
        4 => {
            let piece = bytes[at..at + some(rng)].to_vec();
            let times = rng.random_range(1..20);
            drop(bytes.splice(at..at, piece.repeat(times)));
        }
        // A part of another seed.
        5 => {
            let other = &seeds[rng.random_range(0..seeds.len())];
            let from = rng.random_range(0..other.len() + 1);
            let end = (from + rng.random_range(0..200)).min(other.len());
            drop(bytes.splice(at..at, other[from..end].iter().copied()));
        }
        // A length or an offset.
        6 => {
            let (number, width) = (odd(rng), [2, 4, 8][rng.random_range(0..3)]);
            let number =
                if rng.random_bool(0.5) { number.to_le_bytes()[..width].to_vec() } else { number.to_be_bytes()[8 - width..].to_vec() };
            let end = (at + width).min(len);
            drop(bytes.splice(at..end, number));
        }
        // A number in text.
        7 => {
            let Some(from) = (at..len).find(|i| bytes[*i].is_ascii_digit()) else { return };
            let end = (from..len).find(|i| !bytes[*i].is_ascii_digit()).unwrap_or(len);
            let text = ["-1", "0", "1e999", "99999999999999999999", "1.5", "null", "[]", "1e308", "16777217"][rng.random_range(0..9)];
            drop(bytes.splice(from..end, text.bytes()));
        }
        // A character that ends or begins something.
        _ => {
            let one = b"\"'{}[](),:\n\r\t\0\\#&*!|>%@`-? "[rng.random_range(0..27)];
            bytes.insert(at, one);
        }
    }
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(#[test] fn $name() { replay(stringify!($name)); })*

        #[test]
        fn each_target_is_replayed() {
            assert_eq!([$(stringify!($name)),*], TARGETS.map(|(name, _)| name));
        }
    };
}

targets! { recipe adapter safetensors pickle archive tokenizer preprocessor config image tar parquet table annotations }
