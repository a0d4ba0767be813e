//! RMSNorm (Zhang and Sennrich, arXiv:1910.07467): `out = weight ⊙ x·r` with `r = 1 / sqrt(mean(x²) + eps)` of each row.
//!
//! Backward, with `n = x·r`: `dx = r (weight ⊙ dout − n · mean(weight ⊙ dout ⊙ n))`, `dweight += Σ_t dout ⊙ n`.

use super::gradient::Gradient;
use super::lines::{Sum, load, put, store};
use super::matrix::{Rows, RowsMut};
use super::simd::{Kernel, LANES, Lanes, Simd};
use super::work::parallel;

/// Rows that one task takes.
const ROWS: usize = 16;
/// Columns of dweight that one task sums.
const COLUMNS: usize = 4 * LANES;
/// Rows that are summed before their sum is added to the others', so that errors grow with the square root of the rows.
const BLOCK: usize = 64;

/// x `[tokens, hidden]`, weight `[hidden]` → out `[tokens, hidden]`, and r in inv_rms `[1, tokens]`.
pub fn rms_norm(simd: Simd, x: Rows<'_>, weight: &[f32], eps: f32, out: &RowsMut<'_>, inv_rms: Option<&RowsMut<'_>>) {
    parallel(x.rows().div_ceil(ROWS), x.rows() * x.cols() / 8, |block| {
        let rows = block * ROWS..x.rows().min((block + 1) * ROWS);
        // SAFETY: the rows of a block belong to its task.
        let inv_rms = inv_rms.map(|inv_rms| unsafe { inv_rms.part(0, rows.start, rows.len()) });
        simd.run(Forward { x, weight, eps, rows, out, inv_rms });
    });
}

struct Forward<'a> {
    x: Rows<'a>,
    weight: &'a [f32],
    eps: f32,
    rows: std::ops::Range<usize>,
    out: &'a RowsMut<'a>,
    inv_rms: Option<&'a mut [f32]>,
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self) {
        for (i, t) in self.rows.clone().enumerate() {
            let x = self.x.row(t);
            let mut squares = Sum::<L>::new();
            for j in (0..x.len()).step_by(LANES) {
                let value = load(x, j);
                squares.mul_add(j, value, value);
            }
            let r = 1.0 / (squares.total() / x.len() as f32 + self.eps).sqrt();
            // SAFETY: the row belongs to this task.
            let out = unsafe { self.out.shared_row(t) };
            for j in (0..x.len()).step_by(LANES) {
                store(load::<L>(x, j) * L::splat(r) * load(self.weight, j), out, j);
            }
            if let Some(inv_rms) = &mut self.inv_rms {
                inv_rms[i] = r;
            }
        }
    }
}

/// The gradients from dout `[tokens, hidden]` and what forward saved: dx `[tokens, hidden]`, dweight `[1, hidden]` (adds).
pub fn rms_norm_backward(
    simd: Simd,
    x: Rows<'_>,
    weight: &[f32],
    inv_rms: &[f32],
    dout: Rows<'_>,
    dx: Gradient<'_>,
    dweight: Option<&RowsMut<'_>>,
) {
    let work = x.rows() * x.cols() / 4;
    parallel(x.rows().div_ceil(ROWS), work, |block| {
        let rows = block * ROWS..x.rows().min((block + 1) * ROWS);
        simd.run(BackwardInput { x, weight, inv_rms, dout, rows, dx });
    });
    if let Some(dweight) = dweight {
        parallel(x.cols().div_ceil(COLUMNS), work, |block| {
            let first = block * COLUMNS;
            let count = COLUMNS.min(x.cols() - first);
            // SAFETY: the columns of a block belong to its task.
            let dweight = unsafe { dweight.part(0, first, count) };
            simd.run(BackwardWeight { x, inv_rms, dout, first, dweight });
        });
    }
}

struct BackwardInput<'a> {
    x: Rows<'a>,
    weight: &'a [f32],
    inv_rms: &'a [f32],
    dout: Rows<'a>,
    rows: std::ops::Range<usize>,
    dx: Gradient<'a>,
}

impl Kernel for BackwardInput<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        for t in self.rows {
            let (x, dout, r) = (self.x.row(t), self.dout.row(t), self.inv_rms[t]);
            let mut products = Sum::<L>::new();
            for j in (0..x.len()).step_by(LANES) {
                products.mul_add(j, load::<L>(self.weight, j) * load(dout, j), load(x, j));
            }
            let mean = products.total() * r / x.len() as f32;
            // SAFETY: the row belongs to this task.
            let dx = unsafe { self.dx.to.shared_row(t) };
            for j in (0..x.len()).step_by(LANES) {
                let normed = load::<L>(x, j) * L::splat(r);
                let inner = normed.neg_mul_add(L::splat(mean), load::<L>(self.weight, j) * load(dout, j));
                put(inner * L::splat(r), dx, j, self.dx.add);
            }
        }
    }
}

struct BackwardWeight<'a> {
    x: Rows<'a>,
    inv_rms: &'a [f32],
    dout: Rows<'a>,
    first: usize,
    dweight: &'a mut [f32],
}

impl Kernel for BackwardWeight<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let count = self.dweight.len();
        let mut total = [L::zero(); COLUMNS / LANES];
        for block in (0..self.x.rows()).step_by(BLOCK) {
            let mut sum = [L::zero(); COLUMNS / LANES];
            for t in block..self.x.rows().min(block + BLOCK) {
                let (x, dout) = (self.x.part(t, self.first, count), self.dout.part(t, self.first, count));
                let r = L::splat(self.inv_rms[t]);
                for (j, sum) in (0..count).step_by(LANES).zip(&mut sum) {
                    *sum = load::<L>(dout, j).mul_add(load::<L>(x, j) * r, *sum);
                }
            }
            for (total, sum) in total.iter_mut().zip(sum) {
                *total = *total + sum;
            }
        }
        for (j, total) in (0..count).step_by(LANES).zip(total) {
            put(total, self.dweight, j, true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Grid, assert_close, everywhere, f64s, random};
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn norm_and_gradients_follow_the_formula(seed: u64, tokens in 0usize..70, hidden in 1usize..150, add: bool) {
            let rng = &mut crate::random::stream(seed, "norm");
            let (x, dout) = (Grid::random(rng, tokens, hidden, 2.0), Grid::random(rng, tokens, hidden, 1.0));
            let (weight, before) = (random(rng, hidden, 1.5), Grid::random(rng, tokens, hidden, 1.0));
            let dweight_before = random(rng, hidden, 1.0);
            let outputs = everywhere(|simd| {
                let (mut out, mut inv_rms) = (Grid::poisoned(tokens, hidden), vec![f32::NAN; tokens]);
                let saved = RowsMut::dense(&mut inv_rms, 1, tokens);
                rms_norm(simd, x.view(), &weight, 1e-5, &out.view_mut(), Some(&saved));
                let mut dx = if add { before.clone() } else { Grid::poisoned(tokens, hidden) };
                let mut dweight = dweight_before.clone();
                let to = &RowsMut::dense(&mut dweight, 1, hidden);
                let dx_to = Gradient { to: &dx.view_mut(), add };
                rms_norm_backward(simd, x.view(), &weight, &inv_rms, dout.view(), dx_to, Some(to));
                vec![out.values(), inv_rms, dx.values(), dweight]
            });
            let (x, weight) = (x.f64(), f64s(&weight));
            let (out, inv_rms) = h1_reference::rms_norm(x.view(), weight.view(), f64::from(1e-5f32));
            let (mut dx, dweight) =
                h1_reference::rms_norm_backward(x.view(), weight.view(), inv_rms.view(), dout.f64().view());
            if add {
                dx += &before.f64();
            }
            assert_close("out", &outputs[0], &out, 3e-7);
            assert_close("inv_rms", &outputs[1], &inv_rms, 3e-7);
            assert_close("dx", &outputs[2], &dx, 5e-7);
            assert_close("dweight", &outputs[3], &(dweight + f64s(&dweight_before)), 5e-7);
        }
    }
}
