//! The gated MLP: `down(silu(gate x) ⊙ (up x))`.

use super::block::Room;
use super::call::{Call, matrix_gradient, project_side_by_side};
use super::config::ModelConfig;
use super::scratch::Rows;
use super::weights::{Gradients, MlpIds};
use crate::backend::ops::{Linear, LinearBackwardInput, Swiglu, SwigluBackward};
use crate::backend::{DType, Device, Out, Result, View};
use crate::model::parameters::Space;

/// What forward leaves for backward.
#[derive(Debug)]
pub struct MlpSaved {
    /// `[tokens, 2·intermediate]`: gate, and up.
    gate_up: Rows,
    /// `[tokens, intermediate]`: silu(gate) ⊙ up.
    activated: Rows,
    /// Whether gate and up are what they are said to be after a forward.
    keeps: bool,
}

/// Memory of backward.
#[derive(Debug)]
pub struct MlpScratch {
    dactivated: Rows,
    dgate: Rows,
    dup: Rows,
}

impl MlpSaved {
    pub(super) fn new(device: &Device, config: &ModelConfig, room: Room) -> Result<Self> {
        let rows = |width| Rows::new(device, room.dtype, room.tokens, width);
        let width = config.intermediate_size;
        Ok(MlpSaved { gate_up: rows(2 * width)?, activated: rows(width)?, keeps: room.training })
    }

    /// Gate, and up.
    fn gate_up(&self, tokens: usize) -> Result<[View; 2]> {
        let both = self.gate_up.of(tokens)?;
        let width = both.cols / 2;
        Ok([both.col_range(0, width)?, both.col_range(width, width)?])
    }
}

impl MlpScratch {
    pub(super) fn new(device: &Device, config: &ModelConfig, dtype: DType, tokens: usize) -> Result<Self> {
        let rows = || Rows::new(device, dtype, tokens, config.intermediate_size);
        Ok(MlpScratch { dactivated: rows()?, dgate: rows()?, dup: rows()? })
    }
}

/// Everything up to the activation: what a recomputation needs.
pub(super) fn activate(call: &Call, weights: &Space, ids: &MlpIds, x: View, saved: &MlpSaved) -> Result<()> {
    let n = call.tokens;
    let ([gate, up], out) = (saved.gate_up(n)?, saved.activated.of(n)?);
    let (parts, activation) = ([(ids.gate, None), (ids.up, None)], (Swiglu { gate, up, out }, saved.keeps));
    project_side_by_side(call, weights, x, parts, saved.gate_up.of(n)?, Some(activation))
}

/// Adds the MLP's output for the activation in `saved` to `out`.
pub(super) fn project(call: &Call, weights: &Space, ids: &MlpIds, saved: &MlpSaved, out: View) -> Result<()> {
    let x = saved.activated.of(call.tokens)?;
    call.device.linear(&Linear { x, weight: weights.view(ids.down)?, bias: None, out: Out::add(out) })
}

/// From the gradient of the output to that of the input `x` (replaced in `dx`), and of the weights.
pub(super) fn backward(
    call: &Call,
    weights: &Space,
    gradients: &Gradients,
    ids: &MlpIds,
    (x, saved, scratch): (View, &MlpSaved, &MlpScratch),
    dout: View,
    dx: View,
) -> Result<()> {
    let (device, n) = (call.device, call.tokens);
    let ([gate, up], activated) = (saved.gate_up(n)?, saved.activated.of(n)?);
    let (dactivated, dgate, dup) = (scratch.dactivated.of(n)?, scratch.dgate.of(n)?, scratch.dup.of(n)?);
    matrix_gradient(call, (activated, dout), gradients.of(ids.down)?, None)?;
    let weight = weights.view(ids.down)?;
    device.linear_backward_input(&LinearBackwardInput { dout, weight, dx: Out::assign(dactivated) })?;
    device.swiglu_backward(&SwigluBackward { gate, up, dout: dactivated, dgate, dup })?;
    matrix_gradient(call, (x, dgate), gradients.of(ids.gate)?, None)?;
    matrix_gradient(call, (x, dup), gradients.of(ids.up)?, None)?;
    let weight = weights.view(ids.gate)?;
    device.linear_backward_input(&LinearBackwardInput { dout: dgate, weight, dx: Out::assign(dx) })?;
    let weight = weights.view(ids.up)?;
    device.linear_backward_input(&LinearBackwardInput { dout: dup, weight, dx: Out::add(dx) })
}
