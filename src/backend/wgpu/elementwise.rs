//! Ops of one value, or of one pair, at a time.

use super::call::{Call, flat};
use super::shaders;
use crate::backend::{DType, Order, Result, View, ops};

/// Columns that a workgroup of an elementwise shader takes at a time.
pub(super) const COLUMNS: usize = 64;

/// The grid of an elementwise shader over a view.
pub(super) fn grid(view: View) -> [usize; 3] {
    [view.cols.div_ceil(COLUMNS), view.rows, 1]
}

/// Views of one shape in parts that fit into a binding each: blocks of rows, or of a single row where none has gaps.
pub(super) fn parts<const N: usize>(call: &Call, views: [View; N]) -> Result<Vec<[View; N]>> {
    call.check(views)?;
    let mut whole = views.map(|view| View { order: Order::Rows, ..view });
    if views.iter().all(|view| flat(*view).is_some()) {
        whole = views.map(|view| flat(view).unwrap_or(view));
    }
    let of_one_row = whole.iter().all(|view| view.rows == 1);
    let blocks = if of_one_row { call.value_blocks(&whole) } else { call.row_blocks(&whole) };
    let cut = |(first, count)| {
        let mut part = whole;
        for view in &mut part {
            *view = if of_one_row { view.col_range(first, count)? } else { view.row_range(first, count)? };
        }
        Ok(part)
    };
    blocks.into_iter().map(cut).collect()
}

pub(super) fn swiglu(call: &mut Call, op: &ops::Swiglu) -> Result<()> {
    let dtype = call.dtype(&[op.gate, op.up, op.out])?;
    for [gate, up, out] in parts(call, [op.gate, op.up, op.out])? {
        call.dispatch(shaders::SWIGLU.kernel("forward", &[dtype]))
            .read(gate)
            .read(up)
            .write(out)
            .size(out.rows)
            .size(out.cols)
            .grid(grid(out))?;
    }
    Ok(())
}

pub(super) fn swiglu_backward(call: &mut Call, op: &ops::SwigluBackward) -> Result<()> {
    let views = [op.gate, op.up, op.dout, op.dgate, op.dup];
    let dtype = call.dtype(&views)?;
    for [gate, up, dout, dgate, dup] in parts(call, views)? {
        call.dispatch(shaders::SWIGLU.kernel("backward", &[dtype]))
            .read(gate)
            .read(up)
            .read(dout)
            .write(dgate)
            .write(dup)
            .size(dout.rows)
            .size(dout.cols)
            .grid(grid(dout))?;
    }
    Ok(())
}

pub(super) fn rope(call: &mut Call, op: &ops::Rope) -> Result<()> {
    let half = op.head_dim / 2;
    call.check([op.positions, op.inv_freq, op.x])?;
    for (first, count) in call.row_blocks(&[op.x]) {
        call.dispatch(shaders::ROPE.kernel("rope", &[op.x.dtype]).with("INVERSE", op.inverse))
            .read(op.positions.col_range(first, count)?)
            .read(op.inv_freq)
            .write(op.x.row_range(first, count)?)
            .size(count)
            .size(op.x.cols / op.head_dim)
            .size(half)
            .grid([half.div_ceil(COLUMNS), count, 1])?;
    }
    Ok(())
}

pub(super) fn neg_exp(call: &mut Call, op: &ops::NegExp) -> Result<()> {
    for [a_log, a] in parts(call, [op.a_log, op.a])? {
        call.dispatch(shaders::NEG_EXP.kernel("forward", &[a_log.dtype]))
            .read(a_log)
            .write(a)
            .size(a.rows)
            .size(a.cols)
            .grid(grid(a))?;
    }
    Ok(())
}

pub(super) fn neg_exp_backward(call: &mut Call, op: &ops::NegExpBackward) -> Result<()> {
    for [a, da, da_log] in parts(call, [op.a, op.da, op.da_log])? {
        call.dispatch(shaders::NEG_EXP.kernel("backward", &[DType::F32]))
            .read(a)
            .read(da)
            .write(da_log)
            .size(a.rows)
            .size(a.cols)
            .grid(grid(a))?;
    }
    Ok(())
}
