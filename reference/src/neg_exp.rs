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
