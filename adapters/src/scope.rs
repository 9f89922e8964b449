//! Where a method of HF PEFT's kind works: targets, towers, layers, exclusions, and what is trained whole.

use serde_json::{Value, json};

use crate::hf;
use crate::sites::{Site, SiteId, SiteKind, Sites};
use crate::targets::{Layers, Selection, Targets, Towers, is_suffix};
use crate::{Error, Result};

/// The part of a configuration that selects sites.
#[derive(Debug, Clone, Copy)]
pub struct Scope<'a> {
    /// Module names, or a regex over the whole path.
    pub targets: &'a Targets,
    /// Towers.
    pub towers: Towers,
    /// Blocks, or all.
    pub layers: Option<&'a Layers>,
    /// Modules to leave out.
    pub exclude: Option<&'a Targets>,
    /// Modules that are trained whole.
    pub modules_to_save: &'a [String],
}

/// Linear layers.
#[must_use]
pub fn linear(kind: &SiteKind) -> bool {
    matches!(kind, SiteKind::Linear { .. })
}

impl Scope<'_> {
    /// The selected sites among those that `kind` accepts.
    ///
    /// # Errors
    /// When nothing is left.
    pub fn sites<'s>(&self, sites: &'s Sites, kind: impl Fn(&SiteKind) -> bool) -> Result<Vec<(SiteId, &'s Site)>> {
        let selection = Selection { targets: Some(self.targets), towers: self.towers, layers: self.layers };
        let all = self.targets.is_all_linear();
        let mut found = selection.sites(sites, |k| kind(k) && (!all || linear(k)))?;
        if let Some(exclude) = self.exclude {
            let excluded = exclude.matcher("exclude")?;
            let mut kept = Vec::with_capacity(found.len());
            for target in found {
                if !excluded(&target.1.path)? {
                    kept.push(target);
                }
            }
            found = kept;
        }
        // A module that is trained whole needs no update as well, nor what is inside it; HF PEFT does the same.
        found.retain(|(_, s)| !self.modules_to_save.iter().any(|m| is_inside(&s.path, m)));
        if found.is_empty() {
            return Err(Error::config("exclude", "`exclude` and `modules_to_save` leave no target"));
        }
        Ok(found)
    }

    /// HF PEFT's fields. It knows no towers and counts layers across both, so the targets are written out wherever names
    /// alone would hit more than what was trained.
    ///
    /// # Errors
    /// When nothing is selected.
    pub fn fields(&self, sites: &Sites, kind: impl Fn(&SiteKind) -> bool) -> Result<Value> {
        let chosen: Vec<_> = self.sites(sites, kind)?.into_iter().map(|(_, s)| s.path.clone()).collect();
        let is_module = |s: &Site| matches!(s.kind, SiteKind::Linear { .. } | SiteKind::Conv { .. } | SiteKind::Embedding { .. });
        let modules = sites.iter().filter(|(_, s)| is_module(s)).map(|(_, s)| s.path.as_str());
        Ok(json!({
            "exclude_modules": null,
            "layers_to_transform": null,
            "modules_to_save": hf::list_or_null(self.modules_to_save),
            "target_modules": target_modules(self.targets, modules, &chosen),
        }))
    }
}

/// The names, where HF PEFT would pick exactly the chosen modules by them; otherwise the chosen paths.
pub fn target_modules<'m>(targets: &Targets, mut modules: impl Iterator<Item = &'m str>, chosen: &[String]) -> Value {
    match targets {
        Targets::Names(names) if modules.all(|m| names.iter().any(|n| is_suffix(m, n)) == chosen.iter().any(|c| c == m)) => json!(names),
        _ => json!(chosen),
    }
}

/// Whether `path` is the module or lies inside it.
#[must_use]
pub fn is_inside(path: &str, module: &str) -> bool {
    path.match_indices('.').map(|(at, _)| &path[..at]).chain([path]).any(|p| is_suffix(p, module))
}
