//! Weights: safetensors, and PyTorch's zip archives of a pickle and raw storages.

use std::collections::HashMap;
use std::io::{Cursor, Write};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use peft::clip::model::random_weights;
use peft::clip::source::Source;
use peft::clip::{ClipConfig, weights};
use zip::CompressionMethod;

use super::Expect::{Either, Fine, Refused};
use super::{Case, Expect, ODD, Read};

const CONFIG: &[u8] = br#"{"projection_dim": 8, "text_config": {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 6, "vocab_size": 20}, "vision_config": {"hidden_size": 12,
    "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}}"#;

/// Two tensors, 20 bytes.
const HEADER: &str = r#"{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[1],"data_offsets":[16,20]}}"#;

fn file(header: &[u8], data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header, &vec![0; data]].concat()
}

fn header(name: impl Into<String>, header: impl Into<Vec<u8>>, expect: Expect) -> Case {
    bytes(name, file(&header.into(), 20), expect)
}

fn bytes(name: impl Into<String>, bytes: Vec<u8>, expect: Expect) -> Case {
    Case::new(name, expect, move |_| Box::new(move || weights::read_safetensors("x.safetensors", &bytes).map(drop)))
}

/// A base's weights in a file of this name.
fn base(name: impl Into<String>, expect: Expect, file: &'static str, content: impl FnOnce() -> Vec<u8> + 'static) -> Case {
    Case::new(name, expect, move |dir| {
        std::fs::write(dir.join(file), content()).unwrap();
        load(dir)
    })
}

fn load(dir: &Path) -> Read {
    let source = Source::Dir(dir.to_path_buf());
    Box::new(move || weights::load(&source, &ClipConfig::from_json("config.json", CONFIG)?).map(drop))
}

pub(crate) fn safetensors() -> Vec<Case> {
    let whole = file(HEADER.as_bytes(), 20);
    let mut cases = vec![bytes("as it should be", whole.clone(), Fine)];
    for cut in [0, 1, 7, 8, 9, 60, 8 + HEADER.len(), whole.len() - 1] {
        cases.push(bytes(format!("cut at {cut}"), whole[..cut].to_vec(), Refused("safetensors file")));
    }
    for length in [0, 1, HEADER.len() as u64 - 1, HEADER.len() as u64 + 1, 100_000_001, 1 << 32, 1 << 63, u64::MAX] {
        let mut wrong = whole.clone();
        wrong[..8].copy_from_slice(&length.to_le_bytes());
        cases.push(bytes(format!("header of {length} bytes"), wrong, Refused("safetensors file")));
    }
    for (field, good) in [("dtype", "\"F32\""), ("shape", "[2,2]"), ("data_offsets", "[0,16]")] {
        for odd in ODD.iter().chain(&["null", "[-1]", "[1.5]", "[1e30]", "[18446744073709551616]", "[\"a\"]", "[0]", "\"F16\""]) {
            let wrong = HEADER.replacen(&format!("\"{field}\":{good}"), &format!("\"{field}\":{odd}"), 1);
            cases.push(header(format!("{field}: {odd}"), wrong, Refused("x.safetensors")));
        }
    }
    for offsets in
        ["[8,24]", "[4,20]", "[0,12]", "[16,0]", "[0,9223372036854775808]", "[9223372036854775807,9223372036854775823]", "[20,36]"]
    {
        cases.push(header(format!("offsets {offsets}"), HEADER.replacen("[0,16]", offsets, 1), Refused("tensor `")));
    }
    for shape in ["[4294967296,4294967296]", "[9223372036854775808,2]", "[0]", "[2,2,1,2]", "[5]", "[0,18446744073709551615]"] {
        cases.push(header(format!("shape {shape}"), HEADER.replacen("[2,2]", shape, 1), Refused("tensor `a`")));
    }
    for dtype in ["F8_E4M3", "F8_E5M2", "I8", "U16", "U64", "C64", "F4", "", "f32", "BOOL", "F64"] {
        cases.push(header(format!("type {dtype}"), HEADER.replacen("F32", dtype, 1), Refused("`a`")));
    }
    let twice = HEADER.replacen("\"b\"", "\"a\"", 1);
    cases.push(header("a name twice", twice, Refused("occurs twice")));
    cases.push(header("a field twice", HEADER.replacen("\"dtype\"", "\"dtype\":\"F32\",\"dtype\"", 1), Refused("`dtype` occurs twice")));
    cases.push(header("an unknown field", HEADER.replacen("\"dtype\"", "\"x\":1,\"dtype\"", 1), Refused("unknown field")));
    cases.push(header("metadata that is no text", HEADER.replacen('{', "{\"__metadata__\":{\"a\":1},", 1), Refused("header")));
    cases.push(header("text behind the header", format!("{HEADER}x"), Refused("header")));
    cases.push(header("spaces behind the header", format!("{HEADER}     "), Fine));
    cases.push(header("no object", "[]", Refused("header")));
    cases.push(header("deep", "[".repeat(100_000), Refused("header")));
    cases.push(header("deep in a tensor", HEADER.replacen("[2,2]", &"[".repeat(100_000), 1), Refused("header")));
    cases.push(header("not UTF-8", b"{\"\xff\":1}".to_vec(), Refused("header")));
    cases.push(header("no tensors and 20 bytes", "{}", Refused("left over")));
    cases.push(Case::new("a million tensors", Refused("more than 1048576 values"), |_| {
        let one = |i: usize| format!("\"{i}\":{{\"dtype\":\"\",\"shape\":[],\"data_offsets\":[0,0]}}");
        let bytes = file(format!("{{{}}}", (0..300_000).map(one).collect::<Vec<_>>().join(",")).as_bytes(), 0);
        Box::new(move || weights::read_safetensors("x.safetensors", &bytes).map(drop))
    }));
    cases.push(header("a shape of many zeros", HEADER.replacen("[2,2]", &format!("[{}0]", "0,".repeat(2 << 20)), 1), Refused("values")));
    cases.extend(values());
    cases
}

fn tensors() -> HashMap<String, Tensor> {
    random_weights(&ClipConfig::from_json("config.json", CONFIG).unwrap(), 0, &Device::Cpu).unwrap()
}

/// A base whose weights were changed.
fn changed(name: impl Into<String>, expect: Expect, change: impl FnOnce(&mut HashMap<String, Tensor>) + 'static) -> Case {
    Case::new(name, expect, move |dir| {
        let mut all = tensors();
        change(&mut all);
        weights::save(&dir.join("model.safetensors"), &all.into_iter().collect::<Vec<_>>()).unwrap();
        load(dir)
    })
}

/// Weights that are no numbers, of another type or shape, missing, twice.
fn values() -> Vec<Case> {
    const NAME: &str = "text_model.encoder.layers.0.mlp.fc1.weight";
    let mut cases = vec![changed("a whole base", Fine, |_| ())];
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            cases.push(changed(format!("{value} in {}", dtype.as_str()), Refused(NAME), move |all| {
                let mut numbers = vec![0.0; 16 * 8];
                numbers[77] = value;
                all.insert(NAME.into(), Tensor::from_vec(numbers, (16, 8), &Device::Cpu).unwrap().to_dtype(dtype).unwrap());
            }));
        }
    }
    for dtype in [DType::U8, DType::U32, DType::I64] {
        let name = format!("weights of type {}", dtype.as_str());
        cases.push(changed(name, Refused(NAME), move |all| {
            _ = all.insert(NAME.into(), Tensor::zeros((16, 8), dtype, &Device::Cpu).unwrap())
        }));
    }
    for shape in [vec![8, 16], vec![128], vec![16, 8, 1], vec![0], vec![16, 7], vec![]] {
        cases.push(changed(format!("shape {shape:?}"), Refused("misshapen"), move |all| {
            all.insert(NAME.into(), Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap());
        }));
    }
    cases.push(changed("a tensor less", Refused(NAME), |all| _ = all.remove(NAME)));
    for (odd, expect) in [
        ("", Fine),
        ("x", Fine),
        ("../x", Fine),
        ("a\0b", Fine),
        ("\u{202e}thgiew", Fine),
        ("text_model.encoder.layers.99.mlp.fc1.weight", Refused("unexpected")),
        ("text_model..fc1", Refused("unexpected")),
    ] {
        cases.push(changed(format!("a tensor called {odd:?}"), expect, move |all| {
            all.insert(odd.into(), Tensor::zeros(2, DType::F32, &Device::Cpu).unwrap());
        }));
    }
    for (name, index) in [
        ("no map", "{}"),
        ("no files", r#"{"weight_map": {}}"#),
        ("a number", r#"{"weight_map": {"a": 1}}"#),
        ("above", r#"{"weight_map": {"a": "../x.safetensors"}}"#),
        ("absolute", r#"{"weight_map": {"a": "/etc/passwd"}}"#),
        ("hidden", r#"{"weight_map": {"a": ".x.safetensors"}}"#),
        ("another drive", r#"{"weight_map": {"a": "c:x.safetensors"}}"#),
        ("another kind", r#"{"weight_map": {"a": "x.bin"}}"#),
        ("missing", r#"{"weight_map": {"a": "x.safetensors"}}"#),
    ] {
        let make = move || index.as_bytes().to_vec();
        cases.push(base(format!("index: {name}"), Refused("index.json"), "model.safetensors.index.json", make));
    }
    cases
}

/// An archive as PyTorch's, around a pickle and one storage.
fn archive(pickle: &[u8], storage: usize) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, bytes) in [("archive/data.pkl", pickle), ("archive/data/0", &vec![0u8; storage])] {
        zip.start_file(name, options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn tuple(sizes: &[i32]) -> Vec<u8> {
    [b"(".to_vec(), sizes.iter().flat_map(|n| [&b"J"[..], &n.to_le_bytes()].concat()).collect(), b"t".to_vec()].concat()
}

/// What leaves a tensor on the stack.
fn tensor(key: &str, offset: i32, shape: &[i32], strides: &[i32]) -> Vec<u8> {
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n".to_vec(),
        text(key),
        b"X\x03\0\0\0cpuK\x04tQ".to_vec(),
        [&b"J"[..], &offset.to_le_bytes()].concat(),
        tuple(shape),
        tuple(strides),
        b"\x89ccollections\nOrderedDict\n)RtR".to_vec(),
    ]
    .concat()
}

fn text(text: &str) -> Vec<u8> {
    [b"X".to_vec(), (text.len() as u32).to_le_bytes().to_vec(), text.as_bytes().to_vec()].concat()
}

/// `{"w": tensor}`.
fn state(tensor: &[u8]) -> Vec<u8> {
    [b"\x80\x02}X\x01\0\0\0w", tensor, b"s."].concat()
}

fn pickle(name: impl Into<String>, expect: Expect, pickle: Vec<u8>) -> Case {
    base(name, expect, "pytorch_model.bin", move || archive(&pickle, 16))
}

pub(crate) fn pickles() -> Vec<Case> {
    let mut cases = functions();
    // Opcodes of Python's pickle that no state dict needs.
    for op in *b"ILFSVilopgd2P" {
        cases.push(pickle(format!("opcode {}", op as char), Refused("opcode"), vec![0x80, 2, op, b'1', b'\n', b'.']));
    }
    for op in [0x82, 0x83, 0x84, 0x8b, 0x96, 0x97, 0x98, 0xff] {
        cases.push(pickle(format!("opcode 0x{op:02x}"), Refused("opcode"), vec![0x80, 2, op, 0, 0, 0, 0, b'.']));
    }
    for (offset, shape, strides) in [
        (1, &[2, 2][..], &[2, 1][..]),
        (0, &[200, 200], &[0, 0]),
        (0, &[3], &[2]),
        (i32::MAX, &[1], &[1]),
        (0, &[i32::MAX, i32::MAX], &[i32::MAX, 1]),
        (0, &[2, 2], &[i32::MAX, i32::MAX]),
        (0, &[5], &[1]),
    ] {
        cases.push(pickle(
            format!("{shape:?} from {offset} by {strides:?}"),
            Refused("outside"),
            state(&tensor("0", offset, shape, strides)),
        ));
    }
    for (name, part, tensor) in [
        ("a negative offset", "negative", tensor("0", -1, &[1], &[1])),
        ("a negative size", "negative", tensor("0", 0, &[-1], &[1])),
        ("a negative stride", "negative", tensor("0", 0, &[2], &[-1])),
        ("dimensions and strides", "more dimensions", tensor("0", 0, &[2, 2], &[1])),
        ("nine dimensions", "dimensions", tensor("0", 0, &[1; 9], &[1; 9])),
        ("no such storage", "missing", tensor("7", 0, &[1], &[1])),
        ("a storage elsewhere", "missing", tensor("../../etc/passwd", 0, &[1], &[1])),
        ("not a model", "missing", tensor("0", 0, &[2, 2], &[2, 1])),
    ] {
        cases.push(pickle(name, Refused(part), state(&tensor)));
    }
    cases.extend(bombs());
    cases.extend(archives());
    cases
}

/// A name that only attacks have; one that may stand beside weights, and is no state dict.
const ATTACK: &str = "would call";
const FOREIGN: &str = "no state dict";

/// Pickles are programs: what they may call.
fn functions() -> Vec<Case> {
    let mut cases = Vec::new();
    for (module, name, part) in [
        ("os", "system", ATTACK),
        ("posix", "system", ATTACK),
        ("nt", "system", ATTACK),
        ("os.path", "join", ATTACK),
        ("subprocess", "Popen", ATTACK),
        ("subprocess", "check_output", ATTACK),
        ("builtins", "eval", ATTACK),
        ("builtins", "exec", ATTACK),
        ("__builtin__", "eval", ATTACK),
        ("builtins", "__import__", ATTACK),
        ("importlib", "import_module", ATTACK),
        ("runpy", "run_path", ATTACK),
        ("webbrowser", "open", ATTACK),
        ("shutil", "rmtree", ATTACK),
        ("socket", "socket", ATTACK),
        ("pickle", "loads", ATTACK),
        ("torch", "load", FOREIGN),
        ("torch.hub", "load", FOREIGN),
        ("builtins", "getattr", FOREIGN),
        ("torch._utils", "_rebuild_qtensor", FOREIGN),
        ("numpy", "load", FOREIGN),
        ("numpy.core.multiarray", "_reconstruct", FOREIGN),
        ("operator", "attrgetter", FOREIGN),
        ("collections", "Counter", FOREIGN),
        ("__torch", "x", FOREIGN),
        ("torch.storage", "_load_from_bytes", FOREIGN),
        ("torch._utils._rebuild_tensor_v2", "__globals__", FOREIGN),
        ("", "", FOREIGN),
    ] {
        let named = format!("c{module}\n{name}\n(X\x02\0\0\0idtR.");
        cases.push(pickle(format!("GLOBAL {module}.{name}"), Refused(part), named.into_bytes()));
        let stacked = [text(module), text(name), b"\x93)R.".to_vec()].concat();
        cases.push(pickle(format!("STACK_GLOBAL {module}.{name}"), Refused(part), stacked));
    }
    cases
}

/// Small pickles that would be large in memory.
fn bombs() -> Vec<Case> {
    let remembered =
        |key: &str, count: usize, use_it: &[u8]| [b"\x80\x02}".to_vec(), text(key), b"q\x000".to_vec(), use_it.repeat(count)].concat();
    let one = tensor("0", 0, &[2, 2], &[2, 1]);
    let long = "x".repeat(1 << 20);
    // A name of a MiB, which 20 000 tensors have; a text that 20 000 entries hold; tensors of the whole file, 20 000 times.
    let names = [remembered(&long, 0, b""), one.clone(), b"q\x010".to_vec(), b"h\0h\x01s".repeat(20_000), b".".to_vec()].concat();
    let texts = [remembered(&long, 1, b"h\0h\0s"), b"h\0h\0s".repeat(20_000), b".".to_vec()].concat();
    let whole = tensor("0", 0, &[512, 512], &[512, 1]);
    let mut shared = [b"\x80\x02}".to_vec(), whole, b"q\x010".to_vec()].concat();
    (0..20_000).for_each(|i| shared.extend([text(&format!("t{i}")), b"h\x01s".to_vec()].concat()));
    shared.push(b'.');
    let nested = [vec![b')'], vec![0x85; 1_000_000], b".".to_vec()].concat();
    let mut objects = b"\x80\x02c__torch__.A\nB\n)\x81q\x01}".to_vec();
    objects.extend([b"(".to_vec(), text("a"), b"h\x01u".to_vec(), b"b.".to_vec()].concat());
    let cases = vec![
        pickle("a name of a MiB for 20 000 tensors", Refused("names and texts"), names),
        pickle("eight million dicts", Refused("values"), [vec![b'}'; 8 << 20], b".".to_vec()].concat()),
        pickle("eight million marks", Refused("values"), [vec![b'('; 8 << 20], b".".to_vec()].concat()),
        pickle("four million times the same", Refused("values"), [b"}q\0".to_vec(), b"h\0".repeat(4 << 20), b".".to_vec()].concat()),
        pickle("a million times remembered", Refused("values"), [b"}".to_vec(), vec![0x94; 8 << 20], b".".to_vec()].concat()),
        pickle("tuples in tuples", Refused("nested"), nested),
        pickle("an object that holds itself", Refused("nested"), objects),
        base("20 000 tensors in one storage", Refused("one storage"), "pytorch_model.bin", move || archive(&shared, 1 << 20)),
        base("a pickle of 17 MiB", Refused("larger than"), "pytorch_model.bin", || archive(&vec![b'N'; 17 << 20], 16)),
    ];
    let adapter = |name: &str, expect, pickle: Vec<u8>| {
        Case::new(name, expect, move |dir| {
            std::fs::write(dir.join("adapter_config.json"), r#"{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}"#).unwrap();
            std::fs::write(dir.join("adapter_model.bin"), archive(&pickle, 16)).unwrap();
            let dir = dir.to_path_buf();
            Box::new(move || peft::delta::Delta::read(&dir).map(drop))
        })
    };
    let itself = b"\x80\x02}q\0X\x01\0\0\0ah\0s.".to_vec();
    cases
        .into_iter()
        .chain([
            adapter("an adapter with 20 000 texts of a MiB", Refused("names and texts"), texts),
            adapter("an adapter that holds itself", Refused("nested"), itself),
            adapter("an adapter of numbers", Refused("dict of tensors"), b"\x80\x02}X\x01\0\0\0aK\x01s.".to_vec()),
            adapter("an adapter that is a list", Refused("dict of tensors"), b"\x80\x02].".to_vec()),
        ])
        .collect()
}

/// What is wrong with the zip around it.
fn archives() -> Vec<Case> {
    let good = good_archive;
    let len = good().len();
    let bin = "pytorch_model.bin";
    let mut cases = vec![base("complete, but no CLIP", Refused("missing"), bin, good)];
    for part in [0, 3, 4, 30, len / 4, len / 2, len - 23, len - 1] {
        cases.push(base(format!("cut at {part}"), Refused("PyTorch checkpoint"), bin, move || good()[..part].to_vec()));
    }
    // The method of compression, in the central directory and before each record.
    for (name, method, part) in [("deflated", 8, "compressed"), ("an unknown method", 99, "compressed"), ("bzip2", 12, "compressed")] {
        cases.push(base(name, Refused(part), bin, move || {
            let mut bytes = good();
            for at in 0..bytes.len() - 4 {
                let back = match &bytes[at..at + 4] {
                    b"PK\x03\x04" => 8,
                    b"PK\x01\x02" => 10,
                    _ => continue,
                };
                bytes[at + back] = method;
            }
            bytes
        }));
    }
    cases.push(base("the format before 1.6", Refused("no zip archive"), bin, || b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.".to_vec()));
    cases.push(base("a tar", Refused("no zip archive"), bin, || vec![0; 10240]));
    cases.push(base("big-endian", Refused("big-endian"), bin, || {
        let mut zip = zip::ZipWriter::new_append(Cursor::new(good_archive())).unwrap();
        zip.start_file("archive/byteorder", zip::write::SimpleFileOptions::default().compression_method(CompressionMethod::Stored))
            .unwrap();
        zip.write_all(b"big").unwrap();
        zip.finish().unwrap().into_inner()
    }));
    // Each byte of the directory in turn, with what breaks sizes and offsets.
    for back in 1..=120 {
        cases.push(base(format!("the byte {back} before the end"), Either, bin, move || {
            let mut bytes = good();
            let at = bytes.len() - back;
            bytes[at] = if bytes[at] == 0xff { 0x7f } else { 0xff };
            bytes
        }));
    }
    cases
}

fn good_archive() -> Vec<u8> {
    archive(&state(&tensor("0", 0, &[2, 2], &[2, 1])), 16)
}
