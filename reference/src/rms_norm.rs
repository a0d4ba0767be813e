//! RMSNorm (Zhang and Sennrich, arXiv:1910.07467), as in transformers' `modeling_llama.py`.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2};

use crate::Real;

/// `y = weight * x * rstd` with `rstd = 1 / sqrt(mean(x²) + eps)` of each row.
///
/// x `[tokens, width]`, weight `[width]` → y `[tokens, width]` and rstd `[tokens]`, which backward needs.
pub fn rms_norm<T: Real>(x: ArrayView2<T>, weight: ArrayView1<T>, eps: f64) -> (Array2<T>, Array1<T>) {
    let width = T::of(x.ncols() as f64);
    let rstd: Array1<T> = x
        .rows()
        .into_iter()
        .map(|row| {
            let mean_square = row.iter().map(|&value| value * value).sum::<T>() / width;
            (mean_square + T::of(eps)).sqrt().recip()
        })
        .collect();
    let y = Array2::from_shape_fn(x.dim(), |(t, i)| weight[i] * (x[[t, i]] * rstd[t]));
    (y, rstd)
}

/// (dx `[tokens, width]`, dweight `[width]`).
///
/// With `n = x * rstd`: `dweight = Σ_t dy * n`, and `dx = rstd * (weight * dy - n * mean(weight * dy * n))` of each row.
pub fn rms_norm_backward<T: Real>(
    x: ArrayView2<T>,
    weight: ArrayView1<T>,
    rstd: ArrayView1<T>,
    dy: ArrayView2<T>,
) -> (Array2<T>, Array1<T>) {
    let width = x.ncols();
    let mut dx = Array2::zeros(x.dim());
    let mut dweight = Array1::zeros(width);
    for t in 0..x.nrows() {
        let normed = |i: usize| x[[t, i]] * rstd[t];
        let mean = (0..width).map(|i| weight[i] * dy[[t, i]] * normed(i)).sum::<T>() / T::of(width as f64);
        for i in 0..width {
            dx[[t, i]] = rstd[t] * (weight[i] * dy[[t, i]] - normed(i) * mean);
            dweight[i] += dy[[t, i]] * normed(i);
        }
    }
    (dx, dweight)
}
