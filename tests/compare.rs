//! `peft compare` through the real binary: protocol, figures, going on after a kill, pages.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use common::{World, read};
use serde_json::Value;

/// Two epochs and a second set of six images.
const SMALL: [&str; 10] =
    ["compare", "recipe.yaml", "--epochs", "2", "--set", "forget.folder.root=data", "--output", "out", "--threads", "1"];

fn number(v: &Value) -> f64 {
    v.as_f64().unwrap_or_else(|| panic!("{v} is no number"))
}

fn rows(comparison: &Value) -> Vec<&Value> {
    comparison["groups"].as_array().unwrap().iter().flat_map(|g| g["rows"].as_array().unwrap()).collect()
}

/// Whether each test example was right.
fn hits(w: &World, run: &str) -> HashMap<String, f64> {
    let text = String::from_utf8(read(&w.path(run).join("predictions.jsonl"))).unwrap();
    let one = |line: &str| {
        let p: Value = serde_json::from_str(line).unwrap();
        (p["id"].as_str().unwrap().to_string(), f64::from(u8::from(p["label"] == p["prediction"])))
    };
    text.lines().map(one).collect()
}

#[test]
fn figures_are_those_of_the_runs() {
    let w = World::new();
    let found = w.json(&[&SMALL[..], &["--methods", "full,lora,probe", "--seeds", "2"]].concat());
    let group = &found["groups"][0];
    assert_eq!((&group["budget"]["unit"], &group["budget"]["amount"]), (&"epochs".into(), &2.0.into()));
    assert!(number(&group["zero_shot"]["accuracy"]) <= 1.0 && group["forget"]["examples"] == 6);
    assert_eq!(rows(&found).iter().map(|r| r["method"].as_str().unwrap()).collect::<Vec<_>>(), ["full", "lora", "probe"]);
    for row in rows(&found) {
        let name = row["method"].as_str().unwrap();
        let runs: Vec<HashMap<String, f64>> = (3..5).map(|seed| hits(&w, &format!("out/{name}-s{seed}"))).collect();
        let accuracies: Vec<f64> = runs.iter().map(|r| r.values().sum::<f64>() / r.len() as f64).collect();
        let mean = accuracies.iter().sum::<f64>() / 2.0;
        assert!((number(&row["test"]["mean"]) - mean).abs() < 1e-12);
        assert!((number(&row["test"]["sd"]) - (accuracies[0] - accuracies[1]).abs() / 2f64.sqrt()).abs() < 1e-12);
        let report: Value = serde_json::from_slice(&read(&w.path(&format!("out/{name}-s3/report.json")))).unwrap();
        assert_eq!((&row["trainable_parameters"], &row["delta_bytes"]), (&report["trainable_parameters"], &report["adapter_bytes"]));
        assert!(number(&row["images_per_second"]["mean"]) > 0.0 && number(&row["inference"]["unmerged_ms"]) > 0.0);
        assert_eq!(row["inference"]["merged_ms"].is_null(), name == "probe");
        if name == "full" {
            assert!(row["difference"].is_null());
            continue;
        }
        let full: Vec<_> = (3..5).map(|seed| hits(&w, &format!("out/full-s{seed}"))).collect();
        let paired = runs.iter().zip(&full).map(|(a, b)| a.iter().map(|(id, hit)| hit - b[id]).sum::<f64>() / a.len() as f64);
        let d = &row["difference"];
        assert!((number(&d["mean"]) - paired.sum::<f64>() / 2.0).abs() < 1e-12);
        assert!(number(&d["interval"][0]) <= number(&d["mean"]) && number(&d["mean"]) <= number(&d["interval"][1]));
    }
    // A probe leaves the base as it is: nothing is forgotten.
    assert_eq!(rows(&found)[2]["forget"]["mean"], group["forget"]["before"]);
    for file in ["compare.json", "compare.md", "compare.csv", "compare.html"] {
        assert!(w.path("out").join(file).exists(), "{file}");
    }
    assert_eq!(serde_json::from_slice::<Value>(&read(&w.path("out/compare.json"))).unwrap(), found);
    let csv = String::from_utf8(read(&w.path("out/compare.csv"))).unwrap();
    assert_eq!(csv.lines().count(), 4);

    // Again: nothing is trained or measured, the same comes out; one method more trains that one only.
    let report = |name: &str| read(&w.path(&format!("out/{name}-s3/report.json")));
    let before = (report("full"), report("lora"));
    assert_eq!(w.json(&[&SMALL[..], &["--methods", "full,lora,probe", "--seeds", "2"]].concat()), found);
    let more = w.json(&[&SMALL[..], &["--methods", "full,lora,bottleneck", "--seeds", "2"]].concat());
    assert_eq!((report("full"), report("lora")), before);
    for (a, b) in rows(&more).iter().zip(rows(&found)).take(2) {
        assert_eq!((&a["runs"], &a["inference"], &a["difference"]), (&b["runs"], &b["inference"], &b["difference"]));
    }

    // Other settings are refused, or replace.
    let other = [&SMALL[..], &["--methods", "lora", "--set", "train.lr=0.02"]].concat();
    assert!(w.fails(&other, 2).contains("--force"));
    assert_eq!(report("lora"), before.1);
    w.json(&[&other[..], &["--force"]].concat());
    assert_ne!(report("lora"), before.1);

    // Finished runs compare as they are.
    let runs = ["compare", "out/full-s3", "out/bottleneck-s3", "out/full-s4", "out/bottleneck-s4", "--output", "again"];
    let again = w.json(&runs);
    assert_eq!(rows(&again)[0]["test"], rows(&more)[0]["test"]);
    assert_eq!(rows(&again)[1]["difference"], rows(&more)[2]["difference"]);
}

#[test]
fn a_failed_run_stands_in_the_table() {
    let w = World::new();
    let recipe = w.recipe("lora: { rank: 2 }") + "compare: { methods: { lora: { lr: 1.0e+30 } } }\n";
    w.write("recipe.yaml", &recipe);
    let out = w.peft(&["compare", "recipe.yaml", "--methods", "full,lora", "--epochs", "1", "--output", "out", "--json"]);
    assert_eq!(out.status.code(), Some(3), "{}", String::from_utf8_lossy(&out.stderr));
    let found: Value = serde_json::from_slice(&out.stdout).unwrap();
    let why = rows(&found)[1]["runs"][0]["failed"].as_str().unwrap();
    assert!(why.contains("not finite") && rows(&found)[1]["test"].is_null(), "{why}");
    assert!(number(&rows(&found)[0]["test"]["mean"]) > 0.0);
    // Without a second set of the recipe's own there is the embedded one.
    assert_eq!(
        (&found["groups"][0]["forget"]["data"]["builtin"], &found["groups"][0]["forget"]["examples"]),
        (&"emoji-flat".into(), &320.into())
    );
    let html = String::from_utf8(read(&w.path("out/compare.html"))).unwrap();
    assert!(html.contains("not finite"));
    // What cannot even be planned is told before anything runs.
    assert!(w.fails(&[&SMALL[..], &["--methods", "full,lorra"]].concat(), 2).contains("did you mean `lora`"));
}

#[test]
fn a_search_chooses_by_validation_with_equal_trials() {
    let w = World::new();
    let found = w.json(&[&SMALL[..], &["--methods", "lora,bottleneck", "--search", "3", "--reference", "lora"]].concat());
    for row in rows(&found) {
        let trials = row["search"].as_array().unwrap();
        assert_eq!(trials.len(), 3);
        let best = trials.iter().map(|t| number(&t["validation"])).fold(0.0, f64::max);
        let chosen: Vec<&Value> = trials.iter().filter(|t| t["chosen"] == true).collect();
        assert_eq!((chosen.len(), number(&chosen[0]["validation"]), &chosen[0]["lr"]), (1, best, &row["lr"]));
    }
    assert!(rows(&found)[1]["difference"].is_object() && rows(&found)[0]["difference"].is_null());
}

#[test]
fn shots_and_steps_make_groups_of_their_own() {
    let w = World::new();
    let found = w.json(&[
        "compare",
        "recipe.yaml",
        "--methods",
        "lora",
        "--shots",
        "1,2",
        "--steps",
        "2",
        "--set",
        "forget.folder.root=data",
        "--output",
        "out",
    ]);
    let groups = found["groups"].as_array().unwrap();
    assert_eq!(groups.iter().map(|g| g["shots"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(groups.iter().map(|g| g["examples"][0].as_u64().unwrap()).collect::<Vec<_>>(), [3, 6]);
    assert!(groups.iter().all(|g| g["budget"]["unit"] == "steps" && g["rows"][0]["runs"][0]["steps"] == 2));
    let html = String::from_utf8(read(&w.path("out/compare.html"))).unwrap();
    assert!(html.contains("accuracy against shots"));
}

/// A budget in seconds becomes steps once; going on gives the same.
#[test]
fn seconds_become_steps_that_are_remembered() {
    let w = World::new();
    let budget = ["--seeds", "2", "--seconds", "0.05", "--jobs", "2"];
    let args = [&["compare", "recipe.yaml", "--methods", "full,lora", "--set", "forget.folder.root=data", "--output", "out"], &budget[..]]
        .concat();
    let found = w.json(&args);
    assert_eq!((&found["groups"][0]["budget"]["unit"], &found["groups"][0]["budget"]["amount"]), (&"seconds".into(), &0.05.into()));
    for row in rows(&found) {
        let steps: Vec<f64> = row["runs"].as_array().unwrap().iter().map(|r| number(&r["steps"])).collect();
        assert!(steps[0] >= 1.0 && steps[0] == steps[1], "{steps:?}");
    }
    assert_eq!(w.json(&args)["groups"], found["groups"]);
}

/// Killed in the middle without a chance to clean up, the same command goes on and ends where an undisturbed one does.
#[test]
fn a_killed_comparison_goes_on() {
    let w = World::new();
    let args = [&SMALL[..], &["--methods", "full,lora", "--seeds", "2"]].concat();
    let mut child = Command::new(env!("CARGO_BIN_EXE_peft"))
        .args(&args)
        .current_dir(w.dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let first = lines.map_while(Result::ok).find(|l| l.contains("is done")).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(first.contains("full-s3"), "{first}");
    let kept = read(&w.path("out/full-s3/report.json"));
    assert!(!w.path("out/compare.json").exists());
    let on = w.json(&args);
    assert_eq!(read(&w.path("out/full-s3/report.json")), kept);
    let whole = w.json(&args.iter().map(|a| if *a == "out" { "whole" } else { a }).collect::<Vec<_>>());
    for (a, b) in rows(&on).into_iter().zip(rows(&whole)) {
        assert_eq!((&a["metrics"], &a["difference"], &a["forget"]), (&b["metrics"], &b["difference"], &b["forget"]));
    }
}

#[test]
fn other_peoples_directories_are_left_alone() {
    let w = World::new();
    w.write("thesis.txt", "x");
    let args: Vec<&str> = SMALL.iter().map(|a| if *a == "out" { "." } else { a }).collect();
    assert!(w.fails(&args, 2).contains("not part of a comparison"));
    assert!(w.fails(&["compare", "data"], 2).contains("is no run directory"));
    assert!(w.fails(&[&SMALL[..], &["--methods", "lora,lora"]].concat(), 2).contains("twice"));
}

/// Images are replaced between two calls: what is kept of the first says nothing of the second.
#[test]
fn figures_of_other_data_or_another_base_are_made_again() {
    let w = World::new();
    w.json(&[&SMALL[..], &["--methods", "lora"]].concat());
    let report = || serde_json::from_slice::<Value>(&read(&w.path("out/lora-s3/report.json"))).unwrap();
    let before = report();
    // All images of a class become those of another, in the set itself and, being the same one, in that of forgetting.
    for i in 0..10 {
        std::fs::copy(w.path(&format!("data/red/{i}.png")), w.path(&format!("data/blue/{i}.png"))).unwrap();
    }
    let second = w.json(&[&SMALL[..], &["--methods", "lora,probe"]].concat());
    let fresh = w.json(&[&SMALL[..6], &["--output", "fresh", "--threads", "1", "--methods", "lora,probe"]].concat());
    assert_ne!(report()["made_of"]["data"], before["made_of"]["data"]);
    assert_eq!(report()["made_of"]["base"], before["made_of"]["base"]);
    let figures = |c: &Value| {
        let group = &c["groups"][0];
        let rows: Vec<_> = rows(c).iter().map(|r| (r["test"].clone(), r["forget"].clone(), r["difference"].clone())).collect();
        (group["zero_shot"].clone(), group["forget"].clone(), rows)
    };
    assert_eq!(figures(&second), figures(&fresh));
}

#[test]
fn without_full_the_first_row_is_the_reference() {
    let w = World::new();
    let args = ["--methods", "tip_adapter,probe"];
    let found = w.json(&[&SMALL[..], &args].concat());
    assert_eq!((&found["reference"], &found["groups"][0]["reference"]), (&"tip_adapter".into(), &"tip_adapter".into()));
    let (first, second) = (rows(&found)[0], rows(&found)[1]);
    assert!(first["difference"].is_null() && first["trainable_parameters"] == 0);
    let (tip, probe) = (hits(&w, "out/tip_adapter-s3"), hits(&w, "out/probe-s3"));
    let mean = probe.iter().map(|(id, hit)| hit - tip[id]).sum::<f64>() / tip.len() as f64;
    assert!((number(&second["difference"]["mean"]) - mean).abs() < 1e-12);
    let page = String::from_utf8(read(&w.path("out/compare.html"))).unwrap();
    assert!(page.contains("− tip_adapter, points") && page.contains("no row `full`"));
    // Nothing trained is a place of its own on the logarithmic axis, and no learning rate was used.
    assert!(!page.contains("NaN") && !page.contains(">inf") && page.contains("0 beside the scale"));
    let markdown = String::from_utf8(read(&w.path("out/compare.md"))).unwrap();
    let line = markdown.lines().find(|l| l.starts_with("| tip_adapter")).unwrap();
    let cells: Vec<&str> = line.split('|').map(str::trim).collect();
    assert!(cells[2] == "–" && cells[5] == "0", "{line}");

    let named = w.json(&[&SMALL[..], &args, &["--reference", "probe"]].concat());
    assert!((number(&rows(&named)[0]["difference"]["mean"]) + mean).abs() < 1e-12);
    let missing = w.json(&[&SMALL[..], &args, &["--reference", "lora"]].concat());
    assert!(missing["notes"].to_string().contains("`lora`") && rows(&missing).iter().all(|r| r["difference"].is_null()));
}
