//! The mixers where their matrices do not fit into a binding: heads and channels are independent, so an op is run on a block
//! of columns at a time. What is still too far apart in its buffer comes as a copy, see `Dispatch`.

use super::call::{Call, blocks};
use super::scratch::Slot;
use super::{attention, mixers, rows};
use crate::backend::{DType, Out, Result, View, ops};

/// Whether bindings can show all of some views in place.
fn shown(call: &Call, views: impl IntoIterator<Item = View>) -> bool {
    views.into_iter().all(|view| view.span().len() <= call.values_at_once(&[view]))
}

/// How many units a binding can show, of matrices with so many columns a unit.
fn units_at_once<const N: usize>(call: &Call, matrices: [(View, usize); N]) -> usize {
    let of = |(view, cols): (View, usize)| call.values_at_once(&[view]) / (view.rows * cols).max(1);
    matrices.map(of).into_iter().min().unwrap_or(0)
}

/// The same columns of an argument that may be absent.
fn cols_of(view: Option<View>, first: usize, count: usize) -> Result<Option<View>> {
    view.map(|view| view.col_range(first, count)).transpose()
}

/// Key heads `first..first + count`, with `queries` of the query heads that read them, from head `query` on.
struct Heads {
    first: usize,
    count: usize,
    query: usize,
    queries: usize,
}

impl Heads {
    /// All heads, in blocks of whole groups or, where no group fits, of a part of one.
    fn blocks(shape: &ops::AttentionShape, keys_at_once: usize, queries_at_once: usize) -> Vec<Heads> {
        let group = shape.heads / shape.kv_heads;
        let whole = keys_at_once.min(queries_at_once / group);
        if whole > 0 {
            let block = |(first, count)| Heads { first, count, query: first * group, queries: count * group };
            return blocks(shape.kv_heads, whole).map(block).collect();
        }
        let of_group = |first: usize| {
            let part = move |(at, queries)| Heads { first, count: 1, query: first * group + at, queries };
            blocks(group, queries_at_once.max(1)).map(part)
        };
        (0..shape.kv_heads).flat_map(of_group).collect()
    }

    fn shape(&self, shape: &ops::AttentionShape) -> ops::AttentionShape {
        ops::AttentionShape { heads: self.queries, kv_heads: self.count, ..*shape }
    }

    /// Their columns of queries, and of keys.
    fn queries(&self, view: View, head_dim: usize) -> Result<View> {
        view.col_range(self.query * head_dim, self.queries * head_dim)
    }

    fn keys(&self, view: View, head_dim: usize) -> Result<View> {
        view.col_range(self.first * head_dim, self.count * head_dim)
    }
}

pub(super) fn attention(call: &mut Call, op: &ops::Attention) -> Result<()> {
    let (ops::Keys::Rows { k, v } | ops::Keys::Pages { k, v, .. }) = op.keys;
    if shown(call, [op.q, op.out, k, v].into_iter().chain(op.lse)) {
        return attention::attention(call, op);
    }
    call.check([op.q, op.out, k, v].into_iter().chain(op.lse))?;
    let head_dim = op.shape.head_dim;
    let keys_at_once = units_at_once(call, [(k, head_dim), (v, head_dim)]);
    let queries_at_once = units_at_once(call, [(op.q, head_dim), (op.out, head_dim)]);
    for heads in Heads::blocks(&op.shape, keys_at_once, queries_at_once) {
        let (k, v) = (heads.keys(k, head_dim)?, heads.keys(v, head_dim)?);
        let keys = match op.keys {
            ops::Keys::Rows { .. } => ops::Keys::Rows { k, v },
            ops::Keys::Pages { pages, page_size, .. } => ops::Keys::Pages { k, v, pages, page_size },
        };
        let block = ops::Attention {
            shape: heads.shape(&op.shape),
            q: heads.queries(op.q, head_dim)?,
            keys,
            segments: op.segments,
            out: heads.queries(op.out, head_dim)?,
            lse: cols_of(op.lse, heads.query, heads.queries)?,
        };
        attention::attention(call, &block)?;
    }
    Ok(())
}

pub(super) fn attention_backward(call: &mut Call, op: &ops::AttentionBackward) -> Result<()> {
    let views = [op.q, op.k, op.v, op.out, op.lse, op.dout, op.dq, op.dk, op.dv];
    if shown(call, views) {
        return attention::attention_backward(call, op);
    }
    call.check(views)?;
    let (head_dim, group) = (op.shape.head_dim, op.shape.heads / op.shape.kv_heads);
    let keys_at_once = units_at_once(call, [op.k, op.v, op.dk, op.dv].map(|view| (view, head_dim)));
    let queries_at_once = units_at_once(call, [op.q, op.out, op.dout, op.dq].map(|view| (view, head_dim)));
    for heads in Heads::blocks(&op.shape, keys_at_once, queries_at_once) {
        let [dk, dv] = [heads.keys(op.dk, head_dim)?, heads.keys(op.dv, head_dim)?];
        // What a part of a group leaves to its keys adds to what the parts before it left.
        let adds = !heads.query.is_multiple_of(group);
        let mut own = |slot, view: View| {
            if adds { call.scratch_of(view.dtype, Slot::Block(slot), view.rows, view.cols) } else { Ok(view) }
        };
        let block = ops::AttentionBackward {
            shape: heads.shape(&op.shape),
            q: heads.queries(op.q, head_dim)?,
            k: heads.keys(op.k, head_dim)?,
            v: heads.keys(op.v, head_dim)?,
            segments: op.segments,
            out: heads.queries(op.out, head_dim)?,
            lse: op.lse.col_range(heads.query, heads.queries)?,
            dout: heads.queries(op.dout, head_dim)?,
            dq: heads.queries(op.dq, head_dim)?,
            dk: own(0, dk)?,
            dv: own(1, dv)?,
        };
        attention::attention_backward(call, &block)?;
        if adds {
            rows::copy(call, &ops::Copy { src: block.dk, out: Out::add(dk) })?;
            rows::copy(call, &ops::Copy { src: block.dv, out: Out::add(dv) })?;
        }
    }
    Ok(())
}

/// Channels of a convolution: whole heads or, where no head fits, a part of one with one of its repeats.
struct Channels {
    shape: ops::ConvShape,
    /// Input channels, output channels and filters before the block.
    first: usize,
    output: usize,
    filter: usize,
    /// Whether it is the first and the last block over its input channels.
    begins: bool,
    ends: bool,
}

impl Channels {
    /// All channels, for matrices of so many columns an input channel and repeat.
    fn blocks<const N: usize>(
        call: &Call,
        shape: &ops::ConvShape,
        inputs: [View; 2],
        others: [(View, usize); N],
    ) -> Vec<Self> {
        let (shape, head) = (*shape, shape.head);
        let repeats = if shape.repeat_first { shape.repeat } else { 1 };
        let at_once = |channels: usize, repeat: usize| {
            let [x, y] = inputs.map(|view| (view, channels));
            units_at_once(call, [x, y])
                .min(units_at_once(call, others.map(|(view, cols)| (view, cols * channels * repeat))))
        };
        let heads = shape.channels_in / head;
        let whole = at_once(head, shape.repeat);
        if whole > 0 {
            let of_heads = |(first, count)| Channels {
                shape: ops::ConvShape { channels_in: count * head, ..shape },
                first: first * head,
                output: first * head * shape.repeat,
                filter: first * head * repeats,
                begins: true,
                ends: true,
            };
            return blocks(heads, whole).map(of_heads).collect();
        }
        let of_head = |(index, at, count, repeat): (usize, usize, usize, usize)| Channels {
            shape: ops::ConvShape { channels_in: count, head: count, repeat: 1, ..shape },
            first: index * head + at,
            output: (index * shape.repeat + repeat) * head + at,
            filter: (index * repeats + repeat % repeats) * head + at,
            begins: repeat == 0,
            ends: repeat + 1 == shape.repeat,
        };
        let parts = (0..heads).flat_map(|index| blocks(head, at_once(1, 1).max(1)).map(move |part| (index, part)));
        let repeated = parts.flat_map(|(index, (at, n))| (0..shape.repeat).map(move |repeat| (index, at, n, repeat)));
        repeated.map(of_head).collect()
    }

    fn inputs(&self, projected: View, x_col: usize) -> Result<View> {
        projected.col_range(x_col + self.first, self.shape.channels_in)
    }

    fn outputs(&self, view: View) -> Result<View> {
        view.col_range(self.output, self.shape.channels_out())
    }

    /// A filter a row.
    fn weight(&self, view: View) -> Result<View> {
        view.row_range(self.filter, self.shape.filters())
    }

    /// A filter a column.
    fn bias(&self, view: Option<View>) -> Result<Option<View>> {
        cols_of(view, self.filter, self.shape.filters())
    }

    fn state(&self, view: Option<View>) -> Result<Option<View>> {
        cols_of(view, self.first * self.shape.width, self.shape.state())
    }
}

pub(super) fn conv1d(call: &mut Call, op: &ops::Conv1d) -> Result<()> {
    let (shape, states) = (&op.shape, [op.state_in, op.state_out]);
    call.check([op.projected])?;
    let x = op.projected.col_range(op.x_col, shape.channels_in)?;
    if shown(call, [x, op.out].into_iter().chain(states.into_iter().flatten())) {
        return mixers::conv1d(call, op);
    }
    call.check([op.weight, op.out].into_iter().chain(states.into_iter().flatten()).chain(op.bias))?;
    let state = states.into_iter().flatten().next().map_or((x, 0), |state| (state, shape.width));
    for channels in Channels::blocks(call, shape, [x, x], [(op.out, 1), state]) {
        let block = ops::Conv1d {
            shape: channels.shape,
            projected: channels.inputs(op.projected, op.x_col)?,
            x_col: 0,
            weight: channels.weight(op.weight)?,
            bias: channels.bias(op.bias)?,
            segments: op.segments,
            state_in: channels.state(op.state_in)?,
            // All repeats read the state before, which may lie where the state after goes.
            state_out: channels.state(op.state_out.filter(|_| channels.ends))?,
            out: channels.outputs(op.out)?,
        };
        mixers::conv1d(call, &block)?;
    }
    Ok(())
}

pub(super) fn conv1d_backward(call: &mut Call, op: &ops::Conv1dBackward) -> Result<()> {
    let (shape, states) = (&op.shape, [op.state_in, op.dstate_out, op.dstate_in]);
    call.check([op.projected, op.dprojected])?;
    let [x, dx] = [op.projected, op.dprojected].map(|view| view.col_range(op.x_col, shape.channels_in));
    let (x, dx) = (x?, dx?);
    if shown(call, [x, dx, op.dout].into_iter().chain(states.into_iter().flatten())) {
        return mixers::conv1d_backward(call, op);
    }
    call.check([op.weight, op.dout].into_iter().chain(states.into_iter().flatten()))?;
    call.check([op.bias, op.dweight, op.dbias].into_iter().flatten())?;
    let state = states.into_iter().flatten().next().map_or((x, 0), |state| (state, shape.width));
    let chunks = mixers::conv_chunks(x.rows, op.segments.table.rows);
    let sums = (View { dtype: DType::F32, rows: chunks, ..x }, shape.width + 1);
    for channels in Channels::blocks(call, shape, [x, dx], [(op.dout, 1), state, sums]) {
        let dx = channels.inputs(op.dprojected, op.x_col)?;
        let dstate_in = channels.state(op.dstate_in)?;
        // What a repeat leaves to its inputs adds to what the repeats before it left.
        let mut own = |slot, view: View| {
            if channels.begins {
                Ok(view)
            } else {
                call.scratch_of(view.dtype, Slot::Block(slot), view.rows, view.cols)
            }
        };
        let block = ops::Conv1dBackward {
            shape: channels.shape,
            projected: channels.inputs(op.projected, op.x_col)?,
            x_col: 0,
            weight: channels.weight(op.weight)?,
            bias: channels.bias(op.bias)?,
            segments: op.segments,
            state_in: channels.state(op.state_in)?,
            dout: channels.outputs(op.dout)?,
            // The state after is the inputs themselves: no repeat's, so it counts once.
            dstate_out: channels.state(op.dstate_out.filter(|_| channels.begins))?,
            dprojected: own(0, dx)?,
            dweight: op.dweight.map(|view| channels.weight(view)).transpose()?,
            dbias: channels.bias(op.dbias)?,
            dstate_in: dstate_in.map(|view| own(1, view)).transpose()?,
        };
        mixers::conv1d_backward(call, &block)?;
        if !channels.begins {
            let left = [(Some(block.dprojected), Some(dx)), (block.dstate_in, dstate_in)];
            for (src, to) in left.into_iter().filter_map(|(src, to)| src.zip(to)) {
                rows::copy(call, &ops::Copy { src, out: Out::add(to) })?;
            }
        }
    }
    Ok(())
}

/// Channels of a scan: whole groups of B and of C, or neighbours inside of one of each.
struct Neighbours {
    first: usize,
    count: usize,
    /// Channels of a group of B and of C.
    per: [usize; 2],
    d_state: usize,
    /// Whether there is a gate.
    gated: bool,
}

impl Neighbours {
    fn blocks(inputs: &ops::ScanInputs, at_once: usize) -> Vec<Neighbours> {
        let channels = inputs.channels();
        let per = [channels / inputs.groups_b, channels / inputs.groups_c];
        let run = mixers::gcd(per[0], per[1]);
        let period = per[0] / run * per[1];
        let (d_state, gated) = (inputs.d_state(), inputs.z_col.is_some());
        let block = |(first, count)| Neighbours { first, count, per, d_state, gated };
        if at_once >= period {
            return blocks(channels, at_once / period * period).map(block).collect();
        }
        let of_run = |start: usize| blocks(run, at_once).map(move |(first, count)| (start + first, count));
        (0..channels).step_by(run).flat_map(of_run).map(block).collect()
    }

    /// Their groups of B or of C: the first, and how many.
    fn groups(&self, per: usize) -> (usize, usize) {
        (self.first / per, self.count.div_ceil(per))
    }

    /// Columns of `projected` that they need: where they start there and in a matrix of only those, how many, and whether
    /// another block has left a part of their gradient.
    fn columns(&self, inputs: &ops::ScanInputs) -> Vec<(usize, usize, usize, bool)> {
        let mut columns = Vec::new();
        let mut start = 0;
        let gate = inputs.z_col.map(|col| (col + self.first, self.count, false));
        let groups = [(inputs.b_col, self.per[0]), (inputs.c_col, self.per[1])].map(|(col, per)| {
            let (first, count) = self.groups(per);
            (col + first * self.d_state, count * self.d_state, !self.first.is_multiple_of(per))
        });
        for (from, count, adds) in gate.into_iter().chain(groups) {
            columns.push((from, start, count, adds));
            start += count;
        }
        columns
    }

    /// Columns of that matrix.
    fn width(&self) -> usize {
        let groups = |per| self.groups(per).1 * self.d_state;
        groups(self.per[0]) + groups(self.per[1]) + if self.gated { self.count } else { 0 }
    }

    fn of(&self, view: View) -> Result<View> {
        view.col_range(self.first, self.count)
    }

    fn state(&self, view: Option<View>) -> Result<Option<View>> {
        cols_of(view, self.first * self.d_state, self.count * self.d_state)
    }

    /// The inputs of the block, with a matrix of only those columns.
    fn inputs(&self, inputs: &ops::ScanInputs, projected: View) -> Result<ops::ScanInputs> {
        let gate = if self.gated { self.count } else { 0 };
        let [groups_b, groups_c] = self.per.map(|per| self.groups(per).1);
        Ok(ops::ScanInputs {
            u: self.of(inputs.u)?,
            delta: self.of(inputs.delta)?,
            a: inputs.a.row_range(self.first, self.count)?,
            projected,
            b_col: gate,
            c_col: gate + groups_b * self.d_state,
            z_col: self.gated.then_some(0),
            groups_b,
            groups_c,
            d: cols_of(inputs.d, self.first, self.count)?,
            delta_bias: cols_of(inputs.delta_bias, self.first, self.count)?,
            softplus: inputs.softplus,
            segments: inputs.segments,
            state_in: self.state(inputs.state_in)?,
        })
    }

    /// The inputs of the block, with copies of those columns.
    fn copied(&self, call: &mut Call, inputs: &ops::ScanInputs) -> Result<ops::ScanInputs> {
        let View { dtype, rows: tokens, .. } = inputs.projected;
        let own = call.scratch_of(dtype, Slot::Block(0), tokens, self.width())?;
        for (from, to, count, _) in self.columns(inputs) {
            let (src, out) = (inputs.projected.col_range(from, count)?, Out::assign(own.col_range(to, count)?));
            rows::copy(call, &ops::Copy { src, out })?;
        }
        self.inputs(inputs, own)
    }
}

/// The blocks of a scan: as large as bindings can show them, with the states of slots, those saved, and backward's sums.
fn scan_blocks(
    call: &Call,
    inputs: &ops::ScanInputs,
    states: [Option<View>; 3],
    backward: bool,
) -> Result<Vec<Neighbours>> {
    let state = |view: Option<View>| view.map_or((inputs.u, 0), |view| (view, inputs.d_state()));
    let [first, second, third] = states.map(state);
    let mut at_once = units_at_once(call, [(inputs.u, 1), (inputs.delta, 1), first, second, third]).max(1);
    loop {
        let blocks = Neighbours::blocks(inputs, at_once);
        let fits = |block: &Neighbours| {
            let own = block.width() * inputs.projected.rows <= call.values_at_once(&[inputs.projected]);
            let sums =
                if backward { mixers::ScanSums::new(call, &block.inputs(inputs, inputs.projected)?)?.len } else { 0 };
            Ok(own && sums <= call.values_at_once(&[inputs.a]))
        };
        let fitting = blocks.iter().map(fits).collect::<Result<Vec<_>>>()?;
        if at_once == 1 || fitting.into_iter().all(|fits| fits) {
            return Ok(blocks);
        }
        at_once = (at_once.min(inputs.channels()) / 2).max(1);
    }
}

pub(super) fn selective_scan(call: &mut Call, op: &ops::SelectiveScan) -> Result<()> {
    let inputs = &op.inputs;
    let states = [inputs.state_in, op.state_out, op.saved];
    let views = [inputs.u, inputs.delta, inputs.projected, op.out];
    if shown(call, views.into_iter().chain(states.into_iter().flatten())) {
        return mixers::selective_scan(call, op);
    }
    call.check(views.into_iter().chain(states.into_iter().flatten()))?;
    for channels in scan_blocks(call, inputs, states, false)? {
        let block = ops::SelectiveScan {
            inputs: channels.copied(call, inputs)?,
            state_out: channels.state(op.state_out)?,
            saved: channels.state(op.saved)?,
            out: channels.of(op.out)?,
        };
        mixers::selective_scan(call, &block)?;
    }
    Ok(())
}

pub(super) fn selective_scan_backward(call: &mut Call, op: &ops::SelectiveScanBackward) -> Result<()> {
    let inputs = &op.inputs;
    let states = [op.dstate_out, op.dstate_in, Some(op.saved)];
    let views = [inputs.u, inputs.delta, inputs.projected, op.dout, op.du, op.ddelta, op.dprojected];
    let all = views.into_iter().chain(states.into_iter().flatten()).chain(inputs.state_in);
    if shown(call, all) && mixers::ScanSums::new(call, inputs)?.len <= call.values_at_once(&[op.saved]) {
        return mixers::selective_scan_backward(call, op);
    }
    call.check(views.into_iter().chain(states.into_iter().flatten()))?;
    for channels in scan_blocks(call, inputs, states, true)? {
        let own = channels.copied(call, inputs)?;
        let View { dtype, rows: tokens, cols, .. } = own.projected;
        let dprojected = call.scratch_of(dtype, Slot::Block(1), tokens, cols)?;
        let block = ops::SelectiveScanBackward {
            inputs: own,
            saved: op.saved.col_range(channels.first * channels.d_state, channels.count * channels.d_state)?,
            dout: channels.of(op.dout)?,
            dstate_out: channels.state(op.dstate_out)?,
            du: channels.of(op.du)?,
            ddelta: channels.of(op.ddelta)?,
            da: op.da.row_range(channels.first, channels.count)?,
            dprojected,
            dd: cols_of(op.dd, channels.first, channels.count)?,
            ddelta_bias: cols_of(op.ddelta_bias, channels.first, channels.count)?,
            dstate_in: channels.state(op.dstate_in)?,
        };
        mixers::selective_scan_backward(call, &block)?;
        for (to, from, count, add) in channels.columns(inputs) {
            let (src, view) = (dprojected.col_range(from, count)?, op.dprojected.col_range(to, count)?);
            rows::copy(call, &ops::Copy { src, out: Out { view, add } })?;
        }
    }
    Ok(())
}
