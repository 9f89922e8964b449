//! Images: cut, changed, huge, animated, built to be slow, and what is none.

use std::io::Write;
use std::path::PathBuf;

use peft::clip::decode::{DecodeOptions, decode, open};

use super::Expect::{Either, Fine, Refused};
use super::{Case, Expect};

/// A megapixel is enough for what is small; what asks for more must be refused before it is decoded.
const OPTIONS: fn() -> DecodeOptions = || DecodeOptions { max_pixels: 1 << 20, ..DecodeOptions::default() };

fn source(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/images/sources").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn case(name: impl Into<String>, expect: Expect, bytes: Vec<u8>) -> Case {
    with(name, expect, OPTIONS(), move || bytes)
}

fn with(name: impl Into<String>, expect: Expect, options: DecodeOptions, bytes: impl FnOnce() -> Vec<u8> + 'static) -> Case {
    Case::new(name, expect, move |_| {
        let bytes = bytes();
        Box::new(move || decode("cat.png", &bytes, &options).map(drop))
    })
}

/// One of each format and kind.
const SOURCES: [&str; 16] = [
    "rgb.png",
    "interlaced.png",
    "palette.png",
    "animated.png",
    "420.jpg",
    "progressive.jpg",
    "cmyk.jpg",
    "lossless.webp",
    "lossy.webp",
    "animated.webp",
    "palette.gif",
    "animated.gif",
    "rgb.bmp",
    "raw.tiff",
    "packbits.tiff",
    "palette.tif",
];

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for name in SOURCES {
        let whole = source(name);
        for percent in [5, 50, 95] {
            let part = whole[..whole.len() * percent / 100].to_vec();
            // What follows an animation's first image is not needed.
            let expect = if name.starts_with("animated") { Either } else { Refused("cat.png") };
            cases.push(case(format!("{name} cut at {percent} %"), expect, part));
        }
        // Sizes, offsets and tables stand in front.
        for at in (4..64).step_by(5) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0xff;
            cases.push(case(format!("{name} with another byte {at}"), Either, bytes));
        }
        let renamed = whole.clone();
        cases.push(Case::new(format!("{name} under another name"), Fine, move |dir| {
            let path = dir.join("cat.jpg.txt");
            std::fs::write(&path, renamed).unwrap();
            Box::new(move || open(&path, &OPTIONS()).map(drop))
        }));
    }
    cases.extend(huge());
    cases.extend(limits());
    cases.extend(others());
    cases.push(case("a thousand scans", Either, scans(1000)));
    cases.push(case("ten thousand comments", Fine, comments(10_000)));
    cases.push(with("a colour profile of 400 MB", Either, OPTIONS(), || png(4, 4, &[(b"iCCP", profile(b"x\0\0", 400))])));
    cases.push(with("a text of 400 MB", Either, OPTIONS(), || png(4, 4, &[(b"zTXt", profile(b"x\0\0", 400))])));
    cases.push(with("pixels of 400 MB in a small image", Either, OPTIONS(), || {
        let mut bytes = head(4, 4, 6);
        chunk(&mut bytes, b"IDAT", &zeros(400));
        chunk(&mut bytes, b"IEND", b"");
        bytes
    }));
    cases
}

fn limits() -> Vec<Case> {
    let mut cases = Vec::new();
    for name in ["rgb.png", "420.jpg", "lossless.webp", "palette.gif", "rgb.bmp", "raw.tiff", "cmyk.tif"] {
        let few = DecodeOptions { max_pixels: 100, ..DecodeOptions::default() };
        cases.push(with(format!("{name}: more pixels than allowed"), Refused("more than the limit"), few, move || source(name)));
        let small = DecodeOptions { max_bytes: 100, ..DecodeOptions::default() };
        cases.push(with(format!("{name}: more bytes than allowed"), Refused("expected at most 100"), small, move || source(name)));
        cases.push(Case::new(format!("{name}: a larger file than allowed"), Refused("expected at most 100"), move |dir| {
            let path = dir.join(name);
            std::fs::write(&path, source(name)).unwrap();
            Box::new(move || open(&path, &DecodeOptions { max_bytes: 100, ..DecodeOptions::default() }).map(drop))
        }));
        let soon = DecodeOptions { max_seconds: 0.0, ..DecodeOptions::default() };
        cases.push(with(format!("{name}: no time"), Refused("took more than 0 seconds"), soon, move || source(name)));
    }
    cases.push(Case::new("a file of a terabyte", Refused("expected at most 268435456"), |dir| {
        let path = dir.join("x.png");
        std::fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
        Box::new(move || open(&path, &DecodeOptions::default()).map(drop))
    }));
    cases
}

/// 100 000 × 100 000 pixels, or as many as the format can say, in a few hundred bytes.
fn huge() -> Vec<Case> {
    let mut cases = Vec::new();
    for (width, height) in
        [(100_000, 100_000), (i32::MAX as u32, i32::MAX as u32), (90_000_000, 1), (1, 90_000_000), (0, 10), (10, 0), (10_001, 10_000)]
    {
        let full = DecodeOptions::default();
        for colour in [0, 2, 6] {
            let name = format!("PNG of {width}×{height}, colour type {colour}");
            cases.push(with(name, Refused("pixels"), full, move || {
                let mut bytes = head(width, height, colour);
                chunk(&mut bytes, b"IDAT", &zeros(1));
                chunk(&mut bytes, b"IEND", b"");
                bytes
            }));
        }
        let (width, height) = (width.to_le_bytes(), height.to_le_bytes());
        cases.push(with(format!("BMP of {width:?}×{height:?}"), Refused("cat.png"), full, move || {
            let mut bytes = source("rgb.bmp");
            bytes[18..22].copy_from_slice(&width);
            bytes[22..26].copy_from_slice(&height);
            bytes
        }));
        cases.push(with(format!("TIFF of {width:?}×{height:?}"), Refused("cat.png"), full, move || tiff(&width, &height)));
    }
    cases.push(with("GIF of 65535×65535", Refused("65535×65535"), DecodeOptions::default(), || {
        let mut bytes = source("palette.gif");
        bytes[6..10].fill(0xff);
        bytes
    }));
    cases.push(with("JPEG of 65535×65535", Refused("65535×65535"), DecodeOptions::default(), || {
        let mut bytes = source("420.jpg");
        let frame = bytes.windows(2).position(|w| w == [0xff, 0xc0]).unwrap();
        bytes[frame + 5..frame + 9].fill(0xff);
        bytes
    }));
    for (name, at) in [("lossless.webp", 21), ("lossy.webp", 26), ("lossless-alpha.webp", 24)] {
        cases.push(case(format!("{name} of the largest size"), Either, {
            let mut bytes = source(name);
            bytes[at..at + 6].fill(0xff);
            bytes
        }));
    }
    cases
}

/// A TIFF's directory of width, height and little else.
fn tiff(width: &[u8; 4], height: &[u8; 4]) -> Vec<u8> {
    let mut bytes = b"II*\0\x08\0\0\0".to_vec();
    let entry = |tag: u16, value: &[u8; 4]| [&tag.to_le_bytes()[..], &4u16.to_le_bytes(), &1u32.to_le_bytes(), value].concat();
    let entries = [
        (256, *width),
        (257, *height),
        (258, [8, 0, 0, 0]),
        (259, [1, 0, 0, 0]),
        (262, [1, 0, 0, 0]),
        (273, [8, 0, 0, 0]),
        (277, [1, 0, 0, 0]),
        (278, *height),
        (279, [9, 0, 0, 0]),
    ];
    bytes.extend((entries.len() as u16).to_le_bytes());
    entries.iter().for_each(|(tag, value)| bytes.extend(entry(*tag, value)));
    bytes.extend([0; 4]);
    bytes
}

/// What browsers, shells and programs read, but no CLIP.
fn others() -> Vec<Case> {
    let all: [(&str, &[u8]); 16] = [
        ("empty", b""),
        ("a byte", b"\x89"),
        ("a text", b"A text that somebody saved as cat.png"),
        ("SVG", b"<svg xmlns=\"x\"></svg>"),
        ("HTML", b"<!doctype html><p>404"),
        ("PDF", b"%PDF-1.7\n"),
        ("zip", b"PK\x03\x04\x14\0\0\0\x08\0"),
        ("gzip", b"\x1f\x8b\x08\0\0\0"),
        ("AVIF", b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf"),
        ("HEIC", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
        ("icon", b"\0\0\x01\0\x01\0"),
        ("Photoshop", b"8BPS\0\x01\0\0"),
        ("OpenEXR", b"\x76\x2f\x31\x01\x02\0\0\0"),
        ("HDR", b"#?RADIANCE\n"),
        ("JPEG 2000", b"\0\0\0\x0cjP  \r\n"),
        ("a script", b"#!/bin/sh\nrm -rf ~\n"),
    ];
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n".to_vec();
    let known = all.map(|(name, bytes)| case(name, Refused("cat.png"), bytes.to_vec()));
    known.into_iter().chain([case("a pointer of git-lfs", Refused("not an image"), pointer)]).collect()
}

/// The scan of a progressive JPEG again and again: each goes over the whole image.
fn scans(count: usize) -> Vec<u8> {
    let bytes = source("progressive.jpg");
    let starts: Vec<usize> = (0..bytes.len() - 1).filter(|i| bytes[*i..*i + 2] == [0xff, 0xda]).collect();
    let (last, end) = (*starts.last().unwrap(), bytes.len() - 2);
    [&bytes[..end], &bytes[last..end].repeat(count), &bytes[end..]].concat()
}

fn comments(count: usize) -> Vec<u8> {
    let bytes = source("420.jpg");
    [&bytes[..2], &b"\xff\xfe\0\x04hi".repeat(count), &bytes[2..]].concat()
}

fn chunk(png: &mut Vec<u8>, kind: &[u8; 4], data: &[u8]) {
    let mut crc = flate2::Crc::new();
    crc.update(kind);
    crc.update(data);
    png.extend((data.len() as u32).to_be_bytes());
    png.extend(kind);
    png.extend(data);
    png.extend(crc.sum().to_be_bytes());
}

/// Signature and header of eight bits a sample.
fn head(width: u32, height: u32, colour: u8) -> Vec<u8> {
    let mut bytes = b"\x89PNG\r\n\x1a\n".to_vec();
    chunk(&mut bytes, b"IHDR", &[&width.to_be_bytes()[..], &height.to_be_bytes(), &[8, colour, 0, 0, 0]].concat());
    bytes
}

fn png(width: u32, height: u32, before: &[(&[u8; 4], Vec<u8>)]) -> Vec<u8> {
    let mut bytes = head(width, height, 2);
    before.iter().for_each(|(kind, data)| chunk(&mut bytes, kind, data));
    let mut rows = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    rows.write_all(&vec![0; (height * (3 * width + 1)) as usize]).unwrap();
    chunk(&mut bytes, b"IDAT", &rows.finish().unwrap());
    chunk(&mut bytes, b"IEND", b"");
    bytes
}

fn profile(name: &[u8], megabytes: usize) -> Vec<u8> {
    [name, &zeros(megabytes)].concat()
}

/// So many MB of zeros, deflated.
fn zeros(megabytes: usize) -> Vec<u8> {
    let mut out = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    let block = vec![0; 1 << 20];
    (0..megabytes).for_each(|_| out.write_all(&block).unwrap());
    out.finish().unwrap()
}
