//! The way of a newcomer through the real binary.
#![allow(clippy::unwrap_used)]

mod common;

use common::{World, read};

fn number(v: &serde_json::Value) -> f64 {
    v.as_f64().unwrap_or_else(|| panic!("{v} is no number"))
}

#[test]
fn train_eval_predict_merge_inspect() {
    let w = World::new();
    let checked = w.json(&["train", "recipe.yaml", "--check"]);
    assert_eq!(checked["classes"], serde_json::json!(["blue", "green", "red"]));
    assert!(!w.path("run").exists(), "--check writes nothing");

    let report = w.json(&["train", "recipe.yaml"]);
    let (before, after) = (number(&report["before"]["accuracy"]), number(&report["after"]["accuracy"]));
    assert!(after > before && after > 0.9, "{before} → {after}");
    assert!(number(&report["adapter_bytes"]) > 1000.0 && number(&report["seconds"]) > 0.0);
    assert!(number(&report["total_parameters"]) > number(&report["trainable_parameters"]));
    for file in ["recipe.yaml", "report.json", "metrics.jsonl", "predictions.jsonl", "adapter/adapter_config.json", "adapter/peft.json"] {
        assert!(w.path("run").join(file).exists(), "{file}");
    }

    let evaluated = w.json(&["eval", "run"]);
    assert_eq!(number(&evaluated["accuracy"]), after);
    let base = w.json(&["eval", "recipe.yaml", "--predictions", "p.jsonl"]);
    assert_eq!(number(&base["accuracy"]), before);
    assert_eq!(read(&w.path("p.jsonl")).split(|b| *b == b'\n').count(), 6 + 1);

    let ranked = w.json(&["predict", "--model", "base", "--adapter", "run/adapter", "data/red/*.png"]);
    assert_eq!(ranked.as_array().unwrap().len(), 10);
    assert_eq!(ranked[0]["predictions"][0]["label"], "red");

    let merged = w.json(&["merge", "--model", "base", "--adapter", "run/adapter", "--output", "merged"]);
    assert!(number(&merged["max_abs_diff"]) < 1e-3);
    let plain = w.json(&["predict", "--model", "merged", "--labels", "red,green,blue", "--template", "a {} thing", "data/red/0.png"]);
    // The adapter's probabilities are softmax(z / T) with T fitted on validation; the merged base knows no T.
    let stored: serde_json::Value = serde_json::from_slice(&read(&w.path("run/adapter/peft.json"))).unwrap();
    let between = |p: &serde_json::Value| (number(&p["predictions"][0]["probability"]) / number(&p["predictions"][1]["probability"])).ln();
    let (a, b) = (between(&plain[0]), number(&stored["scalars"]["temperature"]) * between(&ranked[0]));
    assert!((a - b).abs() < 1e-2 * a.abs(), "{a} {b}");
    assert_eq!(plain[0]["predictions"][0]["label"], ranked[0]["predictions"][0]["label"]);

    assert_eq!(w.json(&["inspect", "base"])["kind"], "base");
    let adapter = w.json(&["inspect", "run/adapter"]);
    assert_eq!(adapter["facts"]["parameters"], report["trainable_parameters"]);
    assert_eq!(w.json(&["inspect", "run"])["facts"]["state"], "finished");
    assert_eq!(w.json(&["inspect", "recipe.yaml"])["kind"], "recipe");
}

#[test]
fn finished_runs_are_kept() {
    let w = World::new();
    let first = w.json(&["train", "recipe.yaml"]);
    let adapter = read(&w.path("run/adapter/adapter_model.safetensors"));
    assert!(w.fails(&["train", "recipe.yaml"], 2).contains("--force"));
    assert_eq!(w.json(&["train", "recipe.yaml", "--resume"]), first);
    let other = w.fails(&["train", "recipe.yaml", "--resume", "--set", "train.lr=0.5"], 2);
    assert!(other.contains("another recipe"), "{other}");
    w.json(&["train", "recipe.yaml", "--force"]);
    // One seed, one machine: the same bits.
    assert_eq!(read(&w.path("run/adapter/adapter_model.safetensors")), adapter);
    w.json(&["train", "recipe.yaml", "--output", "other", "--set", "train.seed=4"]);
    assert_ne!(read(&w.path("other/adapter/adapter_model.safetensors")), adapter);
}

#[test]
fn a_run_whose_recipe_is_gone_is_not_mixed_with_another() {
    let w = World::new();
    w.json(&["train", "recipe.yaml"]);
    let adapter = w.path("run/adapter/adapter_model.safetensors");
    let before = read(&adapter);
    let recipe = w.path("run/recipe.yaml");
    for broken in [Some(&b"\xff"[..]), None] {
        match broken {
            Some(bytes) => std::fs::write(&recipe, bytes).unwrap(),
            None => std::fs::remove_file(&recipe).unwrap(),
        }
        for more in [&[][..], &["--resume"]] {
            let message = w.fails(&[&["train", "recipe.yaml", "--set", "train.seed=4"], more].concat(), 2);
            assert!(message.contains("recipe.yaml"), "{message}");
        }
        assert_eq!((recipe.exists(), read(&adapter)), (broken.is_some(), before.clone()));
    }
    w.json(&["train", "recipe.yaml", "--force"]);
    assert_eq!(read(&adapter), before);
    std::fs::write(&recipe, b"\xff").unwrap();
    w.json(&["train", "recipe.yaml", "--force"]);
    assert_eq!(read(&adapter), before);
}

#[cfg(target_os = "linux")]
#[test]
fn a_run_outlives_its_stderr_and_files_that_may_not_grow_are_said() {
    let w = World::new();
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let mut command = std::process::Command::new(common::program());
    let status = command.args(["train", "recipe.yaml"]).current_dir(w.path(".")).stderr(full).status().unwrap();
    assert!(status.success() && w.path("run/report.json").exists(), "{status:?}");
    let script = format!("ulimit -f 8; exec {} train recipe.yaml --output small --quiet", common::program());
    let out = std::process::Command::new("sh").args(["-c", &script]).current_dir(w.path(".")).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.code() == Some(3) && said.contains("File too large") && said.contains("make room"), "{:?} {said}", out.status);
}

#[test]
fn every_method_trains_and_only_linear_ones_merge() {
    let w = World::new();
    let methods = [
        ("prefix: { length: 4, reparameterise: 8 }", false),
        ("bottleneck: { reduction: 4, placement: houlsby }", false),
        ("full: { layers: { last: 1 } }", true),
        ("lora: { rank: 2, dropout: 0.1, modules_to_save: [visual_projection] }", true),
    ];
    for (method, folds) in methods {
        let name = method.split(':').next().unwrap();
        w.write("m.yaml", &w.recipe(method).replace("lr: 1.0e-2", "lr: 5.0e-3"));
        let report = w.json(&["train", "m.yaml", "--output", name]);
        assert!(number(&report["after"]["accuracy"]) > 0.5, "{method}: {report}");
        let adapter = format!("{name}/adapter");
        assert_eq!(w.json(&["eval", name])["accuracy"], report["after"]["accuracy"]);
        let merge = ["merge", "--model", "base", "--adapter", &adapter, "--output", "m"];
        match folds {
            true => {
                w.json(&[&merge[..], &["--force"]].concat());
            }
            false => {
                let message = w.fails(&merge, 2);
                assert!(message.contains("does not fold") && !w.path("m").exists(), "{message}");
            }
        }
    }
}

#[test]
fn lora_and_its_relatives_train_load_and_merge() {
    let w = World::new();
    for method in [
        "dora: { rank: 2, dropout: 0.1 }",
        "pissa: { rank: 2 }",
        "adalora: { init_r: 3, target_r: 1, tinit: 1, tfinal: 1 }",
        "vera: { rank: 8, save_projection: false }",
        "lokr: { rank: 1, rank_dropout: 0.1 }",
        "svd: { layers: { last: 1 } }",
        "ia3: {}",
    ] {
        let name = method.split(':').next().unwrap();
        w.write("m.yaml", &w.recipe(method).replace("epochs: 4", "epochs: 2"));
        let report = w.json(&["train", "m.yaml", "--output", name]);
        assert_ne!(report["after"]["loss"], report["before"]["loss"], "{method}");
        // Ranks that AdaLoRA's file leaves out are sums of zeros, but they change the order of the others.
        let again = number(&w.json(&["eval", name])["loss"]);
        assert!((again - number(&report["after"]["loss"])).abs() < 1e-6, "{method}: {again}");
        let merged = w.json(&["merge", "--model", "base", "--adapter", &format!("{name}/adapter"), "--output", "m", "--force"]);
        assert!(number(&merged["relative_diff"]) < 1e-4, "{method}: {merged}");
    }
    // AdaLoRA has taken ranks away, and the file says which.
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(w.path("adalora/adapter/adapter_config.json")).unwrap()).unwrap();
    let kept = config["rank_pattern"]
        .as_object()
        .unwrap()
        .values()
        .filter_map(serde_json::Value::as_array)
        .flatten()
        .filter(|k| **k == true)
        .count();
    assert_eq!(kept, 12, "{config}");
}

/// AdaLoRA takes ranks away between `tinit` and the last `tfinal` steps; a run without such steps is refused before it begins.
#[test]
fn a_schedule_that_leaves_no_step_is_refused_before_training() {
    let w = World::new();
    let method = |tinit: usize| format!("method={{adalora: {{tinit: {tinit}, tfinal: 1}}}}");
    let steps = w.json(&["train", "recipe.yaml", "--check"])["steps"].as_u64().unwrap() as usize;
    for check in [&["--check"][..], &[]] {
        let message = w.fails(&[&["train", "recipe.yaml", "--output", "late", "--set", &method(steps - 1)], check].concat(), 2);
        let expected = ["method.adalora", "tinit", &format!("{steps} optimiser steps"), &format!("{} + 1", steps - 1)];
        assert!(expected.iter().all(|part| message.contains(part)), "{message}");
        assert!(!w.path("late").exists());
    }
    w.json(&["train", "recipe.yaml", "--check", "--set", &method(steps - 2)]);
    // A step can be timed all the same.
    w.json(&["bench", "recipe.yaml", "--steps", "1", "--set", &method(steps - 2)]);
}

#[test]
fn a_linear_probe_trains_on_frozen_features() {
    let w = World::new();
    let recipe = w.recipe("x").replace("{ x }", "none").replace("templates: [\"a {} thing\"]", "head: linear");
    w.write("probe.yaml", &recipe.replace("lr: 1.0e-2", "lr: 0.1"));
    let report = w.json(&["train", "probe.yaml"]);
    assert!(number(&report["after"]["accuracy"]) > 0.9, "{report}");
    assert_eq!(number(&report["trainable_parameters"]), 3.0 * 17.0);
    assert!(w.path("run/adapter/task.safetensors").exists() && !w.path("run/adapter/adapter_config.json").exists());
    let ranked = w.json(&["predict", "--model", "base", "--adapter", "run/adapter", "data/blue/3.png"]);
    assert_eq!(ranked[0]["predictions"][0]["label"], "blue");
    assert!(w.fails(&["merge", "--model", "base", "--adapter", "run/adapter", "--output", "m"], 2).contains("head"));
}

#[test]
fn retrieval_from_a_table_with_several_texts() {
    let w = World::new();
    let mut rows = String::new();
    for class in ["red", "green", "blue"] {
        for i in 0..10 {
            rows += &format!(
                "{{\"image\": \"data/{class}/{i}.png\", \"text\": [\"a {class} thing\", \"{class}\"], \"group\": \"{class}{}\"}}\n",
                i / 2
            );
        }
    }
    w.write("pairs.jsonl", &rows);
    w.write(
        "r.yaml",
        "model: base\nmethod: { lora: { rank: 4 } }\ndata: { table: { path: pairs.jsonl } }\ntask: retrieve\n\
         train: { epochs: 6, batch: 8, lr: 1.0e-2, augment: { crop: [0.8, 1.0], flip: true } }\noutput: run\n",
    );
    let report = w.json(&["train", "r.yaml"]);
    let key = "image_to_text_recall_at_1";
    assert!(number(&report["after"][key]) > number(&report["before"][key]), "{report}");
}

#[test]
fn embeddings_come_in_input_order() {
    let w = World::new();
    w.write("texts.txt", "a red thing\nblue\n");
    w.write("list.txt", "data/red/1.png\ndata/blue/2.png\ndata/red/0.png\n");
    let done = w.json(&["embed", "--model", "base", "--images", "list.txt", "--texts", "texts.txt", "--output", "e.safetensors"]);
    assert_eq!((&done["images"], &done["texts"], &done["dim"]), (&3.into(), &2.into(), &16.into()));
    let bytes = read(&w.path("e.safetensors"));
    let (tensors, metadata) = peft::clip::weights::read_safetensors("e", &bytes).unwrap();
    let shape = |name: &str| tensors.iter().find(|(n, _)| n == name).unwrap().1.dims().to_vec();
    assert_eq!((shape("image_embeds"), shape("text_embeds")), (vec![3, 16], vec![2, 16]));
    assert_eq!(metadata["texts"], "[\"a red thing\",\"blue\"]");
    assert!(metadata["images"].starts_with("[\"data/red/1.png\""));
}

#[test]
fn unreadable_images_are_listed_together_or_skipped() {
    let w = World::new();
    std::fs::write(w.path("data/red/3.png"), b"no image").unwrap();
    std::fs::write(w.path("data/blue/4.png"), &read(&w.path("data/blue/5.png"))[..40]).unwrap();
    let message = w.fails(&["train", "recipe.yaml"], 2);
    assert!(message.contains("data/red/3.png") && message.contains("data/blue/4.png") && message.contains("skip_bad"), "{message}");
    assert!(!w.path("run").exists());
    w.json(&["train", "recipe.yaml", "--set", "data.skip_bad=true"]);
}

#[test]
fn a_directory_in_use_or_of_others_is_left_alone() {
    let w = World::new();
    std::fs::create_dir(w.path("run")).unwrap();
    std::fs::write(w.path("run/lock"), "4711").unwrap();
    let held = std::fs::File::open(w.path("run/lock")).unwrap();
    held.lock().unwrap();
    assert!(w.fails(&["train", "recipe.yaml"], 3).contains("4711"));
    drop(held);
    // The owner is gone: the lock is taken over.
    w.json(&["train", "recipe.yaml"]);
    std::fs::create_dir(w.path("mine")).unwrap();
    std::fs::write(w.path("mine/thesis.txt"), "x").unwrap();
    assert!(w.fails(&["train", "recipe.yaml", "--output", "mine", "--force"], 2).contains("thesis.txt"));
}

#[test]
fn bench_measures_full_batches() {
    let w = World::new();
    let found = w.json(&["bench", "recipe.yaml", "--steps", "3"]);
    assert_eq!((&found["steps"], &found["batch"]), (&3.into(), &8.into()));
    assert!(number(&found["step_seconds"]["median"]) >= number(&found["step_seconds"]["min"]));
    assert!(number(&found["images_per_second"]) > 0.0 && number(&found["trainable_parameters"]) > 0.0);
}

#[test]
fn the_embedded_recipes_are_valid() {
    let w = World::new();
    let all = w.json(&["recipes"]);
    for recipe in all.as_array().unwrap() {
        let name = recipe["name"].as_str().unwrap();
        let text = w.json(&["recipes", name])["text"].as_str().unwrap().to_string();
        w.write("r.yaml", &text);
        w.json(&["inspect", "r.yaml"]);
    }
    assert!(w.fails(&["recipes", "nothing"], 2).contains("quickstart"));
}

/// In a forward pass a replaced weight comes before the update of the same layer, so it does in a merge.
#[test]
fn an_update_of_a_trained_weight_merges() {
    let w = World::new();
    for (i, method) in
        ["[{lora: {rank: 2, targets: [fc1]}}, {full: {targets: [fc1]}}]", "[{full: {targets: [fc1]}}, {lora: {rank: 2, targets: [fc1]}}]"]
            .iter()
            .enumerate()
    {
        let (run, merged) = (format!("run{i}"), format!("merged{i}"));
        w.json(&["train", "recipe.yaml", "--set", &format!("method={method}"), "--output", &run]);
        let done = w.json(&["merge", "--model", "base", "--adapter", &format!("{run}/adapter"), "--output", &merged]);
        assert!(number(&done["relative_diff"]) < 1e-4);
    }
}

#[test]
fn rows_of_texts_are_lines() {
    let w = World::new();
    w.write("texts.txt", "one\n\n  two \n");
    assert_eq!(w.json(&["embed", "--model", "base", "--texts", "texts.txt", "--output", "out.safetensors"])["texts"], 3);
}

/// What Windows' editors and spreadsheets make of a text file says the same as the plain one.
#[test]
fn marks_and_line_ends_of_text_files_say_nothing() {
    let w = World::new();
    let write = |name: &str, bytes: &[u8]| std::fs::write(w.path(name), bytes).unwrap();
    write("plain", b"red\ngreen\nblue\n");
    write("marked", b"\xef\xbb\xbfred \r\ngreen\t\r\n\r\nblue\r\n");
    write("mac", b"red\rgreen\rblue");
    write("names.json", b"\xef\xbb\xbf[\"red\", \"green\", \"blue\"]");
    let predict = |labels: &str| w.json(&["predict", "--model", "base", "--labels", labels, "data/red/0.png"]);
    for labels in ["marked", "mac", "names.json"] {
        assert_eq!(predict(labels), predict("plain"), "{labels}");
    }
    write("requests.jsonl", b"\xef\xbb\xbf{\"image\": \"data/red/0.png\", \"labels\": [\"red\", \"blue\"]}\r\n");
    let out = w.peft(&["predict", "--model", "base", "--jsonl", "requests.jsonl"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    write("list.txt", b"\xef\xbb\xbfdata/red/0.png \r\ndata/blue/0.png\r\n\r\n");
    write("texts.txt", b"\xef\xbb\xbfa red thing \r\n\r\na blue thing");
    let done = w.json(&["embed", "--model", "base", "--images", "list.txt", "--texts", "texts.txt", "--output", "e.safetensors"]);
    assert_eq!((&done["images"], &done["texts"], &done["blank"]), (&2.into(), &3.into(), &1.into()));
    let utf16: Vec<u8> = "red\r\nblue\r\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
    write("bare", &utf16);
    write("utf16", &[b"\xff\xfe", utf16.as_slice()].concat());
    write("latin", b"red\nna\xefve\n");
    for (file, part) in [("bare", "UTF-16"), ("utf16", "UTF-16"), ("latin", "latin:2")] {
        let labels = w.fails(&["predict", "--model", "base", "--labels", file, "data/red/0.png"], 2);
        let texts = w.fails(&["embed", "--model", "base", "--texts", file, "--output", "x"], 2);
        // Each line has its answer, and other encodings end it all.
        let args = ["predict", "--model", "base", "--jsonl", file];
        let requests = if file == "latin" { String::from_utf8(w.peft(&args).stdout).unwrap() } else { w.fails(&args, 2) };
        let classifier = w.fails(&["merge", "--model", "base", "--classifier", "c.safetensors", "--labels", file], 2);
        for message in [labels, texts, requests, classifier] {
            assert!(message.contains(part) && message.contains("UTF-8"), "{file}: {message}");
        }
    }
    // Recipes and the files of a base are texts, too.
    let recipe = std::fs::read(w.path("recipe.yaml")).unwrap();
    write("marked.yaml", &[b"\xef\xbb\xbf", recipe.as_slice()].concat());
    assert_eq!(w.json(&["train", "marked.yaml", "--check"])["steps"], w.json(&["train", "recipe.yaml", "--check"])["steps"]);
    for name in ["config.json", "preprocessor_config.json", "tokenizer.json"] {
        let file = format!("base/{name}");
        let bytes = std::fs::read(w.path(&file)).unwrap();
        write(&file, &[b"\xef\xbb\xbf", bytes.as_slice()].concat());
    }
    assert_eq!(predict("marked"), predict("plain"));
}
