//! The recipes inside the binary.

macro_rules! recipes {
    ($($name:literal),* $(,)?) => { &[$(($name, include_str!(concat!("../../recipes/", $name, ".yaml")))),*] };
}

/// Name and text of each.
pub const RECIPES: &[(&str, &str)] = recipes![
    "quickstart",
    "pretrain-tiny",
    "textile",
    "methods/adalora",
    "methods/bare",
    "methods/bitfit",
    "methods/bottleneck",
    "tasks/answer",
    "tasks/classify-both",
    "tasks/match",
    "tasks/regress",
    "tasks/retrieve",
    "tasks/retrieve-images",
    "methods/clip_adapter",
    "methods/cocoop",
    "methods/compacter",
    "methods/coop",
    "methods/dora",
    "methods/full",
    "methods/ia3",
    "methods/linear_probe",
    "methods/linear_probe_text",
    "methods/ln_tuning",
    "methods/loha",
    "methods/lokr",
    "methods/lora",
    "methods/lora_plus",
    "methods/maple",
    "methods/mixed",
    "methods/olora",
    "methods/pissa",
    "methods/prefix",
    "methods/prolip",
    "methods/svd",
    "methods/tip_adapter",
    "methods/tip_adapter_f",
    "methods/vera",
    "methods/vpt",
    "clip-lora/imagenet",
    "clip-lora/sun397",
    "clip-lora/aircraft",
    "clip-lora/eurosat",
    "clip-lora/stanford-cars",
    "clip-lora/food101",
    "clip-lora/pets",
    "clip-lora/flowers102",
    "clip-lora/caltech101",
    "clip-lora/dtd",
    "clip-lora/ucf101",
];

/// What a recipe is for: the second line of its head.
#[must_use]
pub fn summary(text: &str) -> &str {
    text.lines().nth(1).map_or("", |l| l.trim_start_matches('#').trim())
}
