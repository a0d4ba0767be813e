//! The decoder in a GGUF file: its configuration from the metadata, and the names of its tensors.
//!
//! Source: `gguf-py/gguf/constants.py` and the loaders of llama.cpp.

use serde_json::Map;

use super::GgufFile;
use crate::checkpoint::error::{CheckpointError, Result};
use crate::model::config::{BlockKind, Family, Llama3Scaling, ModelConfig, Rope, RopeScaling};
use crate::model::tensors::{EMBED_TOKENS, FINAL_NORM, INPUT_NORM, LM_HEAD, POST_ATTENTION_NORM, layer_tensor};

const ARCHITECTURE: &str = "general.architecture";
const EMBEDDING: &str = "token_embd.weight";
const HEAD: &str = "output.weight";
/// What each frequency of RoPE is divided by.
const ROPE_FACTORS: &str = "rope_freqs.weight";
/// More layers than any decoder has.
const MOST_LAYERS: u64 = 1 << 14;

/// Names in a block of the file, and in one of a Hugging Face checkpoint.
const PARTS: [(&str, &str); 12] = [
    ("attn_norm.weight", INPUT_NORM),
    ("attn_q.weight", "self_attn.q_proj.weight"),
    ("attn_k.weight", "self_attn.k_proj.weight"),
    ("attn_v.weight", "self_attn.v_proj.weight"),
    ("attn_q.bias", "self_attn.q_proj.bias"),
    ("attn_k.bias", "self_attn.k_proj.bias"),
    ("attn_v.bias", "self_attn.v_proj.bias"),
    ("attn_output.weight", "self_attn.o_proj.weight"),
    ("ffn_norm.weight", POST_ATTENTION_NORM),
    ("ffn_gate.weight", "mlp.gate_proj.weight"),
    ("ffn_up.weight", "mlp.up_proj.weight"),
    ("ffn_down.weight", "mlp.down_proj.weight"),
];

/// The name that a Hugging Face checkpoint has for a tensor of a GGUF file; `None` for one of no decoder that h1 knows.
pub(in crate::checkpoint) fn hub_name(name: &str) -> Option<String> {
    match name {
        EMBEDDING => return Some(EMBED_TOKENS.to_owned()),
        HEAD => return Some(LM_HEAD.to_owned()),
        "output_norm.weight" => return Some(FINAL_NORM.to_owned()),
        _ => {}
    }
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    let (_, part) = PARTS.iter().find(|(other, _)| *other == part)?;
    Some(layer_tensor(layer.parse().ok()?, part))
}

/// Whether a tensor is part of the configuration, not of the weights: frequencies of RoPE.
pub(in crate::checkpoint) fn is_configuration(name: &str) -> bool {
    name == ROPE_FACTORS || name.ends_with(".attn_rot_embd.weight")
}

/// The heads of queries or keys whose rows the file interleaves, if this tensor has such; see
/// [`crate::checkpoint::StoredTensor::heads`]. The converters do so for the architecture `llama`, whose RoPE in llama.cpp turns
/// neighbouring rows, and not for `qwen2`.
pub(in crate::checkpoint) fn interleaved_heads(config: &ModelConfig, name: &str) -> Option<usize> {
    match name.rsplit_once('.')? {
        _ if config.family == Family::Qwen2 => None,
        (block, "weight") if block.ends_with(".attn_q") => Some(config.num_attention_heads),
        (block, "weight") if block.ends_with(".attn_k") => Some(config.num_key_value_heads),
        _ => None,
    }
}

/// Reads keys of one architecture.
struct Keys<'a> {
    file: &'a GgufFile,
    architecture: &'a str,
}

impl Keys<'_> {
    fn key(&self, part: &str) -> String {
        format!("{}.{part}", self.architecture)
    }

    fn maybe_size(&self, part: &str) -> Result<Option<usize>> {
        let key = self.key(part);
        let narrow = |size: u64| usize::try_from(size).map_err(|_| self.wrong(&key, size, "a size"));
        self.file.get_u64(&key)?.map(narrow).transpose()
    }

    fn size(&self, part: &str) -> Result<usize> {
        self.maybe_size(part)?.ok_or_else(|| self.wrong(&self.key(part), "missing", "a whole number"))
    }

    fn maybe_number(&self, part: &str) -> Result<Option<f64>> {
        self.file.get_f64(&self.key(part))
    }

    fn wrong(&self, key: &str, found: impl std::fmt::Display, expected: &'static str) -> CheckpointError {
        self.file.wrong_value(key, found, expected)
    }
}

/// The configuration of the decoder in a file.
///
/// # Errors
/// When a key is missing or makes no sense, or the decoder is one that h1 does not compute.
pub(in crate::checkpoint) fn model_config(file: &GgufFile) -> Result<ModelConfig> {
    const ARCHITECTURES: &str = "llama, mistral or qwen2";
    let architecture = file.get_str(ARCHITECTURE)?;
    let family = match architecture {
        Some("llama") => Family::Llama,
        Some("mistral") => Family::Mistral,
        Some("qwen2") => Family::Qwen2,
        other => return Err(file.wrong_value(ARCHITECTURE, other.unwrap_or("missing"), ARCHITECTURES)),
    };
    let keys = Keys { file, architecture: architecture.unwrap_or_default() };
    if let Some(experts) = keys.maybe_size("expert_count")?.filter(|experts| *experts > 0) {
        return Err(keys.wrong(&keys.key("expert_count"), experts, "0: h1 computes no mixture of experts"));
    }
    let hidden_size = keys.size("embedding_length")?;
    let num_attention_heads = keys.size("attention.head_count")?;
    let head_dim = match keys.maybe_size("attention.key_length")? {
        Some(length) => length,
        None => hidden_size.checked_div(num_attention_heads).unwrap_or(0),
    };
    for part in ["attention.value_length", "rope.dimension_count"] {
        if let Some(found) = keys.maybe_size(part)?.filter(|found| *found != head_dim) {
            return Err(keys.wrong(&keys.key(part), found, "the width of a head"));
        }
    }
    let layers = keys.size("block_count")?;
    if layers as u64 > MOST_LAYERS {
        return Err(keys.wrong(&keys.key("block_count"), layers, "at most 16384"));
    }
    let embedding = file.tensors().tensor(EMBEDDING)?;
    let window = keys.maybe_size("attention.sliding_window")?.filter(|window| *window > 0);
    let config = ModelConfig {
        // Most converters write a Mistral as a llama; what only a Mistral can have is a window.
        family: if family == Family::Llama && window.is_some() { Family::Mistral } else { family },
        vocab_size: embedding.shape.first().copied().unwrap_or(0),
        hidden_size,
        intermediate_size: keys.size("feed_forward_length")?,
        num_attention_heads,
        num_key_value_heads: keys.maybe_size("attention.head_count_kv")?.unwrap_or(num_attention_heads),
        head_dim,
        rms_norm_eps: keys
            .maybe_number("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| keys.wrong(&keys.key("attention.layer_norm_rms_epsilon"), "missing", "a number"))?,
        rope: Rope { theta: keys.maybe_number("rope.freq_base")?.unwrap_or(10000.0), scaling: None },
        sliding_window: window,
        attention_bias: family == Family::Qwen2,
        tie_word_embeddings: file.tensors().get(HEAD).is_none(),
        max_position_embeddings: keys.size("context_length")?,
        bos_token_id: file.get_u32("tokenizer.ggml.bos_token_id")?,
        eos_token_ids: ends(file)?,
        initializer_range: 0.02,
        blocks: vec![BlockKind::Attention; layers],
        mamba: None,
        extra: Map::new(),
    };
    let invalid = |source| CheckpointError::Config { path: file.path().to_owned(), source };
    config.validate().map_err(invalid)?;
    let config = ModelConfig { rope: Rope { scaling: scaling(&keys, &config)?, ..config.rope }, ..config };
    config.validate().map_err(invalid)?;
    Ok(config)
}

/// The tokens that end a text, and a turn of one.
fn ends(file: &GgufFile) -> Result<Vec<u32>> {
    let mut ends = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        ends.extend(file.get_u32(key)?.filter(|id| !ends.contains(id)));
    }
    Ok(ends)
}

/// How RoPE is scaled: by its keys, or by the tensor of factors.
fn scaling(keys: &Keys<'_>, config: &ModelConfig) -> Result<Option<RopeScaling>> {
    if keys.file.tensors().get(ROPE_FACTORS).is_some() {
        return factors(keys, config).map(Some);
    }
    let factor = match keys.maybe_number("rope.scaling.factor")? {
        // The spelling of older files.
        None => keys.maybe_number("rope.scale_linear")?,
        factor => factor,
    };
    let key = keys.key("rope.scaling.type");
    match keys.file.get_str(&key)? {
        Some("none") => Ok(None),
        None | Some("linear") => Ok(factor.filter(|factor| *factor != 1.0 && *factor != 0.0).map(RopeScaling::Linear)),
        Some(other) => Err(keys.wrong(&key, other, "none or linear, or factors as a tensor")),
    }
}

/// The factors of a file: Llama 3's scaling where they are what comes out of it, so that a configuration can say so.
fn factors(keys: &Keys<'_>, config: &ModelConfig) -> Result<RopeScaling> {
    let stored = keys.file.tensors().tensor(ROPE_FACTORS)?;
    let expected = vec![config.head_dim / 2];
    if stored.shape != expected {
        let (path, tensor, found) = (stored.path.to_owned(), ROPE_FACTORS.to_owned(), stored.shape.to_vec());
        return Err(CheckpointError::Shape { path, tensor, expected, found });
    }
    let factors: Vec<f64> = stored.to_finite_f32()?.values.into_iter().map(f64::from).collect();
    if let Some((index, value)) = factors.iter().enumerate().find(|(_, factor)| **factor <= 0.0) {
        let (path, tensor, value) = (stored.path.to_owned(), ROPE_FACTORS.to_owned(), value.to_string());
        return Err(CheckpointError::Value { path, tensor, index, value, expected: "a factor above 0" });
    }
    let context = keys.maybe_size("rope.scaling.original_context_length")?;
    let llama3 = llama3(&factors, context, config);
    Ok(llama3.map_or(RopeScaling::Factors(factors), RopeScaling::Llama3))
}

/// Llama 3's scaling of these factors, if they are its: the greatest is `factor`, the bounds are those of every Llama 3.
fn llama3(factors: &[f64], context: Option<usize>, config: &ModelConfig) -> Option<Llama3Scaling> {
    const BOUNDS: (f64, f64) = (1.0, 4.0);
    const CONTEXT: usize = 8192;
    const TOLERANCE: f64 = 1e-4;
    let scaling = Llama3Scaling {
        factor: factors.iter().copied().fold(0.0, f64::max),
        low_freq_factor: BOUNDS.0,
        high_freq_factor: BOUNDS.1,
        original_max_position_embeddings: context.unwrap_or(CONTEXT),
    };
    let same = factors.iter().enumerate().all(|(j, found)| {
        let frequency = config.rope.theta.powf(-2.0 * j as f64 / config.head_dim as f64);
        let expected = frequency / scaling.apply(frequency);
        (found - expected).abs() <= TOLERANCE * expected
    });
    same.then_some(scaling)
}
