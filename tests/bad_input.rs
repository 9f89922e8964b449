//! What is wrong is said with its place, and nothing is written.
#![allow(clippy::unwrap_used)]

mod common;

use common::World;

#[test]
fn arguments_that_name_no_file() {
    let w = World::new();
    let predict = |labels: &str| w.fails(&["predict", "--model", "base", "--labels", labels, "data/red/0.png"], 2);
    assert!(predict("nosuch.txt").contains("no such file"));
    assert!(predict("data").contains("is a directory"));
    let message = w.fails(&["eval", "recipe.yaml", "--predictions", "data"], 2);
    assert!(message.contains("data: is a directory"), "{message}");
    let message = w.fails(&["eval", "recipe.yaml", "--predictions", "recipe.yaml"], 2);
    assert!(message.contains("--predictions"), "{message}");
}

#[test]
fn malformed_recipes() {
    let w = World::new();
    let good = w.recipe("lora: { rank: 2 }");
    let cases: Vec<(String, &str)> = vec![
        (good.replace("epochs", "epochz"), "did you mean `epochs`?"),
        (good.replace("train:", "trian:"), "trian"),
        (good.replace("epochs: 4", "epochs: 4, steps: 3"), "exclude each other"),
        (good.replace("epochs: 4", "epochs: -1"), "epochs"),
        (good.replace("epochs: 4", "epochs: 0"), "expected 1 to"),
        (good.replace("batch: 8", "batch: many"), "recipe.yaml:7"),
        (good.replace("lr: 1.0e-2", "lr: 0"), "train.lr"),
        (good.replace("lr: 1.0e-2", "lr: .nan"), "train.lr"),
        (good.replace("seed: 3", "label_smoothing: 1.5"), "label_smoothing"),
        (good.replace("seed: 3", "optimizer: adam"), "adamw"),
        (good.replace("seed: 3", "optimizer: { adamw: { betas: [0.9, 1.0] } }"), "betas"),
        (good.replace("seed: 3", "schedule: { cosine: { warmup: 2 } }"), "warmup"),
        (good.replace("seed: 3", "clip_norm: 0"), "clip_norm"),
        (good.replace("seed: 3", "ema: 1"), "train.ema"),
        (good.replace("seed: 3", "augment: { crop: [0.9, 0.1] }"), "train.augment.crop"),
        (good.replace("seed: 3", "dtype: f8"), "dtype"),
        (good.replace("seed: 3", "early_stopping: { metric: beauty }"), "beauty"),
        (good.replace("seed: 3", "init_adapter: nowhere"), "nowhere"),
        (good.replace("lora: { rank: 2 }", "lorra: { rank: 2 }"), "did you mean `lora`?"),
        (good.replace("rank: 2", "rnk: 2"), "did you mean `rank`?"),
        (good.replace("rank: 2", "rank: 1000"), "found 1000"),
        (good.replace("rank: 2", "targets: [nothing]"), "self_attn.q_proj"),
        (good.replace("{ lora: { rank: 2 } }", "none"), "trains nothing"),
        (good.replace("lora: { rank: 2 }", "adalora: { init_r: 1000000000 }"), "describes more than"),
        (good.replace("lora: { rank: 2 }", "prefix: { reparameterise: 100000000 }"), "describes more than"),
        (good.replace("lora: { rank: 2 }", "bottleneck: { hypercomplex: { n: 1, rank: 1000000000 } }"), "describes more than"),
        (good.replace("lora: { rank: 2 }", "bottleneck: { hypercomplex: { n: 1000000 } }"), "describes more than"),
        (good.replace("lora: { rank: 2 }", "tip_adapter: { alpha_steps: 1000000000 }"), "a product of at most 1000000"),
        (good.replace("{ lora: { rank: 2 } }", "[lora, lora]"), "two methods"),
        (good.replace("a {} thing", "a thing"), "`{}`"),
        (good.replace("[\"a {} thing\"]", "[]"), "at least one template"),
        (good.replace("classify", "clasify"), "clasify"),
        (good.replace("model: base", "model: nowhere"), "no such directory"),
        (good.replace("model: base", "model: builtin:huge"), "builtin:tiny"),
        (good.replace("model: base", "model: { init: { config: base } }"), "method: full"),
        (good.replace("model: base\n", ""), "model"),
        (good.replace("root: data", "root: nowhere"), "nowhere"),
        (good.replace("root: data", "root: base"), "no image"),
        (good.replace("folder: { root: data }", "builtin: emoticons"), "emoji"),
        (good.replace("folder: { root: data }", "folder: { root: data }\n  builtin: emoji"), "exactly one source"),
        (good.replace("folder: { root: data }", "shots: 2"), "exactly one source"),
        (good.replace("folder: { root: data }", "folder: { root: data }\n  shots: 0"), "data.shots"),
        (good.replace("folder: { root: data }", "folder: { root: data }\n  split: { train: 0.9, val: 0.2, test: 0.2 }"), "add up to 1"),
        (good.replace("folder: { root: data }", "table: { path: nowhere.csv }"), "nowhere.csv"),
        (good.replace("model:", "model: base\nmodel:"), "duplicate"),
        (good.replace("output: run", "output: \"\""), "output: expected a directory"),
        (good.replace("model: base", "model: \"\""), "empty name"),
        (good.replace("model: base", "model: { foo: 1 }"), "init"),
        (good.replace("rank: 2", "rank: 2, alpha_pattern: { q_proj: .nan }"), "alpha_pattern.q_proj"),
        (good.replace("rank: 2", "rank: 2, alpha: 1.0e+308"), "at most"),
        (good.replace("rank: 2", "rank: -2"), "whole number"),
        (good.replace("rank: 2", "targets: { a: 1 }"), "list of names"),
        (good.replace("rank: 2", "layers: { last: 100 }"), "1 to 2"),
        (good.replace("lora: { rank: 2 }", "bottleneck: { reduction: 1000000 }"), "reduction"),
        (good.replace("lora: { rank: 2 }", "lora: { rank: 2 }, prefix: { length: 2 }"), "list"),
        (good.clone() + "compare: { methods: { full: { lr: -1 } } }\n", "compare.methods.full.lr"),
        (good.clone() + "compare: { methods: { full: { rate: 1 } } }\n", "rate"),
        (good.clone() + "compare: { forget_templates: [\"a thing\"] }\n", "forget_templates"),
        (good.clone() + "forget: { folder: { roof: x } }\n", "did you mean `root`"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n".into(), "recipe"),
        ("[1, 2".into(), "recipe.yaml"),
        (String::new(), "recipe.yaml"),
        ("\u{0}\u{1}".into(), "recipe.yaml"),
        (format!("{}1{}", "[".repeat(5000), "]".repeat(5000)), "recipe.yaml"),
    ];
    for (yaml, part) in cases {
        w.write("recipe.yaml", &yaml);
        let message = w.fails(&["train", "recipe.yaml"], 2);
        assert!(message.contains(part), "{yaml}\n→ {message}");
        assert!(!w.path("run").exists(), "{yaml} left a run directory behind");
    }
}

#[test]
fn wrong_flags_and_files() {
    let w = World::new();
    let predict = |args: &[&str]| w.fails(&[&["predict", "--model", "base"], args].concat(), 2);
    assert!(predict(&["--labels", "a,a", "data/red/0.png"]).contains("same prompt"));
    assert!(predict(&["--labels", "a,,b", "data/red/0.png"]).contains("empty"));
    assert!(predict(&["data/red/0.png"]).contains("--labels"));
    assert!(predict(&["--labels", "a,b", "nothing.png"]).contains("nothing.png"));
    assert!(predict(&["--labels", "a,b", "data/*/*.jpg"]).contains("matches no file"));
    assert!(predict(&["--labels", "a,b", "--template", "x", "data/red/0.png"]).contains("`{}`"));
    assert!(w.fails(&["train", "nothing.yaml"], 2).contains("nothing.yaml"));
    assert!(w.fails(&["train", "recipe.yaml", "--set", "train.lr"], 2).contains("KEY=VALUE"));
    assert!(w.fails(&["train", "recipe.yaml", "--device", "tpu"], 2).contains("tpu"));
    assert!(w.fails(&["eval", "recipe.yaml", "--split", "dev2"], 2).contains("--split"));
    assert!(w.fails(&["inspect", "data"], 2).contains("neither"));
    assert!(w.fails(&["embed", "--model", "base", "--output", "x"], 2).contains("nothing to embed"));
    assert!(w.fails(&["merge", "--model", "base", "--adapter", "nowhere", "--output", "m"], 2).contains("nowhere"));
    w.write("texts.txt", "one\ntwo\n");
    assert!(w.fails(&["embed", "--model", "base", "--texts", "texts.txt", "--output", "texts.txt"], 2).contains("would replace"));
    assert_eq!(std::fs::read(w.path("texts.txt")).unwrap(), b"one\ntwo\n");
    assert!(w.fails(&["embed", "--model", "base", "--texts", "texts.txt", "--output", "data"], 2).contains("is a directory"));
    assert!(w.fails(&["merge", "--model", "base", "--output", "data"], 2).contains("no merged model"));
}

#[test]
fn data_that_cannot_be_learnt_from() {
    let w = World::new();
    let folder = |classes: &[&str]| {
        let _ = std::fs::remove_dir_all(w.path("other"));
        for class in classes {
            std::fs::create_dir_all(w.path("other").join(class)).unwrap();
            for i in 0..4 {
                std::fs::copy(w.path(&format!("data/red/{i}.png")), w.path("other").join(class).join(format!("{i}.png"))).unwrap();
            }
        }
        w.fails(&["train", "recipe.yaml", "--set", "data.folder.root=other"], 2)
    };
    assert!(folder(&["one"]).contains("at least two classes"));
    assert!(folder(&["Cat", "cat"]).contains("same prompt"));
    assert!(folder(&["train/a", "train/b", "extra/a"]).contains("names no split"));
    w.write("t.csv", "image,label\ndata/red/0.png,a\ndata/red/1.png,\ndata/blue/1.png,b\n");
    let table = w.recipe("lora: { rank: 2 }").replace("folder: { root: data }", "table: { path: t.csv }");
    w.write("t.yaml", &table);
    assert!(w.fails(&["train", "t.yaml"], 2).contains("has no label"));
    w.write("r.yaml", &table.replace("classify: { templates: [\"a {} thing\"] }", "retrieve: {}"));
    assert!(w.fails(&["train", "r.yaml"], 2).contains("has no text"));
}

#[test]
fn damaged_bases() {
    let w = World::new();
    let original = |name: &str| std::fs::read(w.path("base").join(name)).unwrap();
    let refuse = |name: &str, bytes: &[u8], part: &str| {
        let before = original(name);
        std::fs::write(w.path("base").join(name), bytes).unwrap();
        let message = w.fails(&["inspect", "base"], 2);
        assert!(message.contains(part) && message.contains(name), "{name}: {message}");
        std::fs::write(w.path("base").join(name), before).unwrap();
    };
    refuse("config.json", b"{", "JSON");
    refuse("config.json", br#"{"text_config": {"hidden_size": 0}}"#, "hidden_size");
    refuse("preprocessor_config.json", br#"{"size": "big"}"#, "size");
    refuse("preprocessor_config.json", br#"{"size": 32, "crop_size": 32}"#, "16");
    refuse("tokenizer.json", b"{}", "model");
    refuse("model.safetensors", b"", "safetensors file");
    refuse("model.safetensors", &original("model.safetensors")[..1000], "safetensors file");
    std::fs::remove_file(w.path("base/model.safetensors")).unwrap();
    assert!(w.fails(&["inspect", "base"], 2).contains("no weights"));
}

/// Reading from a pipe or a device may never end.
#[cfg(unix)]
#[test]
fn devices_are_no_files() {
    let w = World::new();
    w.json(&["train", "recipe.yaml"]);
    let zero = |name: &str| {
        let path = w.path(name);
        let _ = std::fs::remove_file(&path);
        std::os::unix::fs::symlink("/dev/zero", path).unwrap();
    };
    for name in ["run/adapter/adapter_model.safetensors", "run/adapter/adapter_config.json", "run/adapter/peft.json", "base/config.json"] {
        let before = std::fs::read(w.path(name)).unwrap();
        zero(name);
        let message = w.fails(&["predict", "--model", "base", "--adapter", "run/adapter", "data/red/0.png"], 2);
        assert!(message.contains("a device") && message.contains(name.rsplit('/').next().unwrap()), "{message}");
        std::fs::remove_file(w.path(name)).unwrap();
        std::fs::write(w.path(name), before).unwrap();
    }
    zero("list.txt");
    assert!(w.fails(&["embed", "--model", "base", "--texts", "list.txt", "--output", "x"], 2).contains("a device"));
    assert!(w.fails(&["train", "list.txt"], 2).contains("a device"));
    assert!(w.fails(&["train", "recipe.yaml", "--set", "data={table: {path: list.txt}}"], 2).contains("list.txt"));
}

/// Adapter weights that are finite, but not what is made of them.
#[test]
fn predictions_that_are_not_finite_are_an_error() {
    let w = World::new();
    w.json(&["train", "recipe.yaml"]);
    let path = w.path("run/adapter/adapter_model.safetensors");
    let (tensors, _) = peft::clip::weights::read_safetensors("adapter", &std::fs::read(&path).unwrap()).unwrap();
    let write = |value: f64, dtype| {
        let all: Vec<_> = tensors
            .iter()
            .map(|(n, t)| {
                (
                    n.clone(),
                    ((t.zeros_like().unwrap().to_dtype(candle_core::DType::F64).unwrap() + value).unwrap()).to_dtype(dtype).unwrap(),
                )
            })
            .collect();
        peft::clip::weights::save(&path, &all).unwrap();
    };
    let predict = ["predict", "--model", "base", "--adapter", "run/adapter", "data/red/0.png"];
    write(3e38, candle_core::DType::F32);
    assert!(w.fails(&predict, 3).contains("not finite"));
    assert!(w.fails(&["eval", "run"], 3).contains("not finite"));
    write(1e300, candle_core::DType::F64);
    assert!(w.fails(&predict, 2).contains("not finite in f32"));
    assert!(w.fails(&["inspect", "run/adapter", "--verify"], 2).contains("not finite in f32"));
}
