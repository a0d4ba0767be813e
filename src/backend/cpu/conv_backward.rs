//! The gradients of the convolution; see `conv.rs` for the formula.
//!
//! With `da_t = dout_t·silu'(a_t)`: `dx_s = Σ_k weight[k]·da_{s+W−1−k}` summed over the filters of the channel, `dweight[k]
//! += Σ_t da_t·x_{t−W+1+k}`, `dbias += Σ_t da_t`. A task takes one block of channels through all segments in order.

use super::conv::{Block, ConvInputs, TIME};
use super::lines::{load, store};
use super::math::silu_derivative;
use super::matrix::{Rows, RowsMut};
use super::scratch::with_scratch;
use super::segment::Segment;
use super::simd::{Kernel, LANES, Lanes, Simd};
use super::work::parallel;

/// Where the gradients go.
#[derive(Clone, Copy)]
pub struct ConvGradients<'a> {
    /// `[tokens, channels_in]`; replaced.
    pub dx: &'a RowsMut<'a>,
    /// `[filters, W]`; adds.
    pub dweight: Option<&'a RowsMut<'a>>,
    /// `[1, filters]`; adds.
    pub dbias: Option<&'a RowsMut<'a>>,
    /// `[slots, channels_in·W]`: the gradient of the state before each segment that has rows, 0 where past = 0.
    pub dstate_in: Option<&'a RowsMut<'a>>,
}

/// The gradients of [`conv1d`](super::conv::conv1d) from dout `[tokens, channels_in·repeat]` and, where states went on, the
/// gradient of the state after each segment, `[slots, channels_in·W]`.
pub fn conv1d_backward(
    simd: Simd,
    inputs: &ConvInputs<'_>,
    dout: Rows<'_>,
    dstate_out: Option<Rows<'_>>,
    gradients: &ConvGradients<'_>,
) {
    let (blocks, taps, filters) = (inputs.blocks(), inputs.taps(), inputs.filters());
    let work = inputs.x.rows() * blocks * filters * (30 + 3 * taps);
    let window = TIME + 2 * taps;
    parallel(blocks, work, |task| {
        with_scratch((2 * filters * (1 + taps) + (1 + filters) * window) * LANES, |scratch| {
            let block = inputs.block(task);
            simd.run(Backward { x: inputs, block, dout, dstate_out, to: gradients, scratch });
        });
    });
}

struct Backward<'a> {
    x: &'a ConvInputs<'a>,
    block: Block,
    dout: Rows<'a>,
    dstate_out: Option<Rows<'a>>,
    to: &'a ConvGradients<'a>,
    scratch: &'a mut [f32],
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self) {
        let (x, taps) = (self.x, self.x.taps());
        let ahead = taps - 1;
        let filter_values = (1 + taps) * LANES;
        let scratch = std::mem::take(&mut self.scratch);
        let (filters, rest) = scratch.split_at_mut(x.filters() * filter_values);
        let (sums, rest) = rest.split_at_mut(filters.len());
        let (window, das) = rest.split_at_mut((TIME + 2 * taps) * LANES);
        x.load_filters::<L>(self.block, filters);
        sums.fill(0.0);
        for segment in x.segments.iter().filter(|segment| segment.len > 0) {
            let len = segment.len as usize;
            for first in (0..len).step_by(TIME) {
                // da of the chunk and of the W − 1 tokens after it, 0 past the end.
                let count = TIME.min(len - first);
                let rows = count + ahead;
                let from = first as isize - ahead as isize;
                x.window::<L>(segment, self.block, from, &mut window[..(rows + ahead) * LANES]);
                let each = das.len() / x.filters();
                for f in 0..x.filters() {
                    let (filter, da) = (&filters[f * filter_values..][..filter_values], &mut das[f * each..][..each]);
                    for (i, da) in da.chunks_exact_mut(LANES).take(rows).enumerate() {
                        let value = if first + i < len {
                            self.da::<L>(segment, f, filter, window, first, i)
                        } else {
                            L::zero()
                        };
                        value.store(da);
                    }
                    add_products::<L>(&mut sums[f * filter_values..][..filter_values], da, window, count);
                }
                for i in 0..count {
                    let dx = self.dx::<L>(segment, filters, das, (first + i) as isize, i as isize);
                    // SAFETY: the columns of a block belong to this task.
                    let to = unsafe {
                        self.to.dx.part(segment.start as usize + first + i, self.block.input, self.block.lanes)
                    };
                    store(dx, to, 0);
                }
                if first == 0 {
                    self.dstate_in::<L>(segment, filters, das);
                }
            }
        }
        self.write_sums(sums);
    }
}

/// Adds `Σ da` and `Σ da·x` of each tap, over the `count` tokens of a chunk, to a filter's sums.
#[inline(always)]
fn add_products<L: Lanes>(sums: &mut [f32], da: &[f32], window: &[f32], count: usize) {
    let (bias, taps) = sums.split_at_mut(LANES);
    let mut sum = L::zero();
    for da in da.chunks_exact(LANES).take(count) {
        sum = sum + L::load(da);
    }
    (L::load(bias) + sum).store(bias);
    for (k, tap) in taps.chunks_exact_mut(LANES).enumerate() {
        let mut sum = L::zero();
        for (da, x) in da.chunks_exact(LANES).zip(window[k * LANES..].chunks_exact(LANES)).take(count) {
            sum = L::load(da).mul_add(L::load(x), sum);
        }
        (L::load(tap) + sum).store(tap);
    }
}

impl Backward<'_> {
    /// `dout·silu'(a)` of filter `f` at row `i` of a chunk that starts at time `first`.
    #[inline(always)]
    fn da<L: Lanes>(&self, segment: &Segment, f: usize, filter: &[f32], window: &[f32], first: usize, i: usize) -> L {
        let (x, block) = (self.x, self.block);
        let t = segment.start as usize + first + i;
        let copies = if x.repeat_first { f..f + 1 } else { 0..x.repeat };
        let mut dout = L::zero();
        for column in copies.map(|repeat| x.columns(block, repeat)) {
            dout = dout + load(self.dout.part(t, column, block.lanes), 0);
        }
        dout * silu_derivative(x.convolve::<L>(filter, window, i))
    }

    /// dx at a time that may lie before the segment, `from` rows after the start of what `das` holds: through the outputs that
    /// read it, and through the state after the segment.
    #[inline(always)]
    fn dx<L: Lanes>(&self, segment: &Segment, filters: &[f32], das: &[f32], time: isize, from: isize) -> L {
        let (x, block, taps) = (self.x, self.block, self.x.taps());
        let each = das.len() / x.filters();
        let mut sum = L::zero();
        for (filter, da) in filters.chunks_exact((1 + taps) * LANES).zip(das.chunks_exact(each)) {
            for (k, tap) in filter[LANES..].chunks_exact(LANES).enumerate() {
                let row = from + (taps - 1 - k) as isize;
                if row >= 0 {
                    sum = L::load(tap).mul_add(L::load(&da[row as usize * LANES..]), sum);
                }
            }
        }
        let column = time - (segment.len as isize - taps as isize);
        if let Some(dstate) = self.dstate_out.filter(|_| column >= 0) {
            let dstate = dstate.part(segment.slot as usize, block.input * taps, block.lanes * taps);
            let mut lanes = [0.0; LANES];
            for (lane, dstate) in lanes.iter_mut().zip(dstate.chunks_exact(taps)) {
                *lane = dstate[column as usize];
            }
            sum = sum + L::from_array(lanes);
        }
        sum
    }

    /// The gradient of the state before a segment, from da of its first chunk.
    #[inline(always)]
    fn dstate_in<L: Lanes>(&self, segment: &Segment, filters: &[f32], das: &[f32]) {
        let (block, taps) = (self.block, self.x.taps());
        let Some(to) = self.to.dstate_in else { return };
        // SAFETY: the channels of a block belong to this task.
        let to = unsafe { to.part(segment.slot as usize, block.input * taps, block.lanes * taps) };
        to.fill(0.0);
        if segment.past == 0 {
            return;
        }
        for column in 0..taps {
            let time = column as isize - taps as isize;
            let dx = self.dx::<L>(segment, filters, das, time, time).to_array();
            for (to, dx) in to.chunks_exact_mut(taps).zip(dx) {
                to[column] = dx;
            }
        }
    }

    fn write_sums(&self, sums: &[f32]) {
        let (x, block) = (self.x, self.block);
        for (f, sums) in sums.chunks_exact((1 + x.taps()) * LANES).enumerate() {
            let (bias, taps) = sums.split_at(LANES);
            let first = x.filter(block, f);
            for lane in 0..block.lanes {
                if let Some(dweight) = self.to.dweight {
                    // SAFETY: the filters of a block belong to this task.
                    let to = unsafe { dweight.shared_row(first + lane) };
                    for (to, tap) in to.iter_mut().zip(taps.chunks_exact(LANES)) {
                        *to += tap[lane];
                    }
                }
            }
            if let Some(dbias) = self.to.dbias {
                // SAFETY: the filters of a block belong to this task.
                let to = unsafe { dbias.part(0, first, block.lanes) };
                for (to, sum) in to.iter_mut().zip(bias) {
                    *to += sum;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::conv::tests::{Case, lengths, sizes};
    use super::super::testing::{Grid, assert_close, everywhere, expected_states, f64s, random, written_states};
    use super::*;
    use ndarray::Array3;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn every_gradient_follows_the_formula(
            seed: u64, sizes in sizes(), lengths in lengths(), switches: u8, state_goes_on: bool,
        ) {
            let case = Case::new(seed, sizes, &lengths, switches);
            let rng = &mut crate::random::stream(seed, "conv backward");
            let (tokens, (channels, taps)) = (case.x.view().rows(), case.state());
            let filters = case.weight.view().rows();
            let dout = Grid::random(rng, tokens, channels * case.repeat, 1.0);
            let dstate_out = state_goes_on.then(|| Grid::random(rng, lengths.len(), channels * taps, 1.0));
            let (weight_before, bias_before) = (Grid::random(rng, filters, taps, 1.0), random(rng, filters, 1.0));
            let outputs = everywhere(|simd| {
                let mut dx = Grid::poisoned(tokens, channels);
                let mut dstate_in = Grid::poisoned(lengths.len(), channels * taps);
                let (mut dweight, mut dbias) = (weight_before.clone(), bias_before.clone());
                let gradients = ConvGradients {
                    dx: &dx.view_mut(),
                    dweight: Some(&dweight.view_mut()),
                    dbias: Some(&RowsMut::dense(&mut dbias, 1, filters)),
                    dstate_in: Some(&dstate_in.view_mut()),
                };
                conv1d_backward(simd, &case.inputs(), dout.view(), dstate_out.as_ref().map(Grid::view), &gradients);
                let dstate_in = written_states(&case.segments, &dstate_in.values(), channels * taps);
                vec![dx.values(), dweight.values(), dbias, dstate_in]
            });
            let dstate_out = dstate_out.map(|states| {
                let by_slot = states.f64();
                Array3::from_shape_fn((lengths.len(), channels, taps), |(s, c, k)| {
                    by_slot[[case.segments[s].slot as usize, c * taps + k]]
                })
            });
            let mut expected = case.reference(|x, op, state, segments| {
                let state = state.as_ref().map(|state| state.view());
                let dstate_out = dstate_out.as_ref().map(|states| states.view());
                h1_reference::conv1d_backward(x.view(), op, state, dout.f64().view(), dstate_out, segments)
            });
            for (mut state, segment) in expected.dstate_in.outer_iter_mut().zip(&case.segments) {
                if segment.past == 0 {
                    state.fill(0.0);
                }
            }
            assert_close("dx", &outputs[0], &expected.dx, 1e-6);
            assert_close("dweight", &outputs[1], &(expected.dweight + weight_before.f64()), 1e-6);
            assert_close("dbias", &outputs[2], &(expected.dbias + f64s(&bias_before)), 1e-6);
            assert_close("dstate_in", &outputs[3], &expected_states(&case.segments, &expected.dstate_in), 1e-6);
        }
    }
}
