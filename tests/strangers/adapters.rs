//! Adapter directories: configurations, tensors, manifests that do not fit one another or the base.

use std::path::Path;
use std::rc::Rc;

use candle_core::{DType, Device, Tensor};
use peft::Model;
use peft::clip::base::Base;
use peft::clip::weights;
use peft::delta::{self, Adapters, BaseRef, Manifest};
use peft_adapters::MethodConfig;
use peft_adapters::registry::METHODS;
use serde_json::{Value, json};

use super::Expect::{Either, Fine, Refused};
use super::{Case, Expect, ODD};
use crate::common::World;

/// Reads `adapter/` on top of the base.
fn case(name: impl Into<String>, expect: Expect, base: &Rc<Model>, make: impl FnOnce(&Path) + 'static) -> Case {
    let base = base.clone();
    Case::new(name, expect, move |dir| {
        let adapter = dir.join("adapter");
        make(&adapter);
        Box::new(move || base.fork().with_adapter(&adapter).map(drop))
    })
}

/// What `peft train` writes for a method that was not trained.
fn save(dir: &Path, base: &Base, method: &MethodConfig) {
    let adapters = Adapters::plan(std::slice::from_ref(method), base.clip.sites(), 1, &Device::Cpu).unwrap();
    let classes = ["a", "b", "c"].map(String::from).to_vec();
    let manifest = Manifest { base: BaseRef::of(base, "base"), task: json!({"retrieve": {}}), classes, ..Default::default() };
    delta::save(dir, &adapters, base.clip.sites(), &manifest).unwrap();
}

fn lora() -> MethodConfig {
    serde_json::from_value(json!({"lora": {"rank": 2, "alpha": 2.0, "targets": ["q_proj"], "towers": "vision"}})).unwrap()
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(path, value.to_string()).unwrap();
}

/// Replaces `"key":value` in a file of JSON by text that no JSON library would write.
fn put(path: &Path, key: &str, raw: &str) {
    edit(path, |v| v[key] = "@@".into());
    let text = std::fs::read_to_string(path).unwrap().replacen("\"@@\"", raw, 1);
    std::fs::write(path, text).unwrap();
}

pub(crate) fn cases() -> Vec<Case> {
    let base = Rc::new(Model::load(&World::new().path("base").display().to_string()).unwrap());
    let mut cases = vec![];
    for entry in METHODS {
        let Some(method) = (entry.examples)().into_iter().next() else { continue };
        // Tip-Adapter and CoOp's kin know a task's classes, which a base alone has not.
        let Ok(adapters) = Adapters::plan(std::slice::from_ref(&method), base.base().clip.sites(), 1, &Device::Cpu) else { continue };
        drop(adapters);
        let config = method.to_adapter_config(base.base().clip.sites()).unwrap();
        let numbers = config.as_object().unwrap().iter().filter(|(_, v)| v.is_number()).map(|(k, _)| k.clone());
        for field in numbers.collect::<Vec<_>>() {
            for odd in &ODD[..7] {
                let (method, base_, field) = (method.clone(), base.clone(), field.clone());
                cases.push(case(format!("{}: {field}: {odd}", entry.name), Either, &base, move |dir| {
                    save(dir, base_.base(), &method);
                    put(&dir.join("adapter_config.json"), &field, odd);
                }));
            }
        }
    }
    cases.extend(files(&base));
    cases.extend(tensors(&base));
    cases.extend(tasks(&base));
    cases
}

/// Files that are no adapter, or not this base's.
fn files(base: &Rc<Model>) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut broken = |name: &str, expect, change: fn(&Path)| {
        let own = base.clone();
        cases.push(case(name, expect, base, move |dir| {
            save(dir, own.base(), &lora());
            change(dir);
        }));
    };
    const CONFIG: &str = "adapter_config.json";
    const MANIFEST: &str = "peft.json";
    broken("as it was saved", Fine, |_| ());
    broken("another base", Refused("was made for"), |d| edit(&d.join(MANIFEST), |v| v["base"]["digest"] = "blake3:0".into()));
    broken("no configuration", Refused("no adapter"), |d| std::fs::remove_file(d.join(CONFIG)).unwrap());
    broken("no weights", Refused("no such file"), |d| std::fs::remove_file(d.join("adapter_model.safetensors")).unwrap());
    broken("a directory for weights", Refused("is a directory"), |d| {
        std::fs::remove_file(d.join("adapter_model.safetensors")).unwrap();
        std::fs::create_dir(d.join("adapter_model.safetensors")).unwrap();
    });
    broken("no object", Refused(CONFIG), |d| std::fs::write(d.join(CONFIG), "[]").unwrap());
    broken("an empty configuration", Refused(CONFIG), |d| std::fs::write(d.join(CONFIG), "").unwrap());
    broken("a configuration in UTF-16", Refused(CONFIG), |d| std::fs::write(d.join(CONFIG), b"\xff\xfe{\0}\0").unwrap());
    broken("a deep configuration", Refused(CONFIG), |d| std::fs::write(d.join(CONFIG), "[".repeat(1 << 20)).unwrap());
    broken("a million zeros", Refused("values"), |d| std::fs::write(d.join(CONFIG), format!("[{}0]", "0,".repeat(2 << 20))).unwrap());
    broken("a manifest of a million zeros", Refused("values"), |d| {
        std::fs::write(d.join(MANIFEST), format!("{{\"metrics\": [{}0]}}", "0,".repeat(2 << 20))).unwrap();
    });
    broken("a manifest that is none", Refused(MANIFEST), |d| std::fs::write(d.join(MANIFEST), "{\"base\": 3}").unwrap());
    broken("a huge number in the manifest", Refused(MANIFEST), |d| put(&d.join(MANIFEST), "scalars", "{\"threshold\": 1e400}"));
    broken("a key that occurs twice", Refused("`lora_alpha` occurs twice"), |d| {
        let text = std::fs::read_to_string(d.join(CONFIG)).unwrap();
        std::fs::write(d.join(CONFIG), text.replacen("\"lora_alpha\"", "\"lora_alpha\": 1000, \"lora_alpha\"", 1)).unwrap();
    });
    broken("an escape in a class name", Refused("is no name of a class"), |d| put(&d.join(MANIFEST), "classes", "[\"\\u001b[2J\"]"));
    broken("a class without name", Refused("is no name of a class"), |d| put(&d.join(MANIFEST), "classes", "[\"a\", \" \"]"));
    broken("a negative temperature", Refused("scalars.temperature"), |d| put(&d.join(MANIFEST), "scalars", "{\"temperature\": -1}"));
    broken("an unknown kind", Refused("peft_type"), |d| put(&d.join(CONFIG), "peft_type", "\"MAGIC\""));
    broken("no kind", Refused("peft_type"), |d| put(&d.join(CONFIG), "peft_type", "null"));
    for name in ["\"..\"", "\"../adapter\"", "\"/etc\"", "\"a/b\"", "\"\"", "\".\""] {
        let own = base.clone();
        cases.push(case(format!("a method in {name}"), Refused("is not a directory name"), base, move |dir| {
            save(dir, own.base(), &lora());
            put(&dir.join(MANIFEST), "methods", &format!("[{{\"dir\": {name}, \"digest\": \"\"}}]"));
        }));
    }
    let mut more = |name: &str, expect, key: &'static str, raw: &'static str| {
        let own = base.clone();
        cases.push(case(name, expect, base, move |dir| {
            save(dir, own.base(), &lora());
            put(&dir.join(CONFIG), key, raw);
        }));
    };
    more("a rank that the tensors have not", Refused("expected"), "r", "3");
    more("a rank of its own for a layer", Refused("expected"), "rank_pattern", "{\"q_proj\": 1}");
    more("targets that are nowhere", Refused("target"), "target_modules", "[\"nowhere\"]");
    more("an expression without end", Refused("adapter"), "target_modules", "\"(a+)+$(\"");
    more("an expression that takes for ever", Either, "target_modules", "\"(([a-z_.]+)+)+[0-9]{30}X\"");
    more("targets by the thousand", Either, "target_modules", "[\"q_proj\", \"x\", \"y\", \"\", \".\", \"q_proj\"]");
    more("a target that is a number", Refused("target_modules"), "target_modules", "[1]");
    more("layers that are none", Either, "layers_to_transform", "[1000000000]");
    more("another initialisation", Either, "init_lora_weights", "\"eva\"");
    more("biases of its own", Refused("missing"), "bias", "\"all\"");
    more("a pattern of patterns", Either, "alpha_pattern", "{\"(x+x+)+y\": 1.0, \"q_proj\": 1e300}");
    cases
}

/// Tensors that are not what the configuration says.
fn tensors(base: &Rc<Model>) -> Vec<Case> {
    const WEIGHTS: &str = "adapter_model.safetensors";
    type Named = Vec<(String, Tensor)>;
    let mut cases = Vec::new();
    let mut changed = |name: String, part: &'static str, change: Box<dyn FnOnce(&mut Named)>| {
        let own = base.clone();
        cases.push(case(name, Refused(part), base, move |dir| {
            save(dir, own.base(), &lora());
            let path = dir.join(WEIGHTS);
            let (mut all, _) = weights::read_safetensors("x", &std::fs::read(&path).unwrap()).unwrap();
            change(&mut all);
            weights::save(&path, &all).unwrap();
        }));
    };
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            let fill = move |all: &mut Named| all[1].1 = (all[1].1.zeros_like().unwrap() + value).unwrap().to_dtype(dtype).unwrap();
            changed(format!("{value} in {}", dtype.as_str()), "not finite", Box::new(fill));
        }
    }
    let huge = |all: &mut Named| all[1].1 = (all[1].1.to_dtype(DType::F64).unwrap() + 1e300).unwrap();
    changed("more than f32 holds".into(), "not finite in f32", Box::new(huge));
    for dtype in [DType::U8, DType::U32, DType::I64] {
        let cast = move |all: &mut Named| all[0].1 = all[0].1.to_dtype(dtype).unwrap();
        changed(format!("whole numbers, {}", dtype.as_str()), "expected floats", Box::new(cast));
    }
    changed("a tensor less".into(), "missing", Box::new(|all| _ = all.pop()));
    changed("no tensors".into(), "missing", Box::new(Vec::clear));
    changed("transposed".into(), "expected", Box::new(|all| all[0].1 = all[0].1.t().unwrap().contiguous().unwrap()));
    changed(
        "A and B exchanged".into(),
        "expected",
        Box::new(|all| {
            let name = all[0].0.clone();
            all[0].0 = all[1].0.clone();
            all[1].0 = name;
        }),
    );
    let odd = [
        "",
        "x",
        "../../x",
        "a\0b",
        "base_model.model.",
        "base_model.model.vision_model.encoder.layers.999.self_attn.q_proj.lora_A.weight",
    ];
    for name in odd.iter().map(ToString::to_string).chain(["\u{202e}A".into(), "x".repeat(1 << 20)]) {
        let title: String = name.chars().take(40).collect();
        changed(format!("a tensor called {title:?}"), "unexpected", Box::new(move |all| all.push((name, all[0].1.clone()))));
    }
    for kind in ["lora_magnitude_vector", "lora_embedding_A", "ia3_l"] {
        let rename = move |all: &mut Named| all[0].0 = all[0].0.replace("lora_A.weight", kind);
        changed(format!("{kind} for lora_A"), "unexpected", Box::new(rename));
    }
    cases
}

/// A task's own weights, and what `peft.json` says of them.
fn tasks(base: &Rc<Model>) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut head = |name: &str, part, rows: usize, value: f64, dtype: DType| {
        let own = base.clone();
        cases.push(case(format!("a head: {name}"), Refused(part), base, move |dir| {
            save(dir, own.base(), &lora());
            let dim = own.base().clip.config().projection_dim;
            let fill = |shape: &[usize]| Tensor::full(value, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let all = [("head.weight".to_string(), fill(&[rows, dim])), ("head.bias".to_string(), fill(&[rows]))];
            weights::save(&dir.join("task.safetensors"), &all).unwrap();
        }));
    };
    head("NaN", "not finite", 3, f64::NAN, DType::F32);
    head("infinite in half precision", "not finite", 3, f64::INFINITY, DType::F16);
    head("more than f32 holds", "not finite in f32", 3, 1e300, DType::F64);
    head("whole numbers", "expected floats", 3, 1.0, DType::U8);
    head("other classes", "task.safetensors", 4, 1.0, DType::F32);
    for fusion in [
        r#"{"transformer": {"layers": 1000000000, "dim": 1024, "heads": 1}}"#,
        r#"{"transformer": {"layers": 1, "dim": 1000000000, "heads": 1}}"#,
        r#"{"cross_attention": {"layers": 1, "dim": 8, "heads": 0}}"#,
        r#"{"concat": {"hidden": 18446744073709551615}}"#,
        r#"{"bilinear": {"rank": 1000000000000}}"#,
        r#"{"concat": {"hidden": -1}}"#,
        r#"{"magic": {}}"#,
        "[]",
    ] {
        let own = base.clone();
        cases.push(case(format!("a fusion: {fusion}"), Refused("adapter"), base, move |dir| {
            save(dir, own.base(), &lora());
            put(&dir.join("peft.json"), "task", r#"{"match": {"inputs": "both", "negatives": "given"}}"#);
            put(&dir.join("peft.json"), "fusion", fusion);
        }));
    }
    for task in [r#"{"magic": {}}"#, "[]", "3", r#"{"match": {"inputs": 1}}"#, r#"{"answer": {"answers": {"known": 1e18}}}"#, "null"] {
        let own = base.clone();
        cases.push(case(format!("a task: {task}"), Either, base, move |dir| {
            save(dir, own.base(), &lora());
            put(&dir.join("peft.json"), "task", task);
        }));
    }
    cases
}
