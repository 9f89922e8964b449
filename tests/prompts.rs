//! Prompt and feature methods through the real binary: what they train, what they refuse, what becomes of them.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use common::{World, read};
use serde_json::Value;

fn number(v: &Value) -> f64 {
    v.as_f64().unwrap_or_else(|| panic!("{v} is no number"))
}

/// Trains `method` in `run`; the report.
fn train(w: &World, run: &str, method: &str) -> Value {
    w.write("m.yaml", &w.recipe(method));
    w.json(&["train", "m.yaml", "--output", run])
}

fn probability(ranked: &Value, label: &str) -> f64 {
    let all = ranked[0]["predictions"].as_array().unwrap();
    number(&all.iter().find(|p| p["label"] == label).unwrap()["probability"])
}

#[test]
fn context_of_words_starts_where_the_words_are() {
    let w = World::new();
    let plain = w.json(&["eval", "recipe.yaml"]);
    for method in ["coop: { init: a }", "maple: { init: a thing, n_ctx: 1, depth: 1 }", "cocoop: { init: a }"] {
        let report = train(&w, "run", method);
        let first = number(&report["before"]["loss"]);
        // MaPLe's tokens in the image tower and CoCoOp's shift change what only words would leave alone.
        if method.starts_with("coop") {
            assert!((first - number(&plain["loss"])).abs() < 1e-5, "{method}: {first} {plain}");
        }
        assert!(number(&report["after"]["loss"]) < first, "{method}: {report}");
        assert_eq!(w.json(&["eval", "run"])["loss"], report["after"]["loss"], "{method}");
        std::fs::remove_dir_all(w.path("run")).unwrap();
    }
}

#[test]
fn shared_context_takes_other_labels_and_class_specific_context_does_not() {
    let w = World::new();
    train(&w, "shared", "coop: { n_ctx: 3, position: middle }");
    let predict = |run: &str, labels: &[&'static str]| {
        let adapter = format!("{run}/adapter");
        let args = [&["predict", "--model", "base", "--adapter", &adapter, "data/red/0.png"], labels].concat();
        w.peft(&[args.as_slice(), &["--json"]].concat())
    };
    let count =
        |out: std::process::Output| serde_json::from_slice::<Value>(&out.stdout).unwrap()[0]["predictions"].as_array().unwrap().len();
    assert_eq!(count(predict("shared", &["--labels", "yellow,red"])), 2);
    w.write("t.txt", "red\nyellow\n");
    w.json(&["embed", "--model", "base", "--adapter", "shared/adapter", "--texts", "t.txt", "--output", "e.safetensors"]);

    let report = train(&w, "own", "coop: { n_ctx: 2, class_specific: true }");
    assert_eq!(number(&report["trainable_parameters"]), 3.0 * 2.0 * 16.0);
    assert_eq!(w.json(&["eval", "own"])["accuracy"], report["after"]["accuracy"]);
    assert_eq!(count(predict("own", &[])), 3);
    let refused = predict("own", &["--labels", "yellow,red"]);
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(2) && message.contains("each of its classes"), "{message}");
    let embed = ["embed", "--model", "base", "--adapter", "own/adapter", "--texts", "t.txt", "--output", "f.safetensors"];
    assert!(w.fails(&embed, 2).contains("class-specific"));
    // The same adapter on other classes.
    std::fs::rename(w.path("data/red"), w.path("data/yellow")).unwrap();
    let message = w.fails(&["eval", "recipe.yaml", "--adapter", "own/adapter"], 2);
    assert!(message.contains("3 classes"), "{message}");
    // A retrieval task has no classes to have vectors for.
    let sets = ["--set", "method={coop: {n_ctx: 2, class_specific: true}}", "--set", "task=retrieve", "--check"];
    let message = w.fails(&[&["train", "recipe.yaml"], sets.as_slice()].concat(), 2);
    assert!(message.contains("needs a task with classes"), "{message}");
}

#[test]
fn context_for_each_image_is_priced_and_predicts() {
    let w = World::new();
    w.write("m.yaml", &w.recipe("cocoop: { n_ctx: 2, reduction: 4 }"));
    let checked = w.json(&["train", "m.yaml", "--check"]);
    let shared = w.json(&["train", "recipe.yaml", "--check", "--set", "method={coop: {n_ctx: 2}}"]);
    assert_eq!((&checked["texts_per_step"], &shared["texts_per_step"]), (&24.into(), &3.into()), "8 images, 3 classes");
    assert!(number(&checked["memory"]["activations"]) > 2.0 * number(&shared["memory"]["activations"]));

    let report = w.json(&["train", "m.yaml"]);
    assert!(number(&report["after"]["accuracy"]) > number(&report["before"]["accuracy"]), "{report}");
    assert_eq!(w.json(&["eval", "run"])["accuracy"], report["after"]["accuracy"]);
    let ranked = w.json(&["predict", "--model", "base", "--adapter", "run/adapter", "data/red/0.png"]);
    assert_eq!(ranked[0]["predictions"][0]["label"], "red");
    w.write("t.txt", "red\n");
    let embed = ["embed", "--model", "base", "--adapter", "run/adapter", "--texts", "t.txt", "--output", "e.safetensors"];
    assert!(w.fails(&embed, 2).contains("each image"));
    assert!(w.fails(&["train", "m.yaml", "--check", "--set", "task=retrieve"], 2).contains("classes"));
    assert!(w.fails(&["merge", "--model", "base", "--adapter", "run/adapter", "--classifier", "c.safetensors"], 2).contains("cocoop"));
    let saved = w.json(&["train", "m.yaml", "--output", "saved", "--set", "train.checkpointing=true"]);
    let (a, b) = (number(&report["after"]["loss"]), number(&saved["after"]["loss"]));
    assert!((a - b).abs() < 1e-4, "{a} {b}");
}

#[test]
fn a_cache_is_filled_without_a_step_and_tuned_on_validation() {
    let w = World::new();
    let plain = w.json(&["eval", "recipe.yaml"]);
    let report = train(&w, "free", "tip_adapter: { beta_steps: 20 }");
    assert_eq!((&report["steps"], &report["trainable_parameters"]), (&0.into(), &0.into()));
    assert_eq!(report["before"]["loss"], plain["loss"]);
    assert!(number(&report["after"]["accuracy"]) > number(&plain["accuracy"]), "{report}");
    assert_eq!(w.json(&["eval", "free"])["loss"], report["after"]["loss"]);
    let tensors = candle_core::safetensors::load(w.path("free/adapter/adapter_model.safetensors"), &Device::Cpu).unwrap();
    let part = |name: &str| &tensors[&format!("base_model.model.vision_model.cache.{name}")];
    assert_eq!(part("keys").dims(), [21, 16]);
    assert_ne!(part("alpha_beta").to_vec1::<f32>().unwrap(), [1.0, 1.0], "searched");
    // Without validation examples the recipe's values stay.
    let fixed = ["--set", "method={tip_adapter: {search: false, alpha: 2.5, beta: 3.0}}", "--output", "fixed"];
    w.json(&[&["train", "recipe.yaml"], fixed.as_slice()].concat());
    let tensors = candle_core::safetensors::load(w.path("fixed/adapter/adapter_model.safetensors"), &Device::Cpu).unwrap();
    assert_eq!(tensors["base_model.model.vision_model.cache.alpha_beta"].to_vec1::<f32>().unwrap(), [2.5, 3.0]);

    // Keys of augmented images are others, and again the same for the same seed.
    let views = |run: &str| {
        let sets = ["--set", "method={tip_adapter: {search: false}}", "--set", "train.augment={flip: true, crop: [0.5, 1.0]}"];
        w.json(&[&["train", "recipe.yaml", "--output", run], sets.as_slice()].concat());
        let tensors = candle_core::safetensors::load(w.path(run).join("adapter/adapter_model.safetensors"), &Device::Cpu).unwrap();
        tensors["base_model.model.vision_model.cache.keys"].flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let keys = views("views");
    assert_ne!(keys, part("keys").flatten_all().unwrap().to_vec1::<f32>().unwrap());
    assert_eq!(views("views2"), keys);

    let trained = train(&w, "trained", "tip_adapter: { train: true, beta_steps: 20 }");
    assert!(number(&trained["steps"]) > 0.0 && number(&trained["after"]["accuracy"]) > number(&plain["accuracy"]), "{trained}");
    let again = w.json(&["train", "m.yaml", "--output", "again"]);
    assert_eq!(again["after"]["loss"], trained["after"]["loss"]);
    let merge = ["merge", "--model", "base", "--adapter", "free/adapter", "--classifier", "c.safetensors"];
    assert!(w.fails(&merge, 2).contains("tip_adapter"));
    assert!(w.fails(&["train", "m.yaml", "--check", "--set", "task=retrieve"], 2).contains("classes"));
}

#[test]
fn a_linear_head_can_start_at_the_class_prompts() {
    let w = World::new();
    let plain = w.json(&["eval", "recipe.yaml"]);
    let recipe = w.recipe("x").replace("{ x }", "none").replace("classify: {", "classify: { head: linear, head_init: text,");
    w.write("probe.yaml", &recipe);
    let report = w.json(&["train", "probe.yaml"]);
    assert!((number(&report["before"]["loss"]) - number(&plain["loss"])).abs() < 1e-5, "{report} {plain}");
    assert!(number(&report["after"]["loss"]) < number(&report["before"]["loss"]));
}

const MIXED: &str = "[{lora: {rank: 2}}, {bottleneck: {reduction: 4}}, {coop: {n_ctx: 2}}]";

#[test]
fn mixed_methods_train_together_and_load_back() {
    let w = World::new();
    w.write("m.yaml", &w.recipe("x").replace("{ x }", MIXED));
    let report = w.json(&["train", "m.yaml"]);
    assert!(number(&report["after"]["accuracy"]) > 0.9, "{report}");
    for part in ["0-lora", "1-bottleneck", "2-coop"] {
        let path = w.path("run/adapter").join(part).join("adapter_model.safetensors");
        let tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        assert!(!tensors.is_empty(), "{part}");
        // Each was trained: what starts at zero no longer is.
        for (name, t) in tensors.iter().filter(|(n, _)| n.contains("lora_B") || n.contains("adapter_up")) {
            let largest = t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            assert!(largest > 0.0, "{name}");
        }
    }
    assert_eq!(w.json(&["eval", "run"])["loss"], report["after"]["loss"]);
    // Going on from it starts where it ended.
    let sets = ["--set", "train.init_adapter=run/adapter", "--set", "train.steps=1", "--set", "train.epochs=null", "--output", "on"];
    let on = w.json(&[&["train", "m.yaml"], sets.as_slice()].concat());
    assert_eq!(on["before"]["loss"], report["after"]["loss"]);
}

/// softmax(logit_scale · x/‖x‖ · weightᵀ) of one image by hand.
fn applied(w: &World, classifier: &str, images: &[&str], class: &str) -> f64 {
    let (tensors, metadata) = peft::clip::weights::read_safetensors(classifier, &read(&w.path(classifier))).unwrap();
    let get = |name: &str| tensors.iter().find(|(n, _)| n == name).map(|(_, t)| t.clone());
    w.json(&[&["embed", "--images", "one.txt", "--output", "x.safetensors", "--normalize"], images].concat());
    let x = candle_core::safetensors::load(w.path("x.safetensors"), &Device::Cpu).unwrap().remove("image_embeds").unwrap();
    let scale: f64 = metadata["logit_scale"].parse().unwrap();
    let mut logits = (x.matmul(&get("weight").unwrap().t().unwrap()).unwrap() * scale).unwrap();
    if let Some(bias) = get("bias") {
        logits = logits.broadcast_add(&bias).unwrap();
    }
    let p: Tensor = candle_nn::ops::softmax(&logits, 1).unwrap().to_dtype(DType::F64).unwrap();
    let classes: Vec<String> = serde_json::from_str(&metadata["classes"]).unwrap();
    let at = classes.iter().position(|c| c == class).unwrap();
    p.to_vec2::<f64>().unwrap()[0][at]
}

#[test]
fn a_classifier_matrix_gives_the_predictions_to_anybody() {
    let w = World::new();
    w.write("one.txt", "data/red/0.png\n");
    let classifier = |run: &str| {
        w.json(&["merge", "--model", "base", "--adapter", &format!("{run}/adapter"), "--classifier", &format!("{run}.safetensors")]);
        let ranked = w.json(&["predict", "--model", "base", "--adapter", &format!("{run}/adapter"), "data/red/0.png"]);
        probability(&ranked, "red")
    };
    train(&w, "coop", "coop: { n_ctx: 2, class_specific: true }");
    let expected = classifier("coop");
    assert!((applied(&w, "coop.safetensors", &["--model", "base"], "red") - expected).abs() < 1e-5);

    let probe = w.recipe("x").replace("{ x }", "none").replace("classify: {", "classify: { head: linear,");
    w.write("probe.yaml", &probe.replace("lr: 1.0e-2", "lr: 0.1"));
    w.json(&["train", "probe.yaml", "--output", "probe"]);
    let expected = classifier("probe");
    assert!((applied(&w, "probe.safetensors", &["--model", "base"], "red") - expected).abs() < 1e-5);

    // Where images are adapted too, their features have to come from the adapter.
    train(&w, "both", "clip_adapter: { towers: both }");
    let expected = classifier("both");
    let adapted = ["--model", "base", "--adapter", "both/adapter"];
    assert!((applied(&w, "both.safetensors", &adapted, "red") - expected).abs() < 1e-5);
    let out = w.peft(&["merge", "--model", "base", "--adapter", "both/adapter", "--classifier", "both.safetensors", "--force"]);
    assert!(String::from_utf8_lossy(&out.stderr).contains("image features too"));

    // Plain prompts without an adapter; a file that exists is kept.
    w.json(&["merge", "--model", "base", "--labels", "red,sky", "--template", "a {} thing", "--classifier", "plain.safetensors"]);
    let ranked = w.json(&["predict", "--model", "base", "--labels", "red,sky", "--template", "a {} thing", "data/red/0.png"]);
    assert!((applied(&w, "plain.safetensors", &["--model", "base"], "sky") - probability(&ranked, "sky")).abs() < 1e-5);
    assert!(w.fails(&["merge", "--model", "base", "--labels", "a,b", "--classifier", "plain.safetensors"], 2).contains("--force"));
    assert!(w.fails(&["merge", "--model", "base", "--classifier", "none.safetensors"], 2).contains("label"));
}

#[test]
fn a_bundle_is_a_base_for_every_command() {
    let w = World::new();
    w.write("m.yaml", &w.recipe("x").replace("{ x }", "[{prefix: {length: 2}}, {coop: {n_ctx: 2}}]"));
    let report = w.json(&["train", "m.yaml"]);
    let merge = ["merge", "--model", "base", "--adapter", "run/adapter", "--output", "bundle"];
    assert!(w.fails(&merge, 2).contains("--bundle"));
    let done = w.json(&[&merge[..], &["--bundle"]].concat());
    assert!(number(&done["relative_diff"]) < 1e-6);

    let both = w.json(&["predict", "--model", "base", "--adapter", "run/adapter", "data/blue/0.png"]);
    assert_eq!(w.json(&["predict", "--model", "bundle", "data/blue/0.png"]), both);
    w.json(&["embed", "--model", "bundle", "--images", "data/red", "--output", "e.safetensors"]);
    w.json(&["embed", "--model", "base", "--adapter", "run/adapter", "--images", "data/red", "--output", "f.safetensors"]);
    assert_eq!(read(&w.path("e.safetensors")), read(&w.path("f.safetensors")));
    assert_eq!(w.json(&["inspect", "bundle"])["facts"]["adapters"].as_array().unwrap().len(), 1);
    let evaluated = w.json(&["eval", "m.yaml", "--adapter", "run/adapter"]);
    assert_eq!(evaluated["loss"], report["after"]["loss"]);
    w.write("on.yaml", &w.recipe("lora: { rank: 2 }").replace("model: base", "model: bundle").replace("output: run", "output: on"));
    assert_eq!(w.json(&["eval", "on.yaml"])["loss"], report["after"]["loss"], "a recipe on the bundle begins where it is");
    assert!(number(&w.json(&["bench", "on.yaml", "--steps", "1"])["trainable_parameters"]) > 0.0);

    // What is trained on a bundle belongs to it, not to the base below.
    let on = w.json(&["train", "on.yaml"]);
    assert_eq!(on["before"]["loss"], report["after"]["loss"]);
    assert_eq!(w.json(&["eval", "on"])["loss"], on["after"]["loss"]);
    assert!(w.fails(&["predict", "--model", "base", "--adapter", "on/adapter", "data/red/0.png"], 2).contains("was made for"));
    w.json(&["merge", "--model", "bundle", "--adapter", "on/adapter", "--output", "more", "--bundle"]);
    let stacked = w.json(&["predict", "--model", "bundle", "--adapter", "on/adapter", "data/blue/0.png"]);
    assert_eq!(w.json(&["predict", "--model", "more", "data/blue/0.png"]), stacked);

    // What folds is folded out of a bundle, too; what was changed by hand is noticed.
    w.json(&["train", "recipe.yaml", "--output", "lora"]);
    w.json(&["merge", "--model", "base", "--adapter", "lora/adapter", "--output", "linear", "--bundle"]);
    w.json(&["merge", "--model", "linear", "--output", "flat"]);
    let predict =
        |model: &str| w.json(&["predict", "--model", model, "--labels", "red,blue", "--template", "a {} thing", "data/red/0.png"]);
    let off = probability(&predict("flat"), "red") - probability(&predict("linear"), "red");
    assert!(off.abs() < 1e-5 && !w.path("flat/bundle.json").exists());
    let weights = w.path("linear/adapters/0/adapter_model.safetensors");
    let mut bytes = read(&weights);
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(weights, bytes).unwrap();
    assert!(w.fails(&["predict", "--model", "linear", "data/red/0.png"], 2).contains("bundle.json"));
}

#[test]
fn every_methods_recipe_is_valid() {
    let w = World::new();
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/methods");
    let mut seen = 0;
    for file in std::fs::read_dir(&dir).unwrap() {
        let path = file.unwrap().path();
        assert_eq!(w.json(&["inspect", path.to_str().unwrap()])["kind"], "recipe", "{}", path.display());
        seen += 1;
    }
    assert!(seen > 0);
}

#[test]
fn only_the_projection_folds() {
    let w = World::new();
    let methods = [
        ("vpt: { length: 2, depth: 1, dropout: 0.1 }", false),
        ("maple: { depth: 2 }", false),
        ("clip_adapter: { ratio: 0.5 }", false),
        ("prolip: { lambda: 0.01 }", true),
    ];
    for (method, folds) in methods {
        let name = method.split(':').next().unwrap();
        let report = train(&w, name, method);
        assert!(number(&report["after"]["loss"]) < number(&report["before"]["loss"]), "{method}: {report}");
        assert_eq!(w.json(&["eval", name])["loss"], report["after"]["loss"], "{method}");
        let adapter = format!("{name}/adapter");
        let merge = ["merge", "--model", "base", "--adapter", &adapter, "--output", "m"];
        match folds {
            true => assert!(number(&w.json(&merge)["relative_diff"]) < 1e-5),
            false => assert!(w.fails(&merge, 2).contains("--bundle")),
        }
    }
}
