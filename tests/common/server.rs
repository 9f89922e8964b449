//! A model hub on loopback.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};

use sha2::{Digest, Sha256};

pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub(crate) const TOKEN: &str = "hf_right";

/// How the server behaves, and what it was asked.
#[derive(Default)]
pub(crate) struct State {
    /// What `main` stands for; [`COMMIT`] where it is empty.
    pub(crate) head: String,
    pub(crate) files: HashMap<String, Vec<u8>>,
    /// Nothing without this token.
    pub(crate) private: bool,
    /// Bytes of a large file after which the connection closes.
    pub(crate) cut: Option<usize>,
    /// Added to the size that is announced.
    pub(crate) lie: usize,
    /// Whether a byte of large files is changed on the way.
    pub(crate) damaged: bool,
    /// Large files wait until so many processes asked for them.
    pub(crate) together: usize,
    /// The first request whose line holds this gets no answer, and neither do those after it; the connection stays open.
    pub(crate) silent: Option<&'static str>,
    /// As `silent`, but after the headers of an answer that says nothing of its size.
    pub(crate) hanging: Option<&'static str>,
    /// Requests whose line holds this get bytes without size and end.
    pub(crate) endless: Option<&'static str>,
    /// Files whose size is not said before the connection closes.
    pub(crate) unsized_files: bool,
    pub(crate) log: Vec<String>,
}

pub(crate) struct Hub {
    pub(crate) port: u16,
    pub(crate) state: Arc<(Mutex<State>, Condvar)>,
}

struct Request {
    method: String,
    path: String,
    headers: HashMap<String, String>,
}

impl Hub {
    pub(crate) fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new((Mutex::new(State::default()), Condvar::new()));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = shared.clone();
                // A client that hangs up in the middle is part of the game.
                std::thread::spawn(move || _ = serve(stream, port, &shared));
            }
        });
        Self { port, state }
    }

    /// A repository with the files of a directory.
    pub(crate) fn add(&self, id: &str, dir: &Path) {
        for entry in walkdir::WalkDir::new(dir).into_iter().flatten().filter(|e| e.file_type().is_file()) {
            let name = entry.path().strip_prefix(dir).unwrap().display();
            self.state.0.lock().unwrap().files.insert(format!("{id}/{name}"), std::fs::read(entry.path()).unwrap());
        }
    }

    pub(crate) fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.0.lock().unwrap());
    }

    pub(crate) fn log(&self) -> Vec<String> {
        self.state.0.lock().unwrap().log.clone()
    }
}

fn serve(stream: TcpStream, port: u16, shared: &(Mutex<State>, Condvar)) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut parts = line.split_whitespace().map(ToString::to_string);
    let (Some(method), Some(path)) = (parts.next(), parts.next()) else { return Ok(()) };
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim().split_once(':') else { break };
        headers.insert(name.to_lowercase(), value.trim().to_string());
    }
    let request = Request { method, path, headers };
    shared.0.lock().unwrap().log.push(format!("{} {} {}", request.method, request.path, request.headers.get("range").map_or("", |r| r)));
    shared.1.notify_all();
    let line = format!("{} {}", request.method, request.path);
    let state = shared.0.lock().unwrap();
    let is = |part: Option<&str>| part.is_some_and(|part| line.contains(part));
    let (silent, hanging, endless) = (is(state.silent), is(state.hanging), is(state.endless));
    drop(state);
    if silent || hanging {
        if hanging {
            (&stream).write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{")?;
        }
        // Until the client gives up.
        reader.read_line(&mut String::new())?;
        return Ok(());
    }
    if endless {
        (&stream).write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
        loop {
            (&stream).write_all(&[b' '; 1 << 14])?;
        }
    }
    match request.path.strip_prefix("/cdn/") {
        Some(hash) => content(stream, &request, hash, shared),
        None => resolve(stream, &request, port, shared),
    }
}

fn respond(mut stream: TcpStream, status: &str, headers: &[(&str, &str)], body: &[u8], head: bool) -> std::io::Result<()> {
    let mut text = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
    headers.iter().for_each(|(name, value)| text.push_str(&format!("{name}: {value}\r\n")));
    stream.write_all(format!("{text}\r\n").as_bytes())?;
    if head { Ok(()) } else { stream.write_all(body) }
}

pub(crate) fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// `/{owner}/{name}/resolve/{revision}/{file}`: small files come at once, large ones from another host.
fn resolve(stream: TcpStream, request: &Request, port: u16, shared: &(Mutex<State>, Condvar)) -> std::io::Result<()> {
    let head = request.method == "HEAD";
    let state = shared.0.lock().unwrap();
    let token = request.headers.get("authorization").map(|v| v.trim_start_matches("Bearer ").to_string());
    if state.private && token.as_deref() != Some(TOKEN) {
        let status = if token.is_some() { "403 Forbidden" } else { "401 Unauthorized" };
        return respond(stream, status, &[("X-Error-Code", "GatedRepo"), ("X-Error-Message", "this model is gated")], b"{}", head);
    }
    let commit = if state.head.is_empty() { COMMIT } else { &state.head };
    let path = request.path.trim_start_matches('/');
    let listed = path.strip_prefix("api/").map(|p| p.split_once("/revision/").unwrap());
    let (id, rest) = listed.unwrap_or_else(|| path.split_once("/resolve/").unwrap());
    let (revision, file) = rest.split_once('/').unwrap_or((rest, ""));
    if !state.files.keys().any(|f| f.starts_with(&format!("{id}/"))) {
        return respond(stream, "404 Not Found", &[("X-Error-Code", "RepoNotFound")], b"", head);
    }
    if !["main", "v1", commit].contains(&revision) {
        return respond(stream, "404 Not Found", &[("X-Error-Code", "RevisionNotFound")], b"", head);
    }
    if listed.is_some() {
        let names = state.files.keys().filter_map(|f| f.strip_prefix(&format!("{id}/")));
        let siblings: Vec<_> = names.map(|n| serde_json::json!({"rfilename": n})).collect();
        let body = serde_json::json!({"id": id, "sha": commit, "siblings": siblings}).to_string();
        return respond(stream, "200 OK", &[("Content-Type", "application/json")], body.as_bytes(), head);
    }
    let Some(bytes) = state.files.get(&format!("{id}/{file}")) else {
        return respond(stream, "404 Not Found", &[("X-Error-Code", "EntryNotFound"), ("X-Repo-Commit", commit)], b"", head);
    };
    let sha = hash(bytes);
    let large = [".safetensors", ".bin", ".pt", ".parquet", ".tar"].iter().any(|e| file.ends_with(e));
    if !large && state.unsized_files {
        let mut stream = stream;
        let head_of = format!("HTTP/1.1 200 OK\r\nConnection: close\r\nX-Repo-Commit: {commit}\r\nETag: \"{}\"\r\n\r\n", &sha[..40]);
        stream.write_all(head_of.as_bytes())?;
        return if head { Ok(()) } else { stream.write_all(bytes) };
    }
    if !large {
        return respond(stream, "200 OK", &[("X-Repo-Commit", commit), ("ETag", &format!("\"{}\"", &sha[..40]))], bytes, head);
    }
    // Another name of the same host: a token must not follow there.
    let (location, size) = (format!("http://localhost:{port}/cdn/{sha}"), (bytes.len() + state.lie).to_string());
    let etag = format!("\"{sha}\"");
    let headers = [
        ("Location", location.as_str()),
        ("X-Linked-Size", &size),
        ("X-Linked-ETag", &etag),
        ("X-Repo-Commit", commit),
        ("ETag", "\"of-the-redirect\""),
    ];
    respond(stream, "302 Found", &headers, b"", head)
}

/// The bytes of a large file, from where they are asked for.
fn content(mut stream: TcpStream, request: &Request, sha: &str, shared: &(Mutex<State>, Condvar)) -> std::io::Result<()> {
    assert!(!request.headers.contains_key("authorization"), "the token went to another host");
    let mut state = shared.0.lock().unwrap();
    if state.together > 0 {
        let asked = |s: &State| s.log.iter().filter(|l| l.starts_with("HEAD") && l.contains("model.safetensors ")).count();
        let limit = std::time::Duration::from_secs(20);
        state = shared.1.wait_timeout_while(state, limit, |s| asked(s) < s.together).unwrap().0;
    }
    let mut bytes = state.files.values().find(|b| hash(b) == sha).unwrap().clone();
    if state.damaged {
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
    }
    let from: usize = request.headers.get("range").map_or(0, |r| r.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap());
    let (cut, total) = (state.cut.unwrap_or(bytes.len()).min(bytes.len()), bytes.len());
    drop(state);
    let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
    let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", total - from);
    stream.write_all(head.as_bytes())?;
    // In pieces of any size, as over a long line.
    stream.set_nodelay(true)?;
    bytes.get(from..cut.max(from)).unwrap_or_default().chunks(1460).try_for_each(|piece| stream.write_all(piece))
}
