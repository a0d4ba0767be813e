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

#[cfg(test)]
mod tests {
    use ndarray::Array1;

    use super::*;
    use crate::testing::assert_gradient;

    #[test]
    fn derivatives_are_certified_on_both_sides_of_softplus_threshold() {
        let at = Array1::from(vec![-30.0, -5.0, -0.5, 0.0, 0.5, 5.0, 19.0, 21.0, 30.0]);
        let certify = |what, f: fn(f64) -> f64, derivative: fn(f64) -> f64| {
            assert_gradient(what, &at, &at.mapv(derivative), |at| at.mapv(f).sum());
        };
        certify("silu", silu, silu_derivative);
        certify("softplus", softplus, softplus_derivative);
        certify("sigmoid", sigmoid, |a| sigmoid(a) * sigmoid(-a));
    }

    #[test]
    fn extremes_stay_finite_in_f32() {
        for a in [-1e4f32, -100.0, 100.0, 1e4] {
            for value in [sigmoid(a), silu(a), silu_derivative(a), softplus(a), softplus_derivative(a)] {
                assert!(value.is_finite(), "{a}: {value}");
            }
        }
        assert_eq!(softplus(1e4f32), 1e4);
        assert_eq!(silu(1e4f32), 1e4);
        assert_eq!(silu(-1e4f32), 0.0);
    }
}
