//! Trading time for memory: parts of a forward pass that keep only their input and are computed again for the backward pass
//! (Chen et al. 2016, arXiv 1604.06174). Cut by blocks it is activation checkpointing; cut by examples, with a loss over all
//! of them, it is GradCache (Gao et al. 2021, arXiv 2101.06983).

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, TensorId, Var, bail};

use crate::ops::graph::once;

type Again<'a> = Box<dyn Fn(&Tensor, Range<usize>) -> Result<Tensor> + 'a>;

/// A part that will be computed again.
struct Segment<'a> {
    input: Tensor,
    output: Var,
    /// At most so many rows are computed at once.
    group: usize,
    again: Again<'a>,
}

/// The segments of one forward pass, in order.
///
/// Segments must be functions of their input alone: what they draw has to be drawn alike the second time.
#[derive(Default)]
pub struct Tape<'a> {
    segments: RefCell<Vec<Segment<'a>>>,
    rows: Option<usize>,
}

impl std::fmt::Debug for Tape<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tape({} segments)", self.segments.borrow().len())
    }
}

impl<'a> Tape<'a> {
    /// Cut wherever the model offers a place, such as between blocks.
    #[must_use]
    pub fn by_blocks() -> Self {
        Self::default()
    }

    /// Cut into groups of at most `rows` examples.
    #[must_use]
    pub fn by_rows(rows: usize) -> Self {
        Self { rows: Some(rows.max(1)), ..Self::default() }
    }

    /// How many examples go together, where the cut is by examples.
    #[must_use]
    pub fn rows(&self) -> Option<usize> {
        self.rows
    }

    /// Computes `again(input)` and forgets everything but its value.
    ///
    /// # Errors
    /// What `again` returns.
    pub fn segment(&self, input: &Tensor, again: impl Fn(&Tensor) -> Result<Tensor> + 'a) -> Result<Tensor> {
        Ok(self.segment_in_groups(input, usize::MAX, move |x, _| Ok((again(x)?, Vec::<()>::new())))?.0)
    }

    /// [`Tape::segment`], computed for at most `group` rows at once, which bounds what is alive in its middle. `again` gets
    /// some rows of the input and which these are; what else it returns, an item for each row or nothing, is joined.
    ///
    /// # Errors
    /// What `again` returns.
    pub fn segment_in_groups<E>(
        &self,
        input: &Tensor,
        group: usize,
        again: impl Fn(&Tensor, Range<usize>) -> Result<(Tensor, Vec<E>)> + 'a,
    ) -> Result<(Tensor, Vec<E>)> {
        let (mut parts, mut extra, mut tracked) = (Vec::new(), Vec::new(), input.track_op());
        for rows in groups(input, group) {
            let (value, more) = again(&part(&input.detach(), &rows)?, rows)?;
            tracked |= value.track_op();
            extra.extend(more);
            parts.push(if tracked { value.detach() } else { value });
        }
        let value = match parts.len() {
            1 => parts.remove(0),
            _ => Tensor::cat(&parts, 0)?,
        };
        if !tracked {
            return Ok((value, extra));
        }
        let output = Var::from_tensor(&value)?;
        let leaf = output.as_tensor().clone();
        let again = Box::new(move |x: &Tensor, rows: Range<usize>| again(x, rows).map(|(value, _)| value));
        self.segments.borrow_mut().push(Segment { input: input.clone(), output, group, again });
        Ok((leaf, extra))
    }

    /// Gradients of a loss through every segment. The loss's graph cannot be used again: without segments its operations give
    /// up what they hold as the pass goes by. `take` gets one store after the other; a parameter that several segments
    /// use is in several of them, and the sum is its gradient.
    ///
    /// # Errors
    /// When a tensor operation fails, or what `take` returns.
    pub fn backward<F>(self, loss: &Tensor, mut take: impl FnMut(&GradStore) -> std::result::Result<(), F>) -> std::result::Result<(), F>
    where
        F: From<candle_core::Error>,
    {
        let mut segments = self.segments.into_inner();
        let mut pending: HashMap<TensorId, Tensor> = HashMap::new();
        // What lies between segments may be walked through once for each of their groups.
        let store = if segments.is_empty() { once(|| loss.backward()) } else { loss.backward() }?;
        take(&store)?;
        collect(&segments, store, &mut pending)?;
        // Nothing later can reach the last segment any more; segments whose output went unused have no gradient.
        while let Some(segment) = segments.pop() {
            let Some(dy) = pending.remove(&segment.output.as_tensor().id()) else { continue };
            for rows in groups(&segment.input, segment.group) {
                let dy = part(&dy, &rows)?;
                let store = backward_from(&(segment.again)(&part(&segment.input, &rows)?, rows)?, &dy)?;
                take(&store)?;
                collect(&segments, store, &mut pending)?;
            }
        }
        Ok(())
    }
}

/// Adds the gradients of the segments' outputs to those that wait.
fn collect(segments: &[Segment<'_>], mut store: GradStore, pending: &mut HashMap<TensorId, Tensor>) -> Result<()> {
    for segment in segments {
        let leaf = segment.output.as_tensor();
        let Some(found) = store.remove(leaf) else { continue };
        let sum = match pending.remove(&leaf.id()) {
            Some(sum) => (sum + found)?,
            None => found,
        };
        pending.insert(leaf.id(), sum);
    }
    Ok(())
}

/// Groups of about equal size, at most `group` rows each.
fn groups(input: &Tensor, group: usize) -> Vec<Range<usize>> {
    let rows = input.dims().first().copied().unwrap_or(1).max(1);
    let each = rows.div_ceil(rows.div_ceil(group.max(1)));
    (0..rows).step_by(each).map(|from| from..rows.min(from + each)).collect()
}

/// These rows of `t`; all of them are `t` itself.
fn part(t: &Tensor, rows: &Range<usize>) -> Result<Tensor> {
    if t.rank() == 0 || rows.len() == t.dim(0)? { Ok(t.clone()) } else { t.narrow(0, rows.start, rows.len())?.contiguous() }
}

/// The gradients of everything below `y`, given that of `y`.
fn backward_from(y: &Tensor, dy: &Tensor) -> Result<GradStore> {
    let seeded = y.device().is_cpu() && matches!(y.dtype(), DType::F32 | DType::F64);
    if seeded { y.apply_op1(Seed(dy.detach()))?.backward() } else { (y * dy)?.sum_all()?.backward() }
}

/// A scalar whose gradient is the given one; its value is of no interest.
struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let zero = match self.0.dtype() {
            DType::F32 => CpuStorage::F32(vec![0.0]),
            DType::F64 => CpuStorage::F64(vec![0.0]),
            other => bail!("no seed of dtype {other:?}"),
        };
        Ok((zero, Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::ops::testing::random;

    /// Two layers that share a weight, and a skip around both.
    fn net(x: &Tensor, w: &Tensor) -> Result<Tensor> {
        x.matmul(w)?.tanh()
    }

    fn gradients(w: &Var, x: &Var, tape: Option<Tape<'_>>) -> (Tensor, Tensor) {
        let weight = w.as_tensor().clone();
        let Some(tape) = tape else {
            let y = net(&net(x, w).unwrap(), w).unwrap();
            let grads = (y.sqr().unwrap().sum_all().unwrap() + x.sum_all().unwrap()).unwrap().backward().unwrap();
            return (grads.get(w).unwrap().clone(), grads.get(x).unwrap().clone());
        };
        let again = move |x: &Tensor| net(x, &weight);
        let in_groups = again.clone();
        let h = tape.segment(x, again).unwrap();
        let (y, seen) = tape.segment_in_groups(&h, 3, move |x, rows| Ok((in_groups(x)?, rows.collect()))).unwrap();
        assert_eq!(seen, [0, 1, 2, 3]);
        let loss = (y.sqr().unwrap().sum_all().unwrap() + x.sum_all().unwrap()).unwrap();
        let mut sums: [Option<Tensor>; 2] = [None, None];
        let take = |store: &GradStore| {
            for (sum, var) in sums.iter_mut().zip([w, x]) {
                if let Some(g) = store.get(var) {
                    *sum = Some(match sum.take() {
                        Some(s) => (s + g)?,
                        None => g.clone(),
                    });
                }
            }
            Ok::<(), candle_core::Error>(())
        };
        tape.backward(&loss, take).unwrap();
        let [w, x] = sums.map(Option::unwrap);
        (w, x)
    }

    #[test]
    fn gradients_are_those_of_the_whole_graph() {
        let w = Var::from_tensor(&random(&[3, 3], 1)).unwrap();
        let x = Var::from_tensor(&random(&[4, 3], 2)).unwrap();
        let (whole, cut) = (gradients(&w, &x, None), gradients(&w, &x, Some(Tape::by_blocks())));
        for (a, b) in [(whole.0, cut.0), (whole.1, cut.1)] {
            let off = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
            assert!(off < 1e-12, "{off}");
        }
    }

    #[test]
    fn constants_leave_no_segment() {
        let tape = Tape::by_blocks();
        let x = Tensor::ones((2, 2), DType::F32, &Device::Cpu).unwrap();
        let y = tape.segment(&x, Tensor::sqr).unwrap();
        assert!(!y.track_op() && tape.segments.borrow().is_empty());
        let loss = Var::from_tensor(&Tensor::ones((), DType::F32, &Device::Cpu).unwrap()).unwrap();
        let mut stores = 0;
        tape.backward(&loss.sqr().unwrap(), |_| {
            stores += 1;
            Ok::<(), candle_core::Error>(())
        })
        .unwrap();
        assert_eq!(stores, 1);
    }
}
