//! Several IA³ as one: a weighted sum of their factors.

use candle_core::{Device, Tensor};
use indexmap::IndexMap;
use peft_adapters::MethodConfig;
use peft_adapters::ia3::Ia3Config;
use peft_adapters::targets::{Targets, Towers};

use super::{Combine, Joined};
use crate::clip::Clip;
use crate::delta::{Adapters, Delta};
use crate::error::{Error, Result};

/// An adapter with its weight in the sum.
type Weighted<'a> = (&'a Delta, f64, &'a Ia3Config);

/// The adapters, where all are IA³ alone.
pub(super) fn all_ia3(all: &[(Delta, f64)]) -> Option<Vec<Weighted<'_>>> {
    let each = all.iter().map(|(delta, weight)| match delta.methods.as_slice() {
        [(MethodConfig::Ia3(config), _)] => Some((delta, *weight, config)),
        _ => None,
    });
    each.collect::<Option<Vec<_>>>().filter(|all| !all.is_empty())
}

/// HF PEFT's `add_weighted_adapter` for IA³: Σ w·l for each module, over the adapters that have it.
///
/// # Errors
/// When the mode is another than `linear`, an adapter holds more than factors or does not fit the model, or one scales a module's
/// inputs and another its outputs.
pub(super) fn sum(clip: &Clip, all: &[Weighted<'_>], combine: Combine) -> Result<Joined> {
    if combine != Combine::Linear {
        let message = "IA³ holds factors, which no other mode than linear combines";
        return Err(Error::input("--combine", message).hint("use --combine linear"));
    }
    let mut sums: IndexMap<String, Tensor> = IndexMap::new();
    for (delta, weight, _) in all {
        let place = delta.dir.display();
        let adapters = delta.apply(clip)?;
        for param in adapters.params.iter() {
            if !param.name.ends_with(".ia3_l") {
                let message = format!("holds more than factors (`{}`), and whole weights have no sum here", param.name);
                return Err(Error::input(place, message).hint("fold such adapters with `peft merge`, which takes weights too"));
            }
            let term = (param.var.as_tensor().detach() * *weight)?;
            let sum = match sums.get(&param.name) {
                None => term,
                Some(sum) if sum.shape() == term.shape() => (sum + term)?,
                Some(_) => {
                    let message = format!("scales inputs where another adapter scales outputs, or the other way round: {}", param.name);
                    return Err(Error::input(place, message).hint("their `feedforward` modules have to agree"));
                }
            };
            sums.insert(param.name.clone(), sum);
        }
    }
    let adapters = plan(clip, all, &sums)?;
    for param in adapters.params.iter() {
        if let Some(value) = sums.get(&param.name) {
            param.var.set(value)?;
        }
    }
    Ok(Joined { adapters, modules: sums.len(), energy: None })
}

/// An IA³ on exactly these modules: by the names of all adapters where these hit nothing else, as HF PEFT has it, else by paths.
fn plan(clip: &Clip, all: &[Weighted<'_>], sums: &IndexMap<String, Tensor>) -> Result<Adapters> {
    let of = |targets: Targets, feedforward: Targets| {
        let config = Ia3Config { targets, feedforward, towers: Towers::Both, ..Ia3Config::default() };
        Adapters::plan(&[MethodConfig::Ia3(config)], clip.sites(), 0, &Device::Cpu)
    };
    let named = names(all, |c| &c.targets).zip(names(all, |c| &c.feedforward));
    if let Some(Ok(found)) = named.map(|(targets, feedforward)| of(targets, feedforward)) {
        let same = |name: &str, shape| sums.get(name).is_some_and(|s| s.shape() == shape);
        if found.params.len() == sums.len() && found.params.iter().all(|p| same(&p.name, p.var.shape())) {
            return Ok(found);
        }
    }
    let path = |name: &str| {
        let bare = name.strip_prefix("base_model.model.").unwrap_or(name);
        bare.strip_suffix(".ia3_l").unwrap_or(bare).to_string()
    };
    // [1, in] scales inputs, [out, 1] outputs.
    let inputs = sums.iter().filter(|(_, t)| t.dims().first() == Some(&1)).map(|(name, _)| path(name)).collect();
    of(Targets::Names(sums.keys().map(|name| path(name)).collect()), Targets::Names(inputs))
}

/// The names of all adapters, each once; none where one has a pattern.
fn names(all: &[Weighted<'_>], of: impl Fn(&Ia3Config) -> &Targets) -> Option<Targets> {
    let mut union: Vec<String> = Vec::new();
    for (_, _, config) in all {
        let Targets::Names(names) = of(config) else { return None };
        for name in names {
            if !union.contains(name) {
                union.push(name.clone());
            }
        }
    }
    Some(Targets::Names(union))
}
