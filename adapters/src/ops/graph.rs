//! How a fused operation gets into candle's graph; see [`super::slot`] for why not as one node.

use std::cell::Cell;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape, Tensor, WithDType as _, bail};

use super::float::Float;
use super::gemm::Old;
use super::kernels::{View, by_float, uninit};
use super::slot::{Edge, Gradient, Slot, add_to, token, value};

/// Whether an operand's gradient is wanted, and what it is to be added to.
pub(super) enum Want<T> {
    /// No gradient.
    No,
    /// The first one.
    Fresh,
    /// One more.
    Onto(Vec<T>),
}

impl<T: Float> Want<T> {
    /// Whether there is to be a gradient.
    pub(super) fn any(&self) -> bool {
        !matches!(self, Self::No)
    }

    /// Memory for `len` values, and what becomes of those that it holds.
    pub(super) fn start(self, len: usize) -> Option<(Vec<T>, Old)> {
        match self {
            Self::No => None,
            Self::Fresh => Some((uninit(len), Old::Overwrite)),
            Self::Onto(values) => Some((values, Old::Add)),
        }
    }

    /// What `make` returns, added.
    pub(super) fn plus(self, make: impl FnOnce() -> Vec<T>) -> Option<Vec<T>> {
        match self {
            Self::No => None,
            Self::Fresh => Some(make()),
            Self::Onto(mut sum) => {
                add_to(&mut sum, &make());
                Some(sum)
            }
        }
    }
}

/// A fused operation of `N` contiguous operands.
pub(super) trait Op<const N: usize>: Send + Sync + 'static {
    /// For error messages.
    const NAME: &'static str;

    /// The result.
    fn forward<T: Float>(&self, operands: &[View<'_>; N]) -> Result<(Vec<T>, Shape)>;

    /// The gradients of the operands that are wanted, sums where there is something to add to.
    fn backward<T: Float>(&self, operands: &[View<'_>; N], dy: &[T], want: [Want<T>; N]) -> Result<[Option<Vec<T>>; N]>;
}

/// The operation's result, with a graph if one of the operands has one.
pub(super) fn apply<const N: usize, O: Op<N>>(op: O, operands: [&Tensor; N]) -> Result<Tensor>
where
    Entry<O, N>: Enter<N>,
{
    let tracked = operands.iter().any(|t| t.track_op());
    let dtype = operands[0].dtype();
    let (storage, shape) = by_float!(dtype, T => {
        let (values, shape) = op.forward::<T>(&operands.map(View::new))?;
        if !tracked {
            return Tensor::from_vec(values, shape, &Device::Cpu);
        }
        (T::to_cpu_storage_owned(values), shape)
    });
    let mut args = Vec::with_capacity(N);
    let edges = operands.map(|t| {
        let (edge, arg) = Edge::to(t);
        args.push(arg);
        edge
    });
    let slot = Arc::<Slot>::default();
    let entry = Entry { op, operands: Mutex::new(Some(operands.map(Tensor::clone))), edges, slot: slot.clone(), dtype };
    value(entry.enter(&args)?, slot, storage, shape)
}

thread_local! {
    static ONCE: Cell<bool> = const { Cell::new(false) };
}

/// Runs a backward pass after which nobody makes another one through the same graph: what an operation has read is given up
/// as soon as its turn is over.
pub(crate) fn once<R>(backward: impl FnOnce() -> R) -> R {
    let before = ONCE.replace(true);
    let done = backward();
    ONCE.set(before);
    done
}

/// A fused operation with its operands, as an operation of tokens.
pub(super) struct Entry<O, const N: usize> {
    op: O,
    operands: Mutex<Option<[Tensor; N]>>,
    edges: [Edge; N],
    slot: Arc<Slot>,
    dtype: DType,
}

impl<O: Op<N>, const N: usize> Entry<O, N> {
    fn operands(&self) -> Result<[Tensor; N]> {
        let mut held = self.operands.lock().unwrap_or_else(PoisonError::into_inner);
        let operands = if ONCE.get() { held.take() } else { held.clone() };
        operands.map_or_else(|| bail!("{}: an earlier backward pass has given its operands up", O::NAME), Ok)
    }

    /// Sends the gradients on; what candle is to be told.
    fn back(&self) -> Result<[Option<Tensor>; N]> {
        let operands = self.operands()?;
        let mut told = [const { None }; N];
        let Some(dy) = self.slot.take() else {
            for ((told, edge), t) in told.iter_mut().zip(&self.edges).zip(&operands) {
                *told = edge.nothing(t)?;
            }
            return Ok(told);
        };
        by_float!(self.dtype, T => {
            let mut want = [const { Want::No }; N];
            for (want, edge) in want.iter_mut().zip(&self.edges) {
                *want = wanted::<T>(edge)?;
            }
            let views = operands.each_ref().map(View::new);
            let gradients = dy.read(|dy| self.op.backward::<T>(&views, dy, want))?;
            for (((told, edge), t), gradient) in told.iter_mut().zip(&self.edges).zip(&operands).zip(gradients) {
                *told = match gradient {
                    Some(values) => edge.send(Gradient::new(values), t)?,
                    None => edge.nothing(t)?,
                };
            }
        });
        Ok(told)
    }
}

fn wanted<T: Float>(edge: &Edge) -> Result<Want<T>> {
    Ok(match edge {
        Edge::Constant => Want::No,
        Edge::Candle => Want::Fresh,
        Edge::Slot(slot) => match slot.take() {
            Some(gradient) => Want::Onto(gradient.into_values()?),
            None => Want::Fresh,
        },
    })
}

/// Operations of as many operands as candle knows.
pub(super) trait Enter<const N: usize> {
    /// The token of the result.
    fn enter(self, args: &[Tensor]) -> Result<Tensor>;
}

impl<O: Op<1>> Enter<1> for Entry<O, 1> {
    fn enter(self, args: &[Tensor]) -> Result<Tensor> {
        args[0].apply_op1(self)
    }
}

impl<O: Op<2>> Enter<2> for Entry<O, 2> {
    fn enter(self, args: &[Tensor]) -> Result<Tensor> {
        args[0].apply_op2(&args[1], self)
    }
}

impl<O: Op<3>> Enter<3> for Entry<O, 3> {
    fn enter(self, args: &[Tensor]) -> Result<Tensor> {
        args[0].apply_op3(&args[1], &args[2], self)
    }
}

impl<O: Op<1>> CustomOp1 for Entry<O, 1> {
    fn name(&self) -> &'static str {
        O::NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        token(self.dtype)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        let [a] = self.back()?;
        Ok(a)
    }
}

impl<O: Op<2>> CustomOp2 for Entry<O, 2> {
    fn name(&self) -> &'static str {
        O::NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        token(self.dtype)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [a, b] = self.back()?;
        Ok((a, b))
    }
}

impl<O: Op<3>> CustomOp3 for Entry<O, 3> {
    fn name(&self) -> &'static str {
        O::NAME
    }

    #[rustfmt::skip]
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        token(self.dtype)
    }

    #[rustfmt::skip]
    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [a, b, c] = self.back()?;
        Ok((a, b, c))
    }
}
