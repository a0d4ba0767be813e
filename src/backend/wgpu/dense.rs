//! Embedding and norm.

use super::call::Call;
use super::elementwise::COLUMNS;
use super::rows::{self, RUN};
use super::scratch::Slot;
use super::shaders;
use crate::backend::{Order, Result, View, ops};

pub(super) fn embed(call: &mut Call, op: &ops::Embed) -> Result<()> {
    call.check([op.weight])?;
    rows::gather_rows(call, View { order: Order::Rows, ..op.weight }, op.ids, op.out)
}

pub(super) fn embed_backward(call: &mut Call, op: &ops::EmbedBackward) -> Result<()> {
    call.check([op.ids, op.dout, op.dweight])?;
    let dweight = View { order: Order::Rows, ..op.dweight };
    for (token, tokens) in call.row_blocks(&[op.dout]) {
        for (first, count) in call.row_blocks(&[dweight]) {
            call.dispatch(shaders::EMBED_BACKWARD.kernel("embed_backward", &[op.dout.dtype]))
                .read(op.ids.col_range(token, tokens)?)
                .read(op.dout.row_range(token, tokens)?)
                .write(dweight.row_range(first, count)?)
                .size(first)
                .size(count)
                .size(tokens)
                .size(op.dout.cols)
                .grid([tokens, 1, 1])?;
        }
    }
    Ok(())
}

pub(super) fn rms_norm(call: &mut Call, op: &ops::RmsNorm) -> Result<()> {
    let dtype = call.dtype(&[op.x, op.out])?;
    call.check([op.x, op.weight, op.out].into_iter().chain(op.inv_rms))?;
    for (first, count) in call.row_blocks(&[op.x, op.out]) {
        let inv_rms = op.inv_rms.map(|view| view.col_range(first, count)).transpose()?;
        let kernel = shaders::RMS_NORM.kernel("forward", &[dtype, op.weight.dtype]);
        call.dispatch(kernel.with("KEEP", inv_rms.is_some()))
            .read(op.x.row_range(first, count)?)
            .read(op.weight)
            .write(op.out.row_range(first, count)?)
            .maybe_write(inv_rms)
            .size(count)
            .size(op.x.cols)
            .factor(op.eps)
            .grid([count, 1, 1])?;
    }
    Ok(())
}

pub(super) fn rms_norm_backward(call: &mut Call, op: &ops::RmsNormBackward) -> Result<()> {
    let dtype = call.dtype(&[op.x, op.dout, op.dx.view])?;
    call.check([op.x, op.weight, op.inv_rms, op.dout, op.dx.view].into_iter().chain(op.dweight))?;
    let hidden = op.x.cols;
    for (first, count) in call.row_blocks(&[op.x, op.dout, op.dx.view]) {
        let (x, dout) = (op.x.row_range(first, count)?, op.dout.row_range(first, count)?);
        let inv_rms = op.inv_rms.col_range(first, count)?;
        let types = [dtype, op.weight.dtype];
        call.dispatch(shaders::RMS_NORM.kernel("backward", &types).with("ADD", op.dx.add))
            .read(x)
            .read(op.weight)
            .read(inv_rms)
            .read(dout)
            .write(op.dx.view.row_range(first, count)?)
            .size(count)
            .size(hidden)
            .grid([count, 1, 1])?;
        let Some(dweight) = op.dweight else { continue };
        let runs = count.div_ceil(RUN);
        let sums = if runs == 1 { dweight } else { call.scratch(Slot::Partials, runs, hidden)? };
        call.dispatch(shaders::RMS_NORM.kernel("dweight", &types).with("ADD", runs == 1))
            .read(x)
            .read(inv_rms)
            .read(dout)
            .write(sums)
            .size(count)
            .size(hidden)
            .grid([hidden.div_ceil(COLUMNS), runs, 1])?;
        if runs > 1 {
            rows::add_up(call, sums, None, dweight, [Slot::Totals, Slot::Partials])?;
        }
    }
    Ok(())
}
