//! What holds for every split, order, schedule, fold and list of targets, on random ones (proptest).
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Tensor};
use common::{StopAfter, World};
use peft::clip::base::Base;
use peft::data::{ColumnNames, DataConfig, Dataset, Plan, Split, SplitConfig, TableConfig};
use peft::optim::{Cosine, Linear, ScheduleConfig, Warmup};
use peft::recipe::Recipe;
use peft::run::Existing;
use peft_adapters::targets::Targets;
use peft_adapters::{MethodConfig, Params, Patches, rng};
use proptest::prelude::*;
use proptest::test_runner::Config;

fn cases(count: u32) -> Config {
    Config { cases: count, failure_persistence: None, ..Config::default() }
}

/// A table of texts: of each example its class and, where it has one, its group.
fn divided(rows: &[(usize, Option<usize>)], test: f64, val: f64, seed: u64) -> Dataset {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.jsonl");
    let row = |(i, (class, group)): (usize, &(usize, Option<usize>))| {
        let group = group.map(|g| format!("g{g}"));
        format!("{}\n", serde_json::json!({"text": format!("text {i}"), "label": format!("c{class}"), "group": group}))
    };
    std::fs::write(&path, rows.iter().enumerate().map(row).collect::<String>()).unwrap();
    let table = Some(TableConfig { path, text: Some(ColumnNames::One("text".into())), ..Default::default() });
    let split = Some(SplitConfig { train: 1.0 - test - val, val, test, seed });
    DataConfig { table, split, ..Default::default() }.open(0).unwrap()
}

const SPLITS: [Split; 3] = [Split::Train, Split::Val, Split::Test];

fn ids(data: &Dataset) -> [Vec<String>; 3] {
    SPLITS.map(|s| data.split(s).iter().map(|e| e.id.clone()).collect())
}

proptest! {
    #![proptest_config(cases(48))]

    #[test]
    fn each_example_is_in_one_split_and_groups_stay_together(
        rows in prop::collection::vec((0usize..4, prop::option::of(0usize..12)), 4..60),
        test in 0.0..0.4f64, val in 0.05..0.4f64, seed in any::<u64>(),
    ) {
        let data = divided(&rows, test, val, seed);
        let all = ids(&data);
        prop_assert_eq!(all.iter().flatten().collect::<BTreeSet<_>>().len(), rows.len());
        prop_assert_eq!(all.iter().map(Vec::len).sum::<usize>(), rows.len());
        let groups = |s: Split| data.split(s).iter().filter_map(|e| e.group.clone()).collect::<BTreeSet<_>>();
        prop_assert!(groups(Split::Train).is_disjoint(&groups(Split::Test)));
        prop_assert!(groups(Split::Train).is_disjoint(&groups(Split::Val)));
        prop_assert!(groups(Split::Val).is_disjoint(&groups(Split::Test)));
        prop_assert_eq!(ids(&divided(&rows, test, val, seed)), all);
    }

    #[test]
    fn each_class_has_its_share_of_each_split(
        counts in prop::collection::vec(3usize..40, 1..5), test in 0.1..0.4f64, val in 0.1..0.4f64, seed in any::<u64>(),
    ) {
        let rows: Vec<_> = counts.iter().enumerate().flat_map(|(class, count)| vec![(class, None); *count]).collect();
        let data = divided(&rows, test, val, seed);
        let of = |s: Split, class: usize| data.split(s).iter().filter(|e| data.classes[e.label.unwrap() as usize] == format!("c{class}")).count();
        for (class, count) in counts.iter().enumerate() {
            for (split, share) in [(Split::Train, 1.0 - test - val), (Split::Val, val), (Split::Test, test)] {
                let found = of(split, class);
                prop_assert!(found > 0 && (found as f64 - share * *count as f64).abs() <= 1.5, "{split:?}: {found} of {count}, share {share}");
            }
        }
    }

    #[test]
    fn an_epoch_has_each_example_once_and_goes_on_where_it_stopped(
        examples in 1usize..200, batch in 1usize..40, shuffle: bool, seed in any::<u64>(), epoch in 0usize..5, stop in 0usize..10,
    ) {
        let plan = Plan { examples, batch, shuffle, drop_last: false, seed, balanced: None };
        let first = epoch * plan.per_epoch();
        let batches: Vec<Vec<usize>> = (0..plan.per_epoch()).map(|i| plan.indices(first + i)).collect();
        let mut seen = batches.concat();
        prop_assert_eq!(&seen, &plan.order(epoch));
        for (i, batch) in batches.iter().enumerate() {
            prop_assert_eq!(batch.len(), plan.size(first + i));
        }
        // A run that resumes makes a new plan, and needs its position alone.
        let stop = stop.min(batches.len());
        let rest: Vec<usize> = (stop..batches.len()).flat_map(|i| plan.clone().indices(first + i)).collect();
        prop_assert_eq!(rest, batches[stop..].concat());
        seen.sort_unstable();
        prop_assert_eq!(seen, (0..examples).collect::<Vec<_>>());
    }

    #[test]
    fn balanced_sampling_draws_classes_equally(
        counts in prop::collection::vec(1usize..30, 1..6), seed in any::<u64>(), epoch in 0usize..4,
    ) {
        let mut next = 0;
        let classes: Vec<Vec<usize>> = counts.iter().map(|c| { next += c; (next - c..next).collect() }).collect();
        let plan = Plan { examples: next, batch: 7, shuffle: true, drop_last: false, seed, balanced: Some(Arc::new(classes.clone())) };
        let order = plan.order(epoch);
        prop_assert_eq!(order.len(), next);
        for class in &classes {
            let drawn: Vec<usize> = order.iter().copied().filter(|i| class.contains(i)).collect();
            prop_assert!(drawn.len().abs_diff(next / classes.len()) <= 1, "{} of {next}", drawn.len());
            // None of a class comes a second time before all have come once.
            let mut times: BTreeMap<usize, usize> = class.iter().map(|i| (*i, 0)).collect();
            drawn.iter().for_each(|i| *times.get_mut(i).unwrap() += 1);
            prop_assert!(times.values().max().unwrap() - times.values().min().unwrap() <= 1, "{times:?}");
        }
    }

    #[test]
    fn learning_rates_rise_to_the_peak_and_fall_to_the_floor(
        peak in 1e-6..1.0f64, floor in 0.0..1.0f64, warmup in 0.0..0.9f64, total in 2usize..500, kind in 0usize..3,
    ) {
        let floor = floor * peak;
        let schedule = match kind {
            0 => ScheduleConfig::Constant(Warmup { warmup }),
            1 => ScheduleConfig::Linear(Linear { warmup, floor }),
            _ => ScheduleConfig::Cosine(Cosine { warmup, floor }),
        };
        schedule.validate("x", peak).unwrap();
        let rates: Vec<f64> = (0..total).map(|step| schedule.lr(peak, step, total)).collect();
        let rising = (warmup * total as f64).round() as usize;
        let slack = peak * 1e-12;
        for (step, rate) in rates.iter().enumerate() {
            prop_assert!(*rate > -slack && *rate <= peak + slack, "step {step}: {rate}");
            prop_assert!(kind == 0 || step < rising || *rate >= floor - slack, "step {step}: {rate} below {floor}");
        }
        for (step, pair) in rates.windows(2).enumerate() {
            prop_assert!(if step + 1 < rising { pair[1] > pair[0] } else { pair[1] <= pair[0] + slack || step + 1 == rising }, "step {step}: {pair:?}");
            // No jump but the warm-up's own step, or what half a cosine falls in one.
            let steps = (total - rising).max(1) as f64;
            let most = (peak / rising.max(1) as f64).max(peak * std::f64::consts::FRAC_PI_2 / steps);
            prop_assert!((pair[1] - pair[0]).abs() <= most + slack, "step {step}: {pair:?}");
        }
        if rising > 0 {
            prop_assert!((rates[rising - 1] - peak).abs() <= slack);
        }
        prop_assert!(kind == 0 || (schedule.lr(peak, total, total) - floor).abs() <= slack, "ends at {}", schedule.lr(peak, total, total));
    }

    #[test]
    fn a_list_of_targets_means_paths_and_their_ends(
        names in prop::collection::vec(path(3), 1..4), paths in prop::collection::vec(path(5), 1..8),
    ) {
        let list = Targets::Names(names.clone()).matcher("targets").unwrap();
        let whole = Targets::Pattern(names.iter().map(|n| n.replace('.', r"\.")).collect::<Vec<_>>().join("|")).matcher("targets").unwrap();
        for path in paths.iter().chain(&names) {
            // By parts, as Python's `path == name or path.endswith("." + name)` has it.
            let parts: Vec<&str> = path.split('.').collect();
            let ends = |n: &String| { let own: Vec<&str> = n.split('.').collect(); parts.ends_with(&own) };
            prop_assert_eq!(list(path).unwrap(), names.iter().any(ends), "{} against {:?}", path, names);
            prop_assert_eq!(whole(path).unwrap(), names.contains(path), "{} against {:?}", path, names);
        }
    }
}

/// A module's path of at most `most` parts, made of few names so that some agree.
fn path(most: usize) -> impl Strategy<Value = String> {
    let part = prop::sample::select(vec!["q_proj", "proj", "q", "layers", "0", "10", "mlp", "fc1"]);
    prop::collection::vec(part, 1..=most).prop_map(|parts| parts.join("."))
}

fn base() -> &'static Base {
    static BASE: OnceLock<Base> = OnceLock::new();
    BASE.get_or_init(|| {
        let world = World::new();
        Base::load(&world.path("base").display().to_string(), DType::F32, &Device::Cpu).unwrap()
    })
}

fn largest(t: &Tensor) -> f32 {
    t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

proptest! {
    #![proptest_config(cases(24))]

    /// Folding adds what does not depend on the weight, or multiplies by it, so that it can be taken back.
    #[test]
    fn what_is_folded_in_comes_out_again(
        method in prop::sample::select(vec!["lora", "loha", "lokr", "ia3"]), rank in 1usize..9, alpha in 0.5..32.0f64, size in 0.01..1.0f64, seed in any::<u64>(),
    ) {
        let config = match method {
            "ia3" => serde_json::json!({method: {}}),
            _ => serde_json::json!({method: {"rank": rank, "alpha": alpha}}),
        };
        let method: MethodConfig = serde_json::from_value(config).unwrap();
        let mut params = Params::new(seed, &Device::Cpu);
        let patch = method.plan(base().clip.sites(), &mut params).unwrap();
        for p in params.iter() {
            let noise = rng::normal(&mut rng::rng(seed, &[rng::name_key(&p.name)]), size, p.var.shape(), DType::F32, &Device::Cpu).unwrap();
            p.var.set(&(p.var.as_tensor().detach() + noise).unwrap()).unwrap();
        }
        let (ones, mut changed, patches) = (method.name() == "ia3", 0, Patches::new(vec![patch]));
        for (id, weight) in base().clip.sites().weights() {
            let Some(folded) = patches.fold(id, &weight.tensor).unwrap() else { continue };
            let neutral = if ones { weight.tensor.ones_like() } else { weight.tensor.zeros_like() }.unwrap();
            let update = patches.fold(id, &neutral).unwrap().unwrap();
            let back = if ones { folded.div(&update) } else { folded.sub(&update) }.unwrap();
            let scale = largest(&folded).max(largest(&update)).max(largest(&weight.tensor));
            // A factor near zero loses what it multiplies.
            let smallest: f32 = update.abs().unwrap().flatten_all().unwrap().min(0).unwrap().to_scalar().unwrap();
            let lost = if ones { smallest.min(1.0) } else { 1.0 };
            prop_assert!(lost < 1e-3 || largest(&(back - &weight.tensor).unwrap()) <= 1e-5 * scale / lost, "{}", weight.name);
            changed += 1;
        }
        prop_assert!(changed > 0);
    }
}

proptest! {
    #![proptest_config(cases(4))]

    /// However often a run is stopped, it ends in the same bits.
    #[test]
    fn resumed_runs_end_like_whole_ones(
        stops in prop::collection::vec(1usize..5, 1..3), batch in 5usize..12, accumulate in 1usize..3, seed in 0u64..100,
        sampling in prop::sample::select(vec!["natural", "balanced"]), schedule in prop::sample::select(vec!["cosine", "linear", "constant"]),
    ) {
        let w = World::new();
        let run = |output: &str, existing, steps| {
            let text = format!(
                "{{ model: '{}', method: {{ lora: {{ rank: 2, dropout: 0.1 }} }}, data: {{ folder: {{ root: '{}' }} }}, \
                 task: {{ classify: {{ templates: ['a {{}} thing'] }} }}, output: '{}', train: {{ epochs: 2, batch: {batch}, accumulate: {accumulate}, \
                 lr: 1.0e-2, seed: {seed}, sampling: {sampling}, schedule: {schedule}, augment: {{ flip: true }}, tensorboard: false }} }}",
                w.path("base").display(), w.path("data").display(), w.path(output).display()
            );
            let recipe = Recipe::parse("recipe", &text, "recipe", &[]).unwrap();
            peft::session::train(recipe, existing, &Device::Cpu, &mut StopAfter(steps))
        };
        let adapter = |output: &str| std::fs::read(w.path(output).join("adapter/adapter_model.safetensors")).unwrap();
        run("whole", Existing::Refuse, usize::MAX).unwrap();
        let mut done = run("parts", Existing::Refuse, stops[0]).is_ok();
        for stop in &stops[1..] {
            done = done || run("parts", Existing::Resume, *stop).is_ok();
        }
        if !done {
            run("parts", Existing::Resume, usize::MAX).unwrap();
        }
        prop_assert!(adapter("whole") == adapter("parts"), "stopped after {stops:?}");
    }
}
