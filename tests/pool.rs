//! One base in memory, several adapters: in the library by call, in `predict --jsonl` by line.
#![allow(clippy::unwrap_used)]

mod common;

use common::World;
use peft::Model;
use peft::pool::Pool;
use serde_json::{Value, json};

fn lines(w: &World, args: &[&str]) -> Vec<Value> {
    let out = w.peft(args);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[test]
fn each_line_has_its_adapter_and_labels() {
    let w = World::new();
    w.json(&["train", "recipe.yaml", "--output", "a"]);
    w.json(&["train", "recipe.yaml", "--output", "b", "--set", "method=ia3", "--set", "train.lr=0.1"]);
    let requests = [
        json!({"image": "data/red/0.png", "adapter": "a/adapter"}),
        json!({"image": "data/blue/1.png", "adapter": "b/adapter"}),
        json!({"image": "data/red/0.png", "labels": ["warm", "cold"]}),
        json!({"image": "data/green/2.png", "adapter": "a/adapter", "labels": ["red", "green"]}),
        json!({"image": "data/blue/3.png", "adapter": "a/adapter"}),
        json!({"image": "data/blue/3.png"}),
    ];
    let text: String = requests.iter().map(|r| format!("{r}\n\n")).collect();
    w.write("requests.jsonl", &text);
    let answers =
        lines(&w, &["predict", "--model", "base", "--labels", "x,y,z", "--template", "a {} thing", "--jsonl", "requests.jsonl", "-k", "2"]);
    assert_eq!(answers.len(), requests.len());
    for (request, answer) in requests.iter().zip(&answers) {
        assert_eq!((&answer["image"], answer.get("adapter")), (&request["image"], request.get("adapter")));
        // What each line says is what a call of its own says.
        let labels =
            request["labels"].as_array().map_or("x,y,z".into(), |l| l.iter().map(|x| x.as_str().unwrap()).collect::<Vec<_>>().join(","));
        let mut args = vec!["predict", "--model", "base", "--labels", &labels, "--template", "a {} thing", "-k", "2"];
        if let Some(adapter) = request["adapter"].as_str() {
            args.extend(["--adapter", adapter]);
        }
        args.push(request["image"].as_str().unwrap());
        let alone = w.json(&args);
        for (one, other) in answer["predictions"].as_array().unwrap().iter().zip(alone[0]["predictions"].as_array().unwrap()) {
            let off = one["probability"].as_f64().unwrap() - other["probability"].as_f64().unwrap();
            assert!(one["label"] == other["label"] && off.abs() < 1e-5, "{answer} {alone}");
        }
    }
    // Without labels the adapter's classes are meant, and where it has none the line is named.
    w.write("two.jsonl", "{\"image\": \"data/red/0.png\", \"adapter\": \"a/adapter\"}\n");
    assert_eq!(lines(&w, &["predict", "--model", "base", "--jsonl", "two.jsonl"])[0]["predictions"].as_array().unwrap().len(), 3);
    // No labels are no answer.
    assert!(w.fails(&["predict", "--model", "base", "--labels", "a", "data/red/0.png", "--top", "0"], 2).contains("--top"));
    // What is wrong with a line is its answer, and the others are answered.
    let good = "{\"image\": \"data/red/0.png\", \"labels\": [\"a\"], \"id\": 7}\n";
    for (text, line, part) in [
        ("{\"image\": \"data/red/0.png\"}\n", 1, "label"),
        ("\n{\"image\": 3}\n", 2, "a path"),
        ("{\"image\": \"data/red/0.png\", \"adaptor\": \"a\"}\n", 1, "adaptor"),
        ("{\"image\": \"data/red/0.png\", \"adapter\": \"nowhere\", \"labels\": [\"a\"]}\n", 1, "nowhere"),
        ("{\"image\": \"gone.png\", \"labels\": [\"a\"]}\n", 1, "gone.png"),
    ] {
        w.write("bad.jsonl", &format!("{text}{good}"));
        let answers = lines(&w, &["predict", "--model", "base", "--jsonl", "bad.jsonl"]);
        let error = &answers[0]["error"];
        assert!(answers[0]["line"] == line && error["kind"] == "input" && error.to_string().contains(part), "{answers:?}");
        assert!(answers[1]["id"] == 7 && answers[1]["predictions"][0]["label"] == "a", "{answers:?}");
    }
}

/// A line that is too long is answered with an error, as any other that is wrong, and those behind it are answered.
#[test]
fn lines_behind_one_that_is_too_long_are_answered() {
    let w = World::new();
    let good = "{\"image\": \"data/red/0.png\"}\n";
    let long = format!("{{\"image\": \"{}\"}}\n", "x".repeat((16 << 20) + 100_000));
    w.write("long.jsonl", &format!("{good}{long}{good}\n{long}{long}{good}"));
    let answers = lines(&w, &["predict", "--model", "base", "--labels", "red,blue", "--jsonl", "long.jsonl"]);
    let told: Vec<Option<i64>> = answers.iter().map(|a| a.get("error").and_then(|_| a["line"].as_i64())).collect();
    assert_eq!(told, [None, Some(2), None, Some(5), Some(6), None]);
    let message = answers[1]["error"].to_string();
    assert!(message.len() < 1000 && message.contains("long.jsonl:2"), "{message}");
}

/// Adapters of which one would have no part in the answers are refused, in either order; those that act together are not.
#[test]
fn adapters_that_cannot_act_together_are_refused() {
    let w = World::new();
    let train = |output: &str, sets: &[&str]| {
        let sets: Vec<&str> = sets.iter().flat_map(|s| ["--set", s]).collect();
        w.json(&[&["train", "recipe.yaml", "--output", output, "--set", "train.epochs=1"], &sets[..]].concat());
    };
    let head = "task={ classify: { head: linear } }";
    train("lora", &[]);
    train("head", &["method=none", head]);
    train("other", &["method=none", head]);
    train("tip", &["method=tip_adapter"]);
    train("coop", &["method={ coop: { n_ctx: 2 } }"]);
    w.write("values.csv", &(0..12).fold("image,value\n".to_string(), |all, i| format!("{all}data/red/{}.png,{i}\n", i % 10)));
    train("number", &["method=none", "task=regress", "data={ table: { path: values.csv } }"]);
    let ask =
        |one: &str, two: &str| w.peft(&["predict", "--model", "base", "--adapter", one, "--adapter", two, "--json", "data/red/0.png"]);
    for (one, two) in [("head", "tip"), ("head", "other"), ("number", "head"), ("number", "tip")] {
        for (one, two) in [(one, two), (two, one)] {
            let out = ask(one, two);
            let told = String::from_utf8_lossy(&out.stderr).into_owned();
            assert!(out.status.code() == Some(2) && told.contains(one) && told.contains(two), "{one} {two}: {told}");
        }
    }
    for (one, two) in [("head", "lora"), ("tip", "lora"), ("number", "lora"), ("coop", "lora")] {
        for (one, two) in [(one, two), (two, one)] {
            let out = ask(one, two);
            assert!(out.status.success(), "{one} {two}: {}", String::from_utf8_lossy(&out.stderr));
        }
    }
    // Texts mean nothing to a head on images, which is said.
    let out = ask("coop", "head");
    assert!(out.status.success() && String::from_utf8_lossy(&out.stderr).contains("coop"), "{out:?}");
}

/// Each line is answered before the next is written; closing stdin ends it, closing stdout too.
#[test]
fn a_worker_answers_line_by_line() {
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::process::{Command, Stdio};
    let w = World::new();
    let args = ["predict", "--model", "base", "--labels", "red,blue", "--jsonl", "-", "--quiet"];
    let start =
        || Command::new(common::program()).args(args).current_dir(w.dir.path()).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut child = start().unwrap();
    let (mut input, mut output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
    for (line, key) in [
        ("{\"image\": \"data/red/0.png\"}", "predictions"),
        ("no JSON", "error"),
        ("{\"image\": \"gone.png\"}", "error"),
        ("{\"image\": \"data/blue/0.png\"}", "predictions"),
    ] {
        writeln!(input, "{line}").unwrap();
        let mut answer = String::new();
        output.read_line(&mut answer).unwrap();
        assert!(serde_json::from_str::<Value>(&answer).unwrap().get(key).is_some(), "{line}: {answer}");
    }
    drop(input);
    assert!(child.wait().unwrap().success());
    let mut child = start().unwrap();
    drop(child.stdout.take());
    writeln!(child.stdin.as_mut().unwrap(), "{{\"image\": \"data/red/0.png\"}}").unwrap();
    assert!(child.wait().unwrap().success());
}

/// An adapter says which base it was trained on, and a run which adapter it made.
#[test]
fn an_adapter_names_its_base() {
    let w = World::new();
    w.json(&["train", "recipe.yaml", "--output", "runs/a"]);
    let named = w.json(&["predict", "--model", "base", "--adapter", "runs/a/adapter", "data/red/0.png"]);
    assert_eq!(w.json(&["predict", "--adapter", "runs/a/adapter", "data/red/0.png"]), named);
    assert_eq!(w.json(&["predict", "--adapter", "runs/a", "data/red/0.png"]), named);
    // Also from elsewhere, where the recipe's relative path leads nowhere.
    let adapter = w.path("runs/a");
    let out = std::process::Command::new(common::program())
        .args(["predict", "--json", "--adapter", adapter.to_str().unwrap(), "red/0.png"])
        .current_dir(w.path("data"))
        .output()
        .unwrap();
    let found: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(found[0]["predictions"], named[0]["predictions"]);
    w.json(&["embed", "--adapter", "runs/a", "--images", "data/red", "--output", "e.npy"]);
    w.json(&["merge", "--adapter", "runs/a", "--output", "merged"]);
    let eval = |adapter: &str| w.json(&["eval", "recipe.yaml", "--adapter", adapter]);
    assert_eq!(eval("runs/a"), eval("runs/a/adapter"));
    // Another base in its place is found out, and one that is gone is named.
    assert!(w.fails(&["predict", "data/red/0.png"], 2).contains("--model"));
    std::fs::rename(w.path("base"), w.path("moved")).unwrap();
    let message = w.fails(&["predict", "--adapter", "runs/a", "data/red/0.png"], 2);
    assert!(message.contains("`base`") && message.contains("--model"), "{message}");
    w.json(&["predict", "--model", "moved", "--adapter", "runs/a", "data/red/0.png"]);
    w.json(&["extract", "moved", "merged", "--rank", "1", "--rest", "--output", "other"]);
    std::fs::rename(w.path("merged"), w.path("base")).unwrap();
    assert!(w.fails(&["predict", "--adapter", "runs/a", "data/red/0.png"], 2).contains("was made for"));
}

#[test]
fn the_base_is_in_memory_once() {
    let w = World::new();
    w.json(&["train", "recipe.yaml", "--output", "a"]);
    let mut pool = Pool::new(Model::load(w.path("base").to_str().unwrap()).unwrap());
    let adapter = w.path("a/adapter");
    let plain = std::ptr::from_ref(pool.with(None).unwrap().base());
    let adapted = pool.with(Some(&adapter)).unwrap();
    assert!(std::ptr::eq(plain, adapted.base()) && adapted.patches().iter().count() == 1);
    let image = [w.path("data/red/0.png")];
    let with = adapted.embed_images(&image).unwrap();
    let without = pool.with(None).unwrap().embed_images(&image).unwrap();
    let off = (with - without).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(off > 1e-4, "{off}");
}

/// What a bundle brings along stays beneath a line's own adapter.
#[test]
fn adapters_of_lines_lie_on_a_bundles_own() {
    let w = World::new();
    w.json(&["train", "recipe.yaml", "--output", "p", "--set", "method={prefix: {length: 2}}", "--set", "train.lr=0.1"]);
    w.json(&["merge", "--model", "base", "--adapter", "p/adapter", "--bundle", "--output", "bundle"]);
    w.json(&["train", "recipe.yaml", "--output", "a", "--set", "model=bundle"]);
    w.write("one.jsonl", "{\"image\": \"data/red/0.png\", \"adapter\": \"a/adapter\"}\n");
    let line = lines(&w, &["predict", "--model", "bundle", "--jsonl", "one.jsonl"]).remove(0);
    let alone = w.json(&["predict", "--model", "bundle", "--adapter", "a/adapter", "data/red/0.png"]);
    let first = |ranked: &Value| ranked[0]["probability"].as_f64().unwrap();
    assert!((first(&line["predictions"]) - first(&alone[0]["predictions"])).abs() < 1e-6, "{line} {alone}");
}

#[test]
fn images_are_read_as_the_adapter_was_trained() {
    let w = World::new();
    let half = |x: u32, y: u32| image::Rgba([200, 10, 30, if (x + y).is_multiple_of(3) { 255 } else { 20 }]);
    image::RgbaImage::from_fn(20, 16, half).save(w.path("clear.png")).unwrap();
    w.write("white.yaml", &(w.recipe("lora: { rank: 2 }").replace("output: run", "output: white") + "images: { background: white }\n"));
    w.json(&["train", "recipe.yaml"]);
    w.json(&["train", "white.yaml"]);
    let ask = |adapter: &str, flags: &[&str]| w.json(&[&["predict", "--model", "base", "--adapter", adapter, "clear.png"], flags].concat());
    let (keep, white) = (ask("run/adapter", &["--background", "keep"]), ask("white/adapter", &["--background", "white"]));
    assert_eq!(ask("white/adapter", &[]), white, "white is its default");
    assert_eq!(ask("run/adapter", &[]), keep, "keep is the other's");
    assert_ne!(ask("white/adapter", &["--background", "keep"]), white, "a flag overrides");
    // Side by side on one base.
    w.write(
        "requests.jsonl",
        "{\"image\": \"clear.png\", \"adapter\": \"white/adapter\"}\n{\"image\": \"clear.png\", \"adapter\": \"run/adapter\"}\n",
    );
    let both = lines(&w, &["predict", "--model", "base", "--jsonl", "requests.jsonl"]);
    // Numbers of lines are written as f32, those of a document as f64.
    let likeliest =
        |answer: &Value| (answer["predictions"][0]["label"].clone(), answer["predictions"][0]["logit"].as_f64().unwrap() as f32);
    assert_eq!((likeliest(&both[0]), likeliest(&both[1])), (likeliest(&white[0]), likeliest(&keep[0])));
    // A bundle carries it; a plain checkpoint cannot, and says so.
    w.json(&["merge", "--model", "base", "--adapter", "white/adapter", "--bundle", "--output", "bundle"]);
    assert_eq!(w.json(&["predict", "--model", "bundle", "clear.png"]), white);
    let merged = w.json(&["merge", "--model", "base", "--adapter", "white/adapter", "--output", "merged"]);
    assert!(merged["notes"].as_array().unwrap().iter().any(|n| n.as_str().unwrap().contains("background: white")), "{merged}");
    // Labels and templates lie beside the merged weights.
    assert_eq!(std::fs::read_to_string(w.path("merged/labels.txt")).unwrap(), "blue\ngreen\nred\n");
    let named = w.json(&["predict", "--model", "merged", "--labels", "blue,green,red", "--template", "a {} thing", "clear.png"]);
    assert_eq!(w.json(&["predict", "--model", "merged", "clear.png"]), named);
}

/// `labels.txt` and `templates.txt` hold one a line: what is none is written as one that means the same, or refused.
#[test]
fn names_and_templates_that_are_no_lines_are_said() {
    let w = World::new();
    w.write("recipe.yaml", &w.recipe("lora: { rank: 2 }").replace("epochs: 4", "epochs: 1"));
    w.json(&["train", "recipe.yaml"]);
    let manifest: Value = serde_json::from_slice(&std::fs::read(w.path("run/adapter/peft.json")).unwrap()).unwrap();
    let change = |key: &str, value: Value| {
        let mut changed = manifest.clone();
        changed[key] = value;
        w.write("run/adapter/peft.json", &changed.to_string());
    };
    let merge = ["merge", "--model", "base", "--adapter", "run/adapter", "--output", "merged", "--force"];
    change("templates", serde_json::json!(["a {} thing", "a photo\nof a\r\n{} "]));
    let merged = w.json(&merge);
    assert_eq!(std::fs::read_to_string(w.path("merged/templates.txt")).unwrap(), "a {} thing\na photo of a {}\n");
    assert!(merged["notes"].as_array().unwrap().iter().any(|n| n.as_str().unwrap().contains("templates.txt")), "{merged}");
    let adapted = w.json(&["predict", "--model", "base", "--adapter", "run/adapter", "data/red/1.png"]);
    let own = w.json(&["predict", "--model", "merged", "data/red/1.png"]);
    let near = |i: usize| (&adapted[0]["predictions"][i]["logit"], &own[0]["predictions"][i]["logit"]);
    for (a, b) in (0..3).map(near) {
        assert!((a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-3, "{adapted} {own}");
    }
    for class in ["re\nd", " red", ""] {
        change("classes", serde_json::json!(["blue", "green", class]));
        w.fails(&merge, 2);
    }
    assert_eq!(std::fs::read_to_string(w.path("merged/labels.txt")).unwrap(), "blue\ngreen\nred\n", "what was there stays");
}

#[test]
fn a_heads_rows_follow_the_names_of_classes() {
    let w = World::new();
    let linear = w.recipe("lora: { rank: 2 }").replace("templates:", "head: linear, templates:");
    w.write("recipe.yaml", &linear);
    w.json(&["train", "recipe.yaml"]);
    let (before, labels) = (w.json(&["eval", "run"]), ["--labels", "red,blue,green"]);
    let ask = |flags: &[&str]| w.json(&[&["predict", "--model", "base", "--adapter", "run/adapter", "data/red/1.png"], flags].concat());
    assert_eq!(ask(&labels), ask(&[]), "labels in another order");
    let message = w.fails(&["predict", "--model", "base", "--adapter", "run/adapter", "--labels", "red,blue", "data/red/1.png"], 2);
    assert!(message.contains("`green`"), "{message}");
    // The same head, stored in another order of classes.
    let (dir, order) = (w.path("run/adapter"), [2u32, 0, 1]);
    let bytes = std::fs::read(dir.join("task.safetensors")).unwrap();
    let (tensors, _) = peft::clip::weights::read_safetensors("task", &bytes).unwrap();
    let index = candle_core::Tensor::new(&order, &candle_core::Device::Cpu).unwrap();
    let moved: Vec<_> = tensors.iter().map(|(n, t)| (n.clone(), t.index_select(&index, 0).unwrap())).collect();
    peft::clip::weights::save(&dir.join("task.safetensors"), &moved).unwrap();
    let mut manifest: Value = serde_json::from_slice(&std::fs::read(dir.join("peft.json")).unwrap()).unwrap();
    let classes = manifest["classes"].clone();
    manifest["classes"] = order.iter().map(|i| classes[*i as usize].clone()).collect();
    w.write("run/adapter/peft.json", &manifest.to_string());
    let after = w.json(&["eval", "run"]);
    assert_eq!((&after["accuracy"], &after["macro_f1"]), (&before["accuracy"], &before["macro_f1"]));
    // Other names are refused.
    manifest["classes"][0] = "violet".into();
    w.write("run/adapter/peft.json", &manifest.to_string());
    let message = w.fails(&["eval", "run"], 2);
    assert!(message.contains("`violet`"), "{message}");
}
