//! The shape of a model, as a `config.json` of Hugging Face says it.
//!
//! [`ModelConfig::from_json`] reads the spellings of Mistral, Llama, Qwen2 and the attention/Mamba hybrid;
//! [`ModelConfig::to_json`] writes what the published PyTorch classes load. [`ModelConfig::validate`] holds every size
//! within bounds that no later product can overflow.

mod error;
mod keys;
mod parse;
#[cfg(test)]
mod tests;
mod validate;
mod write;

pub use error::ConfigError;

/// Whose configuration class the model came with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `MistralForCausalLM`.
    Mistral,
    /// `LlamaForCausalLM`.
    Llama,
    /// `Qwen2ForCausalLM`: a Llama with biases on queries, keys and values.
    Qwen2,
    /// The hybrid, in any spelling of its `model_type`; a Mistral whose blocks have kinds.
    AprielH,
}

/// What a block of the decoder does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockKind {
    /// Attention and MLP; `t` in a layout.
    Attention,
    /// The M1 Mamba mixer and MLP; `m2` in a layout.
    Mamba,
    /// Nothing: the whole block, norms and MLP too, is left out; `i` in a layout.
    Identity,
}

impl BlockKind {
    /// The string of this kind in `hybrid_block_layout`.
    pub fn layout(self) -> &'static str {
        match self {
            BlockKind::Attention => "t",
            BlockKind::Mamba => "m2",
            BlockKind::Identity => "i",
        }
    }

    fn from_layout(name: &str) -> Option<Self> {
        [BlockKind::Attention, BlockKind::Mamba, BlockKind::Identity].into_iter().find(|kind| kind.layout() == name)
    }
}

/// Rotary position embedding, "rotate half".
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// The base of the frequencies.
    pub theta: f64,
    /// How the frequencies are scaled for contexts longer than those of the original training, if they are.
    pub scaling: Option<RopeScaling>,
}

/// `rope_scaling`.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Type `linear`: every frequency is divided by this factor.
    Linear(f64),
    /// Type `llama3`.
    Llama3(Llama3Scaling),
    /// Each frequency is divided by a factor of its own, `[head_dim / 2]`: what a GGUF file keeps of whatever scaling it came
    /// from. As a `config.json` it is type `longrope`, with these factors for short and for long texts.
    Factors(Vec<f64>),
}

/// `rope_scaling` of type `llama3`: low frequencies are divided by `factor`, high ones kept, those between blended.
#[derive(Clone, Debug, PartialEq)]
pub struct Llama3Scaling {
    /// Divisor of the low frequencies.
    pub factor: f64,
    /// A wavelength over `original_max_position_embeddings / low_freq_factor` is low.
    pub low_freq_factor: f64,
    /// A wavelength under `original_max_position_embeddings / high_freq_factor` is high.
    pub high_freq_factor: f64,
    /// Context length of the original training, in tokens.
    pub original_max_position_embeddings: usize,
}

/// How `dt_proj.weight` starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DtInit {
    /// Uniform in ± `dt_scale / √dt_rank`.
    Random,
    /// All `dt_scale / √dt_rank`.
    Constant,
}

/// `ssm_cfg`: the shape of every Mamba mixer of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct MambaConfig {
    /// States a channel.
    pub d_state: usize,
    /// Channels of z, C and the scan.
    pub d_inner: usize,
    /// Channels of x and B, before their heads are repeated.
    pub d_xb: usize,
    /// Taps of the convolution.
    pub d_conv: usize,
    /// Rank of the projection to dt.
    pub dt_rank: usize,
    /// Least dt at initialisation.
    pub dt_min: f64,
    /// Greatest dt at initialisation.
    pub dt_max: f64,
    /// How `dt_proj.weight` starts.
    pub dt_init: DtInit,
    /// Factor on that start.
    pub dt_scale: f64,
    /// dt at initialisation is never below this.
    pub dt_init_floor: f64,
    /// Whether `conv1d.bias` is there.
    pub conv_bias: bool,
    /// Whether `in_proj`, `dt_in_proj` and `out_proj` have biases.
    pub bias: bool,
    /// Whether `dt_proj.bias` is there.
    pub dt_proj_bias: bool,
    /// Whether the heads of x are repeated before the convolution (or after it).
    pub repeat_kv_before_conv: bool,
}

impl MambaConfig {
    /// A mixer of these sizes with the published defaults for the rest.
    pub fn new(d_state: usize, d_inner: usize, d_xb: usize, dt_rank: usize) -> Self {
        MambaConfig {
            d_state,
            d_inner,
            d_xb,
            d_conv: 4,
            dt_rank,
            dt_min: 0.001,
            dt_max: 0.1,
            dt_init: DtInit::Random,
            dt_scale: 1.0,
            dt_init_floor: 1e-4,
            conv_bias: true,
            bias: false,
            dt_proj_bias: true,
            repeat_kv_before_conv: true,
        }
    }

    /// What `dt_rank: "auto"` stands for.
    pub fn auto_dt_rank(hidden_size: usize) -> usize {
        hidden_size.div_ceil(16)
    }

    /// Heads of C and of the scan.
    pub fn c_heads(&self) -> usize {
        self.d_inner / self.d_state
    }

    /// Heads of x and B.
    pub fn xb_heads(&self) -> usize {
        self.d_xb / self.d_state
    }

    /// How many heads of C share a head of x and B.
    pub fn repeat(&self) -> usize {
        self.c_heads() / self.xb_heads()
    }

    /// Channels of the convolution.
    pub fn conv_channels(&self) -> usize {
        if self.repeat_kv_before_conv { self.d_inner } else { self.d_xb }
    }

    /// Rows of `in_proj`: z, x, B, C, one after the other.
    pub fn in_proj_rows(&self) -> usize {
        2 * self.d_inner + 2 * self.d_xb
    }
}

/// The shape of a decoder and what else its `config.json` says.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Whose class it came with.
    pub family: Family,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Width of a head; `num_attention_heads · head_dim` need not be `hidden_size`.
    pub head_dim: usize,
    /// Added to the mean square under the root of RMSNorm.
    pub rms_norm_eps: f64,
    /// Position embedding.
    pub rope: Rope,
    /// A query at position p sees keys p − window + 1 ..= p.
    pub sliding_window: Option<usize>,
    /// Whether the projections to queries, keys and values have biases.
    pub attention_bias: bool,
    /// Whether the embedding is the head too.
    pub tie_word_embeddings: bool,
    /// Longest context that the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Token that starts a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// The blocks, first to last.
    pub blocks: Vec<BlockKind>,
    /// The mixers of the Mamba blocks; there whenever one is.
    pub mamba: Option<MambaConfig>,
    /// Keys that h1 does not use, kept for when the configuration is written again.
    pub extra: serde_json::Map<String, serde_json::Value>,
}

impl ModelConfig {
    /// Number of blocks, of whatever kind.
    pub fn num_hidden_layers(&self) -> usize {
        self.blocks.len()
    }

    /// The blocks of this kind, first to last.
    pub fn layers_of(&self, kind: BlockKind) -> impl Iterator<Item = usize> + '_ {
        self.blocks.iter().enumerate().filter(move |(_, block)| **block == kind).map(|(layer, _)| layer)
    }

    /// Width of all query heads.
    pub fn query_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of all key heads, and of all value heads.
    pub fn key_value_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Angle of a position for each pair of a head, `[head_dim / 2]`, in radians a token:
    /// `theta^(−2j / head_dim)`, scaled as `rope_scaling` says. Computed in f64.
    ///
    /// Source: transformers, `modeling_rope_utils.py`.
    pub fn inv_freq(&self) -> Vec<f32> {
        let scale = |j: usize, f: f64| match &self.rope.scaling {
            None => f,
            Some(RopeScaling::Linear(factor)) => f / factor,
            Some(RopeScaling::Llama3(scaling)) => scaling.apply(f),
            Some(RopeScaling::Factors(factors)) => f / factors[j],
        };
        let exponent = |j: usize| -2.0 * j as f64 / self.head_dim as f64;
        (0..self.head_dim / 2).map(|j| scale(j, self.rope.theta.powf(exponent(j))) as f32).collect()
    }
}

impl Llama3Scaling {
    /// A frequency, in radians a token, as scaled.
    pub(crate) fn apply(&self, f: f64) -> f64 {
        let wavelength = 2.0 * std::f64::consts::PI / f;
        let context = self.original_max_position_embeddings as f64;
        if wavelength > context / self.low_freq_factor {
            f / self.factor
        } else if wavelength < context / self.high_freq_factor {
            f
        } else {
            let keep = (context / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor);
            (1.0 - keep) * f / self.factor + keep * f
        }
    }
}
