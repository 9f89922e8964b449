//! Who keeps which rank: importance of singular triplets and the schedule that takes them away (AdaLoRA, section 3.2).

use std::collections::HashMap;

use candle_core::{D, DType, Result, Tensor, Var};

use crate::grads::Grads;

/// When and how fast ranks go.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    /// Steps before anything goes.
    pub tinit: usize,
    /// Last steps, in which what is left stays.
    pub tfinal: usize,
    /// Steps between two allocations.
    pub delta_t: usize,
    /// Mean rank at the end.
    pub target_r: usize,
    /// Smoothing of sensitivities.
    pub beta1: f64,
    /// Smoothing of their uncertainty.
    pub beta2: f64,
}

/// Smoothed sensitivity and its uncertainty, shaped as the parameter.
#[derive(Debug, Clone)]
struct Seen {
    sensitivity: Tensor,
    uncertainty: Tensor,
}

/// Keeps the scores of all triplets and masks singular values.
#[derive(Debug)]
pub struct Allocator {
    schedule: Schedule,
    seen: HashMap<String, Seen>,
    /// By layer, [r, 1]: 1 for what stays. Set by the last allocation.
    masks: HashMap<String, Tensor>,
}

impl Allocator {
    /// Nothing seen yet.
    #[must_use]
    pub fn new(schedule: Schedule) -> Self {
        Self { schedule, seen: HashMap::new(), masks: HashMap::new() }
    }

    /// When and how fast ranks go.
    #[must_use]
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// Eq. 8–10: sensitivity |w·∂L/∂w| and its deviation, both smoothed.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn see(&mut self, step: usize, total: usize, parts: [(String, &Tensor); 3], grads: &Grads) -> Result<()> {
        if step.saturating_add(self.schedule.tfinal) >= total {
            return Ok(());
        }
        let Schedule { beta1, beta2, .. } = self.schedule;
        for (name, value) in parts {
            let Some(grad) = grads.get(&name)? else { continue };
            let now = (value.detach() * grad.detach())?.abs()?;
            let zero = now.zeros_like()?;
            let Seen { sensitivity, uncertainty } =
                self.seen.remove(&name).unwrap_or(Seen { sensitivity: zero.clone(), uncertainty: zero });
            let sensitivity = ((sensitivity * beta1)? + (&now * (1.0 - beta1))?)?;
            let off = (&now - &sensitivity)?.abs()?;
            let uncertainty = ((uncertainty * beta2)? + (off * (1.0 - beta2))?)?;
            self.seen.insert(name, Seen { sensitivity, uncertainty });
        }
        Ok(())
    }

    /// Ranks that may stay in all at a step, and whether it is time to take some away; a cubic schedule (eq. 12).
    fn budget(&self, step: usize, total: usize, at_first: usize, layers: usize) -> (usize, bool) {
        let Schedule { tinit, tfinal, delta_t, target_r, .. } = self.schedule;
        let at_last = target_r * layers;
        if step <= tinit {
            return (at_first, false);
        }
        if step.saturating_add(tfinal) > total {
            return (at_last, true);
        }
        let left = 1.0 - (step - tinit) as f64 / (total - tfinal - tinit) as f64;
        let budget = (at_first as f64 - at_last as f64) * left.powi(3) + at_last as f64;
        (budget as usize, step.is_multiple_of(delta_t) || step + tfinal == total)
    }

    /// Masks the singular values [r, 1] of the least important triplets; `layers` by the prefix of their parameters' names.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn allocate(&mut self, step: usize, total: usize, layers: &[(String, &Tensor)]) -> Result<()> {
        if step.saturating_add(self.schedule.tfinal) <= total {
            let at_first = layers.iter().map(|(_, e)| e.elem_count()).sum();
            let (budget, due) = self.budget(step, total, at_first, layers.len());
            // What was masked grows again until the next allocation.
            if !due || budget >= at_first {
                return Ok(());
            }
            self.choose(layers, at_first - budget)?;
        }
        for (name, e) in layers {
            if let Some(mask) = self.masks.get(name) {
                // NaN times zero would stay.
                let masked = mask.to_dtype(DType::U8)?.where_cond(&e.detach(), &e.zeros_like()?)?;
                Var::from_tensor(e)?.set(&masked)?;
            }
        }
        Ok(())
    }

    /// Scores of a layer's triplets, [r] (eq. 7 and 11).
    fn scores(&self, name: &str) -> Result<Option<Tensor>> {
        let score = |part: &str| self.seen.get(&format!("{name}.lora_{part}")).map(|s| &s.sensitivity * &s.uncertainty);
        let (Some(a), Some(b), Some(e)) = (score("A"), score("B"), score("E")) else { return Ok(None) };
        Ok(Some(((e?.sum(D::Minus1)? + a?.mean(D::Minus1)?)? + b?.mean(0)?)?))
    }

    /// Everything up to the `gone`-th smallest score goes.
    fn choose(&mut self, layers: &[(String, &Tensor)], gone: usize) -> Result<()> {
        let mut scores = Vec::new();
        for (name, _) in layers {
            if let Some(found) = self.scores(name)? {
                scores.push((name, found.to_dtype(DType::F64)?.to_vec1::<f64>()?));
            }
        }
        let mut all: Vec<f64> = scores.iter().flat_map(|(_, s)| s.iter().copied()).collect();
        all.sort_by(f64::total_cmp);
        let Some(threshold) = gone.checked_sub(1).and_then(|k| all.get(k)).copied() else { return Ok(()) };
        for (name, scores) in scores {
            let rank = scores.len();
            let mask: Vec<f32> = scores.iter().map(|s| f32::from(u8::from(*s > threshold))).collect();
            let device = layers.first().map(|(_, e)| e.device().clone()).unwrap_or(candle_core::Device::Cpu);
            self.masks.insert(name.clone(), Tensor::from_vec(mask, (rank, 1), &device)?);
        }
        Ok(())
    }

    /// For [`crate::Patch::state`].
    #[must_use]
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let seen = self.seen.iter().flat_map(|(name, s)| {
            [(format!("sensitivity.{name}"), s.sensitivity.clone()), (format!("uncertainty.{name}"), s.uncertainty.clone())]
        });
        seen.chain(self.masks.iter().map(|(name, m)| (format!("mask.{name}"), m.clone()))).collect()
    }

    /// For [`crate::Patch::restore`].
    pub fn restore(&mut self, state: &HashMap<String, Tensor>) {
        for (key, value) in state {
            if let Some(name) = key.strip_prefix("mask.") {
                self.masks.insert(name.to_string(), value.clone());
            } else if let Some(name) = key.strip_prefix("sensitivity.")
                && let Some(uncertainty) = state.get(&format!("uncertainty.{name}"))
            {
                self.seen.insert(name.to_string(), Seen { sensitivity: value.clone(), uncertainty: uncertainty.clone() });
            }
        }
    }
}
