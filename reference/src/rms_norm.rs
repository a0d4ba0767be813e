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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::*;

    proptest! {
        #[test]
        fn gradients_are_certified(tokens in 0..4usize, width in size(), seed: u64) {
            const EPS: f64 = 1e-2;
            let mut noise = Noise(seed);
            let (x, weight) = (noise.array((tokens, width)), noise.array(width));
            let dy = noise.array((tokens, width));
            let (_, rstd) = rms_norm(x.view(), weight.view(), EPS);
            let (dx, dweight) = rms_norm_backward(x.view(), weight.view(), rstd.view(), dy.view());
            assert_gradient("dx", &x, &dx, |x| project(&rms_norm(x.view(), weight.view(), EPS).0, &dy));
            assert_gradient("dweight", &weight, &dweight, |w| project(&rms_norm(x.view(), w.view(), EPS).0, &dy));
        }

        #[test]
        fn output_has_mean_square_one_whatever_the_scale_of_the_input(width in size(), scale in 0.1..10.0, seed: u64) {
            let x: Array2<f64> = Noise(seed).array_in((3, width), 0.5, 1.5);
            let (y, rstd) = rms_norm(x.view(), Array1::ones(width).view(), 0.0);
            for (t, row) in y.rows().into_iter().enumerate() {
                assert!((row.dot(&row) / width as f64 - 1.0).abs() < 1e-12);
                assert!((rstd[t].powi(-2) - x.row(t).dot(&x.row(t)) / width as f64).abs() < 1e-12);
            }
            let scaled = rms_norm(x.mapv(|x| x * scale).view(), Array1::ones(width).view(), 0.0).0;
            assert_close("y", &scaled, &y, 1e-12);
        }
    }
}
