//! From run directories to the comparison and its files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::made_of::Now;
use super::plan::{PlannedGroup, PlannedRow, PlannedTrial};
use super::stats::{self, Hits};
use super::{BaseMeasured, CompareOptions, Measured, Runner, Second, draw, read_json, write};
use crate::comparison::{Comparison, Forget, Group, Row, RunRow, Spread, Trial};
use crate::data::DataConfig;
use crate::error::{Error, Result};
use crate::files;
use crate::page::{self, ComparePage, GroupPage};
use crate::recipe::Recipe;
use crate::report::{Evaluation, Prediction, TrainReport};
use crate::run;
use crate::train::{Event, Observer};

/// What was measured, kept so that a comparison that goes on measures nothing twice.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Cache {
    bases: BTreeMap<String, BaseMeasured>,
    runs: BTreeMap<String, Measured>,
}

/// A finished run.
pub(super) struct Loaded {
    pub(super) seed: u64,
    pub(super) report: TrainReport,
    pub(super) predictions: Vec<Prediction>,
}

/// A row's finished runs.
pub(super) type LoadedRow = Vec<Loaded>;

pub(super) struct Gather<'a> {
    options: &'a CompareOptions,
    runner: &'a dyn Runner,
    now: &'a Now<'a>,
    cache: Cache,
    notes: Vec<String>,
}

impl<'a> Gather<'a> {
    pub(super) fn new(options: &'a CompareOptions, runner: &'a dyn Runner, now: &'a Now<'a>) -> Result<Self> {
        // Another version may have kept other figures; they are measured again.
        let cache = read_json(&options.output.join("measured.json")).ok().flatten().unwrap_or_default();
        Ok(Self { options, runner, now, cache, notes: Vec::new() })
    }

    pub(super) fn all(
        mut self,
        groups: &[PlannedGroup],
        failed: &BTreeMap<PathBuf, Error>,
        observer: &mut dyn Observer,
    ) -> Result<Comparison> {
        let count = groups.iter().map(|g| 1 + g.rows.iter().map(|r| r.trials.first().map_or(0, |t| t.runs.len())).sum::<usize>()).sum();
        observer.event(Event::Phase("measured", Some(count)));
        let (mut done, mut pages) = (Vec::new(), Vec::new());
        for group in groups {
            let (group, page) = self.group(group, failed, observer)?;
            done.push(group);
            pages.push(page);
        }
        let comparison = Comparison {
            version: env!("CARGO_PKG_VERSION").into(),
            reference: self.options.reference.clone().or_else(|| done.iter().find_map(|g| g.reference.clone())).unwrap_or_default(),
            groups: done,
            notes: self.notes,
        };
        let html = page::compare(&ComparePage { comparison: &comparison, groups: &pages })?;
        let at = |name: &str| self.options.output.join(name);
        files::write_together(&[
            (at("compare.html"), html.into_bytes()),
            (at("compare.md"), write::markdown(&comparison).into_bytes()),
            (at("compare.csv"), write::csv(&comparison)?.into_bytes()),
            (at("compare.json"), files::json(&at("compare.json"), &comparison)?),
        ])?;
        Ok(comparison)
    }

    fn group(
        &mut self,
        planned: &PlannedGroup,
        failed: &BTreeMap<PathBuf, Error>,
        observer: &mut dyn Observer,
    ) -> Result<(Group, GroupPage)> {
        let recipe = &planned.recipe;
        let metric = recipe.task.definition().metric();
        let second = second(recipe);
        let base = self.base(recipe, &second, observer)?;
        let (mut rows, mut loaded) = (Vec::new(), Vec::new());
        for row in &planned.rows {
            let (row, runs) = self.row(row, metric, failed, (recipe, &second), observer)?;
            rows.push(row);
            loaded.push(runs);
        }
        let of = if recipe.task.name() == "retrieve" { "image_to_text_recall_at_1" } else { "accuracy" };
        let reference = self.compare_rows(&planned.name, of, &mut rows, &loaded);
        stats::mark_pareto(&mut rows);
        let any = loaded.iter().flatten().next().map(|l| &l.report);
        self.tell_differing(planned, &loaded);
        let forget = base.as_ref().and_then(|b| b.forget).map(|(examples, before)| {
            Ok::<_, Error>(Forget { data: pruned(&second.data)?, templates: second.templates.clone(), examples, before })
        });
        let group = Group {
            name: planned.name.clone(),
            recipe: recipe.name.clone(),
            shots: recipe.data.shots,
            base: recipe.model.spec().into(),
            base_digest: any.map(|r| r.base_digest.clone()).unwrap_or_default(),
            task: recipe.task.name().into(),
            metric: metric.into(),
            split: any.map_or_else(|| "test".into(), |r| r.split.clone()),
            classes: any.map(|r| r.classes.clone()).unwrap_or_default(),
            examples: any.map(|r| r.examples).unwrap_or_default(),
            budget: planned.budget,
            zero_shot: base.as_ref().and_then(|b| b.zero_shot.clone()),
            forget: forget.transpose()?,
            reference,
            base_ms: rows.iter().filter_map(|r| Some(r.inference.as_ref()?.base_ms)).reduce(f64::min),
            rows,
        };
        let (page, note) = draw::page(recipe, &group, &loaded, self.runner);
        self.notes.extend(note);
        Ok((group, page))
    }

    /// Runs of a group that cannot be compared with each other, and finished ones that are not of what there is now.
    fn tell_differing(&mut self, planned: &PlannedGroup, loaded: &[LoadedRow]) {
        let all: Vec<&TrainReport> = loaded.iter().flatten().map(|l| &l.report).collect();
        let Some(first) = all.first() else { return };
        if all.iter().any(|r| first.base_digest != r.base_digest || first.classes != r.classes) {
            self.notes.push(format!("{}: runs differ in the base's weights or in the classes", planned.name));
        }
        // Each seed draws its own shots.
        let drawn = planned.recipe.data.shots.is_some();
        let other = |r: &&&TrainReport| first.made_of.differing(&r.made_of).contains(&"the data");
        if let Some(run) = all.iter().find(other).filter(|_| !drawn) {
            let (a, b) = (first.run.display(), run.run.display());
            self.notes
                .push(format!("{}: {a} and {b} were made of different data or splits, so their figures are not comparable", planned.name));
        }
        if self.options.runs.is_empty() || drawn {
            return;
        }
        match self.now.of(&planned.recipe) {
            Ok(now) => {
                for run in all.iter().filter(|r| !r.made_of.differing(&now).is_empty()) {
                    let what = run.made_of.differing(&now).join(" and ");
                    self.notes.push(format!("{}: {what} changed after {} was made", planned.name, run.run.display()));
                }
            }
            Err(e) => self.notes.push(format!("{}: whether data and base are those of the runs is not known: {e}", planned.name)),
        }
    }

    /// The base of a group; a comparison without it still says which method is better.
    fn base(&mut self, recipe: &Recipe, second: &Second, observer: &mut dyn Observer) -> Result<Option<BaseMeasured>> {
        stopped(observer)?;
        let mut bare = recipe.clone();
        (bare.method, bare.output, bare.compare) = (Vec::new(), None, None);
        let made_of = (self.now.of(recipe).ok(), self.now.second(recipe, second));
        let key = key(&json!([env!("CARGO_PKG_VERSION"), bare, second, made_of]));
        let found = match self.cache.bases.get(&key) {
            Some(found) => Some(found.clone()),
            None => match self.runner.base(recipe, second) {
                Ok(found) => {
                    self.cache.bases.insert(key, found.clone());
                    self.keep()?;
                    Some(found)
                }
                Err(e) => {
                    self.notes.push(format!("the base of {} was not measured: {e}", recipe.name));
                    None
                }
            },
        };
        if let Some(why) = found.as_ref().and_then(|f| f.forget_failed.as_ref()) {
            self.notes.push(format!("{}: forgetting was not measured: {}", recipe.name, why.replace("\n  ", "; ")));
        }
        observer.event(Event::Advance(1));
        Ok(found)
    }

    fn row(
        &mut self,
        planned: &PlannedRow,
        metric: &str,
        failed: &BTreeMap<PathBuf, Error>,
        second: (&Recipe, &Second),
        observer: &mut dyn Observer,
    ) -> Result<(Row, LoadedRow)> {
        let trials: Vec<(Trial, LoadedRow)> = planned.trials.iter().map(|t| trial(t, metric, failed)).collect::<Result<_>>()?;
        let at = best(&trials);
        let (chosen, loaded) = (&planned.trials[at], trials.into_iter().map(|(t, l)| (t, Some(l))).collect::<Vec<_>>());
        let searched = loaded.len() > 1;
        let (mut trials, mut loaded): (Vec<Trial>, Vec<Option<LoadedRow>>) = loaded.into_iter().unzip();
        trials[at].chosen = true;
        let loaded = loaded[at].take().unwrap_or_default();
        let mut row = Row {
            method: planned.method.clone(),
            options: planned.options.clone(),
            lr: chosen.lr,
            search: searched.then_some(trials),
            runs: chosen.runs.iter().map(|r| run_row(r.seed, &r.dir, &loaded, metric, failed)).collect(),
            ..Row::default()
        };
        let over = |pick: &dyn Fn(&TrainReport) -> Option<f64>| Spread::new(loaded.iter().filter_map(|l| pick(&l.report)).collect());
        row.test = over(&|r| r.after.as_ref()?.metric(metric));
        let names = loaded.first().and_then(|l| l.report.after.as_ref()).map(|a| a.metrics.keys().cloned().collect::<Vec<_>>());
        for name in names.unwrap_or_default().into_iter().chain(["loss".to_string()]) {
            if let Some(spread) = over(&|r| r.after.as_ref()?.metric(&name)) {
                row.metrics.insert(name, spread);
            }
        }
        row.trainable_parameters = loaded.first().map(|l| l.report.trainable_parameters);
        row.delta_bytes = loaded.first().map(|l| l.report.adapter_bytes);
        row.seconds = over(&|r| Some(r.seconds));
        row.images_per_second = over(&TrainReport::images_per_second);
        row.peak_rss_mib = loaded.iter().filter_map(|l| l.report.peak_rss_mib).reduce(f64::max);
        self.measure(&mut row, second, observer)?;
        Ok((row, loaded))
    }

    /// Inference and forgetting of each finished run.
    fn measure(&mut self, row: &mut Row, (recipe, second): (&Recipe, &Second), observer: &mut dyn Observer) -> Result<()> {
        let made_of = self.now.second(recipe, second);
        for run in &mut row.runs {
            stopped(observer)?;
            observer.event(Event::Advance(1));
            if run.failed.is_some() {
                continue;
            }
            let report = files::read(&run.run.join("report.json"), 1 << 30)?;
            let key = key(&json!([env!("CARGO_PKG_VERSION"), run.run, blake3::hash(&report).to_hex().as_str(), second, made_of]));
            let found = match self.cache.runs.get(&key) {
                Some(found) => found.clone(),
                None => match self.runner.measure(&run.run, second) {
                    Ok(found) => {
                        self.cache.runs.insert(key, found.clone());
                        self.keep()?;
                        found
                    }
                    Err(e) => {
                        row.forget_failed = Some(e.to_string());
                        continue;
                    }
                },
            };
            run.forget = found.forget;
            row.forget_failed = row.forget_failed.take().or(found.forget_failed);
            // The fastest of the seeds: what the machine was busy with is no property of the method.
            let slower = row.inference.as_ref().is_none_or(|i| found.inference.unmerged_ms < i.unmerged_ms);
            if slower {
                row.inference = Some(found.inference);
            }
        }
        row.forget = Spread::new(row.runs.iter().filter_map(|r| r.forget).collect());
        Ok(())
    }

    fn keep(&self) -> Result<()> {
        files::write_json(&self.options.output.join("measured.json"), &self.cache)
    }

    /// The paired differences of all rows to one of them, whose name is returned.
    fn compare_rows(&mut self, group: &str, of: &str, rows: &mut [Row], loaded: &[LoadedRow]) -> Option<String> {
        let hits = |l: &LoadedRow| l.iter().filter_map(|l| Some((l.seed, stats::hits(&l.predictions)?))).collect::<Vec<(u64, Hits)>>();
        let reference = match &self.options.reference {
            Some(name) => rows.iter().position(|r| r.method == *name),
            None => usual_reference(rows),
        };
        let Some(reference) = reference else {
            if let Some(name) = &self.options.reference {
                let known: Vec<&str> = rows.iter().map(|r| r.method.as_str()).collect();
                self.notes.push(format!("{group}: differences need the row `{name}`, which is not there; there are {}", known.join(", ")));
            }
            return None;
        };
        let (name, other) = (rows[reference].method.clone(), hits(&loaded[reference]));
        for (i, row) in rows.iter_mut().enumerate().filter(|(i, _)| *i != reference) {
            row.difference = stats::difference(&hits(&loaded[i]), &other, of);
            if row.difference.is_none() && !loaded[i].is_empty() && !other.is_empty() {
                self.notes.push(format!("{group}: {} has no seed or other test examples than {name}", row.method));
            }
        }
        Some(name)
    }
}

/// The row `full`; where there is none, the first that has figures.
fn usual_reference(rows: &[Row]) -> Option<usize> {
    rows.iter().position(|r| r.method == "full").or_else(|| rows.iter().position(|r| r.test.is_some()))
}

fn stopped(observer: &dyn Observer) -> Result<()> {
    match observer.stop() {
        None => Ok(()),
        Some(signal) => Err(Error::Interrupted { message: "stopped while measuring; the same command goes on".into(), signal }),
    }
}

fn key(value: &serde_json::Value) -> String {
    blake3::hash(value.to_string().as_bytes()).to_hex().to_string()
}

/// The recipe's own second set; else an embedded one.
fn second(recipe: &Recipe) -> Second {
    let embedded = || DataConfig {
        builtin: Some(if recipe.data.builtin.as_deref() == Some("emoji-flat") { "emoji" } else { "emoji-flat" }.into()),
        ..DataConfig::default()
    };
    let data = recipe.forget.clone().unwrap_or_else(embedded);
    let usual = if data.builtin.is_some() { "an icon of a {}" } else { crate::task::prompts::DEFAULT_TEMPLATE };
    let templates = recipe.compare.as_ref().and_then(|c| c.forget_templates.clone()).unwrap_or_else(|| vec![usual.to_string()]);
    Second { data, templates }
}

fn pruned(data: &DataConfig) -> Result<serde_json::Value> {
    let mut value = serde_json::to_value(data).map_err(|e| Error::fault("forget", e))?;
    if let Some(map) = value.as_object_mut() {
        map.retain(|_, v| !v.is_null() && *v != json!(false));
    }
    Ok(value)
}

fn load(seed: u64, dir: &Path) -> Result<Option<Loaded>> {
    let Some(report) = run::read_report(dir)? else { return Ok(None) };
    Ok(Some(Loaded { seed, report, predictions: run::read_predictions(dir)? }))
}

fn validation(report: &TrainReport) -> Option<&Evaluation> {
    let best = report.best_epoch?;
    report.epochs.iter().find(|e| e.epoch == best)?.val.as_ref()
}

fn trial(planned: &PlannedTrial, metric: &str, failed: &BTreeMap<PathBuf, Error>) -> Result<(Trial, LoadedRow)> {
    let mut loaded = Vec::new();
    for run in &planned.runs {
        // What failed this time may have left an older run behind.
        if !failed.contains_key(&run.dir) {
            loaded.extend(load(run.seed, &run.dir)?);
        }
    }
    let why = planned.runs.iter().find_map(|r| failed.get(&r.dir)).map(ToString::to_string);
    let mean = |pick: &dyn Fn(&Evaluation) -> Option<f64>| {
        let values: Vec<f64> = loaded.iter().filter_map(|l: &Loaded| pick(validation(&l.report)?)).collect();
        Spread::new(values).filter(|_| loaded.len() == planned.runs.len()).map(|s| s.mean)
    };
    let (validation, loss) = (mean(&|e| e.metric(metric)), mean(&|e| Some(e.loss)));
    Ok((Trial { lr: planned.lr, validation, loss, failed: why, chosen: false }, loaded))
}

/// The learning rate that did best on validation; of equals that with the lower loss, then the lower one.
fn best(trials: &[(Trial, LoadedRow)]) -> usize {
    let order = |a: &Trial, b: &Trial| {
        let value = |t: &Trial| t.validation.unwrap_or(f64::NEG_INFINITY);
        let loss = |t: &Trial| t.loss.unwrap_or(f64::INFINITY);
        value(a).total_cmp(&value(b)).then(loss(b).total_cmp(&loss(a))).then(b.lr.total_cmp(&a.lr))
    };
    let best = trials.iter().enumerate().max_by(|(_, a), (_, b)| order(&a.0, &b.0));
    best.map_or(0, |(i, _)| i)
}

fn run_row(seed: u64, dir: &Path, loaded: &[Loaded], metric: &str, failed: &BTreeMap<PathBuf, Error>) -> RunRow {
    let found = loaded.iter().find(|l| l.seed == seed).map(|l| &l.report);
    let why = || failed.get(dir).map_or_else(|| "was not run".to_string(), ToString::to_string);
    RunRow {
        seed,
        run: dir.to_path_buf(),
        failed: found.is_none().then(why),
        test: found.and_then(|r| r.after.as_ref()?.metric(metric)),
        validation: found.and_then(|r| validation(r)?.metric(metric)),
        steps: found.map(|r| r.steps),
        best_epoch: found.and_then(|r| r.best_epoch),
        seconds: found.map(|r| r.seconds),
        forget: None,
    }
}
