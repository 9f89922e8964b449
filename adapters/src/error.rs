//! What can go wrong when a method is planned or loaded.

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A method's configuration does not fit the model, or a tensor operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value of the configuration is outside its range or contradicts another.
    #[error("{key}: {message}")]
    Config {
        /// The key inside the method's configuration, such as `rank`.
        key: String,
        /// What was expected and what was found.
        message: String,
    },
    /// Targets, layers or towers select no site.
    #[error("{key}: {message}; the model has these sites: {}", .sites.join(", "))]
    NoSites {
        /// The key inside the method's configuration.
        key: String,
        /// What was asked for.
        message: String,
        /// The sites that exist, layers collapsed to `{i}`.
        sites: Vec<String>,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    /// A wrong value at `key`.
    pub fn config(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Config { key: key.into(), message: message.into() }
    }
}
