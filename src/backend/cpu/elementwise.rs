//! Value by value: the gated activation, A = −exp(A_log), copies and casts, fill, scale.

use super::gradient::Gradient;
use super::lines::{load, put, store};
use super::math::{exp, sigmoid, silu};
use super::matrix::{Rows, RowsMut};
use super::simd::{Element, Kernel, LANES, Lanes, Simd};
use super::work::parallel;
use half::{bf16, f16};
use std::ops::Range;

/// Values that one task takes, about.
const VALUES: usize = 8 * 1024;

/// Runs `task` over blocks of rows, each value costing `cost` lane-wise operations.
fn over_rows(rows: usize, cols: usize, cost: usize, task: impl Fn(Range<usize>) + Sync + Send) {
    let each = (VALUES / cols.max(1)).max(1);
    parallel(rows.div_ceil(each), rows * cols * cost / LANES, |block| task(block * each..rows.min((block + 1) * each)));
}

/// `out = silu(gate) ⊙ up`, `silu(a) = a·sigmoid(a)` (Shazeer, arXiv:2002.05202); all `[tokens, width]`.
pub fn swiglu(simd: Simd, gate: Rows<'_>, up: Rows<'_>, out: &RowsMut<'_>) {
    over_rows(gate.rows(), gate.cols(), 32, |rows| simd.run(Swiglu { gate, up, out, rows }));
}

struct Swiglu<'a> {
    gate: Rows<'a>,
    up: Rows<'a>,
    out: &'a RowsMut<'a>,
    rows: Range<usize>,
}

impl Kernel for Swiglu<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        for t in self.rows {
            // SAFETY: the row belongs to this task.
            let (gate, up, out) = (self.gate.row(t), self.up.row(t), unsafe { self.out.shared_row(t) });
            for j in (0..gate.len()).step_by(LANES) {
                store(silu(load::<L>(gate, j)) * load(up, j), out, j);
            }
        }
    }
}

/// `dgate = dout ⊙ up ⊙ silu'(gate)`, `dup = dout ⊙ silu(gate)`; all `[tokens, width]`, both replaced.
pub fn swiglu_backward(
    simd: Simd,
    gate: Rows<'_>,
    up: Rows<'_>,
    dout: Rows<'_>,
    dgate: &RowsMut<'_>,
    dup: &RowsMut<'_>,
) {
    over_rows(gate.rows(), gate.cols(), 40, |rows| simd.run(SwigluBackward { gate, up, dout, dgate, dup, rows }));
}

struct SwigluBackward<'a> {
    gate: Rows<'a>,
    up: Rows<'a>,
    dout: Rows<'a>,
    dgate: &'a RowsMut<'a>,
    dup: &'a RowsMut<'a>,
    rows: Range<usize>,
}

impl Kernel for SwigluBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        for t in self.rows {
            let (gate, up, dout) = (self.gate.row(t), self.up.row(t), self.dout.row(t));
            // SAFETY: the rows belong to this task.
            let (dgate, dup) = unsafe { (self.dgate.shared_row(t), self.dup.shared_row(t)) };
            for j in (0..gate.len()).step_by(LANES) {
                let (g, d) = (load::<L>(gate, j), load::<L>(dout, j));
                let s = sigmoid(g);
                let gated = g * s;
                // silu' = s (1 + g (1 − s)) = s + silu (1 − s).
                let derivative = gated.mul_add(L::splat(1.0) - s, s);
                store(d * load(up, j) * derivative, dgate, j);
                store(d * gated, dup, j);
            }
        }
    }
}

/// `a = −exp(a_log)`; `[rows, cols]`.
pub fn neg_exp(simd: Simd, a_log: Rows<'_>, a: &RowsMut<'_>) {
    over_rows(a_log.rows(), a_log.cols(), 20, |rows| simd.run(NegExp { a_log, a, rows }));
}

struct NegExp<'a> {
    a_log: Rows<'a>,
    a: &'a RowsMut<'a>,
    rows: Range<usize>,
}

impl Kernel for NegExp<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        for r in self.rows {
            // SAFETY: the row belongs to this task.
            let (a_log, a) = (self.a_log.row(r), unsafe { self.a.shared_row(r) });
            for j in (0..a_log.len()).step_by(LANES) {
                store(-exp(load::<L>(a_log, j)), a, j);
            }
        }
    }
}

/// `da_log += da ⊙ a`; all `[rows, cols]`.
pub fn neg_exp_backward(simd: Simd, a: Rows<'_>, da: Rows<'_>, da_log: &RowsMut<'_>) {
    over_rows(a.rows(), a.cols(), 2, |rows| simd.run(NegExpBackward { a, da, da_log, rows }));
}

struct NegExpBackward<'a> {
    a: Rows<'a>,
    da: Rows<'a>,
    da_log: &'a RowsMut<'a>,
    rows: Range<usize>,
}

impl Kernel for NegExpBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        for r in self.rows {
            // SAFETY: the row belongs to this task.
            let (a, da, da_log) = (self.a.row(r), self.da.row(r), unsafe { self.da_log.shared_row(r) });
            for j in (0..a.len()).step_by(LANES) {
                put(load::<L>(a, j) * load(da, j), da_log, j, true);
            }
        }
    }
}

/// A storage type that values can also be rounded to, to nearest even.
pub trait Storage: Element {
    /// The nearest value.
    fn narrow(value: f32) -> Self;
}

impl Storage for f32 {
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }
}

impl Storage for bf16 {
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

impl Storage for f16 {
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        f16::from_f32(value)
    }
}

/// `out = src`, or added to what is there, from storage to storage; `[rows, cols]`. Also for values that are no floats where
/// both sides are the same type (see [`move_values`]).
pub fn copy<S: Storage, D: Storage>(src: Rows<'_, S>, out: &RowsMut<'_, D>, add: bool) {
    over_rows(src.rows(), src.cols(), 8, |rows| {
        for r in rows {
            // SAFETY: the row belongs to this task.
            let out = unsafe { out.shared_row(r) };
            for (out, src) in out.iter_mut().zip(src.row(r)) {
                *out = D::narrow(if add { out.widen() + src.widen() } else { src.widen() });
            }
        }
    });
}

/// `out = src` bit for bit, of any type.
pub fn move_values<T: Copy + Send + Sync>(src: Rows<'_, T>, out: &RowsMut<'_, T>) {
    over_rows(src.rows(), src.cols(), 1, |rows| {
        for r in rows {
            // SAFETY: the row belongs to this task.
            unsafe { out.shared_row(r) }.copy_from_slice(src.row(r));
        }
    });
}

/// `out = value`.
pub fn fill<T: Copy + Send + Sync>(value: T, out: &RowsMut<'_, T>) {
    over_rows(out.rows(), out.cols(), 1, |rows| {
        for r in rows {
            // SAFETY: the row belongs to this task.
            unsafe { out.shared_row(r) }.fill(value);
        }
    });
}

/// `x = factor·x`, in place.
pub fn scale<T: Storage>(factor: f32, x: &RowsMut<'_, T>) {
    over_rows(x.rows(), x.cols(), 2, |rows| {
        for r in rows {
            // SAFETY: the row belongs to this task.
            for value in unsafe { x.shared_row(r) } {
                *value = T::narrow(factor * value.widen());
            }
        }
    });
}

/// `to = x + y`, or added to what is there.
pub fn add(simd: Simd, x: Rows<'_>, y: Rows<'_>, to: Gradient<'_>) {
    over_rows(x.rows(), x.cols(), 2, |rows| simd.run(Add { x, y, to, rows }));
}

struct Add<'a> {
    x: Rows<'a>,
    y: Rows<'a>,
    to: Gradient<'a>,
    rows: Range<usize>,
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        for r in self.rows {
            // SAFETY: the row belongs to this task.
            let (x, y, to) = (self.x.row(r), self.y.row(r), unsafe { self.to.to.shared_row(r) });
            for j in (0..x.len()).step_by(LANES) {
                put(load::<L>(x, j) + load(y, j), to, j, self.to.add);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Grid, assert_close, everywhere};
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn gated_activation_follows_the_formula(seed: u64, tokens in 0usize..40, width in 1usize..70, wide: bool) {
            let rng = &mut crate::random::stream(seed, "swiglu");
            let scale = if wide { 60.0 } else { 3.0 };
            let [gate, up, dout] = [scale, 1.0, 1.0].map(|scale| Grid::random(rng, tokens, width, scale));
            let outputs = everywhere(|simd| {
                let [mut out, mut dgate, mut dup] = [(); 3].map(|()| Grid::poisoned(tokens, width));
                swiglu(simd, gate.view(), up.view(), &out.view_mut());
                swiglu_backward(simd, gate.view(), up.view(), dout.view(), &dgate.view_mut(), &dup.view_mut());
                vec![out.values(), dgate.values(), dup.values()]
            });
            let (gate, up, dout) = (gate.f64(), up.f64(), dout.f64());
            let (dgate, dup) = h1_reference::swiglu_backward(gate.view(), up.view(), dout.view());
            assert_close("out", &outputs[0], &h1_reference::swiglu(gate.view(), up.view()), 3e-7);
            assert_close("dgate", &outputs[1], &dgate, 5e-7);
            assert_close("dup", &outputs[2], &dup, 3e-7);
        }

        #[test]
        fn neg_exp_and_its_gradient_follow_the_formula(seed: u64, rows in 0usize..20, cols in 1usize..40) {
            let rng = &mut crate::random::stream(seed, "neg_exp");
            let [a_log, da, before] = [3.0, 1.0, 1.0].map(|scale| Grid::random(rng, rows, cols, scale));
            let outputs = everywhere(|simd| {
                let (mut a, mut da_log) = (Grid::poisoned(rows, cols), before.clone());
                neg_exp(simd, a_log.view(), &a.view_mut());
                neg_exp_backward(simd, a.view(), da.view(), &da_log.view_mut());
                vec![a.values(), da_log.values()]
            });
            let a = h1_reference::neg_exp(a_log.f64().view());
            assert_close("a", &outputs[0], &a, 3e-7);
            assert_close("da_log", &outputs[1], &(&a * &da.f64() + before.f64()), 3e-7);
        }

        #[test]
        fn sums_and_copies_are_exact(seed: u64, rows in 0usize..20, cols in 1usize..40) {
            let rng = &mut crate::random::stream(seed, "copy");
            let [x, y, z] = [1.0, 1.0, 1.0].map(|scale| Grid::random(rng, rows, cols, scale));
            let outputs = everywhere(|simd| {
                let (mut sum, mut more, mut copied) = (Grid::poisoned(rows, cols), z.clone(), y.clone());
                add(simd, x.view(), y.view(), Gradient::assign(&sum.view_mut()));
                add(simd, x.view(), y.view(), Gradient::add(&more.view_mut()));
                copy(x.view(), &copied.view_mut(), true);
                scale(-0.5, &copied.view_mut());
                let mut narrow = vec![bf16::NAN; rows * cols];
                copy(x.view(), &RowsMut::dense(&mut narrow, rows, cols), false);
                let mut filled = Grid::poisoned(rows, cols);
                fill(0.25, &filled.view_mut());
                let narrow = narrow.into_iter().map(bf16::to_f32).collect();
                vec![sum.values(), more.values(), copied.values(), narrow, filled.values()]
            });
            for (i, (x, y)) in x.values().into_iter().zip(y.values()).enumerate() {
                prop_assert_eq!(outputs[0][i], x + y);
                prop_assert_eq!(outputs[1][i], z.values()[i] + (x + y));
                prop_assert_eq!(outputs[2][i], -0.5 * (y + x));
                prop_assert_eq!(outputs[3][i], bf16::from_f32(x).to_f32());
                prop_assert_eq!(outputs[4][i], 0.25);
            }
        }
    }
}
