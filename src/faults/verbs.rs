//! The other verbs that write: killed or full anywhere, each thing that they write is the previous one or the next.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{World, aborts, changes, copy_tree, each, full, peft, strays, succeeds, tree, verb};

/// Verbs that write `OUT` or what is beside it: first in one way, then in another over that.
const CASES: [[&str; 3]; 11] = [
    ["extract", "extract base tuned --rank 1 --rest --output OUT", "extract base tuned --rank 2 --rest --output OUT --force"],
    ["convert", "convert base --output OUT", "convert base --output OUT --dtype f16 --force"],
    [
        "embed",
        "embed --model base --images data/red --output OUT.npy",
        "embed --model base --images data --texts run/recipe.yaml --output OUT.safetensors",
    ],
    ["rows", "embed --model base --images data/red --output OUT.npy", "embed --model base --images data --output OUT.npy"],
    [
        "bundle",
        "merge --model base --adapter run/adapter --bundle --output OUT",
        "merge --model base --adapter other/adapter --bundle --output OUT --force",
    ],
    [
        "combine",
        "merge --model base --adapter run/adapter --adapter other/adapter --combine cat --output OUT",
        "merge --model base --adapter run/adapter --adapter other/adapter --combine linear --output OUT --force",
    ],
    [
        "classifier",
        "merge --model base --labels red,blue --classifier OUT",
        "merge --model base --labels red,green --classifier OUT --force",
    ],
    ["undo", "merge --model base --output OUT", "merge --model tuned --undo run/adapter=0.5 --output OUT --force"],
    ["new", "new OUT --data data", "new OUT --data data --shots 2 --force"],
    ["data", "new OUT --data data", "data data --sheet OUT"],
    ["eval", "eval run --split val --predictions OUT", "eval run --split test --predictions OUT"],
];

/// A directory with what the verbs read, so that what names a place is the same in each; they write to `out` in it.
fn place(w: &World, name: &str) -> PathBuf {
    let dir = w.path(name);
    std::fs::create_dir(&dir).unwrap();
    for there in ["base", "data", "run", "other", "tuned"] {
        std::os::unix::fs::symlink(w.path(there), dir.join(there)).unwrap();
    }
    dir
}

fn run(dir: &Path, line: &str, fault: &str) -> Command {
    let words: Vec<&str> = line.split(' ').collect();
    let words: Vec<String> =
        words.iter().map(|word| word.strip_prefix("OUT").map_or((*word).to_string(), |rest| format!("out/it.x{rest}"))).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    verb(dir, &words, fault)
}

/// What stands under each name in `out`, a file or a directory with all that is in it.
fn things(dir: &Path) -> BTreeMap<String, BTreeMap<String, Vec<u8>>> {
    let mut things: BTreeMap<String, BTreeMap<String, Vec<u8>>> = BTreeMap::new();
    for (name, bytes) in tree(&dir.join("out"), &[".tmp-", ".old-", ".part-"]) {
        let top = name.split('/').next().unwrap().to_string();
        things.entry(top).or_default().insert(name, bytes);
    }
    things
}

fn check(w: &World, [name, before, now]: [&str; 3]) {
    let [first, second] = ["old", "new"].map(|which| place(w, &format!("{name}-{which}")));
    succeeds(&run(&first, before, "").output().unwrap(), name);
    copy_tree(&first.join("out"), &second.join("out"));
    let points = changes(run(&second, now, "count"));
    let (old, new) = (things(&first), things(&second));
    assert!(old != new && points.len() > 3, "{name}: {points:#?}");
    each(points.len() * 2, |i| {
        let (k, abort) = (i.div_ceil(2), i % 2 == 0);
        let what = format!("{name}, {} at {k}, {}", if abort { "killed" } else { "full" }, points[k - 1]);
        let dir = place(w, &format!("{name}-{i}"));
        copy_tree(&first.join("out"), &dir.join("out"));
        let fault = if abort { format!("abort {k}") } else { format!("fail 28 {k} on") };
        let out = run(&dir, now, &fault).output().unwrap();
        match abort {
            true => aborts(&out, &what),
            false => full(&out, &what),
        }
        for (thing, found) in things(&dir) {
            assert!([old.get(&thing), new.get(&thing)].contains(&Some(&found)), "{what}: {thing} is a mixture");
        }
        assert!(old.keys().all(|name| !new.contains_key(name) || things(&dir).contains_key(name)), "{what}: something is gone");
        succeeds(&run(&dir, now, "").output().unwrap(), &what);
        assert!(things(&dir) == new, "{what}: repeated it is another");
        assert_eq!(strays(&dir), Vec::<String>::new(), "{what}");
        std::fs::remove_dir_all(dir).unwrap();
    });
}

#[test]
fn killed_or_full_anywhere_leaves_the_previous_or_the_next() {
    let w = trained();
    succeeds(&peft(w.dir.path(), &["merge", "--model", "base", "--adapter", "run/adapter=0.5", "--output", "tuned"], ""), "tuned");
    CASES.into_iter().for_each(|case| check(&w, case));
}

/// An adapter whose signing was killed is the adapter, signed or not, and can be signed again.
#[test]
fn killed_anywhere_an_adapter_can_be_signed() {
    let w = trained();
    let peft = |args: &[&str]| peft(w.dir.path(), args, "");
    succeeds(&peft(&["sign", "--generate", "own"]), "a pair of keys");
    copy_tree(&w.path("run/adapter"), &w.path("new"));
    let points = changes(verb(w.dir.path(), &["sign", "new", "--key", "own.key"], "count"));
    assert!(points.len() > 3, "{points:#?}");
    each(points.len(), |k| {
        let (name, what) = (format!("signed{k}"), format!("killed at {k}, {}", points[k - 1]));
        copy_tree(&w.path("run/adapter"), &w.path(&name));
        let sign = |fault: &str| super::peft(w.dir.path(), &["sign", &name, "--key", "own.key"], fault);
        aborts(&sign(&format!("abort {k}")), &what);
        let predict = ["predict", "--model", "base", "--adapter", &name, "data/red/0.png"];
        succeeds(&peft(&predict), &what);
        succeeds(&sign(""), &what);
        succeeds(&peft(&[&predict[..], &["--trusted-key", "own.pub"]].concat()), &what);
        assert_eq!(strays(&w.path(&name)), Vec::<String>::new(), "{what}");
    });
}

fn trained() -> World {
    let w = World::new();
    for (output, seed) in [("run", "train.seed=3"), ("other", "train.seed=9")] {
        let args = ["train", "recipe.yaml", "--set", "train.epochs=1", "--set", seed, "--output", output];
        succeeds(&peft(w.dir.path(), &args, ""), "train");
    }
    w
}
