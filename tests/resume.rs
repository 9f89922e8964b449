//! A run that was stopped and resumed ends in the same bits as one that was not.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::Device;
use common::{StopAfter, World, read};
use peft::recipe::Recipe;
use peft::run::Existing;
use peft::session;

fn recipe(w: &World, method: &str, output: &str) -> Recipe {
    let text = w
        .recipe(method)
        .replace("model: base", &format!("model: {}", w.path("base").display()))
        .replace("root: data", &format!("root: {}", w.path("data").display()))
        .replace(
            "seed: 3",
            "seed: 3, accumulate: 2, ema: 0.9, augment: { crop: [0.7, 1.0], flip: true }, patch_dropout: { fraction: 0.5, until: 0.5 }",
        )
        .replace("output: run", &format!("output: {}", w.path(output).display()));
    Recipe::parse("recipe", &text, "recipe", &[]).unwrap()
}

const LORA: &str = "lora: { rank: 2, dropout: 0.2 }";

fn train(w: &World, method: &str, output: &str, existing: Existing, steps: usize) -> peft::Result<(peft::report::TrainReport, bool)> {
    session::train(recipe(w, method, output), existing, &Device::Cpu, &mut StopAfter(steps))
}

#[test]
fn stopped_anywhere_and_resumed_gives_the_same_bits() {
    // What a step drops tells nothing of the next: all of the text tower now and then.
    for method in [LORA, "adalora: { init_r: 3, target_r: 1, tinit: 1, tfinal: 1 }", "loha: { rank: 2, module_dropout: 0.9 }"] {
        stopped_and_resumed(method);
    }
}

fn stopped_and_resumed(method: &str) {
    let w = World::new();
    let train = |output: &str, existing, steps| train(&w, method, output, existing, steps);
    let (whole, _) = train("whole", Existing::Refuse, usize::MAX).unwrap();
    let adapter = read(&w.path("whole/adapter/adapter_model.safetensors"));
    // The first in the evaluation before training, the last in the one after it.
    for stop in [0, 1, 3, 4, whole.steps - 1, whole.steps] {
        let name = format!("stopped{stop}");
        let error = train(&name, Existing::Refuse, stop).unwrap_err();
        assert_eq!(error.exit_code(), 130, "{error}");
        assert!(error.to_string().contains("--resume"));
        let refused = train(&name, Existing::Refuse, usize::MAX).unwrap_err();
        assert!(refused.to_string().contains("unfinished"));
        let (resumed, _) = train(&name, Existing::Resume, usize::MAX).unwrap();
        assert_eq!(read(&w.path(&name).join("adapter/adapter_model.safetensors")), adapter, "stopped after {stop}");
        assert_eq!(resumed.epochs, whole.epochs);
        for file in ["metrics.jsonl", "predictions.jsonl"] {
            assert_eq!(read(&w.path(&name).join(file)), read(&w.path("whole").join(file)), "{file}");
        }
    }
}

#[test]
fn resuming_what_never_began_begins() {
    let w = World::new();
    let (report, finished_before) = train(&w, LORA, "new", Existing::Resume, usize::MAX).unwrap();
    assert!(!finished_before && report.steps > 0);
    assert!(train(&w, LORA, "new", Existing::Resume, usize::MAX).unwrap().1);
}

#[test]
fn training_that_diverges_stops_with_step_and_files() {
    let w = World::new();
    let mut recipe = recipe(&w, LORA, "diverged");
    recipe.train.lr = 1e30;
    let error = session::train(recipe, Existing::Refuse, &Device::Cpu, &mut peft::train::Silent).unwrap_err();
    assert_eq!(error.exit_code(), 3);
    let message = error.to_string();
    assert!(message.contains("not finite") && message.contains("step") && message.contains(".png"), "{message}");
}

/// Texts of a frozen tower are encoded when they first come up, in whatever company: that must not show.
#[test]
fn tasks_on_pairs_resume_in_the_same_bits() {
    let w = World::new();
    let words = ["red", "a green thing", "something quite blue, or nearly so", "nothing", "a very long text about no colour at all"];
    let rows: String = (0..30)
        .map(|i| {
            let colour = ["red", "green", "blue"][i % 3];
            format!(
                "{}\n",
                serde_json::json!({ "image": w.path(&format!("data/{colour}/{}.png", i / 3)), "text": words[i % 5], "fits": i % 2 == 0 })
            )
        })
        .collect();
    w.write("pairs.jsonl", &rows);
    let train = |method: &str, fusion: &str, output: &str, existing, steps| {
        let text = format!(
            "model: {}\nmethod: {method}\ndata: {{ table: {{ path: {} }} }}\ntask: match\nfusion: {{ {fusion} }}\n\
             train: {{ epochs: 4, batch: 4, lr: 1.0e-2, seed: 3, accumulate: 2 }}\noutput: {}\n",
            w.path("base").display(),
            w.path("pairs.jsonl").display(),
            w.path(output).display()
        );
        let recipe = Recipe::parse("recipe", &text, "recipe", &[]).unwrap();
        session::train(recipe, existing, &Device::Cpu, &mut StopAfter(steps))
    };
    for (method, fusion) in [
        ("none", "transformer: { dim: 8, heads: 2, layers: 1, dropout: 0.1 }"),
        ("none", "concat: { hidden: 8, dropout: 0.1 }"),
        ("lora", "cross_attention: { dim: 8, heads: 2 }"),
    ] {
        let name = |n: &str| format!("{}-{method}-{n}", &fusion[..6]);
        let (whole, _) = train(method, fusion, &name("whole"), Existing::Refuse, usize::MAX).unwrap();
        for stop in [1, 5] {
            train(method, fusion, &name(&stop.to_string()), Existing::Refuse, stop).unwrap_err();
            let (resumed, _) = train(method, fusion, &name(&stop.to_string()), Existing::Resume, usize::MAX).unwrap();
            let file = |n: &str| read(&w.path(&name(n)).join("adapter/task.safetensors"));
            assert_eq!(file(&stop.to_string()), file("whole"), "{method} {fusion} stopped after {stop}");
            assert_eq!(resumed.epochs, whole.epochs);
        }
    }
}

/// A finished run says how it ended, and what to do where it should have been longer; a recipe that is printed is a recipe.
#[test]
fn a_finished_run_says_how_it_ended_and_how_to_train_on() {
    let w = World::new();
    let out = w.peft(&["train", "recipe.yaml"]);
    let text = String::from_utf8(out.stdout).unwrap();
    for part in ["examples of the ", " kept", "(Wilson)", "run/report.html", "peft predict --model base --adapter run/adapter"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let quiet = w.peft(&["eval", "run", "--quiet"]);
    assert!(quiet.status.success() && String::from_utf8(quiet.stdout).unwrap().lines().count() == 1);
    let longer = w.fails(&["train", "recipe.yaml", "--resume", "--set", "train.epochs=90"], 2);
    assert!(longer.contains("train.init_adapter=run/adapter"), "{longer}");
    for (name, copy) in [("run", "of-run.yaml"), ("recipe.yaml", "of-recipe.yaml")] {
        let printed = String::from_utf8(w.peft(&["inspect", name]).stdout).unwrap();
        w.write(copy, &printed);
        assert_eq!(w.json(&["inspect", copy])["facts"]["recipe"]["train"], w.json(&["inspect", "run"])["facts"]["recipe"]["train"]);
    }
}
