//! `peft compare`: killed anywhere, the same command ends in the same figures.
//!
//! What its runs do is the matter of `train`; here they are made once, and a runner without processes hands them out.

use std::path::Path;

use candle_core::Device;

use super::{World, aborts, changes, command, copy, each, full, place, strays, succeeds, tree};
use crate::compare::{BaseMeasured, Checked, CompareOptions, Job, Limit, Measured, Runner, Second, compare};
use crate::comparison::Inference;
use crate::error::Result;
use crate::recipe::Recipe;
use crate::run::Existing;
use crate::session;
use crate::train::Silent;

/// Hands out runs of `../done` where they are there, and trains them where not.
struct Ready;

impl Runner for Ready {
    fn check(&self, _: &Path) -> Result<Checked> {
        Ok(Checked { bytes: 1 })
    }

    fn pace(&self, _: &Path) -> Result<f64> {
        Ok(1.0)
    }

    fn train(&self, job: &Job, _: &dyn Fn() -> Option<i32>) -> Result<()> {
        let done = Path::new("../done").join(job.dir.file_name().unwrap());
        if !done.exists() {
            return session::train(Recipe::load(&job.recipe, &[])?, Existing::Resume, &Device::Cpu, &mut Silent).map(drop);
        }
        super::copy_tree(&done, &job.dir);
        Ok(())
    }

    fn base(&self, _: &Recipe, _: &Second) -> Result<BaseMeasured> {
        Ok(BaseMeasured { zero_shot: None, forget: Some((6, 0.5)), forget_failed: None })
    }

    fn measure(&self, run: &Path, _: &Second) -> Result<Measured> {
        let merged_ms = Some(run.display().to_string().len() as f64);
        Ok(Measured {
            inference: Inference { batch: 1, base_ms: 1.0, unmerged_ms: 2.0, merged_ms, unfoldable: None },
            forget: Some(0.25),
            forget_failed: None,
        })
    }

    fn pictures(&self, _: &Recipe, _: &[String]) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

#[test]
fn child() {
    copy(|mut args| {
        let recipe = Recipe::load(Path::new("recipe.yaml"), &["train.batch=11".into(), "forget.folder.root=data".into()]).unwrap();
        let options = CompareOptions {
            recipes: vec![recipe],
            runs: Vec::new(),
            methods: ["full", "lora"].map(String::from).to_vec(),
            reference: Some("full".into()),
            seeds: 1,
            shots: Vec::new(),
            search: 0,
            limit: Some(Limit::Epochs(1)),
            output: args.next().unwrap().into(),
            force: false,
            jobs: 1,
            threads: 1,
            memory: None,
        };
        match compare(&options, &Ready, &mut Silent) {
            Ok((_, None)) => 0,
            Ok((_, Some(e))) | Err(e) => {
                eprintln!("error: {e}");
                e.exit_code()
            }
        }
    });
}

#[test]
fn killed_or_full_anywhere_and_repeated_gives_the_same_figures() {
    let w = World::new();
    let first = place(&w, "first");
    succeeds(&command("compare::child", &first, &["out"], "").output().unwrap(), "runs");
    std::fs::create_dir(w.path("done")).unwrap();
    for run in ["full-s3", "lora-s3"] {
        std::fs::rename(first.join("out").join(run), w.path("done").join(run)).unwrap();
    }
    let whole = place(&w, "whole");
    let points = changes(command("compare::child", &whole, &["out"], "count"));
    let expected = tree(&whole.join("out"), &["lock"]);
    assert!(points.len() > 40 && expected.contains_key("compare.json") && expected.contains_key("lora-s3/report.json"), "{points:#?}");
    each(points.len() * 2, |i| {
        let (k, abort) = (i.div_ceil(2), i % 2 == 0);
        let (dir, what) = (place(&w, &format!("at{i}")), format!("{} at {k}, {}", if abort { "killed" } else { "full" }, points[k - 1]));
        match abort {
            true => aborts(&command("compare::child", &dir, &["out"], &format!("abort {k}")).output().unwrap(), &what),
            false => {
                let out = command("compare::child", &dir, &["out"], &format!("fail 28 {k} on")).output().unwrap();
                full(&out, &what);
            }
        }
        // What is there is whole.
        let found = tree(&dir.join("out"), &["lock", ".tmp-", "measured.json", "recipes/"]);
        assert!(found.iter().all(|(name, bytes)| expected.get(name) == Some(bytes)), "{what}: {:?}", found.keys());
        let pages = found.keys().filter(|name| name.starts_with("compare.")).count();
        assert!([0, 4].contains(&pages) || points[k - 1].starts_with("Rename"), "{what}: {:?}", found.keys());
        succeeds(&command("compare::child", &dir, &["out"], "").output().unwrap(), &what);
        assert_eq!(tree(&dir.join("out"), &["lock"]), expected, "{what}");
        assert_eq!(strays(&dir), Vec::<String>::new(), "{what}");
    });
}
