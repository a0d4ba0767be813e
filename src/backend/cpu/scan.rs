//! The selective scan of Mamba-1 with the M1 mixer's groups (Gu and Dao, arXiv:2312.00752), forward.
//!
//! With `dt = softplus(delta + delta_bias)`, for channel c and state index m:
//! `s_t[c, m] = exp(dt·A[c, m])·s_{t−1}[c, m] + dt·u_t[c]·B_t[m]`, `y_t[c] = (Σ_m s_t[c, m]·C_t[m] + D[c]·u_t[c])·silu(z_t[c])`.
//!
//! Lanes are channels that share their groups of B and C, so that values of B and C are splats; the sum over m is one chain
//! in order. A task takes a few such blocks of one segment and goes through time in chunks, block after block.

use super::lines::{load, store};
use super::math::{exp, silu, softplus};
use super::matrix::{Rows, RowsMut};
use super::scratch::with_scratch;
use super::segment::Segment;
use super::simd::{Kernel, LANES, Lanes, Simd};
use super::work::parallel;
use std::ops::Range;

/// Tokens between two states that forward saves for backward, counted from the start of a segment.
pub const SCAN_CHUNK: usize = 64;

/// Blocks of lanes that one task takes: with fewer, a row's cache lines are used by too many tasks.
const TASK_BLOCKS: usize = 4;

/// What the scan reads, forward and backward. Channel c reads group `c / (channels / groups)` of B and of C; the numbers of
/// groups follow from the widths.
#[derive(Clone, Copy)]
pub struct ScanInputs<'a> {
    /// `[tokens, channels]`.
    pub u: Rows<'a>,
    /// `[tokens, channels]`.
    pub delta: Rows<'a>,
    /// `[channels, d_state]`.
    pub a: Rows<'a>,
    /// `[tokens, groups·d_state]`.
    pub b: Rows<'a>,
    /// `[tokens, groups·d_state]`.
    pub c: Rows<'a>,
    /// The skip D, `[channels]`.
    pub d: Option<&'a [f32]>,
    /// The gate before silu, `[tokens, channels]`.
    pub z: Option<Rows<'a>>,
    /// Added to delta, `[channels]`.
    pub delta_bias: Option<&'a [f32]>,
    /// Whether dt is the softplus of that sum, or the sum itself.
    pub softplus: bool,
    /// Who belongs to whom; a segment of no rows leaves its state alone.
    pub segments: &'a [Segment],
    /// `[slots, channels·d_state]`: the state before each segment, read where past > 0 and else 0.
    pub state_in: Option<Rows<'a>>,
}

/// Up to 16 neighbouring channels that share their groups.
#[derive(Clone, Copy)]
pub(super) struct Block {
    /// The first channel.
    pub channel: usize,
    /// How many channels.
    pub lanes: usize,
    /// The first column of its group in B.
    pub b: usize,
    /// The first column of its group in C.
    pub c: usize,
}

impl ScanInputs<'_> {
    /// Channels.
    pub(super) fn channels(&self) -> usize {
        self.a.rows()
    }

    /// States of a channel.
    pub(super) fn d_state(&self) -> usize {
        self.a.cols()
    }

    /// Channels of a group of B, and of C.
    pub(super) fn per_group(&self) -> [usize; 2] {
        [self.b, self.c].map(|matrix| self.channels() * self.d_state() / matrix.cols().max(1))
    }

    /// Neighbouring channels that share both groups.
    fn run(&self) -> usize {
        let [b, c] = self.per_group();
        gcd(b, c)
    }

    /// Number of blocks in `channels` channels, whole groups.
    pub(super) fn blocks(&self, channels: usize) -> usize {
        channels / self.run() * self.run().div_ceil(LANES)
    }

    pub(super) fn block(&self, index: usize) -> Block {
        let (run, [per_b, per_c]) = (self.run(), self.per_group());
        let a_run = run.div_ceil(LANES);
        let inside = index % a_run * LANES;
        let channel = index / a_run * run + inside;
        let d_state = self.d_state();
        Block { channel, lanes: LANES.min(run - inside), b: channel / per_b * d_state, c: channel / per_c * d_state }
    }

    /// The row of `saved` for chunk `chunk` of a segment: `tokens / SCAN_CHUNK + segments` rows hold them all, since the
    /// chunks before a segment's are at most `start / SCAN_CHUNK + segment`.
    pub(super) fn saved_row(&self, segment: usize, chunk: usize) -> usize {
        self.segments[segment].start as usize / SCAN_CHUNK + segment + chunk
    }

    /// A block's A as `[d_state][16]`, lanes that are not there 0.
    #[inline(always)]
    pub(super) fn load_a<L: Lanes>(&self, block: Block, to: &mut [f32]) {
        let n = self.d_state();
        for m in (0..n).step_by(LANES) {
            let count = LANES.min(n - m);
            let mut rows = [L::zero(); LANES];
            for (row, channel) in rows.iter_mut().zip(block.channel..block.channel + block.lanes) {
                *row = load(self.a.part(channel, m, count), 0);
            }
            store_rows(L::transpose(rows), &mut to[m * LANES..], count);
        }
    }

    /// The state of a block before a segment as `[d_state][16]`.
    #[inline(always)]
    pub(super) fn load_state<L: Lanes>(&self, segment: &Segment, block: Block, to: &mut [f32]) {
        match self.state_in {
            Some(state) if segment.past > 0 => {
                let (n, slot) = (self.d_state(), segment.slot as usize);
                from_state::<L>(state.part(slot, block.channel * n, block.lanes * n), n, to);
            }
            _ => to.fill(0.0),
        }
    }

    /// `delta + delta_bias` of a block.
    #[inline(always)]
    pub(super) fn raw_step<L: Lanes>(&self, t: usize, block: Block) -> L {
        let delta = load::<L>(self.delta.part(t, block.channel, block.lanes), 0);
        self.delta_bias.map_or(delta, |bias| delta + load(&bias[block.channel..][..block.lanes], 0))
    }

    /// dt of a block, from its raw step.
    #[inline(always)]
    pub(super) fn step<L: Lanes>(&self, raw: L) -> L {
        if self.softplus { softplus(raw) } else { raw }
    }

    /// D of a block.
    #[inline(always)]
    pub(super) fn skip<L: Lanes>(&self, block: Block) -> L {
        self.d.map_or(L::zero(), |d| load(&d[block.channel..][..block.lanes], 0))
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[inline(always)]
fn store_rows<L: Lanes>(rows: [L; LANES], to: &mut [f32], count: usize) {
    for (row, to) in rows.into_iter().zip(to.chunks_exact_mut(LANES)).take(count) {
        row.store(to);
    }
}

/// A state `[lanes][n]` as `[n][16]`, lanes that are not there 0.
#[inline(always)]
pub(super) fn from_state<L: Lanes>(state: &[f32], n: usize, to: &mut [f32]) {
    for m in (0..n).step_by(LANES) {
        let count = LANES.min(n - m);
        let mut rows = [L::zero(); LANES];
        for (row, state) in rows.iter_mut().zip(state.chunks_exact(n)) {
            *row = load(&state[m..m + count], 0);
        }
        store_rows(L::transpose(rows), &mut to[m * LANES..], count);
    }
}

/// The way back: `[n][16]` as a state `[lanes][n]`.
#[inline(always)]
pub(super) fn to_state<L: Lanes>(from: &[f32], n: usize, state: &mut [f32]) {
    for m in (0..n).step_by(LANES) {
        let count = LANES.min(n - m);
        let mut rows = [L::zero(); LANES];
        for (row, from) in rows.iter_mut().zip(from[m * LANES..].chunks_exact(LANES)).take(count) {
            *row = L::load(from);
        }
        for (row, state) in L::transpose(rows).into_iter().zip(state.chunks_exact_mut(n)) {
            store(row, &mut state[m..m + count], 0);
        }
    }
}

/// The scan: out `[tokens, channels]`; state_out `[slots, channels·d_state]`, which may lie where `state_in` does; and the
/// states at the starts of chunks in saved `[tokens / SCAN_CHUNK + segments, channels·d_state]`, in an order of its own.
pub fn selective_scan(
    simd: Simd,
    inputs: &ScanInputs<'_>,
    state_out: Option<&RowsMut<'_>>,
    saved: Option<&RowsMut<'_>>,
    out: &RowsMut<'_>,
) {
    let (n, blocks) = (inputs.d_state(), inputs.blocks(inputs.channels()));
    let tasks = blocks.div_ceil(TASK_BLOCKS);
    let work = inputs.u.rows() * blocks * n * 20;
    parallel(inputs.segments.len() * tasks, work, |task| {
        let (segment, first) = (task / tasks, task % tasks * TASK_BLOCKS);
        let blocks = first..blocks.min(first + TASK_BLOCKS);
        if inputs.segments[segment].len == 0 {
            return;
        }
        with_scratch((2 * n * blocks.len() + 3 * SCAN_CHUNK) * LANES, |scratch| {
            simd.run(Forward { x: inputs, segment, blocks, state_out, saved, out, scratch });
        });
    });
}

struct Forward<'a> {
    x: &'a ScanInputs<'a>,
    segment: usize,
    blocks: Range<usize>,
    state_out: Option<&'a RowsMut<'a>>,
    saved: Option<&'a RowsMut<'a>>,
    out: &'a RowsMut<'a>,
    scratch: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (x, n) = (self.x, self.x.d_state());
        let segment = &x.segments[self.segment];
        let (states, rest) = self.scratch.split_at_mut(self.blocks.len() * n * LANES);
        let (decays, rest) = rest.split_at_mut(states.len());
        let (steps, rest) = rest.split_at_mut(SCAN_CHUNK * LANES);
        let (inputs, outputs) = rest.split_at_mut(SCAN_CHUNK * LANES);
        let size = n * LANES;
        for (i, index) in self.blocks.clone().enumerate() {
            x.load_a::<L>(x.block(index), &mut decays[i * size..][..size]);
            x.load_state::<L>(segment, x.block(index), &mut states[i * size..][..size]);
        }
        for chunk in 0..(segment.len as usize).div_ceil(SCAN_CHUNK) {
            let start = segment.start as usize + chunk * SCAN_CHUNK;
            let tokens = start..segment.rows().end.min(start + SCAN_CHUNK);
            for (i, index) in self.blocks.clone().enumerate() {
                let block = x.block(index);
                let (state, a) = (&mut states[i * size..][..size], &decays[i * size..][..size]);
                if let Some(saved) = self.saved {
                    let (row, first) = (x.saved_row(self.segment, chunk), block.channel * n);
                    // SAFETY: the part of a block of a segment belongs to this task.
                    let saved = unsafe { saved.part(row, first, block.lanes * n) };
                    for (saved, state) in saved.chunks_exact_mut(block.lanes).zip(state.chunks_exact(LANES)) {
                        store(L::load(state), saved, 0);
                    }
                }
                for (t, (step, input)) in tokens.clone().zip(rows_mut(steps).zip(rows_mut(inputs))) {
                    let dt = x.step(x.raw_step::<L>(t, block));
                    dt.store(step);
                    (dt * load(x.u.part(t, block.channel, block.lanes), 0)).store(input);
                }
                for (t, ((step, input), output)) in
                    tokens.clone().zip(rows(steps).zip(rows(inputs)).zip(rows_mut(outputs)))
                {
                    let (b, c) = (x.b.part(t, block.b, n), x.c.part(t, block.c, n));
                    advance::<L>(state, a, L::load(step), L::load(input), b, c).store(output);
                }
                let skip = x.skip::<L>(block);
                for (t, output) in tokens.clone().zip(rows(outputs)) {
                    let y = skip.mul_add(load(x.u.part(t, block.channel, block.lanes), 0), L::load(output));
                    let y = match x.z {
                        Some(z) => y * silu(load::<L>(z.part(t, block.channel, block.lanes), 0)),
                        None => y,
                    };
                    // SAFETY: the channels of a block in the rows of a segment belong to this task.
                    store(y, unsafe { self.out.part(t, block.channel, block.lanes) }, 0);
                }
            }
        }
        if let Some(state_out) = self.state_out {
            for (i, index) in self.blocks.clone().enumerate() {
                let block = x.block(index);
                // SAFETY: the channels of a block in the slot of a segment belong to this task.
                let to = unsafe { state_out.part(segment.slot as usize, block.channel * n, block.lanes * n) };
                to_state::<L>(&states[i * size..][..size], n, to);
            }
        }
    }
}

/// Sixteen values a row.
#[inline(always)]
pub(super) fn rows(values: &[f32]) -> std::slice::ChunksExact<'_, f32> {
    values.chunks_exact(LANES)
}

/// Sixteen values a row.
#[inline(always)]
pub(super) fn rows_mut(values: &mut [f32]) -> std::slice::ChunksExactMut<'_, f32> {
    values.chunks_exact_mut(LANES)
}

/// One step of time for 16 channels: `s[m] ← exp(dt·a[m])·s[m] + input·b[m]`, and `Σ_m s[m]·c[m]` of the new s.
#[inline(always)]
fn advance<L: Lanes>(state: &mut [f32], a: &[f32], dt: L, input: L, b: &[f32], c: &[f32]) -> L {
    let mut y = L::zero();
    for ((state, a), (&b, &c)) in rows_mut(state).zip(rows(a)).zip(b.iter().zip(c)) {
        let decay = exp(dt * L::load(a));
        let s = decay.mul_add(L::load(state), input * L::splat(b));
        s.store(state);
        y = s.mul_add(L::splat(c), y);
    }
    y
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::testing::{
        Grid, assert_close, assert_same_bits, everywhere, expected_states, f64s, random, reference_segments, segments,
        states_by_segment, written_states,
    };
    use super::*;
    use proptest::prelude::*;

    /// Everything a scan reads, at random.
    pub struct Case {
        pub segments: Vec<Segment>,
        pub u: Grid,
        pub delta: Grid,
        pub a: Grid,
        pub b: Grid,
        pub c: Grid,
        pub d: Option<Vec<f32>>,
        pub z: Option<Grid>,
        pub delta_bias: Option<Vec<f32>>,
        pub softplus: bool,
        pub state_in: Option<Grid>,
    }

    /// Sizes: (channels of a shared run, runs in a group of B, in a group of C, groups).
    pub fn sizes() -> impl Strategy<Value = (usize, usize, usize, usize)> {
        (1usize..20, 1usize..4, 1usize..4, 1usize..3)
    }

    impl Case {
        pub fn new(
            seed: u64,
            (run, runs_b, runs_c, groups): (usize, usize, usize, usize),
            d_state: usize,
            lengths: &[(usize, usize)],
            switches: u8,
        ) -> Self {
            let rng = &mut crate::random::stream(seed, "scan");
            let channels = run * runs_b * runs_c * groups;
            let tokens = lengths.iter().map(|(len, _)| len).sum();
            let on = |bit: u8| switches >> bit & 1 == 1;
            // A is negative, and so is no step: nothing grows.
            let mut negative = Grid::random(rng, channels, d_state, 2.0);
            let mut delta = Grid::random(rng, tokens, channels, if on(3) { 2.0 } else { 0.1 });
            let mut delta_bias = random(rng, channels, 0.1);
            let inside = |grid: &mut Grid, f: fn(f32) -> f32| {
                grid.data.iter_mut().filter(|value| **value < 100.0).for_each(|value| *value = f(*value));
            };
            inside(&mut negative, |value| -value.abs());
            if !on(3) {
                inside(&mut delta, f32::abs);
                delta_bias.iter_mut().for_each(|value| *value = value.abs());
            }
            Self {
                segments: segments(lengths),
                u: Grid::random(rng, tokens, channels, 1.0),
                delta,
                a: negative,
                b: Grid::random(rng, tokens, runs_c * groups * d_state, 1.0),
                c: Grid::random(rng, tokens, runs_b * groups * d_state, 1.0),
                d: on(0).then(|| random(rng, channels, 1.0)),
                z: on(1).then(|| Grid::random(rng, tokens, channels, 3.0)),
                delta_bias: on(2).then_some(delta_bias),
                softplus: on(3),
                state_in: on(4).then(|| Grid::random(rng, lengths.len(), channels * d_state, 1.0)),
            }
        }

        pub fn inputs(&self) -> ScanInputs<'_> {
            ScanInputs {
                u: self.u.view(),
                delta: self.delta.view(),
                a: self.a.view(),
                b: self.b.view(),
                c: self.c.view(),
                d: self.d.as_deref(),
                z: self.z.as_ref().map(Grid::view),
                delta_bias: self.delta_bias.as_deref(),
                softplus: self.softplus,
                segments: &self.segments,
                state_in: self.state_in.as_ref().map(Grid::view),
            }
        }

        /// Rows of `saved`.
        pub fn saved_rows(&self) -> usize {
            self.inputs().u.rows() / SCAN_CHUNK + self.segments.len()
        }

        /// The inputs of the reference.
        pub fn reference<R>(&self, f: impl FnOnce(&h1_reference::ScanInputs<f64>, &[h1_reference::Segment]) -> R) -> R {
            let [u, delta, a, b, c] = [&self.u, &self.delta, &self.a, &self.b, &self.c].map(Grid::f64);
            let (d, delta_bias) = (self.d.as_deref().map(f64s), self.delta_bias.as_deref().map(f64s));
            let z = self.z.as_ref().map(Grid::f64);
            let shape = self.a.f64().dim();
            let state_in = self.state_in.as_ref().map(|states| states_by_segment(&self.segments, states, shape));
            let inputs = h1_reference::ScanInputs {
                u: u.view(),
                delta: delta.view(),
                a: a.view(),
                b: b.view(),
                c: c.view(),
                d: d.as_ref().map(|d| d.view()),
                z: z.as_ref().map(|z| z.view()),
                delta_bias: delta_bias.as_ref().map(|bias| bias.view()),
                softplus: self.softplus,
                state_in: state_in.as_ref().map(|state| state.view()),
            };
            f(&inputs, &reference_segments(&self.segments))
        }
    }

    fn lengths() -> impl Strategy<Value = Vec<(usize, usize)>> {
        let len = prop_oneof![Just(0usize), Just(1), 2usize..20, Just(SCAN_CHUNK), Just(2 * SCAN_CHUNK + 1)];
        prop::collection::vec((len, 0usize..2), 0..4)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn outputs_and_states_follow_the_formula(
            seed: u64, sizes in sizes(), d_state in 1usize..20, lengths in lengths(), switches: u8,
        ) {
            let case = Case::new(seed, sizes, d_state, &lengths, switches);
            let (tokens, channels) = case.u.f64().dim();
            let outputs = everywhere(|simd| {
                let mut out = Grid::poisoned(tokens, channels);
                let mut states = Grid::poisoned(lengths.len(), channels * d_state);
                let mut saved = Grid::poisoned(case.saved_rows(), channels * d_state);
                let (states_to, saved_to) = (states.view_mut(), saved.view_mut());
                selective_scan(simd, &case.inputs(), Some(&states_to), Some(&saved_to), &out.view_mut());
                vec![out.values(), written_states(&case.segments, &states.values(), channels * d_state)]
            });
            let (out, states) = case.reference(h1_reference::selective_scan);
            assert_close("out", &outputs[0], &out, 1e-6);
            assert_close("state_out", &outputs[1], &expected_states(&case.segments, &states), 1e-6);
        }

        /// The sequence in one call, and in two that hand the state on in place, beside others or not.
        #[test]
        fn a_cut_changes_no_bit(
            seed: u64, sizes in sizes(), d_state in 1usize..20, len in 2usize..150, cut in 0usize..150, other in 0usize..5,
        ) {
            let cut = cut % (len + 1);
            let case = Case::new(seed, sizes, d_state, &[(len, 0)], 15);
            let (_, channels) = case.u.f64().dim();
            let whole = || {
                let (mut out, mut state) = (Grid::poisoned(len, channels), Grid::poisoned(1, channels * d_state));
                let simd = Simd::detect();
                selective_scan(simd, &case.inputs(), Some(&state.view_mut()), None, &out.view_mut());
                (out.values(), state.values())
            };
            let (out, state) = whole();
            let outputs = everywhere(|simd| {
                // Slot 1 of two; another sequence of `other` rows goes first in the second call.
                let mut states = Grid::poisoned(2, channels * d_state);
                let mut parts = Vec::new();
                for (range, before) in [(0..cut, 0), (cut..len, other)] {
                    let shift = |grid: &Grid| {
                        let (values, cols) = (grid.values(), grid.view().cols());
                        let filler = vec![0.5; before * cols];
                        let rows = [&filler, &values[range.start * cols..range.end * cols]].concat();
                        let mut rows = rows.into_iter();
                        Grid::from_fn(before + range.len(), cols, || rows.next().unwrap())
                    };
                    let mut table = segments(&[(before, 0), (range.len(), range.start)]);
                    (table[0].slot, table[1].slot) = (0, 1);
                    let [u, delta, b, c] = [&case.u, &case.delta, &case.b, &case.c].map(shift);
                    let z = case.z.as_ref().map(shift);
                    let mut out = Grid::poisoned(before + range.len(), channels);
                    let in_place = states.view_mut();
                    // SAFETY: the scan may read a state and write it in place.
                    let state_in = unsafe { Rows::from_raw(in_place.at(0, 0), 2, in_place.cols(), in_place.stride()) };
                    let inputs = ScanInputs {
                        u: u.view(), delta: delta.view(), b: b.view(), c: c.view(), z: z.as_ref().map(Grid::view),
                        segments: &table, state_in: Some(state_in), ..case.inputs()
                    };
                    selective_scan(simd, &inputs, Some(&in_place), None, &out.view_mut());
                    parts.extend(&out.values()[before * channels..]);
                }
                vec![parts, states.values()[channels * d_state..].to_vec()]
            });
            assert_same_bits("out", &out, &outputs[0]);
            assert_same_bits("state", &state, &outputs[1]);
        }
    }

    #[test]
    fn a_sequence_without_past_ignores_what_its_slot_holds() {
        let mut case = Case::new(1, (3, 2, 1, 1), 5, &[(4, 0)], 31);
        let run = |case: &Case| {
            let mut out = Grid::poisoned(4, 6);
            selective_scan(Simd::detect(), &case.inputs(), None, None, &out.view_mut());
            out.values()
        };
        let before = run(&case);
        case.state_in = Some(Grid::poisoned(1, 30));
        assert_eq!(before, run(&case));
    }
}
