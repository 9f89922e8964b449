//! Exact decompositions of weight matrices, in f64 on the CPU.

use candle_core::{DType, Device, Result as TensorResult, Tensor};
use faer::{Mat, MatRef};
use rayon::prelude::*;

use crate::sites::{Site, SiteId, Sites, WeightId};
use crate::{Error, Result};

/// `W = U diag(s) Vᵀ`, singular values from the largest.
#[derive(Debug, Clone)]
pub struct Svd {
    /// [out, k], k the smaller dimension.
    pub u: Tensor,
    /// [k].
    pub s: Tensor,
    /// [k, in].
    pub vt: Tensor,
}

fn read(w: &Tensor) -> TensorResult<Mat<f64>> {
    let (rows, cols) = w.dims2()?;
    let values: Vec<f64> = w.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
    Ok(Mat::from_fn(rows, cols, |i, j| values[i * cols + j]))
}

fn write(m: MatRef<'_, f64>, like: &Tensor) -> TensorResult<Tensor> {
    let values: Vec<f64> = (0..m.nrows()).flat_map(|i| (0..m.ncols()).map(move |j| m[(i, j)])).collect();
    place(Tensor::from_vec(values, (m.nrows(), m.ncols()), &Device::Cpu)?, like)
}

/// f32 is what parameters are; an f64 model stays f64.
fn place(t: Tensor, like: &Tensor) -> TensorResult<Tensor> {
    t.to_dtype(if like.dtype() == DType::F64 { DType::F64 } else { DType::F32 })?.to_device(like.device())
}

/// The singular value decomposition of a base weight [out, in], which is kept with the model.
///
/// # Errors
/// When it does not converge, which finite weights do not let happen.
pub fn svd(sites: &Sites, id: WeightId, w: &Tensor) -> Result<Svd> {
    let parts = sites.derived(id, "svd", || {
        let Svd { u, s, vt } = decompose(w)?.0;
        Ok(vec![u, s, vt])
    })?;
    match parts.as_slice() {
        [u, s, vt] => Ok(Svd { u: u.clone(), s: s.clone(), vt: vt.clone() }),
        _ => Err(Error::config("model", "a weight has no singular values")),
    }
}

/// The decompositions of all sites' weights, so that [`svd`] finds them; one thread a weight.
///
/// # Errors
/// As [`svd`].
pub fn svd_all(sites: &Sites, found: &[(SiteId, &Site)]) -> Result<()> {
    found.par_iter().try_for_each(|(_, site)| match sites.weight(&format!("{}.weight", site.path)) {
        Some((id, weight)) => svd(sites, id, &weight.tensor).map(drop),
        None => Ok(()),
    })
}

/// The decomposition of a matrix, and its singular values in full precision.
fn decompose(w: &Tensor) -> Result<(Svd, Vec<f64>)> {
    let svd = read(w)?.thin_svd().map_err(|e| Error::config("model", format!("a weight has no singular values: {e:?}")))?;
    let values: Vec<f64> = svd.S().column_vector().iter().copied().collect();
    let s = place(Tensor::from_vec(values.clone(), values.len(), &Device::Cpu)?, w)?;
    Ok((Svd { u: write(svd.U(), w)?, s, vt: write(svd.V().transpose(), w)? }, values))
}

/// The part of a matrix that a rank can hold (Eckart & Young 1936).
#[derive(Debug, Clone)]
pub struct Cut {
    /// [out, r], [r], [r, in].
    pub svd: Svd,
    /// Σσ² of what is kept.
    pub kept: f64,
    /// Σσ² of the whole: the squared Frobenius norm.
    pub whole: f64,
}

/// The nearest matrix of rank `rank`, or of the smaller dimension where that is less.
///
/// # Shapes
/// `w` [out, in]
///
/// # Errors
/// When the tensor is no matrix or the decomposition does not converge, which finite values do not let happen.
pub fn cut(w: &Tensor, rank: usize) -> Result<Cut> {
    let (Svd { u, s, vt }, values) = decompose(w)?;
    let rank = rank.min(values.len());
    let energy = |values: &[f64]| values.iter().map(|v| v * v).sum();
    let svd = Svd { u: u.narrow(1, 0, rank)?.contiguous()?, s: s.narrow(0, 0, rank)?, vt: vt.narrow(0, 0, rank)?.contiguous()? };
    Ok(Cut { svd, kept: energy(&values[..rank]), whole: energy(&values) })
}

/// `W = Q R` of a weight [out, in] by Householder reflections: Q [out, k], R [k, in].
///
/// # Errors
/// When the tensor is not a matrix.
pub fn qr(w: &Tensor) -> Result<(Tensor, Tensor)> {
    let qr = read(w)?.qr();
    Ok((write(qr.compute_thin_Q().as_ref(), w)?, write(qr.thin_R(), w)?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::ops::testing::random;
    use crate::sites::Tower;

    fn off(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn products_give_the_matrix_back() {
        for dims in [[5, 8], [8, 5], [6, 6]] {
            let w = random(&dims, 3);
            let mut sites = Sites::new();
            let id = sites.add_weight("w", Tower::Vision, None, w.clone());
            let Svd { u, s, vt } = svd(&sites, id, &w).unwrap();
            assert!(off(&u.broadcast_mul(&s).unwrap().matmul(&vt).unwrap(), &w) < 1e-12);
            let values: Vec<f64> = s.to_vec1().unwrap();
            assert!(values.is_sorted_by(|a, b| a >= b), "{values:?}");
            let (q, r) = qr(&w).unwrap();
            assert!(off(&q.matmul(&r).unwrap(), &w) < 1e-12);
            let eye = Tensor::eye(5.min(dims[0]), DType::F64, &Device::Cpu).unwrap();
            let own = q.t().unwrap().matmul(&q).unwrap();
            assert!(dims[0] == 6 || off(&own, &eye) < 1e-12);
        }
    }
}
