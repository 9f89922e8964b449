//! What is told of a set before it is trained on, and of an adapter whose task is another one.
#![allow(clippy::unwrap_used)]

mod common;

use common::World;

/// What stands on stderr of a command that succeeds.
fn said(w: &World, args: &[&str]) -> String {
    let out = w.peft(args);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{args:?}: {said}");
    said
}

/// A table of the world's images with a caption each, in three splits.
fn captions(w: &World, extra: &str) {
    let row = |class: &str, i: usize| {
        let split = ["train", "train", "train", "val", "test"][i % 5];
        format!("data/{class}/{i}.png,a {class} thing {i},{class},{split}\n")
    };
    let rows: String = ["red", "green", "blue"].iter().flat_map(|c| (0..10).map(|i| row(c, i)).collect::<Vec<_>>()).collect();
    w.write("set.csv", &format!("image,text,label,split\n{rows}{extra}"));
}

fn of_table(w: &World, task: &str) -> String {
    let folder = "folder: { root: data }";
    let templates = "task:\n  classify: { templates: [\"a {} thing\"] }";
    w.recipe("lora: { rank: 2 }").replace(folder, "table: set.csv").replace(templates, &format!("task:\n  {task}"))
}

/// A head, thresholds and fusions are for one task: another one would pass them over, or take them for something else.
#[test]
fn weights_of_a_task_are_refused_where_the_recipe_has_another() {
    let w = World::new();
    captions(&w, "");
    for (name, task) in [
        ("prompts", "classify: { templates: [\"a {} thing\"] }"),
        ("linear", "classify: { head: linear }"),
        ("texts", "classify: { inputs: text }"),
        ("retrieve", "retrieve: {}"),
        ("match", "match: { negatives: { random: { count: 1 } } }"),
    ] {
        w.write(&format!("{name}.yaml"), &of_table(&w, task).replace("output: run", &format!("output: {name}")));
    }
    for name in ["prompts", "linear", "texts", "match"] {
        w.json(&["train", &format!("{name}.yaml"), "--set", "train.epochs=1"]);
    }
    for (recipe, adapter, named) in [
        ("prompts", "linear", "head"),
        ("linear", "prompts", "head"),
        ("texts", "linear", "inputs"),
        ("linear", "texts", "inputs"),
        ("prompts", "match", "task: match"),
        ("retrieve", "texts", "task: classify"),
    ] {
        let message = w.fails(&["eval", &format!("{recipe}.yaml"), "--adapter", adapter], 2);
        assert!(message.contains(named) && message.contains("help: "), "{recipe} with {adapter}: {message}");
    }
    let message = w.fails(&["train", "texts.yaml", "--output", "again", "--set", "train.init_adapter=linear"], 2);
    assert!(message.contains("inputs"), "{message}");
    // Patches of the towers are for any task; so is an adapter's own recipe.
    w.json(&["eval", "retrieve.yaml", "--adapter", "prompts"]);
    assert_eq!(w.json(&["eval", "linear.yaml", "--adapter", "linear"]), w.json(&["eval", "linear"]));
}

#[test]
fn what_is_tested_and_trained_on_is_told() {
    let w = World::new();
    let told = |args: &[&str]| said(&w, args).contains("trained on as well");
    assert!(!told(&["train", "recipe.yaml", "--check"]));
    for i in 0..10 {
        std::fs::copy(w.path(&format!("data/red/{i}.png")), w.path(&format!("data/red/copy-{i}.png"))).unwrap();
    }
    // Among ten pairs some are divided, whatever the seed.
    assert!(told(&["train", "recipe.yaml", "--set", "train.epochs=1"]) && told(&["eval", "run"]));
    let texts: String = (0..12).map(|i| format!("thing {},{}\n", i % 6, ["x", "y"][i % 2])).collect();
    w.write("set.csv", &format!("text,label\n{texts}"));
    w.write(
        "texts.yaml",
        &of_table(&w, "classify: { inputs: text }").replace("data:\n", "data:\n  split: { train: 0.5, val: 0.25, test: 0.25 }\n"),
    );
    let note = said(&w, &["train", "texts.yaml", "--check"]);
    assert!(note.contains("test examples have texts that are trained on as well"), "{note}");
}

/// An adapter in a bundle has seen its examples as any other has.
#[test]
fn a_bundle_is_asked_what_it_was_trained_on() {
    let w = World::new();
    w.json(&["train", "recipe.yaml", "--set", "train.epochs=1"]);
    w.json(&["merge", "--model", "base", "--adapter", "run", "--bundle", "--output", "bundle"]);
    let same = said(&w, &["eval", "recipe.yaml", "--set", "model=bundle"]);
    assert!(!same.contains("is not known"), "{same}");
    let other =
        said(&w, &["eval", "recipe.yaml", "--set", "model=bundle", "--set", "data.split={train: 0.5, val: 0.2, test: 0.3, seed: 5}"]);
    assert!(other.contains("is not known"), "{other}");
}

#[test]
fn rows_without_an_image_are_found_before_training() {
    let w = World::new();
    captions(&w, ",a thing without a picture,red,train\n");
    w.write("set.yaml", &of_table(&w, "classify: { templates: [\"a {} thing\"] }"));
    for verb in [["train", "set.yaml", "--check"], ["eval", "set.yaml", "--quiet"]] {
        let message = w.fails(&verb, 2);
        assert!(message.contains("set.csv:32") && message.contains("no image"), "{message}");
    }
    let note = said(&w, &["train", "set.yaml", "--set", "data.skip_bad=true", "--set", "train.epochs=1"]);
    assert!(note.contains("no image"), "{note}");
    // Who looks at texts alone does not miss it.
    w.write("texts.yaml", &of_table(&w, "classify: { inputs: text }"));
    assert_eq!(w.json(&["train", "texts.yaml", "--check"])["examples"][0], 19);
}

#[test]
fn classes_that_are_tested_and_never_trained_are_named() {
    let w = World::new();
    let violet = image::RgbImage::from_pixel(20, 16, image::Rgb([140, 0, 200]));
    violet.save(w.path("violet.png")).unwrap();
    captions(&w, "violet.png,a thing,violet,test\n");
    w.write("set.yaml", &of_table(&w, "classify: { templates: [\"a {} thing\"] }"));
    let note = said(&w, &["train", "set.yaml", "--check"]);
    assert!(note.contains("`violet` (1)"), "{note}");
    captions(&w, "");
    assert!(!said(&w, &["train", "set.yaml", "--check"]).contains("no training example"));
}

/// Every image has two labels, so that each of three classes has two thirds of the 27 that are left for training.
#[test]
fn drafts_count_all_labels_of_an_image() {
    let w = World::new();
    let pairs = ["round;red", "red;small", "small;round"];
    let rows: String = (0..30).map(|i| format!("data/{}/{}.png,{}\n", ["red", "green", "blue"][i % 3], i / 3, pairs[i % 3])).collect();
    w.write("tags.csv", &format!("image,tags,split\n{}", rows.replace('\n', ",train\n")));
    let drafted = w.json(&["new", "tags.yaml", "--data", "tags.csv", "--label", "tags", "--separator", ";", "--model", "base"]);
    let notes = drafted["draft"]["notes"].to_string();
    assert!(!notes.contains("no training example") && notes.contains("18 training images a class"), "{notes}");
}

#[test]
fn words_of_a_recipe_that_change_nothing_are_named() {
    let w = World::new();
    let check = |method: &str, set: &str| {
        w.write("odd.yaml", &w.recipe(method));
        said(&w, &["train", "odd.yaml", "--check", "--set", set])
    };
    let none = "train.seed=4";
    assert!(!check("lora: { targets: [q_proj, fc1], exclude: [visual_projection] }", none).contains("note"));
    let note = check("lora: { targets: [q_proj, zz], exclude: [yy], rank_pattern: { xx: 3 } }", none);
    assert!(["`zz`", "`yy`", "`xx`"].iter().all(|name| note.contains(name)) && !note.contains("`q_proj`"), "{note}");
    let note = check("lora: { rank: 2 }", "task={classify: {head: linear, templates: [\"the {}\"]}}");
    assert!(note.contains("task.classify.templates"), "{note}");
    let note = check("lora: { rank: 2 }", "task={classify: {head: linear, head_init: text, templates: [\"the {}\"]}}");
    assert!(!note.contains("task.classify"), "{note}");
    let note = check("lora: { rank: 2 }", "task={classify: {head_init: text}}");
    assert!(note.contains("task.classify.head_init"), "{note}");
}

/// The weights are the same; how many heads divide them, only `config.json` says.
#[test]
fn a_base_with_another_configuration_is_another_base() {
    let w = World::new();
    w.json(&["train", "recipe.yaml", "--set", "train.epochs=1"]);
    let before = w.json(&["eval", "run"]);
    let config = std::fs::read_to_string(w.path("base/config.json")).unwrap();
    w.write("base/config.json", &config.replace("\"num_attention_heads\": 2", "\"num_attention_heads\": 4"));
    for args in [
        ["eval", "run", "--split", "test"],
        ["predict", "--adapter", "run", "data/red/0.png"],
        ["train", "run/recipe.yaml", "--set", "output=run"],
    ] {
        let resumes = args[0] == "train";
        let args = [args.as_slice(), if resumes { &["--resume"] } else { &[] }].concat();
        let message = w.fails(&args, 2);
        assert!(message.contains("config.json"), "{args:?}: {message}");
    }
    // What matters to no result makes no other base.
    w.write("base/config.json", &config.replace("\"projection_dim\": 16,", "\"projection_dim\": 16, \"torch_dtype\": \"float32\","));
    assert_eq!(w.json(&["eval", "run"]), before);
}

#[test]
fn a_changed_recipe_is_told_by_its_key() {
    let w = World::new();
    w.json(&["train", "recipe.yaml", "--set", "train.epochs=1"]);
    let message = w.fails(&["train", "recipe.yaml", "--set", "train.epochs=1", "--set", "data.shots=3", "--resume"], 2);
    assert!(message.contains("data.shots was nothing, is `3`"), "{message}");
}

/// Colours are told apart without a mistake, and the likeliest temperature of that is none at all.
#[test]
fn a_few_right_answers_make_nobody_surer() {
    let w = World::new();
    w.json(&["train", "recipe.yaml", "--set", "task={classify: {head: linear}}", "--set", "train.epochs=20", "--set", "method=none"]);
    let report: serde_json::Value = serde_json::from_slice(&common::read(&w.path("run/report.json"))).unwrap();
    let best = report["best_epoch"].as_u64().unwrap() as usize - 1;
    assert_eq!(report["epochs"][best]["val"]["metrics"]["accuracy"], 1.0);
    let manifest: serde_json::Value = serde_json::from_slice(&common::read(&w.path("run/adapter/peft.json"))).unwrap();
    let temperature = manifest["scalars"]["temperature"].as_f64().unwrap();
    assert!(temperature >= 1.0, "{temperature}");
}

/// A sum with weights has no form to compare with but the sum itself, before it is rounded.
#[test]
fn a_weighted_merge_says_what_rounding_costs() {
    let w = World::new();
    w.json(&["train", "recipe.yaml", "--set", "train.epochs=1"]);
    let merge = |dtype: &str| w.json(&["merge", "--model", "base", "--adapter", "run=0.7", "--dtype", dtype, "--output", dtype]);
    let (half, whole) = (merge("f16"), merge("f32"));
    let logits = |merged: &serde_json::Value| merged["max_abs_diff"].as_f64().unwrap();
    assert!(logits(&half) > 1e-5 && logits(&whole) < 1e-5, "{half} {whole}");
}

#[test]
fn what_has_changed_since_a_run_began_is_told_by_eval() {
    let w = World::new();
    captions(&w, "");
    w.write("set.yaml", &of_table(&w, "classify: { templates: [\"a {} thing\"] }"));
    w.json(&["train", "set.yaml", "--set", "train.epochs=1"]);
    assert!(!said(&w, &["eval", "run"]).contains("since the run began"));
    let table = std::fs::read_to_string(w.path("set.csv")).unwrap();
    w.write("set.csv", &table.replacen("a red thing 4,red,test", "a red thing 4,green,test", 1));
    let note = said(&w, &["eval", "run"]);
    assert!(note.contains("1 example has another label (data/red/4.png: green, was red) since the run began"), "{note}");
    w.write("set.csv", &table);
    std::fs::copy(w.path("data/blue/8.png"), w.path("data/red/4.png")).unwrap();
    let note = said(&w, &["eval", "run"]);
    assert!(note.contains("1 example has another image (data/red/4.png) since the run began"), "{note}");
    // An image under another name has neither come nor gone.
    let w = World::new();
    w.json(&["train", "recipe.yaml", "--set", "train.epochs=1"]);
    std::fs::rename(w.path("data/red"), w.path("data/x")).unwrap();
    std::fs::create_dir(w.path("data/red")).unwrap();
    (0..10).for_each(|i| std::fs::rename(w.path(&format!("data/x/{i}.png")), w.path(&format!("data/red/other-{i}.png"))).unwrap());
    std::fs::remove_dir(w.path("data/x")).unwrap();
    let note = said(&w, &["eval", "run"]);
    assert!(!note.contains("have come"), "{note}");
}

/// A linear head looks at images alone; what sits in the text tower would be trained in vain.
#[test]
fn parameters_that_a_task_does_not_compute_with_are_told_of() {
    let w = World::new();
    let train = |method: &str, task: &str| {
        w.write("idle.yaml", &w.recipe(method));
        said(&w, &["train", "idle.yaml", "--force", "--set", "train.epochs=1", "--set", task])
    };
    let linear = "task={classify: {head: linear}}";
    assert!(train("lora: { rank: 2, towers: text }", linear).contains("in the text tower"));
    assert!(train("lora: { rank: 2 }", linear).contains("in the text tower"));
    assert!(!train("lora: { rank: 2, towers: vision }", linear).contains("tower"));
    assert!(!train("lora: { rank: 2 }", "train.seed=3").contains("tower"));
}

/// No output that is named takes the place of what the same command reads.
#[test]
fn outputs_spare_what_is_read() {
    let w = World::new();
    captions(&w, "");
    w.write("set.yaml", &of_table(&w, "classify: { templates: [\"a {} thing\"] }"));
    w.json(&["train", "set.yaml", "--set", "train.epochs=1"]);
    w.write("labels.txt", "red\nblue\n");
    w.write("texts.txt", "a red thing\n");
    for (read, args) in [
        ("data/red/3.png", "eval set.yaml --predictions data/red/3.png"),
        ("set.csv", "eval set.yaml --predictions set.csv"),
        ("run/report.json", "eval run --predictions run/report.json"),
        ("run/examples.safetensors", "eval run --predictions run/examples.safetensors"),
        ("data/red/3.png", "data set.yaml --sheet data/red/3.png"),
        ("run/adapter/adapter_model.safetensors", "predict --adapter run --csv run/adapter/adapter_model.safetensors data/red/3.png"),
        ("labels.txt", "predict --adapter run --labels labels.txt --csv labels.txt data/red/3.png"),
        ("base/model.safetensors", "embed --model base --texts texts.txt --output base/model.safetensors"),
        ("run/adapter/adapter_model.safetensors", "embed --adapter run --texts texts.txt --output run/adapter/adapter_model.safetensors"),
        ("base/model.safetensors", "merge --model base --adapter run --classifier base/model.safetensors"),
    ] {
        let before = common::read(&w.path(read));
        w.fails(&args.split(' ').collect::<Vec<_>>(), 2);
        assert!(common::read(&w.path(read)) == before, "{args}");
    }
    // What is there and is not read may be replaced, also under a link's name.
    w.json(&["eval", "run", "--predictions", "run/predictions.jsonl"]);
    w.json(&["embed", "--model", "base", "--texts", "texts.txt", "--output", "e.safetensors"]);
    w.json(&["embed", "--model", "base", "--texts", "texts.txt", "--output", "e.safetensors"]);
}

/// A run that starts from an adapter that started from another one has seen what both have.
#[test]
fn chains_of_adapters_remember_all_that_was_seen() {
    let w = World::new();
    let train =
        |name: &str, more: &[&str]| said(&w, &[&["train", "recipe.yaml", "--set", "train.epochs=1", "--output", name], more].concat());
    let seen = |said: &str| said.lines().find(|l| l.contains("test examples were seen by")).map(ToString::to_string);
    let seed = ["--set", "data.split={train: 0.6, val: 0.2, test: 0.2, seed: 5}"];
    train("a", &["--set", "data.split={train: 0.6, val: 0.2, test: 0.2, seed: 0}"]);
    let of_a = seen(&train("b", &[seed.as_slice(), &["--set", "train.init_adapter=a"]].concat()));
    let of_both = seen(&train("c", &[seed.as_slice(), &["--set", "train.init_adapter=b"]].concat()));
    assert!(of_a.is_some() && of_a == of_both, "{of_a:?} {of_both:?}");
    assert!(seen(&said(&w, &["eval", "c"])).is_some());
    assert!(seen(&said(&w, &["eval", "a"])).is_none());
    // An adapter without its run does not say what it has seen.
    std::fs::create_dir(w.path("alone")).unwrap();
    for file in std::fs::read_dir(w.path("a/adapter")).unwrap().map(Result::unwrap) {
        std::fs::copy(file.path(), w.path("alone").join(file.file_name())).unwrap();
    }
    assert!(train("d", &[seed.as_slice(), &["--set", "train.init_adapter=alone"]].concat()).contains("is not known"));
}

#[test]
fn methods_that_cannot_act_together_are_refused_before_training() {
    let w = World::new();
    let refused = |method: &str, task: &str| {
        w.write("odd.yaml", &w.recipe("lora: {}").replace("{ lora: {} }", method));
        w.fails(&["train", "odd.yaml", "--check", "--set", task], 2)
    };
    let prompts = "task={classify: {templates: [\"a {} thing\"]}}";
    assert!(refused("{ tip_adapter: {} }", "task={classify: {head: linear}}").contains("tip_adapter"));
    for pair in ["[{ coop: { n_ctx: 2 } }, { cocoop: { n_ctx: 2 } }]", "[{ coop: { n_ctx: 2 } }, { maple: { n_ctx: 2 } }]"] {
        let message = refused(pair, prompts);
        assert!(message.contains("coop and "), "{pair}: {message}");
    }
    w.write("both.yaml", &w.recipe("lora: {}").replace("{ lora: {} }", "[{ lora: {} }, { coop: { n_ctx: 2 } }]"));
    w.json(&["train", "both.yaml", "--check"]);
}

/// What is no adapter is told to be none, whether or not a base is named.
#[test]
fn what_is_no_adapter_is_told_to_be_none() {
    let w = World::new();
    std::fs::create_dir(w.path("empty")).unwrap();
    for adapter in ["nowhere/at/all", "empty", "data/red/0.png"] {
        for base in [&["--model", "base"][..], &[]] {
            let message = w.fails(&[&["predict", "--adapter", adapter], base, &["data/red/1.png"]].concat(), 2);
            assert!(
                message.contains(&format!("error: {adapter}")) && !message.contains("--model: expected"),
                "{adapter} {base:?}: {message}"
            );
        }
    }
}
