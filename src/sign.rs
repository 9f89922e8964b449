//! Signatures of adapters, as minisign makes them (Ed25519 over BLAKE2b-512).
//!
//! A directory is signed through `B3SUMS`, the blake3 of each of its files in the format of `b3sum`; `B3SUMS.minisig` is the
//! signature of that file. A single file has its signature beside it, `FILE.minisig`. Other programs check both:
//! `b3sum --check B3SUMS`, `minisign -Vm B3SUMS -p peft.pub`.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

pub use minisign::PublicKey;
use minisign::{KeyPair, PublicKeyBox, SecretKey, SecretKeyBox, SignatureBox};

use crate::error::{Error, Result};
use crate::files;

/// Digests of a directory's files.
pub const SUMS: &str = "B3SUMS";

const SIGNATURE: &str = "minisig";

/// Their signature.
pub(crate) const SUMS_SIGNATURE: &str = "B3SUMS.minisig";

/// The largest key, signature or list of digests that is read.
const MAX_TEXT: u64 = 16 << 20;

/// The largest file that is signed.
const MAX_FILE: u64 = 64 << 30;

static TRUSTED: OnceLock<Vec<PublicKey>> = OnceLock::new();

/// Makes a key pair: `NAME.key`, which only its owner can read, and `NAME.pub`. The password encrypts the secret one. Where a kill
/// left the secret key alone, its public one is made.
///
/// # Errors
/// When the public one exists, the secret one that exists cannot be read, or the disk refuses.
pub fn generate(name: &Path, password: Option<String>) -> Result<[PathBuf; 2]> {
    let paths = ["key", "pub"].map(|extension| with_extension(name, extension));
    let [secret, public] = &paths;
    if public.exists() {
        return Err(Error::input(public.display(), "exists").hint("choose another name; a key that is lost cannot be made again"));
    }
    let fault = |e: minisign::PError| Error::fault("key pair", e);
    let key = if secret.exists() {
        PublicKey::from_secret_key(&secret_key(secret, password)?).map_err(fault)?
    } else {
        let pair = match password {
            Some(password) => KeyPair::generate_encrypted_keypair(Some(password)),
            None => KeyPair::generate_unencrypted_keypair(),
        };
        let pair = pair.map_err(fault)?;
        files::write_private(secret, pair.sk.to_box(Some("peft secret key")).map_err(fault)?.into_string().as_bytes())?;
        pair.pk
    };
    files::write_atomic(public, key.to_box().map_err(fault)?.into_string().as_bytes())?;
    Ok(paths)
}

fn secret_key(path: &Path, password: Option<String>) -> Result<SecretKey> {
    let text = files::read_text(path, MAX_TEXT)?;
    let wrong = |e: minisign::PError| Error::input(path.display(), format!("cannot be used to sign: {e}"));
    let boxed = SecretKeyBox::from_string(&text).map_err(wrong)?;
    match password {
        Some(password) => boxed.into_secret_key(Some(password)).map_err(wrong),
        None => boxed.into_unencrypted_secret_key().map_err(|e| wrong(e).hint("PEFT_KEY_PASSWORD holds the password of an encrypted key")),
    }
}

fn with_extension(path: &Path, extension: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{extension}"));
    name.into()
}

/// Signs an adapter's directory or a file; returns the signature's path.
///
/// # Errors
/// When the key or its password is wrong, or the disk refuses.
pub fn sign(path: &Path, key: &Path, password: Option<String>) -> Result<PathBuf> {
    let secret = secret_key(key, password)?;
    let (place, bytes) = match path.is_dir() {
        true => (path.join(SUMS), sums(&digests(path)?).into_bytes()),
        false => (path.to_path_buf(), files::read(path, MAX_FILE)?),
    };
    let comment = format!("file:{}\thashed", place.file_name().unwrap_or_default().to_string_lossy());
    let signature = minisign::sign(None, &secret, Cursor::new(&bytes), Some(&comment), Some("signature from peft"))
        .map_err(|e| Error::fault(place.display(), e))?;
    if path.is_dir() {
        files::write_atomic(&place, &bytes)?;
    }
    let target = with_extension(&place, SIGNATURE);
    files::write_atomic(&target, signature.into_string().as_bytes())?;
    Ok(target)
}

/// A public key: a file, or the key itself as its second line has it.
///
/// # Errors
/// When it is neither.
pub fn public_key(key: &str) -> Result<PublicKey> {
    let wrong = |e: minisign::PError| Error::input(key, format!("is no public key of minisign's: {e}"));
    let path = Path::new(key);
    if path.is_file() {
        let text = files::read_text(path, MAX_TEXT)?;
        return PublicKeyBox::from_string(&text).and_then(PublicKeyBox::into_public_key).map_err(wrong);
    }
    PublicKey::from_base64(key).map_err(|e| wrong(e).hint("name a .pub file, or pass the line that begins with RW"))
}

/// From now on no adapter is read in this process unless one of these keys has signed it. The first call holds.
pub fn require(keys: Vec<PublicKey>) {
    let _ = TRUSTED.set(keys);
}

/// Refuses what no trusted key has signed, where keys were named.
///
/// # Errors
/// When `path` is unsigned, signed by another key, or changed since.
pub fn check_trust(path: &Path) -> Result<()> {
    match TRUSTED.get() {
        Some(keys) if !keys.is_empty() => verify(path, keys).map(drop),
        _ => Ok(()),
    }
}

/// Checks an adapter's files against their digests, and with keys the signature of these. Returns how many files there are.
///
/// # Errors
/// When a file is missing, unexpected or changed, or no key has signed.
pub fn verify(path: &Path, keys: &[PublicKey]) -> Result<usize> {
    let place = if path.is_dir() { path.join(SUMS) } else { path.to_path_buf() };
    if path.is_dir() && !place.is_file() {
        return Err(Error::input(path.display(), format!("is not signed: there is no {SUMS}")).hint("its author signs it with `peft sign`"));
    }
    let bytes = files::read(&place, if path.is_dir() { MAX_TEXT } else { MAX_FILE })?;
    if !keys.is_empty() {
        check_signature(&place, &bytes, keys)?;
    }
    if !path.is_dir() {
        return Ok(1);
    }
    let expected = parse(&place, &String::from_utf8_lossy(&bytes))?;
    let found = digests(path)?;
    let names = expected.keys().chain(found.keys()).collect::<std::collections::BTreeSet<_>>();
    let wrong = names.into_iter().filter_map(|name| match (expected.get(name), found.get(name)) {
        (Some(a), Some(b)) if a == b => None,
        (Some(_), Some(_)) => Some(format!("  changed: {name}")),
        (Some(_), None) => Some(format!("  missing: {name}")),
        _ => Some(format!("  unexpected: {name}")),
    });
    let wrong: Vec<String> = wrong.collect();
    match wrong.is_empty() {
        true => Ok(found.len()),
        false => Err(Error::input(path.display(), format!("is not what {SUMS} says:\n{}", wrong.join("\n")))),
    }
}

fn check_signature(place: &Path, bytes: &[u8], keys: &[PublicKey]) -> Result<()> {
    let path = with_extension(place, SIGNATURE);
    if !path.is_file() {
        return Err(
            Error::input(place.display(), "is not signed: there is no .minisig beside it").hint("its author signs it with `peft sign`")
        );
    }
    let text = files::read_text(&path, MAX_TEXT)?;
    let signature =
        SignatureBox::from_string(&text).map_err(|e| Error::input(path.display(), format!("is no signature of minisign's: {e}")))?;
    let good = |key: &PublicKey| minisign::verify(key, &signature, Cursor::new(bytes), true, false, false).is_ok();
    match keys.iter().any(good) {
        true => Ok(()),
        false => Err(Error::input(place.display(), "was not signed by a trusted key, or has changed since")
            .hint("--trusted-key names whose signature is accepted")),
    }
}

/// blake3 of each file under a directory, by its path with `/`; apart from the signature's own files and from what a kill left
/// half-written, which nothing reads and the next writer removes.
fn digests(dir: &Path) -> Result<BTreeMap<String, String>> {
    let mut all = BTreeMap::new();
    // What is behind a link is read, so it is signed: a hub's cache consists of links, and the directory may be one itself.
    for entry in walkdir::WalkDir::new(dir).follow_links(true).min_depth(1).sort_by_file_name() {
        let entry = entry.map_err(|e| Error::input(dir.display(), e))?;
        let Ok(name) = entry.path().strip_prefix(dir) else { continue };
        if entry.file_type().is_dir() {
            continue;
        }
        let name: Vec<_> = name.iter().map(|part| part.to_string_lossy()).collect();
        if name.iter().any(|part| files::is_temporary(part)) {
            continue;
        }
        let name = name.join("/");
        if name == SUMS || name == SUMS_SIGNATURE {
            continue;
        }
        let bytes = files::read(entry.path(), MAX_FILE)?;
        all.insert(name, blake3::hash(&bytes).to_hex().to_string());
    }
    Ok(all)
}

fn sums(digests: &BTreeMap<String, String>) -> String {
    digests.iter().map(|(name, digest)| format!("{digest}  {name}\n")).collect()
}

/// The files that a list of digests names.
///
/// # Errors
/// When it cannot be read or is not one.
pub(crate) fn listed(sums: &Path) -> Result<Vec<String>> {
    let text = files::read_text(sums, MAX_TEXT)?;
    Ok(parse(sums, &text)?.into_keys().collect())
}

fn parse(place: &Path, text: &str) -> Result<BTreeMap<String, String>> {
    let line = |(i, line): (usize, &str)| {
        line.split_once("  ").map(|(digest, name)| (name.to_string(), digest.to_string())).ok_or_else(|| {
            Error::input(format!("{}:{}", place.display(), i + 1), "expected a digest, two spaces and a file name, as b3sum writes them")
        })
    };
    text.lines().enumerate().map(line).collect()
}
