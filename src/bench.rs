//! `peft bench`: the time of training steps, data apart.

use std::time::Instant;

use peft_adapters::ops;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::recipe::Recipe;
use crate::report::peak_rss_mib;
use crate::session::Session;
use crate::train::{Observer, Stepper};

/// What `peft bench` does.
#[derive(Debug, Clone, Copy)]
pub struct BenchOptions {
    /// Steps to measure.
    pub steps: usize,
    /// Whether the floor is measured too.
    pub floor: bool,
}

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
    /// The same step's matrix products alone, timed in turn with the steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub floor: Option<Floor>,
}

/// The arithmetic floor of a step.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Floor {
    /// Seconds of all products.
    pub seconds: Seconds,
    /// The step's median over the floor's.
    pub multiple: f64,
    /// 10⁹ floating-point operations in a step's products.
    pub gflop: f64,
    /// How fast the products alone were, in 10⁹ operations a second.
    pub gflop_per_second: f64,
}

impl Seconds {
    fn new(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        Self { median: times[times.len() / 2], min: times[0] }
    }
}

/// One step that is not counted, then `steps` full ones; with `floor` each is followed by its matrix products alone.
///
/// # Errors
/// When the recipe does not fit or a step fails.
pub fn bench(mut recipe: Recipe, options: BenchOptions, device: &candle_core::Device, observer: &mut dyn Observer) -> Result<Measured> {
    let BenchOptions { steps, floor } = options;
    if steps == 0 || steps > 100_000 {
        return Err(Error::input("--steps", format!("expected 1 to 100000, found {steps}")));
    }
    (recipe.train.epochs, recipe.train.steps) = (None, Some(steps + 1));
    let mut session = Session::to_train(recipe, device, observer)?;
    fill_batch(&mut session);
    let (mut adapters, task) = session.plan()?;
    let trainable_parameters = adapters.params.count();
    session.discard_replaced(&adapters)?;
    let mut trainer = session.trainer(&mut adapters, task)?;
    let mut run = trainer.begin()?;
    let mut stepper = Stepper::new(&mut trainer, 0, steps + 1, observer)?;
    let (first, products) = ops::floor::record(|| stepper.step(&mut trainer, &mut run));
    first?;
    stepper.reset_clock();
    let mut floors = Vec::new();
    let (mut times, mut images, mut waited) = (Vec::with_capacity(steps), 0, 0.0);
    for _ in 0..steps {
        let start = Instant::now();
        images += stepper.step(&mut trainer, &mut run)?.images;
        let data = stepper.reset_clock();
        times.push(start.elapsed().as_secs_f64() - data);
        waited += data;
        if floor {
            floors.push(ops::floor::replay(&products).as_secs_f64());
        }
    }
    let step_seconds = Seconds::new(times);
    let floor = floor.then(|| {
        let gflop = products.iter().map(|(p, n)| p.flops() * *n as f64).sum::<f64>() / 1e9;
        let seconds = Seconds::new(floors);
        Floor { seconds, multiple: step_seconds.median / seconds.median, gflop, gflop_per_second: gflop / seconds.median }
    });
    Ok(Measured {
        step_seconds,
        data_seconds: waited / steps as f64,
        images_per_second: images as f64 / steps as f64 / step_seconds.median,
        peak_rss_mib: peak_rss_mib(),
        trainable_parameters,
        steps,
        batch: images / steps,
        floor,
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
