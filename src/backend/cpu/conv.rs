//! Causal depthwise convolution over time with a repeat of heads and silu, as in M1's Mamba mixer, forward.
//!
//! Each head of `head` input channels stands `repeat` times in the output. `out = silu(a)` with
//! `a_t = bias + Σ_k weight[k]·x_{t−W+1+k}`, where inputs before a segment come from its state or are 0. With the repeat first
//! every output channel has a filter of its own; with the repeat after, the repeats are copies.
//!
//! Lanes are up to 16 neighbouring input channels of one head; each row of them is loaded once for all its repeats.

use super::lines::{load, store};
use super::math::silu;
use super::matrix::{Rows, RowsMut};
use super::scratch::with_scratch;
use super::segment::Segment;
use super::simd::{Kernel, LANES, Lanes, Simd};
use super::work::parallel;

/// Tokens that are taken through at a time.
pub(super) const TIME: usize = 64;

/// What the convolution reads, forward and backward.
#[derive(Clone, Copy)]
pub struct ConvInputs<'a> {
    /// `[tokens, channels_in]`.
    pub x: Rows<'a>,
    /// `[filters, W]`, the last tap for the current token; `channels_in·repeat` filters, or `channels_in`.
    pub weight: Rows<'a>,
    /// `[filters]`.
    pub bias: Option<&'a [f32]>,
    /// Channels of a head; divides `channels_in`.
    pub head: usize,
    /// How often each head stands in the output.
    pub repeat: usize,
    /// The repeat comes before the convolution.
    pub repeat_first: bool,
    /// Who belongs to whom; a segment of no rows leaves its state alone.
    pub segments: &'a [Segment],
    /// `[slots, channels_in·W]`, the last W inputs before each segment, oldest first; read where past > 0 and else 0.
    pub state_in: Option<Rows<'a>>,
}

/// Up to 16 neighbouring input channels of one head.
#[derive(Clone, Copy)]
pub(super) struct Block {
    /// The first input channel.
    pub input: usize,
    /// How many.
    pub lanes: usize,
    /// The first output channel of the first repeat; the next repeat is a head further.
    pub output: usize,
}

impl<'a> ConvInputs<'a> {
    /// Taps of a filter.
    pub(super) fn taps(&self) -> usize {
        self.weight.cols()
    }

    /// Filters of an input channel.
    pub(super) fn filters(&self) -> usize {
        if self.repeat_first { self.repeat } else { 1 }
    }

    pub(super) fn blocks(&self) -> usize {
        self.x.cols() / self.head * self.head.div_ceil(LANES)
    }

    pub(super) fn block(&self, index: usize) -> Block {
        let a_head = self.head.div_ceil(LANES);
        let (head, inside) = (index / a_head, index % a_head * LANES);
        let lanes = LANES.min(self.head - inside);
        Block { input: head * self.head + inside, lanes, output: head * self.head * self.repeat + inside }
    }

    /// The first of a block's rows in the weight, for one of its filters.
    pub(super) fn filter(&self, block: Block, filter: usize) -> usize {
        if self.repeat_first { block.output + filter * self.head } else { block.input }
    }

    /// The columns of a block in the output, for one of its repeats.
    pub(super) fn columns(&self, block: Block, repeat: usize) -> usize {
        block.output + repeat * self.head
    }

    /// The filters of a block, each as `[1 + W][16]`: bias, then taps.
    #[inline(always)]
    pub(super) fn load_filters<L: Lanes>(&self, block: Block, to: &mut [f32]) {
        for (filter, to) in to.chunks_exact_mut((1 + self.taps()) * LANES).enumerate() {
            let first = self.filter(block, filter);
            let bias = self.bias.map_or(L::zero(), |bias| load(&bias[first..first + block.lanes], 0));
            bias.store(to);
            for lane in 0..block.lanes {
                for (k, &tap) in self.weight.row(first + lane).iter().enumerate() {
                    to[(1 + k) * LANES + lane] = tap;
                }
            }
        }
    }

    /// The state of a block before a segment, `[lanes][W]`, if there is one.
    pub(super) fn state(&self, segment: &Segment, block: Block) -> Option<&'a [f32]> {
        let (taps, past) = (self.taps(), segment.past > 0);
        let part = |state: Rows<'a>| state.part(segment.slot as usize, block.input * taps, block.lanes * taps);
        self.state_in.filter(|_| past).map(part)
    }

    /// The inputs of a block at the times `from..from + rows` of a segment, `[rows][16]`, 0 outside of it. Times before 0 are
    /// those of the state.
    #[inline(always)]
    pub(super) fn window<L: Lanes>(&self, segment: &Segment, block: Block, from: isize, to: &mut [f32]) {
        let taps = self.taps();
        for (time, row) in (from..).zip(to.chunks_exact_mut(LANES)) {
            if time >= segment.len as isize {
                row.fill(0.0);
            } else if time >= 0 {
                let t = segment.start as usize + time as usize;
                load::<L>(self.x.part(t, block.input, block.lanes), 0).store(row);
            } else {
                row.fill(0.0);
                let column = (taps as isize + time) as usize;
                if let Some(state) = self.state(segment, block) {
                    for (value, taps) in row.iter_mut().zip(state.chunks_exact(taps)) {
                        *value = taps[column];
                    }
                }
            }
        }
    }

    /// `a` at row `i` of a window: the filter's taps over rows `i..i + W`.
    #[inline(always)]
    pub(super) fn convolve<L: Lanes>(&self, filter: &[f32], window: &[f32], i: usize) -> L {
        let mut sum = L::load(filter);
        for (tap, x) in filter[LANES..].chunks_exact(LANES).zip(window[i * LANES..].chunks_exact(LANES)) {
            sum = L::load(x).mul_add(L::load(tap), sum);
        }
        sum
    }
}

/// The convolution: out `[tokens, channels_in·repeat]`, and the last W inputs of each segment in state_out
/// `[slots, channels_in·W]`, which may lie where `state_in` does.
pub fn conv1d(simd: Simd, inputs: &ConvInputs<'_>, state_out: Option<&RowsMut<'_>>, out: &RowsMut<'_>) {
    let (blocks, taps) = (inputs.blocks(), inputs.taps());
    let work = inputs.x.rows() * blocks * inputs.filters() * (20 + taps);
    parallel(inputs.segments.len() * blocks, work, |task| {
        let (segment, block) = (&inputs.segments[task / blocks], inputs.block(task % blocks));
        if segment.len == 0 {
            return;
        }
        with_scratch((inputs.filters() * (1 + taps) + TIME + taps) * LANES, |scratch| {
            simd.run(Forward { x: inputs, segment, block, state_out, out, scratch });
        });
    });
}

struct Forward<'a> {
    x: &'a ConvInputs<'a>,
    segment: &'a Segment,
    block: Block,
    state_out: Option<&'a RowsMut<'a>>,
    out: &'a RowsMut<'a>,
    scratch: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (x, block, segment) = (self.x, self.block, self.segment);
        let (taps, len) = (x.taps(), segment.len as usize);
        let (filters, window) = self.scratch.split_at_mut(x.filters() * (1 + taps) * LANES);
        x.load_filters::<L>(block, filters);
        for first in (0..len).step_by(TIME) {
            let times = first..len.min(first + TIME);
            let rows = times.len() + taps - 1;
            x.window::<L>(segment, block, first as isize - (taps as isize - 1), &mut window[..rows * LANES]);
            for (i, t) in times.map(|time| segment.start as usize + time).enumerate() {
                for (f, filter) in filters.chunks_exact((1 + taps) * LANES).enumerate() {
                    let y = silu(x.convolve::<L>(filter, window, i));
                    let copies = if x.repeat_first { f..f + 1 } else { 0..x.repeat };
                    for column in copies.map(|repeat| x.columns(block, repeat)) {
                        // SAFETY: a block's columns in a segment's rows belong to this task.
                        store(y, unsafe { self.out.part(t, column, block.lanes) }, 0);
                    }
                }
            }
        }
        if let Some(state_out) = self.state_out {
            let from = len as isize - taps as isize;
            x.window::<L>(segment, block, from, &mut window[..taps * LANES]);
            // SAFETY: a block's channels in a segment's slot belong to this task, and what was there has been read.
            let to = unsafe { state_out.part(segment.slot as usize, block.input * taps, block.lanes * taps) };
            for (lane, to) in to.chunks_exact_mut(taps).enumerate() {
                for (to, row) in to.iter_mut().zip(window.chunks_exact(LANES)) {
                    *to = row[lane];
                }
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::testing::{
        Grid, assert_close, assert_same_bits, everywhere, expected_states, f64s, random, reference_segments, segments,
        states_by_segment, written_states,
    };
    use super::*;
    use ndarray::{Array1, Array2, Array3};
    use proptest::prelude::*;

    /// Everything a convolution reads, at random.
    #[derive(Clone)]
    pub struct Case {
        pub segments: Vec<Segment>,
        pub x: Grid,
        pub weight: Grid,
        pub bias: Option<Vec<f32>>,
        pub head: usize,
        pub repeat: usize,
        pub repeat_first: bool,
        pub state_in: Option<Grid>,
    }

    /// Sizes: (heads, channels of a head, repeat, taps).
    pub fn sizes() -> impl Strategy<Value = (usize, usize, usize, usize)> {
        (1usize..4, prop_oneof![1usize..6, Just(16), Just(17), Just(35)], 1usize..4, 1usize..6)
    }

    impl Case {
        pub fn new(
            seed: u64,
            (heads, head, repeat, taps): (usize, usize, usize, usize),
            lengths: &[(usize, usize)],
            switches: u8,
        ) -> Self {
            let rng = &mut crate::random::stream(seed, "conv");
            let (channels, tokens) = (heads * head, lengths.iter().map(|(len, _)| len).sum());
            let on = |bit: u8| switches >> bit & 1 == 1;
            let filters = if on(0) { channels * repeat } else { channels };
            Self {
                segments: segments(lengths),
                x: Grid::random(rng, tokens, channels, 1.0),
                weight: Grid::random(rng, filters, taps, 1.0),
                bias: on(1).then(|| random(rng, filters, 1.0)),
                head,
                repeat,
                repeat_first: on(0),
                state_in: on(2).then(|| Grid::random(rng, lengths.len(), channels * taps, 1.0)),
            }
        }

        pub fn inputs(&self) -> ConvInputs<'_> {
            ConvInputs {
                x: self.x.view(),
                weight: self.weight.view(),
                bias: self.bias.as_deref(),
                head: self.head,
                repeat: self.repeat,
                repeat_first: self.repeat_first,
                segments: &self.segments,
                state_in: self.state_in.as_ref().map(Grid::view),
            }
        }

        /// The shape of one state: `(channels_in, W)`.
        pub fn state(&self) -> (usize, usize) {
            (self.x.view().cols(), self.weight.view().cols())
        }

        /// Calls the reference with everything in f64: x, the op, the states, the segments.
        pub fn reference<R>(
            &self,
            f: impl FnOnce(Array2<f64>, &h1_reference::Conv1d<f64>, Option<Array3<f64>>, &[h1_reference::Segment]) -> R,
        ) -> R {
            let (weight, bias): (_, Option<Array1<f64>>) = (self.weight.f64(), self.bias.as_deref().map(f64s));
            let order = match self.repeat_first {
                true => h1_reference::RepeatOrder::BeforeConv,
                false => h1_reference::RepeatOrder::AfterConv,
            };
            let op = h1_reference::Conv1d {
                weight: weight.view(),
                bias: bias.as_ref().map(|bias| bias.view()),
                head: self.head,
                repeat: self.repeat,
                order,
            };
            let state = self.state_in.as_ref().map(|states| states_by_segment(&self.segments, states, self.state()));
            f(self.x.f64(), &op, state, &reference_segments(&self.segments))
        }
    }

    pub fn lengths() -> impl Strategy<Value = Vec<(usize, usize)>> {
        let len = prop_oneof![Just(0usize), 1usize..9, Just(TIME), Just(2 * TIME + 1)];
        prop::collection::vec((len, 0usize..2), 0..4)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn outputs_and_states_follow_the_formula(seed: u64, sizes in sizes(), lengths in lengths(), switches: u8) {
            let case = Case::new(seed, sizes, &lengths, switches);
            let (tokens, values) = (case.x.view().rows(), case.state().0 * case.state().1);
            let outputs = everywhere(|simd| {
                let mut out = Grid::poisoned(tokens, case.state().0 * case.repeat);
                let mut states = Grid::poisoned(lengths.len(), values);
                conv1d(simd, &case.inputs(), Some(&states.view_mut()), &out.view_mut());
                vec![out.values(), written_states(&case.segments, &states.values(), values)]
            });
            let (out, states) = case.reference(|x, op, state, segments| {
                h1_reference::conv1d(x.view(), op, state.as_ref().map(|state| state.view()), segments)
            });
            assert_close("out", &outputs[0], &out, 5e-7);
            assert_close("state_out", &outputs[1], &expected_states(&case.segments, &states), 0.0);
        }

        #[test]
        fn a_cut_changes_no_bit(seed: u64, sizes in sizes(), len in 1usize..100, cut in 0usize..100, switches: u8) {
            let cut = cut % (len + 1);
            let case = Case::new(seed, sizes, &[(len, 0)], switches);
            let (channels, taps) = case.state();
            let width = channels * case.repeat;
            let mut whole = Grid::poisoned(len, width);
            let mut state = Grid::poisoned(1, channels * taps);
            conv1d(Simd::detect(), &case.inputs(), Some(&state.view_mut()), &whole.view_mut());
            let outputs = everywhere(|simd| {
                let mut states = Grid::poisoned(1, channels * taps);
                let mut out = Grid::poisoned(len, width);
                for range in [0..cut, cut..len] {
                    let table = segments(&[(range.len(), range.start)]);
                    let in_place = states.view_mut();
                    let part = out.view_mut();
                    // SAFETY: rows of two grids that live on; the convolution may read a state and write it in place.
                    let (state_in, x, part) = unsafe {
                        let x = case.x.view();
                        (
                            Rows::from_raw(in_place.at(0, 0), 1, in_place.cols(), in_place.stride()),
                            Rows::from_raw(x.at(range.start, 0), range.len(), x.cols(), x.stride()),
                            RowsMut::from_raw(part.at(range.start, 0), range.len(), width, part.stride()),
                        )
                    };
                    let inputs = ConvInputs { x, segments: &table, state_in: Some(state_in), ..case.inputs() };
                    conv1d(simd, &inputs, Some(&in_place), &part);
                }
                vec![out.values(), states.values()]
            });
            assert_same_bits("out", &whole.values(), &outputs[0]);
            assert_same_bits("state", &state.values(), &outputs[1]);
        }
    }
}
