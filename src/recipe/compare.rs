//! The recipe's `compare` section.

use indexmap::IndexMap;
use peft_adapters::MethodConfig;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::{named, task::prompts};

/// How `peft compare` runs the methods that it is given.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CompareConfig {
    /// By the name that `--methods` gives: a method's own, or any other where `method` says what it is.
    pub methods: IndexMap<String, CompareMethod>,
    /// Prompts around the class names of `forget`; `an icon of a {}` for the embedded sets, CLIP's own otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forget_templates: Option<Vec<String>>,
}

/// One method of a comparison.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CompareMethod {
    /// Peak learning rate, and the middle of a search; follows from the recipe's own where left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// What is trained, in the form of the recipe's `method`; the method of that name with its default options where left out.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "named::maybe_list")]
    pub method: Option<Vec<MethodConfig>>,
}

impl CompareConfig {
    pub(super) fn validate(&self, place: &str) -> Result<()> {
        for (name, method) in &self.methods {
            if let Some(lr) = method.lr.filter(|lr| !(*lr > 0.0 && lr.is_finite())) {
                return Err(Error::input(format!("{place}: compare.methods.{name}.lr"), format!("expected a number above 0, found {lr}")));
            }
        }
        let templates = self.forget_templates.iter().flatten();
        templates.into_iter().try_for_each(|t| prompts::check_template(&format!("{place}: compare.forget_templates"), t))
    }
}
