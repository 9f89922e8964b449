//! `report.html` and `compare.html`: well formed, self-contained, escaped, quiet in a browser.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{World, read};
use scraper::{Html, Selector};

/// A class whose name would break a page that does not escape it.
const HOSTILE: &str = "a <b onmouseover='x'> & \"c\"";

fn pages() -> (World, [PathBuf; 3]) {
    let w = World::new();
    std::fs::rename(w.path("data/green"), w.path("data").join(HOSTILE)).unwrap();
    // Next to nothing is learnt, so that there are mistakes to show.
    w.json(&[
        "compare",
        "recipe.yaml",
        "--methods",
        "full,lora,prefix",
        "--epochs",
        "1",
        "--set",
        "train.lr=1e-6",
        "--set",
        "forget.folder.root=data",
        "--output",
        "out",
    ]);
    let pages = ["out/lora-s3/report.html", "out/full-s3/report.html", "out/compare.html"].map(|p| w.path(p));
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
        assert!(attributes(&page, "onmouseover").is_empty());
        let body: String = page.root_element().text().collect();
        assert!(body.contains(HOSTILE), "{}", path.display());
        assert!(page.select(&Selector::parse("svg text").unwrap()).count() > 10);
    }
    let report = String::from_utf8(read(&pages[0])).unwrap();
    assert!(report.contains("data:image/jpeg;base64,"), "mistakes are shown");
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

/// The page in a frame as wide as a phone; the title says whether everything has room. Windows of browsers are wider.
fn at_400_pixels(page: &str) -> String {
    let page = page.replace('&', "&amp;").replace('"', "&quot;");
    format!(
        "<!doctype html><title>?</title><iframe id=f width=400 height=900 srcdoc=\"{page}\"></iframe><script>onload = () => {{
            const root = document.getElementById('f').contentDocument.documentElement;
            document.title = root.scrollWidth > root.clientWidth ? `${{root.scrollWidth}} > ${{root.clientWidth}}` : 'fits';
        }}</script>"
    )
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
        let framed = w.write("framed.html", &at_400_pixels(&String::from_utf8(read(page)).unwrap()));
        let (_, dom) = open(&browser, &framed, &w.path("profile"));
        assert!(dom.contains("<title>fits</title>"), "{}: {:?}", page.display(), dom.lines().find(|l| l.contains("<title>")));
    }
}
