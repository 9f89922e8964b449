//! The table as text, Markdown and CSV.

use crate::comparison::{Comparison, Group, Inference, Row, Spread, points, remarks, spread};
use crate::error::{Error, Result};
use crate::figures::{bytes, metric, number, short};

/// Headings of [`table`] for a group.
#[must_use]
pub fn headings(group: &Group) -> Vec<String> {
    let minus = group.reference.as_ref().map_or_else(|| "difference".to_string(), |name| format!("− {name} [95 %]"));
    let forget = if group.forget.is_some() { "second set" } else { "" };
    let of = format!("{} {}", group.split, group.metric.replace('_', " "));
    let all = ["method", "lr", &of, &minus, "parameters", "delta", "train s", "images/s", "peak MiB", "ms/image", "merged", forget];
    all.iter().filter(|h| !h.is_empty()).map(ToString::to_string).collect()
}

/// Cells of [`headings`], a row for the base without training first.
#[must_use]
pub fn table(group: &Group) -> Vec<Vec<String>> {
    let dash = || "–".to_string();
    let mut all = Vec::new();
    if let Some(zero) = &group.zero_shot {
        let mut row = vec![dash(); headings(group).len()];
        row[0] = "zero-shot".into();
        row[2] = zero.get(&group.metric).map_or_else(dash, |v| metric(&group.metric, *v));
        row[9] = group.base_ms.map_or_else(dash, number);
        if let (Some(forget), Some(cell)) = (&group.forget, row.get_mut(11)) {
            *cell = metric("accuracy", forget.before);
        }
        all.push(row);
    }
    for row in &group.rows {
        let failures = row.failures();
        let mut cells = vec![
            row.method.clone(),
            row.trained_lr().map_or_else(dash, number),
            row.test.as_ref().map_or_else(|| failures.join("; "), |s| spread(&group.metric, s)),
            row.difference
                .as_ref()
                .map_or_else(dash, |d| format!("{} [{}, {}]", points(d.mean), points(d.interval[0]), points(d.interval[1]))),
            row.trainable_parameters.map_or_else(dash, |n| short(n as f64)),
            row.delta_bytes.map_or_else(dash, bytes),
            row.seconds.as_ref().map_or_else(dash, |s| format!("{:.1}", s.mean)),
            row.images_per_second.as_ref().map_or_else(dash, |s| format!("{:.0}", s.mean)),
            row.peak_rss_mib.map_or_else(dash, |v| format!("{v:.0}")),
        ];
        let speeds = row.inference.as_ref().map(Inference::texts).unwrap_or_default();
        cells.extend(speeds.map(|s| s.map_or_else(dash, |[ms, times]| format!("{ms} ({times})"))));
        if group.forget.is_some() {
            cells.push(row.forget.as_ref().map_or_else(dash, |s| spread("accuracy", s)));
        }
        all.push(cells);
    }
    all
}

/// `compare.md`.
#[must_use]
pub fn markdown(comparison: &Comparison) -> String {
    let escape = |s: &str| s.replace('|', "\\|").replace('\n', " ");
    let line = |cells: &[String]| format!("| {} |\n", cells.iter().map(|c| escape(c)).collect::<Vec<_>>().join(" | "));
    let mut out = String::new();
    for group in &comparison.groups {
        let heads = headings(group);
        out += &format!("## {}\n\n", group.name);
        out += &line(&heads);
        out += &line(&vec!["---".to_string(); heads.len()]);
        table(group).iter().for_each(|row| out += &line(row));
        out.push('\n');
        remarks(group).iter().for_each(|r| out += &format!("- {}\n", r.replace('\n', " ")));
        out.push('\n');
    }
    comparison.notes.iter().for_each(|n| out += &format!("- {n}\n"));
    out
}

/// `compare.csv`: a line for each row, figures unrounded.
///
/// # Errors
/// When it cannot be written.
pub fn csv(comparison: &Comparison) -> Result<String> {
    let fail = |e: csv::Error| Error::fault("compare.csv", e);
    let mut out = csv::Writer::from_writer(Vec::new());
    out.write_record([
        "group",
        "shots",
        "method",
        "lr",
        "seeds",
        "failed",
        "metric",
        "test_mean",
        "test_sd",
        "difference",
        "difference_low",
        "difference_high",
        "trainable_parameters",
        "delta_bytes",
        "train_seconds",
        "images_per_second",
        "peak_rss_mib",
        "unmerged_ms",
        "merged_ms",
        "forget_before",
        "forget_mean",
        "forget_sd",
        "pareto",
    ])
    .map_err(fail)?;
    for group in &comparison.groups {
        for row in &group.rows {
            out.write_record(record(group, row)).map_err(fail)?;
        }
    }
    let bytes = out.into_inner().map_err(|e| Error::fault("compare.csv", e))?;
    String::from_utf8(bytes).map_err(|e| Error::fault("compare.csv", e))
}

fn record(group: &Group, row: &Row) -> Vec<String> {
    let text = |v: Option<f64>| v.map(|v| v.to_string()).unwrap_or_default();
    let mean = |s: &Option<Spread>| text(s.as_ref().map(|s| s.mean));
    let sd = |s: &Option<Spread>| text(s.as_ref().and_then(|s| s.sd));
    let (difference, inference) = (row.difference.as_ref(), row.inference.as_ref());
    vec![
        group.name.clone(),
        group.shots.map(|s| s.to_string()).unwrap_or_default(),
        row.method.clone(),
        row.lr.to_string(),
        row.runs.len().to_string(),
        row.failures().join("; "),
        group.metric.clone(),
        mean(&row.test),
        sd(&row.test),
        text(difference.map(|d| d.mean)),
        text(difference.map(|d| d.interval[0])),
        text(difference.map(|d| d.interval[1])),
        row.trainable_parameters.map(|n| n.to_string()).unwrap_or_default(),
        row.delta_bytes.map(|n| n.to_string()).unwrap_or_default(),
        mean(&row.seconds),
        mean(&row.images_per_second),
        text(row.peak_rss_mib),
        text(inference.map(|i| i.unmerged_ms)),
        text(inference.and_then(|i| i.merged_ms)),
        text(group.forget.as_ref().map(|f| f.before)),
        mean(&row.forget),
        sd(&row.forget),
        row.pareto.to_string(),
    ]
}
