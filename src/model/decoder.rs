//! The decoder: embedding, blocks, last norm and head; forward and backward over one axis of tokens.

use std::sync::Arc;

use super::block::{self, BlockSaved, BlockScratch, Extent, Room, Shared};
use super::cache::Cache;
use super::call::{Call, Skip};
use super::config::{BlockKind, ModelConfig};
use super::parameters::{ParameterTable, Part, Space};
use super::scratch::{Column, Rows};
use super::weights::{Gradients, ModelIds};
use crate::backend::ops::{Copy, Embed, EmbedBackward};
use crate::backend::{
    Buffer, DType, Device, Error, HostSlice, Largest, Out, Result, Segments, SegmentsBuffer, SegmentsView, View,
};

/// A model on a device: its shape and its weights.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    device: Device,
    weights: Space,
    ids: ModelIds,
    inv_freq: Buffer,
}

/// How activations of training and their gradients are stored where those of a forward pass are in `activations`: f16 would
/// lose small gradients.
pub fn trained_as(activations: DType) -> DType {
    Some(activations).filter(|&dtype| dtype != DType::F16).unwrap_or(DType::F32)
}

impl Model {
    /// A model of zeros; matrices are stored in `dtype`, the rest in f32.
    ///
    /// # Errors
    /// When the device has no room, or cannot store the dtype.
    pub fn new(device: &Device, config: ModelConfig, dtype: DType) -> Result<Self> {
        let table = Arc::new(ParameterTable::new(&config));
        let ids = ModelIds::find(&config, &table)
            .map_err(|name| Error::Argument { op: "model", what: format!("the configuration has no {name}") })?;
        let frequencies = config.inv_freq();
        let inv_freq = device.alloc(DType::F32, 1, frequencies.len())?;
        device.write(HostSlice::F32(&frequencies), inv_freq.view())?;
        Ok(Model { weights: Space::new(device, &table, dtype)?, config, device: device.clone(), ids, inv_freq })
    }

    /// Its shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where it lives.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Its weights.
    pub fn weights(&self) -> &Space {
        &self.weights
    }

    /// Its weights by role.
    pub fn ids(&self) -> &ModelIds {
        &self.ids
    }

    /// How activations of a forward pass are stored beside its weights.
    pub fn activations(&self) -> DType {
        self.device.info().activations_beside(self.weights.part(Part::Matrices).dtype)
    }

    /// How activations of training and their gradients are.
    pub fn gradients(&self) -> DType {
        trained_as(self.activations())
    }

    /// [`Largest::converted`] where activations are stored as `dtype`.
    pub(super) fn converted(&self, dtype: DType) -> usize {
        let other = self.weights.part(Part::Matrices).dtype != dtype;
        let matrices = self.weights.table().iter().filter(|(_, p)| other && p.part == Part::Matrices);
        matrices.map(|(_, p)| p.spec.len()).max().unwrap_or(0)
    }

    pub(super) fn shared(&self) -> Shared<'_> {
        Shared { config: &self.config, weights: &self.weights, inv_freq: self.inv_freq.view() }
    }
}

/// How much of a forward pass is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: the residual stream is updated in place.
    Nothing,
    /// The input of each block; backward computes the rest again.
    Inputs,
    /// Everything that backward needs.
    Everything,
}

/// The activation memory of a model for calls up to a number of tokens and segments.
#[derive(Debug)]
pub struct Activations {
    keep: Keep,
    /// The residual stream before block 0, 1, … and after the last one; a single one where nothing is kept.
    hidden: Vec<Rows>,
    saved: Vec<BlockSaved>,
    /// The gradient of the residual stream, and the memory of a block's backward.
    backward: Option<(Rows, BlockScratch)>,
    ids: Column,
    segments: SegmentsBuffer,
    /// Tokens of the last call and its segments on the device.
    last: Option<(usize, SegmentsView)>,
    /// Whether none of these has a past, though it is no step of decoding.
    fresh: bool,
}

impl Activations {
    /// Memory for calls of up to `tokens` rows in up to `segments` segments.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(model: &Model, keep: Keep, tokens: usize, segments: usize) -> Result<Self> {
        let (device, config, training) = (&model.device, &model.config, keep != Keep::Nothing);
        let dtype = if training { model.gradients() } else { model.activations() };
        let room = Room { dtype, tokens, segments, training };
        let streams = if keep == Keep::Nothing { 1 } else { config.blocks.len() + 1 };
        let rows = || Rows::new(device, dtype, tokens, config.hidden_size);
        let saved = match keep {
            Keep::Everything => config
                .blocks
                .iter()
                .map(|kind| BlockSaved::new(device, config, room, |other| other == *kind))
                .collect::<Result<_>>()?,
            _ => vec![BlockSaved::new(device, config, room, |kind| config.blocks.contains(&kind))?],
        };
        let backward = || Ok((rows()?, BlockScratch::new(device, config, dtype, tokens)?));
        device.reserve(&Largest { converted: model.converted(dtype), ..config.largest(tokens, segments) })?;
        Ok(Activations {
            keep,
            hidden: (0..streams).map(|_| rows()).collect::<Result<_>>()?,
            saved,
            backward: room.training.then(backward).transpose()?,
            ids: Column::new(device, DType::U32, tokens)?,
            segments: device.alloc_segments(segments, tokens)?,
            last: None,
            fresh: false,
        })
    }

    /// The residual stream after the last block, `[tokens, hidden]`, of the last forward.
    ///
    /// # Errors
    /// When nothing ran yet.
    pub fn output(&self) -> Result<View> {
        self.hidden[self.hidden.len() - 1].of(self.last()?.0)
    }

    /// The residual stream before block `layer` (after the last one at the number of layers), `[tokens, hidden]`.
    ///
    /// # Errors
    /// When nothing was kept.
    pub fn input_of(&self, layer: usize) -> Result<View> {
        let rows = self.hidden.get(layer).filter(|_| self.keep != Keep::Nothing);
        rows.ok_or_else(|| kept_nothing("hidden states"))?.of(self.last()?.0)
    }

    /// Where the gradient of [`Self::output`] goes before backward.
    ///
    /// # Errors
    /// When nothing was kept.
    pub fn doutput(&self) -> Result<View> {
        self.backward.as_ref().ok_or_else(|| kept_nothing("gradients"))?.0.of(self.last()?.0)
    }

    /// What the last computation of block `layer` left: all of them keep theirs under [`Keep::Everything`], else it is
    /// that of the last block computed.
    pub fn saved(&self, layer: usize) -> &BlockSaved {
        &self.saved[layer.min(self.saved.len() - 1)]
    }

    fn last(&self) -> Result<(usize, SegmentsView)> {
        self.last.ok_or_else(|| kept_nothing("a forward pass"))
    }
}

fn kept_nothing(what: &str) -> Error {
    Error::Argument { op: "backward", what: format!("{what}: nothing was kept") }
}

impl ModelConfig {
    /// The largest sizes of calls of up to `tokens` rows in up to `segments` segments, without logits.
    pub fn largest(&self, tokens: usize, segments: usize) -> Largest {
        let mamba = self.mamba.as_ref().filter(|_| self.blocks.contains(&BlockKind::Mamba));
        let projected = mamba.map_or(0, |mamba| mamba.in_proj_rows());
        Largest {
            tokens,
            segments,
            width: self.intermediate_size.max(self.query_width()).max(self.hidden_size).max(projected),
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads,
            query_width: self.query_width(),
            state: mamba.map_or(0, |mamba| mamba.ssm_state()),
            d_state: mamba.map_or(0, |mamba| mamba.d_state),
            ..Largest::default()
        }
    }
}

impl Model {
    /// Token ids through all blocks; the result is [`Activations::output`].
    ///
    /// # Errors
    /// When an id is outside the vocabulary, a call is larger than the memory, a sequence has a past but there is no
    /// cache, or the device fails.
    pub fn forward(
        &self,
        activations: &mut Activations,
        ids: &[u32],
        segments: &Segments,
        mut cache: Option<&mut Cache>,
        skip: Option<Skip>,
    ) -> Result<()> {
        self.prepare(activations, ids, segments, cache.as_deref_mut())?;
        self.launch(activations, cache.as_deref(), skip)
    }

    /// The first half of [`Self::forward`]: writes what a call is about to the device.
    ///
    /// # Errors
    /// When an id is outside the vocabulary, a call is larger than the memory, a sequence has a past but there is no
    /// cache, or the device fails.
    pub fn prepare(
        &self,
        activations: &mut Activations,
        ids: &[u32],
        segments: &Segments,
        cache: Option<&mut Cache>,
    ) -> Result<()> {
        self.check(ids, segments, cache.is_some())?;
        let segments_view = activations.segments.write(&self.device, segments)?;
        activations.last = Some((ids.len(), segments_view));
        let list = segments.list();
        activations.fresh = ids.len() > list.len() && list.iter().all(|segment| segment.past == 0);
        if let Some(cache) = cache {
            cache.prepare(&self.device, segments)?;
        }
        self.device.write(HostSlice::U32(ids), activations.ids.of(ids.len())?)
    }

    /// The second half of [`Self::forward`]: launches alone, the same for every step of decoding as many sequences.
    ///
    /// # Errors
    /// When nothing was prepared, or the device fails.
    pub fn launch(&self, activations: &Activations, cache: Option<&Cache>, skip: Option<Skip>) -> Result<()> {
        let (device, (tokens, segments)) = (&self.device, activations.last()?);
        let call = Call { device, tokens, segments, cache, fresh: activations.fresh };
        let column = activations.ids.of(tokens)?;
        let weight = self.weights.view(self.ids.embed)?;
        device.embed(&Embed { ids: column, weight, out: activations.hidden[0].of(tokens)? })?;
        for (layer, ids) in self.ids.blocks.iter().enumerate() {
            let stream = |layer: usize| activations.hidden[layer.min(activations.hidden.len() - 1)].of(tokens);
            let (x, out) = (stream(layer)?, stream(layer + 1)?);
            let extent = if skip == Some(Skip::Mixer(layer)) { Extent::WithoutMixer } else { Extent::Whole };
            match ids {
                Some(ids) if skip != Some(Skip::Block(layer)) => {
                    block::forward(&call, self.shared(), (layer, ids), (x, out), activations.saved(layer), extent)?;
                }
                _ if x != out => device.copy(&Copy { src: x, out: Out::assign(out) })?,
                _ => {}
            }
        }
        Ok(())
    }

    /// What the mixer of block `layer` gave in the last forward, before it was added to the stream, into `out`
    /// `[tokens, hidden]`.
    ///
    /// # Errors
    /// When the block is an identity or not everything was kept.
    pub fn mixer_output(&self, activations: &Activations, layer: usize, out: View) -> Result<()> {
        let (tokens, segments) = activations.last()?;
        let call = Call { device: &self.device, tokens, segments, cache: None, fresh: activations.fresh };
        match self.ids.blocks.get(layer) {
            Some(Some(ids)) if activations.keep == Keep::Everything => {
                block::project(&call, self.shared(), ids, activations.saved(layer), Out::assign(out))
            }
            _ => Err(kept_nothing("the mixer's output")),
        }
    }

    /// From [`Activations::doutput`] down through the blocks of the last forward (nothing skipped, no cache), adding to
    /// the gradients of every parameter that trains; goes no lower than the lowest of them.
    ///
    /// # Errors
    /// When forward kept nothing, or the device fails.
    pub fn backward(&self, activations: &Activations, gradients: &Gradients) -> Result<()> {
        let device = &self.device;
        let (tokens, segments) = activations.last()?;
        let call = Call { device, tokens, segments, cache: None, fresh: activations.fresh };
        let (_, scratch) = activations.backward.as_ref().ok_or_else(|| kept_nothing("gradients"))?;
        let dx = activations.doutput()?;
        for (layer, ids) in self.ids.blocks.iter().enumerate().skip(gradients.stop_layer()).rev() {
            let Some(ids) = ids else { continue };
            let (x, saved) = (activations.hidden[layer].of(tokens)?, activations.saved(layer));
            if activations.keep == Keep::Inputs {
                block::forward(&call, self.shared(), (layer, ids), (x, x), saved, Extent::Again)?;
            }
            block::backward(&call, self.shared(), gradients, ids, (x, saved, scratch), dx)?;
        }
        if let Some(dweight) = gradients.of(self.ids.embed)? {
            device.embed_backward(&EmbedBackward { ids: activations.ids.of(tokens)?, dout: dx, dweight })?;
        }
        Ok(())
    }

    fn check(&self, ids: &[u32], segments: &Segments, cache: bool) -> Result<()> {
        let wrong = |what: String| Err(Error::Argument { op: "forward", what });
        if let Some((row, id)) = ids.iter().enumerate().find(|(_, id)| **id as usize >= self.config.vocab_size) {
            return wrong(format!("token {id} at row {row} is outside the vocabulary of {}", self.config.vocab_size));
        }
        if ids.len() != segments.tokens() {
            return wrong(format!("{} token ids for segments of {} rows", ids.len(), segments.tokens()));
        }
        match segments.list().iter().find(|s| s.past > 0) {
            Some(s) if !cache => wrong(format!("a sequence with {} tokens behind it needs a cache", s.past)),
            _ => Ok(()),
        }
    }
}
