//! The parameters of each layer by role, and the gradients that are wanted.

use std::sync::Arc;

use super::config::{BlockKind, ModelConfig};
use super::parameters::{Parameter, ParameterId, ParameterTable, Space};
use crate::backend::{DType, Device, Result, View};

/// The weights of an attention mixer.
#[derive(Clone, Debug)]
pub struct AttentionIds {
    /// `[heads·head_dim, hidden]`.
    pub q: ParameterId,
    /// `[kv_heads·head_dim, hidden]`.
    pub k: ParameterId,
    /// `[kv_heads·head_dim, hidden]`.
    pub v: ParameterId,
    /// `[hidden, heads·head_dim]`.
    pub o: ParameterId,
    /// `[heads·head_dim]`.
    pub q_bias: Option<ParameterId>,
    /// `[kv_heads·head_dim]`.
    pub k_bias: Option<ParameterId>,
    /// `[kv_heads·head_dim]`.
    pub v_bias: Option<ParameterId>,
}

/// The weights of an `m2` mixer.
#[derive(Clone, Debug)]
pub struct MambaIds {
    /// `[2·d_inner + 2·d_xb, hidden]`: rows z, x, B, C.
    pub in_proj: ParameterId,
    /// `[2·d_inner + 2·d_xb]`.
    pub in_proj_bias: Option<ParameterId>,
    /// `[dt_rank, hidden]`.
    pub dt_in_proj: ParameterId,
    /// `[dt_rank]`.
    pub dt_in_proj_bias: Option<ParameterId>,
    /// `[d_inner, dt_rank]`.
    pub dt_proj: ParameterId,
    /// `[d_inner]`: added by the projection, and once more in the scan.
    pub dt_bias: Option<ParameterId>,
    /// `[filters, d_conv]`.
    pub conv: ParameterId,
    /// `[filters]`.
    pub conv_bias: Option<ParameterId>,
    /// `[d_inner, d_state]`.
    pub a_log: ParameterId,
    /// `[d_inner]`.
    pub d: ParameterId,
    /// `[hidden, d_inner]`.
    pub out_proj: ParameterId,
    /// `[hidden]`.
    pub out_proj_bias: Option<ParameterId>,
}

/// The weights of an MLP.
#[derive(Clone, Debug)]
pub struct MlpIds {
    /// `[intermediate, hidden]`.
    pub gate: ParameterId,
    /// `[intermediate, hidden]`.
    pub up: ParameterId,
    /// `[hidden, intermediate]`.
    pub down: ParameterId,
}

/// The mixer of a block.
#[derive(Clone, Debug)]
pub enum MixerIds {
    /// Attention.
    Attention(AttentionIds),
    /// Mamba.
    Mamba(MambaIds),
}

/// The weights of a block.
#[derive(Clone, Debug)]
pub struct BlockIds {
    /// Norm before the mixer, `[hidden]`.
    pub input_norm: ParameterId,
    /// The mixer.
    pub mixer: MixerIds,
    /// Norm before the MLP, `[hidden]`.
    pub post_norm: ParameterId,
    /// The MLP.
    pub mlp: MlpIds,
}

/// The weights of a model by role.
#[derive(Clone, Debug)]
pub struct ModelIds {
    /// `[vocabulary, hidden]`.
    pub embed: ParameterId,
    /// One a layer; `None` for an identity block.
    pub blocks: Vec<Option<BlockIds>>,
    /// Last norm, `[hidden]`.
    pub norm: ParameterId,
    /// `[vocabulary, hidden]`; the embedding's where they are tied.
    pub head: ParameterId,
}

impl ModelIds {
    /// Finds every weight of a configuration in its table; the name that is missing otherwise.
    pub(super) fn find(config: &ModelConfig, table: &ParameterTable) -> std::result::Result<Self, String> {
        let find = |name: String| table.find(&name).ok_or(name);
        let block = |(layer, kind): (usize, &BlockKind)| {
            let of = |name: &str| find(format!("model.layers.{layer}.{name}"));
            let maybe = |name: &str| table.find(&format!("model.layers.{layer}.{name}"));
            let mixer = match kind {
                BlockKind::Identity => return Ok(None),
                BlockKind::Attention => MixerIds::Attention(AttentionIds {
                    q: of("self_attn.q_proj.weight")?,
                    k: of("self_attn.k_proj.weight")?,
                    v: of("self_attn.v_proj.weight")?,
                    o: of("self_attn.o_proj.weight")?,
                    q_bias: maybe("self_attn.q_proj.bias"),
                    k_bias: maybe("self_attn.k_proj.bias"),
                    v_bias: maybe("self_attn.v_proj.bias"),
                }),
                BlockKind::Mamba => MixerIds::Mamba(MambaIds {
                    in_proj: of("mixer.in_proj.weight")?,
                    in_proj_bias: maybe("mixer.in_proj.bias"),
                    dt_in_proj: of("mixer.dt_in_proj.weight")?,
                    dt_in_proj_bias: maybe("mixer.dt_in_proj.bias"),
                    dt_proj: of("mixer.dt_proj.weight")?,
                    dt_bias: maybe("mixer.dt_proj.bias"),
                    conv: of("mixer.conv1d.weight")?,
                    conv_bias: maybe("mixer.conv1d.bias"),
                    a_log: of("mixer.A_log")?,
                    d: of("mixer.D")?,
                    out_proj: of("mixer.out_proj.weight")?,
                    out_proj_bias: maybe("mixer.out_proj.bias"),
                }),
            };
            Ok(Some(BlockIds {
                input_norm: of("input_layernorm.weight")?,
                mixer,
                post_norm: of("post_attention_layernorm.weight")?,
                mlp: MlpIds {
                    gate: of("mlp.gate_proj.weight")?,
                    up: of("mlp.up_proj.weight")?,
                    down: of("mlp.down_proj.weight")?,
                },
            }))
        };
        let embed = find("model.embed_tokens.weight".into())?;
        Ok(ModelIds {
            embed,
            blocks: config.blocks.iter().enumerate().map(block).collect::<std::result::Result<_, String>>()?,
            norm: find("model.norm.weight".into())?,
            head: table.find("lm_head.weight").unwrap_or(embed),
        })
    }
}

/// The gradients of the parameters that train; the others are frozen and cost nothing in backward.
#[derive(Debug)]
pub struct Gradients {
    space: Space,
    trained: Vec<bool>,
    lowest_layer: usize,
    embedding: bool,
}

impl Gradients {
    /// Zero gradients for the parameters that `trained` holds for.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(device: &Device, table: &Arc<ParameterTable>, trained: impl Fn(&Parameter) -> bool) -> Result<Self> {
        let flags: Vec<bool> = table.iter().map(|(_, p)| trained(p)).collect();
        let chosen = || table.iter().zip(&flags).filter(|(_, flag)| **flag).map(|((_, p), _)| p);
        Ok(Gradients {
            space: Space::new(device, table, DType::F32)?,
            lowest_layer: chosen().filter_map(|p| p.spec.layer).min().unwrap_or(usize::MAX),
            embedding: chosen().any(|p| p.spec.name == "model.embed_tokens.weight"),
            trained: flags,
        })
    }

    /// Where the gradient of a parameter adds up; `None` for a frozen one.
    ///
    /// # Errors
    /// When the id is of another table.
    pub fn of(&self, id: ParameterId) -> Result<Option<View>> {
        if self.trained[id.index()] { self.space.view(id).map(Some) } else { Ok(None) }
    }

    /// The flat gradients.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// Whether a parameter trains.
    pub fn trains(&self, id: ParameterId) -> bool {
        self.trained[id.index()]
    }

    /// The lowest layer with a trained parameter, or where to stop going down: 0 when the embedding trains.
    pub(super) fn stop_layer(&self) -> usize {
        if self.embedding { 0 } else { self.lowest_layer }
    }
}
