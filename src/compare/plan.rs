//! What is to be run: methods × shots × learning rates × seeds, each an ordinary recipe.

use std::path::PathBuf;

use peft_adapters::MethodConfig;
use peft_adapters::registry::METHODS;
use serde_json::json;

use super::{CompareOptions, Limit};
use crate::comparison::{Budget, Unit};
use crate::error::{Error, Result};
use crate::recipe::{ModelConfig, Recipe};
use crate::run;
use crate::task::{Head, TaskConfig};

/// Rows that can be compared.
#[derive(Debug)]
pub(super) struct PlannedGroup {
    pub(super) name: String,
    pub(super) recipe: Recipe,
    pub(super) budget: Budget,
    pub(super) rows: Vec<PlannedRow>,
}

/// A method, with every learning rate that is tried.
#[derive(Debug)]
pub(super) struct PlannedRow {
    pub(super) method: String,
    /// The recipe that it comes from; nothing of finished runs.
    source: String,
    pub(super) options: serde_json::Value,
    /// One where nothing is searched.
    pub(super) trials: Vec<PlannedTrial>,
}

/// A learning rate.
#[derive(Debug)]
pub(super) struct PlannedTrial {
    pub(super) lr: f64,
    pub(super) runs: Vec<PlannedRun>,
}

/// A run: to be made, or made before.
#[derive(Debug, Clone)]
pub(super) struct PlannedRun {
    pub(super) seed: u64,
    pub(super) dir: PathBuf,
    /// None where a finished run was named.
    pub(super) recipe: Option<Box<Recipe>>,
}

/// Learning rates that do about as well as LoRA's 1, found on `builtin:tiny` and in the methods' papers.
const FACTORS: &[(&str, f64)] = &[
    ("full", 0.1),
    ("pissa", 0.5),
    ("olora", 0.5),
    ("bottleneck", 4.0),
    ("bitfit", 5.0),
    ("ln_tuning", 5.0),
    ("ia3", 10.0),
    ("vera", 10.0),
    ("coop", 10.0),
    ("cocoop", 10.0),
    ("maple", 10.0),
    ("vpt", 20.0),
    ("prefix", 20.0),
    ("none", 50.0),
];

fn factor(methods: &[MethodConfig]) -> f64 {
    let of = |name: &str| FACTORS.iter().find(|(n, _)| *n == name).map_or(1.0, |(_, f)| *f);
    // Of several the most careful one.
    methods.iter().map(|m| of(m.name())).reduce(f64::min).unwrap_or_else(|| of("none"))
}

fn label(methods: &[MethodConfig]) -> String {
    match methods.is_empty() {
        true => "none".into(),
        false => methods.iter().map(MethodConfig::name).collect::<Vec<_>>().join("+"),
    }
}

/// Two digits are enough for a learning rate, and make readable names.
fn round(lr: f64) -> f64 {
    let text = format!("{lr:.1e}");
    text.parse().unwrap_or(lr)
}

/// `count` learning rates, half a power of ten apart, around `lr`, which is one of them.
pub(super) fn grid(lr: f64, count: usize) -> Vec<f64> {
    let below = count.saturating_sub(1) / 2;
    let at = |i: usize| if i == below { lr } else { round(lr * 10f64.powf((i as f64 - below as f64) / 2.0)) };
    (0..count.max(1)).map(at).collect()
}

/// The method and the task that a name of `--methods` stands for.
fn resolve(recipe: &Recipe, name: &str) -> Result<(Vec<MethodConfig>, TaskConfig)> {
    let place = "--methods";
    let own = recipe.compare.as_ref().and_then(|c| c.methods.get(name)).and_then(|m| m.method.clone());
    let mut task = recipe.task.clone();
    let probe = matches!(name, "probe" | "none");
    if let (true, TaskConfig::Classify(c)) = (probe, &mut task) {
        c.head = Head::Linear;
    }
    let methods = match own {
        Some(methods) => methods,
        None if label(&recipe.method) == name => recipe.method.clone(),
        None if probe => Vec::new(),
        None => name.split('+').map(|part| by_name(recipe, part)).collect::<Result<_>>()?,
    };
    if methods.is_empty() && !task.definition().has_own_weights() {
        return Err(Error::input(place, format!("`{name}` trains nothing with this task"))
            .hint("a linear probe needs `task: classify`; the base without training stands above the table anyway"));
    }
    Ok((methods, task))
}

fn by_name(recipe: &Recipe, name: &str) -> Result<MethodConfig> {
    if let Some(own) = recipe.method.iter().find(|m| m.name() == name) {
        return Ok(own.clone());
    }
    let known: Vec<&str> = METHODS.iter().map(|e| e.name).chain(["probe"]).collect();
    if !known.contains(&name) {
        let near = known.iter().max_by(|a, b| strsim::jaro_winkler(name, a).total_cmp(&strsim::jaro_winkler(name, b)));
        let near = near.filter(|n| strsim::jaro_winkler(name, n) > 0.7).map(|n| format!("did you mean `{n}`? ")).unwrap_or_default();
        return Err(Error::input("--methods", format!("there is no method `{name}`")).hint(format!(
            "{near}known: {}; any other name needs `compare: {{ methods: {{ {name}: {{ method: … }} }} }}` in the recipe",
            known.join(", ")
        )));
    }
    serde_json::from_value(json!({ name: {} })).map_err(|e| {
        Error::input("--methods", format!("{name} without options: {e}"))
            .hint(format!("give them in the recipe: compare: {{ methods: {{ {name}: {{ method: {{ {name}: {{ … }} }} }} }} }}"))
    })
}

/// The learning rate where nothing is searched.
fn middle(recipe: &Recipe, name: &str, methods: &[MethodConfig]) -> f64 {
    let given = recipe.compare.as_ref().and_then(|c| c.methods.get(name)).and_then(|m| m.lr);
    let follows = || match methods == recipe.method {
        true => recipe.train.lr,
        false => round(recipe.train.lr * factor(methods) / factor(&recipe.method)),
    };
    given.unwrap_or_else(follows)
}

/// The groups of some recipes.
pub(super) fn plan(options: &CompareOptions) -> Result<Vec<PlannedGroup>> {
    let mut groups: Vec<PlannedGroup> = Vec::new();
    let several = options.recipes.len() > 1;
    for recipe in &options.recipes {
        let shots: Vec<Option<usize>> = match options.shots.is_empty() {
            true => vec![recipe.data.shots],
            false => options.shots.iter().map(|s| Some(*s)).collect(),
        };
        for shots in shots {
            let mut own = recipe.clone();
            own.data.shots = shots;
            limit(&mut own, options.limit);
            let names = names(recipe, &options.methods);
            let mut rows = Vec::new();
            for name in &names {
                rows.push(row(&own, name, several, options)?);
            }
            join(&mut groups, own, rows, options);
        }
    }
    name(&mut groups);
    groups.iter_mut().for_each(|g| tell_apart(&mut g.rows));
    Ok(groups)
}

/// The methods that are asked for, else those that the recipe's `compare` section lists, else the recipe's own.
fn names(recipe: &Recipe, asked: &[String]) -> Vec<String> {
    let listed: Vec<String> = recipe.compare.iter().flat_map(|c| c.methods.keys().cloned()).collect();
    match (asked.is_empty(), listed.is_empty()) {
        (false, _) => asked.to_vec(),
        (true, false) => listed,
        (true, true) => vec![label(&recipe.method)],
    }
}

fn limit(recipe: &mut Recipe, limit: Option<Limit>) {
    (recipe.train.epochs, recipe.train.steps) = match limit {
        None => return,
        Some(Limit::Epochs(n)) => (Some(n), None),
        Some(Limit::Steps(n)) => (None, Some(n)),
        // The steps are known once a step is measured.
        Some(Limit::Seconds(_)) => (None, None),
    };
}

fn row(recipe: &Recipe, name: &str, several: bool, options: &CompareOptions) -> Result<PlannedRow> {
    let (methods, task) = resolve(recipe, name)?;
    let lr = middle(recipe, name, &methods);
    let mut stem = if several { format!("{}-{name}", recipe.name) } else { name.to_string() };
    if !options.shots.is_empty() {
        stem = format!("{stem}-{}shot", recipe.data.shots.unwrap_or(0));
    }
    let trials = grid(lr, options.search.max(1)).into_iter().map(|lr| {
        let runs = (0..options.seeds as u64).map(|i| {
            let seed = recipe.train.seed + i;
            let stem = if options.search > 0 { format!("{stem}-lr{lr:e}") } else { stem.clone() };
            let stem: String = stem.chars().map(|c| if c.is_alphanumeric() || "+-_.".contains(c) { c } else { '-' }).collect();
            let mut run = recipe.clone();
            (run.compare, run.forget) = (None, None);
            (run.method, run.task, run.train.lr, run.train.seed) = (methods.clone(), task.clone(), lr, seed);
            run.name = format!("{stem}-s{seed}");
            let dir = options.output.join(&run.name);
            run.output = Some(dir.clone());
            PlannedRun { seed, dir, recipe: Some(Box::new(run)) }
        });
        PlannedTrial { lr, runs: runs.collect() }
    });
    Ok(PlannedRow { method: name.to_string(), source: recipe.name.clone(), options: json!(methods), trials: trials.collect() })
}

/// Rows go to the group with the same base, data, task and budget.
fn join(groups: &mut Vec<PlannedGroup>, recipe: Recipe, rows: Vec<PlannedRow>, options: &CompareOptions) {
    let budget = budget(&recipe, options.limit);
    match groups.iter_mut().find(|g| comparable(&g.recipe, &recipe) && g.budget == budget) {
        None => groups.push(PlannedGroup { name: recipe.name.clone(), recipe, budget, rows }),
        Some(group) => group.rows.extend(rows),
    }
}

fn comparable(a: &Recipe, b: &Recipe) -> bool {
    let spec = |r: &Recipe| match &r.model {
        ModelConfig::Pretrained(spec) => (spec.clone(), false),
        ModelConfig::Scratch(s) => (s.init.config.clone(), true),
    };
    spec(a) == spec(b) && a.data == b.data && a.task.name() == b.task.name() && a.images == b.images
}

fn budget(recipe: &Recipe, limit: Option<Limit>) -> Budget {
    let early_stopping = recipe.train.early_stopping.as_ref().is_some_and(|e| e.patience > 0);
    let (unit, amount) = match (limit, recipe.train.steps) {
        (Some(Limit::Seconds(s)), _) => (Unit::Seconds, s),
        (_, Some(steps)) => (Unit::Steps, steps as f64),
        (_, None) => (Unit::Epochs, recipe.train.epochs() as f64),
    };
    Budget { unit, amount, early_stopping }
}

/// Of rows with the same methods, those keep the bare name whose recipe is called so, whatever the order of the recipes.
fn tell_apart(rows: &mut [PlannedRow]) {
    let names: Vec<String> = rows.iter().map(|r| r.method.clone()).collect();
    for row in rows.iter_mut().filter(|r| r.source != r.method && names.iter().filter(|n| **n == r.method).count() > 1) {
        row.method = format!("{} ({})", row.method, row.source);
    }
}

/// Groups of one recipe are told apart by their shots.
fn name(groups: &mut [PlannedGroup]) {
    let names: Vec<String> = groups.iter().map(|g| g.recipe.name.clone()).collect();
    for group in groups.iter_mut().filter(|g| names.iter().filter(|n| **n == g.recipe.name).count() > 1) {
        if let Some(shots) = group.recipe.data.shots {
            group.name = format!("{}, {shots} shot{}", group.name, if shots == 1 { "" } else { "s" });
        }
    }
}

/// The groups of finished run directories: runs that differ in nothing but their seed are one row.
pub(super) fn of_runs(dirs: &[PathBuf]) -> Result<Vec<PlannedGroup>> {
    let mut groups: Vec<PlannedGroup> = Vec::new();
    let mut rows: Vec<(usize, Recipe)> = Vec::new();
    for dir in dirs {
        let recipe = run::read_recipe(dir)?;
        if run::read_report(dir)?.is_none() {
            return Err(Error::input(dir.display(), "is an unfinished run").hint("finish it with peft train RECIPE --resume"));
        }
        let (seed, lr) = (recipe.train.seed, recipe.train.lr);
        let mut same = recipe.clone();
        (same.train.seed, same.output, same.name) = (0, None, String::new());
        let run = PlannedRun { seed, dir: dir.clone(), recipe: None };
        let budget = budget(&recipe, None);
        let at = match groups.iter().position(|g| comparable(&g.recipe, &recipe) && g.budget == budget) {
            Some(at) => at,
            None => {
                let name = dir.file_name().map_or_else(|| recipe.name.clone(), |n| n.to_string_lossy().into_owned());
                groups.push(PlannedGroup { name, recipe: recipe.clone(), budget, rows: Vec::new() });
                groups.len() - 1
            }
        };
        let before = rows.iter().filter(|(g, _)| *g == at).position(|(_, r)| *r == same);
        match before.and_then(|i| groups[at].rows.get_mut(i)) {
            Some(row) => row.trials[0].runs.push(run),
            None => {
                let method = free_name(&label(&recipe.method), &groups[at].rows, lr, dir);
                let trials = vec![PlannedTrial { lr, runs: vec![run] }];
                groups[at].rows.push(PlannedRow { method, source: String::new(), options: json!(recipe.method), trials });
                rows.push((at, same));
            }
        }
    }
    Ok(groups)
}

/// `lora`, else `lora lr 0.002`, else with the directory's name.
fn free_name(method: &str, rows: &[PlannedRow], lr: f64, dir: &std::path::Path) -> String {
    let with_lr = format!("{method} lr {lr}");
    let dir = dir.file_name().map_or_else(|| dir.display().to_string(), |n| n.to_string_lossy().into_owned());
    let names = [method.to_string(), with_lr, format!("{method} ({dir})")];
    let free = names.iter().find(|n| rows.iter().all(|r| r.method != **n)).or(names.last());
    free.cloned().unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_is_half_powers_of_ten_around_its_middle() {
        assert_eq!(grid(2e-3, 0), [2e-3]);
        assert_eq!(grid(2e-3, 1), [2e-3]);
        assert_eq!(grid(2e-3, 3), [6.3e-4, 2e-3, 6.3e-3]);
        assert_eq!(grid(1e-3, 4), [3.2e-4, 1e-3, 3.2e-3, 1e-2]);
    }

    fn recipe(more: &str) -> Recipe {
        let text = format!(
            "model: builtin:tiny\nmethod: {{ lora: {{ rank: 2 }} }}\ndata: {{ builtin: emoji }}\ntask: classify\ntrain: {{ lr: 2.0e-3 }}\n{more}"
        );
        Recipe::parse("r.yaml", &text, "r", &[]).unwrap()
    }

    #[test]
    fn names_stand_for_methods() {
        let r = recipe("compare: { methods: { mine: { method: { lora: { rank: 1 } }, lr: 0.5 }, full: { lr: 1.0e-5 } } }");
        let options = |name| {
            let (methods, task) = resolve(&r, name).unwrap();
            (json!(methods), middle(&r, name, &methods), task.definition().has_own_weights())
        };
        assert_eq!(options("lora").0[0]["lora"]["rank"], 2, "the recipe's own options");
        assert_eq!((options("lora").1, options("full").1, options("mine").1, options("prefix").1), (2e-3, 1e-5, 0.5, 0.04));
        assert_eq!(options("mine").0[0]["lora"]["rank"], 1);
        assert!(options("probe").2 && options("probe").0 == json!([]));
        assert_eq!(options("lora+bottleneck").0.as_array().unwrap().len(), 2);
        assert!(resolve(&r, "lorra").unwrap_err().to_string().contains("did you mean `lora`"));
    }

    #[test]
    fn recipes_with_the_same_method_are_told_apart() {
        let named = |name: &str| Recipe { name: name.into(), ..recipe("") };
        let rows = |names: &[&str]| {
            let options = CompareOptions {
                recipes: names.iter().map(|n| named(n)).collect(),
                runs: Vec::new(),
                methods: Vec::new(),
                reference: None,
                seeds: 1,
                shots: Vec::new(),
                search: 0,
                limit: None,
                output: "out".into(),
                force: false,
                jobs: 1,
                threads: 1,
                memory: None,
            };
            let groups = plan(&options).unwrap();
            groups.into_iter().flat_map(|g| g.rows).map(|r| r.method).collect::<Vec<_>>()
        };
        assert_eq!(rows(&["small", "lora"]), ["lora (small)", "lora"]);
        assert_eq!(rows(&["lora", "small", "wide"]), ["lora", "lora (small)", "lora (wide)"]);
        assert_eq!(rows(&["small"]), ["lora"]);
    }

    /// Whatever joins the registry can be compared without more ado.
    #[test]
    fn every_method_has_a_default() {
        let r = recipe("");
        for entry in METHODS {
            let (methods, _) = resolve(&r, entry.name).unwrap();
            assert!(middle(&r, entry.name, &methods) > 0.0);
        }
    }
}
