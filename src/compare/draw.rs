//! What the page of a comparison shows besides its figures.

use std::collections::HashMap;

use super::Runner;
use super::gather::{Loaded, LoadedRow};
use crate::comparison::{Group, Spread};
use crate::delta::class_order;
use crate::error::Result;
use crate::page::{Curve, Disagreement, GroupPage};
use crate::recipe::Recipe;
use crate::report::{Classification, EpochRecord, Prediction};

/// Images on which methods disagree that are shown.
const SHOWN: usize = 24;

/// What is drawn of a group, and why a part is left out: pictures may be gone where runs are old.
pub(super) fn page(recipe: &Recipe, group: &Group, loaded: &[LoadedRow], runner: &dyn Runner) -> (GroupPage, Option<String>) {
    let named = || group.rows.iter().zip(loaded).filter(|(_, l)| !l.is_empty());
    let confusion = named().filter_map(|(row, l)| Some((row.method.clone(), summed(&group.classes, l)?))).collect();
    let curves = named().map(|(row, l)| curve(&row.method, l, &group.metric)).collect();
    let first: Vec<(&str, &Loaded)> = named().map(|(r, l)| (r.method.as_str(), &l[0])).collect();
    let found = if group.task == "classify" { disagreements(recipe, &first, runner) } else { Ok(Vec::new()) };
    let (disagreements, note) = match found {
        Ok(found) => (found, None),
        Err(e) => (Vec::new(), Some(format!("{}: disagreements are not shown: {e}", group.name))),
    };
    (GroupPage { curves, confusion, disagreements }, note)
}

/// Test images that the first seed's runs see differently, the most divided first.
fn disagreements(recipe: &Recipe, runs: &[(&str, &Loaded)], runner: &dyn Runner) -> Result<Vec<Disagreement>> {
    let Some((_, first)) = runs.first() else { return Ok(Vec::new()) };
    let by_id: Vec<HashMap<&str, &Prediction>> =
        runs.iter().map(|(_, l)| l.predictions.iter().map(|p| (p.id.as_str(), p)).collect()).collect();
    let mut divided: Vec<(usize, usize, &Prediction)> = Vec::new();
    for p in &first.predictions {
        let guesses: Vec<&str> = by_id.iter().filter_map(|m| m.get(p.id.as_str())).map(|p| p.prediction.as_str()).collect();
        let mut distinct = guesses.clone();
        distinct.sort_unstable();
        distinct.dedup();
        let right = guesses.iter().filter(|g| p.label.as_deref() == Some(**g)).count();
        if distinct.len() > 1 && guesses.len() == runs.len() {
            divided.push((distinct.len(), right.min(guesses.len() - right), p));
        }
    }
    divided.sort_by(|a, b| (b.0, b.1).cmp(&(a.0, a.1)).then_with(|| a.2.id.cmp(&b.2.id)));
    divided.truncate(SHOWN);
    let ids: Vec<String> = divided.iter().map(|d| d.2.id.clone()).collect();
    let images = runner.pictures(recipe, &ids)?;
    let one = |((_, _, p), image): (&(usize, usize, &Prediction), String)| Disagreement {
        id: p.id.clone(),
        image,
        label: p.label.clone().unwrap_or_default(),
        guesses: runs
            .iter()
            .zip(&by_id)
            .filter_map(|((m, _), all)| Some(((*m).to_string(), all.get(p.id.as_str())?.prediction.clone())))
            .collect(),
    };
    Ok(divided.iter().zip(images).map(one).collect())
}

/// The confusion matrix over all seeds.
fn summed(names: &[String], loaded: &[Loaded]) -> Option<Classification> {
    let all = loaded.iter().map(|l| l.report.after.as_ref()?.classification.as_ref()).collect::<Option<Vec<_>>>()?;
    added(names, &all)
}

/// Confusion matrices added up class by class, whatever the order in which each has its classes; nothing where one has others.
fn added(names: &[String], all: &[&Classification]) -> Option<Classification> {
    let (mut labels, mut predicted) = (Vec::new(), Vec::new());
    for c in all {
        let own: Vec<String> = c.classes.iter().map(|row| row.name.clone()).collect();
        if c.confusion.len() != names.len() {
            return None;
        }
        // Class i of `names` is class order[i] of this one.
        let order = class_order(&own, names).ok()?.unwrap_or_else(|| (0..names.len() as u32).collect());
        for (t, from) in order.iter().enumerate() {
            for (p, guess) in order.iter().enumerate() {
                let n = *c.confusion.get(*from as usize)?.get(*guess as usize)?;
                labels.extend(std::iter::repeat_n(t as u32, n));
                predicted.extend(std::iter::repeat_n(p as u32, n));
            }
        }
    }
    Some(Classification::new(names, &labels, &predicted))
}

/// Means over the seeds that got as far as each epoch.
fn curve(method: &str, loaded: &[Loaded], metric: &str) -> Curve {
    let longest = loaded.iter().map(|l| l.report.epochs.len()).max().unwrap_or(0);
    let mean = |i: usize, pick: &dyn Fn(&EpochRecord) -> Option<f64>| {
        let at: Vec<_> = loaded.iter().filter_map(|l| l.report.epochs.get(i)).collect();
        let values: Vec<f64> = at.iter().filter_map(|e| pick(e)).collect();
        let step = at.iter().map(|e| e.step as f64).sum::<f64>() / at.len().max(1) as f64;
        Spread::new(values).map(|s| (step, s.mean))
    };
    let over = |pick: &dyn Fn(&EpochRecord) -> Option<f64>| (0..longest).filter_map(|i| mean(i, pick)).collect();
    Curve {
        method: method.to_string(),
        training: over(&|e| Some(e.train_loss)),
        validation: over(&|e| e.val.as_ref().map(|v| v.loss)),
        metric: over(&|e| e.val.as_ref().and_then(|v| v.metric(metric))),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// By hand: cat as dog twice in each, however the classes are ordered.
    #[test]
    fn confusions_add_up_by_name() {
        let names = |all: &str| all.split(' ').map(String::from).collect::<Vec<_>>();
        let one = Classification::new(&names("ant cat dog"), &[0, 1, 1, 2], &[0, 2, 2, 2]);
        let other = Classification::new(&names("dog ant cat"), &[1, 2, 2, 0], &[1, 0, 0, 0]);
        let both = added(&names("ant cat dog"), &[&one, &other]).unwrap();
        assert_eq!(both.confusion, [vec![2, 0, 0], vec![0, 0, 4], vec![0, 0, 2]]);
        assert!(added(&names("ant cat cow"), &[&one]).is_none());
        assert!(added(&names("ant cat"), &[&one]).is_none());
    }
}
