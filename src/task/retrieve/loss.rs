//! What retrieval minimises.

use candle_core::{D, DType, Tensor};
use peft_adapters::{Params, Start};
use serde::{Deserialize, Serialize};

use super::kin::Kin;
use crate::clip::model::unit_rows;
use crate::error::{Error, Result};
use crate::fusion::nn::Weight;
use crate::task::Forward;
use crate::task::matching::bce;

/// What is minimised. What belongs together, equal captions and examples of a group included, is no negative for any of them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RetrieveLoss {
    /// Each row and each column is a choice among all (Radford et al. 2021, figure 3), spread evenly over what belongs to it. Of
    /// images of a class: supervised contrastive (Khosla et al. 2020, arXiv 2004.11362, eq. 2).
    InfoNce(InfoNceConfig),
    /// Each pair is a yes or no by itself (Zhai et al. 2023, arXiv 2303.15343, algorithm 1):
    /// −1/B Σᵢⱼ log σ(zᵢⱼ (t cos(i, j) + b)), z = 1 for what belongs together and −1 for the rest. t and b are trained and
    /// start at 10 and −10.
    Sigmoid {},
    /// What belongs together is to be more similar than the rest by a margin.
    Triplet(TripletConfig),
}

/// Options of InfoNCE.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct InfoNceConfig {
    /// Divides cosines; smaller looks at the hardest negatives. When left out exp(−logit scale), between images 0.07.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
}

/// VSE++ (Faghri et al. 2018, arXiv 1707.05612, eq. 6): Σ over both ways of [margin − s(own) + max s(negative)]₊, averaged over the
/// batch. Of images of a class `own` is the least similar one (Hermans et al. 2017, arXiv 1703.07737, eq. 5).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TripletConfig {
    /// By how much, in cosines.
    pub margin: f64,
    /// Whether only the most similar negative of a row counts, or the sum over all; hard ones learn faster, and wrongly where
    /// captions fit several images.
    pub hardest: bool,
}

impl Default for TripletConfig {
    fn default() -> Self {
        Self { margin: 0.2, hardest: true }
    }
}

/// Supervised contrastive learning's temperature, as SimCLR's successors have it.
const TEMPERATURE: f64 = 0.07;

/// Stands for −∞ where that times 0 has to be 0.
const NEVER: f64 = -1e9;

impl RetrieveLoss {
    pub(super) fn validate(&self, place: &str) -> Result<()> {
        match self {
            Self::InfoNce(InfoNceConfig { temperature: Some(t) }) if !(*t > 0.0 && t.is_finite()) => {
                Err(Error::input(format!("{place}.loss.infonce.temperature"), format!("expected more than 0, found {t}")))
            }
            Self::Triplet(TripletConfig { margin, .. }) if !(0.0..=2.0).contains(margin) => {
                Err(Error::input(format!("{place}.loss.triplet.margin"), format!("expected 0 to 2, found {margin}")))
            }
            _ => Ok(()),
        }
    }
}

/// A loss with its own weights.
#[derive(Debug)]
pub(super) enum Criterion {
    InfoNce(Option<f64>),
    /// ln t and b, as the paper has them, \[1\] each.
    Sigmoid([Weight; 2]),
    Triplet(TripletConfig),
}

impl Criterion {
    pub(super) fn new(loss: RetrieveLoss, images: bool, params: &mut Params) -> Result<Self> {
        Ok(match loss {
            RetrieveLoss::InfoNce(config) => Self::InfoNce(config.temperature.or(images.then_some(TEMPERATURE))),
            RetrieveLoss::Sigmoid {} => Self::Sigmoid([
                Weight::declare(params, "sigmoid.logit_scale", 1, Start::Constant(10f64.ln()))?,
                Weight::declare(params, "sigmoid.logit_bias", 1, Start::Constant(-10.0))?,
            ]),
            RetrieveLoss::Triplet(config) => Self::Triplet(config),
        })
    }

    /// # Shapes
    /// `rows` and `columns` [B, P], unnormalised → scalar
    pub(super) fn of(&self, on: &Forward<'_, '_>, rows: &Tensor, columns: &Tensor, kin: &Kin) -> Result<Tensor> {
        match self {
            Self::InfoNce(None) => info_nce(&on.clip.logits(rows, columns, on.patches)?, kin),
            Self::InfoNce(Some(t)) => info_nce(&(cosines(rows, columns)? * (1.0 / t))?, kin),
            Self::Sigmoid(weights) => {
                let [scale, bias] = weights.each_ref().map(|w| w.on(&on.pass));
                sigmoid(&cosines(rows, columns)?, &scale.exp()?, &bias, kin)
            }
            Self::Triplet(config) => triplet(&cosines(rows, columns)?, kin, config),
        }
    }
}

fn cosines(rows: &Tensor, columns: &Tensor) -> Result<Tensor> {
    Ok(unit_rows(rows)?.matmul(&unit_rows(columns)?.t()?)?)
}

/// A constant of the kin, [B, B].
fn constant(kin: &Kin, like: &Tensor, of: impl Fn(usize, usize) -> f64) -> Result<Tensor> {
    Ok(Tensor::from_vec(kin.table(of), (kin.count, kin.count), like.device())?.to_dtype(like.dtype())?)
}

/// InfoNCE with soft targets: Σ −t log softmax(rows), averaged over rows that have a positive; where columns are of another kind,
/// the mean of both ways.
///
/// # Shapes
/// `logits` [B, B] → scalar
pub(super) fn info_nce(logits: &Tensor, kin: &Kin) -> Result<Tensor> {
    let one_way = |logits: &Tensor, turned: bool| -> Result<Tensor> {
        let targets = Tensor::from_vec(kin.targets(turned), logits.shape(), logits.device())?.to_dtype(logits.dtype())?;
        let log_p = candle_nn::ops::log_softmax(logits, D::Minus1)?;
        Ok((log_p * targets)?.sum(D::Minus1)?.mean_all()?.neg()?)
    };
    if !kin.both_ways {
        let out = constant(kin, logits, |i, j| if i == j { NEVER } else { 0.0 })?;
        return Ok((one_way(&(logits + out)?, false)? * (kin.count as f64 / kin.anchors().max(1) as f64))?);
    }
    let both = (one_way(logits, false)? + one_way(&logits.t()?.contiguous()?, true)?)?;
    Ok((both * 0.5)?)
}

/// # Shapes
/// `cosines` [B, B]; `scale` and `bias` one number each → scalar
pub(super) fn sigmoid(cosines: &Tensor, scale: &Tensor, bias: &Tensor, kin: &Kin) -> Result<Tensor> {
    let here = |t: &Tensor| -> Result<Tensor> { Ok(t.reshape((1, 1))?.to_dtype(cosines.dtype())?) };
    let logits = cosines.broadcast_mul(&here(scale)?)?.broadcast_add(&here(bias)?)?;
    let target = constant(kin, &logits, |i, j| f64::from(u8::from(kin.positive(i, j, false))))?;
    let counts = constant(kin, &logits, |i, j| f64::from(u8::from(kin.positive(i, j, false) || kin.negative(i, j, false))))?;
    Ok(((bce(&logits, &target)? * counts)?.sum_all()? * (1.0 / kin.count.max(1) as f64))?)
}

/// # Shapes
/// `cosines` [B, B] → scalar
pub(super) fn triplet(cosines: &Tensor, kin: &Kin, config: &TripletConfig) -> Result<Tensor> {
    let one_way = |scores: &Tensor, turned: bool| -> Result<Tensor> {
        let values = &scores.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        let all = || 0..kin.count;
        let by = |i: usize| move |a: &usize, b: &usize| values[i][*a].total_cmp(&values[i][*b]);
        let own: Vec<Option<usize>> = match kin.both_ways {
            true => all().map(Some).collect(),
            // The least similar of its class.
            false => all().map(|i| all().filter(|&j| kin.positive(i, j, false)).min_by(by(i))).collect(),
        };
        let hardest: Vec<Option<usize>> = all().map(|i| all().filter(|&j| kin.negative(i, j, turned)).max_by(by(i))).collect();
        let counts = |i: usize, j: usize| match config.hardest {
            _ if own[i].is_none() => 0.0,
            true => f64::from(u8::from(hardest[i] == Some(j))),
            false => f64::from(u8::from(kin.negative(i, j, turned))),
        };
        let index: Vec<u32> = all().map(|i| own[i].unwrap_or(i) as u32).collect();
        let similar = scores.gather(&Tensor::from_vec(index, (kin.count, 1), scores.device())?, 1)?;
        let costs = (scores.broadcast_sub(&similar)? + config.margin)?.relu()?;
        let counted = constant(kin, scores, counts)?;
        Ok((costs * counted)?.sum_all()?)
    };
    let mut sum = one_way(cosines, false)?;
    if kin.both_ways {
        sum = (sum + one_way(&cosines.t()?.contiguous()?, true)?)?;
    }
    Ok((sum * (1.0 / kin.count.max(1) as f64))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Example;
    use crate::task::goldens::check;

    /// Of `count` examples whose texts are all different.
    fn apart(count: usize, groups: &[(usize, &str)]) -> Kin {
        let of =
            |i: usize| Example { id: format!("e{i}"), group: groups.iter().find(|g| g.0 == i).map(|g| g.1.into()), ..Example::default() };
        let all: Vec<Example> = (0..count).map(of).collect();
        let texts: Vec<String> = (0..count).map(|i| format!("text {i}")).collect();
        Kin::of_texts(&all.iter().collect::<Vec<_>>(), &texts.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn labelled(labels: &[u32]) -> Kin {
        let of = |(i, &label): (usize, &u32)| Example { id: format!("e{i}"), label: Some(label), ..Example::default() };
        let all: Vec<Example> = labels.iter().enumerate().map(of).collect();
        Kin::of_labels(&all.iter().collect::<Vec<_>>())
    }

    fn product(x: &[Tensor]) -> Result<Tensor> {
        Ok(x[0].matmul(&x[1].t()?)?)
    }

    #[test]
    fn sigmoid_and_info_nce_are_open_clips() {
        check("siglip", |x| sigmoid(&product(x)?, &x[2], &x[3], &apart(5, &[])));
        check("clip", |x| info_nce(&product(x)?.broadcast_mul(&x[2])?, &apart(5, &[])));
    }

    #[test]
    fn between_images_of_a_class_it_is_supervised_contrastive() {
        check("supcon", |s| info_nce(&s[0], &labelled(&[0, 1, 0, 2, 1, 0, 3])));
    }

    #[test]
    fn triplets_are_those_of_vse() {
        for (name, hardest) in [("triplet", true), ("triplet_all", false)] {
            let config = TripletConfig { margin: 0.2, hardest };
            check(name, |s| triplet(&s[0], &apart(5, &[(1, "g"), (3, "g"), (0, "h"), (4, "h")]), &config));
        }
    }

    /// By hand: anchors 0 and 1 are of a class; 0.2 − 0.1 + 0.5 and 0.2 − 0.1 + 0.3, over three images. The third has none of its
    /// class and no cost.
    #[test]
    fn triplets_of_images_take_the_worst_of_both() {
        let cosines = Tensor::new(&[[1f64, 0.1, 0.5], [0.1, 1.0, 0.3], [0.5, 0.3, 1.0]], &candle_core::Device::Cpu);
        let found = cosines.map_err(Into::into).and_then(|c| triplet(&c, &labelled(&[0, 0, 1]), &TripletConfig::default()));
        let found = found.and_then(|l| Ok(l.to_scalar::<f64>()?));
        assert!(found.as_ref().is_ok_and(|v| (v - 1.0 / 3.0).abs() < 1e-12), "{found:?}");
    }
}
