//! "A name, or a name with options": `lora`, `{ lora: { rank: 8 } }`.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::json;

/// Reads an externally tagged enum that also accepts a variant's bare name, which then has
/// its default options.
///
/// # Errors
/// What the enum itself says, with the position of the value.
pub fn one<'de, D: Deserializer<'de>, T: DeserializeOwned>(deserializer: D) -> Result<T, D::Error> {
    deserializer.deserialize_any(One(PhantomData))
}

/// [`one`] for an optional key; null is as good as leaving it out.
///
/// # Errors
/// As [`one`].
pub fn maybe<'de, D: Deserializer<'de>, T: DeserializeOwned>(deserializer: D) -> Result<Option<T>, D::Error> {
    deserializer.deserialize_any(Maybe(PhantomData))
}

/// Reads `none`, one value as [`one`] does, or a list of them.
///
/// # Errors
/// As [`one`].
pub fn list<'de, D: Deserializer<'de>, T: DeserializeOwned>(deserializer: D) -> Result<Vec<T>, D::Error> {
    deserializer.deserialize_any(List(PhantomData))
}

fn by_name<T: DeserializeOwned, E: Error>(name: &str) -> Result<T, E> {
    serde_json::from_value(json!({ name: {} })).map_err(|e| E::custom(e.to_string()))
}

/// [`list`] for an optional key.
///
/// # Errors
/// As [`one`].
pub fn maybe_list<'de, D: Deserializer<'de>, T: DeserializeOwned>(deserializer: D) -> Result<Option<Vec<T>>, D::Error> {
    list(deserializer).map(Some)
}

struct One<T>(PhantomData<T>);

impl<'de, T: DeserializeOwned> Visitor<'de> for One<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name, or a name with options such as `name: { key: value }`")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<T, E> {
        by_name(name)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map))
    }
}

struct Maybe<T>(PhantomData<T>);

impl<'de, T: DeserializeOwned> Visitor<'de> for Maybe<T> {
    type Value = Option<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        One::<T>(PhantomData).expecting(f)
    }

    fn visit_unit<E: Error>(self) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Option<T>, E> {
        by_name(name).map(Some)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Option<T>, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map(Some)
    }
}

struct List<T>(PhantomData<T>);

impl<'de, T: DeserializeOwned> Visitor<'de> for List<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`none`, a name, a name with options, or a list of these")
    }

    fn visit_unit<E: Error>(self) -> Result<Vec<T>, E> {
        Ok(Vec::new())
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Vec<T>, E> {
        if name == "none" { Ok(Vec::new()) } else { Ok(vec![by_name(name)?]) }
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Vec<T>, A::Error> {
        Ok(vec![T::deserialize(MapAccessDeserializer::new(map))?])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let mut all = Vec::new();
        while let Some(Element(one)) = seq.next_element::<Element<T>>()? {
            all.push(one);
        }
        Ok(all)
    }
}

struct Element<T>(T);

impl<'de, T: DeserializeOwned> serde::Deserialize<'de> for Element<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        one(deserializer).map(Element)
    }
}
