//! How images became pixels in training travels with an adapter. Each marked image (transparent in part, with an EXIF orientation) has
//! twins that stand for one way of reading it, as files that can be read in one way only: whatever is asked of an adapter on marked
//! images has to be what is asked on its twins.
#![allow(clippy::unwrap_used)]

mod common;

use common::{World, read};
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder, Rgb, RgbImage, Rgba, RgbaImage};
use serde_json::Value;

/// EXIF with orientation 6: turned by 90° clockwise before it is shown.
const TURNED: &[u8] = &[b'M', b'M', 0, 42, 0, 0, 0, 8, 0, 1, 1, 0x12, 0, 3, 0, 0, 0, 1, 0, 6, 0, 0, 0, 0, 0, 0];

/// How an adapter was trained: name, options of `images`, flags that say the same.
const WAYS: [(&str, &str, [&str; 2]); 3] = [
    ("usual", "", ["--background=keep", "--orient"]),
    ("white", "images: { background: white, orient: false }\n", ["--background=white", "--no-orient"]),
    ("flat", "images: { orient: false }\n", ["--background=keep", "--no-orient"]),
];

/// Marked images in `marked/<class>`, their twins in `<way>/<class>`, a recipe `<way>.yaml` and a run `<way>-run` each; the run of
/// the twins is `<way>-twin`.
fn world() -> World {
    let w = World::new();
    for class in ["red", "green", "blue"] {
        for name in ["marked", "usual", "white", "flat"] {
            std::fs::create_dir_all(w.path(name).join(class)).unwrap();
        }
        for i in 0..10u32 {
            let colour = image::open(w.path("data").join(class).join(format!("{i}.png"))).unwrap().to_rgb8();
            let clear = |x: u32, y: u32| x < 10 && (x + y + i) % 5 < 3;
            let marked = RgbaImage::from_fn(20, 16, |x, y| {
                let [r, g, b] = colour.get_pixel(x, y).0;
                if clear(x, y) { Rgba([b, 60, r, 0]) } else { Rgba([r, g, b, 255]) }
            });
            let path = |name: &str| w.path(name).join(class).join(format!("{i}.png"));
            let mut encoder = PngEncoder::new(std::fs::File::create(path("marked")).unwrap());
            encoder.set_exif_metadata(TURNED.to_vec()).unwrap();
            encoder.write_image(&marked, 20, 16, ExtendedColorType::Rgba8).unwrap();
            let flat = RgbImage::from_fn(20, 16, |x, y| Rgb(marked.get_pixel(x, y).0[..3].try_into().unwrap()));
            let white = RgbImage::from_fn(20, 16, |x, y| if clear(x, y) { Rgb([255; 3]) } else { *flat.get_pixel(x, y) });
            image::imageops::rotate90(&flat).save(path("usual")).unwrap();
            white.save(path("white")).unwrap();
            flat.save(path("flat")).unwrap();
        }
    }
    w
}

fn recipe(w: &World, data: &str, images: &str) -> String {
    w.recipe("lora: { rank: 2 }").replace("root: data", &format!("root: {data}")).replace("output: run\n", "") + images
}

/// Trains on marked images in the way's own manner and on its twins in the usual one.
fn train(w: &World, way: &str, images: &str) {
    w.write(&format!("{way}.yaml"), &recipe(w, "marked", images));
    w.write("twin.yaml", &recipe(w, way, ""));
    let of = |file: &str, output: &str| w.json(&["train", file, "--output", output])["after"].clone();
    let (own, twin) = (of(&format!("{way}.yaml"), &format!("{way}-run")), of("twin.yaml", &format!("{way}-twin")));
    assert_eq!(own, twin, "{way}: training");
}

fn adapter(way: &str, kind: &str) -> [String; 4] {
    ["--model".into(), "base".into(), "--adapter".into(), format!("{way}-{kind}/adapter")]
}

fn embedded(w: &World, args: &[&str]) -> Vec<u8> {
    w.json(&[&["embed", "--output", "e.npy"], args].concat());
    let bytes = read(&w.path("e.npy"));
    std::fs::remove_file(w.path("e.npy")).unwrap();
    bytes
}

fn predicted(w: &World, args: &[&str]) -> Value {
    let mut found = w.json(&[&["predict"], args].concat());
    found.as_array_mut().unwrap().iter_mut().for_each(|a| _ = a.as_object_mut().unwrap().remove("image"));
    found
}

#[test]
fn every_verb_reads_images_as_the_adapter_was_trained() {
    let w = world();
    w.write("plain.yaml", &recipe(&w, "marked", ""));
    for (way, images, _) in [WAYS[0], WAYS[1]] {
        train(&w, way, images);
        let (own, twin) = (adapter(way, "run"), adapter(way, "twin"));
        let (own, twin) = (own.each_ref().map(String::as_str), twin.each_ref().map(String::as_str));
        let images = |root: &str| format!("{root}/blue");
        let (marked, there) = (images("marked"), images(way));

        let expected = embedded(&w, &[&twin[..], &["--images", &there]].concat());
        assert_eq!(embedded(&w, &[&own[..], &["--images", &marked]].concat()), expected, "{way}: embed");
        let ranked = predicted(&w, &[&twin[..], &[&there]].concat());
        assert_eq!(predicted(&w, &[&own[..], &[&marked]].concat()), ranked, "{way}: predict");

        // A bundle carries it into every verb.
        let bundle = format!("{way}-bundle");
        w.json(&[&["merge"], &own[..], &["--bundle", "--output", &bundle]].concat());
        assert_eq!(embedded(&w, &["--model", &bundle, "--images", &marked]), expected, "{way}: embed of a bundle");
        assert_eq!(predicted(&w, &["--model", &bundle, &marked]), ranked, "{way}: predict of a bundle");

        let score = |args: &[&str]| {
            let found = w.json(&[&["eval"], args].concat());
            (found["accuracy"].clone(), found["loss"].clone())
        };
        let right = score(&[&format!("{way}-twin")]);
        assert_eq!(score(&[&format!("{way}-run")]), right, "{way}: eval RUN");
        assert_eq!(score(&["plain.yaml", "--adapter", &format!("{way}-run")]), right, "{way}: eval --adapter");
        let over = score(&["plain.yaml", "--set", &format!("model={bundle}")]);
        assert_eq!((over.0, over.1), right, "{way}: eval on a bundle");

        // What starts from it starts from what it saw.
        let init = |data: &str, kind: &str| {
            w.write("init.yaml", &recipe(&w, data, "").replace("seed: 3", &format!("seed: 3, init_adapter: {way}-{kind}/adapter")));
            w.json(&["train", "init.yaml", "--output", "again", "--force"])["before"].clone()
        };
        assert_eq!(init("marked", "run"), init(way, "twin"), "{way}: init_adapter");
    }
}

#[test]
fn adapters_side_by_side_each_read_their_own_way() {
    let w = world();
    let mut lines = String::new();
    for (way, images, _) in WAYS {
        train(&w, way, images);
        lines += &format!("{{\"image\": \"marked/red/3.png\", \"adapter\": \"{way}-run/adapter\", \"id\": \"{way}\"}}\n");
        lines += &format!("{{\"image\": \"{way}/red/3.png\", \"adapter\": \"{way}-twin/adapter\", \"id\": \"{way}\"}}\n");
    }
    w.write("lines.jsonl", &lines);
    let answers = |flags: &[&str]| {
        let out = w.peft(&[&["predict", "--model", "base", "--jsonl", "lines.jsonl"], flags].concat());
        let text = String::from_utf8(out.stdout).unwrap();
        text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()).collect::<Vec<_>>()
    };
    let found = answers(&[]);
    assert_eq!(found.len(), 6);
    for pair in found.chunks(2) {
        assert_eq!((&pair[0]["id"], &pair[0]["predictions"]), (&pair[1]["id"], &pair[1]["predictions"]));
    }
    // A flag holds for all of them: of marked images the third alone is read as it was.
    let forced = answers(&WAYS[2].2);
    assert_eq!(forced[4]["predictions"], found[4]["predictions"]);
    assert!((0..4).step_by(2).all(|i| forced[i]["predictions"] != found[i]["predictions"]), "{forced:?}");
}

#[test]
fn flags_override_and_are_told() {
    let w = world();
    for (way, images, _) in WAYS {
        train(&w, way, images);
    }
    for (trained, _, own) in WAYS {
        let adapter = adapter(trained, "run");
        let adapter = adapter.each_ref().map(String::as_str);
        for (asked, _, flags) in WAYS {
            let there = format!("{asked}/green");
            let twin = [&adapter[..], &["--images", &there]].concat();
            let marked = [&adapter[..], &["--images", "marked/green"], &flags[..]].concat();
            assert_eq!(embedded(&w, &marked), embedded(&w, &twin), "trained on {trained}, read as {asked}");
            let out = w.peft(&[&["predict", "marked/red/1.png"], &adapter[..], &flags[..]].concat());
            let told = String::from_utf8_lossy(&out.stderr).contains("note:");
            assert_eq!(told, own != flags, "{trained}, {asked}: {out:?}");
        }
        // So do the options of a recipe.
        let stated = recipe(&w, "marked", "images: { background: white, orient: true }\n");
        w.write("stated.yaml", &stated);
        let out = w.peft(&["eval", "stated.yaml", "--adapter", &format!("{trained}-run")]);
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(said.contains("background: white") && said.contains("trained"), "{said}");
    }
}

#[test]
fn a_plain_checkpoint_cannot_carry_it_and_that_is_said() {
    let w = world();
    for (way, images, _) in WAYS {
        train(&w, way, images);
        let adapter = adapter(way, "run");
        let adapter = adapter.each_ref().map(String::as_str);
        for to in [&[][..], &["--to", "open-clip"]].into_iter().take(if way == "white" { 2 } else { 1 }) {
            let merged = w.json(&[&["merge"], &adapter[..], to, &["--force", "--output", "merged"]].concat());
            let said = merged["notes"].to_string().contains("orient: false");
            assert_eq!(said, way != "usual", "{way}: {merged}");
            let card = std::fs::read_to_string(w.path("merged/README.md")).unwrap();
            assert_eq!(card.contains("orient: false"), way != "usual", "{card}");
        }
        // A bundle that becomes plain, and adapters that are combined.
        if way == "flat" {
            continue;
        }
        let again = ["merge", "--adapter", &format!("{way}-run/adapter"), "--model", "base", "--bundle", "--output", "bundle", "--force"];
        w.json(&again);
        let plain = w.json(&["convert", "bundle", "--output", "plain", "--force"]);
        assert_eq!(plain["notes"].to_string().contains("orient: false"), way != "usual", "{way}: {plain}");
    }
    let combined = |a: &str, b: &str| {
        let adapters = ["--adapter", &format!("{a}-run/adapter"), "--adapter", &format!("{b}-run/adapter")];
        w.json(&[&["merge", "--model", "base", "--combine", "cat", "--output", "c", "--force"], &adapters[..]].concat())
    };
    assert!(!combined("white", "white")["notes"].to_string().contains("orient"));
    let at = |path: &str| embedded(&w, &["--model", "base", "--adapter", "c", "--images", path]);
    assert_eq!(at("marked/red"), at("white/red"), "what all were trained with holds for the combined one");
    assert!(combined("white", "flat")["notes"].to_string().contains("background: white"));
}

/// Version 0.1.0 said it in the recipe alone, or (before `images` was there) not at all.
#[test]
fn adapters_of_older_versions_keep_their_meaning() {
    let w = world();
    train(&w, "white", WAYS[1].1);
    let path = w.path("white-run/adapter/peft.json");
    let mut manifest: Value = serde_json::from_slice(&read(&path)).unwrap();
    let at = |path: &str, adapter: &str| embedded(&w, &["--model", "base", "--adapter", adapter, "--images", path]);
    let map = manifest.as_object_mut().unwrap();
    map.remove("images").unwrap();
    map.remove("made_of").unwrap();
    map["recipe"]["images"] = serde_json::json!({ "background": "white", "orient": false, "max_pixels": 1_000_000 });
    std::fs::write(&path, manifest.to_string()).unwrap();
    let expected = at("white/blue", "white-twin/adapter");
    assert_eq!(at("marked/blue", "white-run/adapter"), expected);
    // An option that the recipe does not have is its default.
    manifest["recipe"]["images"] = serde_json::json!({ "orient": false });
    std::fs::write(&path, manifest.to_string()).unwrap();
    assert_eq!(at("marked/blue", "white-run/adapter"), at("flat/blue", "white-run/adapter"));
    for recipe in [Value::Null, serde_json::json!({})] {
        manifest["recipe"] = recipe;
        std::fs::write(&path, manifest.to_string()).unwrap();
        assert_eq!(at("marked/blue", "white-run/adapter"), at("usual/blue", "white-run/adapter"));
        let found = w.json(&["eval", "white.yaml", "--adapter", "white-run/adapter"]);
        assert!(found["accuracy"].is_number());
    }
}
