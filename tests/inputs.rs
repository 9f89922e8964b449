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
