//! What a sequence leaves behind for its next call: keys and values in pages, states of the Mamba layers.

use super::config::{BlockKind, ModelConfig};
use super::decoder::Model;
use super::mamba;
use super::weights::MixerIds;
use crate::backend::{Buffer, DType, Device, Error, HostSlice, Result, Segments, View};

/// Tokens of a page.
pub const PAGE_SIZE: usize = 64;

impl ModelConfig {
    /// Bytes that a sequence of `context` tokens keeps: keys and values of `value_bytes` each for every token in every
    /// attention layer, and states in f32 of one size, whatever the context, in every Mamba layer. More than 64 bits count is
    /// the most that they do.
    pub fn cache_bytes(&self, context: usize, value_bytes: usize) -> u64 {
        let keys = (2 * value_bytes * self.key_value_width()).saturating_mul(context);
        let states = self.mamba.as_ref().map_or(0, |mamba| 4 * (mamba.conv_state() + mamba.ssm_state()));
        let layer = |kind: &BlockKind| match kind {
            BlockKind::Attention => keys as u64,
            BlockKind::Mamba => states as u64,
            BlockKind::Identity => 0,
        };
        self.blocks.iter().map(layer).fold(0, u64::saturating_add)
    }
}

/// The cache of one layer.
#[derive(Debug)]
pub enum LayerCache {
    /// Keys (rotated) and values, each `[pages·PAGE_SIZE, kv_heads·head_dim]`.
    Attention {
        /// Keys.
        k: Buffer,
        /// Values.
        v: Buffer,
    },
    /// States, f32.
    Mamba {
        /// `[slots, d_xb·d_conv]`: the last inputs of the convolution before the head repeat.
        conv: Buffer,
        /// `[slots, d_inner·d_state]`.
        ssm: Buffer,
        /// `[d_inner, d_state]`: −exp(A_log) of the weights as they were when the cache was made.
        a: Buffer,
    },
    /// An identity block keeps nothing.
    Nothing,
}

/// The cache of a model for up to `slots` sequences; pages are shared among them and taken as they grow.
#[derive(Debug)]
pub struct Cache {
    layers: Vec<LayerCache>,
    /// `[slots, pages a slot]` u32.
    table: Buffer,
    host: Vec<u32>,
    pages_a_slot: usize,
    taken: Vec<usize>,
    free: Vec<u32>,
    changed: bool,
}

impl Cache {
    /// Room for `slots` sequences of up to `context` tokens each, and for `tokens` tokens in all; keys and values are stored
    /// as the model's activations.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(model: &Model, slots: usize, context: usize, tokens: usize) -> Result<Self> {
        let (device, config, dtype) = (model.device(), model.config(), model.activations());
        // Positions are 32 bits wide.
        if u32::try_from(context).is_err() {
            return Err(Error::Size { what: "context", value: context });
        }
        let pages_a_slot = context.div_ceil(PAGE_SIZE).max(1);
        let pages = tokens.div_ceil(PAGE_SIZE).saturating_add(slots).min(slots.saturating_mul(pages_a_slot));
        let rows = pages.saturating_mul(PAGE_SIZE);
        let layers = config
            .blocks
            .iter()
            .zip(&model.ids().blocks)
            .map(|(kind, ids)| match (kind, &config.mamba, ids.as_ref().map(|ids| &ids.mixer)) {
                (BlockKind::Attention, ..) => Ok(LayerCache::Attention {
                    k: device.alloc(dtype, rows, config.key_value_width())?,
                    v: device.alloc(dtype, rows, config.key_value_width())?,
                }),
                (BlockKind::Mamba, Some(mamba), Some(MixerIds::Mamba(ids))) => {
                    let a = device.alloc(DType::F32, mamba.d_inner, mamba.d_state)?;
                    mamba::decays(device, model.weights(), ids, a.view())?;
                    Ok(LayerCache::Mamba {
                        conv: device.alloc(DType::F32, slots, mamba.conv_state())?,
                        ssm: device.alloc(DType::F32, slots, mamba.ssm_state())?,
                        a,
                    })
                }
                _ => Ok(LayerCache::Nothing),
            })
            .collect::<Result<_>>()?;
        Ok(Cache {
            layers,
            table: device.alloc(DType::U32, slots, pages_a_slot)?,
            host: vec![0; slots * pages_a_slot],
            pages_a_slot,
            taken: vec![0; slots],
            free: (0..pages as u32).rev().collect(),
            changed: true,
        })
    }

    /// Sequences that it has room for.
    pub fn slots(&self) -> usize {
        self.taken.len()
    }

    /// Pages that no sequence holds.
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// One layer's memory.
    pub fn layer(&self, layer: usize) -> &LayerCache {
        &self.layers[layer]
    }

    /// The page table, `[slots, pages a slot]`.
    pub fn pages(&self) -> View {
        self.table.view()
    }

    /// Takes the pages that the segments' tokens will need, and writes the page table if it changed.
    ///
    /// # Errors
    /// When a slot does not exist, a sequence passes the context, or no page is free; nothing is taken then.
    pub fn prepare(&mut self, device: &Device, segments: &Segments) -> Result<()> {
        let mut needed = 0;
        for s in segments.list() {
            let (slot, pages) = (s.slot as usize, ((s.past + s.len) as usize).div_ceil(PAGE_SIZE));
            if slot >= self.slots() || pages > self.pages_a_slot {
                let what = format!("slot {slot} with {} tokens is outside the cache", s.past + s.len);
                return Err(Error::Argument { op: "cache", what });
            }
            needed += pages.saturating_sub(self.taken[slot]);
        }
        if needed > self.free.len() {
            let what = format!("{needed} more pages of {PAGE_SIZE} tokens are needed, {} are free", self.free.len());
            return Err(Error::Argument { op: "cache", what });
        }
        for s in segments.list() {
            let (slot, pages) = (s.slot as usize, ((s.past + s.len) as usize).div_ceil(PAGE_SIZE));
            while self.taken[slot] < pages
                && let Some(page) = self.free.pop()
            {
                self.host[slot * self.pages_a_slot + self.taken[slot]] = page;
                self.taken[slot] += 1;
                self.changed = true;
            }
        }
        if self.changed {
            device.write(HostSlice::U32(&self.host), self.table.view())?;
            self.changed = false;
        }
        Ok(())
    }

    /// Gives a sequence's pages back.
    pub fn release(&mut self, slot: usize) {
        let pages = std::mem::take(&mut self.taken[slot]);
        self.free.extend(self.host[slot * self.pages_a_slot..][..pages].iter().rev());
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        let layer = |layer: &LayerCache| match layer {
            LayerCache::Attention { k, v } => k.bytes() + v.bytes(),
            LayerCache::Mamba { conv, ssm, a } => conv.bytes() + ssm.bytes() + a.bytes(),
            LayerCache::Nothing => 0,
        };
        self.layers.iter().map(layer).sum::<usize>() + self.table.bytes()
    }

    /// The keys and values of the first `tokens` positions of a slot at an attention layer, each
    /// `[tokens, kv_heads·head_dim]`; `None` at another layer.
    ///
    /// # Errors
    /// When the sequence does not hold that many tokens, or the device was lost.
    pub fn read_keys(
        &self,
        device: &Device,
        layer: usize,
        slot: usize,
        tokens: usize,
    ) -> Result<Option<[Vec<f32>; 2]>> {
        let LayerCache::Attention { k, v } = &self.layers[layer] else { return Ok(None) };
        let read = |buffer: &Buffer| {
            let mut values = Vec::new();
            for first in (0..tokens).step_by(PAGE_SIZE) {
                let page = self.host[slot * self.pages_a_slot + first / PAGE_SIZE] as usize;
                let rows = buffer.view().row_range(page * PAGE_SIZE, PAGE_SIZE.min(tokens - first))?;
                values.extend(device.read(rows)?.wait()?);
            }
            Ok(values)
        };
        Ok(Some([read(k)?, read(v)?]))
    }
}
