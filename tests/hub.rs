//! Models and adapters from a hub, against a server on loopback that speaks its endpoints.
#![cfg(feature = "hub")]
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/server.rs"]
mod server;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::World;
use server::{COMMIT, Hub, TOKEN, hash};

impl Hub {
    fn peft(&self, w: &World, args: &[&str], env: &[(&str, &str)]) -> Output {
        self.command(w, args, env).output().unwrap()
    }

    fn command(&self, w: &World, args: &[&str], env: &[(&str, &str)]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_peft"));
        for name in ["HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY"] {
            command.env_remove(name);
        }
        command.env("HF_ENDPOINT", format!("http://127.0.0.1:{}", self.port)).env("HF_HOME", w.path("hf"));
        command.args(args).current_dir(w.dir.path()).envs(env.iter().copied());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn json(&self, w: &World, args: &[&str], env: &[(&str, &str)]) -> serde_json::Value {
        let out = self.peft(w, &[args, &["--json"]].concat(), env);
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice(&out.stdout).unwrap()
    }

    fn fails(&self, w: &World, args: &[&str], env: &[(&str, &str)], code: i32) -> String {
        let out = self.peft(w, args, env);
        let message = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(code), "{args:?}: {message}");
        message
    }
}

/// A base on disk and on a hub.
fn world() -> (World, Hub) {
    let (w, hub) = (World::new(), Hub::new());
    hub.add("some/base", &w.path("base"));
    (w, hub)
}

fn repo(w: &World) -> PathBuf {
    w.path("hf/hub/models--some--base")
}

const OFFLINE: [(&str, &str); 1] = [("HF_HUB_OFFLINE", "1")];

#[test]
fn a_model_comes_once_and_stays_in_pythons_cache() {
    let (w, hub) = world();
    let local = w.json(&["inspect", "base"]);
    let fetched = hub.json(&w, &["inspect", "some/base"], &[]);
    assert_eq!(fetched["facts"]["digest"], local["facts"]["digest"]);
    let link = repo(&w).join("snapshots").join(COMMIT).join("model.safetensors");
    let target = std::fs::read_link(&link).unwrap();
    assert_eq!(target, Path::new("../../blobs").join(hash(&common::read(&w.path("base/model.safetensors")))));
    assert_eq!(std::fs::read_to_string(repo(&w).join("refs/main")).unwrap(), COMMIT);

    let asked = hub.log().len();
    assert_eq!(hub.json(&w, &["inspect", "some/base"], &OFFLINE)["facts"]["digest"], local["facts"]["digest"]);
    assert_eq!(hub.log().len(), asked, "offline asks nobody");
    hub.json(&w, &["inspect", "some/base"], &[]);
    assert!(!hub.log()[asked..].iter().any(|l| l.starts_with("GET")), "{:?}", &hub.log()[asked..]);
    let commit = format!("some/base@{COMMIT}");
    let asked = hub.log().len();
    hub.json(&w, &["inspect", &commit], &[]);
    assert_eq!(hub.log().len(), asked, "a commit never changes");
}

#[test]
fn weights_may_be_pickled_and_sharded() {
    let (w, hub) = world();
    std::fs::create_dir(w.path("bin")).unwrap();
    for file in ["config.json", "tokenizer.json", "preprocessor_config.json"] {
        std::fs::copy(w.path("base").join(file), w.path("bin").join(file)).unwrap();
    }
    let tensors = candle_core::safetensors::load(w.path("base/model.safetensors"), &candle_core::Device::Cpu).unwrap();
    let mut names: Vec<_> = tensors.keys().cloned().collect();
    names.sort();
    let mut map = serde_json::Map::new();
    for (i, part) in names.chunks(names.len().div_ceil(2)).enumerate() {
        let shard = format!("model-0000{}-of-00002.safetensors", i + 1);
        let held: Vec<_> = part.iter().map(|n| (n.clone(), tensors[n].clone())).collect();
        peft::clip::weights::save(&w.path("bin").join(&shard), &held).unwrap();
        part.iter().for_each(|n| _ = map.insert(n.clone(), shard.clone().into()));
    }
    w.write("bin/model.safetensors.index.json", &serde_json::json!({ "weight_map": map }).to_string());
    hub.add("some/shards", &w.path("bin"));
    let whole = w.json(&["inspect", "base"])["facts"]["digest"].clone();
    assert_eq!(hub.json(&w, &["inspect", "some/shards@v1"], &[])["facts"]["digest"], whole);

    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    hub.add("some/pickled", &data.join("open_clip/quick16"));
    let pickled = hub.json(&w, &["inspect", "hf-hub:some/pickled"], &[]);
    assert_eq!(pickled["facts"]["projection"], 12);
    let legacy = w.path("legacy");
    std::fs::create_dir(&legacy).unwrap();
    for file in ["config.json", "pytorch_model.bin", "vocab.json", "merges.txt"] {
        std::fs::copy(data.join("open_clip/hf").join(file), legacy.join(file)).unwrap();
    }
    hub.add("some/legacy", &legacy);
    let here = w.json(&["inspect", &data.join("open_clip/hf").display().to_string()]);
    assert_eq!(hub.json(&w, &["inspect", "some/legacy"], &[])["facts"]["digest"], here["facts"]["digest"]);
}

#[test]
fn what_transformers_5_says_of_images_comes_along() {
    let (w, hub) = (World::new(), Hub::new());
    hub.add("some/five", &Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/open_clip/transformers5"));
    hub.json(&w, &["inspect", "some/five"], &[]);
    let snapshot = w.path("hf/hub/models--some--five/snapshots").join(COMMIT);
    assert!(snapshot.join("processor_config.json").exists());
}

#[test]
fn a_refused_token_says_what_to_do() {
    let (w, hub) = world();
    hub.set(|s| s.private = true);
    let message = hub.fails(&w, &["inspect", "some/base"], &[], 2);
    assert!(message.contains("401") && message.contains("HF_TOKEN") && message.contains("/some/base"), "{message}");
    let message = hub.fails(&w, &["inspect", "some/base"], &[("HF_TOKEN", "hf_wrong")], 2);
    assert!(message.contains("403") && message.contains("this model is gated"), "{message}");
    std::fs::create_dir_all(w.path("hf")).unwrap();
    w.write("hf/token", &format!("{TOKEN}\n"));
    hub.json(&w, &["inspect", "some/base"], &[]);
}

#[test]
fn an_interrupted_download_goes_on_where_it_stopped() {
    let (w, hub) = world();
    hub.set(|s| s.cut = Some(1000));
    let message = hub.fails(&w, &["inspect", "some/base"], &[], 3);
    assert!(message.contains("goes on where it stopped") && message.contains("1000"), "{message}");
    let blob = repo(&w).join("blobs").join(hash(&common::read(&w.path("base/model.safetensors"))));
    let part = PathBuf::from(format!("{}.incomplete", blob.display()));
    assert_eq!(common::read(&part).len(), 1000);
    hub.set(|s| s.cut = None);
    let asked = hub.log().len();
    hub.json(&w, &["inspect", "some/base"], &[]);
    let gets: Vec<String> = hub.log()[asked..].iter().filter(|l| l.starts_with("GET /cdn")).cloned().collect();
    assert!(gets.len() == 1 && gets[0].ends_with("bytes=1000-"), "{gets:?}");
    assert!(!part.exists());
    assert_eq!(common::read(&blob), common::read(&w.path("base/model.safetensors")));
}

#[test]
fn what_is_not_what_was_announced_is_refused() {
    let (w, hub) = world();
    hub.set(|s| s.lie = 7);
    let message = hub.fails(&w, &["inspect", "some/base"], &[], 3);
    assert!(message.contains("expected") && message.contains("bytes"), "{message}");
    // All bytes that there are did come; what follows begins anew.
    std::fs::remove_dir_all(w.path("hf")).unwrap();
    hub.set(|s| (s.lie, s.damaged) = (0, true));
    let message = hub.fails(&w, &["inspect", "some/base"], &[], 3);
    assert!(message.contains("sha256"), "{message}");
    assert!(!repo(&w).join("snapshots").join(COMMIT).join("model.safetensors").exists());
    hub.set(|s| s.damaged = false);
    hub.json(&w, &["inspect", "some/base"], &[]);
}

#[test]
fn offline_and_unreachable() {
    let (w, hub) = world();
    let message = hub.fails(&w, &["inspect", "some/base"], &OFFLINE, 2);
    assert!(message.contains("HF_HUB_OFFLINE") && message.contains("hf"), "{message}");
    let nobody = [("HF_ENDPOINT", "http://127.0.0.1:1")];
    let message = hub.fails(&w, &["inspect", "some/base"], &nobody, 3);
    assert!(message.contains("cannot be reached") && message.contains("HF_HUB_OFFLINE"), "{message}");
    hub.json(&w, &["inspect", "some/base"], &[]);
    let out = hub.peft(&w, &["embed", "--model", "some/base", "--texts", "recipe.yaml", "--output", "o.safetensors"], &nobody);
    let message = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && message.contains("files come from the cache"), "{message}");
}

#[test]
fn two_processes_fetch_a_file_once() {
    let (w, hub) = world();
    hub.set(|s| s.together = 2);
    let children: Vec<_> = (0..2).map(|_| hub.command(&w, &["inspect", "some/base", "--json"], &[]).spawn().unwrap()).collect();
    for child in children {
        let out = child.wait_with_output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
    let gets = hub.log().iter().filter(|l| l.starts_with("GET /cdn")).count();
    assert_eq!(gets, 1);
}

#[test]
fn what_is_not_there_is_said() {
    let (w, hub) = world();
    assert!(hub.fails(&w, &["inspect", "some/other"], &[], 2).contains("no such model"));
    assert!(hub.fails(&w, &["inspect", "some/base@v9"], &[], 2).contains("no revision `v9`"));
    std::fs::create_dir(w.path("siglip")).unwrap();
    w.write("siglip/config.json", r#"{"model_type": "siglip"}"#);
    w.write("siglip/model.safetensors", "x");
    hub.add("some/siglip", &w.path("siglip"));
    assert!(hub.fails(&w, &["inspect", "some/siglip"], &[], 2).contains("SigLIP"));
    assert!(!hub.log().iter().any(|l| l.contains("some/siglip") && l.contains("model.safetensors")), "weights were not asked for");
    let asked = hub.log().len();
    assert!(hub.fails(&w, &["inspect", "./some/base"], &[], 2).contains("no such"));
    std::fs::create_dir_all(w.path("some")).unwrap();
    std::fs::rename(w.path("base"), w.path("some/base")).unwrap();
    hub.json(&w, &["inspect", "some/base"], &[]);
    assert_eq!(hub.log().len(), asked, "a directory wins over an id");
}

#[test]
fn adapters_come_from_the_hub_and_recipes_name_bases_there() {
    let (w, hub) = world();
    let recipe = w.recipe("lora: { rank: 2 }").replace("model: base", "model: some/base@v1").replace("epochs: 4", "epochs: 1");
    w.write("hub.yaml", &recipe);
    hub.json(&w, &["train", "hub.yaml"], &[]);
    hub.add("some/adapter", &w.path("run/adapter"));
    let args = ["predict", "--model", "some/base", "data/red/0.png", "--adapter"];
    let ours = hub.json(&w, &[&args[..], &["run/adapter"]].concat(), &[]);
    assert_eq!(hub.json(&w, &[&args[..], &["some/adapter"]].concat(), &[]), ours);
    assert_eq!(hub.json(&w, &["inspect", "some/adapter"], &[])["kind"], "adapter");
    hub.json(&w, &["merge", "--model", "some/base", "--adapter", "some/adapter=0.5", "--output", "merged"], &[]);
    let message = hub.fails(&w, &[&args[..], &["some/base"]].concat(), &[], 2);
    assert!(message.contains("adapter_config.json"), "{message}");
}

#[test]
fn a_runs_own_adapter_is_never_looked_for_on_the_hub() {
    let (w, hub) = world();
    hub.json(&w, &["train", "recipe.yaml", "--set", "train.epochs=1"], &[]);
    std::fs::remove_dir_all(w.path("run/adapter")).unwrap();
    assert!(hub.fails(&w, &["eval", "run"], &[], 2).contains("no such adapter"));
    assert!(hub.log().is_empty());
}

#[test]
fn datasets_come_from_the_hub_and_stay() {
    let (w, hub) = world();
    let sets = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sets");
    hub.add("datasets/some/pets", &sets.join("hf"));
    let data = "  parquet: { path: 'hub:some/pets', text: caption }";
    let recipe = w.recipe("lora: { rank: 2 }").replace("  folder: { root: data }", data).replace("epochs: 4", "epochs: 1");
    w.write("pets.yaml", &recipe);
    hub.json(&w, &["train", "pets.yaml"], &[]);
    assert!(std::fs::read_to_string(w.path("run/recipe.yaml")).unwrap().contains("hub:some/pets"));
    let repo = w.path("hf/hub/datasets--some--pets");
    let test = repo.join("snapshots").join(COMMIT).join("test-00000-of-00001.parquet");
    assert_eq!(common::read(&test), common::read(&sets.join("hf/test-00000-of-00001.parquet")));
    let asked = hub.log().len();
    let found = hub.json(&w, &["data", "hub:some/pets"], &OFFLINE);
    assert_eq!((hub.log().len(), &found["splits"]["test"]), (asked, &serde_json::json!(6)), "offline asks nobody");
    // A part of the files, by their names; a draft for them.
    let part = hub.json(&w, &["data", "hub:some/pets@v1:test-*"], &[]);
    assert_eq!((part["splits"]["train"].as_u64(), part["splits"]["test"].as_u64()), (Some(0), Some(6)));
    hub.json(&w, &["new", "--data", "hub:some/pets", "draft.yaml"], &OFFLINE);
    assert!(std::fs::read_to_string(w.path("draft.yaml")).unwrap().contains("hub:some/pets"));

    // What Python fetched has no list of ours, and may lack files.
    std::fs::remove_dir_all(repo.join("listings")).unwrap();
    assert_eq!(hub.json(&w, &["data", "hub:some/pets"], &OFFLINE)["splits"]["test"], 6);
    std::fs::remove_file(repo.join("snapshots").join(COMMIT).join("train-00001-of-00002.parquet")).unwrap();
    let message = hub.fails(&w, &["data", "hub:some/pets"], &OFFLINE, 2);
    assert!(message.contains("1 of the 2 files train-"), "{message}");
    // A file whose content was cleared away is no file that the set does not have.
    std::fs::remove_file(test.canonicalize().unwrap()).unwrap();
    let message = hub.fails(&w, &["data", "hub:some/pets@v1:test-*"], &OFFLINE, 2);
    assert!(message.contains("test-00000-of-00001.parquet"), "{message}");
}

#[test]
fn datasets_that_are_not_there_are_said() {
    let (w, hub) = world();
    hub.add("datasets/some/pets", &w.path("data"));
    assert!(hub.fails(&w, &["data", "hub:some/other"], &[], 2).contains("no such dataset"));
    assert!(hub.fails(&w, &["data", "hub:some/pets@v9"], &[], 2).contains("no revision `v9`"));
    assert!(hub.fails(&w, &["data", "hub:some/pets"], &[], 2).contains("refs/convert/parquet"));
    assert!(hub.fails(&w, &["data", "hub:nothing"], &[], 2).contains("hub:owner/dataset"));
    let message = hub.fails(&w, &["data", "hub:some/unseen"], &OFFLINE, 2);
    assert!(message.contains("HF_HUB_OFFLINE is set"), "{message}");
    hub.set(|s| s.private = true);
    let message = hub.fails(&w, &["data", "hub:some/pets"], &[], 2);
    assert!(message.contains("HF_TOKEN") && message.contains("datasets/some/pets"), "{message}");
}

/// No sleeps and no clocks: where the patience did not hold, the command would not end.
#[test]
fn a_silent_hub_ends_in_a_stated_time_and_an_endless_one_at_a_stated_size() {
    let (w, hub) = world();
    let fast = [("HF_HUB_DOWNLOAD_TIMEOUT", "0.2"), ("PEFT_HUB_MAX_UNSIZED", "100000")];
    let inspect = ["inspect", "some/base"];
    hub.set(|s| s.silent = Some("HEAD"));
    assert!(hub.fails(&w, &inspect, &fast, 3).contains("cannot be reached"));
    hub.set(|s| (s.silent, s.unsized_files) = (None, true));
    for part in ["GET /some/base/resolve", "GET /cdn"] {
        hub.set(|s| s.silent = Some(part));
        hub.fails(&w, &inspect, &fast, 3);
        hub.set(|s| (s.silent, s.hanging) = (None, Some(part)));
        hub.fails(&w, &inspect, &fast, 3);
        hub.set(|s| s.hanging = None);
    }
    // Small files, of which nothing is here yet.
    hub.set(|s| s.endless = Some("GET /some/base/resolve"));
    let message = hub.fails(&World::new(), &inspect, &fast, 3);
    assert!(message.contains("100000") && message.contains("PEFT_HUB_MAX_UNSIZED"), "{message}");
    hub.set(|s| s.endless = Some("GET /cdn"));
    hub.fails(&w, &inspect, &fast, 3);
    assert!(hub.fails(&w, &inspect, &[("HF_HUB_DOWNLOAD_TIMEOUT", "soon")], 2).contains("seconds"));
    // What was refused left nothing behind: files without a size come whole.
    hub.set(|s| s.endless = None);
    let local = w.json(&["inspect", "base"]);
    assert_eq!(hub.json(&w, &inspect, &[])["facts"]["digest"], local["facts"]["digest"]);
}

#[test]
fn a_signature_comes_with_its_adapter() {
    let (w, hub) = world();
    w.json(&["train", "recipe.yaml", "--set", "train.epochs=1"]);
    w.json(&["sign", "--generate", "release"]);
    let predict = |key: &'static str| ["predict", "--model", "base", "--adapter", "some/adapter", "--trusted-key", key, "data/red/1.png"];
    hub.add("some/unsigned", &w.path("run/adapter"));
    let unsigned = ["predict", "--model", "base", "--adapter", "some/unsigned", "--trusted-key", "release.pub", "data/red/1.png"];
    assert!(hub.fails(&w, &unsigned, &[], 2).contains("is not signed"));
    // A file that no verb reads is signed as well.
    w.write("run/adapter/LICENSE", "free");
    w.json(&["sign", "run/adapter", "--key", "release.key"]);
    hub.add("some/adapter", &w.path("run/adapter"));
    hub.json(&w, &predict("release.pub"), &[]);
    hub.json(&w, &predict("release.pub"), &OFFLINE);
    w.json(&["sign", "--generate", "other"]);
    assert!(hub.fails(&w, &predict("other.pub"), &[], 2).contains("not signed by a trusted key"));
}
