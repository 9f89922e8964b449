//! The one error type. Its variants follow what the caller can do about it, and
//! so does the exit code: see [`Error::exit_code`].

use std::fmt;

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The recipe, a file or a flag is wrong. Exit code 2.
    #[error("{0}")]
    Input(Box<Problem>),
    /// A check that was asked for failed, such as merge parity. Exit code 1.
    #[error("{0}")]
    Verdict(String),
    /// The machine failed us: disk, device, memory, non-finite numbers. Exit code 3.
    #[error("{0}")]
    Fault(Box<Problem>),
    /// Stopped by a signal after the state was saved. Exit code 128 + signal.
    #[error("{message}")]
    Interrupted {
        /// What was saved and how to go on.
        message: String,
        /// The signal's number (2 for SIGINT, 15 for SIGTERM).
        signal: i32,
    },
    /// A tensor operation failed. Exit code 3.
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
}

/// Where it went wrong, what was expected and found, and the way out.
#[derive(Debug, Clone)]
pub struct Problem {
    /// The place: a file with line, a recipe key, a flag.
    pub place: String,
    /// What was expected and what was found.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// An error as JSON has it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Report {
    /// `input` where a file, a flag or a line is wrong; `fault` where the machine is.
    pub kind: String,
    /// The place, as in [`Problem`].
    pub place: String,
    /// What was expected and what was found.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.place.is_empty() {
            write!(f, "{}: ", self.place)?;
        }
        f.write_str(&self.message)?;
        if let Some(hint) = &self.hint {
            write!(f, "\n  help: {hint}")?;
        }
        Ok(())
    }
}

impl Error {
    /// Bad input at `place` (a file, a recipe key, a flag).
    pub fn input(place: impl fmt::Display, message: impl fmt::Display) -> Self {
        Self::Input(Problem::boxed(place, message))
    }

    /// A fault of the machine at `place`.
    pub fn fault(place: impl fmt::Display, message: impl fmt::Display) -> Self {
        Self::Fault(Problem::boxed(place, message))
    }

    /// A failed read of an input file: missing and unreadable files are bad input. What the machine lacks or breaks is its fault.
    pub fn read(path: impl AsRef<std::path::Path>, error: std::io::Error) -> Self {
        let place = path.as_ref().display();
        if error.kind() == std::io::ErrorKind::NotFound {
            return Self::input(place, "no such file or directory");
        }
        let message = format!("cannot be read: {error}");
        match machine(&error) {
            Some(hint) => Self::fault(place, message).hint(hint),
            None => Self::input(place, message),
        }
    }

    /// A failed write: a fault, since the path was ours to write.
    pub fn write(path: impl AsRef<std::path::Path>, error: std::io::Error) -> Self {
        use std::io::ErrorKind as Kind;
        let fault = Self::fault(path.as_ref().display(), format!("cannot be written: {error}"));
        match error.kind() {
            Kind::StorageFull | Kind::QuotaExceeded | Kind::FileTooLarge => {
                fault.hint("no file is half-written; make room and run the command again (train: with --resume)")
            }
            Kind::ReadOnlyFilesystem | Kind::PermissionDenied => fault.hint("choose a place that may be written to, or change its rights"),
            Kind::NotFound => fault.hint("the directory was removed while it was written to; run the command again"),
            Kind::CrossesDevices => fault.hint(
                "a layer of an overlay file system gives no directory away: put a copy in its place (cp -r, rm -r, mv) and run the \
                 command again, or choose another place",
            ),
            _ => fault.hint(
                machine(&error).unwrap_or("see what the system says of this place, then run the command again (train: with --resume)"),
            ),
        }
    }

    /// The same about `to` wherever it names `from`, a temporary place.
    #[must_use]
    pub(crate) fn moved(self, from: &std::path::Path, to: &std::path::Path) -> Self {
        let (from, to) = (from.display().to_string(), to.display().to_string());
        let text = |s: String| s.replace(&from, &to);
        let problem = |p: Box<Problem>| Box::new(Problem { place: text(p.place), message: text(p.message), hint: p.hint.map(text) });
        match self {
            Self::Input(p) => Self::Input(problem(p)),
            Self::Fault(p) => Self::Fault(problem(p)),
            Self::Verdict(message) => Self::Verdict(text(message)),
            other => other,
        }
    }

    /// Adds the way out. No effect on variants without a [`Problem`].
    #[must_use]
    pub fn hint(mut self, hint: impl fmt::Display) -> Self {
        if let Self::Input(p) | Self::Fault(p) = &mut self {
            p.hint = Some(hint.to_string());
        }
        self
    }

    /// Whether a device's memory did not suffice. candle hands on what CUDA's and Metal's drivers say, as text.
    #[must_use]
    pub fn is_out_of_memory(&self) -> bool {
        let Self::Tensor(error) = self else { return false };
        let text = format!("{error} {error:?}").to_lowercase();
        ["out_of_memory", "out of memory", "alloc_failed", "failed to create metal resource"].iter().any(|t| text.contains(t))
    }

    /// The parts of the error, for programs.
    #[must_use]
    pub fn report(&self) -> Report {
        let kind = match self {
            Self::Input(_) => "input",
            Self::Verdict(_) => "verdict",
            Self::Interrupted { .. } => "interrupted",
            Self::Fault(_) | Self::Tensor(_) => "fault",
        };
        let problem = match self {
            Self::Input(p) | Self::Fault(p) => (**p).clone(),
            other => Problem { place: String::new(), message: other.to_string(), hint: None },
        };
        Report { kind: kind.into(), place: problem.place, message: problem.message, hint: problem.hint }
    }

    /// The process exit code for this error.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Verdict(_) => 1,
            Self::Input(_) => 2,
            Self::Fault(_) | Self::Tensor(_) => 3,
            Self::Interrupted { signal, .. } => 128 + signal,
        }
    }
}

/// What to do where the machine is at fault, and not the file.
fn machine(error: &std::io::Error) -> Option<&'static str> {
    #[cfg(any(target_os = "linux", target_vendor = "apple"))]
    {
        use rustix::io::Errno;
        match Errno::from_io_error(error)? {
            Errno::MFILE | Errno::NFILE => Some("too many files are open: raise the limit (ulimit -n), or use fewer --threads"),
            Errno::NOMEM | Errno::AGAIN => Some("memory or processes are short: stop others, or raise the limits (ulimit -v, ulimit -u)"),
            Errno::IO => Some("the disk or its file system has a fault: see what the system's log says of it, then run the command again"),
            _ => None,
        }
    }
    #[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
    {
        let _ = error;
        None
    }
}

impl Problem {
    fn boxed(place: impl fmt::Display, message: impl fmt::Display) -> Box<Self> {
        Box::new(Self { place: place.to_string(), message: message.to_string(), hint: None })
    }
}
