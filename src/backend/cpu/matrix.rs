//! Matrices in memory as the kernels see them: rows with a stride, and the panels in which a linear weight is stored.
//!
//! A weight `[outputs, inputs]` lies in panels of [`PANEL`] outputs: `[⌈outputs/PANEL⌉][inputs][PANEL]`, with zeros for the
//! outputs that the last panel lacks. So the outputs of one input are neighbours, ready for vector lanes, and a product of
//! one row reads a panel from end to end.

use crate::backend::WEIGHT_ROWS;
use std::marker::PhantomData;

/// Outputs of a panel.
pub const PANEL: usize = WEIGHT_ROWS;

/// How many values the panels of a weight `[outputs, inputs]` take.
pub const fn panels_len(outputs: usize, inputs: usize) -> usize {
    outputs.div_ceil(PANEL) * inputs * PANEL
}

/// The values that rows span: nothing, or up to the end of the last.
fn span(rows: usize, cols: usize, stride: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * stride + cols }
}

/// A matrix `[rows, cols]` whose rows lie `stride` values apart.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a, T = f32> {
    ptr: *const T,
    rows: usize,
    cols: usize,
    stride: usize,
    life: PhantomData<&'a [T]>,
}

// SAFETY: as a shared slice.
unsafe impl<T: Sync> Send for Rows<'_, T> {}
// SAFETY: as a shared slice.
unsafe impl<T: Sync> Sync for Rows<'_, T> {}

impl<'a, T> Rows<'a, T> {
    /// A matrix at the start of `data`.
    ///
    /// # Panics
    /// When `data` is too short.
    pub fn new(data: &'a [T], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(span(rows, cols, stride) <= data.len(), "{rows} rows of {cols}, {stride} apart, in {}", data.len());
        // SAFETY: just checked.
        unsafe { Self::from_raw(data.as_ptr(), rows, cols, stride) }
    }

    /// A matrix whose rows have no gap, all of `data`.
    ///
    /// # Panics
    /// When `data` is too short.
    pub fn dense(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self::new(data, rows, cols, cols)
    }

    /// A matrix at `ptr`.
    ///
    /// # Safety
    /// During `'a` the rows are readable and nobody writes to them.
    pub unsafe fn from_raw(ptr: *const T, rows: usize, cols: usize, stride: usize) -> Self {
        Rows { ptr, rows, cols, stride, life: PhantomData }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Values from one row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// The value at row `row` and column `col`, as an address.
    #[inline(always)]
    pub fn at(&self, row: usize, col: usize) -> *const T {
        debug_assert!(row <= self.rows && col <= self.cols);
        self.ptr.wrapping_add(row * self.stride + col)
    }

    /// One row.
    pub fn row(&self, row: usize) -> &'a [T] {
        self.part(row, 0, self.cols)
    }

    /// `count` values of a row from column `first`.
    #[inline(always)]
    pub fn part(&self, row: usize, first: usize, count: usize) -> &'a [T] {
        assert!(row < self.rows && first + count <= self.cols, "row {row}, {count} columns from {first}");
        // SAFETY: inside the matrix.
        unsafe { std::slice::from_raw_parts(self.at(row, first), count) }
    }
}

/// A matrix `[rows, cols]` to write, whose rows lie `stride` values apart.
#[derive(Debug)]
pub struct RowsMut<'a, T = f32> {
    ptr: *mut T,
    rows: usize,
    cols: usize,
    stride: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: as an exclusive slice.
unsafe impl<T: Send> Send for RowsMut<'_, T> {}
// SAFETY: a shared `RowsMut` gives addresses alone; who writes to them answers for it.
unsafe impl<T: Send> Sync for RowsMut<'_, T> {}

impl<'a, T> RowsMut<'a, T> {
    /// A matrix at the start of `data`.
    ///
    /// # Panics
    /// When `data` is too short, or the rows overlap.
    pub fn new(data: &'a mut [T], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(span(rows, cols, stride) <= data.len(), "{rows} rows of {cols}, {stride} apart, in {}", data.len());
        assert!(rows <= 1 || cols <= stride, "rows of {cols} overlap {stride} apart");
        // SAFETY: just checked.
        unsafe { Self::from_raw(data.as_mut_ptr(), rows, cols, stride) }
    }

    /// A matrix whose rows have no gap.
    ///
    /// # Panics
    /// When `data` is too short.
    pub fn dense(data: &'a mut [T], rows: usize, cols: usize) -> Self {
        Self::new(data, rows, cols, cols)
    }

    /// A matrix at `ptr`.
    ///
    /// # Safety
    /// During `'a` the rows are writable, do not overlap, and nobody else reads or writes them. Values between the rows
    /// are not touched.
    pub unsafe fn from_raw(ptr: *mut T, rows: usize, cols: usize, stride: usize) -> Self {
        RowsMut { ptr, rows, cols, stride, life: PhantomData }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Values from one row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// The value at row `row` and column `col`, as an address.
    #[inline(always)]
    pub fn at(&self, row: usize, col: usize) -> *mut T {
        debug_assert!(row <= self.rows && col <= self.cols);
        self.ptr.wrapping_add(row * self.stride + col)
    }

    /// One row.
    pub fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the row is one of the matrix, and `self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.at(row, 0), self.cols) }
    }

    /// `count` values of a row from column `first`, for a task that shares the matrix with others.
    ///
    /// # Safety
    /// While the slice is used, nobody else reads or writes its values.
    #[inline(always)]
    pub unsafe fn part(&self, row: usize, first: usize, count: usize) -> &'a mut [T] {
        assert!(row < self.rows && first + count <= self.cols, "row {row}, {count} columns from {first}");
        // SAFETY: inside the matrix, and the caller's alone.
        unsafe { std::slice::from_raw_parts_mut(self.at(row, first), count) }
    }

    /// One row, for a task that shares the matrix with others.
    ///
    /// # Safety
    /// As for [`RowsMut::part`].
    #[inline(always)]
    pub unsafe fn shared_row(&self, row: usize) -> &'a mut [T] {
        // SAFETY: as the caller promises.
        unsafe { self.part(row, 0, self.cols) }
    }
}

/// A weight `[outputs, inputs]` in panels.
#[derive(Clone, Copy, Debug)]
pub struct Panels<'a, T> {
    data: &'a [T],
    outputs: usize,
    inputs: usize,
}

impl<'a, T> Panels<'a, T> {
    /// The weight that `data` is.
    ///
    /// # Panics
    /// When `data` has not [`panels_len`] values.
    pub fn new(data: &'a [T], outputs: usize, inputs: usize) -> Self {
        assert_eq!(data.len(), panels_len(outputs, inputs), "panels of a weight [{outputs}, {inputs}]");
        Panels { data, outputs, inputs }
    }

    /// Rows of the weight.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Columns of the weight.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Number of panels.
    pub fn count(&self) -> usize {
        self.outputs.div_ceil(PANEL)
    }

    /// Panel `index`, `[inputs][PANEL]`.
    pub fn panel(&self, index: usize) -> &'a [T] {
        &self.data[index * self.inputs * PANEL..][..self.inputs * PANEL]
    }
}
