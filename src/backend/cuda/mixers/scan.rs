//! The scan's launches: `kernels/selective_scan16.cu` and `kernels/selective_scan16_backward.cu` for channels as in the m2
//! layer stored in 16 bits, for others `kernels/selective_scan.cu` and `kernels/selective_scan_backward.cu`; a step of
//! decoding is `kernels/selective_scan_step.cu`. Long sequences of few channels are cut in time.

mod parts;

use parts::{Parts, Scanned, Sizes, enter};

use super::RESERVED_BYTES;
use super::conv::{self, Forward};
use crate::backend::cuda::call::{Call, Place, SegmentsPlace, each};
use crate::backend::cuda::driver::{Arguments, Limits, Shape};
use crate::backend::cuda::source::{self, Value};
use crate::backend::{DType, Largest, Result, ops};

/// Tokens between two states that forward saves for backward, counted from the start of a segment.
pub(in crate::backend::cuda) const SCAN_CHUNK: usize = 16;
/// Tokens that are in shared memory at a time, STEPS of the kernels.
const STEPS: usize = 32;
/// Channels of a tile of the kernels for 16 states, tiles of a block, chunks that are on their way to shared memory, and
/// the stepping threads of a block of its backward: TILE, TILES, COMING and TILES·THREADS there.
const TILE16: usize = 16;
const TILES16: usize = 2;
const COMING: usize = 3;
const STEPPING16: usize = 128;

/// Bytes of shared memory of a block of `selective_scan16`: its parts, and the chunks whose values it holds.
fn scan16_bytes() -> usize {
    let half = 288 * STEPS / 4 + (1312 + 640) * STEPS / 8 + 160 * STEPS / 2;
    TILES16 * (2 * half + 4 * 160 * STEPS) + (COMING + 5) * 5 * TILES16 * STEPS * TILE16 * 2
}

/// Bytes of shared memory of a block of its backward, where a value of dout has `dout`: its parts, the chunks whose values it
/// holds, and saved states.
fn scan16_backward_bytes(dout: usize) -> usize {
    let inputs = 288 * 3 * SCAN_CHUNK / 4 + 2 * 144 * SCAN_CHUNK / 2;
    let left = 288 * 3 * SCAN_CHUNK + 2 * (528 * SCAN_CHUNK / 2 + 64);
    let values = SCAN_CHUNK * TILE16 * (5 * 2 + dout);
    TILES16 * (3 * inputs + 2 * left + (COMING + 1) * values) + COMING * STEPPING16 * 16
}

/// How a tile of channels lies in a block.
#[derive(Clone, Copy)]
struct Tiles {
    d_state: usize,
    /// Lanes of a channel.
    lanes: usize,
    /// Channels of a tile.
    tile: usize,
    /// Neighbouring channels that share both groups.
    run: usize,
    /// Tiles in all.
    count: usize,
    /// Channels of a group of B, and of C.
    per_group: [usize; 2],
}

impl Tiles {
    /// None if a channel has too many states.
    fn new(inputs: &ops::ScanInputs) -> Option<Self> {
        let (lanes, widest) = match inputs.d_state() {
            0..=32 => (8, 16),
            33..=64 => (16, 8),
            65..=128 => (32, 4),
            129..=256 => (32, 2),
            _ => return None,
        };
        let per_group = [inputs.groups_b, inputs.groups_c].map(|groups| inputs.channels() / groups);
        let run = gcd(per_group[0], per_group[1]);
        let tile = run.next_power_of_two().clamp(32 / lanes, widest);
        let count = inputs.channels() / run * run.div_ceil(tile);
        Some(Tiles { d_state: inputs.d_state(), lanes, tile, run, count, per_group })
    }

    fn threads(&self) -> usize {
        self.tile * self.lanes
    }

    /// States of a channel, those past the last included.
    fn padded(&self) -> usize {
        self.d_state.next_multiple_of(self.lanes)
    }

    /// Tiles of a group of B, and of C.
    fn a_group(&self) -> [usize; 2] {
        self.per_group.map(|channels| channels / self.run * self.run.div_ceil(self.tile))
    }

    /// Whether the values that a thread loads at once are aligned in all of these.
    fn vector(&self, places: &[Place]) -> bool {
        let own = STEPS / self.lanes;
        let aligned = |place: &Place| place.alignment() >= (own * place.dtype.size()).min(16);
        self.run.is_multiple_of(own) && places.iter().all(aligned)
    }

    fn shape(&self, parts: &Parts, shared_bytes: usize) -> Shape {
        let grid = [self.count as u32, parts.count as u32, 1];
        Shape { grid, block: [self.threads() as u32, 1, 1], shared_bytes: shared_bytes as u32 }
    }

    /// Bytes of what lies in shared memory for each of STEPS tokens: `row` of a channel's values and `projected` of a
    /// value of B and C as they are in global memory, and B and C as f32.
    fn step_bytes(&self, row: usize, projected: usize) -> usize {
        let stages = if self.d_state > 64 { 1 } else { 2 };
        stages * (self.tile * row + 2 * self.d_state * projected) + 8 * self.padded()
    }

    fn forward_shared_bytes(&self, row: usize, projected: usize) -> usize {
        STEPS * (self.step_bytes(row, projected) + 8 * (self.tile + 2) + 4 * (self.tile + 8))
    }

    fn backward_shared_bytes(&self, row: usize, projected: usize, group: usize) -> usize {
        let sums = 4 * self.padded() * self.tile + 3 * 4 * (self.tile + 8);
        let of_warps = 4 * 2 * (self.threads() / 32) * group * 2 * self.padded();
        STEPS * (self.step_bytes(row, projected) + 16 * (self.tile + 2) + sums) + of_warps
    }

    /// Tokens that backward takes in one stretch of code; as many as registers allow.
    fn backward_group(&self, vector: bool) -> usize {
        match self.d_state {
            0..=16 if vector => 16,
            17..=64 if vector => 8,
            _ => 4,
        }
    }

    fn number(value: usize) -> Value {
        Value::Number(value as u32)
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Threads of a block of `selective_scan_step` without a convolution.
const STEP_THREADS: usize = 128;

/// The macros of the layouts that calls ask for as a rule, for forward and backward: 16 states, aligned and not, and
/// the most of each kind.
pub(super) fn layouts() -> Vec<[Vec<(&'static str, Value)>; 2]> {
    let layouts = [(16, 8, 16, 1), (16, 8, 16, 0), (32, 8, 16, 0), (64, 16, 8, 0), (128, 32, 4, 0), (256, 32, 2, 0)];
    let names = ["D_STATE", "LANES", "TILE", "VECTOR", "GROUP", "CUT"];
    let both = |cut| {
        layouts.map(|(d_state, lanes, tile, vector)| {
            let backward = if vector == 1 { 16 } else { 4 };
            let values = |group| [d_state, lanes, tile, vector, group, cut].map(Tiles::number);
            [SCAN_CHUNK, backward].map(|group| names.into_iter().zip(values(group)).collect())
        })
    };
    [0, 1].into_iter().flat_map(both).collect()
}

/// Where the inputs of a scan lie.
struct Inputs {
    tiles: Tiles,
    channels: usize,
    u: Place,
    delta: Place,
    a: Place,
    b: Place,
    c: Place,
    z: Option<Place>,
    projected: Place,
    d: Option<Place>,
    bias: Option<Place>,
    softplus: bool,
    segments: SegmentsPlace,
    /// The states before the first tokens of segments, a row a slot.
    state: Option<Place>,
}

impl Inputs {
    fn new(c: &Call, inputs: &ops::ScanInputs) -> Result<Self> {
        let states = |_| c.unsupported("a scan", format!("{} states a channel", inputs.d_state()));
        let tiles = Tiles::new(inputs).ok_or(()).map_err(states)?;
        let (u, delta, a) = (c.floats("u", inputs.u)?, c.floats("delta", inputs.delta)?, c.f32("a", inputs.a)?);
        let projected = c.floats("projected", inputs.projected)?;
        let (d, bias) = (c.maybe_f32("d", inputs.d)?, c.maybe_f32("delta_bias", inputs.delta_bias)?);
        let (segments, state) = (c.segments(&inputs.segments)?, c.maybe_f32("state_in", inputs.state_in)?);
        if segments.capacity > 65535 {
            return Err(c.unsupported("a scan", format!("{} segments", segments.capacity)));
        }
        let (channels, d_state) = (inputs.channels(), inputs.d_state());
        c.int("channels", channels)?;
        Ok(Inputs {
            tiles,
            channels,
            u,
            delta,
            a,
            b: projected.columns(inputs.b_col, inputs.groups_b * d_state),
            c: projected.columns(inputs.c_col, inputs.groups_c * d_state),
            z: inputs.z_col.map(|col| projected.columns(col, channels)),
            projected,
            d,
            bias,
            softplus: inputs.softplus,
            segments,
            state,
        })
    }

    /// The parameters SCAN_INPUTS of the kernels, where states before the first tokens lie in these rows.
    fn arguments(&self, state: Option<Place>) -> Arguments {
        let arguments = Arguments::new().place(&self.u).place(&self.delta).place(&self.a).place(&self.b).place(&self.c);
        let arguments = arguments.maybe_place(self.z).maybe(self.d).maybe(self.bias).int(self.softplus.into());
        let arguments = arguments.pointer(self.segments.table).size(self.u.rows).int(self.tiles.run as u32);
        let [per_b, per_c] = self.tiles.per_group.map(|channels| channels as u32);
        arguments.int(per_b).int(per_c).maybe_rows(state)
    }

    /// How the segments are cut for the kernels for 16 states, or for any.
    fn cut(&self, c: &Call, in_sixteens: bool) -> Parts {
        // Blocks of the latter share a multiprocessor.
        let (blocks, a_multiprocessor) =
            if in_sixteens { (self.tiles.count.div_ceil(TILES16), 1) } else { (self.tiles.count, 2) };
        let (tokens, segments, states) = (self.u.rows, self.segments.capacity, self.channels * self.tiles.d_state);
        Parts::new(c.limits(), Sizes { tokens, segments, blocks, a_multiprocessor, states })
    }

    /// Where B, C and z lie in a matrix with the columns of `projected`, to see whether they are aligned.
    fn places_in(&self, inputs: &ops::ScanInputs, matrix: &Place) -> impl Iterator<Item = Place> {
        let matrix = *matrix;
        let columns_of = [Some(inputs.b_col), Some(inputs.c_col), inputs.z_col];
        columns_of.into_iter().flatten().map(move |col| matrix.columns(col, 0))
    }

    /// Whether the kernels for 16 states, in so many bytes of shared memory, take these, of which `stored` have no more
    /// bits than sums of theirs count with.
    fn in_sixteens(&self, c: &Call, op: &ops::ScanInputs, places: &[Place], stored: &Place, bytes: usize) -> bool {
        let short = |place: &&Place| place.dtype.size() == 2;
        bytes + RESERVED_BYTES <= c.limits().shared_bytes
            && self.tiles.d_state == 16
            && self.tiles.run.is_multiple_of(TILE16)
            && op.softplus
            && op.z_col.is_some()
            && [&self.u, &self.delta, &self.projected, stored].iter().all(short)
            && places.iter().all(|place| place.alignment() >= 16)
    }

    /// The blocks of the kernels for 16 states.
    fn shape16(&self, parts: &Parts, threads: u32, shared_bytes: usize) -> Shape {
        let grid = [self.tiles.count.div_ceil(TILES16) as u32, parts.count as u32, 1];
        Shape { grid, block: [threads, 1, 1], shared_bytes: shared_bytes as u32 }
    }

    /// The macros of scan.cuh.
    fn defines(&self, vector: bool) -> [(&'static str, Value); 7] {
        let tiles = &self.tiles;
        [
            ("T_U", self.u.of()),
            ("T_DELTA", self.delta.of()),
            ("T_P", self.projected.of()),
            ("D_STATE", Tiles::number(tiles.d_state)),
            ("LANES", Tiles::number(tiles.lanes)),
            ("TILE", Tiles::number(tiles.tile)),
            ("VECTOR", Tiles::number(vector.into())),
        ]
    }
}

/// Bytes of scratch that calls of these sizes take.
pub(super) fn scratch_bytes(limits: &Limits, largest: &Largest) -> usize {
    let (by_token, by_segment) = (largest.state / 16, largest.state.saturating_add(2 * largest.width));
    let partials = largest.tokens.saturating_mul(by_token).saturating_mul(2);
    let whole = partials.saturating_add(largest.segments.saturating_mul(by_segment)).saturating_mul(4);
    whole.saturating_add(parts::most_bytes(limits, largest.d_state))
}

/// LANES of `selective_scan_step.cu`.
fn step_lanes(d_state: usize) -> usize {
    d_state.div_ceil(4).next_power_of_two().clamp(4, 32)
}

/// Threads of a block of `selective_scan_step` that have a head of a convolution, if there is such a block.
fn step_threads(d_state: usize, a_head: usize) -> Option<usize> {
    let threads = a_head.checked_mul(step_lanes(d_state))?;
    (threads <= 1024 && threads.is_multiple_of(32)).then_some(threads)
}

/// Whether segments are of few tokens: a step of decoding has about one of each.
fn is_step(op: &ops::SelectiveScan) -> bool {
    op.inputs.u.rows <= 2 * op.inputs.segments.table.rows && op.saved.is_none()
}

/// Forward of such segments, by blocks of so many threads; perhaps with the convolution before, and whether u is kept.
fn step(c: &mut Call, op: &ops::SelectiveScan, conv: Option<(&Forward, bool)>, threads: usize) -> Result<()> {
    let (inputs, state_out) = (Inputs::new(c, &op.inputs)?, c.maybe_f32("state_out", op.state_out)?);
    let (channels, d_state, out) = (inputs.channels, inputs.tiles.d_state, c.floats("out", op.out)?);
    let [of_u, of_delta, of_p, of_states, ..] = inputs.defines(false);
    let mut defines = vec![of_u, of_delta, of_p, of_states, ("T_OUT", out.of())];
    let blocks = c.int("channels", (channels * step_lanes(d_state)).div_ceil(threads))?;
    let grid = [blocks, inputs.segments.capacity as u32, 1];
    let shape = Shape { grid, block: [threads as u32, 1, 1], shared_bytes: 0 };
    let mut arguments = inputs.arguments(inputs.state).maybe_rows(state_out).place(&out).int(channels as u32);
    if let Some((conv, keeps)) = conv {
        defines.extend(conv.step_defines());
        arguments = conv.step_arguments(arguments, keeps);
    }
    c.launch((&source::SELECTIVE_SCAN_STEP, "selective_scan_step"), &defines, shape, &arguments)
}

/// The convolution, and the scan of what it makes: in one launch where segments are of few tokens. In one of many, what the
/// preparing threads of `selective_scan16.cu` had to do more took longer than the bytes of u do.
pub(in crate::backend::cuda) fn conv_scan(c: &mut Call, op: &ops::ConvScan) -> Result<()> {
    let conv = Forward::new(c, &op.conv)?;
    if is_step(&op.scan)
        && let Some(threads) = step_threads(op.scan.inputs.d_state(), conv.a_head())
    {
        return step(c, &op.scan, Some((&conv, op.keeps)), threads);
    }
    conv::launch(c, &conv)?;
    selective_scan(c, &op.scan)
}

pub(in crate::backend::cuda) fn selective_scan(c: &mut Call, op: &ops::SelectiveScan) -> Result<()> {
    if is_step(op) {
        return step(c, op, None, STEP_THREADS);
    }
    let inputs = Inputs::new(c, &op.inputs)?;
    let (state_out, saved) = (c.maybe_f32("state_out", op.state_out)?, c.maybe_f32("saved", op.saved)?);
    let out = c.floats("out", op.out)?;
    let mut places = vec![inputs.u, inputs.delta, out];
    places.extend(inputs.places_in(&op.inputs, &inputs.projected));
    let of_16: Vec<Place> = places.iter().copied().chain(saved).collect();
    let in_sixteens = inputs.in_sixteens(c, &op.inputs, &of_16, &out, scan16_bytes());
    let parts = inputs.cut(c, in_sixteens);
    let mut state = inputs.state;
    if parts.tokens.is_some() {
        let room = c.scratch(parts.bytes(inputs.channels, inputs.tiles.d_state))?;
        let scanned = Scanned { x: &inputs.u, by: inputs.b, groups: op.inputs.groups_b, gate: None, back: false };
        state = Some(enter(c, &inputs, &parts, scanned, state, room)?);
    }
    let arguments = parts.arguments(inputs.arguments(state)).maybe_rows(state_out).maybe_rows(saved).place(&out);
    if in_sixteens {
        let [of_u, of_delta, of_p, ..] = inputs.defines(true);
        let arguments = arguments.int(inputs.tiles.count as u32);
        let shape = inputs.shape16(&parts, 512, scan16_bytes());
        let defines = [of_u, of_delta, of_p, ("T_OUT", out.of()), parts.define()];
        return c.launch((&source::SELECTIVE_SCAN16, "selective_scan16"), &defines, shape, &arguments);
    }
    let projected = inputs.projected.dtype.size();
    let row = inputs.u.dtype.size() + inputs.delta.dtype.size() + projected;
    let mut defines = inputs.defines(inputs.tiles.vector(&places)).to_vec();
    defines.extend([("T_OUT", out.of()), ("GROUP", Tiles::number(SCAN_CHUNK)), parts.define()]);
    let shape = inputs.tiles.shape(&parts, inputs.tiles.forward_shared_bytes(row, projected));
    if shape.shared_bytes as usize + RESERVED_BYTES > c.limits().shared_bytes {
        return Err(c.unsupported("a scan", format!("{} states a channel", inputs.tiles.d_state)));
    }
    c.launch((&source::SELECTIVE_SCAN, "selective_scan"), &defines, shape, &arguments)
}

pub(in crate::backend::cuda) fn selective_scan_backward(c: &mut Call, op: &ops::SelectiveScanBackward) -> Result<()> {
    let inputs = Inputs::new(c, &op.inputs)?;
    let (tiles, tokens) = (inputs.tiles, inputs.u.rows);
    let (channels, d_state) = (inputs.channels, tiles.d_state);
    let (saved, dout) = (c.f32("saved", op.saved)?, c.floats("dout", op.dout)?);
    let dstate_out = c.maybe_f32("dstate_out", op.dstate_out)?;
    let (du, ddelta, da) = (c.floats("du", op.du)?, c.floats("ddelta", op.ddelta)?, c.f32("da", op.da)?);
    let dprojected = c.floats("dprojected", op.dprojected)?;
    let (dd, dbias) = (c.maybe_f32("dd", op.dd)?, c.maybe_f32("ddelta_bias", op.ddelta_bias)?);
    let dstate_in = c.maybe_f32("dstate_in", op.dstate_in)?;

    let mut places = vec![inputs.u, inputs.delta, dout, du, ddelta];
    places.extend(inputs.places_in(&op.inputs, &inputs.projected).chain(inputs.places_in(&op.inputs, &dprojected)));
    let vector = tiles.vector(&places);
    let group = tiles.backward_group(vector);
    places.push(saved);
    let projected = inputs.projected.dtype.size();
    let row = inputs.u.dtype.size() + inputs.delta.dtype.size() + dout.dtype.size() + projected;
    let bytes16 = scan16_backward_bytes(dout.dtype.size());
    let in_sixteens = inputs.in_sixteens(c, &op.inputs, &places, &dprojected, bytes16);
    let mut defines = inputs.defines(vector).to_vec();
    let types = [("T_DOUT", &dout), ("T_DU", &du), ("T_DDELTA", &ddelta), ("T_DP", &dprojected)];
    let types_of_gradients = types.map(|(name, place)| (name, place.of()));
    defines.extend(types_of_gradients);
    let parts = inputs.cut(c, in_sixteens);
    defines.extend([("GROUP", Tiles::number(group)), parts.define()]);

    let a_group = tiles.a_group();
    let by_token = a_group.map(|count| if count > 1 { 4 * tokens * tiles.count * d_state } else { 0 });
    let [passed, spans, entering] = parts.bytes(channels, d_state);
    let (by_a, by_d) = (4 * parts.count * channels * d_state, 8 * parts.count * channels);
    let [partial_b, partial_c, partial_a, partial_d, passed, spans, entering] =
        c.scratch([by_token[0], by_token[1], by_a, by_d, passed, spans, entering])?;
    let partials = [(partial_b, by_token[0]), (partial_c, by_token[1])];
    let db = dprojected.columns(op.inputs.b_col, op.inputs.groups_b * d_state);
    let dc = dprojected.columns(op.inputs.c_col, op.inputs.groups_c * d_state);
    let dz = dprojected.columns(op.inputs.z_col.unwrap_or(0), channels);

    let mut dstate = dstate_out;
    if parts.tokens.is_some() {
        let scanned = Scanned { x: &dout, by: inputs.c, groups: op.inputs.groups_c, gate: inputs.z, back: true };
        dstate = Some(enter(c, &inputs, &parts, scanned, dstate, [passed, spans, entering])?);
    }
    let arguments = parts.arguments(inputs.arguments(None)).place(&saved).size(saved.rows).place(&dout);
    let arguments = arguments.maybe_rows(dstate).place(&du).place(&ddelta).place(&dz);
    let and_sums = |arguments: Arguments| {
        arguments.pointer(partial_a).pointer(partial_d).int(channels as u32).maybe_rows(dstate_in)
    };
    let (source, of_dp) = (&source::SELECTIVE_SCAN_BACKWARD, ("T_DP", dprojected.of()));
    if in_sixteens {
        // Where dB, or dC, of tiles lie: in parts that are still to be added, or where they belong.
        let cols = tiles.count * d_state;
        let [of_b, of_c] = [(partials[0], db), (partials[1], dc)].map(|((start, bytes), whole)| match bytes {
            0 => whole,
            _ => Place { start, dtype: DType::F32, rows: tokens, cols, stride: cols },
        });
        let arguments = and_sums(arguments.place(&of_b).place(&of_c));
        let [of_u, of_delta, of_p, ..] = inputs.defines(true);
        let defines = [
            &[of_u, of_delta, of_p, ("T_DB", of_b.of()), ("T_DC", of_c.of()), parts.define()],
            &types_of_gradients[..],
        ]
        .concat();
        let arguments = arguments.int(tiles.count as u32);
        let shape = inputs.shape16(&parts, 256, bytes16);
        let source = &source::SELECTIVE_SCAN16_BACKWARD;
        c.launch((source, "selective_scan16_backward"), &defines, shape, &arguments)?;
    } else {
        let given = partials.map(|(pointer, bytes)| if bytes > 0 { pointer } else { 0 });
        let arguments = and_sums(arguments.place(&db).place(&dc).pointer(given[0]).pointer(given[1]));
        let shape = tiles.shape(&parts, tiles.backward_shared_bytes(row, projected, group));
        if shape.shared_bytes as usize + RESERVED_BYTES > c.limits().shared_bytes {
            return Err(c.unsupported("a scan's backward", format!("{d_state} states a channel")));
        }
        c.launch((source, "selective_scan_backward"), &defines, shape, &arguments)?;
    }

    for ((partial, bytes), (count, out)) in partials.into_iter().zip(a_group.into_iter().zip([db, dc])) {
        if bytes > 0 {
            let arguments = Arguments::new().pointer(partial).size(tokens).int(tiles.count as u32);
            let arguments = arguments.int(count as u32).int(d_state as u32).place(&out);
            c.launch((&source::SCAN_SUMS, "scan_group_sum"), &[of_dp], each(tokens, out.cols), &arguments)?;
        }
    }
    let arguments = Arguments::new().pointer(partial_a).pointer(partial_d).pointer(inputs.segments.table);
    let arguments = parts.arguments(arguments).size(tokens).int(channels as u32);
    let arguments = arguments.int(d_state as u32).place(&da).maybe(dd).maybe(dbias);
    let sums = each(1, channels * (d_state + 2));
    let by_value = Shape { grid: [sums.grid[1], 1, 1], ..sums };
    c.launch((&source::SCAN_SUMS, "scan_segment_sum"), &[of_dp], by_value, &arguments)
}
