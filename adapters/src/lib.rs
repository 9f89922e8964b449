//! Parameter-efficient fine-tuning methods for any candle model.
//!
//! A model registers its [`Sites`] while it is built and passes [`Patches`] to each forward
//! pass. A [`Method`] plans once for the whole model, declares its trainable [`Params`] and
//! returns a [`Patch`] of typed hooks. The model itself is immutable and can be shared.

pub mod adalora;
pub mod allocator;
pub mod bitfit;
pub mod bottleneck;
pub mod clip_adapter;
pub mod cocoop;
pub mod context;
pub mod coop;
pub mod dora;
pub mod error;
pub mod flow;
pub mod full;
pub mod grads;
pub mod hf;
pub mod ia3;
pub mod layers;
pub mod linalg;
pub mod ln_tuning;
pub mod loha;
pub mod lokr;
pub mod lora;
pub mod lora_plus;
pub mod low_rank;
pub mod lycoris;
pub mod maple;
pub mod method;
pub mod olora;
pub mod ops;
pub mod params;
pub mod patches;
pub mod phm;
pub mod pissa;
pub mod prefix;
pub mod probe;
pub mod prolip;
pub mod registry;
pub mod rng;
pub mod saved;
pub mod scope;
pub mod sites;
pub mod svd;
pub mod tape;
pub mod targets;
pub mod tip_adapter;
pub mod vera;
pub mod vpt;
pub mod wording;

pub use error::{Error, Result};
pub use flow::{Branch, ClassFeatures, ClassName, Embedded, LinearOut, LowRankTerm, Qkv, Sequence};
pub use grads::Grads;
pub use method::{Fold, Init, Inverse, Labelled, Method, Patch, Step};
pub use params::{Param, Params, Spec, Start};
pub use patches::Patches;
pub use registry::MethodConfig;
pub use sites::{BaseWeight, Site, SiteId, SiteKind, Sites, TaskFacts, Tower, WeightId};
pub use tape::Tape;
