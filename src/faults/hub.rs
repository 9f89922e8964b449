//! The hub's cache: killed or full anywhere, what is found without the hub is the model of before or the one of now.

use super::server::{COMMIT, Hub};
use super::{World, aborts, changes, command, each, full, said, strays, succeeds, tree};

const NEXT: &str = "89abcdef0123456789abcdef0123456789abcdef";

/// `inspect` of the model on the hub, with a cache of its own.
fn inspect(w: &World, hub: &Hub, cache: &str, offline: bool, fault: &str) -> std::process::Command {
    let mut command = command("child", w.dir.path(), &["inspect", "some/base", "--json", "--threads", "1", "--quiet"], fault);
    for name in ["HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY"] {
        command.env_remove(name);
    }
    command.env("HF_ENDPOINT", format!("http://127.0.0.1:{}", hub.port)).env("HF_HOME", w.path(cache));
    if offline {
        command.env("HF_HUB_OFFLINE", "1");
    }
    command
}

/// The digest that `inspect` printed.
fn digest(out: &std::process::Output) -> String {
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let json = &text[text.find('{').unwrap_or_else(|| panic!("{text} {}", said(out)))..];
    serde_json::from_str::<serde_json::Value>(json).unwrap()["facts"]["digest"].as_str().unwrap().to_string()
}

/// A hub whose model has changed since it was fetched to the cache `before`; its digests.
fn world() -> (World, Hub, [String; 2]) {
    let (w, hub) = (World::new(), Hub::new());
    hub.add("some/base", &w.path("base"));
    let old = digest(&inspect(&w, &hub, "before", false, "").output().unwrap());
    let tensors = candle_core::safetensors::load(w.path("base/model.safetensors"), &candle_core::Device::Cpu).unwrap();
    let half: Vec<_> = tensors.into_iter().map(|(name, t)| (name, (t * 0.5).unwrap())).collect();
    crate::clip::weights::save(&w.path("base/model.safetensors"), &half).unwrap();
    hub.add("some/base", &w.path("base"));
    hub.set(|s| s.head = NEXT.into());
    let new = digest(&inspect(&w, &hub, "now", false, "").output().unwrap());
    assert!(old != new && COMMIT != NEXT);
    (w, hub, [old, new])
}

/// Symbolic links included.
fn copy(w: &World, from: &str, to: &str) {
    for entry in walkdir::WalkDir::new(w.path(from)).into_iter().flatten() {
        let target = w.path(to).join(entry.path().strip_prefix(w.path(from)).unwrap());
        match entry.file_type() {
            t if t.is_dir() => std::fs::create_dir_all(target).unwrap(),
            t if t.is_symlink() => std::os::unix::fs::symlink(std::fs::read_link(entry.path()).unwrap(), target).unwrap(),
            _ => _ = std::fs::copy(entry.path(), target).unwrap(),
        }
    }
}

#[test]
fn killed_or_full_anywhere_the_cache_has_the_model_of_before_or_of_now() {
    let (w, hub, [old, new]) = world();
    copy(&w, "before", "counted");
    let points = changes(inspect(&w, &hub, "counted", false, "count"));
    assert!(points.len() > 15, "{points:#?}");
    each(points.len() * 2, |i| {
        let (k, abort) = (i.div_ceil(2), i % 2 == 0);
        let (name, what) = (format!("cache{i}"), format!("{} at {k}, {}", if abort { "killed" } else { "full" }, points[k - 1]));
        copy(&w, "before", &name);
        if abort {
            aborts(&inspect(&w, &hub, &name, false, &format!("abort {k}")).output().unwrap(), &what);
        } else {
            let out = inspect(&w, &hub, &name, false, &format!("fail 28 {k} on")).output().unwrap();
            full(&out, &what);
        }
        let offline = inspect(&w, &hub, &name, true, "").output().unwrap();
        succeeds(&offline, &what);
        assert!([&old, &new].contains(&&digest(&offline)), "{what}");
        assert_eq!(digest(&inspect(&w, &hub, &name, false, "").output().unwrap()), new, "{what}");
        assert_eq!(digest(&inspect(&w, &hub, &name, true, "").output().unwrap()), new, "{what}");
        assert_eq!(strays(&w.path(&name)), Vec::<String>::new(), "{what}");
        assert!(tree(&w.path(&name), &[]).keys().all(|n| !n.ends_with(".incomplete")), "{what}");
        std::fs::remove_dir_all(w.path(&name)).unwrap();
    });
}

/// The same where nothing was there before.
#[test]
fn killed_anywhere_a_first_fetch_goes_on() {
    let (w, hub, [_, new]) = world();
    let points = changes(inspect(&w, &hub, "counted", false, "count"));
    each(points.len(), |k| {
        let (name, what) = (format!("cache{k}"), format!("killed at {k}, {}", points[k - 1]));
        aborts(&inspect(&w, &hub, &name, false, &format!("abort {k}")).output().unwrap(), &what);
        let offline = inspect(&w, &hub, &name, true, "").output().unwrap();
        assert!(offline.status.code() == Some(2) || digest(&offline) == new, "{what}: {}", said(&offline));
        assert_eq!(digest(&inspect(&w, &hub, &name, false, "").output().unwrap()), new, "{what}");
        assert_eq!(digest(&inspect(&w, &hub, &name, true, "").output().unwrap()), new, "{what}");
        assert_eq!(strays(&w.path(&name)), Vec::<String>::new(), "{what}");
        std::fs::remove_dir_all(w.path(&name)).unwrap();
    });
}
