//! The scan's `A` from the parameter that is stored.

use ndarray::{Array2, ArrayView2};

use crate::Real;

/// `A = -exp(a_log)`, elementwise: a_log `[channels, d_state]`. Negative whatever the parameter, so the scan decays.
pub fn neg_exp<T: Real>(a_log: ArrayView2<T>) -> Array2<T> {
    a_log.mapv(|value| -value.exp())
}

/// da_log `= da * a`, from the output `a` of [`neg_exp`] and its gradient.
pub fn neg_exp_backward<T: Real>(a: ArrayView2<T>, da: ArrayView2<T>) -> Array2<T> {
    &a * &da
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::*;

    proptest! {
        #[test]
        fn gradient_is_certified_and_the_value_negative(channels in size(), d_state in size(), seed: u64) {
            let mut noise = Noise(seed);
            let (a_log, da) = (noise.array((channels, d_state)), noise.array((channels, d_state)));
            let a = neg_exp(a_log.view());
            assert!(a.iter().all(|&a| a < 0.0));
            assert_close("a", &(-&a).ln(), &a_log, 1e-12);
            let da_log = neg_exp_backward(a.view(), da.view());
            assert_gradient("da_log", &a_log, &da_log, |a_log| project(&neg_exp(a_log.view()), &da));
        }
    }
}
