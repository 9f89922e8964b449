//! Task arithmetic on one tensor of each adapter, as HF PEFT's `merge_utils` does it: thin out, elect signs, add up.

use serde::{Deserialize, Serialize};

/// Whose sign an entry gets (TIES, Yadav et al. 2023, eq. 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MajoritySign {
    /// That of the sum.
    #[default]
    Total,
    /// That of most adapters.
    Frequency,
}

/// How entries are thinned out before they are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Thin {
    /// Not at all.
    Keep,
    /// The largest stay.
    Magnitude,
    /// Random ones stay, scaled by 1/density (DARE, Yu et al. 2023).
    Random,
}

/// What is done with the tensors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rule {
    pub(super) thin: Thin,
    /// In (0, 1].
    pub(super) density: f64,
    /// Entries whose sign is not the majority's are left out, and the rest is averaged.
    pub(super) elect: Option<MajoritySign>,
}

/// One adapter's tensor.
pub(super) struct Task {
    pub(super) values: Vec<f32>,
    pub(super) weight: f32,
    /// Which entries stay, for [`Thin::Random`].
    pub(super) mask: Option<Vec<bool>>,
}

impl Rule {
    pub(super) fn apply(&self, mut tasks: Vec<Task>) -> Vec<f32> {
        tasks.iter_mut().for_each(|t| self.thin(t));
        let count = tasks.first().map_or(0, |t| t.values.len());
        (0..count).map(|i| self.entry(&tasks, i)).collect()
    }

    fn thin(&self, task: &mut Task) {
        if self.density >= 1.0 {
            return;
        }
        match (self.thin, &task.mask) {
            (Thin::Magnitude, _) => {
                let kept = (self.density * task.values.len() as f64) as usize;
                keep_largest(&mut task.values, kept);
            }
            (Thin::Random, Some(mask)) => {
                let density = self.density as f32;
                task.values.iter_mut().zip(mask).for_each(|(v, keep)| *v = if *keep { *v / density } else { 0.0 });
            }
            _ => {}
        }
    }

    fn entry(&self, tasks: &[Task], i: usize) -> f32 {
        let Some(elect) = self.elect else { return tasks.iter().map(|t| t.values[i] * t.weight).sum() };
        let votes: f32 = match elect {
            MajoritySign::Total => tasks.iter().map(|t| t.values[i]).sum(),
            MajoritySign::Frequency => tasks.iter().map(|t| sign(t.values[i])).sum(),
        };
        let majority = if votes >= 0.0 { 1.0 } else { -1.0 };
        let agreeing = tasks.iter().filter(|t| sign(t.values[i]) == majority);
        let (sum, count) = agreeing.fold((0.0, 0u32), |(sum, n), t| (sum + t.values[i] * t.weight, n + 1));
        sum / count.max(1) as f32
    }
}

/// torch's: zero has the sign zero, and so is never of the majority.
fn sign(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { x.signum() }
}

fn keep_largest(values: &mut [f32], count: usize) {
    let mut order: Vec<usize> = (0..values.len()).collect();
    // Ties go to the first.
    let larger = |a: &usize, b: &usize| values[*b].abs().total_cmp(&values[*a].abs()).then(a.cmp(b));
    if count < order.len() {
        order.select_nth_unstable_by(count, larger);
        order[count..].iter().for_each(|i| values[*i] = 0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_are_elected_before_weights_apply() {
        let tasks = |rows: [[f32; 3]; 3]| rows.map(|v| Task { values: v.to_vec(), weight: 2.0, mask: None }).into();
        let rows = [[1.0, 3.0, 0.0], [1.0, -1.0, 0.0], [-5.0, -1.0, 0.0]];
        let by = |elect| Rule { thin: Thin::Keep, density: 1.0, elect: Some(elect) }.apply(tasks(rows));
        assert_eq!(by(MajoritySign::Total), [-10.0, 6.0, 0.0]);
        assert_eq!(by(MajoritySign::Frequency), [2.0, -2.0, 0.0]);
    }

    #[test]
    fn the_largest_stay() {
        let mut values = [1.0, -3.0, 2.0, -3.0, 0.5];
        keep_largest(&mut values, 2);
        assert_eq!(values, [0.0, -3.0, 0.0, -3.0, 0.0]);
    }
}
