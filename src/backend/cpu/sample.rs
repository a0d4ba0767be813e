//! Choosing the next token.

use super::lines::load;
use super::math::exp;
use super::matrix::{Rows, RowsMut};
use super::simd::{Kernel, LANES, Lanes, Simd};
use super::work::parallel;

/// Logits whose probabilities are summed before the sum goes to the cumulative one.
const BLOCK: usize = 16 * LANES;

/// The index of the largest logit of each row, the lowest of equals: logits `[rows, vocabulary]` → out `[1, rows]`.
/// NaN never wins; a row of nothing else gives 0.
pub fn argmax(simd: Simd, logits: Rows<'_>, out: &RowsMut<'_, u32>) {
    parallel(logits.rows(), logits.rows() * logits.cols() / 4, |row| {
        let token = simd.run(Choose { logits: logits.row(row), temperature: 0.0, uniform: 0.0 });
        // SAFETY: the cell belongs to this task.
        unsafe { out.part(0, row, 1) }.fill(token);
    });
}

/// One token a row from `softmax(logits / temperature)`: the first index, in order, whose cumulative probability exceeds the
/// row's uniform number in [0, 1). Temperature 0 is [`argmax`]. logits `[rows, vocabulary]`, temperatures and uniforms
/// `[rows]` → out `[1, rows]`.
pub fn sample(simd: Simd, logits: Rows<'_>, temperatures: &[f32], uniforms: &[f32], out: &RowsMut<'_, u32>) {
    parallel(logits.rows(), logits.rows() * logits.cols(), |row| {
        let (temperature, uniform) = (temperatures[row], uniforms[row]);
        let token = simd.run(Choose { logits: logits.row(row), temperature, uniform });
        // SAFETY: the cell belongs to this task.
        unsafe { out.part(0, row, 1) }.fill(token);
    });
}

struct Choose<'a> {
    logits: &'a [f32],
    temperature: f32,
    uniform: f32,
}

impl Kernel for Choose<'_> {
    type Output = u32;

    #[inline(always)]
    fn run<L: Lanes>(self) -> u32 {
        let max = max::<L>(self.logits);
        if self.temperature == 0.0 || max == f32::NEG_INFINITY {
            // With nothing above -∞ there is nothing to compare.
            let first = self.logits.iter().position(|&logit| logit == max && max > f32::NEG_INFINITY);
            return first.unwrap_or(0) as u32;
        }
        let mut total = 0.0;
        for block in self.logits.chunks(BLOCK) {
            total += self.mass::<L>(block, max);
        }
        let target = f64::from(self.uniform) * total;
        // `before` is the mass of the blocks before, `last` the last index with any mass, for rounding at the end.
        let (mut before, mut last) = (0.0, 0);
        for (i, block) in self.logits.chunks(BLOCK).enumerate() {
            let mass = self.mass::<L>(block, max);
            if before + mass > target || i * BLOCK + block.len() == self.logits.len() {
                let mut cumulative = before;
                for (j, part) in block.chunks(LANES).enumerate() {
                    for (k, p) in self.weights::<L>(part, max).to_array().into_iter().take(part.len()).enumerate() {
                        cumulative += f64::from(p);
                        if p > 0.0 {
                            last = i * BLOCK + j * LANES + k;
                        }
                        if cumulative > target {
                            return last as u32;
                        }
                    }
                }
            } else if let Some(j) = block.iter().rposition(|&logit| logit > f32::NEG_INFINITY).filter(|_| mass > 0.0) {
                last = i * BLOCK + j;
            }
            before += mass;
        }
        last as u32
    }
}

impl Choose<'_> {
    /// `exp((logit − max) / temperature)` of up to 16 logits, 0 for NaN and for the lanes that are not there.
    #[inline(always)]
    fn weights<L: Lanes>(&self, part: &[f32], max: f32) -> L {
        let below = load::<L>(part, 0) - L::splat(max);
        let weight = exp(below / L::splat(self.temperature));
        let weight = L::select(below.eq(below), weight, L::zero());
        let mut there = [0.0; LANES];
        there[..part.len()].fill(1.0);
        L::select(L::zero().lt(L::from_array(there)), weight, L::zero())
    }

    #[inline(always)]
    fn mass<L: Lanes>(&self, block: &[f32], max: f32) -> f64 {
        let mut sum = L::zero();
        for part in block.chunks(LANES) {
            sum = sum + self.weights::<L>(part, max);
        }
        f64::from(sum.sum())
    }
}

/// The largest value that is not NaN, -∞ without one.
#[inline(always)]
fn max<L: Lanes>(x: &[f32]) -> f32 {
    let low = L::splat(f32::NEG_INFINITY);
    let (mut a, mut b) = (low, low);
    let pairs = x.chunks_exact(2 * LANES);
    let rest = pairs.remainder();
    for pair in pairs {
        a = load::<L>(pair, 0).max(a);
        b = load::<L>(pair, LANES).max(b);
    }
    rest.iter().fold(a.max(b).max_lane(), |max, &value| if value > max { value } else { max })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Grid, everywhere};
    use super::*;
    use proptest::prelude::*;
    use rand::RngExt;

    fn choose(logits: &Grid, temperatures: &[f32], uniforms: &[f32]) -> Vec<Vec<u32>> {
        let rows = temperatures.len();
        let outputs = everywhere(|simd| {
            let (mut greedy, mut drawn) = (vec![u32::MAX; rows], vec![u32::MAX; rows]);
            argmax(simd, logits.view(), &RowsMut::dense(&mut greedy, 1, rows));
            sample(simd, logits.view(), temperatures, uniforms, &RowsMut::dense(&mut drawn, 1, rows));
            [greedy, drawn].map(|tokens| tokens.into_iter().map(|token| token as f32).collect()).into()
        });
        outputs.into_iter().map(|tokens| tokens.into_iter().map(|token| token as u32).collect()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn tokens_are_those_of_the_inverse_cumulative_distribution(
            seed: u64, rows in 0usize..5, vocabulary in 1usize..700, scale in prop_oneof![Just(0.01f32), Just(5.0)],
            temperature in prop_oneof![Just(0.0f32), 0.2f32..2.0],
        ) {
            let rng = &mut crate::random::stream(seed, "sample");
            let mut logits = Grid::random(rng, rows, vocabulary, scale);
            for value in &mut logits.data {
                // Equal ones, so that the lowest index has to win.
                *value = if *value < 100.0 { (*value * 8.0 / scale).round() * scale / 8.0 } else { *value };
            }
            let uniforms: Vec<f32> = (0..rows).map(|_| rng.random_range(0.0..1.0)).collect();
            let outputs = choose(&logits, &vec![temperature; rows], &uniforms);
            let exact: Vec<f64> = uniforms.iter().map(|&uniform| f64::from(uniform)).collect();
            prop_assert_eq!(&outputs[0], &h1_reference::argmax(logits.f64().view()));
            // At a border between two tokens rounding may choose either.
            let expected = |shift: f64| {
                let uniforms: Vec<f64> = exact.iter().map(|uniform| (uniform + shift).clamp(0.0, 1.0)).collect();
                h1_reference::sample(logits.f64().view(), &vec![f64::from(temperature); rows], &uniforms)
            };
            let (low, high) = (expected(-1e-6), expected(1e-6));
            for row in 0..rows {
                prop_assert!((low[row]..=high[row]).contains(&outputs[1][row]));
            }
        }
    }

    #[test]
    fn nan_and_minus_infinity_are_never_chosen() {
        let (nan, none) = (f32::NAN, f32::NEG_INFINITY);
        let mut values = [nan, none, 1.0, nan, 3.0, none, nan, none, none, none, none, none].into_iter();
        let logits = Grid::from_fn(3, 4, || values.next().unwrap());
        for uniform in [0.0, 0.3, 0.999_999_94] {
            let outputs = choose(&logits, &[1.0; 3], &[uniform; 3]);
            assert_eq!(outputs, [[2, 0, 0], [2, 0, 0]]);
        }
    }
}
