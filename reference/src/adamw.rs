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
    /// `1 - beta1^step`, with steps counted from 1: what the first moment falls short of after so few of them.
    pub correction1: f64,
    /// `1 - beta2^step`.
    pub correction2: f64,
    /// What gradients are multiplied with first ([`clip_factor`](crate::clip_factor)); 1 for none.
    pub clip: f64,
}

impl AdamW {
    /// The same update with the corrections of a step, counted from 1.
    pub fn at_step(self, step: u32) -> Self {
        let correction = |beta: f64| 1.0 - beta.powf(f64::from(step));
        AdamW { correction1: correction(self.beta1), correction2: correction(self.beta2), ..self }
    }
}

/// One update of param, first and second moment in place, all `[n]` like grad. Nothing changes if `lr` or `clip` is not finite.
///
/// With `g = clip * grad`: `m = beta1 m + (1-beta1) g`, `v = beta2 v + (1-beta2) g²`, `param *= 1 - lr * weight_decay`,
/// `param -= lr * (m / correction1) / (sqrt(v / correction2) + eps)`.
pub fn adamw<T: Real>(param: &mut [T], grad: &[T], first: &mut [T], second: &mut [T], update: &AdamW) {
    if !update.lr.is_finite() || !update.clip.is_finite() {
        return;
    }
    let n = param.len();
    assert!(grad.len() == n && first.len() == n && second.len() == n, "adamw: lengths differ");
    let (correction1, correction2) = (T::of(update.correction1), T::of(update.correction2));
    for i in 0..n {
        let g = T::of(update.clip) * grad[i];
        first[i] = T::of(update.beta1) * first[i] + T::of(1.0 - update.beta1) * g;
        second[i] = T::of(update.beta2) * second[i] + T::of(1.0 - update.beta2) * g * g;
        let direction = (first[i] / correction1) / ((second[i] / correction2).sqrt() + T::of(update.eps));
        param[i] = param[i] * T::of(1.0 - update.lr * update.weight_decay) - T::of(update.lr) * direction;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::*;

    const UPDATE: AdamW = AdamW {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        correction1: 1.0 - 0.9,
        correction2: 1.0 - 0.95,
        clip: 1.0,
    };

    proptest! {
        /// The moments in closed form: `m_t = (1-beta) Σ_i beta^(t-i) g_i`, and decoupled decay of the parameter.
        #[test]
        fn steps_are_those_of_the_moments_written_out(steps in 1..6u32, clip in 0.1..1.0, seed: u64) {
            let gradients: Vec<f64> = Noise(seed).array(steps as usize).to_vec();
            let (mut param, mut first, mut second) = (vec![0.5], vec![0.0], vec![0.0]);
            let mut want = 0.5;
            for step in 1..=steps {
                let update = AdamW { clip, ..UPDATE }.at_step(step);
                adamw(&mut param, &gradients[step as usize - 1..][..1], &mut first, &mut second, &update);
                let moment = |beta: f64, power: i32| {
                    let sum: f64 = (1..=step)
                        .map(|i| beta.powi((step - i) as i32) * (clip * gradients[i as usize - 1]).powi(power))
                        .sum();
                    (1.0 - beta) * sum / (1.0 - beta.powi(step as i32))
                };
                want -= UPDATE.lr * UPDATE.weight_decay * want;
                want -= UPDATE.lr * moment(UPDATE.beta1, 1) / (moment(UPDATE.beta2, 2).sqrt() + UPDATE.eps);
                assert!((param[0] - want).abs() < 1e-12, "step {step}: {} {want}", param[0]);
            }
        }

        #[test]
        fn the_first_step_is_the_learning_rate_in_the_direction_of_the_sign(n in size(), seed: u64) {
            let gradient: Vec<f64> = Noise(seed).array(n).to_vec();
            let mut param = vec![0.0; n];
            adamw(&mut param, &gradient, &mut vec![0.0; n], &mut vec![0.0; n], &AdamW { eps: 0.0, ..UPDATE });
            for (param, gradient) in param.iter().zip(&gradient) {
                assert!((param + UPDATE.lr * gradient.signum()).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn without_a_gradient_a_parameter_decays_and_nothing_else() {
        let (mut param, mut first, mut second) = ([2.0f64], [0.0], [0.0]);
        adamw(&mut param, &[0.0], &mut first, &mut second, &UPDATE);
        assert_eq!((param, first, second), ([2.0 * (1.0 - 1e-4)], [0.0], [0.0]));
    }

    #[test]
    fn a_step_that_is_not_finite_changes_nothing() {
        for update in [AdamW { clip: f64::NAN, ..UPDATE }, AdamW { lr: f64::INFINITY, ..UPDATE }] {
            let (mut param, mut first, mut second) = ([2.0f32], [0.3], [0.4]);
            adamw(&mut param, &[1.0], &mut first, &mut second, &update);
            assert_eq!((param, first, second), ([2.0], [0.3], [0.4]));
        }
    }

    #[test]
    fn second_moment_keeps_its_digits_in_f32() {
        let (mut param, mut first, mut second) = ([0.0f32], [0.0], [0.0]);
        adamw(&mut param, &[1.0], &mut first, &mut second, &AdamW { beta2: 0.999, ..UPDATE });
        assert_eq!(second, [0.001]);
    }
}
