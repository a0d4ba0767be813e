//! The bounds of every size and the divisions that must come out even.

use super::keys::Result;
use super::parse::MOST_LAYERS;
use super::{BlockKind, ConfigError, MambaConfig, ModelConfig, RopeScaling};

/// Widest activation; a matrix of two such widths, and a model of many, stay far below what 64 bits count.
const WIDEST: usize = 1 << 24;
/// Longest context and largest vocabulary.
const MOST_TOKENS: usize = 1 << 40;
const LARGEST_VOCABULARY: usize = 1 << 28;
/// Most values of a model.
const MOST_PARAMETERS: u128 = 1 << 48;

impl ModelConfig {
    /// Holds every size within bounds, so that no product of sizes overflows and no size is absurd, and checks that
    /// heads, groups and states divide as the formulas need.
    ///
    /// # Errors
    /// Names the first key that is out of bounds.
    pub fn validate(&self) -> Result<()> {
        within("num_hidden_layers", self.blocks.len(), MOST_LAYERS)?;
        within("vocab_size", self.vocab_size, LARGEST_VOCABULARY)?;
        within("hidden_size", self.hidden_size, WIDEST)?;
        within("intermediate_size", self.intermediate_size, WIDEST)?;
        within("num_attention_heads", self.num_attention_heads, WIDEST)?;
        within("num_key_value_heads", self.num_key_value_heads, WIDEST)?;
        within("head_dim", self.head_dim, WIDEST / self.num_attention_heads)?;
        divides("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads)?;
        divides("head_dim", self.head_dim, "the two halves that RoPE turns into each other", 2)?;
        within("max_position_embeddings", self.max_position_embeddings, MOST_TOKENS)?;
        if let Some(window) = self.sliding_window {
            within("sliding_window", window, MOST_TOKENS)?;
        }
        positive("rms_norm_eps", self.rms_norm_eps)?;
        positive("rope_theta", self.rope.theta)?;
        not_negative("initializer_range", self.initializer_range)?;
        if let Some(RopeScaling::Linear(factor)) = self.rope.scaling {
            positive("rope_scaling.factor", factor)?;
        }
        if let Some(RopeScaling::Llama3(scaling)) = &self.rope.scaling {
            positive("rope_scaling.factor", scaling.factor)?;
            positive("rope_scaling.low_freq_factor", scaling.low_freq_factor)?;
            positive("rope_scaling.high_freq_factor", scaling.high_freq_factor)?;
            let key = "rope_scaling.high_freq_factor";
            let floor = scaling.low_freq_factor;
            holds(scaling.high_freq_factor > floor, key, scaling.high_freq_factor, || {
                format!("more than rope_scaling.low_freq_factor = {floor}")
            })?;
            let key = "rope_scaling.original_max_position_embeddings";
            within(key, scaling.original_max_position_embeddings, MOST_TOKENS)?;
        }
        if let Some(RopeScaling::Factors(factors)) = &self.rope.scaling {
            let half = self.head_dim / 2;
            holds(factors.len() == half, "rope_scaling.short_factor", format!("a list of {}", factors.len()), || {
                format!("one factor for each of head_dim / 2 = {half} frequencies")
            })?;
            factors.iter().try_for_each(|factor| positive("rope_scaling.short_factor", *factor))?;
        }
        match &self.mamba {
            Some(mamba) => mamba.validate()?,
            None if self.blocks.contains(&BlockKind::Mamba) => {
                return Err(ConfigError::Missing { key: "ssm_cfg".to_owned() });
            }
            None => {}
        }
        let parameters = self.parameters();
        holds(parameters <= MOST_PARAMETERS, "the number of parameters", parameters, || {
            format!("at most {MOST_PARAMETERS}")
        })
    }
}

impl MambaConfig {
    fn validate(&self) -> Result<()> {
        within("ssm_cfg.d_state", self.d_state, 1 << 16)?;
        within("ssm_cfg.d_inner", self.d_inner, WIDEST)?;
        within("ssm_cfg.d_xb", self.d_xb, WIDEST)?;
        within("ssm_cfg.d_conv", self.d_conv, 1 << 16)?;
        within("ssm_cfg.dt_rank", self.dt_rank, WIDEST)?;
        divides("ssm_cfg.d_inner", self.d_inner, "ssm_cfg.d_state", self.d_state)?;
        divides("ssm_cfg.d_xb", self.d_xb, "ssm_cfg.d_state", self.d_state)?;
        divides("ssm_cfg.d_inner", self.d_inner, "ssm_cfg.d_xb", self.d_xb)?;
        positive("ssm_cfg.dt_min", self.dt_min)?;
        positive("ssm_cfg.dt_max", self.dt_max)?;
        let floor = self.dt_min;
        holds(self.dt_max >= floor, "ssm_cfg.dt_max", self.dt_max, || format!("at least ssm_cfg.dt_min = {floor}"))?;
        positive("ssm_cfg.dt_scale", self.dt_scale)?;
        not_negative("ssm_cfg.dt_init_floor", self.dt_init_floor)
    }
}

fn holds(law: bool, key: &str, found: impl std::fmt::Display, expected: impl FnOnce() -> String) -> Result<()> {
    if law { Ok(()) } else { Err(ConfigError::value(key, found, expected())) }
}

fn within(key: &str, size: usize, most: usize) -> Result<()> {
    holds((1..=most).contains(&size), key, size, || format!("1 to {most}"))
}

fn divides(key: &str, size: usize, divisor: &str, by: usize) -> Result<()> {
    holds(size.is_multiple_of(by), key, size, || format!("a multiple of {divisor} ({by})"))
}

fn positive(key: &str, number: f64) -> Result<()> {
    holds(number.is_finite() && number > 0.0, key, number, || "a finite number above 0".to_owned())
}

fn not_negative(key: &str, number: f64) -> Result<()> {
    holds(number.is_finite() && number >= 0.0, key, number, || "a finite number, 0 or more".to_owned())
}
