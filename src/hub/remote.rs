//! The hub's side: `HEAD` and `GET` of `{endpoint}/{owner}/{name}/resolve/{revision}/{file}`.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use ureq::http::Response;
use ureq::{Agent, Body};

use super::cache::{home, is_commit};
use super::{Kind, Progress, Repo, Transfer};
use crate::error::{Error, Result};
use crate::files::{self, Output};

const ENDPOINT: &str = "https://huggingface.co";

/// Without an answer, or without [`SLOWEST`] more bytes of it, for so long a connection counts as lost.
const PATIENCE: Duration = Duration::from_secs(30);

/// The same in seconds, as `huggingface_hub` reads it.
const TIMEOUT: &str = "HF_HUB_DOWNLOAD_TIMEOUT";

/// A connection that brings less in [`PATIENCE`] is as good as silent.
const SLOWEST: u64 = 4096;

/// The largest file that is fetched where the hub does not say its size.
const MAX_UNSIZED: u64 = 16 << 30;

/// Another limit, in bytes.
const LIMIT: &str = "PEFT_HUB_MAX_UNSIZED";

/// No file is larger, whatever the hub says.
const MAX_FILE: u64 = 1 << 40;

/// How often a lost connection is opened again where nothing came in between.
const RETRIES: usize = 3;
const PAUSE: Duration = Duration::from_millis(50);

/// A list of files has at most so many bytes.
const MAX_LISTING: u64 = 64 << 20;

const MAX_REDIRECTS: usize = 10;
const PIECE: usize = 1 << 18;

/// Where files come from, and as whom.
pub(super) struct Remote {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
    repo: Repo,
    patience: Duration,
    max_unsized: u64,
}

/// What the hub says of a file.
pub(super) struct Meta {
    pub(super) commit: String,
    pub(super) etag: String,
    /// 0 when the hub does not say.
    pub(super) size: u64,
}

pub(super) enum Answer {
    Found(Meta),
    /// There is no such file at this commit.
    Missing(Option<String>),
}

/// What the API says of a repository.
#[derive(serde::Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(serde::Deserialize)]
struct Sibling {
    rfilename: String,
}

pub(super) enum Failure {
    /// No answer, or one that says to try later.
    Unreachable(String),
    /// 401 or 403, and what the hub says.
    Refused(u16, String),
    /// The repository, or its revision.
    NotFound(&'static str),
    Other(String),
}

impl Remote {
    pub(super) fn from_env(repo: &Repo) -> Result<Self> {
        let endpoint = std::env::var("HF_ENDPOINT").ok().filter(|v| !v.is_empty()).unwrap_or_else(|| ENDPOINT.into());
        if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
            return Err(Error::input("HF_ENDPOINT", format!("expected an http or https address, found `{endpoint}`")));
        }
        let patience = number_of(TIMEOUT, "a number of seconds above 0")?.map_or(PATIENCE, Duration::from_secs_f64);
        let max_unsized = number_of(LIMIT, "a number of bytes above 0")?.map_or(MAX_UNSIZED, |bytes| bytes as u64);
        let config = Agent::config_builder()
            .max_redirects(0)
            .http_status_as_error(false)
            .timeout_resolve(Some(patience))
            .timeout_connect(Some(patience))
            .timeout_send_request(Some(patience))
            .timeout_recv_response(Some(patience))
            .timeout_per_read(Some(patience))
            .user_agent(concat!("peft/", env!("CARGO_PKG_VERSION")))
            .build();
        let endpoint = endpoint.trim_end_matches('/').to_string();
        Ok(Self { agent: config.into(), endpoint, token: token(), repo: repo.clone(), patience, max_unsized })
    }

    fn url(&self, revision: &str, file: &str) -> String {
        format!("{}/resolve/{}/{}", self.page(), encoded(revision, ""), encoded(file, "/"))
    }

    /// The repository's page.
    fn page(&self) -> String {
        let kind = if self.repo.kind == Kind::Dataset { "datasets/" } else { "" };
        format!("{}/{kind}{}", self.endpoint, self.repo.id)
    }

    /// The commit of a revision and the names of all files, as the hub's API gives them.
    pub(super) fn list(&self, revision: &str) -> std::result::Result<(String, Vec<String>), Failure> {
        let url = format!("{}/api/{}s/{}/revision/{}", self.endpoint, self.repo.kind.name(), self.repo.id, encoded(revision, ""));
        let mut response = self.patient(true, &url)?;
        let status = response.status().as_u16();
        match (status, header(&response, "x-error-code")) {
            (200..=299, _) => {}
            (_, Some("RepoNotFound")) => return Err(Failure::NotFound("repository")),
            (_, Some("RevisionNotFound")) => return Err(Failure::NotFound("revision")),
            _ => return Err(refusal(&response)),
        }
        let mut text = Vec::new();
        let body = Paced::new(response.body_mut().as_reader(), self.patience);
        body.take(MAX_LISTING + 1).read_to_end(&mut text).map_err(|e| Failure::Unreachable(e.to_string()))?;
        if text.len() as u64 > MAX_LISTING {
            return Err(Failure::Other(format!("the list of files is larger than {MAX_LISTING} bytes")));
        }
        let found: Listing =
            serde_json::from_slice(&text).map_err(|e| Failure::Other(format!("the list of files is not understood: {e}")))?;
        match is_commit(&found.sha) {
            true => Ok((found.sha, found.siblings.into_iter().map(|s| s.rfilename).collect())),
            false => Err(Failure::Other(format!("the list of files has no commit but `{}`", found.sha))),
        }
    }

    /// Sends a request and follows redirects: with `elsewhere` wherever they lead, else only within the host.
    /// The token stays with the host it is for.
    fn send(&self, get: bool, url: &str, from: u64, elsewhere: bool) -> std::result::Result<Response<Body>, Failure> {
        let mut url = url.to_string();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = if get { self.agent.get(&url) } else { self.agent.head(&url) };
            // Sizes and pieces are of the file, not of what a proxy makes of it.
            request = request.header("Accept-Encoding", "identity");
            if from > 0 {
                request = request.header("Range", format!("bytes={from}-"));
            }
            if let Some(token) = self.token.as_ref().filter(|_| origin(&url) == origin(&self.endpoint)) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            let response = request.call().map_err(|e| Failure::Unreachable(e.to_string().trim().to_string()))?;
            let target = header(&response, "location").filter(|_| response.status().is_redirection());
            match target.map(|to| (joined(&url, to), to.contains("://") || to.starts_with("//"))) {
                // A redirect to another host says what the file is, or else its target does.
                Some((to, outside)) if elsewhere || !outside || header(&response, "x-repo-commit").is_none() => url = to,
                _ => return Ok(response),
            }
        }
        Err(Failure::Other(format!("redirected more than {MAX_REDIRECTS} times")))
    }

    /// Asks again where there is no answer, or one that says to.
    fn patient(&self, get: bool, url: &str) -> std::result::Result<Response<Body>, Failure> {
        let mut tries = 0;
        loop {
            match self.send(get, url, 0, false) {
                Err(Failure::Unreachable(_)) if tries < RETRIES => tries += 1,
                Ok(response) if retryable(response.status().as_u16()) && tries < RETRIES => tries += 1,
                other => return other,
            }
            pause(tries);
        }
    }

    /// What the hub says of a file. A redirect to where the bytes are says it itself.
    pub(super) fn head(&self, revision: &str, file: &str) -> std::result::Result<Answer, Failure> {
        let response = self.patient(false, &self.url(revision, file))?;
        let commit = header(&response, "x-repo-commit").filter(|c| is_commit(c)).map(ToString::to_string);
        let status = response.status().as_u16();
        match (status, header(&response, "x-error-code")) {
            (200..=399, _) => {}
            (_, Some("RepoNotFound")) => return Err(Failure::NotFound("repository")),
            (_, Some("RevisionNotFound")) => return Err(Failure::NotFound("revision")),
            (404, _) => return Ok(Answer::Missing(commit)),
            _ => return Err(refusal(&response)),
        }
        let number = |name: &str| header(&response, name).and_then(|v| v.parse().ok());
        let size = number("x-linked-size").or_else(|| number("content-length").filter(|_| status < 300)).unwrap_or(0);
        let etag = header(&response, "x-linked-etag").or_else(|| header(&response, "etag")).map(plain_etag);
        match (commit, etag.filter(|e| legal_etag(e))) {
            (Some(commit), Some(etag)) => Ok(Answer::Found(Meta { commit, etag: etag.to_string(), size })),
            _ => Err(Failure::Other("the answer lacks X-Repo-Commit or ETag; HF_ENDPOINT does not seem to be a model hub".into())),
        }
    }

    /// Fetches a file into `<blob>.incomplete`, from where an earlier attempt stopped, and renames it when it is whole.
    pub(super) fn download(&self, meta: &Meta, file: &str, blob: &Path, progress: &mut Progress<'_>) -> Result<()> {
        if meta.size > MAX_FILE {
            return Err(Error::input(self.place(file), format!("has {} bytes, says the hub; expected at most {MAX_FILE}", meta.size)));
        }
        let part = PathBuf::from(format!("{}.incomplete", blob.display()));
        let parent = blob.parent().unwrap_or(Path::new("."));
        files::create_dir_all(parent)?;
        let (mut idle, mut before) = (0, length(&part));
        loop {
            let lost = self.transfer(meta, file, &part, progress)?;
            let here = length(&part);
            let complete = if meta.size == 0 { lost.is_none() } else { here == meta.size };
            if complete {
                break;
            }
            // What drips could go on for ever.
            idle = if here >= before + SLOWEST { 0 } else { idle + 1 };
            before = here;
            if idle > RETRIES {
                let what = lost.map_or(String::new(), |why| format!(": {why}"));
                return Err(Error::fault(self.place(file), format!("expected {} bytes, the hub sent {here}{what}", meta.size))
                    .hint("run the command again: it goes on where it stopped"));
            }
            pause(idle);
        }
        if let Err(found) = verified(&part, meta) {
            files::remove(&part)?;
            return Err(Error::fault(self.place(file), format!("expected sha256 {}, found {found}", meta.etag))
                .hint("what was fetched is damaged and was removed; run the command again"));
        }
        files::rename(&part, blob)
    }

    /// One connection. Returns why it was lost, if it was.
    fn transfer(&self, meta: &Meta, file: &str, part: &Path, progress: &mut Progress<'_>) -> Result<Option<String>> {
        let mut from = length(part);
        if meta.size > 0 && from > meta.size {
            from = 0;
        }
        if meta.size > 0 && from == meta.size {
            return Ok(None);
        }
        let mut response = match self.send(true, &self.url(&meta.commit, file), from, true) {
            Ok(response) => response,
            Err(Failure::Unreachable(why)) => return Ok(Some(why)),
            Err(failure) => return Err(self.explain(failure, file)),
        };
        match response.status().as_u16() {
            206 => {}
            // The whole file, whatever was asked for.
            200..=299 => from = 0,
            // Nothing is left behind this point: the part is of another file.
            416 => {
                files::remove(part)?;
                return Ok(Some("the hub refused to go on there".into()));
            }
            status if retryable(status) => return Ok(Some(format!("HTTP {status}"))),
            _ => return Err(self.explain(refusal(&response), file)),
        }
        let mut out = Output::append(part)?;
        out.set_len(from)?;
        let (mut done, mut buffer) = (from, vec![0u8; PIECE]);
        let limit = if meta.size > 0 { meta.size } else { self.max_unsized };
        let mut body = Paced::new(response.body_mut().as_reader(), self.patience);
        loop {
            let (count, lost) =
                fill(&mut body, &mut buffer, |more| progress(Transfer { file, done: done + more as u64, total: meta.size }))?;
            done += count as u64;
            if done > limit {
                drop(out);
                files::remove(part)?;
                let place = self.place(file);
                return Err(match meta.size {
                    0 => Error::fault(place, format!("the hub does not say how large it is, and sends more than {limit} bytes"))
                        .hint(format!("{LIMIT} sets another limit; or fetch it with another program, and name the directory")),
                    size => Error::fault(place, format!("expected {size} bytes, the hub sends more")),
                });
            }
            if count > 0 {
                out.put(&buffer[..count])?;
            }
            if count < buffer.len() {
                out.sync()?;
                return Ok(lost);
            }
        }
    }

    fn place(&self, file: &str) -> String {
        format!("{} ({file})", self.repo)
    }

    /// What went wrong and what to do.
    pub(super) fn explain(&self, failure: Failure, file: &str) -> Error {
        let (page, kind) = (self.page(), self.repo.kind.name());
        let who = if self.token.is_some() { "the token" } else { "access without a token" };
        let error = |message: String| Error::input(self.place(file), message);
        match failure {
            Failure::Unreachable(why) => Error::fault(self.place(file), format!("{} cannot be reached: {why}", self.endpoint)).hint(
                "there is no file or directory of that name, so it was taken for a hub id; check the network, HF_ENDPOINT and \
                     proxies; HF_HUB_OFFLINE=1 uses what is in the cache",
            ),
            Failure::Refused(status, said) => error(format!("the hub refuses {who} ({status}{said})"))
                .hint(format!("set HF_TOKEN to a token that may read this {kind}; a gated {kind}'s terms are accepted at {page}")),
            Failure::NotFound("revision") => {
                error(format!("the {kind} has no revision `{}`", self.repo.revision)).hint(format!("{page}/tree/main lists them"))
            }
            Failure::NotFound(_) => error(format!("there is no such {kind} at {}, or {who} may not see it", self.endpoint))
                .hint(format!("check the name; set HF_TOKEN for a private {kind}; a directory is named with a leading ./")),
            Failure::Other(why) => Error::fault(self.place(file), why),
        }
    }
}

/// A number above 0 in an environment variable.
fn number_of(name: &str, expected: &str) -> Result<Option<f64>> {
    let Some(text) = std::env::var(name).ok().filter(|v| !v.trim().is_empty()) else { return Ok(None) };
    // More than a day or a tebibyte is no limit.
    let number = text.trim().parse().ok().filter(|n: &f64| *n > 0.0 && *n <= MAX_FILE as f64);
    number.map(Some).ok_or_else(|| Error::input(name, format!("expected {expected}, found `{text}`")))
}

/// A body that ends with an error where less than [`SLOWEST`] bytes arrive in the time of one's patience.
struct Paced<R> {
    body: R,
    patience: Duration,
    since: Instant,
    arrived: u64,
}

impl<R: Read> Paced<R> {
    fn new(body: R, patience: Duration) -> Self {
        Self { body, patience, since: Instant::now(), arrived: 0 }
    }
}

impl<R: Read> Read for Paced<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.body.read(buffer)?;
        self.arrived += count as u64;
        if self.arrived >= SLOWEST {
            (self.since, self.arrived) = (Instant::now(), 0);
        } else if count > 0 && self.since.elapsed() > self.patience {
            let why = format!("less than {SLOWEST} bytes came in {:?}", self.patience);
            return Err(std::io::Error::new(std::io::ErrorKind::TimedOut, why));
        }
        Ok(count)
    }
}

/// Reads until the buffer is full, the body has ended or the connection is lost; the bytes read, and why it was lost. What arrives
/// comes in pieces of any size; what is written should not.
fn fill(body: &mut impl Read, buffer: &mut [u8], mut told: impl FnMut(usize) -> Result<()>) -> Result<(usize, Option<String>)> {
    let mut count = 0;
    while count < buffer.len() {
        told(count)?;
        match body.read(&mut buffer[count..]) {
            Ok(0) => break,
            Ok(more) => count += more,
            Err(e) => return Ok((count, Some(e.to_string()))),
        }
    }
    Ok((count, None))
}

/// Longer each time.
fn pause(tries: usize) {
    std::thread::sleep(PAUSE * (tries * tries) as u32);
}

fn refusal(response: &Response<Body>) -> Failure {
    let said = header(response, "x-error-message").map_or(String::new(), |m| format!(": {m}"));
    match response.status().as_u16() {
        status @ (401 | 403) => Failure::Refused(status, said),
        status if retryable(status) => Failure::Unreachable(format!("HTTP {status}{said}")),
        status => Failure::Other(format!("the hub answers HTTP {status}{said}")),
    }
}

fn retryable(status: u16) -> bool {
    matches!(status, 408 | 429 | 500 | 502 | 503 | 504)
}

fn header<'r>(response: &'r Response<Body>, name: &str) -> Option<&'r str> {
    response.headers().get(name).and_then(|v| v.to_str().ok())
}

fn length(path: &Path) -> u64 {
    path.metadata().map_or(0, |m| m.len())
}

/// The hash of a large file is its etag.
fn verified(path: &Path, meta: &Meta) -> std::result::Result<(), String> {
    if meta.etag.len() != 64 {
        return Ok(());
    }
    let mut hasher = Sha256::new();
    File::open(path).and_then(|mut f| std::io::copy(&mut f, &mut hasher)).map_err(|e| e.to_string())?;
    let found: String = hasher.finalize().iter().map(|b| format!("{b:02x}")).collect();
    if found.eq_ignore_ascii_case(&meta.etag) { Ok(()) } else { Err(found) }
}

fn plain_etag(etag: &str) -> &str {
    etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"')
}

/// An etag becomes a file name.
fn legal_etag(etag: &str) -> bool {
    !etag.is_empty() && etag.len() <= 128 && etag.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

/// Percent-encoding of everything but unreserved characters and `keep`.
fn encoded(text: &str, keep: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b) || keep.as_bytes().contains(&b);
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

/// Scheme, host and port.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |i| i + 3);
    url.get(host..).and_then(|rest| rest.find('/')).map_or(url, |i| &url[..host + i])
}

/// Where a redirect leads.
fn joined(from: &str, to: &str) -> String {
    let scheme = from.split_once(':').map_or("https", |(scheme, _)| scheme);
    match to {
        _ if to.contains("://") => to.to_string(),
        _ if to.starts_with("//") => format!("{scheme}:{to}"),
        _ if to.starts_with('/') => format!("{}{to}", origin(from)),
        _ => format!("{}/{to}", from.rsplit_once('/').map_or(from, |(dir, _)| dir)),
    }
}

/// As `huggingface_hub` finds it: the variable, the named file, the file that logging in writes.
fn token() -> Option<String> {
    let set = |name: &str| std::env::var(name).ok().map(|v| v.trim().to_string()).filter(|v| !v.is_empty());
    if let Some(token) = set("HF_TOKEN").or_else(|| set("HUGGING_FACE_HUB_TOKEN")) {
        return Some(token);
    }
    if set("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some_and(|v| v != "0") {
        return None;
    }
    let path = set("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| home().map(|home| home.join("token")))?;
    crate::files::read_text(&path, 1 << 16).ok().map(|t| t.trim().to_string()).filter(|t| !t.is_empty())
}
