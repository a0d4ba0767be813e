//! Reads a `config.json`. A missing key has the default of its class in transformers or in the hybrid's repository.

use serde_json::{Map, Value, json};

use super::keys::{Keys, Result};
use super::{BlockKind, ConfigError, DtInit, Family, Llama3Scaling, MambaConfig, ModelConfig, Rope, RopeScaling};

/// More layers than any decoder has: a list of blocks is not made before this is checked.
pub(super) const MOST_LAYERS: usize = 1 << 14;

/// Defaults in which the classes differ.
struct Defaults {
    family: Family,
    /// `None`: as many as query heads.
    num_key_value_heads: Option<usize>,
    sliding_window: Option<usize>,
    max_position_embeddings: usize,
    bos_token_id: Option<u32>,
    eos_token_id: Option<u32>,
    /// The kind of every block when there is no layout.
    block: BlockKind,
}

const MISTRAL: Defaults = Defaults {
    family: Family::Mistral,
    num_key_value_heads: Some(8),
    sliding_window: Some(4096),
    max_position_embeddings: 131072,
    bos_token_id: Some(1),
    eos_token_id: Some(2),
    block: BlockKind::Attention,
};

impl Defaults {
    fn of(model_type: &Value) -> Result<Self> {
        match model_type.as_str() {
            Some("mistral") => Ok(MISTRAL),
            Some("llama") => Ok(Defaults {
                family: Family::Llama,
                num_key_value_heads: None,
                sliding_window: None,
                max_position_embeddings: 2048,
                ..MISTRAL
            }),
            Some("qwen2") => Ok(Defaults {
                family: Family::Qwen2,
                num_key_value_heads: Some(32),
                sliding_window: None,
                max_position_embeddings: 32768,
                bos_token_id: None,
                eos_token_id: None,
                ..MISTRAL
            }),
            Some("apriel_h") => Ok(Defaults { family: Family::AprielH, block: BlockKind::Mamba, ..MISTRAL }),
            Some("apriel_hybrid_ssm" | "apriel_ssm_thinker_hybrid") => {
                Ok(Defaults { family: Family::AprielH, ..MISTRAL })
            }
            _ => Err(ConfigError::unsupported(
                "model_type",
                model_type,
                "mistral, llama, qwen2, apriel_h, apriel_hybrid_ssm and apriel_ssm_thinker_hybrid",
            )),
        }
    }
}

impl ModelConfig {
    /// Reads the text of a `config.json`, in every spelling of Mistral, Llama, Qwen2 and the hybrid.
    ///
    /// # Errors
    /// When it is not JSON, a size is missing, a value makes no sense, or it is a model that h1 does not compute.
    pub fn from_json(text: &str) -> Result<Self> {
        ModelConfig::from_value(serde_json::from_str(text)?)
    }

    /// As [`ModelConfig::from_json`], from a parsed document.
    ///
    /// # Errors
    /// As [`ModelConfig::from_json`].
    pub fn from_value(document: Value) -> Result<Self> {
        let mut keys = Keys::new(document, "the configuration", "")?;
        let model_type = keys.take_some("model_type").ok_or_else(|| keys.missing("model_type"))?;
        let defaults = Defaults::of(&model_type)?;
        refuse_unsupported(&mut keys)?;
        let attention_bias = attention_bias(&mut keys, defaults.family)?;

        let hidden_size = keys.size("hidden_size", None)?;
        let num_attention_heads = keys.size("num_attention_heads", None)?;
        let num_key_value_heads =
            keys.nullable_size("num_key_value_heads", defaults.num_key_value_heads)?.unwrap_or(num_attention_heads);
        let head_dim = keys.size("head_dim", Some(hidden_size.checked_div(num_attention_heads).unwrap_or(0)))?;
        let window = keys.nullable_size("sliding_window", defaults.sliding_window)?;
        let blocks = blocks(&mut keys, &defaults)?;
        let mamba = match blocks.contains(&BlockKind::Mamba) {
            true => Some(mamba(&mut keys, hidden_size)?),
            false => None,
        };
        let mut config = ModelConfig {
            family: defaults.family,
            vocab_size: keys.size("vocab_size", None)?,
            hidden_size,
            intermediate_size: keys.size("intermediate_size", None)?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            rms_norm_eps: keys.number("rms_norm_eps", Some(1e-6))?,
            rope: rope(&mut keys)?,
            sliding_window: match defaults.family {
                Family::Mistral | Family::AprielH => window,
                // The Llama class has no window, whatever its configuration says; that of Qwen2 one that is switched off.
                Family::Llama | Family::Qwen2 => None,
            },
            attention_bias,
            tie_word_embeddings: keys.flag("tie_word_embeddings", false)?,
            max_position_embeddings: keys.size("max_position_embeddings", Some(defaults.max_position_embeddings))?,
            bos_token_id: keys.token_ids("bos_token_id", defaults.bos_token_id)?.first().copied(),
            eos_token_ids: keys.token_ids("eos_token_id", defaults.eos_token_id)?,
            initializer_range: keys.number("initializer_range", Some(0.02))?,
            blocks,
            mamba,
            extra: Map::new(),
        };
        // Written anew from the rest; `layer_types` and `linear_attn_config` are hints of the layout for vLLM.
        keys.discard(&["architectures", "torch_dtype", "dtype", "layer_types", "linear_attn_config"]);
        if config.family != Family::AprielH {
            // Code of a class that transformers has by itself.
            keys.discard(&["auto_map"]);
        }
        config.extra = keys.rest();
        config.validate()?;
        Ok(config)
    }
}

fn refuse_unsupported(keys: &mut Keys) -> Result<()> {
    keys.only("hidden_act", &json!("silu"), "silu")?;
    keys.only("mlp_bias", &json!(false), "false")?;
    keys.only("quantization_config", &Value::Null, "f32, bf16 and f16 weights")?;
    whole_head_rotates(keys)
}

/// Whether queries, keys and values have biases: those of Qwen2 always, those of a hybrid made from one by its key. That
/// key of a Llama would add one to the output projection too.
fn attention_bias(keys: &mut Keys, family: Family) -> Result<bool> {
    match family {
        Family::AprielH => keys.flag("attention_bias", false),
        Family::Qwen2 => {
            keys.only("use_sliding_window", &json!(false), "false")?;
            keys.discard(&["attention_bias", "max_window_layers"]);
            Ok(true)
        }
        Family::Mistral | Family::Llama => {
            keys.only("attention_bias", &json!(false), "false")?;
            Ok(false)
        }
    }
}

fn whole_head_rotates(keys: &mut Keys) -> Result<()> {
    match keys.number("partial_rotary_factor", Some(1.0))? {
        1.0 => Ok(()),
        factor => Err(ConfigError::unsupported(keys.path("partial_rotary_factor"), &json!(factor), "1.0")),
    }
}

fn blocks(keys: &mut Keys, defaults: &Defaults) -> Result<Vec<BlockKind>> {
    let layers = keys.size("num_hidden_layers", None)?;
    if layers == 0 || layers > MOST_LAYERS {
        return Err(ConfigError::value("num_hidden_layers", layers, format!("1 to {MOST_LAYERS}")));
    }
    let layout = match defaults.family {
        Family::AprielH => keys.take_some("hybrid_block_layout"),
        Family::Mistral | Family::Llama | Family::Qwen2 => None,
    };
    let layout = match layout {
        None => return Ok(vec![defaults.block; layers]),
        Some(Value::Array(layout)) => layout,
        Some(other) => return Err(ConfigError::value("hybrid_block_layout", other, "a list of strings")),
    };
    let kinds = layout.iter().enumerate().map(|(layer, value)| {
        value.as_str().and_then(BlockKind::from_layout).ok_or_else(|| {
            ConfigError::unsupported(format!("hybrid_block_layout[{layer}]"), value, r#""t", "m2" and "i""#)
        })
    });
    let kinds = kinds.collect::<Result<Vec<_>>>()?;
    match kinds[..] {
        [kind] => Ok(vec![kind; layers]),
        _ if kinds.len() == layers => Ok(kinds),
        _ => Err(ConfigError::value(
            "hybrid_block_layout",
            format!("a list of {}", kinds.len()),
            format!("one string for each of num_hidden_layers = {layers}, or one for all"),
        )),
    }
}

/// `rope_theta` and `rope_scaling`, or the `rope_parameters` of newer versions of transformers, which hold both.
fn rope(keys: &mut Keys) -> Result<Rope> {
    let theta = keys.number("rope_theta", Some(10000.0))?;
    let scaling = keys.take_some("rope_scaling");
    if let Some(parameters) = keys.take_some("rope_parameters") {
        let mut keys = Keys::new(parameters, "rope_parameters", "rope_parameters.")?;
        let theta = keys.number("rope_theta", Some(theta))?;
        whole_head_rotates(&mut keys)?;
        return Ok(Rope { theta, scaling: rope_scaling(&mut keys, Some(json!("default")))? });
    }
    match scaling {
        None => Ok(Rope { theta, scaling: None }),
        Some(scaling) => {
            let mut keys = Keys::new(scaling, "rope_scaling", "rope_scaling.")?;
            Ok(Rope { theta, scaling: rope_scaling(&mut keys, None)? })
        }
    }
}

fn rope_scaling(keys: &mut Keys, default: Option<Value>) -> Result<Option<RopeScaling>> {
    let old_spelling = keys.take_some("type");
    let rope_type = keys.take_some("rope_type").or(old_spelling).or(default);
    let rope_type = rope_type.ok_or_else(|| keys.missing("rope_type"))?;
    match rope_type.as_str() {
        Some("default") => Ok(None),
        Some("linear") => Ok(Some(RopeScaling::Linear(keys.number("factor", None)?))),
        Some("llama3") => Ok(Some(RopeScaling::Llama3(Llama3Scaling {
            factor: keys.number("factor", None)?,
            low_freq_factor: keys.number("low_freq_factor", None)?,
            high_freq_factor: keys.number("high_freq_factor", None)?,
            original_max_position_embeddings: keys.size("original_max_position_embeddings", None)?,
        }))),
        Some("longrope") => factors(keys).map(Some),
        _ => Err(ConfigError::unsupported(keys.path("rope_type"), &rope_type, "default, linear, llama3 and longrope")),
    }
}

/// Factors of type `longrope` that do not change with the length of a text.
fn factors(keys: &mut Keys) -> Result<RopeScaling> {
    let (short, long) = (keys.numbers("short_factor")?, keys.numbers("long_factor")?);
    if short != long {
        return Err(ConfigError::unsupported(keys.path("long_factor"), &json!(long), "the same as short_factor"));
    }
    keys.only("attention_factor", &json!(1.0), "1.0")?;
    Ok(RopeScaling::Factors(short))
}

fn mamba(keys: &mut Keys, hidden_size: usize) -> Result<MambaConfig> {
    let document = keys.take_some("ssm_cfg").unwrap_or_else(|| json!({}));
    let mut ssm = Keys::new(document, "ssm_cfg", "ssm_cfg.")?;
    let expand = ssm.number("expand", Some(1.0))?;
    let d_inner = match ssm.nullable_size("d_inner", Some(4096))? {
        Some(d_inner) => d_inner,
        // As Python's int(expand * hidden_size); the cast saturates, and the bounds are checked later.
        None => (expand * hidden_size as f64) as usize,
    };
    let dt_rank = match ssm.take_some("dt_rank") {
        None => MambaConfig::auto_dt_rank(hidden_size),
        Some(Value::String(auto)) if auto == "auto" => MambaConfig::auto_dt_rank(hidden_size),
        Some(number @ Value::Number(_)) => ssm.as_size("dt_rank", &number)?,
        Some(other) => return Err(ConfigError::value("ssm_cfg.dt_rank", other, "\"auto\" or a whole number")),
    };
    let dt_init = match ssm.take_some("dt_init").unwrap_or_else(|| json!("random")) {
        Value::String(name) if name == "random" => DtInit::Random,
        Value::String(name) if name == "constant" => DtInit::Constant,
        other => return Err(ConfigError::value("ssm_cfg.dt_init", other, r#""random" or "constant""#)),
    };
    let d_state = ssm.size("d_state", Some(64))?;
    let d_xb = ssm.size("d_xb", Some(hidden_size))?;
    let base = MambaConfig::new(d_state, d_inner, d_xb, dt_rank);
    let mamba = MambaConfig {
        d_conv: ssm.size("d_conv", Some(base.d_conv))?,
        dt_min: ssm.number("dt_min", Some(base.dt_min))?,
        dt_max: ssm.number("dt_max", Some(base.dt_max))?,
        dt_init,
        dt_scale: ssm.number("dt_scale", Some(base.dt_scale))?,
        dt_init_floor: ssm.number("dt_init_floor", Some(base.dt_init_floor))?,
        conv_bias: ssm.flag("conv_bias", base.conv_bias)?,
        bias: ssm.flag("bias", base.bias)?,
        dt_proj_bias: ssm.flag("dt_proj_bias", base.dt_proj_bias)?,
        repeat_kv_before_conv: ssm.flag("repeat_kv_before_conv", base.repeat_kv_before_conv)?,
        ..base
    };
    // Of another mixer, or without effect on this one.
    ssm.discard(&["activation", "chunk_size", "n_v_heads", "n_qk_heads"]);
    let rest = ssm.rest();
    if !rest.is_empty() {
        keys.put("ssm_cfg", Value::Object(rest));
    }
    Ok(mamba)
}
