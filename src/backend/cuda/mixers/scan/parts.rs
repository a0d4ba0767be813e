//! Segments cut in time, so that one long sequence of few channels fills a card: `kernels/scan_parts.cu` makes what enters
//! each part, and then the parts are scanned side by side.

use super::{Inputs, STEPS, Tiles};
use crate::backend::cuda::call::{Call, Place};
use crate::backend::cuda::driver::{Arguments, Limits, Pointer, Shape};
use crate::backend::cuda::source::{self, Value};
use crate::backend::{DType, Result};

/// Stretches of a part whose states are made apart, and the threads of a block that makes one: STRETCHES and WARPS·WARP of
/// the kernel.
const STRETCHES: usize = 4;
const THREADS: usize = 256;
/// The most states of a lane.
const LANE_STATES: usize = 8;

/// Picoseconds that a scan takes for a token, however few its channels, and making what enters parts for a token and a
/// thousand states: measured on an H100 (docs/gpu.md).
const STEP_PS: usize = 30_000;
const THOUSAND_STATES_PS: usize = 530;

/// How segments are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts {
    /// Tokens of a part; `None` where segments are not cut, and each is a part.
    pub tokens: Option<usize>,
    /// The most parts that all segments have together.
    pub count: usize,
    /// Segments of the table.
    segments: usize,
}

/// A scan whose segments may be cut.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Rows of all segments, of which there are at most so many.
    pub tokens: usize,
    pub segments: usize,
    /// Blocks of a part, and how many of them share a multiprocessor with gain.
    pub blocks: usize,
    pub a_multiprocessor: usize,
    /// Values of a state.
    pub states: usize,
}

impl Parts {
    /// As many parts as fill the card, if they are worth it; one more would wait until another is done.
    pub fn new(limits: &Limits, sizes: Sizes) -> Self {
        let Sizes { tokens, segments, blocks, a_multiprocessor, states } = sizes;
        let whole = Parts { tokens: None, count: segments, segments };
        let room = |blocks_at_once: usize| (blocks_at_once / blocks.max(1) + 1).saturating_sub(segments.max(1));
        let least = (2 * limits.launch_ns * 1000 / STEP_PS).max(STEPS);
        let parts = room(limits.multiprocessors * a_multiprocessor).min(tokens / least);
        let saved = STEP_PS.saturating_sub(states.saturating_mul(THOUSAND_STATES_PS) / 1000);
        let worth = parts > 1 && tokens * (parts - 1) / parts * saved > 2 * limits.launch_ns * 1000;
        if !worth || room(limits.multiprocessors) < 2 {
            return whole;
        }
        let of_a_part = tokens.div_ceil(parts).next_multiple_of(STEPS);
        // Of segments of one token or more.
        let count = (tokens - segments.min(tokens)) / of_a_part + segments;
        Parts { tokens: Some(of_a_part), count, segments }
    }

    /// Bytes of what is passed on, of the sums of dt, and of what enters.
    pub fn bytes(&self, channels: usize, d_state: usize) -> [usize; 3] {
        let of_parts = |parts: usize, values: usize| 4 * parts * channels * values;
        match self.tokens {
            Some(_) => {
                let stretches = STRETCHES * self.count;
                [of_parts(stretches, d_state), of_parts(stretches, 1), of_parts(self.count, d_state)]
            }
            None => [0; 3],
        }
    }

    /// The parameters SCAN_PARTS of the kernels.
    pub fn arguments(&self, arguments: Arguments) -> Arguments {
        arguments.int(self.segments as u32).int(self.tokens.unwrap_or(0) as u32)
    }

    /// The macro CUT.
    pub fn define(&self) -> (&'static str, Value) {
        ("CUT", Tiles::number(self.tokens.is_some().into()))
    }
}

/// Channels of all parts together, at most: parts and cut segments are at most twice as many as fill the card, and 32
/// channels fill a multiprocessor, in a block of two tiles of 16 or in two blocks of one.
fn most_channels(limits: &Limits) -> usize {
    2 * 32 * limits.multiprocessors
}

/// Bytes that calls take at most beside what they take where segments are not cut.
pub fn most_bytes(limits: &Limits, d_state: usize) -> usize {
    let passes = STRETCHES * (d_state + 1) + d_state;
    let sums = d_state + 2;
    most_channels(limits) * 4 * (passes + sums)
}

/// What is scanned: forward u by B, backward dout, gated, by C, both in as many groups.
pub struct Scanned<'s> {
    pub x: &'s Place,
    pub by: Place,
    pub groups: usize,
    pub gate: Option<Place>,
    pub back: bool,
}

/// Makes what enters each part: `[parts, channels·d_state]`, from what the segments begin with, or backward end with.
pub fn enter(
    c: &mut Call,
    inputs: &Inputs,
    parts: &Parts,
    scanned: Scanned,
    state: Option<Place>,
    [passed, spans, entering]: [Pointer; 3],
) -> Result<Place> {
    let (channels, d_state) = (inputs.channels, inputs.tiles.d_state);
    let lanes = lanes(d_state);
    let vector = d_state == lanes * LANE_STATES && scanned.by.alignment() >= 16;
    let define = |name, value: usize| (name, Tiles::number(value));
    let defines = [
        ("T_X", scanned.x.of()),
        ("T_DELTA", inputs.delta.of()),
        ("T_P", inputs.projected.of()),
        define("D_STATE", d_state),
        define("BACK", scanned.back.into()),
        define("VECTOR", vector.into()),
    ];
    let passes = |arguments: Arguments| parts.arguments(arguments).int(channels as u32).pointer(passed).pointer(spans);
    let arguments = Arguments::new().place(scanned.x).place(&inputs.delta).place(&inputs.a).place(&scanned.by);
    let arguments = arguments.maybe_place(scanned.gate).maybe(inputs.bias).int(inputs.softplus.into());
    let arguments = arguments.pointer(inputs.segments.table).size(inputs.u.rows);
    let arguments = passes(arguments.int((channels / scanned.groups) as u32));
    let shape = |blocks: usize, items: usize| Shape {
        grid: [blocks as u32, items as u32, 1],
        block: [THREADS as u32, 1, 1],
        shared_bytes: 0,
    };
    let of_parts = shape(channels.div_ceil(32 / lanes), parts.count * STRETCHES);
    c.launch((&source::SCAN_PARTS, "scan_parts"), &defines, of_parts, &arguments)?;
    let arguments = Arguments::new().place(&inputs.a).pointer(inputs.segments.table).size(inputs.u.rows);
    let arguments = passes(arguments).maybe_rows(state).pointer(entering);
    let of_segments = shape((channels * d_state).div_ceil(THREADS), parts.segments);
    c.launch((&source::SCAN_PARTS, "scan_enter"), &defines, of_segments, &arguments)?;
    let values = channels * d_state;
    Ok(Place { start: entering, dtype: DType::F32, rows: parts.count, cols: values, stride: values })
}

/// Lanes of a channel, LANES of the kernel.
fn lanes(d_state: usize) -> usize {
    d_state.div_ceil(LANE_STATES).next_power_of_two()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const H100: usize = 132;

    fn limits(multiprocessors: usize, launch_ns: usize) -> Limits {
        let (name, capability) = (String::new(), (9, 0));
        Limits { name, capability, multiprocessors, shared_bytes: 0, memory_bytes: 0, launch_ns }
    }

    fn sizes(tokens: usize, segments: usize, heads: usize) -> Sizes {
        Sizes { tokens, segments, blocks: heads.div_ceil(2), a_multiprocessor: 1, states: heads * 256 }
    }

    #[test]
    fn a_long_sequence_of_few_heads_fills_a_card() {
        let card = limits(H100, 4000);
        let parts = |tokens, segments, heads| Parts::new(&card, sizes(tokens, segments, heads));
        assert_eq!(parts(16384, 1, 36).count, 7);
        assert_eq!(parts(16384, 1, 128).count, 2);
        // Where the card is full, sequences are short or many, they are left as they are.
        for (tokens, segments, heads) in [(16384, 1, 256), (300, 1, 36), (16384, 7, 36)] {
            assert_eq!(parts(tokens, segments, heads).tokens, None, "{tokens} tokens in {segments}");
        }
    }

    proptest! {
        /// However segments share the tokens, their parts are no more than were counted, and these no more than is reserved.
        #[test]
        fn parts_are_as_many_as_are_counted(
            (multiprocessors, launch_ns, a_multiprocessor) in (1usize..200, 0usize..5000, 1usize..3),
            (channels, d_state) in (1usize..3000, 1usize..257),
            lens in proptest::collection::vec(0usize..3000, 1..6),
            empty in 0usize..3,
        ) {
            let limits = limits(multiprocessors, launch_ns);
            let tokens = lens.iter().sum();
            let blocks = channels.div_ceil(32 / a_multiprocessor);
            let states = channels * d_state;
            let sizes = Sizes { tokens, segments: lens.len() + empty, blocks, a_multiprocessor, states };
            let parts = Parts::new(&limits, sizes);
            if let Some(of_a_part) = parts.tokens {
                let there: usize = lens.iter().map(|len| len.div_ceil(of_a_part)).sum();
                prop_assert!(there <= parts.count, "{there} parts of {}", parts.count);
                let sums = 4 * parts.count * channels * (d_state + 2);
                let (taken, most) = (sums + parts.bytes(channels, d_state).iter().sum::<usize>(), most_bytes(&limits, d_state));
                prop_assert!(taken <= most, "{} parts take {taken} of {most} bytes", parts.count);
            }
        }
    }
}
