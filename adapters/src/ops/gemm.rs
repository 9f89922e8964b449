//! Matrix products on borrowed memory.

use std::marker::PhantomData;

use gemm::Parallelism;

use super::float::Float;
use super::floor::{Product, note};

/// A matrix to read.
#[derive(Clone, Copy)]
pub(super) struct Mat<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T> Mat<'a, T> {
    /// Row by row without gaps.
    pub(super) fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Row by row, `stride` apart.
    pub(super) fn strided(data: &'a [T], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(fits(data.len(), rows, cols, stride), "matrix outside its memory");
        Self { data, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// Transposed.
    pub(super) fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// Whether rows of `cols` elements, `stride` apart, stay within `len` elements.
fn fits(len: usize, rows: usize, cols: usize, stride: usize) -> bool {
    rows == 0 || cols == 0 || (rows - 1) * stride + cols <= len
}

/// A matrix to write, row by row.
pub(super) struct MatMut<'a, T> {
    data: *mut T,
    rows: usize,
    cols: usize,
    stride: usize,
    memory: PhantomData<&'a mut [T]>,
}

impl<'a, T> MatMut<'a, T> {
    /// Row by row without gaps.
    pub(super) fn new(data: &'a mut [T], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Row by row, `stride` apart.
    pub(super) fn strided(data: &'a mut [T], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(fits(data.len(), rows, cols, stride), "matrix outside its memory");
        Self { data: data.as_mut_ptr(), rows, cols, stride, memory: PhantomData }
    }
}

/// A buffer that several threads write to in disjoint blocks of columns.
pub(super) struct Shared<'a, T> {
    data: *mut T,
    len: usize,
    memory: PhantomData<&'a mut [T]>,
}

// SAFETY: `block` is the only access, and its callers keep the blocks apart.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(super) fn new(data: &'a mut [T]) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), memory: PhantomData }
    }

    /// `rows` of `cols` elements, `stride` apart, the first at `offset`.
    ///
    /// # Safety
    /// No two blocks that overlap may be alive at the same time.
    pub(super) unsafe fn block(&self, offset: usize, rows: usize, cols: usize, stride: usize) -> MatMut<'a, T> {
        assert!(offset <= self.len && fits(self.len - offset, rows, cols, stride), "block outside its memory");
        MatMut {
            // SAFETY: the offset is within the buffer, see above.
            data: unsafe { self.data.add(offset) },
            rows,
            cols,
            stride,
            memory: PhantomData,
        }
    }
}

impl<T: Float> MatMut<'_, T> {
    /// Writes zeros.
    pub(super) fn zero(&mut self) {
        for row in 0..self.rows {
            // SAFETY: rows stay within the memory by construction.
            unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.stride), self.cols) }.fill(T::zero());
        }
    }
}

/// What becomes of the values that the destination holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Old {
    /// Not read.
    Overwrite,
    /// The product is added to them.
    Add,
}

/// Who computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Threads {
    /// The calling thread, which is one of many at work.
    One,
    /// As many as there are.
    All,
}

/// `dst = scale · lhs · rhs`, or that added to what `dst` holds.
pub(super) fn gemm<T: Float>(dst: MatMut<'_, T>, old: Old, scale: T, lhs: Mat<'_, T>, rhs: Mat<'_, T>, threads: Threads) {
    assert!(dst.rows == lhs.rows && dst.cols == rhs.cols && lhs.cols == rhs.rows, "matrices do not fit");
    note(|| Product {
        m: dst.rows,
        k: lhs.cols,
        n: dst.cols,
        transposed: [lhs.col_stride > 1, rhs.col_stride > 1],
        single: threads == Threads::One,
    });
    let parallelism = match threads {
        Threads::One => Parallelism::None,
        Threads::All => Parallelism::Rayon(0),
    };
    // SAFETY: all three matrices lie within memory that outlives the call and that nobody
    // else writes to: checked where they were made.
    unsafe {
        gemm::gemm(
            dst.rows,
            dst.cols,
            lhs.cols,
            dst.data,
            1,
            dst.stride as isize,
            old == Old::Add,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            T::one(),
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}
