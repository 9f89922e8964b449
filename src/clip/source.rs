//! Where the files of a base come from.

use std::borrow::Cow;
use std::fmt;
use std::path::PathBuf;

use crate::builtin;
use crate::error::{Error, Result};
use crate::files;

/// The largest file that is read whole; weights are read piece by piece.
const MAX_FILE: u64 = 1 << 30;

/// A set of named files. Further kinds (a hub id, one checkpoint file) become further variants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A directory in HF layout.
    Dir(PathBuf),
    /// A base inside the binary, by name.
    Builtin(&'static str),
}

impl Source {
    /// Understands `builtin:<name>` and directories.
    ///
    /// # Errors
    /// When there is no such base.
    pub fn resolve(spec: &str) -> Result<Self> {
        if let Some(name) = spec.strip_prefix("builtin:") {
            return builtin::BASES.iter().find(|b| **b == name).map(|b| Self::Builtin(b)).ok_or_else(|| {
                Error::input(spec, format!("there is no such embedded base; there is builtin:{}", builtin::BASES.join(", builtin:")))
            });
        }
        let path = PathBuf::from(spec);
        if path.is_dir() {
            return Ok(Self::Dir(path));
        }
        let found = if path.exists() { "is a file, not a directory" } else { "no such directory" };
        Err(Error::input(spec, found).hint(
            "a base is a directory with config.json, model.safetensors, tokenizer.json and preprocessor_config.json, or builtin:tiny",
        ))
    }

    /// The content of a file, or nothing where there is no such file.
    ///
    /// # Errors
    /// When the file exists and cannot be read.
    pub fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>> {
        match self {
            Self::Builtin(base) => Ok(builtin::file(base, name).map(Cow::Borrowed)),
            Self::Dir(dir) => {
                let path = dir.join(name);
                if path.exists() { files::read(&path, MAX_FILE).map(|bytes| Some(Cow::Owned(bytes))) } else { Ok(None) }
            }
        }
    }

    /// The content of a file that has to be there.
    ///
    /// # Errors
    /// When it is missing or cannot be read.
    pub fn require(&self, name: &str) -> Result<Cow<'static, [u8]>> {
        self.read(name)?.ok_or_else(|| Error::input(self.place(name), "no such file in this base"))
    }

    /// Where a file lies on disk, if it does.
    #[must_use]
    pub fn path(&self, name: &str) -> Option<PathBuf> {
        match self {
            Self::Builtin(_) => None,
            Self::Dir(dir) => Some(dir.join(name)).filter(|p| p.exists()),
        }
    }

    /// A file's name for messages.
    #[must_use]
    pub fn place(&self, name: &str) -> String {
        match self {
            Self::Builtin(base) => format!("builtin:{base}/{name}"),
            Self::Dir(dir) => dir.join(name).display().to_string(),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Builtin(base) => write!(f, "builtin:{base}"),
            Self::Dir(dir) => write!(f, "{}", dir.display()),
        }
    }
}
