//! The attention mixer: `o(attention(rope(q x), rope(k x), v x))`; the projections q, k and v may have biases.

use super::cache::{LayerCache, PAGE_SIZE};
use super::call::{Call, matrix_gradient, project_side_by_side};
use super::config::ModelConfig;
use super::parameters::Space;
use super::scratch::Rows;
use super::weights::{AttentionIds, Gradients};
use crate::backend::ops::{
    self, AttentionBackward, AttentionShape, Keys, Linear, LinearBackwardInput, PageWrite, Rope, RopePageWrite,
};
use crate::backend::{DType, Device, Error, Out, Result, View};

/// What forward leaves for backward.
#[derive(Debug)]
pub struct AttentionSaved {
    /// `[tokens, (heads + 2·kv_heads)·head_dim]`: queries and keys, rotated, and values.
    qkv: Rows,
    /// `[tokens, heads·head_dim]`: what the heads give, before the output projection.
    heads: Rows,
    /// `[tokens, heads]`.
    lse: Rows,
}

/// Memory of backward.
#[derive(Debug)]
pub struct AttentionScratch {
    dheads: Rows,
    dq: Rows,
    dk: Rows,
    dv: Rows,
}

impl AttentionSaved {
    pub(super) fn new(device: &Device, config: &ModelConfig, dtype: DType, tokens: usize) -> Result<Self> {
        let rows = |width| Rows::new(device, dtype, tokens, width);
        Ok(AttentionSaved {
            qkv: rows(config.query_width() + 2 * config.key_value_width())?,
            heads: rows(config.query_width())?,
            lse: Rows::new(device, DType::F32, tokens, config.num_attention_heads)?,
        })
    }

    /// Queries, keys and values.
    fn qkv(&self, config: &ModelConfig, tokens: usize) -> Result<[View; 3]> {
        let (qkv, wide, narrow) = (self.qkv.of(tokens)?, config.query_width(), config.key_value_width());
        Ok([qkv.col_range(0, wide)?, qkv.col_range(wide, narrow)?, qkv.col_range(wide + narrow, narrow)?])
    }

    /// `[tokens, heads·head_dim]`: what the output projection takes.
    pub(super) fn heads(&self, tokens: usize) -> Result<View> {
        self.heads.of(tokens)
    }
}

impl AttentionScratch {
    pub(super) fn new(device: &Device, config: &ModelConfig, dtype: DType, tokens: usize) -> Result<Self> {
        let rows = |width| Rows::new(device, dtype, tokens, width);
        Ok(AttentionScratch {
            dheads: rows(config.query_width())?,
            dq: rows(config.query_width())?,
            dk: rows(config.key_value_width())?,
            dv: rows(config.key_value_width())?,
        })
    }
}

fn shape(config: &ModelConfig) -> AttentionShape {
    AttentionShape {
        heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        scale: (config.head_dim as f64).powf(-0.5) as f32,
        window: config.sliding_window,
    }
}

fn rotation(call: &Call, config: &ModelConfig, inv_freq: View, x: View, inverse: bool) -> Rope {
    Rope { x, head_dim: config.head_dim, positions: call.segments.positions, inv_freq, inverse }
}

/// Queries, keys and values of `x`, and what the heads make of them, into `saved`.
pub(super) fn attend(
    call: &Call,
    (config, inv_freq): (&ModelConfig, View),
    weights: &Space,
    (layer, ids): (usize, &AttentionIds),
    x: View,
    saved: &AttentionSaved,
) -> Result<()> {
    let (device, n, segments) = (call.device, call.tokens, call.segments);
    let projections = [(ids.q, ids.q_bias), (ids.k, ids.k_bias), (ids.v, ids.v_bias)];
    project_side_by_side(call, weights, x, projections, saved.qkv.of(n)?, None)?;
    let [q, k, v] = saved.qkv(config, n)?;
    // Queries and keys lie side by side, heads all.
    let rope = rotation(call, config, inv_freq, saved.qkv.of(n)?.col_range(0, q.cols + k.cols)?, false);
    let keys = match call.cache {
        None => {
            device.rope(&rope)?;
            Keys::Rows { k, v }
        }
        Some(cache) => {
            let LayerCache::Attention { k: all_k, v: all_v } = cache.layer(layer) else {
                return Err(Error::Argument {
                    op: "attention",
                    what: format!("the cache has no keys at layer {layer}"),
                });
            };
            let (pages, page_size) = (cache.pages(), PAGE_SIZE);
            let out = [all_k.view(), all_v.view()];
            let write = PageWrite { rows: [k, v], segments, pages, page_size, out };
            device.rope_page_write(&RopePageWrite { rope, write })?;
            // Read where they are: in pages they are the same, unless these hold them with fewer bits.
            if call.fresh && all_k.view().dtype == k.dtype {
                Keys::Rows { k, v }
            } else {
                Keys::Pages { k: all_k.view(), v: all_v.view(), pages, page_size }
            }
        }
    };
    let (out, lse) = (saved.heads.of(n)?, Some(saved.lse.of(n)?));
    device.attention(&ops::Attention { shape: shape(config), q, keys, segments, out, lse })
}

/// Adds the output projection of the heads in `saved` to `out`.
pub(super) fn project(
    call: &Call,
    weights: &Space,
    ids: &AttentionIds,
    saved: &AttentionSaved,
    out: Out,
) -> Result<()> {
    let (x, weight) = (saved.heads.of(call.tokens)?, weights.view(ids.o)?);
    call.device.linear(&Linear { x, weight, bias: None, out })
}

/// From the gradient of the output to that of the input `x` (replaced in `dx`), and of the weights.
pub(super) fn backward(
    call: &Call,
    (config, inv_freq): (&ModelConfig, View),
    (weights, gradients): (&Space, &Gradients),
    ids: &AttentionIds,
    (x, saved, scratch): (View, &AttentionSaved, &AttentionScratch),
    dout: View,
    dx: View,
) -> Result<()> {
    let (device, n) = (call.device, call.tokens);
    let ([q, k, v], out) = (saved.qkv(config, n)?, saved.heads.of(n)?);
    let (dheads, dq, dk, dv) = (scratch.dheads.of(n)?, scratch.dq.of(n)?, scratch.dk.of(n)?, scratch.dv.of(n)?);
    matrix_gradient(call, (out, dout), gradients.of(ids.o)?, None)?;
    let weight = weights.view(ids.o)?;
    device.linear_backward_input(&LinearBackwardInput { dout, weight, dx: Out::assign(dheads) })?;
    let (lse, segments) = (saved.lse.of(n)?, call.segments);
    device.attention_backward(&AttentionBackward {
        shape: shape(config),
        q,
        k,
        v,
        segments,
        out,
        lse,
        dout: dheads,
        dq,
        dk,
        dv,
    })?;
    device.rope(&rotation(call, config, inv_freq, dq, true))?;
    device.rope(&rotation(call, config, inv_freq, dk, true))?;
    let projections = [(ids.q, ids.q_bias, dq), (ids.k, ids.k_bias, dk), (ids.v, ids.v_bias, dv)];
    for (i, (id, bias, dout)) in projections.into_iter().enumerate() {
        let dbias = bias.map(|bias| gradients.of(bias)).transpose()?.flatten();
        matrix_gradient(call, (x, dout), gradients.of(id)?, dbias)?;
        let (weight, dx) = (weights.view(id)?, Out { view: dx, add: i > 0 });
        device.linear_backward_input(&LinearBackwardInput { dout, weight, dx })?;
    }
    Ok(())
}
