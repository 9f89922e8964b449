//! A contact sheet: a few images of each class in one PNG.

use std::convert::Infallible;
use std::io::Cursor;
use std::path::Path;

use embedded_graphics::Drawable;
use embedded_graphics::Pixel;
use embedded_graphics::draw_target::DrawTarget;
use embedded_graphics::geometry::{OriginDimensions, Point, Size};
use embedded_graphics::mono_font::{MonoTextStyle, iso_8859_1::FONT_8X13};
use embedded_graphics::pixelcolor::{Rgb888, RgbColor};
use embedded_graphics::text::Text;
use image::imageops::FilterType;
use image::{ImageFormat, Rgb, RgbImage};
use rayon::prelude::*;

use crate::clip::decode::{self, DecodeOptions};
use crate::data::{Dataset, Example, Split};
use crate::error::{Error, Result};
use crate::files;

/// Pixels of a picture's side, and of the gap between two.
const SIDE: u32 = 96;
const GAP: u32 = 6;
/// Pictures in a row.
const COLUMNS: u32 = 10;
/// Pixels of a row's title.
const TITLE: u32 = 20;
/// Rows at most: more would be no overview.
const ROWS: usize = 100;

/// A row of pictures that belong together.
struct Row<'a> {
    title: String,
    examples: Vec<&'a Example>,
}

/// Writes the sheet: a row a class with up to ten of its images, evenly taken from all splits; without classes as many rows as
/// there is something to show. Images that cannot be read are left out. Returns the number of rows, at most 100.
///
/// # Errors
/// When there is no image, or the file cannot be written.
pub fn draw(data: &Dataset, options: &DecodeOptions, file: &Path) -> Result<usize> {
    let rows = rows(data);
    let row_height = TITLE + SIDE + GAP;
    let (width, height) = (GAP + COLUMNS * (SIDE + GAP), GAP + rows.len() as u32 * row_height);
    let mut sheet = Canvas(RgbImage::from_pixel(width, height, Rgb([255; 3])));
    for (i, row) in rows.iter().enumerate() {
        let top = GAP + i as u32 * row_height;
        sheet.text(GAP, top, &row.title);
        let pictures: Vec<Option<RgbImage>> = row.examples.par_iter().map(|e| picture(e, options).ok()).collect();
        for (column, picture) in pictures.iter().flatten().enumerate() {
            let left = GAP + column as u32 * (SIDE + GAP);
            let (x, y) = (left + (SIDE - picture.width()) / 2, top + TITLE + (SIDE - picture.height()) / 2);
            image::imageops::overlay(&mut sheet.0, picture, i64::from(x), i64::from(y));
        }
    }
    let mut png = Cursor::new(Vec::new());
    sheet.0.write_to(&mut png, ImageFormat::Png).map_err(|e| Error::fault(file.display(), e))?;
    files::write_atomic(file, png.get_ref())?;
    Ok(rows.len())
}

fn rows(data: &Dataset) -> Vec<Row<'_>> {
    let all: Vec<&Example> = [Split::Train, Split::Val, Split::Test].into_iter().flat_map(|s| data.split(s)).collect();
    let count = COLUMNS as usize;
    let mut rows = Vec::new();
    if data.classes.is_empty() {
        let some = evenly(&all, count * 10);
        for chunk in some.chunks(count) {
            let title = if rows.is_empty() { format!("{} of {} images", some.len(), all.len()) } else { String::new() };
            rows.push(Row { title, examples: chunk.to_vec() });
        }
        return rows;
    }
    let mut by_class = vec![Vec::new(); data.classes.len()];
    all.iter().for_each(|e| e.label.into_iter().for_each(|l| by_class[l as usize].push(*e)));
    for (name, examples) in data.classes.iter().zip(by_class).take(ROWS) {
        rows.push(Row { title: format!("{name} ({})", examples.len()), examples: evenly(&examples, count) });
    }
    rows
}

/// `count` of them, from the first to the last in equal strides.
fn evenly<'a>(all: &[&'a Example], count: usize) -> Vec<&'a Example> {
    let taken = all.len().min(count);
    (0..taken).map(|i| all[i * all.len() / taken]).collect()
}

/// The whole image, made small.
fn picture(example: &Example, options: &DecodeOptions) -> Result<RgbImage> {
    let image = decode::decode(&example.id, &example.bytes_within(options.max_bytes)?, options)?;
    let scale = f64::from(SIDE) / f64::from(image.width().max(image.height()));
    let side = |s: u32| ((f64::from(s) * scale).round() as u32).clamp(1, SIDE);
    Ok(image::imageops::resize(&image, side(image.width()), side(image.height()), FilterType::Triangle))
}

/// What the font is drawn on.
struct Canvas(RgbImage);

impl Canvas {
    fn text(&mut self, x: u32, y: u32, text: &str) {
        let style = MonoTextStyle::new(&FONT_8X13, Rgb888::BLACK);
        let Ok(_) = Text::new(text, Point::new(x as i32, y as i32 + 13), style).draw(self);
    }
}

impl OriginDimensions for Canvas {
    fn size(&self) -> Size {
        Size::new(self.0.width(), self.0.height())
    }
}

impl DrawTarget for Canvas {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(&mut self, pixels: I) -> std::result::Result<(), Infallible> {
        for Pixel(at, colour) in pixels {
            if let (Ok(x), Ok(y)) = (u32::try_from(at.x), u32::try_from(at.y))
                && let Some(pixel) = self.0.get_pixel_mut_checked(x, y)
            {
                *pixel = Rgb([colour.r(), colour.g(), colour.b()]);
            }
        }
        Ok(())
    }
}
