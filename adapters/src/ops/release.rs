//! Memory that a graph holds and nobody will read.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor, bail};

use super::kernels::fused;

/// See [`super::release`].
pub(super) fn release(t: &Tensor) -> Result<()> {
    if t.track_op() && fused([t]) { t.inplace_op1(&Empty) } else { Ok(()) }
}

/// See [`super::discard`].
pub(super) fn discard(t: &Tensor) -> Result<()> {
    if fused([t]) { t.inplace_op1(&EmptyIfWhole) } else { Ok(()) }
}

/// [`Empty`], unless the memory holds more than this tensor.
struct EmptyIfWhole;

impl InplaceOp1 for EmptyIfWhole {
    fn name(&self) -> &'static str {
        "discard"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let held = match storage {
            CpuStorage::F32(values) => values.len(),
            CpuStorage::F64(values) => values.len(),
            _ => bail!("only f32 and f64 are discarded"),
        };
        if held == layout.shape().elem_count() { Empty.cpu_fwd(storage, layout) } else { Ok(()) }
    }
}

struct Empty;

impl InplaceOp1 for Empty {
    fn name(&self) -> &'static str {
        "release"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        match storage {
            CpuStorage::F32(values) => drop(std::mem::take(values)),
            CpuStorage::F64(values) => drop(std::mem::take(values)),
            _ => bail!("only f32 and f64 are released"),
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::{DType, Tensor};

    use super::super::testing::{leaves, random};
    use super::super::{Activation, activation, discard, linear, release};

    /// `act` goes into a frozen product, which needs the weight only.
    fn gradient(free: bool) -> Tensor {
        let x = leaves(&[random(&[3, 4], 1)], DType::F32, 1).remove(0);
        let w = random(&[2, 4], 2).to_dtype(DType::F32).unwrap();
        let act = activation(&x, Activation::Gelu).unwrap();
        let y = linear(&act, &w, None).unwrap();
        if free {
            release(&act).unwrap();
            assert!(linear(&act, &w, None).is_err(), "nothing is left to read");
        }
        let y = (&y + 1.0).unwrap();
        y.sum_all().unwrap().backward().unwrap().get(&x).unwrap().clone()
    }

    #[test]
    fn gradients_do_not_miss_it() {
        let [kept, freed] = [false, true].map(|free| gradient(free).to_vec2::<f32>().unwrap());
        assert_eq!(kept, freed);
    }

    #[test]
    fn what_others_see_a_part_of_is_not_discarded() {
        let whole = random(&[4], 1);
        let view = whole.narrow(0, 1, 2).unwrap();
        discard(&view).unwrap();
        assert_eq!(whole.to_vec1::<f64>().unwrap().len(), 4);
        discard(&whole).unwrap();
        assert!(linear(&whole.reshape((1, 4)).unwrap(), &random(&[1, 4], 2), None).is_err());
    }

    #[test]
    fn constants_stay() {
        let t = random(&[2], 1);
        release(&t).unwrap();
        assert_eq!(t.to_vec1::<f64>().unwrap().len(), 2);
    }
}
