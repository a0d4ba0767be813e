//! One call of a model: the device, who the rows belong to, and what is remembered or left out.

use super::cache::Cache;
use crate::backend::{Device, Result, SegmentsView, View};

/// A part of a block that a call leaves out, as leave-one-out importance does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skip {
    /// The whole block, norms and MLP included.
    Block(usize),
    /// The mixer alone: nothing is added to the residual stream in its place.
    Mixer(usize),
}

/// What every layer of a call shares.
#[derive(Clone, Copy)]
pub struct Call<'a> {
    /// Where it runs.
    pub device: &'a Device,
    /// Rows of the call.
    pub tokens: usize,
    /// Who the rows belong to.
    pub segments: SegmentsView,
    /// Keys and states from earlier calls; without one every segment's past is 0.
    pub cache: Option<&'a Cache>,
}

/// Where a gradient of a parameter goes; `None` for a frozen one.
pub(super) fn matrix_gradient(
    call: &Call,
    (x, dout): (View, View),
    dweight: Option<View>,
    dbias: Option<View>,
) -> Result<()> {
    let Some(dweight) = dweight else { return Ok(()) };
    call.device.linear_backward_weight(&crate::backend::ops::LinearBackwardWeight { x, dout, dweight, dbias })
}
