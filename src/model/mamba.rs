//! The `m2` mixer, M1's Mamba-1 with grouped heads: projection to z, x, B, C; dt of low rank; convolution; scan; gate.
//! The bias of dt is added twice, once by its projection and once in the scan, as the released weights were trained.

use super::cache::LayerCache;
use super::call::{Call, matrix_gradient, project_side_by_side};
use super::config::MambaConfig;
use super::parameters::{ParameterId, Space};
use super::scratch::Rows;
use super::weights::{Gradients, MambaIds};
use crate::backend::ops::{
    Conv1d, Conv1dBackward, ConvScan, ConvShape, Linear, LinearBackwardInput, NegExp, NegExpBackward, ScanInputs,
    SelectiveScan, SelectiveScanBackward,
};
use crate::backend::{DType, Device, Error, Out, Result, View};

/// What forward leaves for backward.
#[derive(Debug)]
pub struct MambaSaved {
    /// `[tokens, 2·d_inner + 2·d_xb + dt_rank]`: z, x, B, C, and the low-rank input of dt; then columns for rows to be aligned.
    projected: Rows,
    /// `[tokens, d_inner]`: dt before its bias is added once more.
    delta: Rows,
    /// `[tokens, d_inner]`: the convolution's output; anything after a forward without backward.
    u: Rows,
    /// `[d_inner, d_state]`: −exp(A_log), where there is no cache that has it.
    a: Rows,
    /// States at the starts of chunks, `[chunks, d_inner·d_state]`; forward without backward has none.
    states: Option<Rows>,
    /// `[tokens, d_inner]`: the gated output of the scan.
    gated: Rows,
}

/// Values that rows are a multiple of, so that kernels may read several at once.
const ALIGNED: usize = 16;

/// Memory of backward.
#[derive(Debug)]
pub struct MambaScratch {
    dgated: Rows,
    du: Rows,
    ddelta: Rows,
    da: Rows,
    dprojected: Rows,
    dlow: Rows,
}

impl MambaSaved {
    pub(super) fn new(
        device: &Device,
        mamba: &MambaConfig,
        dtype: DType,
        (tokens, segments): (usize, usize),
        training: bool,
    ) -> Result<Self> {
        let rows = |width| Rows::new(device, dtype, tokens, width);
        let chunks = ScanInputs::saved_rows(tokens, segments, device.info().scan_chunk);
        let states = training.then(|| Rows::new(device, DType::F32, chunks, mamba.ssm_state())).transpose()?;
        Ok(MambaSaved {
            projected: rows((mamba.in_proj_rows() + mamba.dt_rank).next_multiple_of(ALIGNED))?,
            delta: rows(mamba.d_inner)?,
            u: rows(mamba.d_inner)?,
            a: Rows::new(device, DType::F32, mamba.d_inner, mamba.d_state)?,
            states,
            gated: rows(mamba.d_inner)?,
        })
    }

    /// `[tokens, d_inner]`: the gated output of the scan, before the output projection.
    ///
    /// # Errors
    /// When it was made for fewer tokens.
    pub fn gated(&self, tokens: usize) -> Result<View> {
        self.gated.of(tokens)
    }

    /// `[tokens, dt_rank]`: the low-rank input of dt.
    ///
    /// # Errors
    /// When it was made for fewer tokens.
    pub fn low(&self, mamba: &MambaConfig, tokens: usize) -> Result<View> {
        self.projected.of(tokens)?.col_range(mamba.in_proj_rows(), mamba.dt_rank)
    }

    /// `[tokens, 2·d_inner + 2·d_xb]`: z, x, B, C.
    fn zxbc(&self, mamba: &MambaConfig, tokens: usize) -> Result<View> {
        self.projected.of(tokens)?.col_range(0, mamba.in_proj_rows())
    }

    /// `[tokens, d_xb]`: x before the head repeat and the convolution.
    ///
    /// # Errors
    /// When it was made for fewer tokens.
    pub fn conv_input(&self, mamba: &MambaConfig, tokens: usize) -> Result<View> {
        self.projected.of(tokens)?.col_range(mamba.x_col(), mamba.d_xb)
    }
}

impl MambaScratch {
    pub(super) fn new(device: &Device, mamba: &MambaConfig, dtype: DType, tokens: usize) -> Result<Self> {
        let rows = |width| Rows::new(device, dtype, tokens, width);
        Ok(MambaScratch {
            dgated: rows(mamba.d_inner)?,
            du: rows(mamba.d_inner)?,
            ddelta: rows(mamba.d_inner)?,
            da: Rows::new(device, DType::F32, mamba.d_inner, mamba.d_state)?,
            dprojected: rows(mamba.in_proj_rows())?,
            dlow: rows(mamba.dt_rank)?,
        })
    }
}

impl MambaConfig {
    /// The column where x starts; z starts at 0.
    pub fn x_col(&self) -> usize {
        self.d_inner
    }

    fn b_col(&self) -> usize {
        self.d_inner + self.d_xb
    }

    fn c_col(&self) -> usize {
        self.d_inner + 2 * self.d_xb
    }

    /// The convolution's sizes.
    pub fn conv_shape(&self) -> ConvShape {
        ConvShape {
            channels_in: self.d_xb,
            head: self.d_state,
            repeat: self.repeat(),
            width: self.d_conv,
            repeat_first: self.repeat_kv_before_conv,
        }
    }

    /// Values of a sequence's convolution state in one layer.
    pub fn conv_state(&self) -> usize {
        self.conv_shape().state()
    }

    /// Values of a sequence's scan state in one layer.
    pub fn ssm_state(&self) -> usize {
        self.d_inner * self.d_state
    }
}

fn maybe(space: &Space, id: Option<ParameterId>) -> Result<Option<View>> {
    id.map(|id| space.view(id)).transpose()
}

fn maybe_gradient(gradients: &Gradients, id: Option<ParameterId>) -> Result<Option<View>> {
    Ok(id.map(|id| gradients.of(id)).transpose()?.flatten())
}

/// −exp(A_log) into `a`, `[d_inner, d_state]`.
pub(super) fn decays(device: &Device, weights: &Space, ids: &MambaIds, a: View) -> Result<()> {
    device.neg_exp(&NegExp { a_log: weights.view(ids.a_log)?, a })
}

fn scan_inputs(
    call: &Call,
    mamba: &MambaConfig,
    weights: &Space,
    ids: &MambaIds,
    (saved, a): (&MambaSaved, View),
) -> Result<ScanInputs> {
    let n = call.tokens;
    Ok(ScanInputs {
        u: saved.u.of(n)?,
        delta: saved.delta.of(n)?,
        a,
        projected: saved.zxbc(mamba, n)?,
        b_col: mamba.b_col(),
        c_col: mamba.c_col(),
        z_col: Some(0),
        groups_b: mamba.xb_heads(),
        groups_c: mamba.c_heads(),
        d: Some(weights.view(ids.d)?),
        delta_bias: maybe(weights, ids.dt_bias)?,
        softplus: true,
        segments: call.segments,
        state_in: None,
    })
}

/// Everything up to the gated output of the scan, into `saved`.
pub(super) fn scan(
    call: &Call,
    mamba: &MambaConfig,
    weights: &Space,
    (layer, ids): (usize, &MambaIds),
    x: View,
    saved: &MambaSaved,
) -> Result<()> {
    let (device, n, segments) = (call.device, call.tokens, call.segments);
    let (projected, low) = (saved.zxbc(mamba, n)?, saved.low(mamba, n)?);
    let both = saved.projected.of(n)?.col_range(0, projected.cols + low.cols)?;
    let parts = [(ids.in_proj, ids.in_proj_bias), (ids.dt_in_proj, ids.dt_in_proj_bias)];
    project_side_by_side(call, weights, x, parts, both, None)?;
    let (weight, bias) = (weights.view(ids.dt_proj)?, maybe(weights, ids.dt_bias)?);
    device.linear(&Linear { x: low, weight, bias, out: Out::assign(saved.delta.of(n)?) })?;
    let (conv_state, ssm_state, a) = match call.cache.map(|cache| cache.layer(layer)) {
        None => {
            let a = saved.a.whole();
            decays(device, weights, ids, a)?;
            (None, None, a)
        }
        Some(LayerCache::Mamba { conv, ssm, a }) => (Some(conv.view()), Some(ssm.view()), a.view()),
        Some(_) => {
            return Err(Error::Argument { op: "mamba", what: format!("the cache has no states at layer {layer}") });
        }
    };
    let conv = Conv1d {
        shape: mamba.conv_shape(),
        projected,
        x_col: mamba.x_col(),
        weight: weights.view(ids.conv)?,
        bias: maybe(weights, ids.conv_bias)?,
        segments,
        state_in: conv_state,
        state_out: conv_state,
        out: saved.u.of(n)?,
    };
    let inputs = ScanInputs { state_in: ssm_state, ..scan_inputs(call, mamba, weights, ids, (saved, a))? };
    let states = saved.states.as_ref().map(Rows::whole);
    let scan = SelectiveScan { inputs, state_out: ssm_state, saved: states, out: saved.gated.of(n)? };
    device.conv_scan(&ConvScan { conv, scan, keeps: states.is_some() })
}

/// Adds the output projection of what `saved` holds to `out`.
pub(super) fn project(call: &Call, weights: &Space, ids: &MambaIds, saved: &MambaSaved, out: Out) -> Result<()> {
    let (weight, bias) = (weights.view(ids.out_proj)?, maybe(weights, ids.out_proj_bias)?);
    call.device.linear(&Linear { x: saved.gated.of(call.tokens)?, weight, bias, out })
}

/// From the gradient of the output to that of the input `x` (replaced in `dx`), and of the weights.
pub(super) fn backward(
    call: &Call,
    mamba: &MambaConfig,
    (weights, gradients): (&Space, &Gradients),
    ids: &MambaIds,
    (x, saved, scratch): (View, &MambaSaved, &MambaScratch),
    dout: View,
    dx: View,
) -> Result<()> {
    let (device, n, segments) = (call.device, call.tokens, call.segments);
    let Some(states) = saved.states.as_ref().map(Rows::whole) else {
        return Err(Error::Argument { op: "mamba backward", what: "forward kept no states".into() });
    };
    let (dgated, du, ddelta) = (scratch.dgated.of(n)?, scratch.du.of(n)?, scratch.ddelta.of(n)?);
    let (dprojected, dlow, da) = (scratch.dprojected.of(n)?, scratch.dlow.of(n)?, scratch.da.whole());
    let gradient_of = |id| maybe_gradient(gradients, id);

    matrix_gradient(call, (saved.gated.of(n)?, dout), gradients.of(ids.out_proj)?, gradient_of(ids.out_proj_bias)?)?;
    let weight = weights.view(ids.out_proj)?;
    device.linear_backward_input(&LinearBackwardInput { dout, weight, dx: Out::assign(dgated) })?;
    device.selective_scan_backward(&SelectiveScanBackward {
        inputs: scan_inputs(call, mamba, weights, ids, (saved, saved.a.whole()))?,
        saved: states,
        dout: dgated,
        dstate_out: None,
        du,
        ddelta,
        da,
        dprojected,
        dd: gradients.of(ids.d)?,
        ddelta_bias: gradient_of(ids.dt_bias)?,
        dstate_in: None,
    })?;
    if let Some(da_log) = gradients.of(ids.a_log)? {
        device.neg_exp_backward(&NegExpBackward { a: saved.a.whole(), da, da_log })?;
    }
    let conv = mamba.conv_shape();
    device.conv1d_backward(&Conv1dBackward {
        shape: conv,
        projected: saved.zxbc(mamba, n)?,
        x_col: mamba.x_col(),
        weight: weights.view(ids.conv)?,
        bias: maybe(weights, ids.conv_bias)?,
        segments,
        state_in: None,
        dout: du,
        dstate_out: None,
        dprojected,
        dweight: gradients.of(ids.conv)?,
        dbias: gradient_of(ids.conv_bias)?,
        dstate_in: None,
    })?;

    matrix_gradient(call, (saved.low(mamba, n)?, ddelta), gradients.of(ids.dt_proj)?, gradient_of(ids.dt_bias)?)?;
    let weight = weights.view(ids.dt_proj)?;
    device.linear_backward_input(&LinearBackwardInput { dout: ddelta, weight, dx: Out::assign(dlow) })?;
    matrix_gradient(call, (x, dprojected), gradients.of(ids.in_proj)?, gradient_of(ids.in_proj_bias)?)?;
    matrix_gradient(call, (x, dlow), gradients.of(ids.dt_in_proj)?, gradient_of(ids.dt_in_proj_bias)?)?;
    let weight = weights.view(ids.in_proj)?;
    device.linear_backward_input(&LinearBackwardInput { dout: dprojected, weight, dx: Out::assign(dx) })?;
    let weight = weights.view(ids.dt_in_proj)?;
    device.linear_backward_input(&LinearBackwardInput { dout: dlow, weight, dx: Out::add(dx) })
}
