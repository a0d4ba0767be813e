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

#[cfg(test)]
mod tests {
    use ndarray::array;
    use proptest::prelude::*;

    use super::*;
    use crate::testing::*;

    proptest! {
        #[test]
        fn scatter_add_is_the_adjoint_of_gather(rows in size(), width in size(), n in 0..6usize, seed: u64) {
            let mut noise = Noise(seed);
            let index: Vec<u32> = (0..n).map(|_| noise.below(rows) as u32).collect();
            let (x, dy) = (noise.array((rows, width)), noise.array((n, width)));
            let mut dx = Array2::zeros((rows, width));
            scatter_add(dx.view_mut(), &index, dy.view());
            assert_gradient("dx", &x, &dx, |x| project(&gather(x.view(), &index), &dy));
        }
    }

    #[test]
    fn an_index_that_occurs_twice_is_added_twice() {
        let mut y = array![[1.0f32], [2.0]];
        scatter_add(y.view_mut(), &[1, 1], array![[10.0], [100.0]].view());
        assert_eq!(y, array![[1.0], [112.0]]);
        assert_eq!(gather(y.view(), &[1, 0, 1]), array![[112.0], [1.0], [112.0]]);
    }
}
