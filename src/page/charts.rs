//! Line charts and scatter plots as SVG that takes its colours from the page's CSS variables.

use maud::{Markup, PreEscaped, html};
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint};
use plotters::prelude::*;

use super::COLOURS;
use crate::error::{Error, Result};

/// Drawn at twice the size that it is meant for, so that whole pixels are fine enough.
const SIZE: (u32, u32) = (1040, 640);
const FONT: u32 = 32;
/// Stand-ins that [`recolour`] turns into CSS variables; plotters knows only fixed colours.
const INK: RGBColor = RGBColor(1, 2, 3);
const GRID: RGBColor = RGBColor(1, 2, 4);

/// How an axis is divided.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Scale {
    /// Equal steps.
    Linear,
    /// Equal steps from 0 to 1, shown in per cent.
    Percent,
    /// Powers of ten.
    Log,
    /// Powers of ten, and 0, which stands where this number would; it is smaller than all others.
    LogAndZero(f64),
    /// Logarithmic, ticks at these places only.
    At(Vec<f64>),
}

/// What is drawn along one axis.
#[derive(Debug, Clone)]
pub(super) struct Axis<'a> {
    pub(super) name: &'a str,
    pub(super) scale: Scale,
}

/// One line.
#[derive(Debug, Clone)]
pub(super) struct Series {
    pub(super) name: String,
    /// Index into the page's colours.
    pub(super) colour: usize,
    /// x, y and half the error bar, in order of x.
    pub(super) points: Vec<(f64, f64, Option<f64>)>,
    pub(super) style: Style,
}

/// How a line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    /// A line.
    Line,
    /// A thin pale line behind others, not in the legend.
    Faint,
    /// A line with a dot at each point.
    Dots,
    /// Dots alone, each with the name beside it.
    Named,
    /// A dashed line from edge to edge at the first point's height.
    Level,
    /// Steps between points, pale.
    Front,
}

/// A chart and what it says to those who do not see it.
#[derive(Debug)]
pub(super) struct Plot<'a> {
    pub(super) label: &'a str,
    pub(super) x: Axis<'a>,
    pub(super) y: Axis<'a>,
    pub(super) series: Vec<Series>,
}

impl Scale {
    fn to(&self, v: f64) -> f64 {
        match self {
            Self::Linear | Self::Percent => v,
            Self::LogAndZero(place) => v.max(*place).log10(),
            Self::Log | Self::At(_) => v.max(1e-12).log10(),
        }
    }

    fn text(&self, at: f64) -> String {
        match self {
            Self::Linear => super::number(at),
            Self::Percent => format!("{:.0} %", 100.0 * at),
            Self::LogAndZero(place) if at <= place.log10() => "0".into(),
            Self::Log | Self::LogAndZero(_) | Self::At(_) => super::short(10f64.powf(at)),
        }
    }

    /// The range and its ticks, in drawn units.
    fn range(&self, values: impl Iterator<Item = f64>) -> Ticks {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for v in values.filter(|v| v.is_finite()) {
            (low, high) = (low.min(self.to(v)), high.max(self.to(v)));
        }
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        let pad = match self {
            Self::Linear | Self::Percent => 0.04 * (high - low),
            Self::Log | Self::LogAndZero(_) | Self::At(_) => 0.12 * (high - low),
        };
        let pad = if high - low < 1e-9 { 0.5 * low.abs().max(0.1) } else { pad };
        (low, high) = (low - pad, high + pad);
        let ticks = match self {
            Self::At(places) => places.iter().map(|p| self.to(*p)).collect(),
            Self::Log => decades(low, high),
            Self::LogAndZero(place) => {
                let zero = place.log10();
                // Nothing lies between 0 and the first number, a power of ten to the right.
                std::iter::once(zero).chain(decades(zero + 0.5, high.max(zero + 0.5))).collect()
            }
            Self::Linear | Self::Percent => even(low, high),
        };
        Ticks { low, high, ticks }
    }
}

/// An axis whose ticks are ours.
#[derive(Debug, Clone)]
struct Ticks {
    low: f64,
    high: f64,
    ticks: Vec<f64>,
}

impl Ranged for Ticks {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        limit.0 + (f64::from(limit.1 - limit.0) * (value - self.low) / (self.high - self.low)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() { Vec::new() } else { self.ticks.clone() }
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.low..self.high
    }
}

/// Powers of ten, and three times them where there are few.
fn decades(low: f64, high: f64) -> Vec<f64> {
    let whole = (low.floor() as i32..=high.ceil() as i32).map(f64::from);
    let between = if high - low < 3.0 { vec![0.0, 3f64.log10()] } else { vec![0.0] };
    whole.flat_map(|d| between.iter().map(move |b| d + b)).filter(|v| (low..=high).contains(v)).collect()
}

/// About five ticks at 1, 2 or 5 times a power of ten.
fn even(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].iter().map(|m| m * power).find(|s| *s >= rough * 0.99).unwrap_or(rough);
    let first = (low / step).ceil() as i64;
    (first..).map(|i| i as f64 * step).take_while(|v| *v <= high).take(20).collect()
}

fn colour(index: usize) -> RGBColor {
    RGBColor(0xE0, 0, (index % COLOURS) as u8)
}

/// The chart with its legend.
pub(super) fn chart(plot: &Plot<'_>) -> Result<Markup> {
    let mut svg = String::new();
    draw(plot, &mut svg).map_err(|e| Error::fault("chart", e))?;
    let svg = recolour(&svg, plot.label);
    let named = plot.series.iter().filter(|s| !s.name.is_empty() && !matches!(s.style, Style::Faint | Style::Named | Style::Level));
    let named: Vec<&Series> = named.collect();
    Ok(html! {
        figure.chart {
            (PreEscaped(svg))
            @if named.len() > 1 || named.iter().any(|s| s.style == Style::Front) {
                figcaption.legend {
                    @for s in named {
                        span { i style=(format!("background:var(--{})", if s.style == Style::Front { "ink".into() } else { format!("c{}", s.colour % COLOURS) })) {} (s.name) }
                    }
                }
            }
        }
    })
}

type Failed = DrawingAreaErrorKind<<SVGBackend<'static> as DrawingBackend>::ErrorType>;

fn draw(plot: &Plot<'_>, svg: &mut String) -> std::result::Result<(), Failed> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let points = || plot.series.iter().flat_map(|s| &s.points);
    let xt = plot.x.scale.range(points().map(|p| p.0));
    let yt = plot.y.scale.range(points().flat_map(|p| [p.1 - p.2.unwrap_or(0.0), p.1 + p.2.unwrap_or(0.0)]));
    let (x0, x1, y0, y1) = (xt.low, xt.high, yt.low, yt.high);
    let (xn, yn) = (xt.ticks.len(), yt.ticks.len());
    let mut chart =
        ChartBuilder::on(&root).margin(16).margin_right(28).x_label_area_size(96).y_label_area_size(138).build_cartesian_2d(xt, yt)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID.stroke_width(1))
        .axis_style(GRID.stroke_width(2))
        .label_style(("sans-serif", FONT).into_font().color(&INK))
        .axis_desc_style(("sans-serif", FONT).into_font().color(&INK))
        .x_labels(xn)
        .y_labels(yn)
        .x_label_formatter(&|v| plot.x.scale.text(*v))
        .y_label_formatter(&|v| plot.y.scale.text(*v))
        .x_desc(plot.x.name)
        .y_desc(plot.y.name)
        .draw()?;
    let mut taken: Vec<(f64, f64)> = Vec::new();
    for s in &plot.series {
        let line = |points: Vec<(f64, f64)>, style: ShapeStyle| PathElement::new(points, style);
        let at: Vec<(f64, f64)> = s.points.iter().map(|p| (plot.x.scale.to(p.0), plot.y.scale.to(p.1))).collect();
        let ink = colour(s.colour);
        match s.style {
            Style::Line => drop(chart.draw_series([line(at.clone(), ink.stroke_width(4))])?),
            Style::Faint => drop(chart.draw_series([line(at.clone(), ink.mix(0.35).stroke_width(2))])?),
            Style::Front => drop(chart.draw_series([line(steps(&at), INK.mix(0.35).stroke_width(3))])?),
            Style::Level => {
                let y = at.first().map_or(y0, |p| p.1);
                let (dash, gap) = ((x1 - x0) / 60.0, (x1 - x0) / 90.0);
                let dashes = (0..).map(|i| x0 + f64::from(i) * (dash + gap)).take_while(|x| *x < x1);
                chart.draw_series(dashes.map(|x| line(vec![(x, y), ((x + dash).min(x1), y)], INK.mix(0.6).stroke_width(2))))?;
                let text = ("sans-serif", FONT - 2).into_font().color(&INK);
                chart.draw_series([EmptyElement::at((x0, y)) + Text::new(s.name.clone(), (10, -38), text)])?;
            }
            Style::Dots | Style::Named => {
                if s.style == Style::Dots {
                    chart.draw_series([line(at.clone(), ink.stroke_width(3))])?;
                }
                let bars = s.points.iter().filter_map(|(x, y, e)| e.map(|e| (*x, *y, e)));
                let (xs, ys) = (&plot.x.scale, &plot.y.scale);
                chart.draw_series(
                    bars.map(|(x, y, e)| line(vec![(xs.to(x), ys.to(y - e)), (xs.to(x), ys.to(y + e))], ink.stroke_width(3))),
                )?;
                chart.draw_series(at.iter().map(|p| Circle::new(*p, 9, ink.filled())))?;
            }
        }
        if s.style == Style::Named
            && let Some(&(x, y)) = at.first()
        {
            let (fx, fy) = ((x - x0) / (x1 - x0), (y - y0) / (y1 - y0));
            let (dx, dy) = place(&mut taken, fx, fy, s.name.chars().count());
            let text = ("sans-serif", FONT).into_font().color(&INK);
            chart.draw_series([EmptyElement::at((x, y)) + Text::new(s.name.clone(), (dx, dy), text)])?;
        }
    }
    root.present()
}

/// Where a name goes beside its dot, in pixels: right of it, left of it near the right edge, moved away from names before it.
fn place(taken: &mut Vec<(f64, f64)>, fx: f64, fy: f64, letters: usize) -> (i32, i32) {
    let (width, height) = (880.0, 530.0);
    let wide = letters as f64 * 17.0;
    let dx = if fx * width + wide + 20.0 > width { -(wide as i32) - 14 } else { 16 };
    let (x, y) = (fx * width + f64::from(dx), (1.0 - fy) * height);
    // Above the topmost dot there is no room.
    let free = |dy: f64| y + dy > -12.0 && taken.iter().all(|(ox, oy)| (ox - x).abs() > wide.max(90.0) || (oy - (y + dy)).abs() > 32.0);
    let dy = [-48.0, 16.0, -16.0, -84.0, 52.0, 86.0].into_iter().find(|dy| free(*dy)).unwrap_or(16.0);
    taken.push((x, y + dy));
    (dx, dy as i32)
}

/// From each point straight to the next one's x, then up.
fn steps(at: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut all = Vec::new();
    for p in at {
        if let Some(&(_, y)) = all.last() {
            all.push((p.0, y));
        }
        all.push(*p);
    }
    all
}

/// Stand-ins become CSS variables, fixed sizes give way to the page's.
fn recolour(svg: &str, label: &str) -> String {
    let mut out = svg.to_string();
    for i in 0..COLOURS {
        out = out.replace(&format!("\"#E000{i:02X}\""), &format!("\"var(--c{i})\""));
    }
    out = out.replace("\"#010203\"", "\"var(--ink)\"").replace("\"#010204\"", "\"var(--line)\"");
    let label = html! { (label) }.into_string();
    match out.split_once('>') {
        Some((_, rest)) => format!("<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{label}\">{rest}", SIZE.0, SIZE.1),
        None => out,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn no_fixed_colour_is_left() {
        let points = vec![(1.0, 0.1, None), (1000.0, 0.9, Some(0.05))];
        let all = [Style::Line, Style::Faint, Style::Dots, Style::Named, Style::Level, Style::Front];
        let series = all.iter().map(|&style| Series { name: "a<b".into(), colour: 3, points: points.clone(), style }).collect();
        let plot =
            Plot { label: "\"x\" & y", x: Axis { name: "x", scale: Scale::Log }, y: Axis { name: "y", scale: Scale::Percent }, series };
        let html = chart(&plot).unwrap().into_string();
        assert!(!html.contains('#') && html.contains("var(--c3)") && html.contains("var(--ink)"), "{html}");
        assert!(html.contains("a&lt;b") && !html.contains("a<b") && !html.contains("http"));
    }

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(even(0.03, 0.97), [0.2, 0.4, 0.6000000000000001, 0.8]);
        assert_eq!(decades(2.9, 6.1), [3.0, 4.0, 5.0, 6.0]);
        // 0 has a tick of its own, and no other lies between it and the first number.
        let zero = Scale::LogAndZero(300.0);
        let Ticks { low, high, ticks } = zero.range([0.0, 3000.0, 150_000.0].into_iter());
        assert!(low > 2.0 && high < 6.0, "{low} to {high}");
        assert_eq!(ticks.iter().map(|t| zero.text(*t)).collect::<Vec<_>>(), ["0", "1k", "3k", "10k", "30k", "100k", "300k"]);
        let alone = Scale::LogAndZero(1.0);
        let Ticks { low, high, ticks } = alone.range([0.0].into_iter());
        assert!(low < 0.0 && high > 0.0 && alone.text(ticks[0]) == "0");
        let Ticks { low, high, ticks } = Scale::Linear.range([2.0, 2.0].into_iter());
        assert!(low < 2.0 && high > 2.0 && !ticks.is_empty());
    }
}
