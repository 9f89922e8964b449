//! Serves predictions over HTTP: one base in memory, several adapters on it, one of which each call chooses.
//!
//! ```sh
//! cargo run --release --example serve -- builtin:tiny icons=runs/quickstart/adapter flat=runs/flat/adapter
//! curl --data-binary @photo.png 'http://127.0.0.1:8080/predict/icons?top=3'
//! curl --data-binary @photo.png -H 'X-Labels: cat, dog' http://127.0.0.1:8080/predict/base
//! ```
//!
//! `GET /` lists the adapters. The answer to an image is `[{"label", "probability"}, …]`; what is wrong with a call comes back
//! as `{"error"}` with status 400 or 404. `base` is the base alone. Without `X-Labels` an adapter's own classes are ranked.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::PathBuf;

use peft::clip::decode::decode;
use peft::model::{Ranked, Scorer};
use peft::{Error, Model, Result};
use serde_json::{Value, json};
use tiny_http::{Header, Method, Request, Response, Server};

const ADDRESS: &str = "127.0.0.1:8080";
const WORKERS: usize = 2;
/// Larger bodies are refused.
const MAX_BODY: u64 = 32 << 20;

/// A base and its adapters.
struct Service {
    models: BTreeMap<String, (Model, Option<Scorer>)>,
}

impl Service {
    /// Loads the base once; every adapter is a [`Model::fork`] of it. The text side of an adapter's own classes is computed here.
    fn load(base: &str, adapters: &[(String, PathBuf)]) -> Result<Self> {
        let base = Model::load(base)?;
        let mut models = BTreeMap::new();
        for (name, dir) in adapters {
            let model = base.fork().with_adapter(dir)?;
            let scorer = model.scorer(&[], &[]).ok();
            models.insert(name.clone(), (model, scorer));
        }
        models.insert("base".to_string(), (base, None));
        Ok(Self { models })
    }

    /// Labels of one image, most likely first: `labels`, or the adapter's classes where there are none.
    fn predict(&self, adapter: &str, image: &[u8], labels: &[String]) -> Result<Vec<Ranked>> {
        let (model, own) = self.models.get(adapter).ok_or_else(|| Error::input(adapter, "there is no such adapter"))?;
        let features = model.embed_pixels(&[decode("body", image, &model.image_options())?])?;
        let ranked = match own {
            Some(own) if labels.is_empty() => own.rank(model, &features)?,
            _ => model.scorer(labels, &[])?.rank(model, &features)?,
        };
        Ok(ranked.into_iter().next().unwrap_or_default())
    }

    /// Status and body of the answer to a call.
    fn answer(&self, method: &Method, url: &str, labels: &[String], body: &[u8]) -> (u16, Value) {
        let (path, query) = url.split_once('?').unwrap_or((url, ""));
        let top = query.split('&').find_map(|pair| pair.strip_prefix("top=")?.parse().ok()).unwrap_or(5);
        match (method, path.strip_prefix("/predict/")) {
            (Method::Get, None) if path == "/" => (200, json!({ "adapters": self.models.keys().collect::<Vec<_>>() })),
            (Method::Post, Some(name)) if self.models.contains_key(name) => match self.predict(name, body, labels) {
                Ok(ranked) => (200, json!(&ranked[..ranked.len().min(top)])),
                Err(e) => (if e.exit_code() == 2 { 400 } else { 500 }, json!({ "error": e.to_string() })),
            },
            _ => {
                (404, json!({ "error": format!("expected POST /predict/NAME with NAME of {:?}", self.models.keys().collect::<Vec<_>>()) }))
            }
        }
    }

    /// Answers calls until the server is taken down.
    fn serve(&self, server: &Server) {
        std::thread::scope(|scope| {
            for _ in 0..WORKERS {
                scope.spawn(|| {
                    while let Ok(request) = server.recv() {
                        self.handle(request);
                    }
                });
            }
        });
    }

    fn handle(&self, mut request: Request) {
        let mut body = Vec::new();
        // A connection that breaks leaves half an image, which is then refused.
        let _ = request.as_reader().take(MAX_BODY).read_to_end(&mut body);
        let labels = request.headers().iter().find(|h| h.field.equiv("X-Labels")).map(|h| h.value.as_str().to_string());
        let labels: Vec<String> = labels.iter().flat_map(|l| l.split(',')).map(|l| l.trim().to_string()).collect();
        let (status, answer) = self.answer(request.method(), request.url(), &labels, &body);
        let mut response = Response::from_string(answer.to_string()).with_status_code(status);
        if let Ok(json) = Header::from_bytes("Content-Type", "application/json") {
            response.add_header(json);
        }
        let _ = request.respond(response);
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut arguments = std::env::args().skip(1);
    let base = arguments.next().ok_or("usage: serve BASE NAME=ADAPTER…")?;
    let named =
        |a: String| a.split_once('=').map(|(name, dir)| (name.to_string(), PathBuf::from(dir))).ok_or(format!("`{a}` is not NAME=ADAPTER"));
    let adapters: Vec<_> = arguments.map(named).collect::<std::result::Result<_, _>>()?;
    let service = Service::load(&base, &adapters)?;
    let server = Server::http(ADDRESS)?;
    println!("http://{ADDRESS} serves {}", service.models.keys().cloned().collect::<Vec<_>>().join(", "));
    service.serve(&server);
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use peft::recipe::Recipe;
    use std::io::Write as _;
    use std::path::Path;

    fn picture(shade: u8) -> Vec<u8> {
        let mut png = std::io::Cursor::new(Vec::new());
        image::RgbImage::from_pixel(8, 8, image::Rgb([shade, 40, 255 - shade])).write_to(&mut png, image::ImageFormat::Png).unwrap();
        png.into_inner()
    }

    /// An adapter after two steps, with the classes `light` and `dark`.
    fn adapter(dir: &Path, name: &str, seed: u64, images: &str) -> PathBuf {
        for (class, from) in [("dark", 0), ("light", 200)] {
            std::fs::create_dir_all(dir.join("data").join(class)).unwrap();
            (0..4).for_each(|i| std::fs::write(dir.join(format!("data/{class}/{i}.png")), picture(from + i)).unwrap());
        }
        let data = dir.join("data").display().to_string();
        let text = format!(
            "{{ model: 'builtin:tiny', method: lora, data: {{ folder: {{ root: '{data}' }} }}, task: classify, train: {{ steps: 2, lr: 0.01, seed: {seed} }}, images: {images} }}"
        );
        let mut recipe = Recipe::parse("recipe", &text, name, &[]).unwrap();
        recipe.output = Some(dir.join(name));
        peft::session::train(recipe, peft::run::Existing::Refuse, &candle_core::Device::Cpu, &mut peft::train::Silent).unwrap();
        dir.join(name).join("adapter")
    }

    fn post(address: &str, path: &str, headers: &str, body: &[u8]) -> (u16, Value) {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        write!(stream, "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n", body.len()).unwrap();
        stream.write_all(body).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), serde_json::from_str(body).unwrap())
    }

    #[test]
    fn each_call_chooses_its_adapter_and_the_base_is_loaded_once() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (adapter(dir.path(), "a", 1, "{}"), adapter(dir.path(), "b", 2, "{}"));
        let service = Service::load("builtin:tiny", &[("a".into(), a.clone()), ("b".into(), b)]).unwrap();
        let bases: Vec<_> = service.models.values().map(|(m, _)| std::ptr::from_ref(m.base())).collect();
        assert!(bases.len() == 3 && bases.iter().all(|p| *p == bases[0]));

        let server = Server::http("127.0.0.1:0").unwrap();
        let address = server.server_addr().to_string();
        std::thread::scope(|scope| {
            scope.spawn(|| service.serve(&server));
            let image = picture(3);
            let ask = |name: &str| post(&address, &format!("/predict/{name}"), "", &image);
            let (from_a, from_b) = (ask("a"), ask("b"));
            assert_eq!((from_a.0, from_b.0), (200, 200));
            assert_ne!(from_a.1, from_b.1, "the adapters differ");
            // What the library says of the same file with that adapter alone.
            std::fs::write(dir.path().join("x.png"), &image).unwrap();
            let alone = Model::load("builtin:tiny").unwrap().with_adapter(&a).unwrap().predict(&[dir.path().join("x.png")], &[]).unwrap();
            assert_eq!(from_a.1, json!(alone[0]));
            assert_eq!(ask("a"), from_a, "the other adapter left no trace");

            let (status, base) = post(&address, "/predict/base?top=1", "X-Labels: clock, heart\r\n", &image);
            assert_eq!((status, base.as_array().unwrap().len()), (200, 1));
            assert!(ask("base").1["error"].as_str().unwrap().contains("at least one label"));
            assert_eq!(ask("c").0, 404);
            assert_eq!(post(&address, "/predict/a", "", b"no image").0, 400);
            (0..WORKERS).for_each(|_| server.unblock());
        });
    }

    /// Transparent images are what the adapter of the call was trained to see.
    #[test]
    fn images_are_read_as_each_adapter_was_trained() {
        let dir = tempfile::tempdir().unwrap();
        let (keep, white) = (adapter(dir.path(), "keep", 1, "{}"), adapter(dir.path(), "white", 1, "{ background: white }"));
        let service = Service::load("builtin:tiny", &[("keep".into(), keep), ("white".into(), white)]).unwrap();
        let png = |pixel: &dyn Fn(u32) -> [u8; 4]| {
            let mut png = std::io::Cursor::new(Vec::new());
            image::RgbaImage::from_fn(8, 8, |x, _| image::Rgba(pixel(x))).write_to(&mut png, image::ImageFormat::Png).unwrap();
            png.into_inner()
        };
        let clear = png(&|x| [200, 10, 30, if x < 4 { 0 } else { 255 }]);
        let on_white = png(&|x| if x < 4 { [255; 4] } else { [200, 10, 30, 255] });
        let dropped = png(&|_| [200, 10, 30, 255]);
        let ask = |name: &str, image: &[u8]| json!(service.predict(name, image, &[]).unwrap());
        assert_eq!(ask("white", &clear), ask("white", &on_white));
        assert_eq!(ask("keep", &clear), ask("keep", &dropped));
        assert_ne!(ask("white", &clear), ask("white", &dropped));
    }
}
