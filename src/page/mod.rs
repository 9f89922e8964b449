//! Pages: `report.html` of a run and `compare.html` of a comparison. Each is one file that loads nothing, in light and dark,
//! down to the width of a phone.

use base64::Engine as _;
use image::codecs::jpeg::JpegEncoder;
use image::imageops::FilterType;
use image::{ExtendedColorType, RgbImage};
use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::figures::{bytes, metric, number, short, words};

mod charts;
mod compare;
mod matrix;
mod report;

pub use compare::{ComparePage, Curve, Disagreement, GroupPage, compare};
pub use report::{Mistake, RunPage, report};

/// Colours of series, `--c0` to `--c11`.
const COLOURS: usize = 12;

/// Longest side of a picture on a page.
const THUMBNAIL: u32 = 96;

const STYLE: &str = include_str!("style.css");

/// The whole document.
fn document(title: &str, body: &Markup) -> String {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                // Browsers ask for an icon otherwise.
                link rel="icon" href="data:,";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body { main { (body) } }
        }
    }
    .into_string()
}

/// A picture as a data URI, at most 96 pixels wide and high.
///
/// # Errors
/// When it cannot be encoded.
pub fn thumbnail(image: &RgbImage) -> crate::Result<String> {
    let scale = f64::from(THUMBNAIL) / f64::from(image.width().max(image.height()).max(1));
    let side = |n: u32| ((f64::from(n) * scale).round() as u32).max(1);
    let small = match scale < 1.0 {
        true => &image::imageops::resize(image, side(image.width()), side(image.height()), FilterType::Triangle),
        false => image,
    };
    let mut bytes = Vec::new();
    JpegEncoder::new_with_quality(&mut bytes, 90)
        .encode(small, small.width(), small.height(), ExtendedColorType::Rgb8)
        .map_err(|e| crate::Error::fault("thumbnail", e))?;
    Ok(format!("data:image/jpeg;base64,{}", base64::engine::general_purpose::STANDARD.encode(bytes)))
}
