//! Every recipe in the tree: it parses, its values are in range, its methods find their targets, its head says how to start it
//! and what to expect.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use candle_core::Device;
use peft::builtin::recipes::{RECIPES, summary};
use peft::clip::base::Base;
use peft::delta::Adapters;
use peft::recipe::Recipe;
use peft_adapters::TaskFacts;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes")
}

/// Path relative to `recipes/`, text, recipe.
fn all() -> Vec<(String, String, Recipe)> {
    let files = walkdir::WalkDir::new(root()).sort_by_file_name().into_iter().flatten().filter(|e| e.file_type().is_file());
    files
        .map(|entry| {
            let name = entry.path().strip_prefix(root()).unwrap().display().to_string();
            let text = std::fs::read_to_string(entry.path()).unwrap();
            let recipe = Recipe::load(entry.path(), &[]).unwrap_or_else(|e| panic!("{e}"));
            (name, text, recipe)
        })
        .collect()
}

#[test]
fn each_opens_with_its_command_and_its_result() {
    for (name, text, _) in all() {
        let mut lines = text.lines();
        let first = lines.next().unwrap();
        assert!(first.starts_with("# peft ") && first.contains(&format!("recipes/{name}")), "{name}: {first}");
        assert!(summary(&text).len() > 20, "{name}: the second line says what it is for");
        let head: String = lines.take_while(|l| l.starts_with('#')).collect();
        let result = ["accuracy", "recall", "%"].iter().any(|word| head.contains(word)) && head.contains(|c: char| c.is_ascii_digit());
        assert!(result, "{name}: the head does not say what to expect");
    }
}

#[test]
fn each_trains_something_and_writes_to_a_place_of_its_own() {
    let base = Base::load("builtin:tiny", candle_core::DType::F32, &Device::Cpu).unwrap();
    let mut outputs = std::collections::HashSet::new();
    for (name, text, recipe) in all() {
        // The embedded base has the same sites as every CLIP.
        let sites = base.clip.sites().for_task(TaskFacts { classes: 20, examples: 320 });
        let adapters = Adapters::plan(&recipe.method, &sites, 0, &Device::Cpu).unwrap_or_else(|e| panic!("{name}: {e}"));
        // A cache of features trains nothing, and still changes the base.
        assert!(adapters.params.count() > 0 || !recipe.method.is_empty() || recipe.task.definition().has_own_weights(), "{name}");
        assert!(outputs.insert(recipe.output.clone()), "{name}: another recipe writes to {:?}", recipe.output);
        // What --check prints and a run directory keeps is the same recipe.
        let again = Recipe::parse(&name, &recipe.to_yaml().unwrap(), &recipe.name, &[]).unwrap();
        assert_eq!(again, recipe, "{name}");
        if let Some((_, embedded)) = RECIPES.iter().find(|(n, _)| format!("{n}.yaml") == name) {
            assert_eq!(*embedded, text);
        }
    }
    assert!(outputs.len() >= RECIPES.len());
}

/// FEW_SHOT.md of the paper's reference: r = 2, α = 1 over √r, q, k, v of both towers, dropout 0.25, AdamW 2e-4 with weight decay
/// 1e-2, cosine to 1e-6 without a warm-up, batch 32, 500 iterations for each shot, crops of 0.08 to 1, the last weights.
#[test]
fn clip_lora_is_the_papers() {
    let found: Vec<_> = all().into_iter().filter(|(name, ..)| name.starts_with("clip-lora/")).collect();
    assert_eq!(found.len(), 11);
    for (name, _, recipe) in found {
        let value = serde_json::to_value(&recipe).unwrap();
        let at = |pointer: &str| value.pointer(pointer).unwrap_or_else(|| panic!("{name}: {pointer}")).clone();
        let lora = at("/method/lora");
        assert_eq!(
            (&lora["rank"], &lora["alpha"], &lora["rslora"], &lora["dropout"]),
            (&2.into(), &1.0.into(), &true.into(), &0.25.into())
        );
        assert_eq!((&lora["towers"], lora.get("layers")), (&"both".into(), None));
        assert_eq!(lora["targets"], serde_json::json!(["q_proj", "k_proj", "v_proj"]));
        assert_eq!(recipe.train.steps, recipe.data.shots.map(|k| 500 * k), "{name}");
        assert_eq!(at("/train/optimizer/adamw/weight_decay"), 0.01);
        assert_eq!((recipe.train.lr, recipe.train.batch), (2e-4, 32));
        // torch's CosineAnnealingLR(8000, eta_min=1e-6) after 0, 4000 and 7999 steps.
        for (step, lr) in [(0, 2e-4), (4000, 1.005e-4), (7999, 1.000_007_671e-6)] {
            let ours = recipe.train.schedule.lr(recipe.train.lr, step, 8000);
            assert!((ours - lr).abs() < 1e-12, "{step}: {ours}");
        }
        assert_eq!((recipe.train.augment.crop, recipe.train.augment.flip), (Some([0.08, 1.0]), true));
        assert_eq!(at("/task/classify/templates"), serde_json::json!(["a photo of a {}."]));
        assert_eq!(at("/data/coop/draw"), "clip-lora");
        assert!(recipe.train.evaluate_every >= 8000 && recipe.train.early_stopping.is_none());
    }
}

#[test]
fn an_optional_choice_can_be_taken_back() {
    let sets = ["fusion=null".to_string(), "task=classify".to_string()];
    let recipe = Recipe::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/tasks/classify-both.yaml"), &sets).unwrap();
    assert_eq!(recipe.fusion, None);
}
