//! Parameters: declared once, ordered, named. The only thing optimisers see.

use candle_core::{DType, Device, Shape, Tensor, Var};

use crate::{Error, Result, rng};

/// How a parameter starts.
#[derive(Debug, Clone)]
pub enum Start {
    /// All zeros.
    Zeros,
    /// All equal to one value.
    Constant(f64),
    /// Uniform in ±1/√fan_in, which is torch's `kaiming_uniform_(a=√5)` for a `[out, in]` matrix.
    KaimingUniform {
        /// The number of inputs of one output.
        fan_in: usize,
    },
    /// Uniform in ±bound.
    Uniform {
        /// The largest absolute value.
        bound: f64,
    },
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// A given value.
    Value(Tensor),
}

/// One trainable tensor.
#[derive(Debug, Clone)]
pub struct Param {
    /// Unique name; the tensor's name in the adapter file.
    pub name: String,
    /// The value, updated in place.
    pub var: Var,
    /// Multiplies the learning rate (LoRA+ gives `lora_B` a higher one).
    pub lr_factor: f64,
    /// Whether decoupled weight decay applies. By default it skips tensors below 2-D.
    pub decay: bool,
    /// Saved and loaded, but not trained (VeRA's projections, Tip-Adapter's cache).
    pub frozen: bool,
}

/// What a method declares for one parameter.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Unique name; the tensor's name in the adapter file.
    pub name: String,
    /// Its shape.
    pub shape: Shape,
    /// Its initial value.
    pub start: Start,
    /// Multiplies the learning rate.
    pub lr_factor: f64,
    /// Overrides whether weight decay applies.
    pub decay: Option<bool>,
    /// Saved and loaded, but not trained.
    pub frozen: bool,
}

impl Spec {
    /// A parameter with learning-rate factor 1 and the default decay.
    pub fn new(name: impl Into<String>, shape: impl Into<Shape>, start: Start) -> Self {
        Self { name: name.into(), shape: shape.into(), start, lr_factor: 1.0, decay: None, frozen: false }
    }
}

/// The ordered set of trainable parameters.
#[derive(Debug)]
pub struct Params {
    seed: u64,
    dtype: DType,
    device: Device,
    items: Vec<Param>,
    /// The most numbers that may be declared.
    limit: usize,
    /// Set in a view of another set: declaring hands out what is there, without gradients.
    view: bool,
    notes: Vec<String>,
}

impl Params {
    /// An empty set of f32 parameters on `device`.
    #[must_use]
    pub fn new(seed: u64, device: &Device) -> Self {
        Self::with_dtype(seed, DType::F32, device)
    }

    /// An empty set of another dtype; f64 serves finite-difference tests.
    #[must_use]
    pub fn with_dtype(seed: u64, dtype: DType, device: &Device) -> Self {
        Self { seed, dtype, device: device.clone(), items: Vec::new(), limit: usize::MAX, view: false, notes: Vec::new() }
    }

    /// Refuses to declare more than so many numbers: what an adapter from elsewhere asks for is not to take more memory than what
    /// it brings along.
    #[must_use]
    pub fn limited(self, numbers: usize) -> Self {
        Self { limit: numbers, ..self }
    }

    /// The same parameters for evaluation: planning a method with it gives hooks that read the
    /// current values and record no graph.
    #[must_use]
    pub fn view(&self) -> Self {
        let Self { seed, dtype, device, items, limit, .. } = self;
        let (device, items) = (device.clone(), items.clone());
        Self { seed: *seed, dtype: *dtype, device, items, limit: *limit, view: true, notes: Vec::new() }
    }

    /// Declares a parameter and returns the tensor to compute with.
    ///
    /// The initial value depends on the seed and the name only, not on the order.
    ///
    /// # Errors
    /// When the name is taken (two methods train the same tensor) or the value has another shape.
    pub fn declare(&mut self, spec: Spec) -> Result<Tensor> {
        if self.view {
            let found = self.items.iter().find(|p| p.name == spec.name && p.var.shape() == &spec.shape);
            return match found {
                // Detached tensors share the variable's storage and so follow its updates.
                Some(p) => Ok(p.var.as_tensor().detach()),
                None => Err(Error::config(spec.name, "is not among the planned parameters")),
            };
        }
        if self.items.iter().any(|p| p.name == spec.name) {
            return Err(Error::config(spec.name, "two methods of the recipe train this tensor; select disjoint targets"));
        }
        self.check_room(&spec)?;
        let mut rng = rng::rng(self.seed, &[rng::name_key(&spec.name)]);
        let (dtype, device) = (self.dtype, &self.device);
        let value = match &spec.start {
            Start::Zeros => Tensor::zeros(&spec.shape, dtype, device)?,
            Start::Constant(c) => Tensor::full(*c, &spec.shape, device)?.to_dtype(dtype)?,
            Start::KaimingUniform { fan_in } => {
                let bound = 1.0 / (*fan_in as f64).sqrt();
                rng::uniform(&mut rng, -bound, bound, &spec.shape, dtype, device)?
            }
            Start::Uniform { bound } => rng::uniform(&mut rng, -bound, *bound, &spec.shape, dtype, device)?,
            Start::Normal { std } => rng::normal(&mut rng, *std, &spec.shape, dtype, device)?,
            Start::Value(v) => v.to_dtype(dtype)?.to_device(device)?,
        };
        if value.shape() != &spec.shape {
            return Err(Error::config(spec.name, format!("initial value has shape {:?}, expected {:?}", value.dims(), spec.shape.dims())));
        }
        let decay = spec.decay.unwrap_or(spec.shape.rank() >= 2);
        let var = Var::from_tensor(&value)?;
        // Detached tensors share the variable's storage and so follow its updates.
        let tensor = if spec.frozen { var.as_tensor().detach() } else { var.as_tensor().clone() };
        self.items.push(Param { name: spec.name, var, lr_factor: spec.lr_factor, decay, frozen: spec.frozen });
        Ok(tensor)
    }

    fn check_room(&self, spec: &Spec) -> Result<()> {
        let wanted = spec.shape.dims().iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        let held: usize = self.items.iter().map(|p| p.var.elem_count()).sum();
        match wanted.and_then(|n| n.checked_add(held)).filter(|n| *n <= self.limit) {
            Some(_) => Ok(()),
            None => {
                let message =
                    format!("has the shape {:?}: the configuration describes more than {} numbers", spec.shape.dims(), self.limit);
                Err(Error::config(spec.name.as_str(), message))
            }
        }
    }

    /// Tells the user something that is no error, such as a pattern that matches nothing.
    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// What planning had to tell.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The parameters in declaration order.
    pub fn iter(&self) -> impl Iterator<Item = &Param> {
        self.items.iter()
    }

    /// How many tensors there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether nothing is trainable.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// How many numbers are trained.
    #[must_use]
    pub fn count(&self) -> usize {
        self.items.iter().filter(|p| !p.frozen).map(|p| p.var.elem_count()).sum()
    }

    /// The parameter called `name`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Param> {
        self.items.iter().find(|p| p.name == name)
    }

    /// The parameters' dtype: f32 masters, whatever the model computes in.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the parameters live.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }
}
