//! What every method owes, for each of its `examples()`, on a small random CLIP.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, Var};
use peft::clip::model::{class_logits, random_weights, unit_rows};
use peft::clip::{Clip, ClipConfig, TextBatch, weights};
use peft::delta::{self, Adapters, Delta, Manifest};
use peft_adapters::registry::METHODS;
use peft_adapters::{ClassFeatures, ClassName, Init, MethodConfig, Param, Params, Patches, Step, ops, rng};

const CONFIG: &[u8] = br#"{"projection_dim": 12,
    "text_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": 30, "max_position_embeddings": 8, "eos_token_id": 29, "bos_token_id": 28, "pad_token_id": 0},
    "vision_config": {"hidden_size": 20, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 12, "patch_size": 6}}"#;

struct World {
    clip: Clip,
    pixels: Tensor,
    texts: TextBatch,
    weight: (Tensor, Tensor),
}

fn tensors(config: &ClipConfig) -> HashMap<String, Tensor> {
    let mut all = random_weights(config, 3, &Device::Cpu).unwrap();
    for (name, t) in &mut all {
        // Larger than an initialisation, biases included, so that every path matters.
        let noise = rng::normal(&mut rng::rng(4, &[rng::name_key(name)]), 0.2, t.shape(), DType::F32, &Device::Cpu).unwrap();
        *t = (&*t + noise).unwrap();
    }
    all
}

fn world(dtype: DType) -> World {
    let config = ClipConfig::from_json("config.json", CONFIG).unwrap();
    let clip = Clip::new(&config, tensors(&config), dtype, &Device::Cpu).unwrap();
    let mut r = rng::rng(5, &[]);
    let mut normal = |shape: &[usize]| rng::normal(&mut r, 1.0, shape, dtype, &Device::Cpu).unwrap();
    let ids = [vec![28, 3, 4, 29], vec![28, 7, 8, 9, 10, 29], vec![28, 29]];
    let name = |class, start, len| ClassName { class, start, len };
    let names = vec![name(0, 2, 1), name(1, 3, 2), name(2, 1, 0)];
    World {
        pixels: normal(&[3, 3, 12, 12]),
        weight: (normal(&[3, 12]), normal(&[3, 12])),
        texts: TextBatch::new(&ids, None, &config.text, &Device::Cpu).unwrap().with_names(names),
        clip,
    }
}

impl World {
    fn plan(&self, method: &MethodConfig, dtype: DType) -> (Params, Patches) {
        let mut params = Params::with_dtype(1, dtype, &Device::Cpu);
        let patch = method.plan(self.clip.sites(), &mut params).unwrap();
        (params, Patches::new(vec![patch]))
    }

    fn features(&self, patches: &mut Patches) -> (Tensor, Tensor) {
        patches.prepare(&Step::eval()).unwrap();
        self.prepared_features(patches)
    }

    fn prepared_features(&self, patches: &Patches) -> (Tensor, Tensor) {
        let images = self.clip.image_features(&self.pixels, patches).unwrap();
        let texts = match patches.per_image() {
            true => self.texts.clone().with_images(unit_rows(&images).unwrap()),
            false => self.texts.clone(),
        };
        (images, self.clip.text_features(&texts, patches).unwrap())
    }

    /// Of each image against each text, whatever the texts were encoded for.
    fn logits(&self, (images, texts): &(Tensor, Tensor), patches: &Patches) -> Tensor {
        class_logits(&self.clip, images, &ClassFeatures::Shared(texts.clone()), patches).unwrap()
    }

    /// A scalar that every trainable number should move.
    fn loss(&self, patches: &mut Patches) -> Tensor {
        patches.prepare(&Step::eval()).unwrap();
        self.prepared_loss(patches)
    }

    fn prepared_loss(&self, patches: &Patches) -> Tensor {
        let (images, texts) = self.prepared_features(patches);
        let logits = self.logits(&(images.clone(), texts.clone()), patches);
        let plain = (images * &self.weight.0).unwrap().sum_all().unwrap() + (texts * &self.weight.1).unwrap().sum_all().unwrap();
        let scaled = (logits.sum_all().unwrap().to_dtype(plain.as_ref().unwrap().dtype()).unwrap() * 0.05).unwrap();
        let sum = (plain.unwrap() + scaled).unwrap();
        match patches.regulariser().unwrap() {
            Some(term) => (sum + term).unwrap(),
            None => sum,
        }
    }
}

/// What gets gradients: AdaLoRA may have taken all ranks of a layer.
fn trained(params: &Params) -> impl Iterator<Item = &Param> {
    params.iter().filter(|p| !p.frozen && p.var.elem_count() > 0)
}

fn perturb(params: &Params, size: f64) {
    for p in params.iter().filter(|p| p.var.elem_count() > 0) {
        let mut r = rng::rng(9, &[rng::name_key(&p.name)]);
        let noise = rng::normal(&mut r, size, p.var.shape(), p.var.dtype(), &Device::Cpu).unwrap();
        p.var.set(&(p.var.as_tensor().detach() + noise).unwrap()).unwrap();
    }
}

fn max_abs(t: &Tensor) -> f64 {
    let t = t.abs().unwrap().flatten_all().unwrap().to_dtype(DType::F64).unwrap();
    t.to_vec1::<f64>().unwrap().into_iter().fold(0.0, f64::max)
}

fn relative(a: &Tensor, b: &Tensor) -> f64 {
    max_abs(&(a - b).unwrap()) / max_abs(b)
}

fn each(mut f: impl FnMut(&MethodConfig, Init)) {
    for entry in METHODS {
        for example in (entry.examples)() {
            f(&example, entry.init);
        }
    }
}

#[test]
fn a_new_adapter_does_what_its_method_promises() {
    let world = world(DType::F32);
    let base = world.features(&mut Patches::none());
    each(|method, init| {
        let (_, mut patches) = world.plan(method, DType::F32);
        let found = world.features(&mut patches);
        let logits = [(&found, &patches), (&base, &Patches::none())].map(|(f, p)| world.logits(f, p));
        let off = relative(&found.0, &base.0).max(relative(&found.1, &base.1)).max(relative(&logits[0], &logits[1]));
        match init {
            Init::Identity => assert!(off < 1e-6, "{method:?}: {off}"),
            Init::Approximate(tolerance) => assert!(off < tolerance, "{method:?}: {off}"),
            Init::Changes => assert!(off > 1e-6, "{method:?}: {off}"),
        }
    });
}

#[test]
fn folded_equals_unfolded() {
    let world = world(DType::F32);
    each(|method, _| {
        let (params, mut patches) = world.plan(method, DType::F32);
        perturb(&params, 0.1);
        let foldable = patches.iter().all(|p| p.unfoldable().is_none());
        if !foldable {
            return;
        }
        let (images, texts) = world.features(&mut patches);
        let folded = world.clip.sites().weights().map(|(id, w)| {
            let new = patches.fold(id, &w.tensor).unwrap().unwrap_or_else(|| w.tensor.clone());
            (w.name.clone(), new)
        });
        let clip = Clip::new(world.clip.config(), folded.collect(), DType::F32, &Device::Cpu).unwrap();
        let none = Patches::none();
        assert!(relative(&clip.image_features(&world.pixels, &none).unwrap(), &images) < 1e-5, "{method:?}");
        assert!(relative(&clip.text_features(&world.texts, &none).unwrap(), &texts) < 1e-5, "{method:?}");
        let base = world.features(&mut Patches::none());
        assert!(relative(&images, &base.0) + relative(&texts, &base.1) > 1e-3, "{method:?} changes nothing");
    });
}

#[test]
fn gradients_equal_finite_differences_and_reach_everything() {
    let world = world(DType::F64);
    each(|method, _| {
        let (params, mut patches) = world.plan(method, DType::F64);
        perturb(&params, 0.1);
        let grads = world.loss(&mut patches).backward().unwrap();
        for p in trained(&params) {
            let grad = grads.get(&p.var).unwrap_or_else(|| panic!("{method:?}: {} has no gradient", p.name));
            // Softmax does not see what is added to all scores of a query.
            if !(p.name.contains("k_proj") && p.name.ends_with(".bias")) {
                assert!(max_abs(grad) > 1e-9, "{method:?}: the gradient of {} is zero", p.name);
            }
            let index = (rng::name_key(&p.name) % p.var.elem_count() as u64) as usize;
            let (found, expected) = (element(grad, index), difference(&world, method, &mut patches, &p.var, index));
            let scale = expected.abs().max(1e-3);
            assert!((found - expected).abs() / scale < 1e-5, "{method:?}: {} [{index}]: {found} against {expected}", p.name);
        }
        for (_, w) in world.clip.sites().weights() {
            assert!(grads.get(&w.tensor).is_none(), "{method:?}: the frozen {} has a gradient", w.name);
        }
    });
}

fn element(t: &Tensor, index: usize) -> f64 {
    t.flatten_all().unwrap().to_vec1::<f64>().unwrap()[index]
}

fn difference(world: &World, method: &MethodConfig, patches: &mut Patches, var: &Var, index: usize) -> f64 {
    const STEP: f64 = 1e-5;
    // DoRA's norms are constants of a step, its gradient is that of what follows them.
    let constants = method.name() == "dora";
    let before = var.as_tensor().detach().copy().unwrap();
    let mut at = |by: f64| {
        let mut values = before.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        values[index] += by;
        var.set(&Tensor::from_vec(values, before.shape(), &Device::Cpu).unwrap()).unwrap();
        if constants { world.prepared_loss(patches) } else { world.loss(patches) }.to_scalar::<f64>().unwrap()
    };
    let slope = (at(STEP) - at(-STEP)) / (2.0 * STEP);
    var.set(&before).unwrap();
    slope
}

#[test]
fn fused_equals_portable() {
    let world = world(DType::F32);
    each(|method, _| {
        let (params, mut patches) = world.plan(method, DType::F32);
        perturb(&params, 0.1);
        let mut both = [false, true].map(|portable| {
            ops::set_portable(portable);
            let loss = world.loss(&mut patches);
            let grads = loss.backward().unwrap();
            ops::set_portable(false);
            let grads: Vec<Tensor> = trained(&params).map(|p| grads.get(&p.var).unwrap().clone()).collect();
            (loss, grads)
        });
        let (fused, portable) = both.split_at_mut(1);
        // The loss is a sum of many terms, which may come to almost nothing.
        let off = max_abs(&(&fused[0].0 - &portable[0].0).unwrap()) / max_abs(&portable[0].0).max(1.0);
        assert!(off < 1e-4, "{method:?}: {off}");
        for ((a, b), p) in fused[0].1.iter().zip(&portable[0].1).zip(trained(&params)) {
            let off = max_abs(&(a - b).unwrap()) / max_abs(b).max(1e-2);
            assert!(off < 2e-4, "{method:?}: {}: {off}", p.name);
        }
    });
}

#[test]
fn saved_adapters_load_bit_equal_and_leave_the_base_alone() {
    let world = world(DType::F32);
    let config = world.clip.config().clone();
    let digest = weights::digest(&tensors(&config)).unwrap();
    each(|method, _| {
        let sites = world.clip.sites();
        let mut adapters = Adapters::plan(std::slice::from_ref(method), sites, 1, &Device::Cpu).unwrap();
        perturb(&adapters.params, 0.1);
        let before = world.features(&mut adapters.view);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter");
        delta::save(&path, &adapters, sites, &Manifest::default()).unwrap();
        let mut loaded = Delta::read(&path).unwrap().apply(&world.clip).unwrap();
        let after = world.features(&mut loaded.view);
        let logits = world.logits(&before, &adapters.view) - world.logits(&after, &loaded.view);
        assert_eq!(max_abs(&(before.0 - after.0).unwrap()), 0.0, "{method:?}");
        assert_eq!(max_abs(&(before.1 - after.1).unwrap()), 0.0, "{method:?}");
        assert_eq!(max_abs(&logits.unwrap()), 0.0, "{method:?}");
    });
    let now = world.clip.sites().weights().map(|(_, w)| {
        let t = if w.name == "logit_scale" { w.tensor.flatten_all().unwrap().squeeze(0).unwrap() } else { w.tensor.clone() };
        (w.name.clone(), t)
    });
    assert_eq!(weights::digest(&now.collect()).unwrap(), digest);
}

/// Methods that train disjoint tensors, each method in the first group that has room for it.
fn groups(world: &World) -> Vec<Vec<MethodConfig>> {
    let mut groups: Vec<Vec<MethodConfig>> = Vec::new();
    for method in METHODS.iter().filter(|m| m.name != "full").map(|m| (m.examples)().remove(0)) {
        let fits = |group: &[MethodConfig]| {
            Adapters::plan(&[group, std::slice::from_ref(&method)].concat(), world.clip.sites(), 1, &Device::Cpu).is_ok()
        };
        match groups.iter().position(|g| fits(g)) {
            Some(at) => groups[at].push(method),
            None => groups.push(vec![method]),
        }
    }
    groups
}

#[test]
fn several_methods_train_save_and_load_together() {
    let world = world(DType::F32);
    let sites = world.clip.sites();
    let groups = groups(&world);
    assert!(groups[0].len() > 4, "{groups:?}");
    for methods in groups {
        let mut adapters = Adapters::plan(&methods, sites, 1, &Device::Cpu).unwrap();
        perturb(&adapters.params, 0.1);
        let before = world.features(&mut adapters.view);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter");
        delta::save(&path, &adapters, sites, &Manifest::default()).unwrap();
        let mut loaded = Delta::read(&path).unwrap().apply(&world.clip).unwrap();
        for (loaded, method) in loaded.methods.iter().zip(&methods) {
            // A learning rate and a residual are nothing of a file's.
            match method.name() {
                "lora_plus" | "pissa" | "olora" => assert_eq!(loaded.name(), "lora"),
                _ => assert_eq!(loaded, method),
            }
        }
        assert_eq!(max_abs(&(before.0 - world.features(&mut loaded.view).0).unwrap()), 0.0);
        if methods.len() > 1 && methods[0].name() == "lora" {
            exchanged_files_are_noticed(&path);
        }
    }
}

fn exchanged_files_are_noticed(path: &std::path::Path) {
    let weights = path.join("0-lora/adapter_model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    assert!(Delta::read(path).unwrap_err().to_string().contains("blake3"));
}

#[test]
fn bare_parameters_train_beside_another_method() {
    let world = world(DType::F32);
    let methods: Vec<MethodConfig> =
        serde_saphyr::from_str("[lora: { rank: 2 }, full: { targets: [logit_scale, class_embedding] }]").unwrap();
    let sites = world.clip.sites();
    let mut adapters = Adapters::plan(&methods, sites, 1, &Device::Cpu).unwrap();
    perturb(&adapters.params, 0.1);
    let grads = world.loss(&mut adapters.patches).backward().unwrap();
    assert!(trained(&adapters.params).all(|p| grads.get(&p.var).is_some()));
    let dir = tempfile::tempdir().unwrap();
    delta::save(&dir.path().join("adapter"), &adapters, sites, &Manifest::default()).unwrap();
    let mut loaded = Delta::read(&dir.path().join("adapter")).unwrap().apply(&world.clip).unwrap();
    let scale = |patches: &Patches| world.clip.logit_scale(patches).unwrap().to_scalar::<f32>().unwrap();
    assert_eq!(scale(&loaded.view), scale(&adapters.view));
    assert_ne!(scale(&loaded.view), scale(&Patches::none()));
    let (before, after) = (world.features(&mut adapters.view), world.features(&mut loaded.view));
    assert_eq!(max_abs(&(before.0 - after.0).unwrap()), 0.0);
}

#[test]
fn patterns_that_match_nothing_are_told() {
    let world = world(DType::F32);
    let notes = |yaml: &str| {
        let method: MethodConfig = serde_saphyr::from_str(yaml).unwrap();
        let mut params = Params::new(0, &Device::Cpu);
        method.plan(world.clip.sites(), &mut params).unwrap();
        params.notes().to_vec()
    };
    assert!(notes("lora: { rank_pattern: { q_proj: 2 } }").is_empty());
    let told = notes("dora: { rank_pattern: { fc1: 2, q_proj: 3 }, alpha_pattern: { query: 3 } }");
    assert!(told.len() == 2 && told[0].contains("`fc1`") && told[1].contains("`query`"), "{told:?}");
    assert_eq!(notes("loha: { rank: 2, alpha_pattern: { fc1: 3 } }").len(), 1);
}

#[test]
fn all_linear_is_every_linear_layer() {
    let world = world(DType::F32);
    let method: MethodConfig = serde_saphyr::from_str("lora: { rank: 2, targets: all-linear }").unwrap();
    let (params, _) = world.plan(&method, DType::F32);
    // Six a block, two blocks and a projection a tower, A and B each.
    assert_eq!(params.len(), 2 * 2 * (6 * 2 + 1));
    assert!(params.iter().all(|p| !p.name.contains("embedding")));
}

#[test]
fn unknown_keys_are_refused() {
    for entry in METHODS {
        let json = format!(r#"{{"{}": {{"no_such_key": 1}}}}"#, entry.name);
        let message = serde_json::from_str::<MethodConfig>(&json).unwrap_err().to_string();
        assert!(message.contains("no_such_key"), "{}: {message}", entry.name);
    }
}

#[test]
fn targets_that_match_nothing_and_ranks_too_high_are_refused() {
    let world = world(DType::F32);
    let refuse = |yaml: &str, part: &str| {
        let method: MethodConfig = serde_saphyr::from_str(yaml).unwrap();
        let mut params = Params::new(0, &Device::Cpu);
        let message = method.plan(world.clip.sites(), &mut params).err().unwrap().to_string();
        assert!(message.contains(part), "{yaml}: {message}");
    };
    refuse("lora: { targets: [query] }", "self_attn.q_proj");
    refuse("lora: { rank: 17 }", "found 17");
    refuse("lora: { rank: 0 }", "found 0");
    refuse("lora: { dropout: 1.0 }", "dropout");
    refuse("lora: { layers: [2] }", "layers 0 to 1");
    refuse("lora: { targets: '([' }", "not a regular expression");
    refuse("prefix: { length: 0 }", "length");
    refuse("prefix: { layers: '5..6' }", "");
    refuse("bottleneck: { reduction: 0 }", "reduction");
    refuse("bottleneck: { reduction: 4, hypercomplex: { n: 3 } }", "divisor");
    refuse("bottleneck: { hypercomplex: { n: 0 } }", "hypercomplex.n");
    refuse("dora: { rank: 4, lr_ratio: 0 }", "lr_ratio");
    refuse("pissa: { rank: 9 }", "expected 1 to 8");
    refuse("olora: { targets: [token_embedding] }", "q_proj");
    refuse("ia3: { targets: [query] }", "self_attn.q_proj");
    refuse("ln_tuning: { targets: [layer_norm3] }", "layer_norm1");
    refuse("bitfit: { targets: [visual_projection] }", "no bias");
    refuse("svd: { rank: 17 }", "found 17");
    refuse("vera: { rank: 0 }", "found 0");
    refuse("vera: { dropout: 1 }", "dropout");
    refuse("loha: { rank: 0 }", "found 0");
    refuse("lokr: { decompose_factor: 0 }", "decompose_factor");
    refuse("adalora: { init_r: 2, target_r: 3 }", "target_r");
    refuse("adalora: { beta1: 1.0 }", "beta1");
    refuse("adalora: { delta_t: 0 }", "delta_t");
    refuse("full: { targets: [nothing] }", "nothing");
}
