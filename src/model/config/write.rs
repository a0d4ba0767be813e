//! Writes a `config.json` that the published PyTorch classes load.

use serde_json::{Map, Value, json};

use super::{BlockKind, DtInit, Family, MambaConfig, ModelConfig, RopeScaling};
use crate::backend::DType;

impl ModelConfig {
    /// The `config.json` of weights stored as `dtype`. A plain Mistral, Llama or Qwen2 keeps its class; whatever has another
    /// block than attention is an `apriel_h` with every key of `ssm_cfg` written out. Keys that h1 does not know stay.
    pub fn to_json(&self, dtype: DType) -> Value {
        let plain = self.blocks.iter().all(|block| *block == BlockKind::Attention);
        let family = if plain { self.family } else { Family::AprielH };
        let (architecture, model_type) = match family {
            Family::Mistral => ("MistralForCausalLM", "mistral"),
            Family::Llama => ("LlamaForCausalLM", "llama"),
            Family::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
            Family::AprielH => ("AprielHForCausalLM", "apriel_h"),
        };
        let mut keys = Map::new();
        let mut put = |key: &str, value: Value| {
            keys.insert(key.to_owned(), value);
        };
        put("architectures", json!([architecture]));
        put("model_type", json!(model_type));
        put("vocab_size", json!(self.vocab_size));
        put("hidden_size", json!(self.hidden_size));
        put("intermediate_size", json!(self.intermediate_size));
        put("num_hidden_layers", json!(self.num_hidden_layers()));
        put("num_attention_heads", json!(self.num_attention_heads));
        put("num_key_value_heads", json!(self.num_key_value_heads));
        put("head_dim", json!(self.head_dim));
        put("hidden_act", json!("silu"));
        put("rms_norm_eps", json!(self.rms_norm_eps));
        put("rope_theta", json!(self.rope.theta));
        if let Some(scaling) = &self.rope.scaling {
            put("rope_scaling", scaling.to_value(self.max_position_embeddings));
        }
        match family {
            Family::Llama => {
                put("attention_bias", json!(false));
                put("mlp_bias", json!(false));
            }
            // The class has its biases whatever the configuration says, and a window only where this is true.
            Family::Qwen2 => put("use_sliding_window", json!(false)),
            Family::Mistral | Family::AprielH => put("sliding_window", json!(self.sliding_window)),
        }
        if family == Family::AprielH && self.attention_bias {
            put("attention_bias", json!(true));
        }
        put("max_position_embeddings", json!(self.max_position_embeddings));
        put("tie_word_embeddings", json!(self.tie_word_embeddings));
        put("bos_token_id", json!(self.bos_token_id));
        put("eos_token_id", self.eos_json());
        put("initializer_range", json!(self.initializer_range));
        put("torch_dtype", json!(torch_name(dtype)));
        if family == Family::AprielH {
            let layout: Vec<&str> = self.blocks.iter().map(|block| block.layout()).collect();
            put("hybrid_block_layout", json!(layout));
            if let Some(mamba) = &self.mamba {
                let mut ssm = mamba.to_map();
                let unknown = self.extra.get("ssm_cfg").and_then(Value::as_object);
                for (key, value) in unknown.into_iter().flatten() {
                    ssm.entry(key.as_str()).or_insert_with(|| value.clone());
                }
                put("ssm_cfg", Value::Object(ssm));
            }
        }
        for (key, value) in &self.extra {
            keys.entry(key.as_str()).or_insert_with(|| value.clone());
        }
        Value::Object(keys)
    }

    /// The tokens that end a text, as Hugging Face spells none, one and many.
    pub fn eos_json(&self) -> Value {
        match self.eos_token_ids[..] {
            [] => Value::Null,
            [id] => json!(id),
            _ => json!(self.eos_token_ids),
        }
    }
}

impl RopeScaling {
    /// `context` is the longest that the model was made for.
    fn to_value(&self, context: usize) -> Value {
        match self {
            RopeScaling::Linear(factor) => json!({"rope_type": "linear", "factor": factor}),
            RopeScaling::Llama3(scaling) => json!({
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
            }),
            RopeScaling::Factors(factors) => json!({
                "rope_type": "longrope",
                "short_factor": factors,
                "long_factor": factors,
                "attention_factor": 1.0,
                "original_max_position_embeddings": context,
            }),
        }
    }
}

impl MambaConfig {
    fn to_map(&self) -> Map<String, Value> {
        let heads = self.c_heads();
        let keys = [
            ("d_state", json!(self.d_state)),
            ("d_inner", json!(self.d_inner)),
            ("d_xb", json!(self.d_xb)),
            ("expand", json!(1)),
            ("d_conv", json!(self.d_conv)),
            ("dt_rank", json!(self.dt_rank)),
            ("dt_min", json!(self.dt_min)),
            ("dt_max", json!(self.dt_max)),
            (
                "dt_init",
                json!(match self.dt_init {
                    DtInit::Random => "random",
                    DtInit::Constant => "constant",
                }),
            ),
            ("dt_scale", json!(self.dt_scale)),
            ("dt_init_floor", json!(self.dt_init_floor)),
            ("conv_bias", json!(self.conv_bias)),
            ("bias", json!(self.bias)),
            ("dt_proj_bias", json!(self.dt_proj_bias)),
            ("repeat_kv_before_conv", json!(self.repeat_kv_before_conv)),
            ("activation", json!("silu")),
            ("chunk_size", json!(128)),
            // Of another mixer, but the cache of the published class asserts that they divide d_inner.
            ("n_v_heads", json!(heads)),
            ("n_qk_heads", json!(heads)),
        ];
        keys.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }
}

/// The dtype as torch spells it.
fn torch_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "float32",
        DType::Bf16 => "bfloat16",
        DType::F16 => "float16",
        DType::F64 => "float64",
        DType::U32 => "uint32",
    }
}
