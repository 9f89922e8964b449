//! Gradients that fused operations hand each other.
//!
//! candle's backward pass makes zeros for each operand of each operation and adds the gradient to them, on one thread. So a
//! fused operation enters the graph as two nodes: a *token*, one number on which the next fused operations hang, and the
//! *value*, which hangs on the token and on which candle's own operations do. The gradient of both is collected in a *slot*;
//! what goes through candle's store are the tokens' zeros. candle visits a node after all that depend on it, so that a slot is
//! full when its token's turn comes.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, TensorId, WithDType as _, bail};

use super::float::Float;
use super::kernels::{View, add, by_float, for_rows, tensor};

/// A gradient.
#[derive(Clone)]
pub(super) enum Gradient {
    /// Of an operation here, perhaps on its way to several places.
    Own(Arc<CpuStorage>),
    /// Of one of candle's, contiguous.
    Candle(Tensor),
}

impl Gradient {
    pub(super) fn new<T: Float>(values: Vec<T>) -> Self {
        Self::Own(Arc::new(T::to_cpu_storage_owned(values)))
    }

    /// Calls `f` with the values.
    pub(super) fn read<T: Float, R>(&self, f: impl FnOnce(&[T]) -> Result<R>) -> Result<R> {
        match self {
            Self::Own(storage) => f(T::cpu_storage_as_slice(storage)?),
            Self::Candle(t) => f(View::new(t).slice()?),
        }
    }

    /// The values; copied if somebody else has them too.
    pub(super) fn into_values<T: Float>(self) -> Result<Vec<T>> {
        match self {
            Self::Own(storage) => match Arc::try_unwrap(storage) {
                Ok(storage) => T::cpu_storage_data(storage),
                Err(storage) => Ok(T::cpu_storage_as_slice(&storage)?.to_vec()),
            },
            Self::Candle(_) => self.read(|values| Ok(values.to_vec())),
        }
    }

    /// As a tensor like that one.
    pub(super) fn into_tensor(self, like: &Tensor) -> Result<Tensor> {
        match self {
            Self::Candle(t) => Ok(t),
            Self::Own(_) => by_float!(like.dtype(), T => tensor(self.into_values::<T>()?, like)),
        }
    }

    /// The sum, in the memory of one of the two where nobody else has it.
    fn plus<T: Float>(self, other: Self) -> Result<Self> {
        let (mine, other) = if self.shared() { (other, self) } else { (self, other) };
        let mut sum = mine.into_values::<T>()?;
        other.read(|values: &[T]| {
            add_to(&mut sum, values);
            Ok(())
        })?;
        Ok(Self::new(sum))
    }

    fn shared(&self) -> bool {
        match self {
            Self::Own(storage) => Arc::strong_count(storage) > 1,
            Self::Candle(_) => true,
        }
    }
}

/// `sum += values`.
pub(super) fn add_to<T: Float>(sum: &mut [T], values: &[T]) {
    for_rows(sum, 1, |first, piece| add(piece, &values[first..first + piece.len()]));
}

/// Where the gradient of a value is collected.
#[derive(Default)]
pub(super) struct Slot(Mutex<Option<Gradient>>);

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Option<Gradient>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has been collected.
    pub(super) fn take(&self) -> Option<Gradient> {
        self.lock().take()
    }

    /// Adds a gradient.
    pub(super) fn push(&self, gradient: Gradient, dtype: DType) -> Result<()> {
        let mut held = self.lock();
        *held = Some(match held.take() {
            None => gradient,
            Some(old) => by_float!(dtype, T => old.plus::<T>(gradient)?),
        });
        Ok(())
    }
}

/// What a value hangs on.
struct Node {
    token: Tensor,
    slot: Arc<Slot>,
    value: OnceLock<TensorId>,
}

/// The nodes of values that are alive. Values know their nodes, but candle does not let anybody ask.
static NODES: LazyLock<Mutex<HashMap<TensorId, Weak<Node>>>> = LazyLock::new(Mutex::default);

fn nodes() -> MutexGuard<'static, HashMap<TensorId, Weak<Node>>> {
    NODES.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(id) = self.value.get() {
            nodes().remove(id);
        }
    }
}

/// How an operand's gradient gets to it.
pub(super) enum Edge {
    /// It has none.
    Constant,
    /// Through candle's store.
    Candle,
    /// Through its slot.
    Slot(Arc<Slot>),
}

impl Edge {
    /// The edge to an operand, and what stands for it in candle's graph.
    pub(super) fn to(t: &Tensor) -> (Self, Tensor) {
        if !t.track_op() {
            return (Self::Constant, t.clone());
        }
        let node = nodes().get(&t.id()).and_then(Weak::upgrade);
        match node {
            Some(node) => (Self::Slot(node.slot.clone()), node.token.clone()),
            None => (Self::Candle, t.clone()),
        }
    }

    /// Sends a gradient to the operand `like`; what candle is to be told.
    pub(super) fn send(&self, gradient: Gradient, like: &Tensor) -> Result<Option<Tensor>> {
        match self {
            Self::Constant => Ok(None),
            Self::Candle => gradient.into_tensor(like).map(Some),
            Self::Slot(slot) => {
                slot.push(gradient, like.dtype())?;
                zero(like).map(Some)
            }
        }
    }

    /// What candle is to be told where no gradient comes.
    pub(super) fn nothing(&self, like: &Tensor) -> Result<Option<Tensor>> {
        match self {
            Self::Constant => Ok(None),
            Self::Candle => like.zeros_like().map(Some),
            Self::Slot(_) => zero(like).map(Some),
        }
    }
}

/// A token's gradient.
fn zero(like: &Tensor) -> Result<Tensor> {
    Tensor::zeros(1, like.dtype(), like.device())
}

/// A token's value.
pub(super) fn token(dtype: DType) -> Result<(CpuStorage, Shape)> {
    by_float!(dtype, T => Ok((T::to_cpu_storage_owned(vec![T::from_f64(0.0)]), Shape::from(1))))
}

/// The value that hangs on a token.
pub(super) fn value(token: Tensor, slot: Arc<Slot>, storage: CpuStorage, shape: Shape) -> Result<Tensor> {
    let node = Arc::new(Node { token, slot, value: OnceLock::new() });
    let bridge = Bridge { node: node.clone(), value: Mutex::new(Some((storage, shape))) };
    let value = node.token.apply_op1(bridge)?;
    // Nobody else can have set it.
    let _ = node.value.set(value.id());
    nodes().insert(value.id(), Arc::downgrade(&node));
    Ok(value)
}

/// Puts the gradient that candle's operations have for a value into its slot.
struct Bridge {
    node: Arc<Node>,
    value: Mutex<Option<(CpuStorage, Shape)>>,
}

impl CustomOp1 for Bridge {
    fn name(&self) -> &'static str {
        "value"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let value = self.value.lock().unwrap_or_else(PoisonError::into_inner).take();
        value.map_or_else(|| bail!("a value is made once"), Ok)
    }

    fn bwd(&self, token: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        self.node.slot.push(Gradient::Candle(dy.contiguous()?), dy.dtype())?;
        zero(token).map(Some)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::{DType, Device, Result, Tensor, Var};

    use super::super::graph::once;
    use super::super::testing::{check_gradients, leaves, random};
    use super::super::{Activation, LowRank, activation, add, attention, layer_norm, linear, lora_linear, portable, set_portable};
    use super::super::{AttentionShape, embedding, release};
    use super::nodes;

    /// A block of two heads with all that meets in one: values that several operations read, some of them candle's.
    fn block(t: &[Tensor]) -> Result<Tensor> {
        let [x, w, b, a, up] = t else { unreachable!("five operands") };
        let h = layer_norm(x, b, b, 1e-5)?;
        let lora = LowRank { a, b: up, scale: 0.5, dropout: None };
        let (q, k) = (lora_linear(&h, &random(&[4, 4], 9), None, &lora)?, linear(&h, w, Some(b))?);
        let y = attention(&q, &k, &h, &AttentionShape { heads: 2, causal: true, prefix: 0 }, None)?;
        let x = add(x, &y)?;
        let act = activation(&x, Activation::Gelu)?;
        // Candle's own: a product of one value with another, and a view.
        let mixed = ((&act * &x)? + x.narrow(1, 0, x.dim(1)?)?)?;
        add(&mixed, &add(&x, &act)?)
    }

    fn operands() -> [Tensor; 5] {
        [random(&[2, 3, 4], 1), random(&[4, 4], 2), random(&[4], 3), random(&[2, 4], 4), random(&[4, 2], 5)]
    }

    #[test]
    fn gradients_meet_as_in_one_graph() {
        check_gradients(&operands(), |t| block(&[block(t)?, t[1].clone(), t[2].clone(), t[3].clone(), t[4].clone()]));
    }

    fn gradients(of: &Tensor, leaves: &[Tensor]) -> Vec<Vec<f64>> {
        let store = of.backward().unwrap();
        leaves.iter().map(|l| store.get(l).unwrap().flatten_all().unwrap().to_vec1().unwrap()).collect()
    }

    #[test]
    fn a_graph_can_be_walked_twice_unless_it_is_given_up() {
        let leaves = leaves(&operands(), DType::F64, 31);
        let loss = block(&leaves).unwrap().sqr().unwrap().sum_all().unwrap();
        let first = gradients(&loss, &leaves);
        assert_eq!(first, gradients(&loss, &leaves));
        assert_eq!(first, once(|| gradients(&loss, &leaves)));
        assert!(loss.backward().unwrap_err().to_string().contains("earlier backward pass"));
    }

    #[test]
    fn nodes_go_with_their_values() {
        let x = Var::from_tensor(&random(&[2, 3], 1)).unwrap();
        let y = add(&x, &x).unwrap();
        let id = y.id();
        let z = activation(&y, Activation::Relu).unwrap();
        assert!(nodes().contains_key(&id));
        drop(y);
        assert!(nodes().contains_key(&id), "the operation that comes next holds it");
        drop(z);
        assert!(!nodes().contains_key(&id));
    }

    #[test]
    fn a_sum_does_not_need_what_it_added() {
        let t = leaves(&[random(&[3, 4], 1), random(&[5, 4], 2)], DType::F64, 3);
        let run = |free: bool| {
            let rows = Tensor::new(&[1_u32, 0, 2], &Device::Cpu).unwrap();
            let (a, b) = (embedding(&t[0], &rows).unwrap(), activation(&t[0], Activation::Silu).unwrap());
            let sum = add(&a, &b).unwrap();
            if free {
                release(&a).unwrap();
                release(&b).unwrap();
            }
            linear(&sum, &t[1], None).unwrap().sum_all().unwrap()
        };
        assert_eq!(gradients(&run(false), &t), gradients(&run(true), &t));
    }

    #[test]
    fn compositions_and_fused_operations_go_together() {
        let t = operands();
        check_gradients(&t, |t| {
            let h = block(t)?;
            let before = portable();
            set_portable(true);
            let h = layer_norm(&h, &t[2], &t[2], 1e-5);
            set_portable(before);
            linear(&h?, &t[1], None)
        });
    }
}
