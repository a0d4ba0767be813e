//! Every tensor of a model: its name in a Hugging Face checkpoint, its shape, and what it is for.

use serde_json::Map;

use crate::model::config::{BlockKind, MambaConfig, ModelConfig};

/// Token embedding, `[vocab_size, hidden_size]`; the head too when tied.
pub const EMBED_TOKENS: &str = "model.embed_tokens.weight";
/// Last RMSNorm, `[hidden_size]`.
pub const FINAL_NORM: &str = "model.norm.weight";
/// Head, `[vocab_size, hidden_size]`; not there when tied.
pub const LM_HEAD: &str = "lm_head.weight";
/// RMSNorm before the mixer, `[hidden_size]`.
pub const INPUT_NORM: &str = "input_layernorm.weight";
/// RMSNorm before the MLP, `[hidden_size]`.
pub const POST_ATTENTION_NORM: &str = "post_attention_layernorm.weight";

/// The full name of a tensor of a block, `part` being its name within, such as `mixer.D`.
pub fn layer_tensor(layer: usize, part: &str) -> String {
    format!("model.layers.{layer}.{part}")
}

/// What a tensor is for, and so how it is stored and trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Rows that token ids select, `[vocab_size, hidden_size]`.
    Embedding,
    /// Weight of a linear map, `[out, in]`.
    Matrix,
    /// Weight of the depthwise convolution, `[channels, 1, d_conv]`.
    Conv,
    /// `A_log`, `[d_inner, d_state]`.
    ALog,
    /// A norm's weight, a bias or `D`, `[width]`.
    Vector,
}

/// A tensor of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in a checkpoint.
    pub name: String,
    /// Its sizes, outermost first.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: Role,
    /// Its block, if it is of one.
    pub layer: Option<usize>,
    /// Whether it is of a block's attention or Mamba mixer.
    pub mixer: bool,
    /// Whether weight decay applies by default: to all but vectors and `A_log`.
    pub decayed: bool,
}

impl TensorSpec {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no value; never so in a valid configuration.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The list as it grows, with where in the model it stands.
struct Tensors {
    list: Vec<TensorSpec>,
    layer: Option<usize>,
    mixer: bool,
}

impl Tensors {
    fn add(&mut self, part: &str, role: Role, shape: &[usize]) {
        self.list.push(TensorSpec {
            name: self.layer.map_or_else(|| part.to_owned(), |layer| layer_tensor(layer, part)),
            shape: shape.to_vec(),
            role,
            layer: self.layer,
            mixer: self.mixer,
            decayed: !matches!(role, Role::Vector | Role::ALog),
        });
    }

    fn attention(&mut self, config: &ModelConfig) {
        let (hidden, bias) = (config.hidden_size, config.attention_bias);
        self.linear("self_attn.q_proj", [config.query_width(), hidden], bias);
        self.linear("self_attn.k_proj", [config.key_value_width(), hidden], bias);
        self.linear("self_attn.v_proj", [config.key_value_width(), hidden], bias);
        self.linear("self_attn.o_proj", [hidden, config.query_width()], false);
    }

    fn mamba(&mut self, mamba: &MambaConfig, hidden: usize) {
        let MambaConfig { d_inner, d_state, d_conv, dt_rank, .. } = *mamba;
        let conv = mamba.conv_channels();
        self.linear("mixer.in_proj", [mamba.in_proj_rows(), hidden], mamba.bias);
        self.linear("mixer.dt_in_proj", [dt_rank, hidden], mamba.bias);
        self.linear("mixer.dt_proj", [d_inner, dt_rank], mamba.dt_proj_bias);
        self.add("mixer.conv1d.weight", Role::Conv, &[conv, 1, d_conv]);
        if mamba.conv_bias {
            self.add("mixer.conv1d.bias", Role::Vector, &[conv]);
        }
        self.add("mixer.A_log", Role::ALog, &[d_inner, d_state]);
        self.add("mixer.D", Role::Vector, &[d_inner]);
        self.linear("mixer.out_proj", [hidden, d_inner], mamba.bias);
    }

    fn linear(&mut self, part: &str, shape: [usize; 2], bias: bool) {
        self.add(&format!("{part}.weight"), Role::Matrix, &shape);
        if bias {
            self.add(&format!("{part}.bias"), Role::Vector, &shape[..1]);
        }
    }
}

impl ModelConfig {
    /// Every tensor in the fixed order embedding, blocks, last norm, head; in a block: norm, mixer, norm, MLP.
    /// An identity block has none, and a tied model no head.
    ///
    /// Source: the state dictionaries of transformers' `MistralForCausalLM` and of the hybrid's published class.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let hidden = self.hidden_size;
        let mut tensors = Tensors { list: Vec::new(), layer: None, mixer: false };
        tensors.add(EMBED_TOKENS, Role::Embedding, &[self.vocab_size, hidden]);
        for (layer, kind) in self.blocks.iter().enumerate() {
            if *kind == BlockKind::Identity {
                continue;
            }
            tensors.layer = Some(layer);
            tensors.add(INPUT_NORM, Role::Vector, &[hidden]);
            tensors.mixer = true;
            match (kind, &self.mamba) {
                (BlockKind::Mamba, Some(mamba)) => tensors.mamba(mamba, hidden),
                _ => tensors.attention(self),
            }
            tensors.mixer = false;
            tensors.add(POST_ATTENTION_NORM, Role::Vector, &[hidden]);
            tensors.add("mlp.gate_proj.weight", Role::Matrix, &[self.intermediate_size, hidden]);
            tensors.add("mlp.up_proj.weight", Role::Matrix, &[self.intermediate_size, hidden]);
            tensors.add("mlp.down_proj.weight", Role::Matrix, &[hidden, self.intermediate_size]);
        }
        tensors.layer = None;
        tensors.add(FINAL_NORM, Role::Vector, &[hidden]);
        if !self.tie_word_embeddings {
            tensors.add(LM_HEAD, Role::Matrix, &[self.vocab_size, hidden]);
        }
        tensors.list
    }

    /// Number of parameters; a tied head counts once.
    pub fn parameter_count(&self) -> u64 {
        u64::try_from(self.parameters()).unwrap_or(u64::MAX)
    }

    /// The same of any sizes, without a list as long as the layers are many.
    pub(super) fn parameters(&self) -> u128 {
        let of = |blocks| {
            let tensors = ModelConfig { blocks, extra: Map::new(), ..self.clone() }.tensors();
            tensors.iter().map(|tensor| tensor.shape.iter().map(|size| *size as u128).product::<u128>()).sum::<u128>()
        };
        let shared = of(Vec::new());
        let kinds = [BlockKind::Attention, BlockKind::Mamba].map(|kind| (kind, self.layers_of(kind).count() as u128));
        let used = kinds.into_iter().filter(|(_, count)| *count > 0);
        shared + used.map(|(kind, count)| count * (of(vec![kind]) - shared)).sum::<u128>()
    }
}
