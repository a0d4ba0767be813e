//! The gradients of the selective scan; see `scan.rs` for the formula.
//!
//! The gradient h of the state runs backwards. At token t, with `dy = dout·silu(z)` and `e = exp(dt·A)`, it first gains
//! `dy_t·C_t`; then `dA += h·dt·e·s_{t−1}`, `ddt = Σ_m h (A·e·s_{t−1} + u·B)`, `du = dt Σ_m h·B + D·dy`, `dB_t += h·dt·u`,
//! `dC_t += dy·s_t`; and it goes on to t − 1 as `h·e`.
//!
//! States are computed again chunk by chunk from those that forward saved. A task takes all channels of whole groups of B and
//! of C, so that dB and dC are summed by one task in one order: lanes by a tree, then blocks, then chunks from the last to the
//! first.

use super::lines::{load, put, store};
use super::math::{exp, sigmoid};
use super::matrix::{Rows, RowsMut};
use super::scan::{Block, SCAN_CHUNK, ScanInputs, from_state, rows, rows_mut, to_state};
use super::scratch::with_scratch;
use super::segment::Segment;
use super::simd::{Kernel, LANES, Lanes, Simd};
use super::work::parallel;
use std::ops::Range;

/// Where the gradients go. What adds, adds to what is there; the rest replaces it.
#[derive(Clone, Copy)]
pub struct ScanGradients<'a> {
    /// `[tokens, channels]`.
    pub du: &'a RowsMut<'a>,
    /// `[tokens, channels]`.
    pub ddelta: &'a RowsMut<'a>,
    /// `[channels, d_state]`.
    pub da: &'a RowsMut<'a>,
    /// `[tokens, groups·d_state]`.
    pub db: &'a RowsMut<'a>,
    /// `[tokens, groups·d_state]`.
    pub dc: &'a RowsMut<'a>,
    /// `[tokens, channels]`; written where there is a z.
    pub dz: Option<&'a RowsMut<'a>>,
    /// `[1, channels]`; adds.
    pub dd: Option<&'a RowsMut<'a>>,
    /// `[1, channels]`; adds.
    pub ddelta_bias: Option<&'a RowsMut<'a>>,
    /// `[slots, channels·d_state]`: the gradient of the state before each segment that has rows, 0 where past = 0.
    pub dstate_in: Option<&'a RowsMut<'a>>,
}

/// The gradients of [`selective_scan`](super::scan::selective_scan) from dout `[tokens, channels]`, what forward saved, and,
/// where states went on, the gradient of the state after each segment, `[slots, channels·d_state]`.
pub fn selective_scan_backward(
    simd: Simd,
    inputs: &ScanInputs<'_>,
    saved: Rows<'_>,
    dout: Rows<'_>,
    dstate_out: Option<Rows<'_>>,
    gradients: &ScanGradients<'_>,
) {
    let (channels, n) = (inputs.channels(), inputs.d_state());
    let [per_b, per_c] = inputs.per_group();
    let unit = lcm(per_b, per_c);
    let blocks = inputs.blocks(unit);
    let work = inputs.u.rows() * inputs.blocks(channels) * n * 40;
    parallel(channels / unit, work, |task| {
        with_scratch(Scratch::rows(n, blocks) * LANES, |scratch| {
            let blocks = task * blocks..(task + 1) * blocks;
            simd.run(Backward { x: inputs, saved, dout, dstate_out, to: gradients, blocks, scratch });
        });
    });
}

fn lcm(a: usize, b: usize) -> usize {
    (1..).map(|factor| factor * a).find(|multiple| multiple.is_multiple_of(b)).unwrap_or(a * b)
}

struct Backward<'a> {
    x: &'a ScanInputs<'a>,
    saved: Rows<'a>,
    dout: Rows<'a>,
    dstate_out: Option<Rows<'a>>,
    to: &'a ScanGradients<'a>,
    blocks: Range<usize>,
    scratch: &'a mut [f32],
}

/// The sums of one block that run over all time, rows of 16 lanes.
struct Sums<'a> {
    /// `[d_state]`: h.
    h: &'a mut [f32],
    /// `[d_state]`.
    da: &'a mut [f32],
    /// `[1]`.
    dd: &'a mut [f32],
    /// `[1]`.
    ddelta_bias: &'a mut [f32],
}

/// What is kept of one block in one chunk, rows of 16 lanes.
struct Scratch<'a> {
    /// `[d_state]`: A.
    a: &'a mut [f32],
    /// `[SCAN_CHUNK + 1, d_state]`: the state before the chunk and after each token.
    states: &'a mut [f32],
    /// `[SCAN_CHUNK, d_state]`: exp(dt·A).
    decays: &'a mut [f32],
    /// `[SCAN_CHUNK]`: delta + delta_bias.
    raw: &'a mut [f32],
    /// `[SCAN_CHUNK]`: dt.
    dt: &'a mut [f32],
    /// `[SCAN_CHUNK]`: dout·silu(z).
    dy: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    /// Rows of scratch for a task of `blocks` blocks.
    fn rows(n: usize, blocks: usize) -> usize {
        blocks * (2 * n + 2) + n + (2 * SCAN_CHUNK + 1) * n + 3 * SCAN_CHUNK
    }

    /// The sums of all blocks, then what is kept of one.
    fn split(scratch: &'a mut [f32], n: usize, blocks: usize) -> (&'a mut [f32], Self) {
        let (sums, mut rest) = scratch.split_at_mut(blocks * (2 * n + 2) * LANES);
        let mut take = |rows: usize| {
            let (taken, left) = std::mem::take(&mut rest).split_at_mut(rows * LANES);
            rest = left;
            taken
        };
        let scratch = Self {
            a: take(n),
            states: take((SCAN_CHUNK + 1) * n),
            decays: take(SCAN_CHUNK * n),
            raw: take(SCAN_CHUNK),
            dt: take(SCAN_CHUNK),
            dy: take(SCAN_CHUNK),
        };
        (sums, scratch)
    }
}

impl<'a> Sums<'a> {
    fn of(sums: &'a mut [f32], n: usize, block: usize) -> Self {
        let sums = &mut sums[block * (2 * n + 2) * LANES..][..(2 * n + 2) * LANES];
        let (h, rest) = sums.split_at_mut(n * LANES);
        let (da, rest) = rest.split_at_mut(n * LANES);
        let (dd, ddelta_bias) = rest.split_at_mut(LANES);
        Self { h, da, dd, ddelta_bias }
    }
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self) {
        let n = self.x.d_state();
        let scratch = std::mem::take(&mut self.scratch);
        let (sums, mut scratch) = Scratch::split(scratch, n, self.blocks.len());
        sums.fill(0.0);
        for (s, segment) in self.x.segments.iter().enumerate().filter(|(_, segment)| segment.len > 0) {
            for (i, index) in self.blocks.clone().enumerate() {
                self.start::<L>(segment, self.x.block(index), Sums::of(sums, n, i).h);
            }
            for chunk in (0..(segment.len as usize).div_ceil(SCAN_CHUNK)).rev() {
                let start = segment.start as usize + chunk * SCAN_CHUNK;
                let tokens = start..segment.rows().end.min(start + SCAN_CHUNK);
                for (i, index) in self.blocks.clone().enumerate() {
                    let block = self.x.block(index);
                    self.x.load_a::<L>(block, scratch.a);
                    let state = self.saved.part(self.x.saved_row(s, chunk), block.channel * n, block.lanes * n);
                    // The usual number of states as a constant, so that the inner loops have it.
                    if n == LANES {
                        self.again::<L>(LANES, block, tokens.clone(), state, &mut scratch);
                        self.back::<L>(LANES, block, tokens.clone(), &scratch, Sums::of(sums, n, i));
                    } else {
                        self.again::<L>(n, block, tokens.clone(), state, &mut scratch);
                        self.back::<L>(n, block, tokens.clone(), &scratch, Sums::of(sums, n, i));
                    }
                }
            }
            for (i, index) in self.blocks.clone().enumerate() {
                self.finish::<L>(segment, self.x.block(index), Sums::of(sums, n, i).h);
            }
        }
        for (i, index) in self.blocks.clone().enumerate() {
            self.write_sums::<L>(self.x.block(index), &Sums::of(sums, n, i));
        }
    }
}

impl Backward<'_> {
    /// h after the last token of a segment.
    #[inline(always)]
    fn start<L: Lanes>(&self, segment: &Segment, block: Block, h: &mut [f32]) {
        let n = self.x.d_state();
        match self.dstate_out {
            Some(dstate) => {
                from_state::<L>(dstate.part(segment.slot as usize, block.channel * n, block.lanes * n), n, h);
            }
            None => h.fill(0.0),
        }
    }

    /// h before the first token of a segment, where there was a state.
    #[inline(always)]
    fn finish<L: Lanes>(&self, segment: &Segment, block: Block, h: &[f32]) {
        let n = self.x.d_state();
        if let Some(to) = self.to.dstate_in {
            // SAFETY: the channels of a block belong to this task.
            let to = unsafe { to.part(segment.slot as usize, block.channel * n, block.lanes * n) };
            if segment.past > 0 { to_state::<L>(h, n, to) } else { to.fill(0.0) }
        }
    }

    /// Forward once more over a chunk: states, decays, steps and dy; and dz on the way.
    #[inline(always)]
    fn again<L: Lanes>(&self, n: usize, block: Block, tokens: Range<usize>, saved: &[f32], keep: &mut Scratch<'_>) {
        let x = self.x;
        for (state, saved) in rows_mut(keep.states).zip(saved.chunks_exact(block.lanes)) {
            load::<L>(saved, 0).store(state);
        }
        let skip = x.skip::<L>(block);
        for (i, t) in tokens.enumerate() {
            let raw = x.raw_step::<L>(t, block);
            let dt = x.step(raw);
            let u = load::<L>(x.u.part(t, block.channel, block.lanes), 0);
            let input = dt * u;
            let (b, c) = (x.b.part(t, block.b, n), x.c.part(t, block.c, n));
            let (before, after) = keep.states[i * n * LANES..][..2 * n * LANES].split_at_mut(n * LANES);
            let decays = &mut keep.decays[i * n * LANES..][..n * LANES];
            let mut y = L::zero();
            for (((before, after), (decay, a)), (&b, &c)) in
                rows(before).zip(rows_mut(after)).zip(rows_mut(decays).zip(rows(keep.a))).zip(b.iter().zip(c))
            {
                let e = exp(dt * L::load(a));
                e.store(decay);
                let s = e.mul_add(L::load(before), input * L::splat(b));
                s.store(after);
                y = s.mul_add(L::splat(c), y);
            }
            let mut dy = load::<L>(self.dout.part(t, block.channel, block.lanes), 0);
            if let Some(z) = x.z {
                let z = load::<L>(z.part(t, block.channel, block.lanes), 0);
                let s = sigmoid(z);
                let gate = z * s;
                if let Some(dz) = self.to.dz {
                    // silu' = s + silu (1 − s).
                    let slope = gate.mul_add(L::splat(1.0) - s, s);
                    // SAFETY: the channels of a block belong to this task.
                    let dz = unsafe { dz.part(t, block.channel, block.lanes) };
                    store(dy * skip.mul_add(u, y) * slope, dz, 0);
                }
                dy = dy * gate;
            }
            raw.store(&mut keep.raw[i * LANES..]);
            dt.store(&mut keep.dt[i * LANES..]);
            dy.store(&mut keep.dy[i * LANES..]);
        }
    }

    /// Backward over a chunk, from its last token to its first.
    #[inline(always)]
    fn back<L: Lanes>(&self, n: usize, block: Block, tokens: Range<usize>, kept: &Scratch<'_>, sums: Sums<'_>) {
        let x = self.x;
        let [per_b, per_c] = x.per_group();
        // The first block of a group replaces, the others add.
        let (add_b, add_c) = (!block.channel.is_multiple_of(per_b), !block.channel.is_multiple_of(per_c));
        let skip = x.skip::<L>(block);
        let (mut dd, mut ddelta_bias) = (L::load(sums.dd), L::load(sums.ddelta_bias));
        // The lanes of dB and dC for up to 16 states; what is left of others is not used.
        let (mut db_lanes, mut dc_lanes) = ([L::zero(); LANES], [L::zero(); LANES]);
        for (i, t) in tokens.enumerate().rev() {
            let (raw, dt) = (L::load(&kept.raw[i * LANES..]), L::load(&kept.dt[i * LANES..]));
            let dy = L::load(&kept.dy[i * LANES..]);
            let u = load::<L>(x.u.part(t, block.channel, block.lanes), 0);
            let input = dt * u;
            let (b, c) = (x.b.part(t, block.b, n), x.c.part(t, block.c, n));
            // SAFETY: whole groups belong to this task.
            let (db, dc) = unsafe { (self.to.db.part(t, block.b, n), self.to.dc.part(t, block.c, n)) };
            let (before, after) = kept.states[i * n * LANES..][..2 * n * LANES].split_at(n * LANES);
            let decays = &kept.decays[i * n * LANES..][..n * LANES];
            let (mut by_input, mut by_decay) = (L::zero(), L::zero());
            for m in (0..n).step_by(LANES) {
                let range = m * LANES..n.min(m + LANES) * LANES;
                let of_states = rows(&before[range.clone()]).zip(rows(&after[range.clone()]));
                let of_decays = rows(&decays[range.clone()]).zip(rows(&kept.a[range.clone()]));
                let of_sums = rows_mut(&mut sums.h[range.clone()]).zip(rows_mut(&mut sums.da[range]));
                let of_groups = b[m..].iter().zip(&c[m..]).zip(db_lanes.iter_mut().zip(&mut dc_lanes));
                for ((((before, after), (e, a)), (h, da)), ((&b, &c), (db, dc))) in
                    of_states.zip(of_decays).zip(of_sums).zip(of_groups)
                {
                    let gained = dy.mul_add(L::splat(c), L::load(h));
                    *dc = dy * L::load(after);
                    *db = gained * input;
                    by_input = gained.mul_add(L::splat(b), by_input);
                    let gone_on = gained * L::load(e);
                    gone_on.store(h);
                    let decayed = gone_on * L::load(before);
                    by_decay = decayed.mul_add(L::load(a), by_decay);
                    decayed.mul_add(dt, L::load(da)).store(da);
                }
                let count = LANES.min(n - m);
                put(L::sum_each(db_lanes), &mut db[m..m + count], 0, add_b);
                put(L::sum_each(dc_lanes), &mut dc[m..m + count], 0, add_c);
            }
            let ddt = u.mul_add(by_input, by_decay);
            let ddelta = if x.softplus { ddt * sigmoid(raw) } else { ddt };
            dd = dy.mul_add(u, dd);
            ddelta_bias = ddelta_bias + ddelta;
            // SAFETY: the channels of a block belong to this task.
            let (du, ddelta_to) = unsafe {
                (self.to.du.part(t, block.channel, block.lanes), self.to.ddelta.part(t, block.channel, block.lanes))
            };
            store(dt.mul_add(by_input, skip * dy), du, 0);
            store(ddelta, ddelta_to, 0);
        }
        dd.store(sums.dd);
        ddelta_bias.store(sums.ddelta_bias);
    }

    /// The gradients of the block's parameters.
    #[inline(always)]
    fn write_sums<L: Lanes>(&self, block: Block, sums: &Sums<'_>) {
        let n = self.x.d_state();
        for (lane, channel) in (block.channel..block.channel + block.lanes).enumerate() {
            // SAFETY: the channels of a block belong to this task.
            let da = unsafe { self.to.da.part(channel, 0, n) };
            for (da, sum) in da.iter_mut().zip(rows(sums.da)) {
                *da = sum[lane];
            }
        }
        for (to, sum) in [(self.to.dd, &*sums.dd), (self.to.ddelta_bias, &*sums.ddelta_bias)] {
            if let Some(to) = to {
                // SAFETY: the channels of a block belong to this task.
                put(L::load(sum), unsafe { to.part(0, block.channel, block.lanes) }, 0, true);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::scan::selective_scan;
    use super::super::scan::tests::{Case, sizes};
    use super::super::testing::{Grid, assert_close, everywhere, expected_states, f64s, random, written_states};
    use super::*;
    use proptest::prelude::*;

    fn lengths() -> impl Strategy<Value = Vec<(usize, usize)>> {
        let len = prop_oneof![Just(0usize), Just(1), 2usize..20, Just(SCAN_CHUNK), Just(SCAN_CHUNK + 1)];
        prop::collection::vec((len, 0usize..2), 0..4)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn every_gradient_follows_the_formula(
            seed: u64, sizes in sizes(), d_state in 1usize..20, lengths in lengths(), switches: u8, state_goes_on: bool,
        ) {
            let case = Case::new(seed, sizes, d_state, &lengths, switches);
            let rng = &mut crate::random::stream(seed, "scan backward");
            let (tokens, channels) = case.u.f64().dim();
            let (b_cols, c_cols) = (case.b.view().cols(), case.c.view().cols());
            let dout = Grid::random(rng, tokens, channels, 1.0);
            let dstate_out = state_goes_on.then(|| Grid::random(rng, lengths.len(), channels * d_state, 1.0));
            let before = random(rng, channels, 1.0);
            let outputs = everywhere(|simd| {
                let inputs = case.inputs();
                let mut saved = Grid::poisoned(case.saved_rows(), channels * d_state);
                let mut out = Grid::poisoned(tokens, channels);
                selective_scan(simd, &inputs, None, Some(&saved.view_mut()), &out.view_mut());
                let [mut du, mut ddelta, mut dz] = [(); 3].map(|()| Grid::poisoned(tokens, channels));
                let (mut db, mut dc) = (Grid::poisoned(tokens, b_cols), Grid::poisoned(tokens, c_cols));
                let mut da = Grid::poisoned(channels, d_state);
                let mut dstate_in = Grid::poisoned(lengths.len(), channels * d_state);
                let (mut dd, mut dbias) = (before.clone(), before.clone());
                let dz_to = dz.view_mut();
                let (dd_to, dbias_to) = (RowsMut::dense(&mut dd, 1, channels), RowsMut::dense(&mut dbias, 1, channels));
                let gradients = ScanGradients {
                    du: &du.view_mut(),
                    ddelta: &ddelta.view_mut(),
                    da: &da.view_mut(),
                    db: &db.view_mut(),
                    dc: &dc.view_mut(),
                    dz: case.z.is_some().then_some(&dz_to),
                    dd: case.d.is_some().then_some(&dd_to),
                    ddelta_bias: case.delta_bias.is_some().then_some(&dbias_to),
                    dstate_in: Some(&dstate_in.view_mut()),
                };
                let dstate_out = dstate_out.as_ref().map(Grid::view);
                selective_scan_backward(simd, &inputs, saved.view(), dout.view(), dstate_out, &gradients);
                let dstate_in = written_states(&case.segments, &dstate_in.values(), channels * d_state);
                let [du, ddelta, da, db, dc, dz] = [du, ddelta, da, db, dc, dz].map(|grid| grid.values());
                vec![du, ddelta, da, db, dc, dz, dd, dbias, dstate_in]
            });
            let dstate_out = dstate_out.map(|states| {
                let by_slot = states.f64();
                ndarray::Array3::from_shape_fn((lengths.len(), channels, d_state), |(s, c, m)| {
                    by_slot[[case.segments[s].slot as usize, c * d_state + m]]
                })
            });
            let expected = case.reference(|inputs, segments| {
                let dstate_out = dstate_out.as_ref().map(|states| states.view());
                h1_reference::selective_scan_backward(inputs, segments, dout.f64().view(), dstate_out)
            });
            assert_close("du", &outputs[0], &expected.du, 2e-6);
            assert_close("ddelta", &outputs[1], &expected.ddelta, 2e-6);
            assert_close("da", &outputs[2], &expected.da, 2e-6);
            assert_close("db", &outputs[3], &expected.db, 2e-6);
            assert_close("dc", &outputs[4], &expected.dc, 2e-6);
            if let Some(dz) = &expected.dz {
                assert_close("dz", &outputs[5], dz, 2e-6);
            }
            let added = |gradient| f64s(&before) + gradient;
            if let Some(dd) = expected.dd {
                assert_close("dd", &outputs[6], &added(dd), 2e-6);
            }
            if let Some(dbias) = expected.ddelta_bias {
                assert_close("ddelta_bias", &outputs[7], &added(dbias), 2e-6);
            }
            let mut dstate_in = expected.dstate_in;
            for (mut state, segment) in dstate_in.outer_iter_mut().zip(&case.segments) {
                if segment.past == 0 {
                    state.fill(0.0);
                }
            }
            assert_close("dstate_in", &outputs[8], &expected_states(&case.segments, &dstate_in), 2e-6);
        }
    }
}
