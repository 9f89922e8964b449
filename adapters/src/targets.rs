//! Which sites a method touches: targets, towers and layers, matched as HF PEFT does.

use std::fmt;

use fancy_regex::Regex;
use serde::{Deserialize, Serialize};

use crate::sites::{Site, SiteId, SiteKind, Sites, Tower};
use crate::{Error, Result};

/// Module names: a list matches a path or its `.suffix`, a string is a regex over the whole path.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a list of names such as [q_proj, v_proj], or a regular expression")]
pub enum Targets {
    /// Names such as `q_proj`; each matches the path itself or a path that ends in `.q_proj`.
    Names(Vec<String>),
    /// A regular expression that has to match the whole path.
    Pattern(String),
}

/// Says whether a path is meant.
pub type Matcher = Box<dyn Fn(&str) -> Result<bool>>;

impl Targets {
    /// HF PEFT's word for every linear layer.
    pub const ALL_LINEAR: &str = "all-linear";

    /// Whether it is that word.
    #[must_use]
    pub fn is_all_linear(&self) -> bool {
        matches!(self, Self::Pattern(p) if p == Self::ALL_LINEAR)
    }

    /// A list of names.
    #[must_use]
    pub fn names(names: &[&str]) -> Self {
        Self::Names(names.iter().map(ToString::to_string).collect())
    }

    /// A function that says whether a path is meant.
    ///
    /// # Errors
    /// When the list is empty or the pattern is not a regular expression.
    pub fn matcher(&self, key: &str) -> Result<Matcher> {
        match self {
            Self::Names(names) if names.is_empty() => Err(Error::config(key, "expected at least one name")),
            Self::Names(names) => {
                let names = names.clone();
                Ok(Box::new(move |path| Ok(names.iter().any(|n| is_suffix(path, n)))))
            }
            Self::Pattern(_) if self.is_all_linear() => Ok(Box::new(|_: &str| Ok(true))),
            Self::Pattern(pattern) => {
                let (regex, key) = (full_regex(key, pattern)?, key.to_string());
                Ok(Box::new(move |path| matches_whole(&key, &regex, path)))
            }
        }
    }
}

impl fmt::Display for Targets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Names(names) => write!(f, "[{}]", names.join(", ")),
            Self::Pattern(pattern) => write!(f, "\"{pattern}\""),
        }
    }
}

/// Whether a [`full_regex`] matches.
///
/// # Errors
/// When the pattern needs too much backtracking to tell.
pub fn matches_whole(key: &str, regex: &Regex, path: &str) -> Result<bool> {
    regex.is_match(path).map_err(|e| Error::config(key, format!("cannot be matched with `{path}`: {e}")))
}

/// Whether `path` is `name` or ends in `.name`.
#[must_use]
pub fn is_suffix(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// A regex that matches whole strings only, as Python's `re.fullmatch`; look-around and back references as in Python.
///
/// # Errors
/// When the pattern is not a regular expression.
pub fn full_regex(key: &str, pattern: &str) -> Result<Regex> {
    Regex::new(&format!("^(?:{pattern})$")).map_err(|e| Error::config(key, format!("`{pattern}` is not a regular expression: {e}")))
}

/// Which towers a method touches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Towers {
    /// The image encoder only; class prompts are then encoded once.
    Vision,
    /// The text encoder only.
    Text,
    /// Both.
    #[default]
    Both,
}

impl Towers {
    /// Whether `tower` is meant.
    #[must_use]
    pub fn contains(self, tower: Tower) -> bool {
        match self {
            Self::Vision => tower == Tower::Vision,
            Self::Text => tower == Tower::Text,
            Self::Both => true,
        }
    }
}

impl fmt::Display for Towers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vision => "vision",
            Self::Text => "text",
            Self::Both => "both",
        })
    }
}

/// Which blocks of a tower, counted from the input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected blocks: [0, 1], \"6..12\" or { last: 2 }")]
pub enum Layers {
    /// These blocks.
    List(Vec<usize>),
    /// A half-open range such as `"6..12"`, `"6.."` or `"..6"`.
    Range(String),
    /// The last blocks of each tower.
    Last(Last),
}

/// `{ last: 2 }`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Last {
    /// How many blocks, counted from the output.
    pub last: usize,
}

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::List(list) => write!(f, "{list:?}"),
            Self::Range(range) => write!(f, "\"{range}\""),
            Self::Last(Last { last }) => write!(f, "{{ last: {last} }}"),
        }
    }
}

impl Layers {
    /// The blocks that are meant in a tower of `depth` blocks.
    ///
    /// # Errors
    /// When a range cannot be read or reaches outside the tower.
    pub fn resolve(&self, key: &str, depth: usize) -> Result<Vec<usize>> {
        let layers = match self {
            Self::List(list) => list.clone(),
            Self::Last(Last { last }) => (depth.saturating_sub(*last)..depth).collect(),
            Self::Range(text) => {
                let bad = || Error::config(key, format!("`{text}` is not a range such as \"6..12\""));
                let (from, to) = text.split_once("..").ok_or_else(bad)?;
                let number = |s: &str, default: usize| match s.trim() {
                    "" => Ok(default),
                    s => s.parse().map_err(|_| bad()),
                };
                (number(from, 0)?..number(to, depth)?.min(1 << 20)).collect()
            }
        };
        Ok(layers)
    }
}

/// A method's selection of sites.
#[derive(Debug)]
pub struct Selection<'a> {
    /// Module names, or all sites of the kind.
    pub targets: Option<&'a Targets>,
    /// Towers.
    pub towers: Towers,
    /// Blocks, or all.
    pub layers: Option<&'a Layers>,
}

impl Selection<'_> {
    /// The selected sites among those that `kind` accepts.
    ///
    /// # Errors
    /// When nothing matches: the error lists what exists.
    pub fn sites<'s>(&self, sites: &'s Sites, kind: impl Fn(&SiteKind) -> bool) -> Result<Vec<(SiteId, &'s Site)>> {
        let matches = match self.targets {
            Some(t) => t.matcher("targets")?,
            None => Box::new(|_: &str| Ok(true)) as Matcher,
        };
        let keep =
            |tower: Tower| -> Result<Option<Vec<usize>>> { self.layers.map(|l| l.resolve("layers", sites.depth(tower))).transpose() };
        let (vision, text) = (keep(Tower::Vision)?, keep(Tower::Text)?);
        self.check_layers(sites, &vision, &text)?;
        // HF PEFT's rule: a path that is named in full is meant, whatever the layers: `visual_projection` lies in none.
        let named = |site: &Site| matches!(self.targets, Some(Targets::Names(names)) if names.contains(&site.path));
        let in_layers = |site: &Site| {
            if named(site) {
                return true;
            }
            let wanted = if site.tower == Tower::Text { &text } else { &vision };
            match wanted {
                None => true,
                Some(list) => site.layer.is_some_and(|l| list.contains(&l)),
            }
        };
        let mut found = Vec::new();
        for (id, site) in sites.iter() {
            if kind(&site.kind) && self.towers.contains(site.tower) && in_layers(site) && matches(&site.path)? {
                found.push((id, site));
            }
        }
        if found.is_empty() {
            let asked = self.targets.map_or("the selection".to_string(), ToString::to_string);
            let layers = self.layers.map(|l| format!(", layers: {l}")).unwrap_or_default();
            return Err(Error::NoSites {
                key: "targets".into(),
                message: format!("{asked} matches no site (towers: {}{layers})", self.towers),
                sites: sites.summary(|s| kind(&s.kind)),
            });
        }
        Ok(found)
    }

    /// A layer that no selected tower has is a mistake, not an empty selection.
    fn check_layers(&self, sites: &Sites, vision: &Option<Vec<usize>>, text: &Option<Vec<usize>>) -> Result<()> {
        let mut depth = 0;
        for (tower, list) in [(Tower::Vision, vision), (Tower::Text, text)] {
            if self.towers.contains(tower) && list.is_some() {
                depth = depth.max(sites.depth(tower));
            }
        }
        if let Some(Layers::Last(Last { last })) = self.layers
            && (*last == 0 || *last > depth)
        {
            return Err(Error::config("layers", format!("expected {{ last: 1 to {depth} }}, found {last}")));
        }
        let asked = [vision, text].into_iter().flatten().flatten().max();
        match asked {
            Some(&layer) if layer >= depth => Err(Error::config(
                "layers",
                format!("layer {layer} does not exist; the selected towers have layers 0 to {}", depth.saturating_sub(1)),
            )),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// HF PEFT's users know Python's regular expressions.
    #[test]
    fn patterns_match_whole_paths_as_in_python() {
        let matches = Targets::Pattern(r"(?!text_model).*\.(q|v)_proj".into()).matcher("targets").unwrap();
        assert!(matches("vision_model.encoder.layers.0.self_attn.q_proj").unwrap());
        assert!(!matches("text_model.encoder.layers.0.self_attn.q_proj").unwrap());
        assert!(!matches("vision_model.encoder.layers.0.self_attn.q_proj.base").unwrap());
    }
}
