//! WebDataset's tars: members that lead elsewhere, links, devices, sizes that are not there.

use std::fs::File;
use std::path::Path;

use peft::data::{ClassList, DataConfig, Paths, Split, WebDatasetConfig};
use peft::{Error, Result};
use tar::{Builder, EntryType, Header};

use super::Expect::{Either, Fine, Refused};
use super::{Case, Expect};

type Tar = Builder<File>;

fn header(kind: EntryType, name: &[u8], size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_size(size);
    // By hand: `set_path` refuses what strangers write.
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.set_cksum();
    header
}

fn member(tar: &mut Tar, name: &str, bytes: &[u8]) {
    tar.append(&header(EntryType::Regular, name.as_bytes(), bytes.len() as u64), bytes).unwrap();
}

/// Opens `x.tar` and reads every image; exactly `rows` have to be there.
fn open(path: &Path, rows: Option<usize>) -> Result<()> {
    let classes = Some(ClassList::Names(vec!["cat".into(), "dog".into()]));
    let webdataset = WebDatasetConfig { path: Paths::One(path.display().to_string()), classes, ..Default::default() };
    let data = DataConfig { webdataset: Some(webdataset), ..Default::default() }.open(0)?;
    let all: Vec<_> = [Split::Train, Split::Val, Split::Test].into_iter().flat_map(|s| data.split(s)).collect();
    for example in all.iter().filter(|e| e.texts.is_empty()) {
        example.bytes()?;
    }
    match rows.is_none_or(|rows| rows == all.len()) {
        true => Ok(()),
        false => Err(Error::fault("x.tar", format!("{} rows: {:?}", all.len(), all.iter().map(|e| &e.id).collect::<Vec<_>>()))),
    }
}

/// A tar with one good row in front of what is put behind it.
fn case(name: impl Into<String>, expect: Expect, rows: Option<usize>, make: impl FnOnce(&mut Tar) + 'static) -> Case {
    Case::new(name, expect, move |dir| {
        let path = dir.join("x.tar");
        let mut tar = Builder::new(File::create(&path).unwrap());
        member(&mut tar, "a.txt", b"a cat");
        make(&mut tar);
        tar.into_inner().unwrap();
        let dir = dir.to_path_buf();
        Box::new(move || {
            let outcome = open(&path, rows);
            // Nothing is ever unpacked.
            assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1);
            outcome
        })
    })
}

/// The bytes of a good tar, changed.
fn bytes(name: impl Into<String>, expect: Expect, change: impl FnOnce(&mut Vec<u8>) + 'static) -> Case {
    Case::new(name, expect, move |dir| {
        let path = dir.join("x.tar");
        let mut tar = Builder::new(File::create(&path).unwrap());
        member(&mut tar, "a.txt", b"a cat");
        member(&mut tar, "b.txt", b"a dog");
        tar.into_inner().unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        change(&mut bytes);
        std::fs::write(&path, bytes).unwrap();
        Box::new(move || open(&path, None))
    })
}

const KINDS: [(EntryType, &str); 7] = [
    (EntryType::Symlink, "a symbolic link"),
    (EntryType::Link, "a hard link"),
    (EntryType::Char, "a character device"),
    (EntryType::Block, "a block device"),
    (EntryType::Fifo, "a pipe"),
    (EntryType::Directory, "a directory"),
    (EntryType::Continuous, "contiguous"),
];

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = vec![case("as it should be", Fine, Some(2), |tar| member(tar, "b.txt", b"a dog"))];
    for (kind, what) in KINDS {
        for target in ["a.txt", "/etc/passwd", "../../etc/passwd", "/dev/zero", ""] {
            cases.push(case(format!("{what} to {target:?}"), Fine, Some(1), move |tar| {
                let mut header = header(kind, b"z.png", 0);
                header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
                header.set_cksum();
                tar.append(&header, std::io::empty()).unwrap();
            }));
        }
        cases.push(case(format!("{what} of a terabyte"), Either, None, move |tar| {
            tar.append(&header(kind, b"z.png", 1 << 40), std::io::empty()).unwrap();
        }));
    }
    for name in ["../z.txt", "/z.txt", "/etc/z.txt", "b/../z.txt", "..", ".", "z", ".txt", "b/.txt", "", "../../../../root/.ssh/z.txt"] {
        cases.push(case(format!("a member called {name:?}"), Fine, Some(1), move |tar| member(tar, name, b"x")));
    }
    for name in [&b"\xff\xfe.txt"[..], b"c:\\z.txt", b"\x1b[2J.txt", b"-rf.txt", "\u{202e}z.txt".as_bytes()] {
        let title = String::from_utf8_lossy(name).into_owned();
        cases.push(case(format!("a member called {title:?}"), Fine, Some(2), move |tar| {
            tar.append(&header(EntryType::Regular, name, 1), &b"x"[..]).unwrap();
        }));
    }
    cases.extend(contents());
    cases.extend(sizes());
    for cut in (0..3072).step_by(256) {
        // Between members, in what fills up a block, and behind the last one nothing is missing.
        let within = cut % 1024 < 512 + "a cat".len() && cut % 1024 > 0 && cut < 2048;
        let expect = if within || cut == 0 { Refused("x.tar") } else { Either };
        cases.push(bytes(format!("cut at {cut}"), expect, move |b| b.truncate(cut)));
    }
    for at in [0, 100, 124, 130, 135, 136, 148, 156, 257, 329, 345, 483] {
        for value in [0, b'7', 0x80, 0xff] {
            cases.push(bytes(format!("byte {at} is {value}"), Either, move |b| {
                b[at] = value;
                checksum(&mut b[..512]);
            }));
        }
        cases.push(bytes(format!("another byte {at}, the checksum as before"), Either, move |b| b[at] ^= 0x55));
    }
    cases
}

fn checksum(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// Members that do not say what their name promises.
fn contents() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, content, part) in [
        ("b.txt", b"\xff\xfe".to_vec(), "UTF-8"),
        ("b.cls", b"7".to_vec(), "from 0 to 1"),
        ("b.cls", b"fox".to_vec(), "fox"),
        ("b.cls", b"-1".to_vec(), "neither an image nor a text"),
        ("b.01.png", b"x".to_vec(), "first dot"),
        ("b.heic", b"x".to_vec(), "a format that is not read"),
        ("b.txt", "a cat".encode_utf16().flat_map(u16::to_le_bytes).collect(), "UTF-16"),
        ("b.cls", b"99999999999999999999".to_vec(), "99999"),
        ("b.json", b"{".to_vec(), "JSON"),
        ("b.json", b"[1]".to_vec(), "object"),
        ("b.json", b"{\"value\": 1e400}".to_vec(), "JSON"),
        ("b.json", b"".to_vec(), "JSON"),
        ("b.json", "[".repeat(1 << 20).into_bytes(), "JSON"),
        ("b.json", format!("{{\"x\": [{}0]}}", "0,".repeat(2 << 20)).into_bytes(), "values"),
        ("b.txt", vec![b'x'; 17 << 20], "expected at most"),
        ("b.xyz", b"?".to_vec(), "neither an image nor a text"),
    ] {
        let title = format!("{name}: {}", String::from_utf8_lossy(&content[..content.len().min(20)]));
        cases.push(case(title, Refused(part), None, move |tar| member(tar, name, &content)));
    }
    cases.push(case("a member twice", Refused("twice"), None, |tar| {
        member(tar, "b.txt", b"x");
        member(tar, "b.txt", b"y");
    }));
    for (name, start) in [("x.tar.gz", &b"\x1f\x8b"[..]), ("x.tgz", b"\x1f\x8b"), ("x.tar.zst", b"\x28\xb5\x2f\xfd"), ("x.tar.bz2", b"BZh")]
    {
        cases.push(Case::new(name, Refused("compressed"), move |dir| {
            let path = dir.join(name);
            std::fs::write(&path, start).unwrap();
            Box::new(move || open(&path, None))
        }));
    }
    cases.push(Case::new("gzip called tar", Refused("x.tar"), |dir| {
        let path = dir.join("x.tar");
        std::fs::write(&path, [b"\x1f\x8b\x08\0".repeat(200)].concat()).unwrap();
        Box::new(move || open(&path, None))
    }));
    for (name, size) in [("empty", 0), ("zeros", 10240), ("a terabyte of nothing", 1 << 40)] {
        cases.push(Case::new(name, Refused("x.tar"), move |dir| {
            let path = dir.join("x.tar");
            File::create(&path).unwrap().set_len(size).unwrap();
            Box::new(move || open(&path, None))
        }));
    }
    cases
}

/// Sizes that members state and do not have, and names that are longer than any.
fn sizes() -> Vec<Case> {
    let mut cases = Vec::new();
    for size in [4096, 1 << 32, 1 << 40, (1 << 63) - 1, u64::MAX] {
        cases.push(case(format!("a member of {size} bytes that are not there"), Refused("x.tar"), None, move |tar| {
            let mut header = header(EntryType::Regular, b"z.txt", 0);
            header.set_size(size);
            header.set_cksum();
            tar.get_mut().write_all(header.as_bytes()).unwrap();
            tar.get_mut().set_len(4096).unwrap();
        }));
    }
    use std::io::{Seek, SeekFrom, Write};
    // Sparse files: nothing of it is on the disk.
    let mut long = |name: &str, kind: EntryType, size: u64, part: &'static str| {
        cases.push(case(format!("{name} of {size} bytes"), Refused(part), None, move |tar| {
            tar.get_mut().write_all(header(kind, b"././@LongLink", size).as_bytes()).unwrap();
            let end = tar.get_mut().stream_position().unwrap() + size.div_ceil(512) * 512;
            tar.get_mut().seek(SeekFrom::Start(end)).unwrap();
            member(tar, "z.txt", b"x");
        }));
    };
    for size in [2 << 20, 300 << 20, 100 << 30] {
        long("a name", EntryType::GNULongName, size, "expected at most 1048576");
        long("a link's name", EntryType::GNULongLink, size, "expected at most 1048576");
        long("PAX records", EntryType::XHeader, size, "expected at most 1048576");
        long("PAX records of all", EntryType::XGlobalHeader, size, "expected at most 1048576");
    }
    let pax = |name: &str, expect, text: &'static str| {
        case(format!("PAX: {name}"), expect, None, move |tar| {
            tar.append(&header(EntryType::XHeader, b"pax", text.len() as u64), text.as_bytes()).unwrap();
            member(tar, "z.txt", b"x");
        })
    };
    cases.extend([
        pax("a size of an exabyte", Refused("x.tar"), "28 size=1152921504606846976\n"),
        pax("a size that is none", Either, "12 size=abc\n"),
        pax("a negative size", Either, "11 size=-1\n"),
        pax("a path that leads out", Fine, "26 path=../../etc/z.txt\n\n\n\n"),
        pax("a length that lies", Either, "99 path=z.txt\n"),
        pax("no length", Either, "path=z.txt\n"),
        pax("an empty key", Either, "5 =x\n"),
    ]);
    cases.push(case("an image of 300 MiB", Refused("expected at most"), None, |tar| {
        tar.get_mut().write_all(header(EntryType::Regular, b"z.png", 300 << 20).as_bytes()).unwrap();
        let end = tar.get_mut().stream_position().unwrap() + (300 << 20);
        tar.get_mut().seek(SeekFrom::Start(end)).unwrap();
        member(tar, "zz.txt", b"x");
    }));
    cases
}
