//! How figures are written for people.

use crate::report::is_fraction;

/// Three significant digits.
#[must_use]
pub fn number(v: f64) -> String {
    match v.abs() {
        _ if !v.is_finite() => "–".into(),
        0.0 => "0".into(),
        0.01..10.0 => trim(format!("{v:.3}")),
        10.0..100.0 => trim(format!("{v:.2}")),
        100.0..1e6 => trim(format!("{v:.1}")),
        _ => exponent(v),
    }
}

/// 0.0015 → 1.5e-3.
fn exponent(v: f64) -> String {
    let text = format!("{v:.2e}");
    text.split_once('e').map_or(text.clone(), |(digits, power)| format!("{}e{power}", trim(digits.to_string())))
}

fn trim(text: String) -> String {
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => text,
    }
}

/// 1200 → 1.2k, 3962369 → 3.96M.
#[must_use]
pub fn short(v: f64) -> String {
    let (scaled, unit) = match v.abs() {
        1e9.. => (v / 1e9, "G"),
        1e6.. => (v / 1e6, "M"),
        1e3.. => (v / 1e3, "k"),
        _ => (v, ""),
    };
    let digits = if scaled.abs() >= 100.0 {
        0
    } else if scaled.abs() >= 10.0 {
        1
    } else {
        2
    };
    format!("{}{unit}", trim(format!("{scaled:.digits$}")))
}

/// Bytes with a unit.
#[must_use]
pub fn bytes(n: u64) -> String {
    match n {
        0..1000 => format!("{n} B"),
        1000..1_000_000 => format!("{:.0} kB", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", n as f64 / 1e6),
        _ => format!("{:.2} GB", n as f64 / 1e9),
    }
}

/// A share in per cent, anything else as it is.
#[must_use]
pub fn metric(name: &str, v: f64) -> String {
    if is_fraction(name) { format!("{:.1} %", 100.0 * v) } else { number(v) }
}

/// The 95 % interval of a share, in per cent.
#[must_use]
pub fn interval([low, high]: [f64; 2]) -> String {
    format!("95 % interval {:.1} to {:.1} %", 100.0 * low, 100.0 * high)
}

/// `macro_f1` → `macro f1`.
#[must_use]
pub fn words(name: &str) -> String {
    name.replace('_', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_read_well() {
        assert_eq!([number(0.0), number(0.25), number(12.345), number(1e-5)], ["0", "0.25", "12.35", "1e-5"]);
        assert_eq!([short(79872.0), short(3_962_369.0), short(300.0)], ["79.9k", "3.96M", "300"]);
        assert_eq!([bytes(999), bytes(331_290), bytes(15_872_000)], ["999 B", "331 kB", "15.9 MB"]);
    }
}
