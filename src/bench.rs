//! `peft bench`: the time of training steps, data apart.

use std::time::Instant;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::recipe::Recipe;
use crate::report::peak_rss_mib;
use crate::session::Session;
use crate::train::{Observer, Stepper};

/// Seconds of a step.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Seconds {
    /// The middle one.
    pub median: f64,
    /// The fastest.
    pub min: f64,
}

/// What `peft bench` measures.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    /// Forward, backward and update; waiting for data is not in it.
    pub step_seconds: Seconds,
    /// Mean seconds a step waited for its images.
    pub data_seconds: f64,
    /// Images in a step divided by the median.
    pub images_per_second: f64,
    /// Largest resident set, where the system tells.
    pub peak_rss_mib: Option<f64>,
    /// Numbers that are trained.
    pub trainable_parameters: usize,
    /// Steps measured.
    pub steps: usize,
    /// Images in a step.
    pub batch: usize,
}

/// One step that is not counted, then `steps` full ones.
///
/// # Errors
/// When the recipe does not fit or a step fails.
pub fn bench(mut recipe: Recipe, steps: usize, device: &candle_core::Device, observer: &mut dyn Observer) -> Result<Measured> {
    if steps == 0 || steps > 100_000 {
        return Err(Error::input("--steps", format!("expected 1 to 100000, found {steps}")));
    }
    (recipe.train.epochs, recipe.train.steps) = (None, Some(steps + 1));
    let mut session = Session::open(recipe, device, observer)?;
    fill_batch(&mut session);
    let (mut adapters, task) = session.plan()?;
    let trainable_parameters = adapters.params.count();
    let mut trainer = session.trainer(&mut adapters, task)?;
    let mut run = trainer.begin()?;
    let mut stepper = Stepper::new(&mut trainer, 0, steps + 1, observer)?;
    stepper.step(&mut trainer, &mut run)?;
    stepper.reset_clock();
    let (mut times, mut images, mut waited) = (Vec::with_capacity(steps), 0, 0.0);
    for _ in 0..steps {
        let start = Instant::now();
        images += stepper.step(&mut trainer, &mut run)?.images;
        let data = stepper.reset_clock();
        times.push(start.elapsed().as_secs_f64() - data);
        waited += data;
    }
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    Ok(Measured {
        step_seconds: Seconds { median, min: times[0] },
        data_seconds: waited / steps as f64,
        images_per_second: images as f64 / steps as f64 / median,
        peak_rss_mib: peak_rss_mib(),
        trainable_parameters,
        steps,
        batch: images / steps,
    })
}

/// Repeats the data until an epoch has only full batches.
fn fill_batch(session: &mut Session) {
    let step = session.recipe.train.batch * session.recipe.train.accumulate;
    let train = &mut session.data.train;
    let (own, wanted) = (train.len(), train.len().div_ceil(step) * step);
    for i in own..wanted {
        let again = train[i % own].clone();
        train.push(again);
    }
}
