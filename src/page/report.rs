//! `report.html`: what a run learnt, and how.

use maud::{Markup, html};

use super::charts::{Axis, Plot, Scale, Series, Style, chart};
use super::{bytes, document, matrix, metric, number, words};
use crate::change::Change;
use crate::error::Result;
use crate::report::{Classification, Numbers, Prediction, TrainReport, is_fraction};
use crate::train::StepRecord;

/// A test example that was taken for something else, or a number that is off.
#[derive(Debug, Clone)]
pub struct Mistake {
    /// The example.
    pub id: String,
    /// The image, a data URI, where images are looked at.
    pub image: Option<String>,
    /// The text or question, where texts are looked at.
    pub text: Option<String>,
    /// The right class.
    pub label: String,
    /// The predicted one.
    pub prediction: String,
    /// Its probability, where there are any.
    pub confidence: Option<f32>,
}

/// What the page of a run is made of.
#[derive(Debug)]
pub struct RunPage<'a> {
    /// The report.
    pub report: &'a TrainReport,
    /// The resolved recipe, YAML.
    pub recipe: &'a str,
    /// `metrics.jsonl`.
    pub steps: &'a [StepRecord],
    /// Worst first.
    pub mistakes: &'a [Mistake],
    /// What folds into the base.
    pub changes: &'a [Change],
    /// Methods that do not fold, each with the reason.
    pub unfoldable: &'a [String],
    /// Digests by what they are of.
    pub digests: &'a [(&'a str, String)],
}

/// Points of a curve are averaged down to this many.
const POINTS: usize = 300;

/// Dots of a scatter plot: the first so many.
const DOTS: usize = 1000;

/// The page.
///
/// # Errors
/// When a chart cannot be drawn.
pub fn report(page: &RunPage<'_>) -> Result<String> {
    let r = page.report;
    let found = r.after.as_ref().and_then(|a| a.classification.as_ref());
    let curves = curves(page)?;
    let body = html! {
        header {
            h1 { (r.recipe) }
            p { (r.method) " on " (r.base) ", " (r.task) ", " (r.examples[0]) " training, " (r.examples[1]) " validation and "
                (r.examples[2]) " test examples" }
        }
        (figures(r))
        section { h2 { "Curves" } div.charts { (curves) } }
        @if let Some(found) = found {
            section { h2 { "Classes" } (classes(found)) }
            @if !found.confusion.is_empty() {
                section { h2 { "Confusion" } p.note { (matrix::LEGEND) } div.one { (matrix::confusion(found)) } }
            }
        }
        @if !page.mistakes.is_empty() { section { h2 { (worst(r, page.mistakes)) } (mistakes(page.mistakes)) } }
        section {
            h2 { "What changed: ‖ΔW‖ / ‖W‖" }
            @for why in page.unfoldable { p.note { (why) } }
            @if page.changes.is_empty() { p.note { "No weight of the base changes." } } @else { (matrix::heat(page.changes)) }
        }
        section { h2 { "Resources" } (resources(r)) }
        section { h2 { "Recipe" } pre { (page.recipe) } }
        section { h2 { "Digests and versions" } (facts(page.digests.iter().map(|(k, v)| (*k, v.clone())))) }
    };
    Ok(document(&format!("{} – {}", r.recipe, r.method), &body))
}

/// The figures that one looks for first.
fn figures(r: &TrainReport) -> Markup {
    let Some(after) = &r.after else { return html! {} };
    let before = |name: &str| r.before.as_ref().and_then(|b| b.metric(name));
    let interval = after.accuracy_interval();
    let sure = |name: &str| {
        let (found, count) = interval.filter(|_| name == "accuracy")?;
        Some(format!("{} (Wilson, n = {count})", crate::figures::interval(found)))
    };
    html! {
        div.figures {
            @for (name, value) in after.metrics.iter().map(|(n, v)| (n.as_str(), *v)).chain([("loss", after.loss)]) {
                div {
                    span { (r.split) " " (words(name)) }
                    b { (metric(name, value)) }
                    @if let Some(sure) = sure(name) { small { (sure) } }
                    @if let Some(b) = before(name) { small { "before " (metric(name, b)) } }
                }
            }
        }
    }
}

fn curves(page: &RunPage<'_>) -> Result<Markup> {
    let r = page.report;
    let steps = |pick: fn(&StepRecord) -> f64| thin(page.steps.iter().map(|s| (s.step as f64, pick(s))));
    let epochs = |pick: &dyn Fn(&crate::report::EpochRecord) -> Option<f64>| {
        r.epochs.iter().filter_map(|e| Some((e.step as f64, pick(e)?, None))).collect::<Vec<_>>()
    };
    let x = || Axis { name: "step", scale: Scale::Linear };
    let y = |name, scale| Axis { name, scale };
    let series = |name: &str, colour, points, style| Series { name: name.into(), colour, points, style };
    let loss = chart(&Plot {
        label: "loss against steps",
        x: x(),
        y: y("loss", Scale::Linear),
        series: vec![
            series("", 0, steps(|s| s.loss), Style::Faint),
            series("training, mean of an epoch", 0, epochs(&|e| Some(e.train_loss)), Style::Line),
            series("validation", 1, epochs(&|e| e.val.as_ref().map(|v| v.loss)), Style::Line),
        ],
    })?;
    let measured = epochs(&|e| e.val.as_ref().and_then(|v| v.metric(&r.metric)));
    let best = r.best_epoch.and_then(|b| r.epochs.iter().find(|e| e.epoch == b)).map(|e| e.step as f64);
    let chosen = measured.iter().filter(|p| Some(p.0) == best).copied().collect::<Vec<_>>();
    let scale = if is_fraction(&r.metric) { Scale::Percent } else { Scale::Linear };
    let name = format!("validation {}", words(&r.metric));
    let validation = chart(&Plot {
        label: &format!("{name} against steps"),
        x: x(),
        y: y(&name, scale),
        series: vec![series("", 1, measured, Style::Line), series("chosen", 1, chosen, Style::Named)],
    })?;
    let lr = chart(&Plot {
        label: "learning rate against steps",
        x: x(),
        y: y("learning rate", Scale::Linear),
        series: vec![series("", 2, steps(|s| s.lr), Style::Line)],
    })?;
    let norm = chart(&Plot {
        label: "gradient norm against steps",
        x: x(),
        y: y("gradient norm", Scale::Linear),
        series: vec![series("", 3, steps(|s| s.grad_norm), Style::Line)],
    })?;
    Ok(html! { (loss) (validation) (lr) (norm) @if let Some(scatter) = scatter(r)? { (scatter) } })
}

/// Predicted numbers against the right ones, and the line on which they would be equal.
fn scatter(r: &TrainReport) -> Result<Option<Markup>> {
    let Some(after) = r.after.as_ref().filter(|_| r.task == "regress") else { return Ok(None) };
    let pair = |p: &Prediction| Some((p.label.as_ref()?.parse().ok()?, p.prediction.parse().ok()?, None));
    let mut points: Vec<(f64, f64, Option<f64>)> = after.predictions.iter().filter_map(pair).collect();
    points.truncate(DOTS);
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (Some(first), Some(last)) = (points.first().map(|p| p.0), points.last().map(|p| p.0)) else { return Ok(None) };
    let axis = |name| Axis { name, scale: Scale::Linear };
    let equal = Series { name: "equal".into(), colour: 1, points: vec![(first, first, None), (last, last, None)], style: Style::Line };
    let found = Series { name: String::new(), colour: 0, points, style: Style::Named };
    let plot = Plot { label: "predicted against right values", x: axis("right"), y: axis("predicted"), series: vec![found, equal] };
    chart(&plot).map(Some)
}

/// Means of as many neighbours as it takes.
fn thin(points: impl Iterator<Item = (f64, f64)>) -> Vec<(f64, f64, Option<f64>)> {
    let all: Vec<(f64, f64)> = points.collect();
    let mean = |chunk: &[(f64, f64)], pick: fn(&(f64, f64)) -> f64| chunk.iter().map(pick).sum::<f64>() / chunk.len() as f64;
    all.chunks(all.len().div_ceil(POINTS).max(1)).map(|c| (mean(c, |p| p.0), mean(c, |p| p.1), None)).collect()
}

fn classes(found: &Classification) -> Markup {
    html! {
        div.wide { table.classes {
            thead { tr { th { "class" } th.n { "precision" } th.n { "recall" } th.n { "F1" } th.n { "images" } } }
            tbody {
                @for row in found.classes.iter().chain(&found.averages) {
                    tr {
                        td { (row.name) }
                        @for v in [row.precision, row.recall, row.f1] { td.n.bar style=(format!("--v:{:.0}", 100.0 * v)) { (format!("{v:.2}")) } }
                        td.n { (row.support) }
                    }
                }
            }
        } }
    }
}

/// What stands where an example has no class, or none was predicted.
const NONE: &str = "none";

/// Numbers as short as others on the page.
fn shown(answer: &str) -> String {
    match answer.parse::<f64>() {
        _ if answer.is_empty() => NONE.into(),
        Ok(value) if value.fract() != 0.0 => number(value),
        _ => answer.into(),
    }
}

/// What the mistakes that are shown have in common.
fn worst(r: &TrainReport, all: &[Mistake]) -> &'static str {
    match (r.task.as_str(), all.iter().any(|m| m.confidence.is_some())) {
        ("regress", _) => "Largest errors",
        (_, true) => "Most confident mistakes",
        (_, false) => "Mistakes",
    }
}

fn mistakes(all: &[Mistake]) -> Markup {
    html! {
        div.pictures {
            @for m in all {
                figure {
                    @if let Some(image) = &m.image { img src=(image) alt=(m.label) title=(m.id) loading="lazy"; }
                    @if let Some(text) = &m.text { p.note title=(m.id) { (text) } }
                    figcaption {
                        b { (shown(&m.label)) }
                        span.miss { "✗ " (shown(&m.prediction)) @if let Some(p) = m.confidence { " " (format!("{:.0} %", 100.0 * p)) } }
                    }
                }
            }
        }
    }
}

fn resources(r: &TrainReport) -> Markup {
    let share = 100.0 * r.trainable_parameters as f64 / r.total_parameters.max(1) as f64;
    let stopped = if r.stopped_early { ", stopped early" } else { "" };
    let best = r.best_epoch.map(|b| format!(", best {b} kept")).unwrap_or_default();
    let all = [
        ("trained parameters", format!("{} of {} ({share:.2} %)", r.trainable_parameters, r.total_parameters)),
        ("adapter", bytes(r.adapter_bytes)),
        ("epochs", format!("{}{best}{stopped}", r.epochs.len())),
        ("steps", format!("{}{}", r.steps, trouble(&r.numbers))),
        ("training", format!("{} s, evaluation included", number(r.seconds))),
        ("speed", r.images_per_second().map_or_else(|| "–".into(), |v| format!("{} images/s", number(v)))),
        ("peak memory", r.peak_rss_mib.map_or_else(|| "–".into(), |v| format!("{v:.0} MiB"))),
        ("device", r.device.clone()),
        ("skipped images", r.skipped_images.to_string()),
    ];
    facts(all.into_iter())
}

/// What of the steps' numbers is worth saying.
fn trouble(numbers: &Numbers) -> String {
    let Numbers { skipped_steps, overflowed_steps, diverged_at, .. } = numbers;
    let mut all = String::new();
    for (count, why) in [(skipped_steps, "not finite"), (overflowed_steps, "overflow of f16")] {
        if *count > 0 {
            all += &format!(", {count} left out ({why})");
        }
    }
    all + &diverged_at.map(|at| format!(", diverged at {at}")).unwrap_or_default()
}

fn facts<'t>(all: impl Iterator<Item = (&'t str, String)>) -> Markup {
    html! { dl { @for (key, value) in all { dt { (key) } dd { (value) } } } }
}
