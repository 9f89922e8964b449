//! Confusion matrices and heat maps as grids of cells: a cell's text shows on hovering, where it has no room.

use maud::{Markup, html};

use super::number;
use crate::change::Change;
use crate::report::Classification;

/// Beyond this many classes a matrix is a blur; the commonest confusions are listed in its place.
const MATRIX: usize = 40;
/// Cells with room for a number.
const NUMBERED: usize = 12;
/// Rows of that list.
const LISTED: usize = 20;

/// Rows: true class; columns: predicted class; the darker, the larger the share of its row.
pub(super) fn confusion(found: &Classification) -> Markup {
    let n = found.classes.len();
    if n > MATRIX {
        return commonest(found);
    }
    let name = |i: usize| found.classes[i].name.as_str();
    html! {
        div.matrix role="img" aria-label="confusion matrix" style=(format!("--n:{n}")) {
            @for (t, row) in found.confusion.iter().enumerate() {
                @let all = row.iter().sum::<usize>().max(1);
                span.name title=(name(t)) { (name(t)) }
                @for (p, &count) in row.iter().enumerate() {
                    i class=(if t == p { "hit" } else { "miss" }) style=(shade(count as f64 / all as f64))
                        title=(format!("{} taken for {}: {count} of {}", name(t), name(p), row.iter().sum::<usize>())) {
                        @if n <= NUMBERED && count > 0 { (count) }
                    }
                }
            }
        }
        @if n > NUMBERED { p.note { "Rows are true classes, columns predicted ones in the same order." } }
    }
}

fn commonest(found: &Classification) -> Markup {
    let cells = found.confusion.iter().enumerate().flat_map(|(t, row)| row.iter().enumerate().map(move |(p, n)| (*n, t, p)));
    let mut all: Vec<(usize, usize, usize)> = cells.filter(|(n, t, p)| t != p && *n > 0).collect();
    all.sort_by_key(|(n, t, p)| (std::cmp::Reverse(*n), *t, *p));
    html! {
        table {
            thead { tr { th { "true" } th { "predicted" } th.n { "images" } } }
            tbody {
                @for (n, t, p) in all.into_iter().take(LISTED) {
                    tr { td { (found.classes[t].name) } td { (found.classes[p].name) } td.n { (n) } }
                }
            }
        }
    }
}

fn shade(share: f64) -> String {
    format!("--v:{:.0}", 100.0 * share.clamp(0.0, 1.0))
}

/// ‖ΔW‖/‖W‖ by module and block, one grid for each tower, and a list of what is outside the blocks.
pub(super) fn heat(changes: &[Change]) -> Markup {
    let most = changes.iter().map(Change::relative).fold(0.0, f64::max).max(1e-12);
    let outside: Vec<&Change> = changes.iter().filter(|c| c.layer.is_none()).collect();
    html! {
        div.pair {
            @for tower in ["vision", "text", "shared"] {
                @let own: Vec<&Change> = changes.iter().filter(|c| c.tower == tower && c.layer.is_some()).collect();
                @if !own.is_empty() { (grid(tower, &own, most)) }
            }
        }
        @if !outside.is_empty() {
            h3 { "Outside the blocks" }
            table {
                thead { tr { th { "tower" } th { "weight" } th.n { "‖ΔW‖" } th.n { "‖ΔW‖/‖W‖" } } }
                tbody { @for c in outside { tr { td { (c.tower) } td { (c.module) } td.n { (number(c.norm)) } td.n { (number(c.relative())) } } } }
            }
        }
    }
}

fn grid(tower: &str, own: &[&Change], most: f64) -> Markup {
    let layers = own.iter().filter_map(|c| c.layer).max().map_or(0, |l| l + 1);
    let mut modules: Vec<&str> = Vec::new();
    for c in own {
        if !modules.contains(&c.module.as_str()) {
            modules.push(&c.module);
        }
    }
    html! {
        figure {
            figcaption { (tower) " tower, blocks 0 to " (layers.saturating_sub(1)) " from left to right" }
            div.matrix.heat style=(format!("--n:{layers}")) {
                @for module in modules {
                    span.name { (module) }
                    @for layer in 0..layers {
                        @match own.iter().find(|c| c.module == module && c.layer == Some(layer)) {
                            None => { i.none title=(format!("block {layer} {module}: unchanged")) {} },
                            Some(c) => {
                                i.hit style=(shade(c.relative() / most))
                                    title=(format!("block {layer} {module}: ‖ΔW‖ {}, {} of ‖W‖", number(c.norm), number(c.relative()))) {
                                    @if layers <= NUMBERED { (tiny(c.relative())) }
                                }
                            },
                        }
                    }
                }
            }
        }
    }
}

/// Two digits where there is room for three letters.
fn tiny(v: f64) -> String {
    match v {
        0.0..0.0095 => String::new(),
        0.0095..0.995 => format!("{v:.2}").trim_start_matches('0').to_string(),
        _ => format!("{v:.1}"),
    }
}
