//! How a base is named: `NAME[@REVISION][?arch=NAME&image_size=N]`.

use std::fmt;
use std::path::Path;

use crate::error::{Error, Result};

/// A base's name and what its files do not say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Spec {
    /// `builtin:<name>`, a directory, a checkpoint file or a hub id.
    pub name: String,
    /// open_clip's name of the architecture, for checkpoints that do not say it.
    pub arch: Option<String>,
    /// Side of the square input in pixels, other than the checkpoint's; positional embeddings are interpolated.
    pub image_size: Option<usize>,
}

impl Spec {
    /// Takes a spec apart. A path that exists is a name as a whole.
    ///
    /// # Errors
    /// When an option is unknown or malformed.
    pub fn parse(spec: &str) -> Result<Self> {
        let (name, options) = match spec.split_once('?') {
            Some(parts) if !Path::new(spec).exists() => parts,
            _ => return Ok(Self { name: spec.to_string(), ..Self::default() }),
        };
        let mut parsed = Self { name: name.to_string(), ..Self::default() };
        for option in options.split('&') {
            match option.split_once('=') {
                Some(("arch", arch)) if !arch.is_empty() => parsed.arch = Some(arch.to_string()),
                Some(("image_size", size)) => {
                    let size = size.parse().ok().filter(|n| *n > 0);
                    let expected = || Error::input(spec, format!("`{option}`: expected a number of pixels from 1"));
                    parsed.image_size = Some(size.ok_or_else(expected)?);
                }
                _ => {
                    return Err(Error::input(spec, format!("`{option}`: expected arch=NAME or image_size=N"))
                        .hint("for example clip.pt?arch=ViT-B-32-quickgelu&image_size=336"));
                }
            }
        }
        Ok(parsed)
    }

    /// A name with options on top of those that it has.
    ///
    /// # Errors
    /// When the name's own options are malformed.
    pub fn with(name: &str, arch: Option<&str>, image_size: Option<usize>) -> Result<String> {
        let mut spec = Self::parse(name)?;
        spec.arch = arch.map(ToString::to_string).or(spec.arch);
        spec.image_size = image_size.or(spec.image_size);
        Ok(spec.to_string())
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        let arch = self.arch.as_ref().map(|a| format!("arch={a}"));
        let size = self.image_size.map(|n| format!("image_size={n}"));
        for (option, mark) in arch.iter().chain(&size).zip(['?', '&']) {
            write!(f, "{mark}{option}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn options_survive_the_way_there_and_back() {
        for text in ["builtin:tiny", "a/b@main", "x.pt?arch=ViT-B-32", "x.pt?image_size=336", "x.pt?arch=ViT-B-32&image_size=336"] {
            assert_eq!(Spec::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Spec::with("x.pt?arch=A", None, Some(8)).unwrap(), "x.pt?arch=A&image_size=8");
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["x.pt?", "x.pt?arch=", "x.pt?size=3", "x.pt?image_size=0", "x.pt?image_size=big"] {
            assert_eq!(Spec::parse(text).unwrap_err().exit_code(), 2, "{text}");
        }
    }
}
