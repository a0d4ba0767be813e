//! A block: `x += mixer(norm(x))`, `x += mlp(norm(x))`.

use super::attention::{self, AttentionSaved, AttentionScratch};
use super::call::Call;
use super::config::{BlockKind, ModelConfig};
use super::mamba::{self, MambaSaved, MambaScratch};
use super::mlp::{self, MlpSaved, MlpScratch};
use super::parameters::{ParameterId, Space};
use super::scratch::{Column, Rows};
use super::weights::{BlockIds, Gradients, MixerIds};
use crate::backend::ops::{Copy, RmsNorm, RmsNormBackward};
use crate::backend::{DType, Device, Error, Out, Result, View};

/// What a block's forward leaves for its backward; one is shared by all blocks where they are computed again.
#[derive(Debug)]
pub struct BlockSaved {
    normed: Rows,
    inv_rms: Column,
    attention: Option<AttentionSaved>,
    mamba: Option<MambaSaved>,
    /// The residual stream between mixer and MLP; without one it is updated in place.
    middle: Option<Rows>,
    post_normed: Rows,
    post_inv_rms: Column,
    mlp: MlpSaved,
}

/// Memory of a block's backward.
#[derive(Debug)]
pub struct BlockScratch {
    dnormed: Rows,
    attention: Option<AttentionScratch>,
    mamba: Option<MambaScratch>,
    mlp: MlpScratch,
}

/// Sizes that a block's memory is made for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    pub(super) dtype: DType,
    pub(super) tokens: usize,
    pub(super) segments: usize,
    pub(super) training: bool,
}

impl BlockSaved {
    /// Memory for the kinds of blocks that `has` holds for.
    pub(super) fn new(
        device: &Device,
        config: &ModelConfig,
        room: Room,
        has: impl Fn(BlockKind) -> bool,
    ) -> Result<Self> {
        let Room { dtype, tokens, segments, training } = room;
        let rows = || Rows::new(device, dtype, tokens, config.hidden_size);
        let column = || Column::new(device, DType::F32, tokens);
        let mamba = config.mamba.as_ref().filter(|_| has(BlockKind::Mamba));
        Ok(BlockSaved {
            normed: rows()?,
            inv_rms: column()?,
            attention: has(BlockKind::Attention)
                .then(|| AttentionSaved::new(device, config, dtype, tokens))
                .transpose()?,
            mamba: mamba
                .map(|mamba| MambaSaved::new(device, mamba, dtype, (tokens, segments), training))
                .transpose()?,
            middle: training.then(rows).transpose()?,
            post_normed: rows()?,
            post_inv_rms: column()?,
            mlp: MlpSaved::new(device, config, room)?,
        })
    }

    /// `[tokens, hidden]`: the mixer's normed input.
    ///
    /// # Errors
    /// When it was made for fewer tokens.
    pub fn normed(&self, tokens: usize) -> Result<View> {
        self.normed.of(tokens)
    }

    pub(super) fn attention(&self) -> Option<&AttentionSaved> {
        self.attention.as_ref()
    }

    /// What the Mamba mixer left, where the block has one.
    pub fn mamba(&self) -> Option<&MambaSaved> {
        self.mamba.as_ref()
    }
}

impl BlockScratch {
    pub(super) fn new(device: &Device, config: &ModelConfig, dtype: DType, tokens: usize) -> Result<Self> {
        let has = |kind| config.blocks.contains(&kind);
        let mamba = config.mamba.as_ref().filter(|_| has(BlockKind::Mamba));
        Ok(BlockScratch {
            dnormed: Rows::new(device, dtype, tokens, config.hidden_size)?,
            attention: has(BlockKind::Attention)
                .then(|| AttentionScratch::new(device, config, dtype, tokens))
                .transpose()?,
            mamba: mamba.map(|mamba| MambaScratch::new(device, mamba, dtype, tokens)).transpose()?,
            mlp: MlpScratch::new(device, config, dtype, tokens)?,
        })
    }
}

/// What all blocks of a model share.
#[derive(Clone, Copy)]
pub(super) struct Shared<'a> {
    pub(super) config: &'a ModelConfig,
    pub(super) weights: &'a Space,
    pub(super) inv_freq: View,
}

fn missing(kind: &str) -> Error {
    Error::Argument { op: "block", what: format!("no memory was planned for {kind} blocks") }
}

fn norm(call: &Call, shared: Shared, weight: ParameterId, x: View, (out, inv_rms): (&Rows, &Column)) -> Result<View> {
    let out = out.of(call.tokens)?;
    let (weight, inv_rms) = (shared.weights.view(weight)?, Some(inv_rms.of(call.tokens)?));
    call.device.rms_norm(&RmsNorm { x, weight, eps: shared.config.rms_norm_eps as f32, out, inv_rms })?;
    Ok(out)
}

/// The norm before the mixer and the mixer up to its output projection.
pub(super) fn mix(
    call: &Call,
    shared: Shared,
    (layer, ids): (usize, &BlockIds),
    x: View,
    saved: &BlockSaved,
) -> Result<()> {
    let normed = norm(call, shared, ids.input_norm, x, (&saved.normed, &saved.inv_rms))?;
    match (&ids.mixer, &saved.attention, &saved.mamba, &shared.config.mamba) {
        (MixerIds::Attention(ids), Some(saved), _, _) => {
            attention::attend(call, (shared.config, shared.inv_freq), shared.weights, (layer, ids), normed, saved)
        }
        (MixerIds::Mamba(ids), _, Some(saved), Some(mamba)) => {
            mamba::scan(call, mamba, shared.weights, (layer, ids), normed, saved)
        }
        (MixerIds::Attention(_), ..) => Err(missing("attention")),
        (MixerIds::Mamba(_), ..) => Err(missing("Mamba")),
    }
}

/// The mixer's output projection, into or onto `out`.
pub(super) fn project(call: &Call, shared: Shared, ids: &BlockIds, saved: &BlockSaved, out: Out) -> Result<()> {
    match (&ids.mixer, &saved.attention, &saved.mamba) {
        (MixerIds::Attention(ids), Some(saved), _) => attention::project(call, shared.weights, ids, saved, out),
        (MixerIds::Mamba(ids), _, Some(saved)) => mamba::project(call, shared.weights, ids, saved, out),
        (MixerIds::Attention(_), ..) => Err(missing("attention")),
        (MixerIds::Mamba(_), ..) => Err(missing("Mamba")),
    }
}

/// How much of a block to compute.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// All of it.
    Whole,
    /// The MLP alone: the mixer adds nothing.
    WithoutMixer,
    /// What backward needs again: all but the last product.
    Again,
}

/// One block from `x` to `out`; they are the same view where nothing is kept for backward.
pub(super) fn forward(
    call: &Call,
    shared: Shared,
    (layer, ids): (usize, &BlockIds),
    (x, out): (View, View),
    saved: &BlockSaved,
    extent: Extent,
) -> Result<()> {
    let middle = match &saved.middle {
        Some(middle) => {
            let middle = middle.of(call.tokens)?;
            call.device.copy(&Copy { src: x, out: Out::assign(middle) })?;
            middle
        }
        None => x,
    };
    if extent != Extent::WithoutMixer {
        mix(call, shared, (layer, ids), x, saved)?;
        project(call, shared, ids, saved, Out::add(middle))?;
    }
    let normed = norm(call, shared, ids.post_norm, middle, (&saved.post_normed, &saved.post_inv_rms))?;
    mlp::activate(call, shared.weights, &ids.mlp, normed, &saved.mlp)?;
    if extent == Extent::Again {
        return Ok(());
    }
    if middle != out {
        call.device.copy(&Copy { src: middle, out: Out::assign(out) })?;
    }
    mlp::project(call, shared.weights, &ids.mlp, &saved.mlp, out)
}

/// One block's backward: `dx` holds the gradient of the output and becomes that of the input `x`.
pub(super) fn backward(
    call: &Call,
    shared: Shared,
    gradients: &Gradients,
    ids: &BlockIds,
    (x, saved, scratch): (View, &BlockSaved, &BlockScratch),
    dx: View,
) -> Result<()> {
    let n = call.tokens;
    let Some(middle) = &saved.middle else {
        return Err(Error::Argument { op: "block backward", what: "forward kept nothing".into() });
    };
    let (normed, post_normed, dnormed) = (saved.normed.of(n)?, saved.post_normed.of(n)?, scratch.dnormed.of(n)?);
    let norm_backward = |x: View, id: ParameterId, inv_rms: &Column| {
        call.device.rms_norm_backward(&RmsNormBackward {
            x,
            weight: shared.weights.view(id)?,
            inv_rms: inv_rms.of(n)?,
            dout: dnormed,
            dx: Out::add(dx),
            dweight: gradients.of(id)?,
        })
    };
    mlp::backward(call, shared.weights, gradients, &ids.mlp, (post_normed, &saved.mlp, &scratch.mlp), dx, dnormed)?;
    norm_backward(middle.of(n)?, ids.post_norm, &saved.post_inv_rms)?;
    mixer_backward(call, shared, gradients, ids, (normed, saved, scratch), dx, dnormed)?;
    norm_backward(x, ids.input_norm, &saved.inv_rms)
}

/// The mixer's backward: from the gradient `dout` of its output to that of its normed input (replaced in `dnormed`).
pub(super) fn mixer_backward(
    call: &Call,
    shared: Shared,
    gradients: &Gradients,
    ids: &BlockIds,
    (normed, saved, scratch): (View, &BlockSaved, &BlockScratch),
    dout: View,
    dnormed: View,
) -> Result<()> {
    match (&ids.mixer, &saved.attention, &scratch.attention, &saved.mamba, &scratch.mamba, &shared.config.mamba) {
        (MixerIds::Attention(ids), Some(saved), Some(scratch), ..) => attention::backward(
            call,
            (shared.config, shared.inv_freq),
            (shared.weights, gradients),
            ids,
            (normed, saved, scratch),
            dout,
            dnormed,
        ),
        (MixerIds::Mamba(ids), _, _, Some(saved), Some(scratch), Some(mamba)) => {
            mamba::backward(call, mamba, (shared.weights, gradients), ids, (normed, saved, scratch), dout, dnormed)
        }
        (MixerIds::Attention(_), ..) => Err(missing("attention")),
        (MixerIds::Mamba(_), ..) => Err(missing("Mamba")),
    }
}
