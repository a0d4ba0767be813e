//! Embedding, norm, gated activation.

use super::call::Call;
use super::shaders;
use crate::backend::{Result, ops};

/// Columns that a workgroup of an elementwise shader takes at a time.
pub(super) const COLUMNS: usize = 64;

pub(super) fn swiglu(call: &mut Call, op: &ops::Swiglu) -> Result<()> {
    let (tokens, width) = (op.out.rows, op.out.cols);
    call.dispatch(shaders::SWIGLU.kernel("forward", &[]))
        .read(op.gate)
        .read(op.up)
        .write(op.out)
        .size(tokens)
        .size(width)
        .grid([width.div_ceil(COLUMNS), tokens, 1])
}

pub(super) fn swiglu_backward(call: &mut Call, op: &ops::SwigluBackward) -> Result<()> {
    let (tokens, width) = (op.dout.rows, op.dout.cols);
    call.dispatch(shaders::SWIGLU.kernel("backward", &[]))
        .read(op.gate)
        .read(op.up)
        .read(op.dout)
        .write(op.dgate)
        .write(op.dup)
        .size(tokens)
        .size(width)
        .grid([width.div_ceil(COLUMNS), tokens, 1])
}
