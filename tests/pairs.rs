//! Tasks that look at an image and a text: sets that neither input alone solves, through the real binary.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::Tensor;
use common::World;
use serde_json::{Value, json};

const COLOURS: [&str; 3] = ["red", "green", "blue"];

/// Every image with every colour's name; a pair fits where they are the same.
fn pairs(world: &World) {
    let mut rows = String::new();
    for (c, colour) in COLOURS.iter().enumerate() {
        for i in 0..10 {
            for (t, text) in COLOURS.iter().enumerate() {
                // As many that fit as do not: of those that do not, one of two.
                if c == t || (c + t + i) % 2 == 0 {
                    let split = ["train", "train", "train", "train", "train", "train", "val", "val", "test", "test"][i];
                    let row = json!({ "image": format!("data/{colour}/{i}.png"), "id": format!("{colour}{i}"), "text": text,
                        "fits": c == t, "split": split });
                    rows.push_str(&format!("{row}\n"));
                }
            }
        }
    }
    world.write("pairs.jsonl", &rows);
}

fn recipe(world: &World, data: &str, task: &str, rest: &str) {
    let text = format!(
        "model: base\nmethod: none\ndata: {{ table: {{ {data} }} }}\ntask: {{ {task} }}\n{rest}\n\
         train: {{ epochs: 60, batch: 16, lr: 2.0e-2, seed: 3, early_stopping: {{ patience: 60 }} }}\noutput: run\n"
    );
    world.write("pairs.yaml", &text);
}

fn metric(report: &Value, name: &str) -> f64 {
    report["after"][name].as_f64().unwrap()
}

#[test]
fn a_text_fits_an_image_and_neither_alone_tells() {
    let world = World::new();
    pairs(&world);
    for (fusion, inputs, solved) in [
        ("concat: { hidden: 32 }", "both", true),
        ("bilinear: { rank: 32 }", "both", true),
        ("cross_attention: { dim: 16, heads: 2 }", "both", true),
        ("transformer: { dim: 16, heads: 2, layers: 1 }", "both", true),
        ("concat: { hidden: 32 }", "image", false),
        ("concat: { hidden: 32 }", "text", false),
    ] {
        recipe(&world, "path: pairs.jsonl", &format!("match: {{ inputs: {inputs} }}"), &format!("fusion: {{ {fusion} }}"));
        let report = world.json(&["train", "pairs.yaml", "--force"]);
        let auc = metric(&report, "roc_auc");
        assert!(if solved { auc > 0.95 } else { (0.3..=0.7).contains(&auc) }, "{fusion} {inputs}: {auc}");
    }
}

#[test]
fn a_verdict_follows_the_threshold_that_was_stored() {
    let world = World::new();
    pairs(&world);
    recipe(&world, "path: pairs.jsonl", "match: {}", "fusion: { concat: { hidden: 32 } }");
    let report = world.json(&["train", "pairs.yaml"]);
    let stored: Value = serde_json::from_slice(&std::fs::read(world.path("run/adapter/peft.json")).unwrap()).unwrap();
    let threshold = stored["scalars"]["logit_threshold"].as_f64().unwrap();
    assert_eq!(stored["classes"], json!(["does not fit", "fits"]));
    // What was evaluated is evaluated again alike, and what is predicted one by one is the same.
    let again = world.json(&["eval", "run"]);
    assert_eq!(again["f1"], report["after"]["f1"]);
    let lines = std::fs::read_to_string(world.path("run/predictions.jsonl")).unwrap();
    let first: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert!((first["logits"][1].as_f64().unwrap() >= threshold) == (first["prediction"] == "fits"), "{first} {threshold}");
    let predict = ["predict", "--model", "base", "--adapter", "run/adapter", "--text", "red", "--text", "blue", "data/red/9.png"];
    let told = world.json(&predict);
    assert_eq!((&told[0]["prediction"], &told[1]["prediction"]), (&json!("fits"), &json!("does not fit")), "{told}");
    // Adapters up to 0.1 held a probability, and judge as they did.
    let probability = 1.0 / (1.0 + (-threshold).exp());
    let manifest = world.path("run/adapter/peft.json");
    let new = std::fs::read(&manifest).unwrap();
    let mut old = stored.clone();
    old["scalars"] = json!({ "threshold": probability });
    std::fs::write(&manifest, old.to_string()).unwrap();
    assert_eq!(told, world.json(&predict));
    std::fs::write(&manifest, new).unwrap();
    // A bundle carries the task, and judges alike.
    world.json(&["merge", "--model", "base", "--adapter", "run/adapter", "--bundle", "--output", "bundle"]);
    let from_bundle = world.json(&["predict", "--model", "bundle", "--text", "red", "--text", "blue", "data/red/9.png"]);
    assert_eq!(told, from_bundle);
    world.json(&["inspect", "run/adapter"]);
    let page = std::fs::read_to_string(world.path("run/report.html")).unwrap();
    assert!(page.contains("does not fit"));
}

const WORDS: [&str; 6] = ["red", "green", "blue", "a photo of a dog", "seven", "the sky at night"];

/// A base whose logit scale is CLIP's, 100, and whose texts lie as near to its images as those of a trained model.
fn base_at_scale_100(world: &World) {
    world.json(&["embed", "--model", "base", "--images", "data", "--normalize", "--output", "i.safetensors"]);
    let device = candle_core::Device::Cpu;
    let images = candle_core::safetensors::load(world.path("i.safetensors"), &device).unwrap().remove("image_embeds").unwrap();
    let mean = (images.mean(0).unwrap() * 3.0).unwrap();
    let file = world.path("base/model.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &device).unwrap();
    tensors.insert("logit_scale".into(), Tensor::new(100f32.ln(), &device).unwrap());
    tensors.insert("text_projection.weight".into(), Tensor::eye(16, candle_core::DType::F32, &device).unwrap());
    tensors.insert("text_model.final_layer_norm.bias".into(), mean);
    peft::clip::weights::save(&file, &tensors.into_iter().collect::<Vec<_>>()).unwrap();
}

/// An adapter that changes nothing, trained on pairs of which `fits` says whether they do.
fn judged(world: &World, fits: &dyn Fn(&str, usize, &str) -> bool) -> Value {
    let mut rows = String::new();
    for colour in COLOURS {
        for (i, text) in (0..10).flat_map(|i| WORDS.map(|word| (i, word))) {
            let split = ["train", "train", "val", "val", "val", "test"][i.min(5)];
            let row = json!({ "image": format!("data/{colour}/{i}.png"), "text": text, "fits": fits(colour, i, text), "split": split });
            rows.push_str(&format!("{row}\n"));
        }
    }
    world.write("pairs.jsonl", &rows);
    let recipe = "model: base\nmethod: { lora: { rank: 1 } }\ndata: { table: { path: pairs.jsonl } }\ntask: { match: {} }\n\
                  fusion: { cosine: {} }\ntrain: { steps: 1, batch: 8, lr: 1.0e-9 }\noutput: run\n";
    world.write("pairs.yaml", recipe);
    world.json(&["train", "pairs.yaml", "--force"])
}

/// Every probability above a logit of 17 is 1 in f32; verdicts, figures and the order of mistakes are right nevertheless.
#[test]
fn pairs_at_clips_logit_scale_are_told_apart() {
    let world = World::new();
    base_at_scale_100(&world);
    judged(&world, &|_, i, text| (i + text.len()) % 2 == 0);
    let texts: Vec<&str> = WORDS.iter().flat_map(|word| ["--text", word]).collect();
    let predict = [&["predict", "--model", "base", "--adapter", "run/adapter"], texts.as_slice(), &["data"]].concat();
    let logit = |answer: &Value| {
        let all = answer["predictions"].as_array().unwrap();
        all.iter().find(|p| p["label"] == "fits").unwrap()["logit"].as_f64().unwrap()
    };
    let before = world.json(&predict);
    let mut logits: Vec<f64> = before.as_array().unwrap().iter().map(logit).filter(|z| *z > 18.0).collect();
    logits.sort_by(f64::total_cmp);
    assert!(logits.len() > 40, "{}: too few saturate", logits.len());
    // The widest gap among those whose probability is 1: what lies above fits.
    let gap = logits.windows(2).skip(8).take(logits.len() - 16).max_by(|a, b| (a[1] - a[0]).total_cmp(&(b[1] - b[0]))).unwrap();
    let cut = f64::midpoint(gap[0], gap[1]);
    let of = |colour: &str, i: usize, text: &str| {
        let image = format!("data/{colour}/{i}.png");
        logit(before.as_array().unwrap().iter().find(|a| a["image"] == image.as_str() && a["text"] == text).unwrap())
    };
    let report = judged(&world, &|colour, i, text| of(colour, i, text) > cut);
    for name in ["roc_auc", "average_precision", "accuracy", "f1"] {
        assert!((metric(&report, name) - 1.0).abs() < 1e-9, "{name}: {report}");
    }
    let stored: Value = serde_json::from_slice(&std::fs::read(world.path("run/adapter/peft.json")).unwrap()).unwrap();
    let threshold = stored["scalars"]["logit_threshold"].as_f64().unwrap();
    assert!(threshold > 17.0, "{threshold}");
    // One by one, as JSON and in a table: the same threshold.
    let answers = world.json(&[&predict[..], &["--csv", "p.csv"]].concat());
    let told: Vec<(bool, bool)> = answers.as_array().unwrap().iter().map(|a| (a["prediction"] == "fits", logit(a) >= threshold)).collect();
    assert!(told.iter().all(|(said, is)| said == is) && told.iter().any(|t| t.0) && told.iter().any(|t| !t.0));
    let column = csv::Reader::from_path(world.path("p.csv")).unwrap().into_deserialize::<std::collections::HashMap<String, String>>();
    assert_eq!(column.map(|row| row.unwrap()["prediction"] == "fits").collect::<Vec<_>>(), told.iter().map(|t| t.0).collect::<Vec<_>>());

    // Mistakes: the farther on the wrong side, the earlier on the page, though all are certain.
    let report = judged(&world, &|colour, i, text| (of(colour, i, text) > cut) != (i == 9 || i == 7));
    assert!(metric(&report, "accuracy") < 1.0);
    let stored: Value = serde_json::from_slice(&std::fs::read(world.path("run/adapter/peft.json")).unwrap()).unwrap();
    let threshold = stored["scalars"]["logit_threshold"].as_f64().unwrap();
    let lines = |name: &str| -> Vec<Value> {
        std::fs::read_to_string(world.path(name)).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let tested: Vec<Value> = lines("pairs.jsonl").into_iter().filter(|row| row["split"] == "test").collect();
    let mut wrong: Vec<(f64, String, String)> = Vec::new();
    for (p, row) in lines("run/predictions.jsonl").iter().zip(&tested).filter(|(p, _)| p["label"] != p["prediction"]) {
        assert_eq!(p["id"], row["image"]);
        let text = |v: &Value| v.as_str().unwrap().to_string();
        wrong.push(((p["logits"][1].as_f64().unwrap() - threshold).abs(), text(&p["id"]), text(&row["text"])));
    }
    wrong.sort_by(|a, b| b.0.total_cmp(&a.0));
    // Several pairs are about one image: each with its own text.
    let page = std::fs::read_to_string(world.path("run/report.html")).unwrap();
    let figures = page.split("<p class=\"note\" title=\"").skip(1);
    let shown: Vec<(&str, &str)> = figures.filter_map(|f| f.split("</p>").next()?.split_once("\">")).collect();
    let expected: Vec<(&str, &str)> = wrong.iter().take(shown.len()).map(|w| (w.1.as_str(), w.2.as_str())).collect();
    assert!(shown.len() > 4 && shown == expected, "{shown:?}\n{wrong:?}");
}

#[test]
fn negatives_are_drawn_or_the_hardest() {
    let world = World::new();
    let rows: String = (0..30)
        .map(|i| {
            let colour = COLOURS[i % 3];
            let split = ["train", "train", "train", "val", "test"][i / 6];
            format!("{}\n", json!({ "image": format!("data/{colour}/{}.png", i / 3), "text": colour, "split": split }))
        })
        .collect();
    world.write("pairs.jsonl", &rows);
    for negatives in ["random: { count: 2 }", "hardest: {}"] {
        recipe(&world, "path: pairs.jsonl", &format!("match: {{ negatives: {{ {negatives} }}, gamma: 1 }}"), "fusion: concat");
        let report = world.json(&["train", "pairs.yaml", "--force"]);
        assert!(metric(&report, "roc_auc") > 0.95, "{negatives}: {report}");
        // Six test images, each with its own text and one or two others; equal captions are no negatives.
        assert_eq!(report["after"]["examples"], if negatives.starts_with("random") { 18 } else { 12 }, "{report}");
    }
    // Untrained and with a wrong text: the page shows the text that was judged, not the image's own.
    recipe(&world, "path: pairs.jsonl", "match: { negatives: random }", "fusion: concat");
    world.json(&["train", "pairs.yaml", "--force", "--set", "train.steps=1", "--set", "train.epochs=null", "--set", "train.lr=1.0e-9"]);
    let page = std::fs::read_to_string(world.path("run/report.html")).unwrap();
    let wrong = |line: &&str| serde_json::from_str::<Value>(line).is_ok_and(|p| p["label"] != p["prediction"]);
    let lines = std::fs::read_to_string(world.path("run/predictions.jsonl")).unwrap();
    let id = serde_json::from_str::<Value>(lines.lines().find(wrong).unwrap()).unwrap()["id"].as_str().unwrap().replace('"', "&quot;");
    let text = id.split_once(" with &quot;").map_or("", |found| found.1.trim_end_matches("&quot;"));
    assert!(page.contains(&format!("title=\"{id}\">{text}</p>")), "{id}");
    recipe(&world, "path: pairs.jsonl", "match: {}", "");
    assert!(world.fails(&["train", "pairs.yaml", "--force"], 2).contains("negatives: random"));
}

/// A question for each image: which of two colours it has; the right one stands first or second.
fn questions(world: &World) {
    let mut rows = String::new();
    for (c, colour) in COLOURS.iter().enumerate() {
        for i in 0..10 {
            let split = ["train", "train", "train", "train", "train", "train", "val", "val", "test", "test"][i];
            for (question, answer) in [("is it red?", if c == 0 { "yes" } else { "no" }), ("what colour?", colour)] {
                let row = json!({ "image": format!("data/{colour}/{i}.png"), "question": question, "answer": [answer, answer, "The sky."],
                    "choices": ["red", "green", "blue", "yes", "no"], "split": split, "group": format!("{colour}{i}") });
                rows.push_str(&format!("{row}\n"));
            }
        }
    }
    world.write("pairs.jsonl", &rows);
}

#[test]
fn questions_are_answered_from_image_and_question() {
    let world = World::new();
    questions(&world);
    for (task, fusion, inputs, least, most) in [
        ("loss: bce", "concat: { hidden: 32 }", "both", 0.95, 1.0),
        ("loss: softmax", "transformer: { dim: 16, heads: 2, layers: 1 }", "both", 0.95, 1.0),
        ("choose: given", "concat: { hidden: 32 }", "both", 0.95, 1.0),
        ("loss: bce", "concat: { hidden: 32 }", "image", 0.0, 0.6),
        ("loss: bce", "concat: { hidden: 32 }", "text", 0.0, 0.7),
    ] {
        recipe(&world, "path: pairs.jsonl", &format!("answer: {{ inputs: {inputs}, {task} }}"), &format!("fusion: {{ {fusion} }}"));
        let report = world.json(&["train", "pairs.yaml", "--force"]);
        let accuracy = metric(&report, "accuracy");
        assert!((least..=most).contains(&accuracy), "{task} {inputs}: {accuracy}");
        if inputs == "image" {
            // What is asked stands beside what was answered wrongly.
            let page = std::fs::read_to_string(world.path("run/report.html")).unwrap();
            assert!(
                page.contains("Most confident mistakes") && (page.contains(">is it red?</p>") || page.contains(">what colour?</p>")),
                "{task}"
            );
        }
        if inputs == "both" {
            // Two of three annotators say so.
            assert!((metric(&report, "vqa_accuracy") - 2.0 / 3.0 * accuracy).abs() < 0.02, "{report}");
        }
    }
}

#[test]
fn known_answers_travel_with_the_adapter() {
    let world = World::new();
    questions(&world);
    recipe(&world, "path: pairs.jsonl", "answer: { answers: 5 }", "fusion: { concat: { hidden: 32 } }");
    let report = world.json(&["train", "pairs.yaml"]);
    let stored: Value = serde_json::from_slice(&std::fs::read(world.path("run/adapter/peft.json")).unwrap()).unwrap();
    let kept: Vec<&str> = stored["classes"].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
    assert!(kept.contains(&"sky") && !kept.contains(&"The sky.") && kept.len() == 5, "{kept:?}");
    assert_eq!(world.json(&["eval", "run"])["accuracy"], report["after"]["accuracy"]);
    let lines = r#"{"image": "data/blue/9.png", "question": "what colour?"}
{"image": "data/green/8.png", "question": "is it red?"}"#;
    world.write("ask.jsonl", lines);
    let out = world.peft(&["predict", "--model", "base", "--adapter", "run/adapter", "--jsonl", "ask.jsonl"]);
    let said: Vec<Value> = String::from_utf8(out.stdout).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!((&said[0]["prediction"], &said[1]["prediction"]), (&json!("blue"), &json!("no")), "{said:?}");
    let message = world.fails(&["predict", "--model", "base", "--adapter", "run/adapter", "data/red/8.png"], 2);
    assert!(message.contains("question"), "{message}");
}

#[test]
fn weights_of_a_fusion_load_strictly() {
    let world = World::new();
    pairs(&world);
    recipe(&world, "path: pairs.jsonl", "match: {}", "fusion: { bilinear: { rank: 4 } }");
    world.json(&["train", "pairs.yaml", "--set", "train.epochs=1"]);
    let path = world.path("run/adapter/task.safetensors");
    let mut tensors: Vec<_> = candle_core::safetensors::load(&path, &candle_core::Device::Cpu).unwrap().into_iter().collect();
    tensors.retain(|(name, _)| name != "fusion.image.bias");
    tensors.push(("fusion.other".into(), tensors[0].1.clone()));
    peft::clip::weights::save(&path, &tensors).unwrap();
    for command in [&["eval", "run"][..], &["predict", "--model", "base", "--adapter", "run/adapter", "--text", "red", "data/red/9.png"]] {
        let message = world.fails(command, 2);
        assert!(message.contains("missing: fusion.image.bias") && message.contains("unexpected: fusion.other"), "{message}");
    }
}

/// A metric that validation does not define chooses no epoch: the loss does, and says so; one that the recipe names is refused before
/// anything is trained. Metrics that the tested examples do not define are left out.
#[test]
fn metrics_that_are_undefined_choose_nothing() {
    let world = World::new();
    let table = |name: &str, columns: &str, cell: &dyn Fn(usize, &str) -> String| {
        let mut rows = format!("image,split,{columns}\n");
        for i in 0..10 {
            let split = ["train", "train", "train", "train", "train", "train", "val", "val", "test", "test"][i];
            COLOURS.iter().for_each(|colour| rows += &format!("data/{colour}/{i}.png,{split},{}\n", cell(i, split)));
        }
        world.write(name, &rows);
    };
    table("match.csv", "text,fits", &|i, split| format!("red,{}", u8::from(split != "train" || i % 2 == 0)));
    table("number.csv", "value", &|i, split| if split == "train" { i.to_string() } else { "0.1".into() });
    table("several.csv", "labels", &|i, split| if split == "train" { ["warm", "cold"][i % 2].into() } else { String::new() });
    for (data, task, metric, chosen) in [
        ("match.csv", "match: { }", "roc_auc", "loss"),
        ("number.csv", "regress: { }", "pearson", "mae"),
        ("several.csv", "classify: { labels: multi, head: linear }", "mean_average_precision", "loss"),
    ] {
        recipe(&world, &format!("path: {data}"), task, "");
        let out = world.peft(&["train", "pairs.yaml", "--force", "--json", "--set", "train.epochs=1"]);
        let told = String::from_utf8_lossy(&out.stderr).into_owned();
        let report: Value = serde_json::from_slice(&out.stdout).unwrap_or_else(|_| panic!("{data}: {told}"));
        let whole: Value = serde_json::from_slice(&common::read(&world.path("run/report.json"))).unwrap();
        assert_eq!((&whole["metric"], report["best_epoch"].as_u64()), (&chosen.into(), Some(1)), "{data}");
        assert!(report["after"].get(metric).is_none() && told.contains(metric) == (chosen == "loss"), "{data}: {report} {told}");
        let named = format!("train.early_stopping={{ metric: {metric} }}");
        let message = world.fails(&["train", "pairs.yaml", "--output", "named", "--force", "--set", "train.epochs=1", "--set", &named], 2);
        assert!(message.contains(metric) && message.contains("validation"), "{data}: {message}");
    }
}
