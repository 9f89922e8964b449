//! From the bytes of an image file to RGB, with Pillow's colours.
//!
//! The content decides about the format, never the file's name. Sizes are checked before any
//! pixel is decoded, so that a small file cannot ask for much memory.

mod bmp;
mod colour;
mod gif;
mod jpeg;
mod tiff;
mod timed;

use std::fmt;
use std::path::Path;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage, RgbaImage};
use serde::{Deserialize, Serialize};

use super::preprocess::Background;
use crate::error::{Error, Result};
use crate::guard::guarded;
use timed::Timed;

/// All extensions (lower-case) that a directory scan takes as images.
pub const EXTENSIONS: &[&str] =
    &["png", "apng", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "dib", "tif", "tiff", "ppm", "pgm", "pbm", "pnm"];

/// Larger files are refused unread, whatever the options say.
pub const MAX_FILE: u64 = 256 << 20;
/// What decoders may use beside 16 bytes a pixel (the most that any pixel takes).
const SLACK: u64 = 64 << 20;

/// Thinner images would become too long when their short side is resized.
const MAX_ASPECT: u64 = 1 << 16;

/// How files become pixels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DecodeOptions {
    /// What becomes of transparency.
    pub background: Background,
    /// Whether the EXIF orientation is applied.
    pub orient: bool,
    /// Images with more pixels are refused before they are decoded. Decoding takes at most 24 bytes a pixel and 64 MiB.
    pub max_pixels: u64,
    /// Larger files are refused before they are read.
    pub max_bytes: u64,
    /// Seconds after which decoding is given up. The clock is looked at between pieces of 64 KiB of the file, so that it ends
    /// what a file drags out; what its pixels cost, `max_pixels` bounds. JPEGs are decoded in one piece.
    pub max_seconds: f64,
}

impl Default for DecodeOptions {
    fn default() -> Self {
        Self { background: Background::Keep, orient: true, max_pixels: 100_000_000, max_bytes: MAX_FILE, max_seconds: 60.0 }
    }
}

/// The options that change what a model sees: what an adapter was trained with belongs to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PixelOptions {
    /// What becomes of transparency.
    pub background: Background,
    /// Whether the EXIF orientation is applied.
    pub orient: bool,
}

impl Default for PixelOptions {
    fn default() -> Self {
        DecodeOptions::default().pixels()
    }
}

impl fmt::Display for PixelOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let background = match self.background {
            Background::Keep => "alpha dropped (background: keep)",
            Background::White => "transparency on white (background: white)",
        };
        let orient = if self.orient { "EXIF orientation applied (orient: true)" } else { "EXIF orientation left out (orient: false)" };
        write!(f, "{background}, {orient}")
    }
}

impl DecodeOptions {
    /// Those that change what a model sees.
    #[must_use]
    pub fn pixels(&self) -> PixelOptions {
        PixelOptions { background: self.background, orient: self.orient }
    }

    /// With other [`PixelOptions`] and the same limits.
    #[must_use]
    pub fn with_pixels(self, pixels: PixelOptions) -> Self {
        Self { background: pixels.background, orient: pixels.orient, ..self }
    }
}

/// An image in one of the colour types of the `image` crate, and how it has to be turned.
struct Decoded {
    image: DynamicImage,
    orientation: Orientation,
}

/// Decodes an image to RGB; `place` names it in errors.
///
/// # Errors
/// When the bytes are no image of a known format, are truncated or damaged, or when the image is
/// larger than the options allow.
pub fn decode(place: &str, bytes: &[u8], options: &DecodeOptions) -> Result<RgbImage> {
    let Decoded { image, orientation } = pixels(place, bytes, options)?;
    let rgb = match options.background {
        Background::Keep => colour::rgb(image),
        Background::White if image.color().has_alpha() => colour::on_white(&colour::rgba(image)),
        Background::White => colour::rgb(image),
    };
    Ok(turn(rgb.into(), orientation, options).into_rgb8())
}

/// Decodes an image with its alpha, for backgrounds chosen later; the orientation is applied.
///
/// # Errors
/// As [`decode`].
pub fn decode_rgba(place: &str, bytes: &[u8], options: &DecodeOptions) -> Result<RgbaImage> {
    let Decoded { image, orientation } = pixels(place, bytes, options)?;
    Ok(turn(colour::rgba(image).into(), orientation, options).into_rgba8())
}

/// Whether something would be seen through the image.
#[must_use]
pub fn is_transparent(image: &RgbaImage) -> bool {
    image.pixels().any(|pixel| pixel.0[3] < u8::MAX)
}

/// Reads and decodes a file.
///
/// # Errors
/// When it cannot be read or is too large; else as [`decode`].
pub fn open(path: &Path, options: &DecodeOptions) -> Result<RgbImage> {
    decode(&path.display().to_string(), &read_file(path, options.max_bytes)?, options)
}

/// Reads a file of at most `max_bytes` and of at most 256 MiB.
///
/// # Errors
/// When it cannot be read or is larger.
pub fn read_file(path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    crate::files::read(path, max_bytes.min(MAX_FILE))
}

fn turn(mut image: DynamicImage, orientation: Orientation, options: &DecodeOptions) -> DynamicImage {
    if options.orient {
        image.apply_orientation(orientation);
    }
    image
}

fn pixels(place: &str, bytes: &[u8], options: &DecodeOptions) -> Result<Decoded> {
    if bytes.len() as u64 > options.max_bytes {
        return Err(Error::input(place, format!("has {} bytes, expected at most {}", bytes.len(), options.max_bytes)));
    }
    let file = Timed::new(bytes, options.max_seconds);
    let decoded = guarded(|| of_format(place, bytes, file, options))
        .unwrap_or_else(|| Err(Error::input(place, "the image is damaged in a way that makes its decoder fail")));
    match decoded {
        Err(_) if file.is_over() => {
            let message = format!("decoding took more than {} seconds", options.max_seconds);
            Err(Error::input(place, message).hint("the file is built to be slow, or `images.max_seconds` is too small for this machine"))
        }
        decoded => decoded,
    }
}

fn of_format(place: &str, bytes: &[u8], file: Timed<'_>, options: &DecodeOptions) -> Result<Decoded> {
    let format = sniff(place, bytes)?;
    match format {
        ImageFormat::Gif => {
            let image = gif::first_frame(place, file, options)?;
            return Ok(Decoded { image, orientation: Orientation::NoTransforms });
        }
        // The decoder would say no more than that it is too much.
        ImageFormat::Png => {
            if let Some([width, height]) = png_size(bytes) {
                check_size(place, width, height, options)?;
            }
        }
        ImageFormat::Jpeg => jpeg::check_complete(place, bytes)?,
        ImageFormat::Pnm => check_maximum(place, bytes)?,
        ImageFormat::Tiff => {
            if let Some(decoded) = tiff::special(place, bytes, file, options)? {
                return Ok(decoded);
            }
        }
        _ => {}
    }
    generic(place, bytes, file, format, options)
}

/// The decoder does not scale grey values and colours whose maximum is another one, so that they would be too dark.
fn check_maximum(place: &str, bytes: &[u8]) -> Result<()> {
    let has_maximum = [b"P2", b"P3", b"P5", b"P6"].iter().any(|magic| bytes.starts_with(*magic));
    if !has_maximum {
        return match bytes.starts_with(b"P7") {
            true => Err(Error::input(place, "PAM images are not supported").hint("convert them to JPEG or PNG")),
            false => Ok(()),
        };
    }
    // Magic, width, height, maximum; a comment reaches to the end of its line.
    let mut words = bytes.get(2..bytes.len().min(MAX_PNM_HEADER)).unwrap_or_default().split(|b| *b == b'\n').flat_map(|line| {
        let line = line.split(|b| *b == b'#').next().unwrap_or_default();
        line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty())
    });
    let maximum = words.nth(2).map(|word| String::from_utf8_lossy(word).chars().take(20).collect::<String>());
    match maximum.as_deref() {
        Some("255" | "65535") => Ok(()),
        found => Err(Error::input(place, format!("expected values up to 255 or 65535, found {}", found.unwrap_or("none")))
            .hint("convert the image to PNG")),
    }
}

/// Numbers in a PNM's header come before this byte, comments included.
const MAX_PNM_HEADER: usize = 1 << 16;

/// Width and height, which stand behind the signature and the first chunk's head.
fn png_size(bytes: &[u8]) -> Option<[u64; 2]> {
    let side = |at: usize| Some(u64::from(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?)));
    Some([side(16)?, side(20)?]).filter(|_| bytes.get(12..16) == Some(b"IHDR"))
}

fn sniff(place: &str, bytes: &[u8]) -> Result<ImageFormat> {
    if bytes.is_empty() {
        return Err(Error::input(place, "the file is empty"));
    }
    let known = "PNG, JPEG, WebP, GIF, BMP, TIFF and PNM are understood";
    if let Some(kind) = foreign(bytes) {
        return Err(Error::input(place, format!("{kind} images are not supported")).hint("convert them to JPEG or PNG"));
    }
    match image::guess_format(bytes) {
        Ok(format) if format.reading_enabled() => Ok(format),
        Ok(format) => Err(Error::input(place, format!("{} images are not supported", format.to_mime_type())).hint(known)),
        Err(_) => Err(Error::input(place, "not an image of a known format (judged by its content)").hint(known)),
    }
}

/// Formats that people have images in and that no maintained decoder under a free licence reads without C: HEIC and AVIF come from
/// phones and the web, the others from scanners and cameras.
fn foreign(bytes: &[u8]) -> Option<&'static str> {
    if bytes.get(4..8) == Some(b"ftyp") {
        let size = bytes.first_chunk::<4>().map_or(0, |s| u32::from_be_bytes(*s) as usize);
        let brands = bytes.get(8..size.min(bytes.len())).unwrap_or_default();
        let has = |wanted: &[&[u8; 4]]| brands.chunks_exact(4).any(|brand| wanted.iter().any(|w| brand == *w));
        return match () {
            () if has(&[b"avif", b"avis"]) => Some("AVIF"),
            () if has(&[b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"]) => Some("HEIC"),
            () if has(&[b"crx "]) => Some("camera raw (CR3)"),
            () => None,
        };
    }
    let signatures: [(&[u8], &str); 5] = [
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\xff\x0a", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\xff\x4f\xff\x51", "JPEG 2000"),
        (b"8BPS", "Photoshop"),
    ];
    signatures.iter().find(|(signature, _)| bytes.starts_with(signature)).map(|(_, name)| *name)
}

/// The format that an extension (lower-case) says, where it is one of images that cannot be read.
pub(crate) fn unread(extension: &str) -> Option<&'static str> {
    Some(match extension {
        "heic" | "heif" | "hif" => "HEIC",
        "avif" => "AVIF",
        "jxl" => "JPEG XL",
        "jp2" | "j2k" | "jpx" | "jpf" => "JPEG 2000",
        "psd" | "psb" => "Photoshop",
        "svg" => "SVG",
        "cr2" | "cr3" | "nef" | "arw" | "dng" | "raf" | "orf" | "rw2" => "camera raw",
        "tga" => "TGA",
        "ico" => "ICO",
        "exr" | "hdr" => "HDR",
        _ => return None,
    })
}

/// Decodes with the `image` crate.
fn generic(place: &str, bytes: &[u8], file: Timed<'_>, format: ImageFormat, options: &DecodeOptions) -> Result<Decoded> {
    let limits = |pixels: u64| {
        let mut limits = Limits::no_limits();
        limits.max_alloc = Some(pixels.saturating_mul(16).saturating_add(SLACK));
        limits
    };
    let mut reader = ImageReader::with_format(file, format);
    // What stands beside the pixels, such as a colour profile, may be a bomb of its own.
    reader.limits(limits(0));
    let mut decoder = reader.into_decoder().map_err(|e| failed(place, &e))?;
    let (width, height) = decoder.dimensions();
    check_size(place, u64::from(width), u64::from(height), options)?;
    decoder.set_limits(limits(u64::from(width) * u64::from(height))).map_err(|e| failed(place, &e))?;
    // Broken EXIF data is no reason to refuse an image.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut image = DynamicImage::from_decoder(decoder).map_err(|e| failed(place, &e))?;
    if let (ImageFormat::Bmp, DynamicImage::ImageRgb8(rgb), Some(depths)) = (format, &mut image, bmp::depths(bytes)) {
        bmp::cut(rgb, depths);
    }
    Ok(Decoded { image, orientation })
}

fn check_size(place: &str, width: u64, height: u64, options: &DecodeOptions) -> Result<()> {
    if width == 0 || height == 0 {
        return Err(Error::input(place, format!("{width}×{height} pixels: there is nothing to see")));
    }
    if width.saturating_mul(height) > options.max_pixels {
        let limit = options.max_pixels as f64 / 1e6;
        return Err(Error::input(place, format!("{width}×{height} pixels, more than the limit of {limit} megapixels"))
            .hint("scale the image down; CLIP sees a few hundred pixels a side"));
    }
    if width.max(height) / width.min(height) > MAX_ASPECT {
        return Err(Error::input(place, format!("{width}×{height} pixels: too thin to be resized")));
    }
    Ok(())
}

fn failed(place: &str, error: &image::ImageError) -> Error {
    use image::ImageError as E;
    let truncated = |e: &std::io::Error| e.kind() == std::io::ErrorKind::UnexpectedEof;
    match error {
        E::IoError(e) if truncated(e) => Error::input(place, "the image is truncated"),
        E::Unsupported(e) => Error::input(place, format!("this kind of image is not supported: {e}")).hint("convert it to PNG"),
        E::Limits(_) => Error::input(place, format!("decoding would take too much memory: {error}")),
        _ => Error::input(place, format!("the image is truncated or damaged: {error}")),
    }
}
