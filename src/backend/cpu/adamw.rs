//! The optimiser's step over ranges of the flat spaces: the norm, the clip factor, AdamW (Loshchilov and Hutter,
//! arXiv:1711.05101).

use super::lines::{Sum, load, store};
use super::matrix::RowsMut;
use super::simd::{Kernel, LANES, Lanes, Simd};
use super::work::parallel;
use crate::backend::ops::Control;

/// Values that one task of an update takes.
const VALUES: usize = 16 * 1024;
/// Partial sums of a norm; their number and sizes depend on the number of values alone.
const PARTS: usize = 256;
/// Values whose squares are summed in f32 before they go to f64.
const BLOCK: usize = 64 * LANES;

/// `out += Σ x²`.
pub fn squared_norm(simd: Simd, x: &[f32], out: &mut f32) {
    let each = x.len().div_ceil(PARTS).next_multiple_of(BLOCK);
    let mut parts = [0.0; PARTS];
    {
        let parts = RowsMut::dense(&mut parts, 1, PARTS);
        parallel(x.len().div_ceil(each.max(1)), x.len() / LANES, |part| {
            let total = simd.run(Squares(&x[part * each..x.len().min((part + 1) * each)]));
            // SAFETY: the cell belongs to this task.
            unsafe { parts.part(0, part, 1) }.fill(total);
        });
    }
    *out += parts.iter().sum::<f64>() as f32;
}

struct Squares<'a>(&'a [f32]);

impl Kernel for Squares<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<L: Lanes>(self) -> f64 {
        let mut total = 0.0;
        for block in self.0.chunks(BLOCK) {
            let mut squares = Sum::<L>::new();
            for i in (0..block.len()).step_by(LANES) {
                let value = load(block, i);
                squares.mul_add(i, value, value);
            }
            total += f64::from(squares.total());
        }
        total
    }
}

/// `norm = √squared_norm` and `clip = min(1, max_norm / (norm + 1e-6))`, NaN where the norm is not finite.
pub fn clip_factor(squared_norm: f32, max_norm: f32, control: &mut [f32]) {
    let norm = squared_norm.sqrt();
    let clip = if norm.is_finite() { (max_norm / (norm + 1e-6)).min(1.0) } else { f32::NAN };
    control[Control::Norm as usize] = norm;
    control[Control::Clip as usize] = clip;
}

/// What an update is made with.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// β₁.
    pub beta1: f32,
    /// β₂.
    pub beta2: f32,
    /// Added to the root.
    pub eps: f32,
    /// Decoupled decay.
    pub weight_decay: f32,
}

/// One update of `param` and its moments, all as long as `grad`; nothing when a number of `control` is not finite.
pub fn adamw(
    simd: Simd,
    (param, grad): (&RowsMut<'_>, &[f32]),
    (moment1, moment2): (&RowsMut<'_>, &RowsMut<'_>),
    control: &[f32],
    update: Update,
) {
    if !control.iter().all(|number| number.is_finite()) {
        return;
    }
    parallel(grad.len().div_ceil(VALUES), grad.len() / 4, |task| {
        let (first, count) = (task * VALUES, VALUES.min(grad.len() - task * VALUES));
        // SAFETY: the range belongs to this task.
        let [param, moment1, moment2] = [param, moment1, moment2].map(|all| unsafe { all.part(0, first, count) });
        simd.run(Step { param, grad: &grad[first..first + count], moment1, moment2, control, update });
    });
}

struct Step<'a> {
    param: &'a mut [f32],
    grad: &'a [f32],
    moment1: &'a mut [f32],
    moment2: &'a mut [f32],
    control: &'a [f32],
    update: Update,
}

impl Kernel for Step<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Update { beta1, beta2, eps, weight_decay } = self.update;
        let number = |control: Control| self.control[control as usize];
        // 1 − β and 1 − lr·decay in f64: in f32 half of their digits would be gone.
        let rest = |beta: f32| L::splat((1.0 - f64::from(beta)) as f32);
        let (beta1, beta2, rest1, rest2) = (L::splat(beta1), L::splat(beta2), rest(beta1), rest(beta2));
        let lr = number(Control::LearningRate);
        let keep = L::splat((1.0 - f64::from(lr) * f64::from(weight_decay)) as f32);
        let [lr, eps, clip] = [lr, eps, number(Control::Clip)].map(L::splat);
        let [correction1, correction2] = [Control::Correction1, Control::Correction2].map(|c| L::splat(number(c)));
        for i in (0..self.grad.len()).step_by(LANES) {
            let g = load::<L>(self.grad, i) * clip;
            let m = load::<L>(self.moment1, i).mul_add(beta1, g * rest1);
            let v = load::<L>(self.moment2, i).mul_add(beta2, g * g * rest2);
            store(m, self.moment1, i);
            store(v, self.moment2, i);
            let direction = m / correction1 / ((v / correction2).sqrt() + eps);
            store(direction.neg_mul_add(lr, load::<L>(self.param, i) * keep), self.param, i);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, everywhere, f64s, random as uniform};
    use super::*;
    use crate::random;
    use h1_reference as reference;
    use proptest::prelude::*;

    fn control(clip: f32) -> [f32; crate::backend::ops::CONTROL] {
        [1e-3, 0.271, 0.002_997, 1.0, clip]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        #[test]
        fn updates_and_norms_are_those_of_the_reference(
            seed in any::<u64>(),
            n in prop::sample::select(vec![1usize, 15, 16, 17, 1023, 1025, 40_000]),
        ) {
            let rng = &mut random::stream(seed, "adamw");
            let (param, grad) = (uniform(rng, n, 1.0), uniform(rng, n, 0.1));
            let (moment1, moment2) = (uniform(rng, n, 0.1), uniform(rng, n, 0.1).iter().map(|v| v.abs()).collect::<Vec<_>>());
            let update = Update { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
            let outputs = everywhere(|simd| {
                let (mut param, mut moment1, mut moment2) = (param.clone(), moment1.clone(), moment2.clone());
                let mut norm = 1.0;
                squared_norm(simd, &grad, &mut norm);
                adamw(
                    simd,
                    (&RowsMut::dense(&mut param, 1, n), &grad),
                    (&RowsMut::dense(&mut moment1, 1, n), &RowsMut::dense(&mut moment2, 1, n)),
                    &control(0.5),
                    update,
                );
                vec![param, moment1, moment2, vec![norm]]
            });

            let [mut p, mut m, mut v] = [&param, &moment1, &moment2].map(|x| f64s(x).to_vec());
            let g = f64s(&grad).to_vec();
            let [lr, correction1, correction2, _, clip] = control(0.5).map(f64::from);
            let op = reference::AdamW {
                lr,
                beta1: f64::from(0.9f32),
                beta2: f64::from(0.999f32),
                eps: f64::from(1e-8f32),
                weight_decay: f64::from(0.1f32),
                correction1,
                correction2,
                clip,
            };
            reference::adamw(&mut p, &g, &mut m, &mut v, &op);
            assert_close("param", &outputs[0], &p, 1e-6);
            assert_close("moment1", &outputs[1], &m, 1e-6);
            assert_close("moment2", &outputs[2], &v, 1e-6);
            assert_close("norm", &outputs[3], &[1.0 + g.iter().map(|g| g * g).sum::<f64>()], 1e-6);
        }
    }

    #[test]
    fn a_norm_that_is_not_finite_stops_the_update() {
        let mut numbers = control(1.0);
        clip_factor(f32::INFINITY, f32::INFINITY, &mut numbers);
        let (mut param, mut moment1, mut moment2) = ([1.0], [2.0], [3.0]);
        let update = Update { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
        adamw(
            Simd::all()[0],
            (&RowsMut::dense(&mut param, 1, 1), &[f32::NAN]),
            (&RowsMut::dense(&mut moment1, 1, 1), &RowsMut::dense(&mut moment2, 1, 1)),
            &numbers,
            update,
        );
        assert_eq!((param, moment1, moment2), ([1.0], [2.0], [3.0]));
    }

    #[test]
    fn the_clip_factor_lets_small_norms_through_and_scales_large_ones() {
        let mut numbers = control(7.0);
        clip_factor(0.25, 1.0, &mut numbers);
        assert_eq!(numbers[3..], [0.5, 1.0]);
        clip_factor(16.0, 1.0, &mut numbers);
        assert_eq!(numbers[3..], [4.0, 1.0 / (4.0 + 1e-6)]);
    }
}
