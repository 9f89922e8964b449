//! What `predict` and `embed` take for images, what they do with bad ones, and the files that they write.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::Device;
use common::{World, read};
use serde_json::Value;

fn world() -> World {
    let w = World::new();
    w.write("data/red/5.png", "no image");
    w.write("data/green/notes.txt", "not one either");
    w
}

fn images(answers: &Value) -> Vec<String> {
    answers.as_array().unwrap().iter().map(|a| a["image"].as_str().unwrap().to_string()).collect()
}

#[test]
fn directories_patterns_lists_and_tables_name_images() {
    let w = World::new();
    w.write("list.txt", "data/blue/1.png\ndata/blue/0.png\n");
    w.write("table.csv", "file_name,label\ndata/blue/1.png,blue\ndata/blue/0.png,blue\n");
    w.write("table.jsonl", "{\"image\": \"data/blue/1.png\"}\n{\"image\": \"data/blue/0.png\"}\n");
    let predict = |argument: &str| images(&w.json(&["predict", "--model", "base", "--labels", "a,b", argument]));
    assert_eq!(predict("data").len(), 30);
    assert_eq!(predict("data"), predict("data/**/*.png"));
    assert_eq!(predict("data"), predict("data/**/*"));
    for argument in ["list.txt", "table.csv", "table.jsonl"] {
        assert_eq!(predict(argument), ["data/blue/1.png", "data/blue/0.png"], "{argument}");
        let done = w.json(&["embed", "--model", "base", "--images", argument, "--output", "e.npy"]);
        assert_eq!(done["images"], 2, "{argument}");
        assert!(String::from_utf8(read(&w.path("e.ids.jsonl"))).unwrap().starts_with("{\"row\":0,\"image\":\"data/blue/1.png\"}\n"));
    }
    w.write("captions.csv", "image,caption\ndata/blue/1.png,one\ndata/blue/0.png,two\n");
    assert_eq!(w.json(&["embed", "--model", "base", "--texts", "captions.csv", "--output", "t.npy"])["texts"], 2);
    w.write("shard.parquet", "PAR1");
    assert!(w.fails(&["predict", "--model", "base", "--labels", "a,b", "shard.parquet"], 2).contains("parquet"));
}

/// A row of a table is a row of the output, so that images and texts of one table stand beside each other; what has none is told of.
#[test]
fn rows_of_tables_keep_their_places() {
    let w = World::new();
    w.write("e.csv", "image,caption\ndata/blue/1.png,one\n,two\ndata/blue/0.png,\n,\n");
    w.write("full.csv", "image,caption\ndata/blue/1.png,one\ndata/red/0.png,two\ndata/blue/0.png,\ndata/red/1.png,\n");
    w.write("lines.txt", "one\ntwo\n\n\n");
    w.write("gap.txt", "data/blue/1.png\n\ndata/blue/0.png\n\n");
    w.write("bad.jsonl", "{\"image\":\"data/blue/1.png\",\"text\":\"one\"}\n{\"image\":3,\"text\":4}\n");
    w.write("five.jsonl", "{\"image\":\"data/blue/1.png\",\"text\":[\"one\",\"two\"]}\n{\"image\":\"data/red/1.png\",\"text\":\"x\"}\n");
    let embed = ["embed", "--model", "base", "--output", "e.safetensors"];
    let rows = |name: &str| candle_core::safetensors::load(w.path("e.safetensors"), &Device::Cpu).unwrap()[name].to_vec2::<f32>().unwrap();
    // Texts: a row each, as lines of a text file have.
    let done = w.json(&[&embed[..], &["--texts", "lines.txt"]].concat());
    assert_eq!((&done["texts"], &done["blank"]), (&4.into(), &2.into()));
    let lines = rows("text_embeds");
    for table in ["e.csv", "full.csv"] {
        let done = w.json(&[&embed[..], &["--texts", table]].concat());
        assert_eq!((&done["texts"], &done["blank"], rows("text_embeds")), (&4.into(), &2.into(), lines.clone()), "{table}");
    }
    let done = w.json(&[&embed[..], &["--images", "full.csv", "--texts", "full.csv"]].concat());
    assert_eq!((&done["images"], &done["texts"], done["skipped"].as_array().unwrap().len()), (&4.into(), &4.into(), 0));
    // Images: a row without one is wrong, and named.
    for (given, places) in [("e.csv", vec!["e.csv:3", "e.csv:5"]), ("gap.txt", vec!["gap.txt:2"])] {
        let message = w.fails(&[&embed[..], &["--images", given, "--texts", "e.csv"]].concat(), 2);
        assert!(places.iter().all(|p| message.contains(p)) && message.contains("--skip-bad"), "{message}");
        let done = w.json(&[&embed[..], &["--images", given, "--texts", "e.csv", "--skip-bad"]].concat());
        let skipped: Vec<&str> = done["skipped"].as_array().unwrap().iter().map(|s| s["error"]["place"].as_str().unwrap()).collect();
        assert_eq!((&done["images"], skipped), (&2.into(), places), "{given}");
        let message = w.fails(&["predict", "--model", "base", "--labels", "a,b", given], 2);
        assert!(message.contains(&format!("{given}:")) && message.contains("--skip-bad"), "{message}");
    }
    // Cells of another kind are neither images nor texts.
    for flag in ["--images", "--texts"] {
        assert!(w.fails(&[&embed[..], &[flag, "bad.jsonl"]].concat(), 2).contains("bad.jsonl:2"));
    }
    let out = w.peft(&[&embed[..], &["--texts", "five.jsonl"]].concat());
    let told = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success() && told.contains("five.jsonl") && rows("text_embeds").len() == 3, "{told}");
}

#[test]
fn bad_images_are_all_named_or_skipped() {
    let w = world();
    w.write("data/blue/7.png", "");
    let predict = ["predict", "--model", "base", "--labels", "red,blue", "data", "--csv", "p.csv"];
    let embed = ["embed", "--model", "base", "--images", "data", "--output", "e.npy"];
    for args in [&predict[..], &embed[..]] {
        let message = w.fails(args, 2);
        assert!(["red/5.png", "blue/7.png", "--skip-bad"].iter().all(|part| message.contains(part)), "{message}");
    }
    assert!(["p.csv", "e.npy", "e.ids.jsonl", ".part-e.npy"].iter().all(|name| !w.path(name).exists()));
    let answers = w.json(&[&predict[..], &["--skip-bad"]].concat());
    let bad: Vec<&Value> = answers.as_array().unwrap().iter().filter(|a| a.get("error").is_some()).collect();
    assert!(bad.len() == 2 && bad[0]["image"] == "data/blue/7.png" && bad[0]["error"]["kind"] == "input", "{bad:?}");
    let rows: Vec<Vec<String>> = csv::ReaderBuilder::new()
        .has_headers(false)
        .from_path(w.path("p.csv"))
        .unwrap()
        .records()
        .map(|r| r.unwrap().iter().map(ToString::to_string).collect())
        .collect();
    assert_eq!((rows.len(), rows[0].join(",").as_str()), (29, "image,label,score,label_2,score_2"));
    assert!(rows[1..].iter().all(|row| (row[2].parse::<f32>().unwrap() + row[4].parse::<f32>().unwrap() - 1.0).abs() < 1e-4));
    let done = w.json(&[&embed[..], &["--skip-bad"]].concat());
    assert_eq!((&done["images"], done["skipped"].as_array().unwrap().len()), (&28.into(), 2));
    assert_eq!(String::from_utf8(read(&w.path("e.ids.jsonl"))).unwrap().lines().count(), 28);
    w.write("only.txt", "data/red/5.png\ngone.png\n");
    for args in [
        vec!["predict", "--model", "base", "--labels", "a,b", "only.txt"],
        vec!["embed", "--model", "base", "--images", "only.txt", "--output", "o.npy"],
    ] {
        assert!(w.fails(&[&args[..], &["--skip-bad"]].concat(), 2).contains("none of the"));
    }
}

/// The rows of a `.npy` are those of a `.safetensors`, and those of one image at a time.
#[test]
fn rows_are_the_same_in_each_format() {
    let w = World::new();
    let embed = |images: &str, output: &str| w.json(&["embed", "--model", "base", "--images", images, "--output", output]);
    embed("data", "e.safetensors");
    embed("data", "e.npy");
    let tensors = candle_core::safetensors::load(w.path("e.safetensors"), &Device::Cpu).unwrap();
    let rows = tensors["image_embeds"].to_vec2::<f32>().unwrap();
    let npy = read(&w.path("e.npy"));
    let bytes: Vec<u8> = rows.iter().flatten().flat_map(|v| v.to_le_bytes()).collect();
    assert!(npy.len() == 128 + 30 * 16 * 4 && npy[128..] == bytes[..]);
    assert!(String::from_utf8_lossy(&npy[..128]).contains("'shape': (30, 16)"));
    embed("data/green/3.png", "one.safetensors");
    let one = candle_core::safetensors::load(w.path("one.safetensors"), &Device::Cpu).unwrap()["image_embeds"].to_vec2::<f32>().unwrap();
    let at = tensors["image_embeds"].dims()[0] / 3 + 3;
    assert!(one[0].iter().zip(&rows[at]).all(|(a, b)| (a - b).abs() < 1e-4));
    for (output, part) in [("e.csv", ".csv"), ("e.npz", ".npz")] {
        assert!(w.fails(&["embed", "--model", "base", "--images", "data", "--output", output], 2).contains(part));
    }
    w.write("t.txt", "a\n");
    let both = ["embed", "--model", "base", "--images", "data", "--texts", "t.txt", "--output", "b.npy"];
    assert!(w.fails(&both, 2).contains("one matrix"));
}

/// Each class passes or fails by its own threshold of the run, in text, JSON and CSV, whatever `--top` is, in the order that people
/// count in.
#[test]
fn several_labels_are_those_that_pass_their_thresholds() {
    const CLASSES: [&str; 4] = ["cold", "dark", "red", "warm"];
    let w = World::new();
    let mut rows = "image,labels\n".to_string();
    for (colour, labels) in [("red", "warm|red"), ("green", "cold"), ("blue", "cold|dark")] {
        (0..10).for_each(|i| rows += &format!("data/{colour}/{i}.png,{labels}\n"));
    }
    w.write("rows.csv", &rows);
    let recipe = "model: base\nmethod: none\ndata: { table: { path: rows.csv } }\noutput: run\n\
                  task: { classify: { labels: multi, head: linear, threshold: each } }\ntrain: { steps: 3, lr: 1.0e-2 }\n";
    w.write("several.yaml", recipe);
    w.json(&["train", "several.yaml"]);
    std::fs::create_dir(w.path("new")).unwrap();
    for i in 1..=12 {
        std::fs::copy(w.path(&format!("data/{}/{}.png", ["red", "green", "blue"][i % 3], i % 10)), w.path(&format!("new/img{i}.png")))
            .unwrap();
    }
    let predict = ["predict", "--model", "base", "--adapter", "run", "--top", "1"];
    let ask = |more: &[&str]| w.json(&[&predict[..], more].concat());
    let all = w.json(&["predict", "--model", "base", "--adapter", "run", "--top", "4", "new"]);
    let logit = |answer: &Value, class: &str| {
        let all = answer["predictions"].as_array().unwrap();
        all.iter().find(|p| p["label"] == class).unwrap()["logit"].as_f64().unwrap()
    };
    // Thresholds that some images pass and some do not, each class in its own way.
    let file = w.path("run/adapter/peft.json");
    let mut manifest: Value = serde_json::from_slice(&read(&file)).unwrap();
    assert!(CLASSES.iter().all(|class| manifest["scalars"][format!("logit_threshold/{class}")].is_number()), "{manifest}");
    let mut thresholds = Vec::new();
    for (c, class) in CLASSES.iter().enumerate() {
        let mut logits: Vec<f64> = all.as_array().unwrap().iter().map(|a| logit(a, class)).collect();
        logits.sort_by(f64::total_cmp);
        thresholds.push(f64::midpoint(logits[2 * c + 2], logits[2 * c + 3]));
        manifest["scalars"][format!("logit_threshold/{class}")] = thresholds[c].into();
    }
    std::fs::write(&file, manifest.to_string()).unwrap();
    let passes = |a: &Value| -> Vec<&str> { (0..4).filter(|c| logit(a, CLASSES[*c]) >= thresholds[*c]).map(|c| CLASSES[c]).collect() };
    let expected: Vec<Vec<&str>> = all.as_array().unwrap().iter().map(passes).collect();
    assert!(expected.iter().any(|e| e.len() > 1) && expected.iter().any(|e| e.len() < 2), "{expected:?}");

    let names: Vec<String> = (1..=12).map(|i| format!("new/img{i}.png")).collect();
    for given in ["new", "new/*.png"] {
        let told = ask(&[given, "--csv", "p.csv"]);
        assert_eq!(images(&told), names, "{given}");
        for (answer, expected) in told.as_array().unwrap().iter().zip(&expected) {
            let mut chosen: Vec<&str> = Vec::new();
            for p in answer["predictions"].as_array().unwrap().iter().filter(|p| p["chosen"] == true) {
                chosen.push(p["label"].as_str().unwrap());
            }
            chosen.sort_unstable();
            assert_eq!((&chosen, answer["prediction"].as_str().unwrap()), (expected, expected.join("|").as_str()), "{answer}");
        }
        let mut table = csv::Reader::from_path(w.path("p.csv")).unwrap();
        let rows: Vec<std::collections::HashMap<String, String>> = table.deserialize().map(Result::unwrap).collect();
        let found: Vec<(&str, &str)> = rows.iter().map(|r| (r["image"].as_str(), r["prediction"].as_str())).collect();
        let joined: Vec<String> = expected.iter().map(|e| e.join("|")).collect();
        assert_eq!(found, names.iter().map(String::as_str).zip(joined.iter().map(String::as_str)).collect::<Vec<_>>());
        let out = w.peft(&[&predict[..], &[given]].concat());
        let text = String::from_utf8(out.stdout).unwrap();
        let mut marked: Vec<(String, Vec<String>)> = Vec::new();
        for line in text.lines() {
            match (line.starts_with("new/"), line.strip_prefix("* ")) {
                (true, _) => marked.push((line.to_string(), Vec::new())),
                (_, Some(rest)) => marked.last_mut().unwrap().1.push(rest.rsplit("  ").next().unwrap().to_string()),
                _ => {}
            }
        }
        for ((image, mut labels), (name, expected)) in marked.into_iter().zip(names.iter().zip(&expected)) {
            labels.sort_unstable();
            assert_eq!((&image, labels.iter().map(String::as_str).collect::<Vec<_>>()), (name, expected.clone()), "{text}");
        }
    }
}
