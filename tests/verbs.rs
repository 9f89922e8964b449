//! The verbs around training: what data holds, which runs there are, a first recipe, the machine, completions, man pages.
#![allow(clippy::unwrap_used)]

mod common;

use common::{World, read};
use serde_json::{Value, json};

fn text(w: &World, args: &[&str]) -> String {
    let out = w.peft(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn data_counts_and_measures_a_folder() {
    let w = World::new();
    let found = w.json(&["data", "data", "--sheet", "sheet.png"]);
    assert_eq!((&found["kind"], &found["splits"]), (&json!("folder"), &json!({"train": 21, "val": 3, "test": 6})));
    assert_eq!(found["classes"][2], json!({"name": "red", "train": 7, "val": 1, "test": 2}));
    assert_eq!(
        (&found["width"], &found["height"]),
        (&json!({"min": 20, "median": 20.0, "max": 20}), &json!({"min": 16, "median": 16.0, "max": 16}))
    );
    assert_eq!(found["captions"], Value::Null);
    // Three rows of ten pictures, each in its class's colour.
    let sheet = image::open(w.path("sheet.png")).unwrap().into_rgb8();
    assert_eq!(sheet.dimensions(), (6 + 10 * 102, 6 + 3 * 122));
    let colours: Vec<usize> = (0..3)
        .map(|row| {
            let pixel = sheet.get_pixel(6 + 48, 6 + row * 122 + 20 + 48).0;
            (0..3).max_by_key(|c| pixel[*c]).unwrap()
        })
        .collect();
    assert_eq!(colours, [2, 1, 0], "blue, green, red");
    let title = sheet.view_title();
    assert!(title > 50, "the first row has a title of {title} dark pixels");
}

trait Title {
    fn view_title(&self) -> usize;
}

impl Title for image::RgbImage {
    /// Dark pixels above the first row.
    fn view_title(&self) -> usize {
        self.enumerate_pixels().filter(|(_, y, p)| *y < 24 && p.0[0] < 64).count()
    }
}

#[test]
fn data_finds_leaks_contradictions_and_broken_files() {
    let w = World::new();
    let copy = |from: &str, to: &str| {
        std::fs::create_dir_all(w.path(to).parent().unwrap()).unwrap();
        std::fs::copy(w.path(from), w.path(to)).unwrap();
    };
    for (class, i) in [("red", 0), ("red", 1), ("blue", 0), ("blue", 1), ("blue", 2)] {
        copy(&format!("data/{class}/{i}.png"), &format!("set/train/{class}/{i}.png"));
    }
    copy("data/green/0.png", "set/val/green/0.png");
    copy("data/red/1.png", "set/test/red/again.png");
    copy("data/blue/2.png", "set/test/red/wrong.png");
    copy("data/blue/3.png", "set/test/blue/3.png");
    copy("data/blue/0.png", "set/train/blue/twice.png");
    std::fs::write(w.path("set/train/red/broken.png"), b"no image").unwrap();
    let found = w.json(&["data", "set"]);
    let d = &found["duplicates"];
    let across: Vec<String> = d["across_splits"].as_array().unwrap().iter().map(|g| g.to_string()).collect();
    assert_eq!(across.len(), 2, "{across:?}");
    assert!(across.iter().any(|g| g.contains("test/red/again.png") && g.contains("red/1.png")), "{across:?}");
    assert_eq!(d["contradicting"].as_array().unwrap().len(), 1);
    assert_eq!(d["within_splits"], 1);
    assert_eq!(found["unreadable"][0]["id"], "train/red/broken.png");
    let shown = text(&w, &["data", "set"]);
    for part in ["2 images are in two splits", "1 images have more than one class", "wrong.png (test, red)", "1 images cannot be read"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
}

#[test]
fn data_measures_captions_against_the_context() {
    let w = World::new();
    let long = "red ".repeat(40);
    w.write(
        "pairs.csv",
        &format!("file,caption,split\ndata/red/0.png,a red thing,train\ndata/red/1.png,{long},train\ndata/red/2.png,,test\ndata/red/3.png,red,val\n"),
    );
    let found = w.json(&["data", "pairs.csv", "--model", "base"]);
    let c = &found["captions"];
    assert_eq!((&c["count"], &c["context"], &c["too_long"], &c["without"]), (&json!(3), &json!(16), &json!(1), &json!(1)));
    // Begin, the word, end; the long one counts beyond the context.
    assert_eq!(c["tokens"]["min"], 3);
    assert!(c["tokens"]["max"].as_u64().unwrap() >= 42, "{c}");
}

#[test]
fn data_reads_recipes_and_the_embedded_sets() {
    let w = World::new();
    w.write("few.yaml", &w.recipe("lora: { rank: 2 }").replace("root: data }", "root: data }\n  shots: 2"));
    assert_eq!(w.json(&["data", "few.yaml"])["splits"]["train"], 6);
    let emoji = w.json(&["data", "builtin:emoji"]);
    assert_eq!(emoji["classes"].as_array().unwrap().len(), 20);
    assert!(emoji["captions"]["count"].as_u64().unwrap() > 300);
    assert!(w.fails(&["data", "base"], 2).contains("holds nothing that can be learnt from"));
}

#[test]
fn runs_are_listed_with_their_state_and_compared() {
    let w = World::new();
    let report = w.json(&["train", "recipe.yaml", "--output", "runs/a"]);
    w.json(&["train", "recipe.yaml", "--output", "runs/deep/b", "--set", "method={lora: {rank: 4}}", "--set", "train.lr=5e-3"]);
    std::fs::create_dir_all(w.path("runs/c")).unwrap();
    std::fs::copy(w.path("runs/a/recipe.yaml"), w.path("runs/c/recipe.yaml")).unwrap();
    // A learning rate beyond all reason ends in numbers that are none.
    w.fails(&["train", "recipe.yaml", "--output", "runs/d", "--set", "train.lr=1e30"], 3);
    let rows = w.json(&["runs"]);
    let states: Vec<_> = rows.as_array().unwrap().iter().map(|r| (r["run"].as_str().unwrap(), r["state"].as_str().unwrap())).collect();
    assert_eq!(states, [("runs/a", "finished"), ("runs/c", "unfinished"), ("runs/d", "failed"), ("runs/deep/b", "finished")]);
    assert_eq!((&rows[0]["before"], &rows[0]["after"]), (&report["before"]["accuracy"], &report["after"]["accuracy"]));
    assert_eq!(rows[0]["trainable_parameters"], report["trainable_parameters"]);
    assert!(rows[2]["reason"].as_str().unwrap().contains("finite"), "{}", rows[2]);
    let held = std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(w.path("runs/c/lock")).unwrap();
    held.lock().unwrap();
    assert_eq!(w.json(&["runs", "runs/c"])[0]["state"], "running");
    let shown = text(&w, &["runs"]);
    let last: Vec<&str> = shown.lines().find(|l| l.starts_with("runs/deep/b")).unwrap().split_whitespace().collect();
    assert_eq!(last[..4], ["runs/deep/b", "finished", "lora", "accuracy"], "{shown}");
    assert!(shown.contains("runs/d: "), "the reason is below: {shown}");

    let diff = w.json(&["runs", "--diff", "runs/a", "runs/deep/b"]);
    let expected = json!([{"key": "method.lora.rank", "a": 2, "b": 4}, {"key": "train.lr", "a": 0.01, "b": 0.005}]);
    assert_eq!(diff["differences"], expected);
    // The file's own text says less than the resolved recipe; resolved they are the same.
    assert_eq!(text(&w, &["runs", "--diff", "recipe.yaml", "runs/a"]), "the recipes are the same\n");
    assert!(w.fails(&["runs", "nowhere"], 2).contains("no such directory"));
    // A failed run can be done again, and is then no longer failed.
    w.json(&["train", "recipe.yaml", "--output", "runs/d", "--force"]);
    assert_eq!(w.json(&["runs", "runs/d"])[0]["state"], "finished");
    // Where a run's images came from.
    assert_eq!(w.json(&["data", "runs/a"])["splits"]["train"], 21);
}

#[test]
fn a_drafted_recipe_passes_the_check_and_trains() {
    let w = World::new();
    let drafted = w.json(&["new", "--data", "data", "--model", "base", "--template", "a {} thing: \"odd\""]);
    assert_eq!((&drafted["recipe"], &drafted["draft"]["task"]), (&json!("data.yaml"), &json!("classify")));
    assert_eq!(drafted["draft"]["classes"], json!(["blue", "green", "red"]));
    let recipe = String::from_utf8(read(&w.path("data.yaml"))).unwrap();
    assert!(recipe.starts_with("# peft train data.yaml\n"), "{recipe}");
    let checked = w.json(&["train", "data.yaml", "--check"]);
    assert_eq!(checked["examples"], drafted["draft"]["examples"]);
    assert!(recipe.contains(&format!("# {} steps", checked["steps"])), "{recipe}");
    let trained = w.json(&["train", "data.yaml", "--set", "train.epochs=2"]);
    assert_eq!(trained["run"], "runs/data");
    assert!(w.fails(&["new", "--data", "data"], 2).contains("--force"));
    for method in peft_adapters::registry::METHODS {
        w.json(&["new", "m.yaml", "--data", "data", "--model", "base", "--method", method.name, "--shots", "2", "--force"]);
        // CoOp's sixteen vectors do not fit into this base's sixteen tokens.
        let fits = if method.name == "coop" { "method={coop: {n_ctx: 4}}" } else { "train.seed=0" };
        w.json(&["train", "m.yaml", "--check", "--set", fits]);
    }
}

#[test]
fn drafts_say_the_task_that_columns_are_made_for() {
    let w = World::new();
    let table = |header: &str, cells: [&str; 2]| {
        let row = |i: usize| format!("data/{}/{i}.png,{}\n", ["red", "blue"][i % 2], cells[i % 2]);
        format!("path,{header}\n{}", (0..10).map(row).collect::<String>())
    };
    for (name, header, cells, task, line) in [
        ("fits", "text,fits", ["a thing,yes", "a dog,no"], "match", "negatives: given"),
        ("ask", "question,answer", ["what?,red", "which?,blue"], "answer", "loss: softmax"),
        ("several", "question,answer", ["what?,red|rose", "which?,blue|sky"], "answer", "loss: bce"),
        ("choices", "question,answer,choices", ["what?,red,red|blue", "which?,blue,red|blue"], "answer", "choose: given"),
        ("multi", "labels", ["warm|red", "cold"], "classify", "labels: multi"),
        ("number", "value", ["1.5", "2"], "regress", "inputs: image"),
        ("both", "value,text", ["1.5,a thing", "2,a thing"], "regress", "inputs: both"),
    ] {
        w.write(&format!("{name}.csv"), &table(header, cells));
        let drafted = w.json(&["new", "--data", &format!("{name}.csv"), "--model", "base"]);
        let recipe = String::from_utf8(read(&w.path(&format!("{name}.yaml")))).unwrap();
        assert!(drafted["draft"]["task"] == task && recipe.contains(line), "{name}: {recipe}");
        w.json(&["train", &format!("{name}.yaml"), "--check"]);
    }
    for (task, data, line) in [("match", "both.csv", "negatives: random"), ("retrieve", "data", "pairs: labels")] {
        w.json(&["new", "wish.yaml", "--data", data, "--model", "base", "--task", task, "--force"]);
        assert!(String::from_utf8(read(&w.path("wish.yaml"))).unwrap().contains(line));
        w.json(&["train", "wish.yaml", "--check"]);
    }
}

#[test]
fn drafts_name_the_columns_of_tables_and_respect_their_splits() {
    let w = World::new();
    let rows = |text: &str| -> String {
        let of = |class: &str| {
            (0..10).map(|i| format!("data/{class}/{i}.png,{class},{text},{}\n", ["train", "val", "test"][i % 3])).collect::<String>()
        };
        of("red") + &of("blue")
    };
    w.write("all.csv", &format!("path,category,caption,split\n{}", rows("a thing")));
    let drafted = w.json(&["new", "--data", "all.csv", "--model", "base"]);
    assert_eq!((&drafted["draft"]["kind"], &drafted["draft"]["examples"]), (&json!("table"), &json!([8, 6, 6])));
    w.json(&["train", "all.yaml", "--check"]);
    w.json(&["new", "pairs.yaml", "--data", "all.csv", "--model", "base", "--task", "retrieve"]);
    w.json(&["train", "pairs.yaml", "--check"]);
    w.write("bare.csv", "path\ndata/red/0.png\n");
    assert!(w.fails(&["new", "--data", "bare.csv"], 2).contains("nothing to learn"));
    for (args, part) in [
        (vec!["new"], "--data PATH"),
        (vec!["new", "--data", "nowhere"], "no such"),
        (vec!["new", "x.yaml", "--data", "data", "--method", "lorra"], "there are lora"),
        (vec!["new", "x.yaml", "--data", "data", "--task", "match"], "lacks a text column"),
        (vec!["new", "x.yaml", "--data", "data", "--template", "a thing"], "`{}`"),
    ] {
        let message = w.fails(&args, 2);
        assert!(message.contains(part) && !w.path("x.yaml").exists(), "{message}");
    }
}

#[test]
fn doctor_says_what_would_be_used() {
    let w = World::new();
    let found = w.json(&["doctor", "--device", "cpu", "--threads", "2"]);
    assert_eq!(found["uses"], json!({"device": "cpu", "threads": 2}));
    assert!(found["cpu"]["available"].as_u64().unwrap() >= 1 && found["memory"]["total"].as_u64().unwrap() > 1 << 28, "{found}");
    std::fs::create_dir_all(w.path("hf/hub/models--openai--clip/blobs")).unwrap();
    std::fs::write(w.path("hf/hub/models--openai--clip/blobs/x"), [0u8; 1000]).unwrap();
    let peft = || {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_peft"));
        command.args(["doctor", "--json"]).env("HF_HOME", w.path("hf")).env_remove("HF_HUB_CACHE").env("HF_TOKEN", "secret-token");
        command.output().unwrap()
    };
    let out = String::from_utf8(peft().stdout).unwrap();
    let found: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&found["caches"][0]["bytes"], &found["caches"][0]["entries"][0]), (&json!(1000), &json!(["openai/clip", 1000])));
    assert!(!out.contains("secret-token") && out.contains("HF_TOKEN"));
}

#[test]
fn completions_and_man_pages_know_every_verb() {
    let w = World::new();
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = text(&w, &["completions", shell]);
        assert!(["train", "runs", "completions", "--sheet"].iter().all(|part| script.contains(part.trim_start_matches("--"))), "{shell}");
    }
    let pages = w.json(&["man", "man"])["pages"].as_array().unwrap().len();
    assert!(pages > 12 && w.path("man/peft.1").exists());
    let train = String::from_utf8(read(&w.path("man/peft-train.1"))).unwrap();
    assert!(train.contains(".TH peft-train 1") && train.contains("Examples") && train.contains("resume"), "{train}");
}

#[test]
fn no_color_is_respected() {
    let w = World::new();
    let help = |no_color: bool| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_peft"));
        command.args(["train", "--help"]).env("CLICOLOR_FORCE", "1").env_remove("NO_COLOR");
        if no_color {
            command.env("NO_COLOR", "1");
        }
        command.current_dir(w.dir.path()).output().unwrap().stdout
    };
    assert!(help(false).contains(&0x1b) && !help(true).contains(&0x1b));
}

#[test]
fn nothing_to_train_on_is_said_before_anything_is_done() {
    let w = World::new();
    w.write("rows.csv", "image,label,split\ndata/red/0.png,red,val\ndata/blue/0.png,blue,val\n");
    let recipe = w.recipe("lora: { rank: 2 }").replace("folder: { root: data }", "table: { path: rows.csv }");
    w.write("rows.yaml", &recipe);
    for args in [&["train", "rows.yaml"][..], &["train", "rows.yaml", "--check"], &["bench", "rows.yaml"]] {
        assert!(w.fails(args, 2).contains("the training split is empty"), "{args:?}");
    }
    assert!(!w.path("run").exists());
    // To evaluate on it is enough.
    assert!(w.peft(&["eval", "rows.yaml", "--split", "val"]).status.success());
}

fn sets(name: &str) -> String {
    format!("{}/tests/data/sets/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// The recipe of a draft, which has to pass the check.
fn drafted(w: &World, args: &[&str]) -> (Value, String) {
    let drafted = w.json(&[&["new", "draft.yaml", "--force", "--model", "base"], args].concat());
    w.json(&["train", "draft.yaml", "--check"]);
    (drafted["draft"].clone(), String::from_utf8(read(&w.path("draft.yaml"))).unwrap())
}

#[test]
fn drafts_take_the_columns_that_are_named() {
    let w = World::new();
    let row = |i: usize| format!("data/{0}/{1}.png;{2};{0};a {0} thing\n", ["red", "blue"][i % 2], i / 2, ["warm+red", "cold"][i % 2]);
    w.write("odd.csv", &format!("bild;tags;kind;words\n{}", (0..20).map(row).collect::<String>()));
    let (draft, _) = drafted(&w, &["--data", "odd.csv", "--image", "bild", "--label", "tags", "--separator", "+"]);
    assert_eq!((&draft["classes"], &draft["columns"]), (&json!(["cold", "red", "warm"]), &json!(["bild", "tags", "kind", "words"])));
    let (draft, recipe) = drafted(&w, &["--data", "odd.csv", "--image", "bild", "--label", "kind"]);
    assert!(draft["classes"] == json!(["blue", "red"]) && recipe.contains("# columns found: bild, tags, kind, words"), "{recipe}");
    let (draft, recipe) = drafted(&w, &["--data", "odd.csv", "--image", "bild", "--text", "words", "--text", "kind"]);
    assert!(draft["task"] == "retrieve" && recipe.contains("text: [words, kind]"), "{recipe}");

    let lines = |i: usize| {
        json!({"f": format!("data/red/{i}.png"), "t": if i.is_multiple_of(2) { vec!["a", "b"] } else { vec!["c"] }}).to_string() + "\n"
    };
    w.write("lists.jsonl", &(0..10).map(lines).collect::<String>());
    let (draft, _) = drafted(&w, &["--data", "lists.jsonl", "--image", "f", "--label", "t"]);
    assert_eq!(draft["classes"], json!(["a", "b", "c"]), "cells are lists");

    let parquet = sets("hf");
    let (draft, recipe) = drafted(&w, &["--data", &parquet, "--text", "question", "--label", "label"]);
    assert!(draft["kind"] == "parquet" && recipe.contains("text: question"), "{recipe}");
    let tars = sets("wds/shard-{000000..000002}.tar");
    let (draft, recipe) = drafted(&w, &["--data", &tars, "--text", "question"]);
    assert!(draft["kind"] == "webdataset" && recipe.contains("text: question"), "{recipe}");

    for (data, found) in [("odd.csv", "bild, tags, kind, words"), ("lists.jsonl", "f, t"), (&parquet, "alternatives"), (&tars, "question")]
    {
        for key in ["--label", "--text"] {
            let message = w.fails(&["new", "x.yaml", "--data", data, key, "nope"], 2);
            assert!(message.contains("`nope`") && message.contains(found) && !w.path("x.yaml").exists(), "{message}");
        }
    }
    for (args, part) in [
        (["--data", "odd.csv", "--image", "nope"], "bild, tags, kind, words"),
        (["--data", "odd.csv", "--separator", "+"], "a column of labels"),
        (["--data", "data", "--label", "kind"], "has no columns"),
        (["--data", "builtin:emoji", "--separator", ";"], "has no columns"),
        (["--data", &tars, "--image", "nope"], "nope"),
    ] {
        let message = w.fails(&[&["new", "x.yaml"][..], &args].concat(), 2);
        assert!(message.contains(part) && !w.path("x.yaml").exists(), "{message}");
    }
}

#[test]
fn drafts_of_small_sets_say_what_that_means() {
    let w = World::new();
    let (draft, recipe) = drafted(&w, &["--data", "data"]);
    assert!(recipe.contains("probe: {") && recipe.contains("Wilson"), "{recipe}");
    assert!(draft["notes"].as_array().unwrap().iter().any(|n| n.as_str().unwrap().contains("3 validation examples")), "{draft}");
    let compared = w.json(&["compare", "draft.yaml", "--epochs", "1", "--output", "out"]);
    let names: Vec<&str> = compared["groups"][0]["rows"].as_array().unwrap().iter().map(|r| r["method"].as_str().unwrap()).collect();
    assert_eq!(names, ["lora", "probe"]);
    let (_, recipe) = drafted(&w, &["--data", "builtin:emoji", "--shots", "8"]);
    assert!(recipe.contains("probe: {") && !recipe.contains("Wilson"), "{recipe}");
    for (class, i) in ["red", "blue"].into_iter().flat_map(|class| (0..40).map(move |i| (class, i))) {
        std::fs::create_dir_all(w.path("more").join(class)).unwrap();
        std::fs::copy(w.path(&format!("data/{class}/{}.png", i % 8)), w.path(&format!("more/{class}/{i}.png"))).unwrap();
    }
    let (_, recipe) = drafted(&w, &["--data", "more"]);
    assert!(!recipe.contains("probe: {"), "{recipe}");
    let (draft, recipe) = drafted(&w, &["--data", "data", "--task", "retrieve"]);
    assert!(recipe.contains("may not") && draft["notes"].to_string().contains("may not"), "{recipe}");
    for method in ["vera", "coop", "tip_adapter", "full"] {
        let args = ["new", "draft.yaml", "--force", "--data", "data", "--model", "base", "--method", method];
        w.json(&args);
        assert!(String::from_utf8(read(&w.path("draft.yaml"))).unwrap().contains("probe: {"));
    }
}

/// Logos: half of each is seen through, in the ways that files say so. Of the photographs one has an alpha channel that hides nothing.
#[test]
fn transparent_images_are_counted_and_drafts_put_them_on_white() {
    let w = World::new();
    let half = |x: u32| if x < 10 { 0 } else { 255 };
    for i in 0..3u8 {
        std::fs::create_dir_all(w.path("logos/bird")).unwrap();
        std::fs::create_dir_all(w.path("logos/fish")).unwrap();
        let rgba = image::RgbaImage::from_fn(20, 16, |x, y| image::Rgba([i * 9, 7, y as u8, half(x)]));
        rgba.save(w.path(&format!("logos/bird/{i}.png"))).unwrap();
        rgba.save(w.path(&format!("logos/bird/{i}.gif"))).unwrap();
        let wide = image::ImageBuffer::<image::LumaA<u16>, _>::from_fn(20, 16, |x, y| {
            image::LumaA([y as u16 * 900 + u16::from(i), u16::from(half(x)) * 257])
        });
        wide.save(w.path(&format!("logos/fish/{i}.png"))).unwrap();
    }
    image::RgbaImage::from_pixel(20, 16, image::Rgba([1, 2, 3, 255])).save(w.path("logos/fish/whole.png")).unwrap();
    let found = w.json(&["data", "logos"]);
    assert_eq!((&found["transparent"], &found["background"]), (&json!(9), &json!("keep")));
    assert!(text(&w, &["data", "logos"]).contains("9 of 10 images have transparent parts"));
    text(&w, &["new", "logos.yaml", "--data", "logos", "--model", "base"]);
    assert_eq!(w.json(&["inspect", "logos.yaml"])["facts"]["recipe"]["images"]["background"], "white");
    // Among many photographs a few logos are no reason.
    std::fs::rename(w.path("logos/bird/0.png"), w.path("data/blue/logo.png")).unwrap();
    assert_eq!(w.json(&["data", "data"])["transparent"], 1);
    text(&w, &["new", "data.yaml", "--data", "data", "--model", "base"]);
    assert_eq!(w.json(&["inspect", "data.yaml"])["facts"]["recipe"]["images"]["background"], "keep");
}
