//! Checkpoints of OpenAI, open_clip and CLIP-LoRA through the real binary, against `scripts/goldens/checkpoints.py`.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use common::World;

fn data(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/open_clip").join(name).display().to_string()
}

fn tensors(path: impl AsRef<Path>) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn off(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// Features of the image and the texts that the goldens are of; what stood on stderr.
fn embed(w: &World, model: &[&str]) -> (HashMap<String, Tensor>, String) {
    w.write("image.txt", &data("image.png"));
    let texts = data("texts.txt");
    let args = [&["embed", "--images", "image.txt", "--texts", &texts, "--output", "out.safetensors", "--model"], model].concat();
    let out = w.peft(&args);
    let message = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{model:?}: {message}");
    (tensors(w.path("out.safetensors")), message)
}

fn agrees(w: &World, model: &[&str], golden: &str) -> String {
    let (ours, message) = embed(w, model);
    for (name, theirs) in tensors(data(golden)) {
        let off = off(&ours[&name], &theirs);
        assert!(off < 1e-4, "{model:?}: {name} differs by {off}");
    }
    message
}

/// A copy of a case that a test may change.
fn copy(w: &World, case: &str) -> PathBuf {
    let to = w.path(case);
    std::fs::create_dir(&to).unwrap();
    for entry in std::fs::read_dir(data(case)).unwrap().flatten() {
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
    to
}

#[test]
fn features_are_those_of_the_source() {
    let w = World::new();
    for (model, golden) in [
        ("openai/model.pt", "openai"),
        ("gelu32", "gelu32"),
        ("gelu32/open_clip_model.safetensors", "gelu32"),
        ("quick16", "quick16"),
        ("quick16/open_clip_pytorch_model.bin", "quick16"),
        ("custom", "custom"),
    ] {
        let notes = agrees(&w, &[&data(model)], &format!("{golden}/golden.safetensors"));
        assert!(!notes.contains("interpolated"), "{notes}");
    }
}

#[test]
fn a_checkpoint_in_shards_is_one_model() {
    let w = World::new();
    let dir = copy(&w, "gelu32");
    std::fs::remove_file(dir.join("open_clip_model.safetensors")).unwrap();
    let mut map = serde_json::Map::new();
    for (shard, with_visual) in
        [("open_clip_model-00001-of-00002.safetensors", true), ("open_clip_model-00002-of-00002.safetensors", false)]
    {
        let all = tensors(data("gelu32/open_clip_model.safetensors"));
        let held: Vec<_> = all.into_iter().filter(|(n, _)| n.starts_with("visual.") == with_visual).collect();
        peft::clip::weights::save(&dir.join(shard), &held).unwrap();
        held.iter().for_each(|(n, _)| _ = map.insert(n.clone(), shard.into()));
    }
    w.write("gelu32/open_clip_model.safetensors.index.json", &serde_json::json!({ "weight_map": map }).to_string());
    agrees(&w, &["gelu32"], "gelu32/golden.safetensors");
}

#[test]
fn positions_are_interpolated_as_the_source_does_it() {
    let w = World::new();
    let file = data("resized/epoch_3.pt");
    let larger = agrees(&w, &[&file], "resized/golden.safetensors");
    assert!(larger.contains("3×3 to 5×5") && larger.contains("open_clip") && larger.contains("14 to 20 tokens"), "{larger}");
    agrees(&w, &[&file, "--image-size", "16"], "resized/golden16.safetensors");
    for size in ["40", "16"] {
        let note = agrees(&w, &[&data("hf"), "--image-size", size], &format!("hf/golden{size}.safetensors"));
        assert!(note.contains("transformers"), "{note}");
    }
}

#[test]
fn the_activation_is_never_guessed() {
    let w = World::new();
    let dir = copy(&w, "quick16");
    std::fs::remove_file(dir.join("open_clip_config.json")).unwrap();
    let file = "quick16/open_clip_pytorch_model.bin";
    let args = ["embed", "--model", file, "--texts", "x", "--output", "o.safetensors"];
    let message = w.fails(&args, 2);
    assert!(message.contains("--arch") && message.contains("ViT-B-32-quickgelu"), "{message}");
    let message = w.fails(&[&args[..], &["--arch", "ViT-B-32"]].concat(), 2);
    assert!(message.contains("ViT-B-32 has"), "{message}");
    let message = w.fails(&[&args[..], &["--arch", "ViT-B-16-SigLIP"]].concat(), 2);
    assert!(message.contains("SigLIP"), "{message}");
    let message = w.fails(&["inspect", "quick16/open_clip_pytorch_model.bin?arch=ViT-B-23"], 2);
    assert!(message.contains("did you mean"), "{message}");
    let recipe = w.recipe("lora: { rank: 2 }").replace("model: base", &format!("model: {{ base: {file}, arch: ViT-B-32 }}"));
    w.write("arch.yaml", &recipe);
    assert!(w.fails(&["train", "arch.yaml", "--check"], 2).contains("ViT-B-32 has"));
    w.write("wrong.yaml", &recipe.replace("arch: ViT-B-32", "init: { config: base }"));
    assert!(w.fails(&["train", "wrong.yaml", "--check"], 2).contains("`base`"));
}

#[test]
fn other_models_are_refused_by_name() {
    let w = World::new();
    let save = |name: &str, tensors: &[&str]| {
        let one = Tensor::zeros(1, candle_core::DType::F32, &Device::Cpu).unwrap();
        let all: Vec<_> = tensors.iter().map(|n| ((*n).to_string(), one.clone())).collect();
        peft::clip::weights::save(&w.path(name), &all).unwrap();
    };
    for (name, tensors, said) in [
        ("siglip.safetensors", &["logit_bias", "visual.trunk.x"][..], "SigLIP"),
        ("coca.safetensors", &["text_decoder.x"], "CoCa"),
        ("timm.safetensors", &["visual.trunk.x"], "timm"),
        ("resnet.safetensors", &["visual.layer1.0.conv1.weight"], "ResNet"),
        ("roberta.safetensors", &["text.transformer.encoder.x"], "transformers'"),
        ("hf.safetensors", &["vision_model.x"], "name its directory"),
        ("other.safetensors", &["fc.weight"], "no CLIP model"),
    ] {
        save(name, tensors);
        let message = w.fails(&["inspect", name], 2);
        assert!(message.contains(said), "{name}: {message}");
    }
}

#[test]
fn a_converted_model_is_the_same_model() {
    let w = World::new();
    for case in ["openai/model.pt", "custom", "resized/epoch_3.pt"] {
        let (before, _) = embed(&w, &[&data(case)]);
        let done = w.json(&["convert", &data(case), "--output", "hf", "--dtype", "f32", "--force"]);
        assert_eq!(done["layout"], "hf");
        let (after, notes) = embed(&w, &["hf"]);
        assert!(!notes.contains("interpolated"), "{notes}");
        for name in ["image_embeds", "text_embeds"] {
            assert!(off(&before[name], &after[name]) < 1e-5, "{case}: {name}");
        }
        // How texts and images are prepared goes along, and what transformers does otherwise is said.
        let tokenizer = |model: &str| w.json(&["inspect", model])["facts"]["tokenizer"].clone();
        assert_eq!(tokenizer("hf"), tokenizer(&data(case)));
        assert!(done["notes"].to_string().contains("ftfy"), "{done}");
        let config: serde_json::Value = serde_json::from_slice(&common::read(&w.path("hf/config.json"))).unwrap();
        assert_eq!(config["architectures"][0], "CLIPModel");
    }
}

#[test]
fn to_open_clip_and_back_nothing_changes() {
    let w = World::new();
    for case in ["quick16", "custom"] {
        let there = format!("there-{case}");
        w.json(&["convert", &data(case), "--output", "hf", "--force"]);
        w.json(&["merge", "--model", "hf", "--output", &there, "--to", "open_clip"]);
        let file = if case == "quick16" { None } else { Some(tensors(data(&format!("{case}/open_clip_model.safetensors")))) };
        let found = tensors(w.path(&there).join("open_clip_model.safetensors"));
        for (name, tensor) in file.iter().flatten() {
            // A text tower of its own has another prefix there.
            let ours = &found[name.strip_prefix("text.").unwrap_or(name)];
            assert_eq!((ours.dims(), ours.dtype()), (tensor.dims(), tensor.dtype()), "{name}");
            let f32 = |t: &Tensor| t.to_dtype(candle_core::DType::F32).unwrap();
            assert_eq!(off(&f32(ours), &f32(tensor)), 0.0, "{name}");
        }
        let (before, _) = embed(&w, &[&data(case)]);
        let (after, _) = embed(&w, &[&there]);
        for name in ["image_embeds", "text_embeds"] {
            assert_eq!(off(&before[name], &after[name]), 0.0, "{case}: {name}");
        }
        assert_eq!(w.json(&["inspect", &there])["facts"]["digest"], w.json(&["inspect", "hf"])["facts"]["digest"]);
    }
}

#[test]
fn clip_lora_adapters_scale_by_the_root_of_the_rank() {
    let w = World::new();
    let (model, adapter) = (data("quick16"), data("clip_lora/lora_weights.pt"));
    let notes = agrees(&w, &[&model, "--adapter", &adapter], "clip_lora/golden.safetensors");
    assert!(notes.contains("made elsewhere"), "{notes}");
    let done = w.json(&["convert", &adapter, "--output", "adapter"]);
    assert_eq!(done["method"], "lora");
    agrees(&w, &[&model, "--adapter", "adapter"], "clip_lora/golden.safetensors");
    let config: serde_json::Value = serde_json::from_slice(&common::read(&w.path("adapter/adapter_config.json"))).unwrap();
    assert_eq!((&config["use_rslora"], &config["r"], &config["lora_alpha"]), (&true.into(), &2.into(), &3.into()));
    w.json(&["merge", "--model", &model, "--adapter", &adapter, "--output", "merged", "--to", "open_clip"]);
    agrees(&w, &["merged"], "clip_lora/golden.safetensors");
    assert_eq!(w.json(&["inspect", &adapter])["kind"], "adapter");
    assert!(w.fails(&["convert", &adapter, "--output", "adapter"], 2).contains("--force"));
    let message = w.fails(&["predict", "--model", &model, "--adapter", &data("openai/model.pt"), "--labels", "a", "x.png"], 2);
    assert!(message.contains("CLIP-LoRA"), "{message}");
}

#[test]
fn the_embedded_tokeniser_is_clips() {
    let dir = tempfile::tempdir().unwrap();
    // A bare checkpoint with CLIP's whole vocabulary, as OpenAI's are.
    let config = peft::clip::ClipConfig::from_json(
        "config.json",
        br#"{"projection_dim": 4, "text_config": {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1},
            "vision_config": {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8,
            "patch_size": 8}}"#,
    )
    .unwrap();
    let hf = dir.path().join("hf");
    std::fs::create_dir(&hf).unwrap();
    let random = peft::clip::model::random_weights(&config, 1, &Device::Cpu).unwrap();
    let mut tensors: Vec<_> = random.into_iter().filter(|(n, _)| n.starts_with("text_model.embeddings.")).collect();
    let rename = |n: &str| if n.contains("token") { "token_embedding.weight" } else { "positional_embedding" }.to_string();
    tensors.iter_mut().for_each(|(n, _)| *n = rename(n));
    let ones = |shape: &[usize]| Tensor::ones(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
    for (name, shape) in [
        ("visual.proj", &[4, 4][..]),
        ("visual.conv1.weight", &[4, 3, 8, 8]),
        ("visual.positional_embedding", &[2, 4]),
        ("visual.transformer.resblocks.0.mlp.c_fc.weight", &[4, 4]),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", &[12, 4]),
        ("transformer.resblocks.0.mlp.c_fc.weight", &[4, 4]),
        ("transformer.resblocks.0.attn.in_proj_weight", &[12, 4]),
        ("input_resolution", &[]),
        ("context_length", &[]),
        ("vocab_size", &[]),
    ] {
        tensors.push((name.into(), ones(shape)));
    }
    let file = dir.path().join("bare.safetensors");
    peft::clip::weights::save(&file, &tensors).unwrap();
    let source = peft::clip::source::Source::resolve(&file.display().to_string()).unwrap();
    let tokenizer = peft::clip::tokenizer::Tokenizer::load(&source, &config.text).unwrap();
    // As `open_clip.tokenize` and `clip.tokenize` have it.
    assert_eq!(tokenizer.encode("a photo of a cat.").unwrap().0, [49406, 320, 1125, 539, 320, 2368, 269, 49407]);
    assert_eq!(tokenizer.encode("Zürich 2024 🐧").unwrap().0, ZURICH);
    // Repaired first, as `ftfy` and `html.unescape` do it there.
    let repaired = tokenizer.encode("the dog’s “ball” &amp; a cafÃ©").unwrap().0;
    assert_eq!(repaired, [49406, 518, 1929, 568, 257, 1069, 257, 261, 320, 15304, 49407]);
    let wide = "a photo of a Ｆｕｌｌ &eacute;clair ﬁsh.";
    assert_eq!(tokenizer.encode(wide).unwrap().0, [49406, 320, 1125, 539, 320, 1476, 3459, 14039, 2759, 269, 49407]);
    // The class name is found where it has come to lie.
    let (ids, _, part) = tokenizer.encode_part("a &amp; b cafÃ© x", &("a &amp; b ".len().."a &amp; b cafÃ©".len())).unwrap();
    assert_eq!(&ids[part], [15304]);
}

const ZURICH: [u32; 11] = [49406, 89, 6522, 4021, 273, 271, 273, 275, 2074, 356, 49407];

#[test]
fn checkpoints_of_training_scripts_are_read() {
    let w = World::new();
    let notes = agrees(&w, &[&data("training/last.pt")], "quick16/golden.safetensors");
    assert!(notes.contains("model_state_dict") && notes.contains("`ema`") && notes.contains("optimizer_state_dict"), "{notes}");
    assert!(notes.contains("classifier.weight"), "{notes}");
    // OpenAI's dict says its sizes in integers, so that no architecture has to be named.
    agrees(&w, &[&data("training/openai.pt")], "openai/golden.safetensors");
}

/// Arguments, paths, numbers of numpy's and objects of a script's own: nothing of them is run, and what is not read is named.
#[test]
fn objects_beside_the_weights_do_not_matter() {
    let w = World::new();
    for file in ["training/args2.pt", "training/args4.pt"] {
        let notes = agrees(&w, &[&data(file)], "quick16/golden.safetensors");
        for part in ["`args` (`argparse.Namespace`", "Unknown`", "`rng`", "`state_dict`"] {
            assert!(notes.contains(part), "{part}: {notes}");
        }
    }
}

/// As `from_pretrained` reads it, with a head of the training script's beside the model.
#[test]
fn a_directory_of_transformers_may_hold_a_training_checkpoint() {
    let w = World::new();
    let dir = copy(&w, "hf");
    let plain = embed(&w, &["hf"]).0;
    std::fs::remove_file(dir.join("model.safetensors")).unwrap();
    std::fs::copy(data("training/pytorch_model.bin"), dir.join("pytorch_model.bin")).unwrap();
    let (found, notes) = embed(&w, &["hf"]);
    assert!(plain.iter().all(|(name, tensor)| off(tensor, &found[name]) == 0.0));
    for part in ["pytorch_model.bin", "`model_state_dict`", "argparse.Namespace", "classifier.weight"] {
        assert!(notes.contains(part), "{part}: {notes}");
    }
    // A layer more than the configuration has is a part of the model.
    let mut more: Vec<_> = tensors(data("hf/model.safetensors")).into_iter().collect();
    let layer = "vision_model.encoder.layers.0.mlp.fc1.bias";
    let extra = more.iter().find(|(name, _)| name == layer).unwrap().1.clone();
    more.push((layer.replace(".0.", ".9."), extra));
    peft::clip::weights::save(&dir.join("model.safetensors"), &more).unwrap();
    let message = w.fails(&["embed", "--model", "hf", "--texts", &data("texts.txt"), "--output", "o.npy"], 2);
    assert!(message.contains("layers.9"), "{message}");
}

/// `tokenizer_kwargs` say how open_clip's tokeniser cleans texts; `get_clean_fn("canonicalize")` makes the first text the second.
#[test]
fn what_open_clips_tokeniser_is_told_is_done_or_refused() {
    let w = World::new();
    let dir = copy(&w, "gelu32");
    let config: serde_json::Value = serde_json::from_slice(&common::read(&dir.join("open_clip_config.json"))).unwrap();
    let say = |key: &str, value: serde_json::Value| {
        let mut config = config.clone();
        config["model_cfg"]["text_cfg"][key] = value;
        std::fs::write(dir.join("open_clip_config.json"), config.to_string()).unwrap();
    };
    w.write("texts.txt", "A photo. of_a  cat.\na photo of a cat\n");
    let args = ["embed", "--model", "gelu32", "--texts", "texts.txt", "--output", "t.safetensors"];
    let differ = || {
        w.json(&args);
        let rows = tensors(w.path("t.safetensors")).remove("text_embeds").unwrap();
        off(&rows.get(0).unwrap(), &rows.get(1).unwrap())
    };
    for (kwargs, alike) in [
        (serde_json::json!({}), false),
        (serde_json::Value::Null, false),
        (serde_json::json!({ "clean": "lower", "strip_sep_token": false, "reduction_mask": "" }), false),
        (serde_json::json!({ "clean": "canonicalize" }), true),
    ] {
        say("tokenizer_kwargs", kwargs.clone());
        assert_eq!(differ() < 1e-6, alike, "{kwargs}");
    }
    // It stays so in a copy.
    w.json(&["convert", "gelu32", "--output", "plain"]);
    let again = ["embed", "--model", "plain", "--texts", "texts.txt", "--output", "t.safetensors"];
    w.json(&again);
    let rows = tensors(w.path("t.safetensors")).remove("text_embeds").unwrap();
    assert!(off(&rows.get(0).unwrap(), &rows.get(1).unwrap()) < 1e-6);
    for (key, value) in [
        ("clean", serde_json::json!("whitespace")),
        ("clean", serde_json::json!("upper")),
        ("reduction_mask", serde_json::json!("syntax")),
        ("context_length", serde_json::json!(5)),
        ("strip_sep_token", serde_json::json!(true)),
        ("additional_special_tokens", serde_json::json!(["<x>"])),
    ] {
        say("tokenizer_kwargs", serde_json::json!({ (key): value }));
        let message = w.fails(&args, 2);
        assert!(message.contains("tokenizer_kwargs") && message.contains(&format!("`{key}`")), "{message}");
    }
    say("tokenizer_mode", serde_json::json!("clips"));
    assert!(w.fails(&args, 2).contains("tokenizer_mode"));
}

#[test]
fn wrappers_of_names_may_come_in_any_order() {
    let w = World::new();
    let custom = copy(&w, "custom");
    let file = custom.join("open_clip_model.safetensors");
    let plain = tensors(&file);
    for prefix in ["model.", "clip.", "clip_model.", "module.clip_model.", "_orig_mod.module.", "module._orig_mod.model.clip."] {
        let renamed: Vec<_> = plain.iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor.clone())).collect();
        peft::clip::weights::save(&file, &renamed).unwrap();
        agrees(&w, &[&custom.display().to_string()], "custom/golden.safetensors");
    }
}

/// transformers 5 says in `processor_config.json` alone how images become pixels; what is written both generations read.
#[test]
fn a_directory_of_transformers_5_is_read_and_written() {
    let w = World::new();
    agrees(&w, &[&data("transformers5")], "transformers5/golden.safetensors");
    w.json(&["convert", &data("transformers5"), "--output", "plain"]);
    agrees(&w, &["plain"], "transformers5/golden.safetensors");
    let written: serde_json::Value = serde_json::from_slice(&common::read(&w.path("plain/preprocessor_config.json"))).unwrap();
    assert_eq!(written["crop_size"]["height"], 20);
    assert!(!w.path("plain/processor_config.json").exists(), "transformers 4 fails at its image_processor");

    // Where both say something else, transformers 5 takes the nested one.
    let both = copy(&w, "transformers5");
    std::fs::write(both.join("preprocessor_config.json"), r#"{"size": 20, "crop_size": 20}"#).unwrap();
    let notes = agrees(&w, &[&both.display().to_string()], "transformers5/golden.safetensors");
    assert!(notes.contains("processor_config.json"), "{notes}");
    // Another size hides both.
    let larger = embed(&w, &[&both.display().to_string(), "--image-size", "30"]).1;
    assert!(larger.contains("30"), "{larger}");
}

#[test]
fn a_base_without_preprocessing_says_what_is_done() {
    let w = World::new();
    std::fs::remove_file(w.path("base/preprocessor_config.json")).unwrap();
    let notes = embed(&w, &["base"]).1;
    assert!(notes.contains("processor_config.json"), "{notes}");
    w.json(&["convert", "base", "--output", "plain"]);
    let (before, after) = (embed(&w, &["base"]).0, embed(&w, &["plain"]));
    assert_eq!(off(&before["image_embeds"], &after.0["image_embeds"]), 0.0);
    assert!(!after.1.contains("processor_config.json"), "{}", after.1);
}

/// torchvision's crop, which OpenAI and open_clip use, rounds half to even.
#[test]
fn crops_are_torchvisions() {
    use peft::clip::preprocess::{Preprocess, Rounding};
    let rows: Vec<(u32, u32, u64)> = serde_json::from_slice(&common::read(data("crops.json").as_ref())).unwrap();
    let preprocess = Preprocess { crop_rounding: Rounding::Torchvision, ..Preprocess::for_size(24) };
    for (width, height, sum) in rows {
        let image =
            image::RgbImage::from_fn(width, height, |x, y| image::Rgb([0, 31, 62].map(|c| ((x * 7 + y * 13 + c + x * y) % 256) as u8)));
        let done = preprocess.resize_crop(&image).unwrap();
        let found: u64 = done.as_raw().iter().enumerate().map(|(i, v)| u64::from(*v) * (i as u64 % 1009 + 1)).sum();
        assert_eq!(found, sum, "{width}×{height}");
    }
}

/// A number near the end of f32 must not become zero on its way through a norm and look like a feature.
#[test]
fn weights_that_overflow_on_the_way_give_no_features() {
    let w = World::new();
    let file = w.path("base/model.safetensors");
    let plain = tensors(&file);
    for (name, image) in [
        ("vision_model.embeddings.patch_embedding.weight", true),
        ("vision_model.embeddings.position_embedding.weight", true),
        ("vision_model.pre_layrnorm.weight", true),
        ("vision_model.encoder.layers.0.mlp.fc2.weight", true),
        ("vision_model.post_layernorm.weight", true),
        ("visual_projection.weight", true),
        ("text_model.embeddings.token_embedding.weight", false),
        ("text_model.encoder.layers.1.self_attn.out_proj.weight", false),
        ("text_model.encoder.layers.0.layer_norm1.weight", false),
        ("text_model.final_layer_norm.weight", false),
        ("text_projection.weight", false),
    ] {
        let mut changed = plain.clone();
        let large = (changed[name].ones_like().unwrap() * 1e20).unwrap();
        let large = (large + (&changed[name] * 1e21).unwrap()).unwrap();
        changed.insert(name.into(), large);
        peft::clip::weights::save(&file, &changed.into_iter().collect::<Vec<_>>()).unwrap();
        w.write("texts.txt", "a cat\na red dog\n");
        let input = if image { ["--images", "data/**/*.png"] } else { ["--texts", "texts.txt"] };
        w.write("list.txt", "data/red/0.png\ndata/blue/3.png\n");
        let input = if image { ["--images", "list.txt"] } else { input };
        let out = w.peft(&["embed", "--model", "base", input[0], input[1], "--output", "out.safetensors"]);
        assert!(!out.status.success(), "{name}: {:?}", String::from_utf8_lossy(&out.stdout));
        let message = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(message.contains(name), "{name}: {message}");
    }
}
