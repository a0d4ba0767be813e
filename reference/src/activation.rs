//! The scalar functions inside the ops, each beside its derivative.

use crate::Real;

/// `1 / (1 + exp(-a))`.
pub fn sigmoid<T: Real>(a: T) -> T {
    T::one() / (T::one() + (-a).exp())
}

/// `a * sigmoid(a)`.
pub fn silu<T: Real>(a: T) -> T {
    a * sigmoid(a)
}

/// `d silu / d a = sigmoid(a) * (1 + a * (1 - sigmoid(a)))`.
pub fn silu_derivative<T: Real>(a: T) -> T {
    let s = sigmoid(a);
    s * (T::one() + a * (T::one() - s))
}

/// `ln(1 + exp(a))`, and `a` itself above 20, as in state-spaces/mamba's selective scan.
pub fn softplus<T: Real>(a: T) -> T {
    if a > T::of(20.0) { a } else { a.exp().ln_1p() }
}

/// `d softplus / d a`: `sigmoid(a)`, and 1 above 20.
pub fn softplus_derivative<T: Real>(a: T) -> T {
    if a > T::of(20.0) { T::one() } else { sigmoid(a) }
}
