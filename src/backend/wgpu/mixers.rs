//! The convolution and the scan.

use super::SCAN_CHUNK;
use super::call::Call;
use super::scratch::Slot;
use super::shaders::{self, Kernel, Shader};
use crate::backend::{DType, Error, Result, View, ops};

/// Channels that a workgroup of `conv1d.wgsl` takes.
const LANES: usize = 64;
/// Rows of a chunk in `conv1d.wgsl`.
const CONV_CHUNK: usize = 32;
/// Vectors of four states of a channel for which the scan's tiles fit into workgroup memory.
const LEAST_QUADS: usize = 2;
const MOST_QUADS: usize = 16;
/// Taps that an invocation of `conv1d.wgsl` holds at most.
const MOST_TAPS: usize = 16;

/// The dtype that views have in common.
pub(super) fn common(call: &Call, views: &[View]) -> Result<DType> {
    let dtype = views.first().map_or(DType::F32, |view| view.dtype);
    match views.iter().find(|view| view.dtype != dtype) {
        None => Ok(dtype),
        Some(other) => {
            let what = format!("{} beside {dtype}", other.dtype);
            Err(Error::Unsupported { backend: "wgpu", op: call.op, what })
        }
    }
}

/// That views are f32.
pub(super) fn f32s(call: &Call, views: impl IntoIterator<Item = View>) -> Result<()> {
    views.into_iter().try_for_each(|view| match view.dtype {
        DType::F32 => Ok(()),
        other => Err(Error::Unsupported { backend: "wgpu", op: call.op, what: format!("{other} where f32 is kept") }),
    })
}

/// A switch as the shaders take it.
pub(super) fn flag(on: bool) -> usize {
    usize::from(on)
}

/// The most chunks of `length` rows that `tokens` rows of `segments` segments can be.
pub(super) fn chunks(tokens: usize, segments: usize, length: usize) -> usize {
    tokens / length + segments.min(tokens)
}

/// Rows of the sums of the convolution's backward.
pub(super) fn conv_chunks(tokens: usize, segments: usize) -> usize {
    chunks(tokens, segments, CONV_CHUNK)
}

/// Slots that all states have; at least 1, which is not touched where there is no state.
fn slots<const N: usize>(states: [Option<View>; N]) -> usize {
    states.into_iter().flatten().map(|state| state.rows).min().unwrap_or(1).max(1)
}

/// A convolution whose sizes and parameters the shader can take: the dtypes of its activations and of its parameters.
fn conv_kernel(
    call: &Call,
    entry: &'static str,
    shape: &ops::ConvShape,
    activations: &[View],
    parameters: (View, Option<View>),
    states: [Option<View>; 2],
) -> Result<Kernel> {
    if shape.width > MOST_TAPS {
        let what = format!("{} taps, more than {MOST_TAPS}", shape.width);
        return Err(Error::Unsupported { backend: "wgpu", op: call.op, what });
    }
    f32s(call, states.into_iter().flatten())?;
    let (weight, bias) = parameters;
    let types = [common(call, activations)?, common(call, &[weight, bias.unwrap_or(weight)])?];
    Ok(shaders::CONV1D.kernel(entry, &types).with("WIDTH", shape.width as u32))
}

pub(super) fn conv1d(call: &mut Call, op: &ops::Conv1d) -> Result<()> {
    let (shape, table, tokens) = (&op.shape, op.segments.table, op.projected.rows);
    let states = [op.state_in, op.state_out];
    call.check([op.projected, op.segments.positions])?;
    call.check(states.into_iter().flatten())?;
    let x = op.projected.col_range(op.x_col, shape.channels_in)?;
    let in_place = op.state_in.is_some() && op.state_in == op.state_out;
    let state_in = op.state_in.filter(|_| !in_place);
    let kernel = conv_kernel(call, "forward", shape, &[x, op.out], (op.weight, op.bias), states)?;
    call.dispatch(kernel)
        .read(table)
        .read(x)
        .read(op.weight)
        .maybe_read(op.bias)
        .maybe_read(state_in)
        .maybe_write(op.state_out)
        .write(op.out)
        .size(table.rows)
        .size(tokens)
        .size(shape.channels_in)
        .size(shape.head)
        .size(shape.repeat)
        .size(slots(states))
        .size(flag(shape.repeat_first))
        .size(flag(op.bias.is_some()))
        .size(flag(op.state_in.is_some()))
        .size(flag(op.state_out.is_some()))
        .size(flag(in_place))
        .grid([shape.channels_in.div_ceil(LANES), conv_chunks(tokens, table.rows), 1])
}

pub(super) fn conv1d_backward(call: &mut Call, op: &ops::Conv1dBackward) -> Result<()> {
    let (shape, table, tokens) = (&op.shape, op.segments.table, op.projected.rows);
    let states = [op.state_in, op.dstate_out, op.dstate_in];
    call.check([op.projected, op.dprojected, op.dout, op.weight, table, op.segments.positions])?;
    call.check(states.into_iter().chain([op.bias, op.dweight, op.dbias]).flatten())?;
    f32s(call, [op.dstate_in, op.dweight, op.dbias].into_iter().flatten())?;
    let x = op.projected.col_range(op.x_col, shape.channels_in)?;
    let dx = op.dprojected.col_range(op.x_col, shape.channels_in)?;
    let (most_chunks, filters) = (conv_chunks(tokens, table.rows), shape.filters());
    let sums = call.scratch(Slot::Partials, most_chunks, filters * (shape.width + 1))?;
    let parameters = (op.weight, op.bias);
    let kernel = conv_kernel(call, "backward", shape, &[x, op.dout, dx], parameters, [op.state_in, op.dstate_out])?;
    call.dispatch(kernel)
        .read(table)
        .read(x)
        .read(op.weight)
        .maybe_read(op.bias)
        .maybe_read(op.state_in)
        .read(op.dout)
        .maybe_read(op.dstate_out)
        .write(dx)
        .maybe_write(op.dstate_in)
        .write(sums)
        .size(table.rows)
        .size(tokens)
        .size(shape.channels_in)
        .size(shape.head)
        .size(shape.repeat)
        .size(slots(states))
        .size(flag(shape.repeat_first))
        .size(flag(op.bias.is_some()))
        .size(flag(op.state_in.is_some()))
        .size(flag(op.dstate_out.is_some()))
        .size(flag(op.dstate_in.is_some()))
        .grid([shape.channels_in.div_ceil(LANES), most_chunks, 1])?;
    if op.dweight.is_none() && op.dbias.is_none() {
        return Ok(());
    }
    let kernel = shaders::CONV1D.kernel("reduce", &[DType::F32, DType::F32]).with("WIDTH", shape.width as u32);
    call.dispatch(kernel)
        .read(table)
        .read(sums)
        .maybe_write(op.dweight)
        .maybe_write(op.dbias)
        .size(table.rows)
        .size(tokens)
        .size(filters)
        .size(flag(op.dweight.is_some()))
        .size(flag(op.dbias.is_some()))
        .grid([(filters * (shape.width + 1)).div_ceil(LANES), 1, 1])
}

/// How the scan is cut into workgroups.
struct ScanBlocks {
    /// Neighbouring channels that share their groups of B and of C.
    run: usize,
    /// Channels of a block.
    channels: usize,
    /// Vectors of four states of a channel, a power of two.
    quads: usize,
    /// Blocks of a run.
    of_run: usize,
}

pub(super) fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl ScanBlocks {
    fn new(call: &Call, inputs: &ops::ScanInputs) -> Result<Self> {
        let quads = inputs.d_state().div_ceil(4).next_power_of_two().max(LEAST_QUADS);
        let channels = inputs.channels();
        if quads > MOST_QUADS {
            let what = format!("{} states a channel, more than {}", inputs.d_state(), 4 * MOST_QUADS);
            return Err(Error::Unsupported { backend: "wgpu", op: call.op, what });
        }
        let run = gcd(channels / inputs.groups_b, channels / inputs.groups_c);
        let block = LANES / quads;
        Ok(ScanBlocks { run, channels: block, quads, of_run: run.div_ceil(block) })
    }

    /// Blocks of so many channels, whole runs.
    fn of(&self, channels: usize) -> usize {
        channels / self.run * self.of_run
    }

    fn kernel(&self, shader: &'static Shader, entry: &'static str, types: &[DType]) -> Kernel {
        shader.kernel(entry, types).with("CHANNELS", self.channels as u32).with("QUADS", self.quads as u32)
    }
}

/// That what the scan keeps in f32 is f32, and `saved` has a row for each tile.
fn check_scan(call: &Call, inputs: &ops::ScanInputs, saved: Option<View>, kept: &[Option<View>]) -> Result<()> {
    let own = [Some(inputs.a), inputs.d, inputs.delta_bias, inputs.state_in, saved];
    f32s(call, own.into_iter().chain(kept.iter().copied()).flatten())?;
    let needed = ops::ScanInputs::saved_rows(inputs.u.rows, 0, SCAN_CHUNK);
    match saved {
        Some(saved) if saved.rows < needed => {
            let what = format!("saved has {} rows, of at least {needed}", saved.rows);
            Err(Error::Argument { op: call.op, what })
        }
        _ => Ok(()),
    }
}

pub(super) fn selective_scan(call: &mut Call, op: &ops::SelectiveScan) -> Result<()> {
    let (inputs, table, tokens) = (&op.inputs, op.inputs.segments.table, op.inputs.u.rows);
    let blocks = ScanBlocks::new(call, inputs)?;
    let in_place = inputs.state_in.is_some() && inputs.state_in == op.state_out;
    check_scan(call, inputs, op.saved, &[op.state_out])?;
    call.check([inputs.segments.positions])?;
    call.check(inputs.state_in)?;
    let dtype = common(call, &[inputs.u, inputs.delta, inputs.projected, op.out])?;
    call.dispatch(blocks.kernel(&shaders::SELECTIVE_SCAN, "forward", &[dtype]))
        .read(table)
        .read(inputs.u)
        .read(inputs.delta)
        .read(inputs.a)
        .read(inputs.projected)
        .maybe_read(inputs.d)
        .maybe_read(inputs.delta_bias)
        .maybe_read(inputs.state_in.filter(|_| !in_place))
        .maybe_write(op.state_out)
        .maybe_write(op.saved)
        .write(op.out)
        .size(tokens)
        .size(inputs.d_state())
        .size(inputs.b_col)
        .size(inputs.c_col)
        .size(inputs.z_col.unwrap_or(0))
        .size(inputs.channels() / inputs.groups_b)
        .size(inputs.channels() / inputs.groups_c)
        .size(blocks.run)
        .size(slots([inputs.state_in, op.state_out]))
        .size(op.saved.map_or(1, |saved| saved.rows.max(1)))
        .size(flag(inputs.z_col.is_some()))
        .size(flag(inputs.d.is_some()))
        .size(flag(inputs.delta_bias.is_some()))
        .size(flag(inputs.softplus))
        .size(flag(inputs.state_in.is_some()))
        .size(flag(op.state_out.is_some()))
        .size(flag(in_place))
        .size(flag(op.saved.is_some_and(|saved| saved.rows > 0)))
        .grid([blocks.of(inputs.channels()), table.rows, 1])
}

/// What the workgroups of the scan's backward leave to each other: first the sums of parameters, then parts of dB and of dC.
pub(super) struct ScanSums {
    /// Blocks of all channels, of a group of B, of a group of C.
    total: usize,
    of_b: usize,
    of_c: usize,
    /// Where the parts of dB and of dC start; 0 where a group is one block, which writes its gradient itself.
    start_b: usize,
    start_c: usize,
    /// Values in all.
    pub len: usize,
}

impl ScanSums {
    pub fn new(call: &Call, inputs: &ops::ScanInputs) -> Result<Self> {
        let (tokens, channels, d_state) = (inputs.u.rows, inputs.channels(), inputs.d_state());
        let total = ScanBlocks::new(call, inputs)?.of(channels);
        let [of_b, of_c] = [inputs.groups_b, inputs.groups_c].map(|groups| total / groups);
        let parameters = inputs.segments.table.rows * channels * (d_state + 2);
        let parts = |blocks: usize| if blocks > 1 { tokens * total * d_state } else { 0 };
        let start_b = if of_b > 1 { parameters } else { 0 };
        let start_c = if of_c > 1 { parameters + parts(of_b) } else { 0 };
        Ok(ScanSums { total, of_b, of_c, start_b, start_c, len: parameters + parts(of_b) + parts(of_c) })
    }
}

pub(super) fn selective_scan_backward(call: &mut Call, op: &ops::SelectiveScanBackward) -> Result<()> {
    let (inputs, table, tokens) = (&op.inputs, op.inputs.segments.table, op.inputs.u.rows);
    let (channels, d_state) = (inputs.channels(), inputs.d_state());
    let blocks = ScanBlocks::new(call, inputs)?;
    check_scan(call, inputs, Some(op.saved), &[op.dstate_out, op.dstate_in, Some(op.da), op.dd, op.ddelta_bias])?;
    call.check([table, inputs.segments.positions, inputs.u, inputs.delta, inputs.a, inputs.projected, op.saved])?;
    call.check([op.dout, op.du, op.ddelta, op.da, op.dprojected])?;
    call.check([inputs.d, inputs.delta_bias, inputs.state_in, op.dstate_out].into_iter().flatten())?;
    call.check([op.dstate_in, op.dd, op.ddelta_bias].into_iter().flatten())?;
    let activations = [inputs.u, inputs.delta, inputs.projected, op.dout, op.du, op.ddelta, op.dprojected];
    let dtype = common(call, &activations)?;

    let ScanSums { total, of_b, of_c, start_b, start_c, len } = ScanSums::new(call, inputs)?;
    let sums = call.scratch(Slot::Partials, 1, len)?;
    call.dispatch(blocks.kernel(&shaders::SELECTIVE_SCAN_BACKWARD, "backward", &[dtype]))
        .read(table)
        .read(inputs.u)
        .read(inputs.delta)
        .read(inputs.a)
        .read(inputs.projected)
        .maybe_read(inputs.d)
        .maybe_read(inputs.delta_bias)
        .read(op.saved)
        .read(op.dout)
        .maybe_read(op.dstate_out)
        .write(op.du)
        .write(op.ddelta)
        .write(op.dprojected)
        .maybe_write(op.dstate_in)
        .write(sums)
        .size(tokens)
        .size(channels)
        .size(d_state)
        .size(inputs.b_col)
        .size(inputs.c_col)
        .size(inputs.z_col.unwrap_or(0))
        .size(channels / inputs.groups_b)
        .size(channels / inputs.groups_c)
        .size(blocks.run)
        .size(slots([op.dstate_out, op.dstate_in]))
        .size(op.saved.rows.max(1))
        .size(start_b)
        .size(start_c)
        .size(flag(inputs.z_col.is_some()))
        .size(flag(inputs.d.is_some()))
        .size(flag(inputs.delta_bias.is_some()))
        .size(flag(inputs.softplus))
        .size(flag(op.dstate_out.is_some()))
        .size(flag(op.dstate_in.is_some()))
        .grid([total, table.rows, 1])?;

    call.dispatch(shaders::SELECTIVE_SCAN_BACKWARD.kernel("reduce_parameters", &[DType::F32]))
        .read(table)
        .read(sums)
        .write(op.da)
        .maybe_write(op.dd)
        .maybe_write(op.ddelta_bias)
        .size(table.rows)
        .size(tokens)
        .size(channels)
        .size(d_state)
        .size(flag(op.dd.is_some()))
        .size(flag(op.ddelta_bias.is_some()))
        .grid([(channels * (d_state + 2)).div_ceil(LANES), 1, 1])?;
    let groups = [(start_b, of_b, inputs.b_col, inputs.groups_b), (start_c, of_c, inputs.c_col, inputs.groups_c)];
    for (start, of_group, col, groups) in groups.into_iter().filter(|(start, ..)| *start > 0) {
        let dgroups = op.dprojected.col_range(col, groups * d_state)?;
        call.dispatch(shaders::SELECTIVE_SCAN_BACKWARD.kernel("reduce_groups", &[dtype]))
            .read(sums)
            .write(dgroups)
            .size(tokens)
            .size(d_state)
            .size(groups)
            .size(start)
            .size(total)
            .size(of_group)
            .grid([(groups * d_state).div_ceil(LANES), tokens, 1])?;
    }
    Ok(())
}
