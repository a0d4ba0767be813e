//! AdamW (Loshchilov and Hutter, arXiv:1711.05101), as PyTorch has it.

use crate::Real;

/// The numbers of one update. f64, since `1 - beta2` in f32 would lose half of its digits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay; 0 for parameters that do not decay.
    pub weight_decay: f64,
    /// This step's number, from 1.
    pub step: u32,
    /// What gradients are multiplied with first ([`clip_factor`](crate::clip_factor)); 1 for none.
    pub clip: f64,
}

/// One update of param, first and second moment in place, all `[n]` like grad. Nothing changes if `lr` or `clip` is not finite.
///
/// With `g = clip * grad`: `m = beta1 m + (1-beta1) g`, `v = beta2 v + (1-beta2) g²`, `param *= 1 - lr * weight_decay`,
/// `param -= lr * (m / (1-beta1^step)) / (sqrt(v / (1-beta2^step)) + eps)`.
pub fn adamw<T: Real>(param: &mut [T], grad: &[T], first: &mut [T], second: &mut [T], update: &AdamW) {
    if !update.lr.is_finite() || !update.clip.is_finite() {
        return;
    }
    let n = param.len();
    assert!(grad.len() == n && first.len() == n && second.len() == n, "adamw: lengths differ");
    let correction = |beta: f64| T::of(1.0 - beta.powf(f64::from(update.step)));
    let (correction1, correction2) = (correction(update.beta1), correction(update.beta2));
    for i in 0..n {
        let g = T::of(update.clip) * grad[i];
        first[i] = T::of(update.beta1) * first[i] + T::of(1.0 - update.beta1) * g;
        second[i] = T::of(update.beta2) * second[i] + T::of(1.0 - update.beta2) * g * g;
        let direction = (first[i] / correction1) / ((second[i] / correction2).sqrt() + T::of(update.eps));
        param[i] = param[i] * T::of(1.0 - update.lr * update.weight_decay) - T::of(update.lr) * direction;
    }
}
