//! The optimiser's step over ranges of the flat spaces.

use super::call::Call;
use super::scratch::Slot;
use super::shaders;
use crate::backend::{DType, Result, ops};

/// Invocations of a workgroup of these shaders.
const LANES: usize = 256;
/// Workgroups that a sum over a binding is spread over at most.
pub(super) const MOST_SUMS: usize = 512;

pub(super) fn squared_norm(call: &mut Call, op: &ops::SquaredNorm) -> Result<()> {
    call.check([op.x, op.out])?;
    let blocks = call.value_blocks(&[op.x]);
    let sums_of = |count: usize| count.div_ceil(16 * LANES).min(MOST_SUMS);
    let total = blocks.iter().map(|(_, count)| sums_of(*count)).sum();
    if total == 0 {
        return Ok(());
    }
    let sums = call.scratch(Slot::Partials, 1, total)?;
    let mut done = 0;
    for (first, count) in blocks {
        let groups = sums_of(count);
        call.dispatch(shaders::SQUARED_NORM.kernel("partial", &[]))
            .read(op.x.col_range(first, count)?)
            .write(sums.col_range(done, groups)?)
            .size(count)
            .grid([groups, 1, 1])?;
        done += groups;
    }
    call.dispatch(shaders::SQUARED_NORM.kernel("total", &[])).read(sums).write(op.out).size(total).grid([1, 1, 1])
}

pub(super) fn clip_factor(call: &mut Call, op: &ops::ClipFactor) -> Result<()> {
    call.dispatch(shaders::CLIP_FACTOR.kernel("clip_factor", &[]))
        .read(op.squared_norm)
        .write(op.control)
        .factor(op.max_norm)
        .grid([1, 1, 1])
}

pub(super) fn adamw(call: &mut Call, op: &ops::AdamW) -> Result<()> {
    call.check([op.grad, op.control, op.param, op.moment1, op.moment2].into_iter().chain(op.stored))?;
    let dtype = op.stored.map_or(DType::F32, |stored| stored.dtype);
    let views = [op.param, op.grad, op.moment1, op.moment2, op.stored.unwrap_or(op.param)];
    for (first, count) in call.value_blocks(&views) {
        let stored = op.stored.map(|view| view.col_range(first, count)).transpose()?;
        call.dispatch(shaders::ADAMW.kernel("adamw", &[dtype]).with("STORED", stored.is_some()))
            .read(op.grad.col_range(first, count)?)
            .read(op.control)
            .write(op.param.col_range(first, count)?)
            .write(op.moment1.col_range(first, count)?)
            .write(op.moment2.col_range(first, count)?)
            .maybe_write(stored)
            .size(count)
            .factor(op.beta1)
            .factor(op.beta2)
            .factor(op.eps)
            .factor(op.weight_decay)
            .grid([count.div_ceil(LANES), 1, 1])?;
    }
    Ok(())
}
