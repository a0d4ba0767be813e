//! The global norm of gradients and the factor that clips it.

use crate::Real;

/// `Σ x²`.
pub fn squared_norm<T: Real>(x: &[T]) -> T {
    x.iter().map(|&value| value * value).sum()
}

/// `min(1, max_norm / (norm + 1e-6))` with `norm = sqrt(squared_norm)`, as PyTorch's `clip_grad_norm_`.
/// NaN where the norm is not finite, so that [`adamw`](crate::adamw()) skips the step.
pub fn clip_factor<T: Real>(squared_norm: T, max_norm: f64) -> T {
    let norm = squared_norm.sqrt();
    if norm.is_finite() { (T::of(max_norm) / (norm + T::of(1e-6))).min(T::one()) } else { T::nan() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::*;

    proptest! {
        #[test]
        fn a_clipped_gradient_is_no_longer_than_allowed_and_a_short_one_is_left(
            n in size(), scale in 0.01..100.0, max_norm in 0.1..10.0, seed: u64,
        ) {
            let gradient: Vec<f64> = Noise(seed).array(n).iter().map(|value| value * scale).collect();
            let norm = gradient.iter().map(|value| value * value).sum::<f64>().sqrt();
            let factor = clip_factor(squared_norm(&gradient), max_norm);
            if norm + 1e-6 <= max_norm {
                assert_eq!(factor, 1.0);
            } else {
                assert!(factor * norm <= max_norm);
                assert!((factor * norm / max_norm - 1.0).abs() < 1e-6 / norm * 1.01 + 1e-12);
            }
        }
    }

    #[test]
    fn a_norm_that_is_not_finite_gives_a_factor_that_is_not() {
        for value in [f32::NAN, f32::INFINITY, 1e30] {
            assert!(clip_factor(squared_norm(&[1.0, value]), 1.0).is_nan());
        }
    }
}
