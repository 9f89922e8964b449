//! A source that is given by its path alone: `folder: data/pets` is `folder: { root: data/pets }`.

use std::fmt;
use std::marker::PhantomData;
use std::path::PathBuf;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Deserialize, DeserializeOwned, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use super::{CocoConfig, CoopConfig, Draw, FolderConfig, ParquetConfig, Paths, TableConfig, VqaConfig, WebDatasetConfig};

/// A source that one path, or several, can stand for.
pub(super) trait Bare: DeserializeOwned {
    /// How it is written in full.
    const FORM: &'static str;
    /// Whether it takes a list.
    const LIST: bool = false;
    /// The source at a path, with everything else as it is by default; nothing where more has to be said.
    fn at(paths: Paths) -> Option<Self>;
}

fn one(paths: &Paths) -> PathBuf {
    paths.patterns().first().map(PathBuf::from).unwrap_or_default()
}

impl Bare for FolderConfig {
    const FORM: &'static str = "{ root: DIR }";
    fn at(paths: Paths) -> Option<Self> {
        Some(Self { root: one(&paths) })
    }
}

impl Bare for TableConfig {
    const FORM: &'static str = "{ path: FILE }";
    fn at(paths: Paths) -> Option<Self> {
        Some(Self { path: one(&paths), ..Self::default() })
    }
}

impl Bare for ParquetConfig {
    const FORM: &'static str = "{ path: FILES }";
    const LIST: bool = true;
    fn at(path: Paths) -> Option<Self> {
        Some(Self { path, ..Self::default() })
    }
}

impl Bare for WebDatasetConfig {
    const FORM: &'static str = "{ path: FILES }";
    const LIST: bool = true;
    fn at(path: Paths) -> Option<Self> {
        Some(Self { path, ..Self::default() })
    }
}

impl Bare for CocoConfig {
    const FORM: &'static str = "{ path: FILE }";
    fn at(paths: Paths) -> Option<Self> {
        Some(Self { path: one(&paths), val: None, test: None, images: None })
    }
}

impl Bare for CoopConfig {
    const FORM: &'static str = "{ root: DIR }";
    fn at(paths: Paths) -> Option<Self> {
        Some(Self { root: one(&paths), split: None, images: None, draw: Draw::default() })
    }
}

impl Bare for VqaConfig {
    const FORM: &'static str = "{ questions: FILE, annotations: FILE }";
    fn at(_: Paths) -> Option<Self> {
        None
    }
}

/// Reads a source from its path or from its keys.
///
/// # Errors
/// What the source itself says of its keys; how it is written where it is neither.
pub(super) fn source<'de, D: Deserializer<'de>, T: Bare>(deserializer: D) -> Result<Option<T>, D::Error> {
    deserializer.deserialize_any(Source(PhantomData))
}

struct Source<T>(PhantomData<T>);

impl<'de, T: Bare> Visitor<'de> for Source<T> {
    type Value = Option<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`", T::FORM)
    }

    fn visit_str<E: Error>(self, path: &str) -> Result<Self::Value, E> {
        T::at(Paths::One(path.into())).map(Some).ok_or_else(|| E::custom(format!("expected `{}`, found a path", T::FORM)))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
        let paths = Vec::<String>::deserialize(SeqAccessDeserializer::new(list))?;
        T::at(Paths::Many(paths))
            .filter(|_| T::LIST)
            .map(Some)
            .ok_or_else(|| A::Error::custom(format!("expected `{}`, found a list", T::FORM)))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map(Some)
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_none<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}
