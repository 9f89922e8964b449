//! Numbers that leave the range of floats, memory that does not suffice, half precision.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{Device, Result as TensorResult, Tensor};
use common::{World, read};
use peft::delta::Adapters;
use peft::recipe::Recipe;
use peft::run::Existing;
use peft::session::{self, Session};
use peft::train::{Event, Micro, Observer, StepRecord};
use peft_adapters::{Fold, LinearOut, Patch, Sequence, SiteId, Step, WeightId};

/// Keeps what a run says, and stops it after some steps.
struct Watch {
    steps: Vec<StepRecord>,
    warnings: Vec<String>,
    stop_after: usize,
}

impl Watch {
    fn new(stop_after: usize) -> Self {
        Self { steps: Vec::new(), warnings: Vec::new(), stop_after }
    }
}

impl Observer for Watch {
    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Step(record) => self.steps.push(record.clone()),
            Event::Warning(text) => self.warnings.push(text),
            _ => {}
        }
    }

    fn stop(&self) -> Option<i32> {
        (self.steps.len() >= self.stop_after).then_some(2)
    }
}

fn recipe(w: &World, sets: &[&str]) -> Recipe {
    let sets: Vec<String> = sets.iter().map(ToString::to_string).chain(["train.schedule=constant".into()]).collect();
    let text = w
        .recipe("lora: { rank: 2 }")
        .replace("model: base", &format!("model: {}", w.path("base").display()))
        .replace("root: data", &format!("root: {}", w.path("data").display()))
        .replace("output: run", &format!("output: {}", w.path("run").display()));
    Recipe::parse("recipe", &text, "recipe", &sets).unwrap()
}

/// Trains with a patch more; what came of it, what was said, and the parameters in the end.
fn with_patch(
    session: &Session,
    patch: impl FnOnce(&Adapters) -> Box<dyn Patch>,
) -> (peft::Result<peft::train::State>, Watch, Vec<Vec<f32>>) {
    let (mut adapters, task) = session.plan().unwrap();
    let patch = patch(&adapters);
    let mut trainer = session.trainer(&mut adapters, task).unwrap();
    trainer.adapters.patches.push(patch);
    let mut run = trainer.begin().unwrap();
    let mut watch = Watch::new(usize::MAX);
    let done = trainer.train(&mut run, None, &mut watch).map(|()| run.state().clone());
    let values = adapters.params.iter().map(|p| p.var.flatten_all().unwrap().to_vec1().unwrap()).collect();
    (done, watch, values)
}

fn site(session: &Session, path: &str, linear: bool) -> SiteId {
    let is = |kind: &peft_adapters::SiteKind| matches!(kind, peft_adapters::SiteKind::Linear { .. }) == linear;
    session.base.clip.sites().iter().find(|(_, s)| s.path == path && is(&s.kind)).unwrap().0
}

/// Makes one row of a layer's output infinite at one step.
struct Poison {
    at: SiteId,
    row: usize,
    when: u64,
    now: u64,
}

impl Patch for Poison {
    fn prepare(&mut self, step: &Step) -> TensorResult<()> {
        self.now = step.step;
        Ok(())
    }

    fn linear(&self, at: SiteId, y: LinearOut) -> TensorResult<LinearOut> {
        if at != self.at || self.now != self.when {
            return Ok(y);
        }
        y.map(|y| {
            let factors: Vec<f32> = (0..y.dim(0)?).map(|row| if row == self.row { f32::INFINITY } else { 1.0 }).collect();
            y.broadcast_mul(&Tensor::from_vec(factors, (y.dim(0)?, 1, 1), y.device())?)
        })
    }

    fn fold(&self, _: WeightId, _: &Tensor) -> TensorResult<Fold> {
        Ok(Fold::Unchanged)
    }
}

const FC1: &str = "vision_model.encoder.layers.1.mlp.fc1";

#[test]
fn a_loss_that_is_not_finite_names_step_site_and_file_or_is_left_out() {
    let w = World::new();
    let poison = |session: &Session| Box::new(Poison { at: site(session, FC1, true), row: 1, when: 2, now: 0 });
    let session = |sets: &[&str]| Session::open(recipe(&w, sets), &Device::Cpu, &mut Watch::new(0)).unwrap();

    let stops = session(&["train.epochs=null", "train.steps=4"]);
    let (done, ..) = with_patch(&stops, |_| poison(&stops));
    let error = done.unwrap_err();
    let (message, code) = (error.to_string(), error.exit_code());
    let (mut adapters, task) = stops.plan().unwrap();
    let order = stops.trainer(&mut adapters, task).unwrap().plan().indices(2);
    let id = &stops.data.train[order[1]].id;
    assert!(code == 3 && message.contains("step 3: the loss is not finite"), "{message}");
    assert!(message.contains(&format!("from the output of `{FC1}` on, for {id}; the batch holds")), "{message}");
    assert!(message.contains("train.on_nonfinite: skip"), "{message}");

    let skips = session(&["train.epochs=null", "train.steps=3", "train.on_nonfinite=skip"]);
    let (done, watch, left_out) = with_patch(&skips, |_| poison(&skips));
    assert_eq!(done.unwrap().health.numbers.skipped_steps, 1);
    assert_eq!(watch.steps.iter().map(|s| s.skipped).collect::<Vec<_>>(), [false, false, true]);
    assert!(watch.warnings.iter().any(|t| t.contains("step 3 is left out") && t.contains(FC1)), "{:?}", watch.warnings);
    // A line of metrics.jsonl that has no loss can be read again.
    let line = serde_json::to_string(&watch.steps[2]).unwrap();
    assert!(line.contains("\"loss\":null") && serde_json::from_str::<StepRecord>(&line).unwrap().loss.is_nan(), "{line}");
    let two = session(&["train.epochs=null", "train.steps=2"]);
    let (_, _, two_steps) = with_patch(&two, |_| poison(&two));
    assert_eq!(left_out, two_steps, "nothing was updated");
}

/// A term whose value is zero and whose gradient is none: the root of a sum of squares, of zeros.
struct Kink(Tensor);

impl Patch for Kink {
    fn regulariser(&self) -> TensorResult<Option<Tensor>> {
        self.0.sqr()?.sum_all()?.sqrt().map(Some)
    }

    fn fold(&self, _: WeightId, _: &Tensor) -> TensorResult<Fold> {
        Ok(Fold::Unchanged)
    }
}

#[test]
fn a_gradient_that_is_not_finite_names_its_parameter() {
    let w = World::new();
    let session = Session::open(recipe(&w, &[]), &Device::Cpu, &mut Watch::new(0)).unwrap();
    let name = "base_model.model.text_model.encoder.layers.0.self_attn.v_proj.lora_B.weight";
    let (done, ..) = with_patch(&session, |adapters| Box::new(Kink(adapters.params.get(name).unwrap().var.as_tensor().clone())));
    let message = done.unwrap_err().to_string();
    assert!(message.contains(&format!("step 1: the gradient of `{name}` is not finite, 1 of")) && message.contains(".png"), "{message}");
}

/// Decay multiplies A and B by -9 a step, so that the second epoch overflows, at its fourth of six steps or so.
#[test]
fn a_run_that_numbers_end_keeps_its_best_epoch() {
    let w = World::new();
    let sets = [
        "--set",
        "train.lr=1.0e3",
        "--set",
        "train.batch=4",
        "--set",
        "train.schedule=constant",
        "--set",
        "train.optimizer={adamw: {weight_decay: 0.01}}",
    ];
    let message = w.fails(&[&["train", "recipe.yaml"], &sets[..]].concat(), 3);
    // A norm whose variance overflows gives no numbers, and what follows it is the first to have none.
    assert!(
        message.contains("is not finite") && message.contains("`vision_model.encoder.layers.0.") && message.contains(".png"),
        "{message}"
    );
    assert!(message.contains("the best epoch so far, 1, is kept in run/adapter"), "{message}");
    assert!(w.json(&["eval", "run"])["loss"].as_f64().unwrap().is_finite());
    assert!(std::fs::read_to_string(w.path("run/failure.txt")).unwrap().contains("is not finite"));
    let again = w.fails(&[&["train", "recipe.yaml", "--resume"], &sets[..]].concat(), 3);
    assert!(again.contains("is not finite"), "{again}");
    let skip = ["--set", "train.on_nonfinite=skip", "--set", "train.batch=1", "--force"];
    let lost = w.fails(&[&["train", "recipe.yaml"], &sets[..], &skip].concat(), 3);
    assert!(lost.contains("as in the 9 steps before") && lost.contains("is left out"), "{lost}");
}

/// Steps of 100 for weights that should be about 1: Huber's loss, whose gradient is bounded, never comes back.
#[test]
fn a_loss_that_runs_away_is_reported() {
    let w = World::new();
    let row = |i: usize| {
        format!("{{\"image\": \"data/red/{i}.png\", \"value\": {i}, \"split\": \"{}\"}}\n", ["train", "val", "train", "test"][i % 4])
    };
    w.write("rows.jsonl", &(0..10).map(row).collect::<String>());
    let text = "model: base\nmethod: none\ndata: { table: { path: rows.jsonl } }\ntask: { regress: { loss: huber } }\n\
                train: { epochs: 30, batch: 4, lr: 100, schedule: constant }\noutput: run\n";
    w.write("away.yaml", text);
    let out = w.peft(&["train", "away.yaml", "--json"]);
    let (said, report) = (String::from_utf8_lossy(&out.stderr), String::from_utf8_lossy(&out.stdout));
    assert!(out.status.success() && said.contains("warning: the loss has diverged"), "{said}");
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert!(report["numbers"]["diverged_at"].as_u64().is_some_and(|at| at >= 10) && report["best_epoch"].is_u64(), "{report}");
    let page = std::fs::read_to_string(w.path("run/report.html")).unwrap();
    assert!(page.contains("diverged at"));
}

#[test]
fn half_precision_scales_the_loss_and_resumes_in_the_same_bits() {
    let w = World::new();
    let train = |output: &str, existing, stop_after| {
        let sets = ["train.dtype=f16", &format!("output={}", w.path(output).display())];
        session::train(recipe(&w, &sets), existing, &Device::Cpu, &mut Watch::new(stop_after))
    };
    let (whole, _) = train("whole", Existing::Refuse, usize::MAX).unwrap();
    assert!(whole.numbers.loss_scale.is_some_and(|s| s >= 1.0 && s.log2().fract() == 0.0), "{:?}", whole.numbers);
    assert_eq!(train("stopped", Existing::Refuse, 5).unwrap_err().exit_code(), 130);
    let (resumed, _) = train("stopped", Existing::Resume, usize::MAX).unwrap();
    let adapter = |run: &str| read(&w.path(run).join("adapter/adapter_model.safetensors"));
    assert!(adapter("whole") == adapter("stopped"));
    assert_eq!((whole.numbers, whole.epochs), (resumed.numbers, resumed.epochs));
    // What is learnt is what f32 learns, but for rounding.
    let (wide, _) = session::train(recipe(&w, &[]), Existing::Refuse, &Device::Cpu, &mut Watch::new(usize::MAX)).unwrap();
    let (half, wide) = (resumed.after.unwrap().loss, wide.after.unwrap().loss);
    assert!((half - wide).abs() < 0.05 * wide.max(1.0), "{half} {wide}");
}

/// A device whose memory holds so many images.
struct Greedy {
    at: SiteId,
    most: usize,
}

impl Patch for Greedy {
    fn tokens(&self, at: SiteId, sequence: Sequence) -> TensorResult<Sequence> {
        if at == self.at && sequence.x.dim(0)? > self.most {
            candle_core::bail!("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")");
        }
        Ok(sequence)
    }

    fn fold(&self, _: WeightId, _: &Tensor) -> TensorResult<Fold> {
        Ok(Fold::Unchanged)
    }
}

#[test]
fn where_memory_runs_out_smaller_micro_batches_make_the_same_steps() {
    let w = World::new();
    let session = |sets: &[&str]| Session::open(recipe(&w, sets), &Device::Cpu, &mut Watch::new(0)).unwrap();
    let greedy = |session: &Session, most| Box::new(Greedy { at: site(session, "vision_model.encoder.layers.0", false), most });

    let fixed = session(&[]);
    let (done, ..) = with_patch(&fixed, |_| greedy(&fixed, 3));
    let error = done.unwrap_err();
    assert!(error.exit_code() == 3 && error.to_string().contains("train.auto_batch: true"), "{error}");

    let auto = session(&["train.auto_batch=true"]);
    let (roomy, all, whole) = with_patch(&auto, |_| greedy(&auto, 8));
    let (narrow, parts, split) = with_patch(&auto, |_| greedy(&auto, 3));
    assert_eq!((roomy.unwrap().micro, narrow.unwrap().micro), (None, Some(Micro { batch: 2, accumulate: 4 })));
    assert_eq!(parts.warnings.len(), 2, "8 to 4 to 2: {:?}", parts.warnings);
    assert_eq!(all.steps.len(), parts.steps.len());
    assert!(all.steps.iter().zip(&parts.steps).all(|(a, b)| (a.loss - b.loss).abs() < 1e-4), "{:?} {:?}", all.steps, parts.steps);
    let off = whole.iter().flatten().zip(split.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(off < 1e-3, "{off}");
    let (one, ..) = with_patch(&auto, |_| greedy(&auto, 0));
    assert!(one.unwrap_err().to_string().contains("batch 1, accumulate 8"));
}

#[test]
fn a_resumed_run_goes_on_with_the_micro_batches_that_it_found() {
    let w = World::new();
    let session = Session::open(recipe(&w, &["train.auto_batch=true"]), &Device::Cpu, &mut Watch::new(0)).unwrap();
    let dir = w.path("checkpoint");
    let found = Micro { batch: 4, accumulate: 2 };
    let go = |most: usize, stop_after: usize, resume: bool| {
        let (mut adapters, task) = session.plan().unwrap();
        let mut trainer = session.trainer(&mut adapters, task).unwrap();
        trainer.adapters.patches.push(Box::new(Greedy { at: site(&session, "vision_model.encoder.layers.0", false), most }));
        let mut run = trainer.begin().unwrap();
        if resume {
            trainer.resume(&mut run, &dir).unwrap();
            assert_eq!(trainer.micro, found);
        }
        let done = trainer.train(&mut run, Some(&dir), &mut Watch::new(stop_after)).is_ok();
        let values: Vec<Vec<f32>> = adapters.params.iter().map(|p| p.var.flatten_all().unwrap().to_vec1().unwrap()).collect();
        (done, run.state().micro, values)
    };
    let whole = go(4, usize::MAX, false);
    assert!(!go(4, 2, false).0);
    // Memory would suffice now, but other micro-batches would be other bits.
    assert_eq!(go(8, usize::MAX, true), whole);
    assert_eq!(whole.1, Some(found));
}

#[test]
fn a_loss_over_the_batch_cannot_be_split() {
    let w = World::new();
    let recipe = w.recipe("lora: { rank: 2 }").replace("classify: { templates: [\"a {} thing\"] }", "retrieve: { pairs: labels }");
    w.write("pairs.yaml", &recipe);
    let message = w.fails(&["train", "pairs.yaml", "--set", "train.auto_batch=true"], 2);
    assert!(message.contains("train.auto_batch") && message.contains("grad_cache"), "{message}");
}

/// The bound that the shell sets is the one that is told, and a run under it works.
#[cfg(target_os = "linux")]
#[test]
fn the_address_space_bounds_what_is_available() {
    let w = World::new();
    let out = limited(&w, 768, "train recipe.yaml --check --json");
    let found: serde_json::Value =
        serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&out.stderr)));
    assert_eq!(found["available"]["bound"], "address space (ulimit -v)", "{found}");
    assert_eq!(found["verdict"], "fits");
    let out = limited(&w, 768, "train recipe.yaml --quiet");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

/// Where memory ends, wherever it does, the run ends as by any fault of the machine, and goes on from what it left.
#[cfg(target_os = "linux")]
#[test]
fn memory_that_ends_is_said() {
    let w = World::new();
    w.json(&["merge", "--model", "builtin:tiny", "--dtype", "f32", "--output", "large"]);
    let recipe = w.recipe("lora: { rank: 2 }").replace("model: base", "model: large").replace("output: run", "output: OUTPUT");
    let train = |name: &str| {
        w.write(&format!("{name}.yaml"), &recipe.replace("OUTPUT", name));
        format!("train {name}.yaml --quiet --threads 2")
    };
    let adapter = |name: &str| common::read(&w.path(name).join("adapter/adapter_model.safetensors"));
    assert!(limited(&w, 1 << 20, &train("whole")).status.success());
    let mut codes = std::collections::BTreeSet::new();
    for mib in (160..=560).step_by(20) {
        let name = format!("run{mib}");
        let out = limited(&w, mib, &train(&name));
        let said = String::from_utf8_lossy(&out.stderr);
        codes.insert(out.status.code());
        match out.status.code() {
            Some(0) => break,
            Some(3) => assert!((said.contains("memory") || said.contains("ulimit -v")) && said.contains("help: "), "{mib} MiB: {said}"),
            code => panic!("{mib} MiB: {code:?} {said}"),
        }
        let more = if w.path(&name).exists() { " --resume" } else { "" };
        let out = limited(&w, 1 << 20, &(train(&name) + more));
        assert!(out.status.success(), "{mib} MiB: {}", String::from_utf8_lossy(&out.stderr));
        assert!(adapter(&name) == adapter("whole"), "{mib} MiB");
    }
    assert_eq!(codes.into_iter().collect::<Vec<_>>(), [Some(0), Some(3)]);
}

/// What comes of arguments in a bounded address space.
#[cfg(target_os = "linux")]
fn limited(w: &World, mib: usize, args: &str) -> std::process::Output {
    let script = format!("ulimit -v {} && exec '{}' {args}", mib << 10, env!("CARGO_BIN_EXE_peft"));
    std::process::Command::new("sh").args(["-c", &script]).current_dir(w.path("")).output().unwrap()
}

#[test]
fn half_precision_on_a_cpu_is_said() {
    let w = World::new();
    let said = |dtype: &str| {
        let out = w.peft(&["train", "recipe.yaml", "--check", "--set", &format!("train.dtype={dtype}")]);
        assert!(out.status.success());
        String::from_utf8_lossy(&out.stderr).contains("train.dtype")
    };
    assert!(said("bf16") && said("f16") && !said("f32"));
}
