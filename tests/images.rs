//! Images become the pixels that transformers' `CLIPImageProcessorPil` makes of them; see
//! scripts/goldens/images.py.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use peft::clip::decode::{DecodeOptions, EXTENSIONS, decode, decode_rgba, open};
use peft::clip::preprocess::{Background, Preprocess};
use serde::Deserialize;

#[derive(Deserialize)]
struct Goldens {
    configs: BTreeMap<String, serde_json::Value>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    source: String,
    config: String,
    expected: String,
    lossy: bool,
    white: bool,
    orient: bool,
    values: Vec<(usize, f32)>,
}

impl Case {
    fn options(&self) -> DecodeOptions {
        let background = if self.white { Background::White } else { Background::Keep };
        DecodeOptions { background, orient: self.orient, ..DecodeOptions::default() }
    }

    /// Largest and mean difference of 8-bit values.
    fn differences(&self, p: &Preprocess) -> (u8, f64) {
        let found = p.resize_crop(&open(&source(&self.source), &self.options()).unwrap()).unwrap();
        let expected = image::open(data().join("expected").join(&self.expected)).unwrap().into_rgb8();
        assert_eq!(found.dimensions(), expected.dimensions(), "{}", self.expected);
        let all: Vec<u8> = found.iter().zip(expected.iter()).map(|(a, b)| a.abs_diff(*b)).collect();
        let sum: u64 = all.iter().map(|d| u64::from(*d)).sum();
        (all.iter().copied().max().unwrap(), sum as f64 / all.len() as f64)
    }
}

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/images")
}

fn source(name: &str) -> PathBuf {
    data().join("sources").join(name)
}

fn goldens() -> Goldens {
    serde_json::from_slice(&std::fs::read(data().join("cases.json")).unwrap()).unwrap()
}

fn preprocess(goldens: &Goldens, config: &str) -> Preprocess {
    Preprocess::from_json(config, goldens.configs[config].to_string().as_bytes()).unwrap()
}

#[test]
fn pixels_are_those_of_transformers() {
    let goldens = goldens();
    assert!(goldens.cases.len() > 100);
    let mut wrong = Vec::new();
    for case in &goldens.cases {
        let (max, mean) = case.differences(&preprocess(&goldens, &case.config));
        println!("{:40} max {max:3}  mean {mean:.4}", case.expected);
        if if case.lossy { mean > 0.5 } else { max > 1 } {
            wrong.push(format!("{}: max {max}, mean {mean:.4}", case.expected));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn normalised_values_are_those_of_transformers() {
    let goldens = goldens();
    for case in goldens.cases.iter().filter(|c| !c.lossy) {
        let p = preprocess(&goldens, &case.config);
        let image = open(&source(&case.source), &case.options()).unwrap();
        let found = p.apply(&image).unwrap();
        let step = if p.do_rescale { 1.0 / 255.0 } else { 1.0 };
        let smallest = if p.do_normalize { p.std.into_iter().fold(1.0, f32::min) } else { 1.0 };
        for (at, expected) in &case.values {
            let off = (found[*at] - expected).abs();
            assert!(off <= step / smallest * 1.001, "{} at {at}: {} for {expected}", case.expected, found[*at]);
        }
    }
}

#[test]
fn sixteen_bits_become_eight_by_dropping_the_low_ones() {
    let options = DecodeOptions::default();
    let (found, expected) = (open(&source("grey-16.png"), &options).unwrap(), open(&source("rgb.png"), &options).unwrap());
    assert!(found.pixels().zip(expected.pixels()).all(|(f, e)| f.0 == [e.0[0]; 3]));
    assert_eq!(open(&source("grey-16.tif"), &options).unwrap(), open(&source("grey.tif"), &options).unwrap());
}

#[test]
fn alpha_is_kept_for_later_backgrounds() {
    let options = DecodeOptions::default();
    for name in ["rgba.png", "palette-key.png", "key.gif", "rgba-16.png", "grey-alpha.png", "lossless-alpha.webp", "rgba.tif"] {
        let bytes = std::fs::read(source(name)).unwrap();
        let (rgba, rgb) = (decode_rgba(name, &bytes, &options).unwrap(), decode(name, &bytes, &options).unwrap());
        assert!(rgba.pixels().any(|p| p.0[3] < 255), "{name}");
        assert!(rgba.pixels().zip(rgb.pixels()).all(|(a, b)| a.0[..3] == b.0), "{name}");
    }
    let bytes = std::fs::read(source("exif-6.png")).unwrap();
    assert_eq!(decode_rgba("x", &bytes, &options).unwrap().dimensions(), (23, 31));
}

#[test]
fn every_source_has_a_listed_extension() {
    for entry in std::fs::read_dir(data().join("sources")).unwrap() {
        let path = entry.unwrap().path();
        assert!(EXTENSIONS.contains(&path.extension().unwrap().to_str().unwrap()), "{}", path.display());
    }
}

/// The message for these bytes, which has to name the file.
fn refused(bytes: &[u8]) -> String {
    let error = decode("some/cat.png", bytes, &DecodeOptions::default()).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let message = error.to_string();
    assert!(message.starts_with("some/cat.png: "), "{message}");
    message
}

#[test]
fn truncated_files_of_every_format_are_refused() {
    for name in [
        "rgb.png",
        "420.jpg",
        "progressive.jpg",
        "turned.jpg",
        "lossless.webp",
        "lossy.webp",
        "palette.gif",
        "rgb.bmp",
        "raw.tiff",
        "palette.tif",
        "cmyk.tif",
    ] {
        let bytes = std::fs::read(source(name)).unwrap();
        for percent in [1, 10, 50, 90, 99] {
            let message = refused(&bytes[..bytes.len() * percent / 100]);
            assert!(message.contains("truncated") || message.contains("not an image"), "{name} at {percent} %: {message}");
        }
    }
}

#[test]
fn what_is_no_image_is_refused() {
    assert!(refused(b"").contains("empty"));
    assert!(refused(b"A text that somebody saved as cat.png").contains("not an image"));
    assert!(refused(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf").contains("not supported"));
}

/// A PNG's signature and header.
fn png_header(width: u32, height: u32) -> Vec<u8> {
    let mut head = b"IHDR".to_vec();
    head.extend(width.to_be_bytes());
    head.extend(height.to_be_bytes());
    head.extend([8, 2, 0, 0, 0]);
    let mut bytes = b"\x89PNG\r\n\x1a\n\0\0\0\x0d".to_vec();
    bytes.extend(&head);
    bytes.extend(crc(&head).to_be_bytes());
    // An empty data chunk: decoders look no further before they know the size.
    bytes.extend(b"\0\0\0\0IDAT\x35\xaf\x06\x1e");
    bytes
}

fn crc(bytes: &[u8]) -> u32 {
    !bytes
        .iter()
        .fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |c, _| if c & 1 == 1 { c >> 1 ^ 0xEDB8_8320 } else { c >> 1 }))
}

#[test]
fn sizes_are_checked_before_anything_is_decoded() {
    let message = refused(&png_header(100_000, 100_000));
    assert!(message.contains("100000×100000") && message.contains("100 megapixels"), "{message}");
    assert!(refused(&png_header(90_000_000, 1)).contains("too thin"));
    refused(&png_header(0, 10));
    refused(&png_header(i32::MAX as u32, i32::MAX as u32));

    let mut jpeg = std::fs::read(source("grey.jpg")).unwrap();
    let frame = jpeg.windows(2).position(|w| w == [0xFF, 0xC0]).unwrap();
    jpeg[frame + 5..frame + 9].fill(0xFF);
    assert!(refused(&jpeg).contains("65535×65535"));
    let mut gif = std::fs::read(source("palette.gif")).unwrap();
    gif[6..10].fill(0xFF);
    assert!(refused(&gif).contains("65535×65535"));
    gif[6..10].fill(0);
    assert!(refused(&gif).contains("0×0"));

    let small = DecodeOptions { max_pixels: 100, ..DecodeOptions::default() };
    assert!(open(&source("rgb.png"), &small).unwrap_err().to_string().contains("rgb.png: 31×23"));
}

#[test]
fn what_is_no_file_is_refused() {
    let options = DecodeOptions::default();
    assert!(open(&data(), &options).unwrap_err().to_string().contains("expected a file"));
    assert!(open(&data().join("missing.png"), &options).unwrap_err().to_string().contains("no such file"));
}

/// Pixels as they stand in the file, which is what Pillow 12 makes of them: `Image.open(f).convert("RGB")`.
#[test]
fn pnm_is_read_in_each_of_its_forms() {
    let values: Vec<u8> = (0..12).map(|i| (i * 37 + 11) as u8).collect();
    let grey: Vec<u8> = values[..4].iter().flat_map(|v| [*v; 3]).collect();
    let plain = |v: &[u8]| v.iter().map(u8::to_string).collect::<Vec<_>>().join(" ").into_bytes();
    let bits: Vec<u8> = [0u8, 255, 255, 0].iter().flat_map(|v| [*v; 3]).collect();
    let wide: Vec<u8> = values.iter().flat_map(|v| [*v, *v]).collect();
    for (header, data, expected) in [
        ("P6\n2 2\n255\n", values.clone(), &values),
        ("P6 # a comment 7\n2 2 255\n", values.clone(), &values),
        ("P6\n2 2\n65535\n", wide, &values),
        ("P3\n# 1 2 3\n2 2\n255\n", plain(&values), &values),
        ("P5\n2 2\n255\n", values[..4].to_vec(), &grey),
        ("P2\n2 2\n255\n", plain(&values[..4]), &grey),
        ("P4\n2 2\n", vec![0b1000_0000, 0b0100_0000], &bits),
        ("P1\n2 2\n", b"1 0 0 1".to_vec(), &bits),
    ] {
        let found = decode(header, &[header.as_bytes(), &data].concat(), &DecodeOptions::default()).unwrap();
        assert_eq!(found.as_raw(), expected, "{header}");
    }
    for (header, part) in [("P6\n2 2\n100\n", "found 100"), ("P5\n2 2\n1023\n", "found 1023"), ("P7\nWIDTH 2\n", "PAM images")] {
        let message = decode("x.ppm", &[header.as_bytes(), &values].concat(), &DecodeOptions::default()).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
}

/// Whatever the file is called: a phone's HEIC under `.jpg` is a HEIC.
#[test]
fn formats_that_cannot_be_read_are_called_by_their_names() {
    for (bytes, name) in [
        (&b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"[..], "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", "AVIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"8BPS\0\x01", "Photoshop"),
    ] {
        let error = decode("photo.jpg", bytes, &DecodeOptions::default()).unwrap_err();
        let message = error.to_string();
        assert!(
            message.contains(&format!("{name} images are not supported")) && message.contains("convert them to JPEG or PNG"),
            "{message}"
        );
        assert_eq!(error.exit_code(), 2);
    }
}
