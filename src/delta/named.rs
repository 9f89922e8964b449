//! The base that an adapter names, for who has the adapter alone.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{file, locate};
use crate::error::{Error, Result};
use crate::files;

/// The largest file that may name a base.
const MAX_JSON: u64 = 64 << 20;

/// The base that an adapter names: in `peft.json`, or as HF PEFT does in `adapter_config.json`. `None` where it names none.
///
/// A relative path is one from the working directory, as in the recipe. Where nothing is there, the directories above the adapter
/// are tried, since runs usually lie in the project that they were started from. Which base it is, its digest says when the
/// adapter is put on it.
///
/// # Errors
/// When the adapter cannot be read, or names a base that is not here.
pub fn named_base(adapter: &Path) -> Result<Option<String>> {
    let dir = locate(adapter)?;
    let dir = if dir.is_file() { dir.parent().unwrap_or(Path::new(".")).to_path_buf() } else { dir };
    let named = |name: &str, keys: &[&str]| -> Result<Option<String>> {
        let path = dir.join(name);
        let Some(text) = files::find_text(&path, MAX_JSON)? else { return Ok(None) };
        let value: Value = crate::json::from_slice(text.as_bytes()).map_err(|e| Error::input(path.display(), e))?;
        let found = keys.iter().try_fold(&value, |value, key| value.get(key)).and_then(Value::as_str);
        Ok(found.filter(|name| !name.is_empty()).map(ToString::to_string))
    };
    let name = match named(file::MANIFEST, &["base", "name"])? {
        Some(name) => Some(name),
        None => named(file::CONFIG, &["base_model_name_or_path"])?,
    };
    name.map(|name| here(&dir, name)).transpose()
}

/// The name as it can be loaded from the working directory.
fn here(adapter: &Path, name: String) -> Result<String> {
    let (path, options) = name.split_once('?').map_or((name.as_str(), ""), |(path, _)| (path, &name[path.len()..]));
    // `builtin:tiny` and `owner/name`; a path with one part or two may be either, and what is on the disk comes first.
    if Path::new(path).exists() || path.starts_with("builtin:") {
        return Ok(name);
    }
    let above = adapter.canonicalize().map_err(|e| Error::read(adapter, e))?;
    let found: Option<PathBuf> = Some(path)
        .filter(|p| Path::new(p).is_relative())
        .and_then(|p| above.ancestors().skip(1).map(|dir| dir.join(p)).find(|p| p.exists()));
    match found {
        Some(found) => Ok(format!("{}{options}", found.display())),
        None if crate::hub::Repo::parse(path).is_some() => Ok(name),
        None => Err(Error::input(adapter.display(), format!("names its base `{name}`, which is not here"))),
    }
}
