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
