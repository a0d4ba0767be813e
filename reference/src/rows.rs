//! Rows taken by index, and added back; each is the other's backward.

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};

use crate::Real;

/// `y[i] = x[index[i]]`: x `[rows, width]`, index `[n]` → y `[n, width]`. An index may occur more than once.
pub fn gather<T: Real>(x: ArrayView2<T>, index: &[u32]) -> Array2<T> {
    let index: Vec<usize> = index.iter().map(|&row| row as usize).collect();
    x.select(Axis(0), &index)
}

/// `y[index[i]] += x[i]`, in the order of `i`: y `[rows, width]`, index `[n]`, x `[n, width]`.
pub fn scatter_add<T: Real>(mut y: ArrayViewMut2<T>, index: &[u32], x: ArrayView2<T>) {
    assert_eq!(index.len(), x.nrows(), "scatter_add: one index a row");
    for (&row, values) in index.iter().zip(x.rows()) {
        let mut target = y.row_mut(row as usize);
        target += &values;
    }
}
