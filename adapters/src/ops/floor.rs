//! The arithmetic floor: the matrix products of a step, alone.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::gemm::{Mat, MatMut, Old, Threads, gemm};

/// The shape of a matrix product, [m, k] · [k, n].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Product {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the left factor.
    pub k: usize,
    /// Columns of the result.
    pub n: usize,
    /// Whether the factors are stored transposed, left and right.
    pub transposed: [bool; 2],
    /// Whether one thread makes it while others make others.
    pub single: bool,
}

impl Product {
    /// Floating-point operations, a multiplication and an addition each.
    #[must_use]
    pub fn flops(&self) -> f64 {
        2.0 * self.m as f64 * self.k as f64 * self.n as f64
    }
}

static RECORDING: AtomicBool = AtomicBool::new(false);
static PRODUCTS: Mutex<Option<HashMap<Product, usize>>> = Mutex::new(None);

/// Notes a product while somebody records; costs one load otherwise.
pub(super) fn note(product: impl FnOnce() -> Product) {
    if RECORDING.load(Ordering::Relaxed)
        && let Ok(mut products) = PRODUCTS.lock()
        && let Some(products) = products.as_mut()
    {
        *products.entry(product()).or_default() += 1;
    }
}

/// The products that the fused operations of the whole process make while `work` runs, and how often each, sorted.
pub fn record<T>(work: impl FnOnce() -> T) -> (T, Vec<(Product, usize)>) {
    if let Ok(mut products) = PRODUCTS.lock() {
        *products = Some(HashMap::new());
    }
    RECORDING.store(true, Ordering::SeqCst);
    let done = work();
    RECORDING.store(false, Ordering::SeqCst);
    let found = PRODUCTS.lock().ok().and_then(|mut p| p.take()).unwrap_or_default();
    let mut found: Vec<_> = found.into_iter().collect();
    found.sort_unstable();
    (done, found)
}

/// Makes the products again in f32, with the threads that they had, on buffers that are ready, and nothing else.
#[must_use]
pub fn replay(products: &[(Product, usize)]) -> Duration {
    products.iter().map(|(product, count)| if product.single { side_by_side(product, *count) } else { in_turn(product, *count) }).sum()
}

struct Buffers {
    left: Vec<f32>,
    right: Vec<f32>,
    result: Vec<f32>,
}

impl Buffers {
    fn new(p: &Product) -> Self {
        // Ones: neither zeros nor denormals, which some processors treat differently.
        Self { left: vec![1.0; p.m * p.k], right: vec![1.0; p.k * p.n], result: vec![1.0; p.m * p.n] }
    }

    fn make(&mut self, p: &Product, threads: Threads) {
        let left = if p.transposed[0] { Mat::new(&self.left, p.k, p.m).t() } else { Mat::new(&self.left, p.m, p.k) };
        let right = if p.transposed[1] { Mat::new(&self.right, p.n, p.k).t() } else { Mat::new(&self.right, p.k, p.n) };
        gemm(MatMut::new(&mut self.result, p.m, p.n), Old::Overwrite, 1.0, left, right, threads);
    }
}

fn in_turn(product: &Product, count: usize) -> Duration {
    let mut buffers = Buffers::new(product);
    let start = Instant::now();
    for _ in 0..count {
        buffers.make(product, Threads::All);
    }
    start.elapsed()
}

fn side_by_side(product: &Product, count: usize) -> Duration {
    let threads = rayon::current_num_threads().max(1);
    let mut all: Vec<(Buffers, usize)> =
        (0..threads).map(|t| (Buffers::new(product), count / threads + usize::from(t < count % threads))).collect();
    let start = Instant::now();
    all.par_iter_mut().for_each(|(buffers, count)| (0..*count).for_each(|_| buffers.make(product, Threads::One)));
    start.elapsed()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::testing::random;
    use super::*;

    /// Other tests' products may be among them: they run at the same time.
    #[test]
    fn a_linear_layer_is_one_product() {
        let to = |t: candle_core::Tensor| t.to_dtype(candle_core::DType::F32).unwrap();
        let (x, w) = (to(random(&[61, 67], 1)), to(random(&[71, 67], 2)));
        let (_, products) = record(|| super::super::linear(&x, &w, None).unwrap());
        let expected = Product { m: 61, k: 67, n: 71, transposed: [false, true], single: false };
        let found = products.iter().find(|(p, _)| *p == expected).unwrap();
        assert_eq!((found.1, expected.flops()), (1, 2.0 * 61.0 * 67.0 * 71.0));
        assert!(replay(&products) > Duration::ZERO);
    }
}
