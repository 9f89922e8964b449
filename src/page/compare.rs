//! `compare.html`: what each method reaches, what it costs, and where they differ.

use maud::{Markup, html};

use super::charts::{Axis, Plot, Scale, Series, Style, chart};
use super::{bytes, document, matrix, metric, number, short, words};
use crate::comparison::{Comparison, Group, Inference, Row, Spread, points, remarks, spread};
use crate::error::Result;
use crate::report::Classification;

/// What the page is made of.
#[derive(Debug)]
pub struct ComparePage<'a> {
    /// The figures.
    pub comparison: &'a Comparison,
    /// What is drawn, for each of its groups.
    pub groups: &'a [GroupPage],
}

/// What is drawn of a group.
#[derive(Debug, Clone, Default)]
pub struct GroupPage {
    /// One for each method that has a run.
    pub curves: Vec<Curve>,
    /// By method, over all seeds.
    pub confusion: Vec<(String, Classification)>,
    /// The most divided first.
    pub disagreements: Vec<Disagreement>,
}

/// Means over seeds against steps.
#[derive(Debug, Clone)]
pub struct Curve {
    /// The method.
    pub method: String,
    /// Training loss, mean of an epoch.
    pub training: Vec<(f64, f64)>,
    /// Validation loss.
    pub validation: Vec<(f64, f64)>,
    /// Validation metric.
    pub metric: Vec<(f64, f64)>,
}

/// A test image that methods see differently.
#[derive(Debug, Clone)]
pub struct Disagreement {
    /// The example.
    pub id: String,
    /// The image, a data URI.
    pub image: String,
    /// The right class.
    pub label: String,
    /// Each method and what it predicted.
    pub guesses: Vec<(String, String)>,
}

/// The page.
///
/// # Errors
/// When a chart cannot be drawn.
pub fn compare(page: &ComparePage<'_>) -> Result<String> {
    let c = page.comparison;
    let names = names(c);
    let colour = |method: &str| names.iter().position(|n| *n == method).unwrap_or(0);
    let title = format!("{}: methods compared", c.groups.first().map_or("peft", |g| g.recipe.as_str()));
    let shots = shots(c, &colour)?;
    let mut groups = Vec::new();
    for (group, drawn) in c.groups.iter().zip(page.groups) {
        groups.push(section(group, drawn, &colour)?);
    }
    let body = html! {
        header { h1 { (title) } p { "peft " (c.version) } }
        @if let Some(chart) = shots { section { h2 { "Against shots" } div.charts { (chart) } } }
        @for group in groups { (group) }
        @if !c.notes.is_empty() { section { h2 { "Notes" } @for note in &c.notes { p.note { (note) } } } }
    };
    Ok(document(&title, &body))
}

/// Methods in order of their first appearance, so that each has one colour on the whole page.
fn names(c: &Comparison) -> Vec<&str> {
    let mut all: Vec<&str> = Vec::new();
    for row in c.groups.iter().flat_map(|g| &g.rows) {
        if !all.contains(&row.method.as_str()) {
            all.push(&row.method);
        }
    }
    all
}

fn section(group: &Group, drawn: &GroupPage, colour: &dyn Fn(&str) -> usize) -> Result<Markup> {
    let scatter = scatter(group, colour)?;
    let curves = curves(group, drawn, colour)?;
    Ok(html! {
        section {
            h2 { (group.name) }
            (table(group, colour))
            @for remark in remarks(group) { p.note { (remark) } }
            @if group.rows.iter().any(|r| r.search.is_some()) { (search(group)) }
        }
        section {
            h2 { (group.name) ": what it reaches and what it costs" }
            div.charts { (scatter) (curves) }
        }
        @if !drawn.confusion.is_empty() {
            section {
                h2 { (group.name) ": confusion, all seeds" }
                p.note { (matrix::LEGEND) }
                div.pair.many {
                    @for (method, found) in &drawn.confusion { figure { figcaption { b { (method) } } (matrix::confusion(found)) } }
                }
            }
        }
        @if !drawn.disagreements.is_empty() {
            section {
                h2 { (group.name) ": where the methods disagree" }
                p.note { "Test images that the first seed's runs see differently, the most divided first." }
                (pictures(&drawn.disagreements))
            }
        }
    })
}

fn table(group: &Group, colour: &dyn Fn(&str) -> usize) -> Markup {
    let of = format!("{} {}", group.split, words(&group.metric));
    let minus = group.reference.as_ref().map_or_else(|| "difference".to_string(), |name| format!("− {name}, points"));
    let heads =
        ["method", "lr", &of, &minus, "parameters", "delta", "training", "images/s", "peak memory", "ms an image", "merged", "second set"];
    let heads = &heads[..if group.forget.is_some() { 12 } else { 11 }];
    html! {
        div.wide {
            table.cards {
                thead { tr { @for (i, h) in heads.iter().enumerate() { th.n[i > 0] { (h) } } } }
                tbody {
                    @if let Some(zero) = &group.zero_shot {
                        tr {
                            td { "zero-shot" }
                            td.n {}
                            td.n data-name=(of) { (zero.get(&group.metric).map(|v| metric(&group.metric, *v)).unwrap_or_default()) }
                            @for _ in 0..6 { td.n {} }
                            td.n data-name="ms an image" { (group.base_ms.map(number).unwrap_or_default()) }
                            td.n {}
                            @if let Some(f) = &group.forget { td.n data-name="second set" { (metric("accuracy", f.before)) } }
                        }
                    }
                    @for row in &group.rows { (line(group, row, heads, colour)) }
                }
            }
        }
    }
}

fn line(group: &Group, row: &Row, heads: &[&str], colour: &dyn Fn(&str) -> usize) -> Markup {
    let [unmerged, merged] = row.inference.as_ref().map(Inference::texts).unwrap_or_default();
    let failures = row.failures();
    html! {
        tr {
            td { i.dot style=(format!("background:var(--c{})", colour(&row.method) % super::COLOURS)) {} (row.method) @if row.pareto { span.tag title="no other is as small and better" { "front" } } }
            td.n data-name=(heads[1]) { (row.trained_lr().map(number).unwrap_or_default()) }
            @match &row.test {
                Some(s) => { td.n data-name=(heads[2]) { span { b { (spread(&group.metric, s)) } @if !failures.is_empty() { small.miss { (failures.len()) " failed" } } } } },
                None => { td.miss data-name=(heads[2]) { (failures.join("; ")) } },
            }
            td.n data-name=(heads[3]) {
                @if let Some(d) = &row.difference {
                    span { (points(d.mean)) small { (points(d.interval[0])) " to " (points(d.interval[1])) } }
                } @else if group.reference.as_ref() == Some(&row.method) {
                    small { "reference" }
                }
            }
            td.n data-name=(heads[4]) { (row.trainable_parameters.map(|n| short(n as f64)).unwrap_or_default()) }
            td.n data-name=(heads[5]) { (row.delta_bytes.map(bytes).unwrap_or_default()) }
            td.n data-name=(heads[6]) { @if let Some(s) = &row.seconds { (format!("{:.1} s", s.mean)) } }
            td.n data-name=(heads[7]) { @if let Some(s) = &row.images_per_second { (format!("{:.0}", s.mean)) } }
            td.n data-name=(heads[8]) { @if let Some(m) = row.peak_rss_mib { (format!("{m:.0} MiB")) } }
            td.n data-name=(heads[9]) { @if let Some([ms, times]) = unmerged { span { (ms) small { (times) } } } }
            td.n data-name=(heads[10]) { @if let Some([ms, times]) = merged { span { (ms) small { (times) } } } }
            @if group.forget.is_some() { td.n data-name="second set" { (row.forget.as_ref().map(|s| spread("accuracy", s)).unwrap_or_default()) } }
        }
    }
}

/// The learning rates that were tried.
fn search(group: &Group) -> Markup {
    html! {
        details {
            summary { "Learning rates tried, by validation " (words(&group.metric)) }
            dl {
                @for row in group.rows.iter().filter(|r| r.search.is_some()) {
                    dt { (row.method) }
                    dd {
                        @for (i, t) in row.search.iter().flatten().enumerate() {
                            @if i > 0 { ", " }
                            (number(t.lr)) ": "
                            @let value = t.validation.map_or_else(|| "failed".to_string(), |v| metric(&group.metric, v));
                            @if t.chosen { b { (value) } } @else { span title=[t.failed.as_deref()] { (value) } }
                        }
                    }
                }
            }
        }
    }
}

/// The metric against trained parameters with the front of rows that nothing beats.
fn scatter(group: &Group, colour: &dyn Fn(&str) -> usize) -> Result<Markup> {
    let points = group.rows.iter().filter_map(|r| Some((r, r.trainable_parameters? as f64, r.test.as_ref()?)));
    let points: Vec<(&Row, f64, &Spread)> = points.collect();
    let (Some(low), Some(high)) = (points.iter().map(|p| p.1).reduce(f64::min), points.iter().map(|p| p.1).reduce(f64::max)) else {
        return Ok(html! { p.note { "No run is finished." } });
    };
    let mut front: Vec<(f64, f64, Option<f64>)> = points.iter().filter(|(r, ..)| r.pareto).map(|(_, n, s)| (*n, s.mean, None)).collect();
    front.sort_by(|a, b| a.0.total_cmp(&b.0));
    // The front goes on to the right: more parameters do not make it worse.
    front.extend(front.last().copied().filter(|last| last.0 < high).map(|last| (high, last.1, None)));
    let mut series = vec![Series { name: "Pareto front".into(), colour: 0, points: front, style: Style::Front }];
    if let Some(zero) = group.zero_shot.as_ref().and_then(|z| z.get(&group.metric)) {
        series.push(Series { name: "zero-shot".into(), colour: 0, points: vec![(low, *zero, None)], style: Style::Level });
    }
    for (row, n, s) in &points {
        series.push(Series {
            name: row.method.clone(),
            colour: colour(&row.method),
            points: vec![(*n, s.mean, s.sd)],
            style: Style::Named,
        });
    }
    let name = format!("{} {}", group.split, words(&group.metric));
    chart(&Plot {
        label: &format!("{name} against trained parameters"),
        x: parameters(points.iter().map(|p| p.1)),
        y: Axis { name: &name, scale: Scale::Percent },
        series,
    })
}

/// The axis of trained parameters. Methods that train nothing, such as Tip-Adapter, stand left of it, a power of ten below the rest.
fn parameters(counts: impl Iterator<Item = f64> + Clone) -> Axis<'static> {
    let least = counts.clone().filter(|n| *n > 0.0).reduce(f64::min);
    match counts.clone().any(|n| n == 0.0) {
        false => Axis { name: "trained parameters", scale: Scale::Log },
        true => {
            let name = if least.is_some() { "trained parameters, 0 beside the scale" } else { "trained parameters" };
            Axis { name, scale: Scale::LogAndZero(least.map_or(1.0, |n| n / 10.0)) }
        }
    }
}

fn curves(group: &Group, drawn: &GroupPage, colour: &dyn Fn(&str) -> usize) -> Result<Markup> {
    let of = |name: &str, scale: Scale, pick: &dyn Fn(&Curve) -> Vec<(f64, f64)>| {
        let series = drawn.curves.iter().map(|c| Series {
            name: c.method.clone(),
            colour: colour(&c.method),
            points: pick(c).into_iter().map(|(x, y)| (x, y, None)).collect(),
            style: Style::Line,
        });
        let series: Vec<Series> = series.filter(|s| !s.points.is_empty()).collect();
        if series.is_empty() {
            return Ok(html! {});
        }
        chart(&Plot {
            label: &format!("{name} against steps"),
            x: Axis { name: "step", scale: Scale::Linear },
            y: Axis { name, scale },
            series,
        })
    };
    let training = of("training loss", Scale::Linear, &|c| c.training.clone())?;
    let validation = of("validation loss", Scale::Linear, &|c| c.validation.clone())?;
    let metric = of(&format!("validation {}", words(&group.metric)), Scale::Percent, &|c| c.metric.clone())?;
    Ok(html! { (training) (validation) (metric) })
}

/// The metric against shots, where a recipe was run with several.
fn shots(c: &Comparison, colour: &dyn Fn(&str) -> usize) -> Result<Option<Markup>> {
    let mut places: Vec<f64> = c.groups.iter().filter_map(|g| g.shots).map(|s| s as f64).collect();
    places.sort_by(f64::total_cmp);
    places.dedup();
    if places.len() < 2 {
        return Ok(None);
    }
    let several = c.groups.iter().any(|g| g.recipe != c.groups[0].recipe);
    let mut series: Vec<Series> = Vec::new();
    for group in &c.groups {
        for row in &group.rows {
            let (Some(shots), Some(test)) = (group.shots, &row.test) else { continue };
            let name = if several { format!("{}, {}", row.method, group.recipe) } else { row.method.clone() };
            let point = (shots as f64, test.mean, test.sd);
            match series.iter_mut().find(|s| s.name == name) {
                Some(s) => s.points.push(point),
                None => series.push(Series { name, colour: colour(&row.method), points: vec![point], style: Style::Dots }),
            }
        }
    }
    series.iter_mut().for_each(|s| s.points.sort_by(|a, b| a.0.total_cmp(&b.0)));
    let metric = words(&c.groups[0].metric);
    let name = format!("{} {metric}", c.groups[0].split);
    let plot = Plot {
        label: &format!("{name} against shots"),
        x: Axis { name: "shots for each class", scale: Scale::At(places) },
        y: Axis { name: &name, scale: Scale::Percent },
        series,
    };
    chart(&plot).map(Some)
}

fn pictures(all: &[Disagreement]) -> Markup {
    html! {
        div.pictures {
            @for d in all {
                figure {
                    img src=(d.image) alt=(d.label) title=(d.id) loading="lazy";
                    figcaption {
                        b { (d.label) }
                        @for (method, guess) in &d.guesses {
                            @if *guess == d.label { span.hit { "✓ " (method) } } @else { span.miss { "✗ " (method) ": " (guess) } }
                        }
                    }
                }
            }
        }
    }
}
