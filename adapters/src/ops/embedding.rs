//! Rows of a table, whose gradient is scattered back.

use candle_core::{DType, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::float::Float;
use super::graph::{self, Want, apply};
use super::kernels::{View, add, for_rows, fused, rows, uninit};
use super::portable;

/// Gradients of fewer elements are scattered by one thread.
const PARALLEL_FROM: usize = 512 * 1024;

/// See [`super::embedding`].
pub(super) fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    if !fused([table]) || ids.dtype() != DType::U32 || !ids.device().is_cpu() {
        return portable::embedding(table, ids);
    }
    let (rows, _) = table.dims2()?;
    let op = Op { ids: ids.flatten_all()?.to_vec1()?, dims: ids.dims().to_vec() };
    if let Some(id) = op.ids.iter().find(|id| **id as usize >= rows) {
        bail!("id {id} is outside a table of {rows} rows");
    }
    apply(op, [&table.contiguous()?])
}

/// The rows of `table` at `ids`.
fn gather<T: Float>(table: &[T], ids: &[u32], dim: usize) -> Vec<T> {
    let mut out = uninit(ids.len() * dim);
    for_rows(&mut out, dim, |first, out| {
        for (row, id) in out.chunks_exact_mut(dim).zip(&ids[first..]) {
            row.copy_from_slice(&table[*id as usize * dim..][..dim]);
        }
    });
    out
}

/// Adds the rows of `dy` to those of `sums` by id, each in the order of the ids.
fn scatter<T: Float>(dy: &[T], ids: &[u32], sums: &mut [T], dim: usize) {
    let rows = rows(sums.len(), dim);
    if rows == 0 {
        return;
    }
    let run = |first: usize, sums: &mut [T]| {
        for (id, dy) in ids.iter().zip(dy.chunks_exact(dim)) {
            let at = (*id as usize).wrapping_sub(first).wrapping_mul(dim);
            if let Some(sum) = sums.get_mut(at..).and_then(|s| s.get_mut(..dim)) {
                add(sum, dy);
            }
        }
    };
    if dy.len() < PARALLEL_FROM {
        run(0, sums);
    } else {
        let step = rows.div_ceil(4 * rayon::current_num_threads());
        let pieces = sums.par_chunks_mut(step * dim).enumerate();
        pieces.for_each(|(i, sums)| run(i * step, sums));
    }
}

struct Op {
    ids: Vec<u32>,
    dims: Vec<usize>,
}

impl graph::Op<1> for Op {
    const NAME: &'static str = "embedding";

    fn forward<T: Float>(&self, [table]: &[View<'_>; 1]) -> Result<(Vec<T>, Shape)> {
        let dim = table.dims()[1];
        let mut dims = self.dims.clone();
        dims.push(dim);
        Ok((gather(table.slice()?, &self.ids, dim), Shape::from(dims)))
    }

    fn backward<T: Float>(&self, [table]: &[View<'_>; 1], dy: &[T], [want]: [Want<T>; 1]) -> Result<[Option<Vec<T>>; 1]> {
        let (rows, dim) = (table.dims()[0], table.dims()[1]);
        let sums = match want {
            Want::No => return Ok([None]),
            Want::Fresh => vec![T::zero(); rows * dim],
            Want::Onto(sums) => sums,
        };
        let mut sums = sums;
        scatter(dy, &self.ids, &mut sums, dim);
        Ok([Some(sums)])
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::super::testing::{check_gradients, check_same, random};
    use super::*;

    fn ids(n: usize, rows: u32, dims: &[usize]) -> Tensor {
        let ids: Vec<u32> = (0..n as u32).map(|i| i.wrapping_mul(2_654_435_761) % rows).collect();
        Tensor::from_vec(ids, dims, &Device::Cpu).unwrap()
    }

    #[test]
    fn gradients_match_differences() {
        let ids = ids(6, 4, &[2, 3]);
        check_gradients(&[random(&[5, 3], 1)], |t| embedding(&t[0], &ids));
    }

    #[test]
    fn matches_the_portable_composition() {
        // The last is long enough for several threads.
        for (n, rows, dim) in [(12, 7, 33), (1, 1, 1), (9000, 50, 64)] {
            let ids = ids(n, rows, &[1, n]);
            let table = random(&[rows as usize, dim], 1);
            check_same(&[table], |t| embedding(&t[0], &ids), |t| portable::embedding(&t[0], &ids));
        }
    }

    #[test]
    fn takes_strided_operands() {
        let ids = ids(6, 4, &[2, 3]).t().unwrap();
        let table = random(&[3, 5], 1).t().unwrap();
        check_same(&[table], |t| embedding(&t[0], &ids), |t| portable::embedding(&t[0].contiguous()?, &ids));
    }

    #[test]
    fn ids_outside_the_table_are_errors() {
        let ids = Tensor::new(&[0_u32, 5], &Device::Cpu).unwrap();
        assert!(embedding(&random(&[5, 3], 1), &ids).is_err());
    }

    #[test]
    fn no_ids_give_no_rows() {
        let ids = Tensor::from_vec(Vec::<u32>::new(), (0, 7), &Device::Cpu).unwrap();
        assert_eq!(embedding(&random(&[5, 3], 1), &ids).unwrap().dims(), [0, 7, 3]);
    }
}
