//! `report.html` and `compare.html`: well formed, self-contained, escaped, quiet in a browser.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{World, read};
use scraper::{Html, Selector};

/// A class whose name would break a page that does not escape it.
const HOSTILE: &str = "a <b onmouseover='x'> & \"c\"";

fn pages() -> (World, [PathBuf; 2]) {
    let w = World::new();
    std::fs::rename(w.path("data/green"), w.path("data").join(HOSTILE)).unwrap();
    w.json(&["compare", "recipe.yaml", "--methods", "full,lora,prefix", "--epochs", "1", "--output", "out"]);
    let pages = [w.path("out/lora-s3/report.html"), w.path("out/compare.html")];
    (w, pages)
}

/// Values of an attribute.
fn attributes(page: &Html, name: &str) -> Vec<String> {
    let all = Selector::parse(&format!("[{name}]")).unwrap();
    page.select(&all).filter_map(|e| e.value().attr(name)).map(String::from).collect()
}

#[test]
fn pages_are_well_formed_and_load_nothing() {
    let (w, pages) = pages();
    for path in &pages {
        let text = String::from_utf8(read(path)).unwrap();
        let page = Html::parse_document(&text);
        assert!(page.errors.is_empty(), "{}: {:?}", path.display(), page.errors);
        for name in ["src", "href"] {
            let values = attributes(&page, name);
            assert!(values.iter().all(|v| v.starts_with("data:")), "{}: {values:?}", path.display());
        }
        assert!(!text.contains("http://") && !text.contains("https://") && !text.contains("<script") && !text.contains("url("));
        assert!(!attributes(&page, "src").is_empty(), "pictures");
        assert!(attributes(&page, "onmouseover").is_empty());
        let body: String = page.root_element().text().collect();
        assert!(body.contains(HOSTILE), "{}", path.display());
        assert!(page.select(&Selector::parse("svg text").unwrap()).count() > 10);
    }
    let report = String::from_utf8(read(&pages[0])).unwrap();
    let digest = serde_json::from_slice::<serde_json::Value>(&read(&w.path("out/lora-s3/report.json"))).unwrap()["base_digest"].clone();
    assert!(report.contains(digest.as_str().unwrap()) && report.contains("rank: 2") && report.contains("q_proj"));
    let prefix = String::from_utf8(read(&w.path("out/prefix-s3/report.html"))).unwrap();
    assert!(prefix.contains("does not fold"));
}

fn chromium() -> Option<PathBuf> {
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let dirs: Vec<PathBuf> = std::env::split_paths(&std::env::var_os("PATH")?).collect();
    dirs.iter().flat_map(|d| names.iter().map(move |n| d.join(n))).find(|p| p.is_file())
}

/// What a browser says to a page on its console, and the page after loading.
fn open(browser: &Path, page: &Path, profile: &Path) -> (String, String) {
    let out = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=400,900", "--dump-dom"])
        .arg(format!("--user-data-dir={}", profile.display()))
        .arg(format!("file://{}", page.display()))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr).lines().filter(|l| l.contains("CONSOLE")).collect::<Vec<_>>().join("\n");
    (said, String::from_utf8_lossy(&out.stdout).into_owned())
}

#[test]
fn a_browser_finds_nothing_to_say() {
    let Some(browser) = chromium() else {
        eprintln!("there is no Chromium here: pages are not opened in a browser");
        return;
    };
    let (w, pages) = pages();
    // A page that does complain shows that complaints are heard.
    let broken = w.write("broken.html", "<!doctype html><title>x</title><script>nothing.here()</script>");
    assert!(open(&browser, &broken, &w.path("profile")).0.contains("nothing"));
    for page in &pages {
        let (said, dom) = open(&browser, page, &w.path("profile"));
        assert_eq!(said, "", "{}", page.display());
        assert!(dom.contains("</svg>"));
    }
}
