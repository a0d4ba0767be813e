//! One block at a time, over rows that the caller keeps: what fitting a mixer needs, and measuring one.

use super::block::{self, BlockSaved, BlockScratch, Extent, Room};
use super::call::Call;
use super::decoder::Model;
use super::scratch::Column;
use super::weights::{BlockIds, Gradients, MixerIds};
use super::{attention, mamba};
use crate::backend::ops::Embed;
use crate::backend::{DType, Error, HostSlice, Largest, Out, Result, Segments, SegmentsBuffer, SegmentsView, View};

/// Runs blocks and mixers of one model.
#[derive(Debug)]
pub struct Probe<'a> {
    model: &'a Model,
    saved: BlockSaved,
    /// Memory of a backward, where there is to be one.
    backward: Option<BlockScratch>,
    ids: Column,
    segments: SegmentsBuffer,
    now: Option<(usize, SegmentsView)>,
}

impl<'a> Probe<'a> {
    /// Memory for calls of up to `tokens` rows in up to `segments` segments, stored as in training; nothing is kept for a
    /// backward.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(model: &'a Model, tokens: usize, segments: usize) -> Result<Self> {
        Probe::with_memory(model, (tokens, segments), false)
    }

    /// The same with memory for [`Self::mixer_backward`].
    ///
    /// # Errors
    /// When the device has no room.
    pub fn with_backward(model: &'a Model, tokens: usize, segments: usize) -> Result<Self> {
        Probe::with_memory(model, (tokens, segments), true)
    }

    fn with_memory(model: &'a Model, (tokens, segments): (usize, usize), training: bool) -> Result<Self> {
        let (device, config) = (model.device(), model.config());
        let dtype = model.gradients();
        let room = Room { dtype, tokens, segments, training };
        let backward = || BlockScratch::new(device, config, room.dtype, tokens);
        device.reserve(&Largest { converted: model.converted(dtype), ..config.largest(tokens, segments) })?;
        Ok(Probe {
            model,
            saved: BlockSaved::new(device, config, room, |kind| config.blocks.contains(&kind))?,
            backward: training.then(backward).transpose()?,
            ids: Column::new(device, DType::U32, tokens)?,
            segments: device.alloc_segments(segments, tokens)?,
            now: None,
        })
    }

    /// The segments of the calls that follow; none has a past.
    ///
    /// # Errors
    /// When there are more rows or segments than it was made for, or one has a past.
    pub fn begin(&mut self, segments: &Segments) -> Result<()> {
        if segments.list().iter().any(|segment| segment.past > 0) {
            return Err(Error::Argument { op: "probe", what: "a sequence with a past needs a cache".into() });
        }
        let view = self.segments.write(self.model.device(), segments)?;
        self.now = Some((segments.tokens(), view));
        Ok(())
    }

    /// The embedding of `ids`, each below the vocabulary, into `out` `[tokens, hidden]`.
    ///
    /// # Errors
    /// When there are more ids than it was made for, or the device fails.
    pub fn embed(&self, ids: &[u32], out: View) -> Result<()> {
        let (device, vocabulary) = (self.model.device(), self.model.config().vocab_size);
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
            let what = format!("token {id} is outside the vocabulary of {vocabulary}");
            return Err(Error::Argument { op: "probe", what });
        }
        let (column, weight) = (self.ids.of(ids.len())?, self.model.weights().view(self.model.ids().embed)?);
        device.write(HostSlice::U32(ids), column)?;
        device.embed(&Embed { ids: column, weight, out })
    }

    /// The residual stream `x` `[tokens, hidden]` through the whole of block `layer`, in place.
    ///
    /// # Errors
    /// When [`Self::begin`] was not called, or the device fails.
    pub fn block(&self, layer: usize, x: View) -> Result<()> {
        match self.model.ids().blocks.get(layer) {
            Some(None) => Ok(()),
            _ => {
                let ids = self.ids_of(layer)?;
                block::forward(&self.call()?, self.model.shared(), (layer, ids), (x, x), &self.saved, Extent::Whole)
            }
        }
    }

    /// Norm and mixer of block `layer`, up to the output projection: the normed input `[tokens, hidden]`, and what the
    /// projection takes (`[tokens, d_inner]` the gated output of a scan, `[tokens, heads·head_dim]` of attention). Both
    /// hold until the next call.
    ///
    /// # Errors
    /// When the block is left out, [`Self::begin`] was not called, or the device fails.
    pub fn mix(&self, layer: usize, x: View) -> Result<(View, View)> {
        let (call, ids) = (self.call()?, self.ids_of(layer)?);
        block::mix(&call, self.model.shared(), (layer, ids), x, &self.saved)?;
        let inner = match (self.saved.attention(), self.saved.mamba(), &ids.mixer) {
            (Some(saved), _, MixerIds::Attention(_)) => saved.heads(call.tokens)?,
            (_, Some(saved), MixerIds::Mamba(_)) => saved.gated(call.tokens)?,
            _ => return Err(no_block(layer)),
        };
        Ok((self.saved.normed(call.tokens)?, inner))
    }

    /// What the mixer of block `layer` gives for rows that are normed already, into `out`; both `[tokens, hidden]`.
    ///
    /// # Errors
    /// When the block is left out, [`Self::begin`] was not called, or the device fails.
    pub fn mixer(&self, layer: usize, normed: View, out: View) -> Result<()> {
        let (call, shared, ids) = (self.call()?, self.model.shared(), self.ids_of(layer)?);
        let parts = (self.saved.attention(), self.saved.mamba(), &shared.config.mamba);
        match (&ids.mixer, parts) {
            (MixerIds::Attention(ids), (Some(saved), ..)) => {
                attention::attend(
                    &call,
                    (shared.config, shared.inv_freq),
                    shared.weights,
                    (layer, ids),
                    normed,
                    saved,
                )?;
            }
            (MixerIds::Mamba(ids), (_, Some(saved), Some(mamba))) => {
                mamba::scan(&call, mamba, shared.weights, (layer, ids), normed, saved)?;
            }
            _ => return Err(no_block(layer)),
        }
        block::project(&call, shared, ids, &self.saved, Out::assign(out))
    }

    /// From the gradient `dout` of what [`Self::mixer`] gave last, for the rows `normed`, to theirs (replaced in
    /// `dnormed`), and to the weights that train; all `[tokens, hidden]`.
    ///
    /// # Errors
    /// When there is no memory for it, the block is left out, or the device fails.
    pub fn mixer_backward(
        &self,
        layer: usize,
        gradients: &Gradients,
        (normed, dout): (View, View),
        dnormed: View,
    ) -> Result<()> {
        let Some(scratch) = &self.backward else {
            return Err(Error::Argument { op: "probe", what: "it was made without memory for a backward".into() });
        };
        let (call, shared, ids) = (self.call()?, self.model.shared(), self.ids_of(layer)?);
        block::mixer_backward(&call, shared, gradients, ids, (normed, &self.saved, scratch), dout, dnormed)
    }

    fn call(&self) -> Result<Call<'_>> {
        let Some((tokens, segments)) = self.now else {
            return Err(Error::Argument { op: "probe", what: "no segments were given".into() });
        };
        Ok(Call { device: self.model.device(), tokens, segments, cache: None, fresh: true })
    }

    fn ids_of(&self, layer: usize) -> Result<&BlockIds> {
        self.model.ids().blocks.get(layer).and_then(Option::as_ref).ok_or_else(|| no_block(layer))
    }
}

fn no_block(layer: usize) -> Error {
    Error::Argument { op: "probe", what: format!("layer {layer} has no mixer") }
}
