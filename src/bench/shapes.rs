//! Models of known sizes with random weights: speed does not ask what a model has learnt.

use std::collections::HashMap;

use rand::RngExt;
use rayon::prelude::*;

use super::Result;
use crate::backend::{DType, Device};
use crate::hybrid::{Conversion, HybridError, Init, LayerSet, MixerShape};
use crate::model::Model;
use crate::model::config::{BlockKind, Family, ModelConfig, Rope};
use crate::model::tensors::{Role, TensorSpec};
use crate::random;

/// A model's sizes by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// The teacher of the bundled example, 0.9 million parameters.
    Arithmetic,
    /// HuggingFaceTB/SmolLM2-135M.
    SmolLm2,
    /// The 15B teacher of Apriel-H1.
    Apriel,
}

impl Shape {
    /// All of them.
    pub const ALL: [Shape; 3] = [Shape::Arithmetic, Shape::SmolLm2, Shape::Apriel];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Shape::Arithmetic => "arithmetic",
            Shape::SmolLm2 => "smollm2-135m",
            Shape::Apriel => "apriel-15b",
        }
    }

    /// The attention model of these sizes.
    pub fn config(self) -> ModelConfig {
        let (layers, hidden, mlp, [heads, kv_heads, head_dim], vocabulary) = match self {
            Shape::Arithmetic => (8, 96, 256, [4, 2, 32], 32),
            Shape::SmolLm2 => (30, 576, 1536, [9, 3, 64], 49_152),
            Shape::Apriel => (50, 5120, 14_336, [32, 8, 128], 131_072),
        };
        let (family, theta, tied) = match self {
            Shape::Arithmetic => (Family::Mistral, 1e4, false),
            Shape::SmolLm2 => (Family::Llama, 1e5, true),
            Shape::Apriel => (Family::Mistral, 1e6, false),
        };
        ModelConfig {
            family,
            vocab_size: vocabulary,
            hidden_size: hidden,
            intermediate_size: mlp,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            rms_norm_eps: 1e-5,
            rope: Rope { theta, scaling: None },
            sliding_window: None,
            attention_bias: false,
            tie_word_embeddings: tied,
            max_position_embeddings: 65_536,
            bos_token_id: Some(1),
            eos_token_ids: vec![2],
            initializer_range: 0.02,
            blocks: vec![BlockKind::Attention; layers],
            mamba: None,
            extra: serde_json::Map::new(),
        }
    }
}

impl std::str::FromStr for Shape {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        let known = Shape::ALL.map(Shape::name).join(", ");
        let found = Shape::ALL.into_iter().find(|shape| shape.name() == name);
        found.ok_or_else(|| format!("unknown shape '{name}': expected one of {known}"))
    }
}

/// `count` of `layers` layers, as far from each other as they can be.
pub fn spread(layers: usize, count: usize) -> LayerSet {
    (0..count.min(layers)).map(|i| (2 * i + 1) * layers / (2 * count)).collect()
}

/// `config` with `mamba` of its layers turned into Mamba.
///
/// # Errors
/// When it has not so many layers, or its sizes allow no Mamba mixer.
pub fn hybrid(config: &ModelConfig, mamba: usize) -> Result<ModelConfig> {
    Ok(conversion(config, mamba)?.config().clone())
}

fn conversion(config: &ModelConfig, mamba: usize) -> Result<Conversion> {
    let layers = config.num_hidden_layers();
    if mamba > layers {
        return Err(HybridError::NoSuchLayer { layer: mamba, layers }.into());
    }
    Ok(Conversion::new(config, config, &spread(layers, mamba), (Init::Mil, MixerShape::default(), 0))?)
}

/// The attention model `config` with `mamba` of its layers turned into Mamba and random weights. Weights that two such
/// models share are the same.
///
/// # Errors
/// When it has not so many layers, its sizes allow no Mamba mixer, or the device has no room.
pub fn random_model(device: &Device, config: &ModelConfig, mamba: usize, dtype: DType) -> Result<Model> {
    let conversion = conversion(config, mamba)?;
    let originals: HashMap<String, TensorSpec> =
        config.tensors().into_iter().map(|spec| (spec.name.clone(), spec)).collect();
    let model = Model::new(device, conversion.config().clone(), dtype)?;
    for (id, parameter) in model.weights().table().iter() {
        let spec = &parameter.spec;
        let values = if conversion.is_new(spec) {
            let original = |name: &str| -> std::result::Result<Vec<f32>, HybridError> {
                Ok(originals.get(name).map(values).unwrap_or_default())
            };
            conversion.tensor(spec, original)?
        } else {
            values(spec)
        };
        model.weights().write(device, id, &values)?;
    }
    Ok(model)
}

/// A model to measure the mixers of `config` in: of its two layers [`random_model`] makes the second Mamba when asked for
/// one; MLP and vocabulary are next to nothing.
pub fn two_layers(config: &ModelConfig) -> ModelConfig {
    ModelConfig {
        blocks: vec![BlockKind::Attention; 2],
        mamba: None,
        vocab_size: 32,
        intermediate_size: 32,
        tie_word_embeddings: true,
        ..config.clone()
    }
}

/// A model to measure the head of `config` in: the rest is next to nothing.
pub fn head_alone(config: &ModelConfig) -> ModelConfig {
    ModelConfig {
        blocks: vec![BlockKind::Attention],
        mamba: None,
        intermediate_size: 32,
        tie_word_embeddings: true,
        ..config.clone()
    }
}

/// Uniform values of standard deviation 0.02, from the tensor's name alone; 1 for a vector.
fn values(spec: &TensorSpec) -> Vec<f32> {
    match spec.role {
        Role::Vector => vec![1.0; spec.len()],
        _ => uniform(&spec.name, spec.len(), 0.02 * 3_f32.sqrt()),
    }
}

/// `count` values between −`most` and `most`, the same for the same name. Quick rather than good: SplitMix64.
pub(super) fn uniform(name: &str, count: usize, most: f32) -> Vec<f32> {
    let start = random::stream(0, name).random::<u64>();
    let value = |index: usize| {
        let state = start.wrapping_add((index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        most * ((mixed >> 40) as f32 / (1_u64 << 23) as f32 - 1.0)
    };
    (0..count).into_par_iter().map(value).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::reference::Reference;

    #[test]
    fn every_shape_is_valid_by_itself_and_with_half_of_its_layers_mamba() {
        for shape in Shape::ALL {
            let config = shape.config();
            config.validate().unwrap();
            assert_eq!(shape.name().parse(), Ok(shape));
            let half = config.num_hidden_layers() / 2;
            let new = spread(config.num_hidden_layers(), half);
            assert_eq!(new.len(), half);
            let hybrid = Conversion::new(&config, &config, &new, (Init::Mil, MixerShape::default(), 0)).unwrap();
            assert_eq!(hybrid.config().mamba.as_ref().unwrap().d_state, 16);
        }
        assert_eq!(Shape::SmolLm2.config().parameter_count(), 134_515_008);
    }

    #[test]
    fn models_of_one_shape_share_what_they_have_in_common() {
        let device = Device::new(Reference::new());
        let config = ModelConfig { blocks: vec![BlockKind::Attention; 4], ..Shape::Arithmetic.config() };
        let [teacher, hybrid] = [0, 2].map(|mamba| random_model(&device, &config, mamba, DType::F32).unwrap());
        assert_eq!(hybrid.config().layers_of(BlockKind::Mamba).collect::<Vec<_>>(), [1, 3]);
        let read = |model: &Model, name: &str| {
            model.weights().read(&device, model.weights().table().find(name).unwrap()).unwrap()
        };
        for name in ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"] {
            assert_eq!(read(&teacher, name), read(&hybrid, name));
        }
        assert!(random_model(&device, &config, 5, DType::F32).is_err());
    }
}
