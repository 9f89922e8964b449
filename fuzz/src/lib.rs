//! Every parser of the library as a plain function of bytes, made of its public API alone. `cargo fuzz` drives them; `tests/fuzz.rs`
//! replays the corpus and changed copies of it. What is read or refused as bad input is fine; all else panics.

use std::io::{Cursor, Write};
use std::path::Path;
use std::sync::OnceLock;

use peft::clip::decode::{DecodeOptions, decode, decode_rgba};
use peft::clip::preprocess::Preprocess;
use peft::clip::source::Source;
use peft::clip::tokenizer::Tokenizer;
use peft::clip::{ClipConfig, weights};
use peft::data::{CocoConfig, DataConfig, ParquetConfig, Paths, Split, TableConfig, VqaConfig, WebDatasetConfig};
use peft::delta::Delta;
use peft::recipe::Recipe;
use peft::{Model, Result};

/// Reads bytes.
pub type Target = fn(&[u8]);

/// All targets by the name of their corpus.
pub const TARGETS: [(&str, Target); 13] = [
    ("recipe", recipe),
    ("adapter", adapter),
    ("safetensors", safetensors),
    ("pickle", pickle),
    ("archive", archive),
    ("tokenizer", tokenizer),
    ("preprocessor", preprocessor),
    ("config", config),
    ("image", image),
    ("tar", tar),
    ("parquet", parquet),
    ("table", table),
    ("annotations", annotations),
];

/// Whatever is refused is refused as bad input.
fn judge<T>(outcome: Result<T>) -> Option<T> {
    match outcome {
        Ok(value) => Some(value),
        Err(error) => {
            assert_eq!(error.exit_code(), 2, "{error}");
            None
        }
    }
}

/// A directory with these files.
fn directory(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for (name, bytes) in files {
        std::fs::write(dir.path().join(name), bytes).expect("a temporary file");
    }
    dir
}

/// The parts of an input that stands for several files, which `\0\n` separates.
fn parts<const N: usize>(mut bytes: &[u8]) -> [&[u8]; N] {
    std::array::from_fn(|i| {
        let end = bytes.windows(2).position(|w| w == b"\0\n").filter(|_| i + 1 < N);
        let part = &bytes[..end.unwrap_or(bytes.len())];
        bytes = end.map_or(&[][..], |end| &bytes[end + 2..]);
        part
    })
}

/// A recipe's YAML.
pub fn recipe(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Some(recipe) = judge(Recipe::parse("recipe.yaml", text, "recipe", &[])) {
        // What was read can be written, and read again as the same.
        let yaml = recipe.to_yaml().expect("a recipe that was read is written");
        let again = Recipe::parse("again", &yaml, "recipe", &[]).unwrap_or_else(|e| panic!("{yaml}\n{e}"));
        assert_eq!(recipe.to_yaml().ok(), again.to_yaml().ok());
    }
}

/// An adapter directory: configuration, manifest, weights.
pub fn adapter(bytes: &[u8]) {
    static BASE: OnceLock<Model> = OnceLock::new();
    let base = BASE.get_or_init(|| Model::load("builtin:tiny").expect("the embedded base"));
    let [config, manifest, weights] = parts(bytes);
    let mut files = vec![("adapter_config.json", config), ("adapter_model.safetensors", weights)];
    if !manifest.is_empty() {
        files.push(("peft.json", manifest));
    }
    let dir = directory(&files);
    judge(base.fork().with_adapter(dir.path()));
}

/// A safetensors file.
pub fn safetensors(bytes: &[u8]) {
    judge(weights::read_safetensors("x.safetensors", bytes));
}

/// A pickle, in an archive that is sound.
pub fn pickle(bytes: &[u8]) {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in [("archive/data.pkl", bytes), ("archive/data/0", &[0; 64])] {
        zip.start_file(name, options).expect("memory");
        zip.write_all(bytes).expect("memory");
    }
    archive(zip.finish().expect("memory").get_ref());
}

/// A file of `torch.save`: as an adapter, and as the weights of a base.
pub fn archive(bytes: &[u8]) {
    const CONFIG: &[u8] = br#"{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}"#;
    let dir = directory(&[("adapter_config.json", CONFIG), ("adapter_model.bin", bytes), ("pytorch_model.bin", bytes)]);
    judge(Delta::read(dir.path()));
    judge(Delta::read(&dir.path().join("adapter_model.bin")));
    let small =
        br#"{"text_config": {"hidden_size": 8, "num_hidden_layers": 1}, "vision_config": {"hidden_size": 12, "num_hidden_layers": 1}}"#;
    if let Some(config) = judge(ClipConfig::from_json("config.json", small)) {
        judge(weights::load(&Source::Dir(dir.path().to_path_buf()), &config));
    }
}

/// A `tokenizer.json`, and a text; or `vocab.json`, `merges.txt` and a text.
pub fn tokenizer(bytes: &[u8]) {
    let [first, second, text] = parts(bytes);
    let dir = match second.is_empty() {
        true => directory(&[("tokenizer.json", first)]),
        false => directory(&[("vocab.json", first), ("merges.txt", second)]),
    };
    let Some(config) = judge(ClipConfig::from_json("config.json", b"{}")) else { return };
    if let Some(tokenizer) = judge(Tokenizer::load(&Source::Dir(dir.path().to_path_buf()), &config.text)) {
        for text in ["a photo of a cat", &String::from_utf8_lossy(text)] {
            if let Some((ids, _)) = judge(tokenizer.encode(text)) {
                assert!(ids.len() <= tokenizer.context());
            }
        }
    }
}

/// A `preprocessor_config.json`, on a small and on a thin image.
pub fn preprocessor(bytes: &[u8]) {
    let Some(preprocess) = judge(Preprocess::from_json("preprocessor_config.json", bytes)) else { return };
    let (height, width) = preprocess.output_size();
    if preprocess.check("preprocessor_config.json", height).is_ok() && height * width <= 1 << 20 {
        for (width, height) in [(5, 7), (1, 3000), (300, 1)] {
            judge(preprocess.resize_crop(&image::RgbImage::new(width, height)));
        }
    }
}

/// A base's `config.json`.
pub fn config(bytes: &[u8]) {
    judge(ClipConfig::from_json("config.json", bytes));
}

/// An image file.
pub fn image(bytes: &[u8]) {
    let options = DecodeOptions { max_pixels: 1 << 18, ..DecodeOptions::default() };
    let rgb = judge(decode("x.png", bytes, &options));
    if let (Some(rgb), Some(rgba)) = (rgb, judge(decode_rgba("x.png", bytes, &options))) {
        assert_eq!(rgb.dimensions(), rgba.dimensions());
    }
}

/// A source of one file, and all its images.
fn read(data: DataConfig) {
    let Some(data) = judge(data.open(0)) else { return };
    for split in [Split::Train, Split::Val, Split::Test] {
        for example in data.split(split) {
            // A file that a row names lies elsewhere, and is not there.
            judge(example.bytes());
        }
    }
}

fn path(dir: &Path, name: &str) -> Paths {
    Paths::One(dir.join(name).display().to_string())
}

/// A tar of WebDataset.
pub fn tar(bytes: &[u8]) {
    let dir = directory(&[("x.tar", bytes)]);
    read(DataConfig { webdataset: Some(WebDatasetConfig { path: path(dir.path(), "x.tar"), ..Default::default() }), ..Default::default() });
}

/// A Parquet file.
pub fn parquet(bytes: &[u8]) {
    let dir = directory(&[("x.parquet", bytes)]);
    read(DataConfig { parquet: Some(ParquetConfig { path: path(dir.path(), "x.parquet"), ..Default::default() }), ..Default::default() });
}

/// A table: JSONL where it begins with a brace, else CSV and TSV.
pub fn table(bytes: &[u8]) {
    let names: &[&str] = if bytes.first() == Some(&b'{') { &["x.jsonl"] } else { &["x.csv", "x.tsv"] };
    for name in names {
        let dir = directory(&[(name, bytes)]);
        let path = dir.path().join(name);
        if let Some(data) = judge(DataConfig { table: Some(TableConfig { path, ..Default::default() }), ..Default::default() }.open(0)) {
            // Perhaps examples of one split alone, to evaluate on.
            assert!(data.train.len() + data.val.len() + data.test.len() > 0);
        }
    }
}

/// Annotations of COCO and VQA.
pub fn annotations(bytes: &[u8]) {
    let dir = directory(&[("x.json", bytes)]);
    let path = dir.path().join("x.json");
    let coco = CocoConfig { path: path.clone(), val: None, test: None, images: None };
    judge(DataConfig { coco: Some(coco), ..Default::default() }.open(0));
    let vqa = VqaConfig { questions: path.clone(), annotations: Some(path), images: None, pattern: None, val: None, test: None };
    judge(DataConfig { vqa: Some(vqa), ..Default::default() }.open(0));
}
