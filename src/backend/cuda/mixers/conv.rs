//! The convolution's launches: `kernels/conv1d.cu` and `kernels/conv1d_backward.cu`.

use crate::backend::cuda::call::{Call, Place, SegmentsPlace, each};
use crate::backend::cuda::driver::{Arguments, Shape};
use crate::backend::cuda::source::{self, Value};
use crate::backend::{Largest, Result, ops};

/// The most rows that a block takes, CONV_ROWS of the kernels.
const ROWS: usize = 64;
/// Threads of a block, and blocks a multiprocessor.
const THREADS: usize = 128;
const BLOCKS: usize = 4;

/// Bytes of scratch that calls of these sizes take, for filters of four taps.
pub(super) fn scratch_bytes(largest: &Largest) -> usize {
    partial_bytes(largest.tokens, largest.width, 4)
}

/// Bytes of the row blocks' sums of a filter's taps and bias.
fn partial_bytes(tokens: usize, filters: usize, taps: usize) -> usize {
    tokens.div_ceil(ROWS).saturating_mul(filters).saturating_mul(4 * (taps + 1))
}

/// What a thread of `conv1d` takes: of so many repeats, and of so many neighbouring channels.
fn unit(shape: &ops::ConvShape, x: &Place, out: &Place) -> (usize, usize) {
    let repeats = [4, 3, 2, 1].into_iter().find(|&repeats| shape.repeat.is_multiple_of(repeats)).unwrap_or(1);
    let aligned = |place: &Place| place.alignment() >= 2 * place.dtype.size();
    let pack = if shape.head.is_multiple_of(2) && aligned(x) && aligned(out) { 2 } else { 1 };
    (repeats, pack)
}

/// What the convolution's forward reads and writes.
pub(super) struct Forward {
    shape: ops::ConvShape,
    x: Place,
    weight: Place,
    bias: Option<Place>,
    segments: SegmentsPlace,
    state_in: Option<Place>,
    state_out: Option<Place>,
    out: Place,
}

impl Forward {
    pub(super) fn new(c: &Call, op: &ops::Conv1d) -> Result<Self> {
        let shape = op.shape;
        c.int("channels", shape.channels_out())?;
        let weight = c.floats("weight", op.weight)?;
        Ok(Forward {
            shape,
            x: c.floats("projected", op.projected)?.columns(op.x_col, shape.channels_in),
            weight,
            bias: op.bias.map(|bias| c.like("bias", bias, &weight)).transpose()?,
            segments: c.segments(&op.segments)?,
            state_in: c.maybe_f32("state_in", op.state_in)?,
            state_out: c.maybe_f32("state_out", op.state_out)?,
            out: c.floats("out", op.out)?,
        })
    }

    /// Output channels of a head.
    pub(super) fn a_head(&self) -> usize {
        self.shape.head * self.shape.repeat
    }

    /// The macros of `selective_scan_step.cu`.
    pub(super) fn step_defines(&self) -> [(&'static str, Value); 4] {
        let [taps, head] = [self.shape.width, self.shape.head].map(|number| Value::Number(number as u32));
        [("TAPS", taps), ("HEAD", head), ("T_X", self.x.of()), ("T_W", self.weight.of())]
    }

    /// Its parameters OF_CONV, with u written if it is kept.
    pub(super) fn step_arguments(&self, arguments: Arguments, keeps: bool) -> Arguments {
        let arguments = arguments.place(&self.x).place(&self.weight).maybe(self.bias);
        let arguments = arguments.int(self.shape.repeat_first.into());
        arguments.maybe_rows(self.state_in).maybe_rows(self.state_out).maybe_place(keeps.then_some(self.out))
    }
}

pub(in crate::backend::cuda) fn conv1d(c: &mut Call, op: &ops::Conv1d) -> Result<()> {
    let forward = Forward::new(c, op)?;
    launch(c, &forward)
}

pub(super) fn launch(c: &mut Call, forward: &Forward) -> Result<()> {
    let &Forward { ref shape, x, weight, bias, segments, state_in, state_out, out } = forward;
    let channels_in = c.int("channels", shape.channels_in)?;
    let (capacity, taps) = (c.int("segments", segments.capacity)?, c.int("taps", shape.width)?);
    let slots = state_in.map_or(0, |state| state.rows);
    let (repeats, pack) = unit(shape, &x, &out);
    let [repeats_of, pack_of] = [repeats, pack].map(|number| Value::Number(number as u32));
    let types = [("T_X", x.of()), ("T_W", weight.of()), ("T_OUT", out.of()), ("TAPS", Value::Number(taps))];
    let defines = [&types[..], &[("REPEAT", repeats_of), ("PACK", pack_of)]].concat();

    let (head, repeat) = (c.int("head", shape.head)?, c.int("repeat", shape.repeat)?);
    if x.rows <= 2 * segments.capacity {
        let arguments = Arguments::new().place(&x).place(&weight).maybe(bias).pointer(segments.table).size(x.rows);
        let arguments = arguments.int(channels_in).int(head).int(repeat).int(shape.repeat_first.into());
        let arguments = arguments.maybe_place(state_in).size(slots).maybe_place(state_out);
        let arguments = arguments.size(state_out.map_or(0, |state| state.rows)).place(&out);
        let by_inputs = each(segments.capacity, shape.channels_in);
        return c.launch((&source::CONV1D, "conv1d_step"), &defines, by_inputs, &arguments);
    }
    let arguments = Arguments::new().place(&x).place(&weight).maybe(bias).pointer(segments.table).int(capacity);
    let arguments = arguments.size(x.rows).int(channels_in).int(head).int(repeat).int(shape.repeat_first.into());
    // Where there are few rows, as in a step of decoding, so few a block that every multiprocessor has one.
    let column_blocks = (out.cols / (repeats * pack)).div_ceil(THREADS).min(65535);
    let rows = (x.rows * column_blocks / (BLOCKS * c.limits().multiprocessors)).clamp(1, ROWS);
    let arguments = arguments.maybe_place(state_in).size(slots).place(&out).int(rows as u32);
    let grid = [c.int("row blocks", x.rows.div_ceil(rows))?, column_blocks as u32, 1];
    let by_columns = Shape { grid, block: [THREADS as u32, 1, 1], shared_bytes: 0 };
    c.launch((&source::CONV1D, "conv1d"), &defines, by_columns, &arguments)?;

    let Some(state_out) = state_out else { return Ok(()) };
    let arguments = Arguments::new().place(&x).pointer(segments.table).size(x.rows).int(channels_in);
    let arguments = arguments.maybe_place(state_in).size(slots).place(&state_out).size(state_out.rows);
    c.launch((&source::CONV1D, "conv1d_state"), &defines, each(segments.capacity, shape.channels_in), &arguments)
}

pub(in crate::backend::cuda) fn conv1d_backward(c: &mut Call, op: &ops::Conv1dBackward) -> Result<()> {
    let shape = &op.shape;
    let x = c.floats("projected", op.projected)?.columns(op.x_col, shape.channels_in);
    let weight = c.floats("weight", op.weight)?;
    let bias = op.bias.map(|bias| c.like("bias", bias, &weight)).transpose()?;
    let (state_in, segments) = (c.maybe_f32("state_in", op.state_in)?, c.segments(&op.segments)?);
    let (dout, dstate_out) = (c.floats("dout", op.dout)?, c.maybe_f32("dstate_out", op.dstate_out)?);
    let dx = c.floats("dprojected", op.dprojected)?.columns(op.x_col, shape.channels_in);
    let (dweight, dbias) = (c.maybe_f32("dweight", op.dweight)?, c.maybe_f32("dbias", op.dbias)?);
    let dstate_in = c.maybe_f32("dstate_in", op.dstate_in)?;
    let (filters, head) = (c.int("filters", shape.filters())?, c.int("head", shape.head)?);
    let (taps, repeat) = (c.int("taps", shape.width)?, c.int("repeat", shape.repeat)?);
    let (capacity, channels_in) = (c.int("segments", segments.capacity)?, c.int("channels", shape.channels_in)?);
    let (slots, dstate_slots) = (state_in.map_or(0, |state| state.rows), dstate_out.map_or(0, |state| state.rows));
    let types = [("T_X", x.of()), ("T_W", weight.of()), ("T_DOUT", dout.of()), ("T_DX", dx.of())];
    let [of_x, of_w, of_dout, of_dx] = types;
    let defines = [of_x, of_w, of_dout, of_dx, ("TAPS", Value::Number(taps)), ("REPEAT", Value::Number(repeat))];
    let row_blocks = x.rows.div_ceil(ROWS);
    let [partial] = c.scratch([partial_bytes(x.rows, shape.filters(), shape.width)])?;

    let arguments = Arguments::new().place(&x).place(&weight).maybe(bias).pointer(segments.table).int(capacity);
    let arguments = arguments.size(x.rows).int(filters).int(head).int(shape.repeat_first.into());
    let arguments = arguments.maybe_place(state_in).size(slots).place(&dout);
    let arguments = arguments.maybe_place(dstate_out).size(dstate_slots).place(&dx).pointer(partial);
    let column_blocks = shape.channels_in.div_ceil(THREADS);
    let grid = [c.int("row blocks", row_blocks)?, c.int("column blocks", column_blocks)?, 1];
    let by_columns = Shape { grid, block: [THREADS as u32, 1, 1], shared_bytes: 0 };
    c.launch((&source::CONV1D_BACKWARD, "conv1d_backward"), &defines, by_columns, &arguments)?;

    if dweight.is_some() || dbias.is_some() {
        let arguments = Arguments::new().pointer(partial).int(row_blocks as u32).int(filters);
        let arguments = arguments.maybe_place(dweight).maybe(dbias);
        let sums = each(1, shape.filters() * (shape.width + 1));
        let by_filter = Shape { grid: [sums.grid[1], 1, 1], ..sums };
        c.launch((&source::CONV1D_BACKWARD, "conv1d_backward_sum"), &defines, by_filter, &arguments)?;
    }
    let Some(dstate_in) = dstate_in else { return Ok(()) };
    let arguments = Arguments::new().place(&x).place(&weight).maybe(bias).pointer(segments.table).size(x.rows);
    let arguments = arguments.int(channels_in).int(head).int(shape.repeat_first.into());
    let arguments = arguments.maybe_place(state_in).size(slots).place(&dout);
    let arguments = arguments.maybe_place(dstate_out).size(dstate_slots).place(&dstate_in).size(dstate_in.rows);
    let by_channels = each(segments.capacity, shape.channels_in);
    c.launch((&source::CONV1D_BACKWARD, "conv1d_backward_state"), &defines, by_channels, &arguments)
}
