//! The linear layer, weights `[out, in]`.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis};

use crate::Real;

/// `y = x · weightᵀ (+ bias)`: x `[tokens, in]`, weight `[out, in]`, bias `[out]` → y `[tokens, out]`.
pub fn linear<T: Real>(x: ArrayView2<T>, weight: ArrayView2<T>, bias: Option<ArrayView1<T>>) -> Array2<T> {
    let mut y = x.dot(&weight.t());
    if let Some(bias) = bias {
        y += &bias;
    }
    y
}

/// (dx `[tokens, in]`, dweight `[out, in]`, dbias `[out]`): `dx = dy · weight`, `dweight = dyᵀ · x`, `dbias = Σ_t dy`.
pub fn linear_backward<T: Real>(
    x: ArrayView2<T>,
    weight: ArrayView2<T>,
    dy: ArrayView2<T>,
) -> (Array2<T>, Array2<T>, Array1<T>) {
    (dy.dot(&weight), dy.t().dot(&x), dy.sum_axis(Axis(0)))
}
