//! The ops of the two mixers beside their products.

use super::{Bench, Work};
use crate::backend::ops::{
    Attention, AttentionBackward, AttentionShape, Conv1d, Conv1dBackward, Keys, Rope, ScanInputs, SelectiveScan,
    SelectiveScanBackward,
};
use crate::bench::Result;
use crate::model::config::MambaConfig;

/// Rotary positions and causal attention over one segment.
pub(super) fn attention(bench: &mut Bench<'_>) -> Result<()> {
    let (device, config, tokens) = (bench.device, bench.config, bench.tokens);
    let (heads, head_dim) = (config.num_attention_heads, config.head_dim);
    let (wide, narrow) = (config.query_width(), config.key_value_width());
    let scale = (head_dim as f32).powf(-0.5);
    let shape = AttentionShape { heads, kv_heads: config.num_key_value_heads, head_dim, scale, window: None };
    let (_buffer, segments) = bench.segment()?;
    let [q, k, v, dout] = [wide, narrow, narrow, wide].map(|width| bench.values(tokens, width));
    let [out, dq, dk, dv] = [wide, wide, narrow, narrow].map(|width| bench.room(tokens, width));
    let (q, k, v, dout, out, dq, dk, dv) = (q?, k?, v?, dout?, out?, dq?, dk?, dv?);
    let (lse, frequencies) = (bench.results(tokens, heads)?, bench.numbers(1, head_dim / 2)?);
    let (q, k, v, out, lse) = (q.view(), k.view(), v.view(), out.view(), lse.view());
    let sizes = format!("{heads} heads of {head_dim}, {tokens} tokens");

    let (positions, inv_freq) = (segments.positions, frequencies.view());
    let rope = Rope { x: dq.view(), head_dim, positions, inv_freq, inverse: false };
    let size = bench.activations().size();
    let moved = Work { flops: 0.0, bytes: 2 * tokens * wide * size };
    bench.op(("rope", sizes.clone()), moved, || device.rope(&rope))?;

    // Half of the scores are masked; a score is a product over the head, twice: with the key, and with the value.
    let pairs = heads as f64 * tokens as f64 * (tokens as f64 + 1.0) / 2.0;
    let work = |products: f64, values| Work {
        flops: pairs * (products * 2.0 * head_dim as f64 + 1.0),
        bytes: tokens * values * size,
    };
    let op = Attention { shape, q, keys: Keys::Rows { k, v }, segments, out, lse: Some(lse) };
    bench.op(("attention", sizes.clone()), work(2.0, 2 * (wide + narrow)), || device.attention(&op))?;
    let (dout, dq, dk, dv) = (dout.view(), dq.view(), dk.view(), dv.view());
    let op = AttentionBackward { shape, q, k, v, segments, out, lse, dout, dq, dk, dv };
    bench.op(("attention_backward", sizes), work(5.0, 4 * (wide + narrow)), || device.attention_backward(&op))
}

/// Convolution and scan of the shape's `m2` mixer.
pub(super) fn mamba(bench: &mut Bench<'_>) -> Result<()> {
    let (device, tokens) = (bench.device, bench.tokens);
    let mamba = super::layers::mixer(bench.config)?;
    let (_buffer, segments) = bench.segment()?;
    let (channels, cols) = (mamba.d_inner, mamba.in_proj_rows());
    let (projected, dprojected) = (bench.values(tokens, cols)?, bench.room(tokens, cols)?);
    let (projected, dprojected) = (projected.view(), dprojected.view());
    let [u, delta, dout] = [(); 3].map(|()| bench.values(tokens, channels));
    let [out, du, ddelta] = [(); 3].map(|()| bench.room(tokens, channels));
    let (u, delta, dout, out, du, ddelta) = (u?, delta?, dout?, out?, du?, ddelta?);
    let (u, delta, dout, out, du, ddelta) = (u.view(), delta.view(), dout.view(), out.view(), du.view(), ddelta.view());

    let shape = mamba.conv_shape();
    let (taps, bias) = (bench.numbers(shape.filters(), shape.width)?, bench.numbers(1, shape.filters())?);
    let (dtaps, dbias) = (bench.results(shape.filters(), shape.width)?, bench.results(1, shape.filters())?);
    let (weight, bias) = (taps.view(), Some(bias.view()));
    let (x_col, sizes) = (mamba.x_col(), format!("{tokens}×{channels}, {} taps", shape.width));
    let size = bench.activations().size();
    let work = |values| Work { flops: 0.0, bytes: tokens * values * size };
    let op = Conv1d { shape, projected, x_col, weight, bias, segments, state_in: None, state_out: None, out };
    bench.op(("conv1d", sizes.clone()), work(mamba.d_xb + channels), || device.conv1d(&op))?;
    let op = Conv1dBackward {
        shape,
        projected,
        x_col,
        weight,
        bias,
        segments,
        state_in: None,
        dout,
        dstate_out: None,
        dprojected,
        dweight: Some(dtaps.view()),
        dbias: Some(dbias.view()),
        dstate_in: None,
    };
    bench.op(("conv1d_backward", sizes), work(2 * mamba.d_xb + channels), || device.conv1d_backward(&op))?;

    let a = bench.results(channels, mamba.d_state)?;
    let negative = vec![-1.0; channels * mamba.d_state];
    device.write(crate::backend::HostSlice::F32(&negative), a.view())?;
    let [d, delta_bias] = [(); 2].map(|()| bench.numbers(1, channels));
    let (d, delta_bias) = (d?, delta_bias?);
    let inputs = ScanInputs {
        u,
        delta,
        a: a.view(),
        projected,
        b_col: channels + mamba.d_xb,
        c_col: channels + 2 * mamba.d_xb,
        z_col: Some(0),
        groups_b: mamba.xb_heads(),
        groups_c: mamba.c_heads(),
        d: Some(d.view()),
        delta_bias: Some(delta_bias.view()),
        softplus: true,
        segments,
        state_in: None,
    };
    scan(bench, &mamba, inputs, [dout, out, du, ddelta, dprojected])
}

fn scan(
    bench: &mut Bench<'_>,
    mamba: &MambaConfig,
    inputs: ScanInputs,
    [dout, out, du, ddelta, dprojected]: [crate::backend::View; 5],
) -> Result<()> {
    let (device, tokens, channels) = (bench.device, bench.tokens, mamba.d_inner);
    let chunks = ScanInputs::saved_rows(tokens, 1, device.info().scan_chunk);
    let (saved, da) = (bench.results(chunks, mamba.ssm_state())?, bench.results(channels, mamba.d_state)?);
    let (dd, dbias) = (bench.results(1, channels)?, bench.results(1, channels)?);
    let sizes = format!("{tokens}×{channels}, {} states", mamba.d_state);
    // Forward a state takes an exponential, its argument, decay, input and output: 1 + 1 + 2 + 2 + 2 operations.
    let states = (tokens * mamba.ssm_state()) as f64;
    let saved = saved.view();
    let op = SelectiveScan { inputs, state_out: None, saved: Some(saved), out };
    let bytes = tokens * (mamba.in_proj_rows() + 2 * channels) * bench.activations().size();
    bench.op(("selective_scan", sizes.clone()), Work { flops: 8.0 * states, bytes }, || device.selective_scan(&op))?;
    let op = SelectiveScanBackward {
        inputs,
        saved,
        dout,
        dstate_out: None,
        du,
        ddelta,
        da: da.view(),
        dprojected,
        dd: Some(dd.view()),
        ddelta_bias: Some(dbias.view()),
        dstate_in: None,
    };
    // Backward computes the states again (6), and takes the gradients of state, input, B, C, A and dt (14).
    let work = Work { flops: 20.0 * states, bytes: 2 * bytes };
    bench.op(("selective_scan_backward", sizes), work, || device.selective_scan_backward(&op))
}
