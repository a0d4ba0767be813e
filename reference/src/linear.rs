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

#[cfg(test)]
mod tests {
    use ndarray::array;
    use proptest::prelude::*;

    use super::*;
    use crate::testing::*;

    proptest! {
        #[test]
        fn gradients_are_certified(tokens in 0..4usize, inputs in size(), outputs in size(), seed: u64) {
            let mut noise = Noise(seed);
            let (x, weight) = (noise.array((tokens, inputs)), noise.array((outputs, inputs)));
            let (bias, dy) = (noise.array(outputs), noise.array((tokens, outputs)));
            let (dx, dweight, dbias) = linear_backward(x.view(), weight.view(), dy.view());
            assert_gradient("dx", &x, &dx, |x| project(&linear(x.view(), weight.view(), Some(bias.view())), &dy));
            assert_gradient("dweight", &weight, &dweight, |w| project(&linear(x.view(), w.view(), None), &dy));
            assert_gradient("dbias", &bias, &dbias, |b| {
                project(&linear(x.view(), weight.view(), Some(b.view())), &dy)
            });
        }

        #[test]
        fn output_is_linear_in_the_input(tokens in size(), inputs in size(), outputs in size(), seed: u64) {
            let mut noise = Noise(seed);
            let (x1, x2) = (noise.array((tokens, inputs)), noise.array((tokens, inputs)));
            let weight = noise.array((outputs, inputs));
            let y = |x: &Array2<f64>| linear(x.view(), weight.view(), None);
            assert_close("y", &y(&(&x1 * 2.5 - &x2)), &(y(&x1) * 2.5 - y(&x2)), 1e-12);
        }
    }

    #[test]
    fn weight_rows_are_outputs() {
        let y =
            linear(array![[1.0f32, 2.0]].view(), array![[3.0, 4.0], [5.0, 6.0]].view(), Some(array![0.5, 0.0].view()));
        assert_eq!(y, array![[11.5, 17.0]]);
    }
}
