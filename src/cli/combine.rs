//! `peft merge --combine`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::Context;
use crate::combine::{Combine, CombineOptions, How, MajoritySign, combine};
use crate::error::Result;

/// What `--combine` takes.
#[derive(Debug, Args)]
pub(super) struct CombineArgs {
    /// Make one LoRA of several in place of a model: --output is then an adapter. The modes are those of HF PEFT's
    /// add_weighted_adapter: cat is the exact sum, of a higher rank; svd cuts it to a rank. IA³ combines by linear
    #[arg(long, value_enum, value_name = "MODE", conflicts_with_all = ["bundle", "classifier", "to", "dtype"])]
    combine: Option<Mode>,
    /// With ties, dare and magnitude_prune: the share of entries that stay, above 0 and at most 1
    #[arg(long, value_name = "SHARE", requires = "combine")]
    density: Option<f64>,
    /// With ties and dare_ties: whose sign an entry gets, that of the sum or that of most adapters
    #[arg(long, value_enum, value_name = "HOW", requires = "combine", default_value = "total")]
    majority_sign: Majority,
    /// With svd and *_svd: the new rank; the adapters' largest when left out
    #[arg(long, value_name = "R", requires = "combine")]
    svd_rank: Option<usize>,
    /// With dare: seed of what is dropped
    #[arg(long, value_name = "N", requires = "combine", default_value_t = 0)]
    seed: u64,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Mode {
    Linear,
    Cat,
    Svd,
    Ties,
    TiesSvd,
    DareLinear,
    DareLinearSvd,
    DareTies,
    DareTiesSvd,
    MagnitudePrune,
    MagnitudePruneSvd,
}

impl From<Mode> for Combine {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Linear => Self::Linear,
            Mode::Cat => Self::Cat,
            Mode::Svd => Self::Svd,
            Mode::Ties => Self::Ties,
            Mode::TiesSvd => Self::TiesSvd,
            Mode::DareLinear => Self::DareLinear,
            Mode::DareLinearSvd => Self::DareLinearSvd,
            Mode::DareTies => Self::DareTies,
            Mode::DareTiesSvd => Self::DareTiesSvd,
            Mode::MagnitudePrune => Self::MagnitudePrune,
            Mode::MagnitudePruneSvd => Self::MagnitudePruneSvd,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Majority {
    Total,
    Frequency,
}

impl CombineArgs {
    /// How to combine, where that was asked for.
    pub(super) fn how(&self) -> Option<How> {
        let majority_sign = match self.majority_sign {
            Majority::Total => MajoritySign::Total,
            Majority::Frequency => MajoritySign::Frequency,
        };
        Some(How { combine: self.combine?.into(), density: self.density, majority_sign, svd_rank: self.svd_rank })
    }

    /// Writes the new adapter; `rest` is what merging takes too.
    pub(super) fn run(&self, how: How, rest: Rest, context: &Context) -> Result<()> {
        let Rest { model, adapters, output, force, allow_base_mismatch } = rest;
        let done = combine(&CombineOptions { model, adapters, how, seed: self.seed, output, force, allow_base_mismatch })?;
        done.notes.iter().for_each(|note| context.say(&format!("note: {note}")));
        context.print(&done, || {
            let energy = done.energy.map(|e| format!(", {:.2} % of the energy kept", 100.0 * e)).unwrap_or_default();
            let kind = done.rank.map_or_else(|| "IA³".into(), |rank| format!("LoRA of rank {rank}"));
            format!("{}: {kind} on {} modules{energy}, {} bytes\n", done.output.display(), done.modules, done.adapter_bytes)
        })
    }
}

/// Arguments of `peft merge` that hold here too.
pub(super) struct Rest {
    pub(super) model: String,
    pub(super) adapters: Vec<(PathBuf, f64)>,
    pub(super) output: PathBuf,
    pub(super) force: bool,
    pub(super) allow_base_mismatch: bool,
}
