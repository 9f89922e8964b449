//! `peft merge`: killed anywhere, the output is the previous model, the next or none.

use super::{World, aborts, changes, copy_tree, each, full, peft, strays, succeeds, tree, verb};

fn args<'a>(output: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["merge", "--model", "base", "--adapter", "run/adapter", "--output", output][..], more].concat()
}

fn world() -> World {
    let w = World::new();
    succeeds(&peft(w.dir.path(), &["train", "recipe.yaml", "--set", "train.epochs=1"], ""), "train");
    w
}

#[test]
fn killed_or_full_anywhere_leaves_the_previous_or_the_next() {
    let w = world();
    succeeds(&peft(w.dir.path(), &args("old/model", &["--dtype", "f16"]), ""), "old");
    // Over a model that is there the last changes are others.
    copy_tree(&w.path("old"), &w.path("new"));
    let points = changes(verb(w.dir.path(), &args("new/model", &["--force"]), "count"));
    let (old, new) = (tree(&w.path("old/model"), &[]), tree(&w.path("new/model"), &[]));
    assert!(old != new && points.len() > 20);
    each(points.len() * 2, |i| {
        let (k, abort) = (i.div_ceil(2), i % 2 == 0);
        let (name, what) = (format!("out{i}"), format!("{} at {k}, {}", if abort { "killed" } else { "full" }, points[k - 1]));
        copy_tree(&w.path("old"), &w.path(&name));
        let output = format!("{name}/model");
        let args = args(&output, &["--force"]);
        match abort {
            true => aborts(&peft(w.dir.path(), &args, &format!("abort {k}")), &what),
            false => {
                let out = peft(w.dir.path(), &args, &format!("fail 28 {k} on"));
                full(&out, &what);
            }
        }
        let found = tree(&w.path(&output), &[]);
        assert!(found == old || found == new, "{what}: a mixture");
        succeeds(&peft(w.dir.path(), &args, ""), &what);
        assert_eq!(tree(&w.path(&output), &[]), new, "{what}");
        assert_eq!(strays(&w.path(&name)), Vec::<String>::new(), "{what}");
        std::fs::remove_dir_all(w.path(&name)).unwrap();
    });
}

#[test]
fn killed_before_there_was_one_leaves_none_or_the_whole() {
    let w = world();
    let points = changes(verb(w.dir.path(), &args("new/model", &[]), "count"));
    let new = tree(&w.path("new/model"), &[]);
    each(points.len(), |k| {
        let (name, what) = (format!("out{k}"), format!("killed at {k}, {}", points[k - 1]));
        let output = format!("{name}/model");
        aborts(&peft(w.dir.path(), &args(&output, &[]), &format!("abort {k}")), &what);
        let there = w.path(&output).exists();
        assert!(!there || tree(&w.path(&output), &[]) == new, "{what}");
        succeeds(&peft(w.dir.path(), &args(&output, if there { &["--force"] } else { &[] }), ""), &what);
        assert_eq!(tree(&w.path(&output), &[]), new, "{what}");
        assert_eq!(strays(&w.path(&name)), Vec::<String>::new(), "{what}");
        std::fs::remove_dir_all(w.path(&name)).unwrap();
    });
}
