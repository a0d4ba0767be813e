//! One call of a model: the device, who the rows belong to, and what is remembered or left out.

use super::cache::Cache;
use super::parameters::{ParameterId, Space};
use crate::backend::ops::{Linear, LinearBackwardWeight, LinearSwiglu, Swiglu};
use crate::backend::{Device, Out, Result, SegmentsView, View};

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
    /// Whether all keys are the call's own: no segment has a past. A step of decoding never counts as such, so that it is
    /// always the same ops.
    pub fresh: bool,
}

/// Where a gradient of a parameter goes; `None` for a frozen one.
pub(super) fn matrix_gradient(
    call: &Call,
    (x, dout): (View, View),
    dweight: Option<View>,
    dbias: Option<View>,
) -> Result<()> {
    let Some(dweight) = dweight else { return Ok(()) };
    call.device.linear_backward_weight(&LinearBackwardWeight { x, dout, dweight, dbias })
}

/// Projections of one input, each a weight and perhaps a bias, side by side into `out`, and perhaps their gated activation, with
/// whether they themselves are kept: a single op where their parameters lie one after the other.
pub(super) fn project_side_by_side<const N: usize>(
    call: &Call,
    weights: &Space,
    x: View,
    parts: [(ParameterId, Option<ParameterId>); N],
    out: View,
    activation: Option<(Swiglu, bool)>,
) -> Result<()> {
    let device = call.device;
    let biased = parts.iter().all(|(_, bias)| bias.is_some());
    let weight = weights.joined(parts.map(|(weight, _)| weight))?;
    let bias = if biased { weights.joined(parts.map(|(weight, bias)| bias.unwrap_or(weight)))? } else { None };
    if let Some(weight) = weight
        && (bias.is_some() || parts.iter().all(|(_, bias)| bias.is_none()))
    {
        let linear = Linear { x, weight, bias, out: Out::assign(out) };
        return match activation {
            Some((swiglu, keeps)) => device.linear_swiglu(&LinearSwiglu { linear, swiglu, keeps }),
            None => device.linear(&linear),
        };
    }
    let mut first = 0;
    for (weight, bias) in parts {
        let (weight, bias) = (weights.view(weight)?, bias.map(|bias| weights.view(bias)).transpose()?);
        let out = Out::assign(out.col_range(first, weight.rows)?);
        device.linear(&Linear { x, weight, bias, out })?;
        first += weight.rows;
    }
    activation.map_or(Ok(()), |(swiglu, _)| device.swiglu(&swiglu))
}
