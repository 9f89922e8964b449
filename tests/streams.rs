//! Training on a stream: it goes on in the middle of a shard, and what cannot be read is named, counted and left out.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::Device;
use common::{World, read};
use peft::recipe::Recipe;
use peft::report::TrainReport;
use peft::run::Existing;
use peft::session;
use peft::train::{Event, Observer};

/// Asks for a stop after some steps; keeps what was told.
struct StopAfter(usize, Vec<String>);

impl Observer for StopAfter {
    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Step(_) => self.0 = self.0.saturating_sub(1),
            Event::Note(note) => self.1.push(note),
            _ => {}
        }
    }

    fn stop(&self) -> Option<i32> {
        (self.0 == 0).then_some(2)
    }
}

/// The images of the world in three shards, one of them broken.
fn shards(w: &World) {
    std::fs::create_dir(w.path("shards")).unwrap();
    for shard in 0..3u8 {
        let mut tar = tar::Builder::new(std::fs::File::create(w.path(&format!("shards/train-{shard}.tar"))).unwrap());
        let mut member = |name: String, bytes: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            tar.append_data(&mut header, name, bytes).unwrap();
        };
        for i in (shard * 4)..(shard * 4 + 4).min(10) {
            for class in ["red", "green", "blue"] {
                let mut image = read(&w.path("data").join(class).join(format!("{i}.png")));
                if (i, class) == (5, "green") {
                    image.truncate(60);
                }
                member(format!("{class}{i}.cls"), class.as_bytes());
                member(format!("{class}{i}.png"), &image);
            }
        }
    }
}

fn recipe(w: &World, method: &str, data: &str, output: &str) -> Recipe {
    let text = w
        .recipe(method)
        .replace("model: base", &format!("model: {}", w.path("base").display()))
        .replace("  folder: { root: data }", &data.replace("DIR", &w.path("shards").display().to_string()))
        .replace("batch: 8", "batch: 4")
        .replace("seed: 3", "seed: 3, accumulate: 2, checkpoint_steps: 1, augment: { crop: [0.7, 1.0], flip: true }")
        .replace("output: run", &format!("output: {}", w.path(output).display()));
    Recipe::parse("recipe", &text, "recipe", &[]).unwrap()
}

fn train(recipe: Recipe, existing: Existing, steps: usize) -> (peft::Result<TrainReport>, Vec<String>) {
    let mut observer = StopAfter(steps, Vec::new());
    let report = session::train(recipe, existing, &Device::Cpu, &mut observer).map(|(report, _)| report);
    (report, observer.1)
}

const STREAM: &str = "  webdataset: { path: DIR, stream: true, buffer: 5 }\n  skip_bad: true";

#[test]
fn stopped_in_the_middle_of_a_shard_it_ends_in_the_same_bits() {
    let w = World::new();
    shards(&w);
    let of = |output: &str| recipe(&w, "lora: { rank: 2, dropout: 0.2 }", STREAM, output);
    let (whole, notes) = train(of("whole"), Existing::Refuse, usize::MAX);
    let whole = whole.unwrap();
    assert!(notes.iter().any(|n| n.contains("streamed through a buffer of 5")), "{notes:?}");
    let left_out: Vec<&String> = notes.iter().filter(|n| n.starts_with("left out")).collect();
    assert!(left_out.len() == 1 && left_out[0].contains("train-1.tar: row 4"), "{left_out:?}");
    assert_eq!(whole.skipped_images, 1);
    assert!(whole.images > 0 && whole.examples[0] + whole.examples[1] == 30);
    let adapter = read(&w.path("whole/adapter/adapter_model.safetensors"));
    for stop in [1, 2, whole.steps - 2] {
        let name = format!("stopped{stop}");
        assert_eq!(train(of(&name), Existing::Refuse, stop).0.unwrap_err().exit_code(), 130);
        let resumed = train(of(&name), Existing::Resume, usize::MAX).0.unwrap();
        assert!(read(&w.path(&name).join("adapter/adapter_model.safetensors")) == adapter, "stopped after {stop}");
        assert_eq!((resumed.epochs, resumed.skipped_images, resumed.images), (whole.epochs.clone(), 1, whole.images));
        for file in ["metrics.jsonl", "predictions.jsonl"] {
            assert!(read(&w.path(&name).join(file)) == read(&w.path("whole").join(file)), "{file}, stopped after {stop}");
        }
    }
}

#[test]
fn a_broken_image_stops_the_run_unless_told_otherwise() {
    let w = World::new();
    shards(&w);
    let (report, _) = train(recipe(&w, "lora: {}", &STREAM.replace("\n  skip_bad: true", ""), "run"), Existing::Refuse, usize::MAX);
    let error = report.unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let message = error.to_string();
    assert!(message.contains("train-1.tar: row 4") && message.contains("skip_bad"), "{message}");
}

#[test]
fn methods_that_look_at_all_examples_get_a_list() {
    let w = World::new();
    shards(&w);
    // The broken image would be met there, since it is looked at as a whole.
    let data = "  webdataset: { path: ['DIR/train-0.tar', 'DIR/train-2.tar'], stream: true }";
    let (report, notes) = train(recipe(&w, "tip_adapter: {}", data, "run"), Existing::Refuse, usize::MAX);
    report.unwrap();
    assert!(notes.iter().any(|n| n.contains("listed")), "{notes:?}");
    // Shots are drawn from a list.
    let (report, notes) = train(recipe(&w, "lora: {}", &format!("{data}\n  shots: 2"), "few"), Existing::Refuse, usize::MAX);
    assert_eq!(report.unwrap().examples[0], 6);
    assert!(notes.iter().any(|n| n.contains("not streamed")), "{notes:?}");
}

#[test]
fn check_says_how_many_rows_and_whether_they_are_streamed() {
    let w = World::new();
    shards(&w);
    let data = "  webdataset: { path: shards, stream: true }";
    w.write("recipe.yaml", &w.recipe("lora: { rank: 2 }").replace("  folder: { root: data }", data));
    let out = w.peft(&["train", "recipe.yaml", "--check"]);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success() && text.contains("training (streamed), "), "{text}{}", String::from_utf8_lossy(&out.stderr));
    let checked = w.json(&["train", "recipe.yaml", "--check"]);
    assert_eq!((checked["streamed"].as_bool(), checked["examples"][2].as_u64()), (Some(true), Some(0)));
}
