//! Rotary positions, "rotate half" (Su et al., arXiv:2104.09864).

use super::lines::{load, store};
use super::math::sin_cos;
use super::matrix::RowsMut;
use super::simd::{Kernel, LANES, Lanes, Simd};
use super::work::parallel;
use std::f64::consts::TAU;

/// Rows that one task takes.
const ROWS: usize = 16;

/// Rotates each head of `head_dim` columns of x `[tokens, heads·head_dim]` in place: with its halves x1 and x2 and the angle
/// `a = position·inv_freq[j]`, `(x1 cos a − x2 sin a, x2 cos a + x1 sin a)`; the other way where `inverse`.
/// positions `[tokens]`, inv_freq `[head_dim / 2]`.
pub fn rope(simd: Simd, x: &RowsMut<'_>, head_dim: usize, positions: &[u32], inv_freq: &[f32], inverse: bool) {
    parallel(x.rows().div_ceil(ROWS), x.rows() * (x.cols() + 8 * head_dim) / 8, |block| {
        let rows = block * ROWS..x.rows().min((block + 1) * ROWS);
        simd.run(Rotate { x, head_dim, positions, inv_freq, inverse, rows });
    });
}

struct Rotate<'a> {
    x: &'a RowsMut<'a>,
    head_dim: usize,
    positions: &'a [u32],
    inv_freq: &'a [f32],
    inverse: bool,
    rows: std::ops::Range<usize>,
}

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let half = self.head_dim / 2;
        for t in self.rows {
            let position = f64::from(self.positions[t]);
            // SAFETY: the row belongs to this task.
            let row = unsafe { self.x.shared_row(t) };
            for j in (0..half).step_by(LANES) {
                let lanes = LANES.min(half - j);
                // A position times a frequency leaves an f32 no digits at long contexts, so whole turns go in f64.
                let mut angles = [0.0; LANES];
                for (angle, frequency) in angles.iter_mut().zip(&self.inv_freq[j..j + lanes]) {
                    let exact = position * f64::from(*frequency);
                    *angle = (exact - (exact / TAU).round() * TAU) as f32;
                }
                let (sin, cos) = sin_cos(L::from_array(angles));
                let sin = if self.inverse { -sin } else { sin };
                for head in row.chunks_exact_mut(self.head_dim) {
                    let (first, second) = head.split_at_mut(half);
                    let (first, second) = (&mut first[j..j + lanes], &mut second[j..j + lanes]);
                    let (a, b) = (load::<L>(first, 0), load::<L>(second, 0));
                    store(b.neg_mul_add(sin, a * cos), first, 0);
                    store(a.mul_add(sin, b * cos), second, 0);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Grid, assert_close, everywhere};
    use super::*;
    use proptest::prelude::*;
    use rand::RngExt;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn heads_turn_by_their_position_and_back(
            seed: u64,
            tokens in 0usize..40,
            heads in 1usize..4,
            half in 1usize..40,
            longest in prop_oneof![Just(30u32), Just(1_000_000)],
        ) {
            let rng = &mut crate::random::stream(seed, "rope");
            let x = Grid::random(rng, tokens, heads * 2 * half, 1.0);
            let positions: Vec<u32> = (0..tokens).map(|_| rng.random_range(0..=longest)).collect();
            let inv_freq: Vec<f32> =
                h1_reference::inv_freq(2 * half, 1e4).into_iter().map(|frequency| frequency as f32).collect();
            let outputs = everywhere(|simd| {
                let mut turned = x.clone();
                rope(simd, &turned.view_mut(), 2 * half, &positions, &inv_freq, false);
                let mut back = turned.clone();
                rope(simd, &back.view_mut(), 2 * half, &positions, &inv_freq, true);
                vec![turned.values(), back.values()]
            });
            let inv_freq: Vec<f64> = inv_freq.into_iter().map(f64::from).collect();
            let expected = h1_reference::rope(x.f64().view(), 2 * half, &positions, &inv_freq);
            assert_close("turned", &outputs[0], &expected, 3e-7);
            assert_close("back", &outputs[1], &x.f64(), 5e-7);
        }
    }
}
