//! All methods, one line each.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::method::{Init, Method, Patch};
use crate::params::Params;
use crate::sites::Sites;
use crate::{Error, Result};

macro_rules! methods {
    ($($(#[$doc:meta])* $name:literal $variant:ident = $method:ty;)*) => {
        /// A method of a recipe: `lora: { rank: 8 }`.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        // A recipe holds a handful of these; a box would only be in the way.
        #[allow(clippy::large_enum_variant)]
        pub enum MethodConfig {
            $($(#[$doc])* #[serde(rename = $name)] $variant(<$method as Method>::Config),)*
        }

        /// What is known of each method, in the order of the tables.
        pub const METHODS: &[Entry] = &[
            $(Entry {
                name: <$method as Method>::NAME,
                source: <$method as Method>::SOURCE,
                init: <$method as Method>::INIT,
                examples: || <$method as Method>::examples().into_iter().map(MethodConfig::$variant).collect(),
                reads: <$method as Method>::reads,
                parse: |value| Ok(MethodConfig::$variant(<$method as Method>::from_adapter_config(value)?)),
            },)*
        ];

        impl MethodConfig {
            /// The recipe key.
            #[must_use]
            pub fn name(&self) -> &'static str {
                match self { $(Self::$variant(_) => <$method as Method>::NAME,)* }
            }

            /// See [`Method::plan`].
            ///
            /// # Errors
            /// When the configuration does not fit the model.
            pub fn plan(&self, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
                match self { $(Self::$variant(c) => <$method as Method>::plan(c, sites, params),)* }
            }

            /// See [`Method::to_adapter_config`].
            ///
            /// # Errors
            /// When the configuration cannot be written in that form.
            pub fn to_adapter_config(&self, sites: &Sites) -> Result<Value> {
                match self { $(Self::$variant(c) => <$method as Method>::to_adapter_config(c, sites),)* }
            }
        }
    };
}

methods! {
    /// Low-rank updates of linear layers.
    "lora" Lora = crate::lora::Lora;
    /// LoRA whose B learns faster.
    "lora_plus" LoraPlus = crate::lora_plus::LoraPlus;
    /// LoRA with magnitudes of their own.
    "dora" Dora = crate::dora::Dora;
    /// LoRA from the principal singular vectors.
    "pissa" Pissa = crate::pissa::Pissa;
    /// LoRA from an orthonormal basis.
    "olora" Olora = crate::olora::Olora;
    /// Vectors around two shared random matrices.
    "vera" Vera = crate::vera::Vera;
    /// Elementwise products of low-rank matrices.
    "loha" Loha = crate::loha::Loha;
    /// Kronecker products.
    "lokr" Lokr = crate::lokr::Lokr;
    /// Ranks that go where they matter.
    "adalora" Adalora = crate::adalora::Adalora;
    /// Factors for keys, values and hidden units.
    "ia3" Ia3 = crate::ia3::Ia3;
    /// Layer norms' own weights.
    "ln_tuning" LnTuning = crate::ln_tuning::LnTuning;
    /// Biases.
    "bitfit" Bitfit = crate::bitfit::Bitfit;
    /// Singular values of weights.
    "svd" Svd = crate::svd::SingularValues;
    /// Learned keys and values in attention.
    "prefix" Prefix = crate::prefix::Prefix;
    /// Narrow MLPs beside or behind the blocks' branches.
    "bottleneck" Bottleneck = crate::bottleneck::Bottleneck;
    /// Base weights themselves.
    "full" Full = crate::full::Full;
    /// Learnt tokens among an image's patches.
    "vpt" Vpt = crate::vpt::Vpt;
    /// Learnt context around class names.
    "coop" Coop = crate::coop::Coop;
    /// Learnt context that each image shifts.
    "cocoop" Cocoop = crate::cocoop::Cocoop;
    /// Learnt context in both towers, coupled.
    "maple" Maple = crate::maple::Maple;
    /// A small MLP behind the features.
    "clip_adapter" ClipAdapter = crate::clip_adapter::ClipAdapter;
    /// A cache of training features.
    "tip_adapter" TipAdapter = crate::tip_adapter::TipAdapter;
    /// The image projection, held near its start.
    "prolip" Prolip = crate::prolip::Prolip;
}

/// One line of the registry.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Recipe key.
    pub name: &'static str,
    /// Paper and equation.
    pub source: &'static str,
    /// What the method does before the first step.
    pub init: Init,
    /// Configurations for the contract tests.
    pub examples: fn() -> Vec<MethodConfig>,
    /// Whether an `adapter_config.json` is the method's.
    pub reads: fn(&Value) -> bool,
    /// Reads `adapter_config.json`.
    pub parse: fn(&Value) -> Result<MethodConfig>,
}

/// The method that wrote an `adapter_config.json`, by its `peft_type`.
///
/// # Errors
/// When the type is unknown or a field cannot be honoured.
pub fn from_adapter_config(value: &Value) -> Result<MethodConfig> {
    let kind =
        value.get("peft_type").and_then(Value::as_str).ok_or_else(|| Error::config("peft_type", "expected a string such as \"LORA\""))?;
    let entry = METHODS.iter().find(|e| (e.reads)(value)).ok_or_else(|| {
        let known: Vec<_> = METHODS.iter().map(|e| e.name.to_uppercase()).collect();
        Error::config("peft_type", format!("\"{kind}\" is not implemented; known: {}", known.join(", ")))
    })?;
    (entry.parse)(value)
}
