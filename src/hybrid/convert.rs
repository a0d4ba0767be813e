//! The hybrid's configuration, and where each of its tensors comes from.

use std::fmt;
use std::str::FromStr;

use super::mixer::Mixer;
use super::{LayerSet, NotPositive};
use crate::backend;
use crate::model::config::{BlockKind, ConfigError, Family, MambaConfig, ModelConfig};
use crate::model::tensors::TensorSpec;

/// Why a model cannot be converted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HybridError {
    /// A set of layers that cannot be read.
    #[error("layers `{text}`: `{part}` is neither a layer nor a range such as 5-8")]
    LayerText {
        /// The whole text.
        text: String,
        /// The part that is wrong.
        part: String,
    },
    /// A layer that the model does not have.
    #[error("there is no layer {layer}: the model has {layers} layers, counted from 0")]
    NoSuchLayer {
        /// The layer asked for.
        layer: usize,
        /// How many there are.
        layers: usize,
    },
    /// A layer whose mixer is no attention.
    #[error("layer {layer} of the {model} is {found}: only an attention block can become Mamba")]
    NotAttention {
        /// The layer.
        layer: usize,
        /// Whose it is.
        model: &'static str,
        /// What it is.
        found: &'static str,
    },
    /// Two models that do not belong together.
    #[error("the teacher's {what} is {teacher}, the student's {student}: they must be the same")]
    Unequal {
        /// What differs.
        what: &'static str,
        /// The teacher's.
        teacher: usize,
        /// The student's.
        student: usize,
    },
    /// A mixer of another shape than those that the model has already.
    #[error("{what} {asked} was asked for, but the model's Mamba blocks have {found}")]
    OtherShape {
        /// The size.
        what: &'static str,
        /// What was asked for.
        asked: usize,
        /// What the model has.
        found: usize,
    },
    /// A slice of a state that does not fit into a head.
    #[error("mil-aligned cuts heads into slices of d_state: head_dim {head_dim} is no multiple of d_state {d_state}")]
    Misaligned {
        /// The teacher's.
        head_dim: usize,
        /// The hybrid's.
        d_state: usize,
    },
    /// An initialisation that there is not.
    #[error("unknown initialisation `{0}`: expected mil, mil-fit, mil-aligned or random")]
    UnknownInit(String),
    /// A teacher's tensor of another size than its configuration says.
    #[error("{name} has {found} values, expected {expected}")]
    Size {
        /// The tensor.
        name: String,
        /// Values by the configuration.
        expected: usize,
        /// Values there are.
        found: usize,
    },
    /// A layer to fit that is no new Mamba block.
    #[error("mil-fit: layer {layer} is not a Mamba block")]
    NotMamba {
        /// The layer.
        layer: usize,
    },
    /// A range of dt that cannot be tried, or none at all.
    #[error("mil-fit: dt in {ranges:?}: expected one range or more, each of finite numbers above 0, the least first")]
    Ranges {
        /// What was given.
        ranges: Vec<(f64, f64)>,
    },
    /// Nothing to fit the new mixers to.
    #[error("mil-fit needs tokens to fit to, and found none")]
    NoTokens,
    /// The output projection cannot be fitted.
    #[error("layer {layer}, dt in {}..{}: {source}", range.0, range.1)]
    Fit {
        /// The layer.
        layer: usize,
        /// The range of dt that was tried.
        range: (f64, f64),
        /// Why.
        source: NotPositive,
    },
    /// The hybrid's configuration makes no sense.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The device failed.
    #[error(transparent)]
    Backend(#[from] backend::Error),
}

/// What a new mixer starts from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Init {
    /// The teacher's attention: x ← V, B ← K, C ← Q, output ← O; the rest is fresh.
    #[default]
    Mil,
    /// [`Init::Mil`], then dt and the output projection fitted to what the attention gives (see [`super::fit()`]).
    MilFit,
    /// [`Init::Mil`] with the rows of C and the columns of the output permuted, so that each slice of a query meets
    /// the slice of the key that it belongs to, also where d_state is less than head_dim.
    MilAligned,
    /// A mixer from scratch.
    Random,
}

impl Init {
    /// Every initialisation.
    pub const ALL: [Init; 4] = [Init::Mil, Init::MilFit, Init::MilAligned, Init::Random];

    /// Its name, as in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Init::Mil => "mil",
            Init::MilFit => "mil-fit",
            Init::MilAligned => "mil-aligned",
            Init::Random => "random",
        }
    }
}

impl fmt::Display for Init {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Init {
    type Err = HybridError;

    fn from_str(name: &str) -> Result<Self, HybridError> {
        let found = Init::ALL.into_iter().find(|init| init.name() == name);
        found.ok_or_else(|| HybridError::UnknownInit(name.to_owned()))
    }
}

/// The sizes of a mixer that the teacher does not give. `None` takes those of the Mamba blocks that the model has
/// already, or the published default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MixerShape {
    /// States a channel; divides the width of the keys. 16 by default.
    pub d_state: Option<usize>,
    /// Rank of dt; ⌈hidden_size / 16⌉ by default.
    pub dt_rank: Option<usize>,
    /// Taps of the convolution; 4 by default.
    pub d_conv: Option<usize>,
}

/// The published d_state.
const D_STATE: usize = 16;

impl MixerShape {
    /// The mixers of a hybrid: d_inner is the width of all query heads, d_xb that of all key heads.
    fn mamba(self, teacher: &ModelConfig, student: &ModelConfig) -> Result<MambaConfig, HybridError> {
        let Some(mamba) = student.mamba.as_ref().filter(|_| student.blocks.contains(&BlockKind::Mamba)) else {
            let dt_rank = self.dt_rank.unwrap_or_else(|| MambaConfig::auto_dt_rank(student.hidden_size));
            let (inner, xb) = (teacher.query_width(), teacher.key_value_width());
            let base = MambaConfig::new(self.d_state.unwrap_or(D_STATE), inner, xb, dt_rank);
            return Ok(MambaConfig {
                d_conv: self.d_conv.unwrap_or(base.d_conv),
                bias: teacher.attention_bias,
                ..base
            });
        };
        let sizes = [
            ("d_state", self.d_state, mamba.d_state),
            ("dt_rank", self.dt_rank, mamba.dt_rank),
            ("d_conv", self.d_conv, mamba.d_conv),
            ("d_inner", Some(teacher.query_width()), mamba.d_inner),
            ("d_xb", Some(teacher.key_value_width()), mamba.d_xb),
            ("biases for those of the teacher:", teacher.attention_bias.then_some(1), mamba.bias.into()),
        ];
        for (what, asked, found) in sizes {
            if let Some(asked) = asked.filter(|asked| *asked != found) {
                return Err(HybridError::OtherShape { what, asked, found });
            }
        }
        Ok(mamba.clone())
    }
}

/// A hybrid as it is before training: its configuration, and where each tensor's values come from.
///
/// Source: the MIL conversion of Fast-LLM, `make_hybrid_checkpoint_with_importance_15b_mil.py`.
#[derive(Clone, Debug)]
pub struct Conversion {
    config: ModelConfig,
    new: LayerSet,
    mixer: Mixer,
}

impl Conversion {
    /// `student` with the mixers of the layers `new` made from the attention of `teacher`, the original model; both
    /// are the same where nothing was converted yet. Blocks that are Mamba already, and every shared tensor, stay
    /// the student's.
    ///
    /// # Errors
    /// When a layer has no attention to convert, the models do not belong together, or the shape is impossible.
    pub fn new(
        teacher: &ModelConfig,
        student: &ModelConfig,
        new: &LayerSet,
        (init, shape, seed): (Init, MixerShape, u64),
    ) -> Result<Self, HybridError> {
        let sizes = [
            ("hidden_size", teacher.hidden_size, student.hidden_size),
            ("vocab_size", teacher.vocab_size, student.vocab_size),
            ("num_hidden_layers", teacher.num_hidden_layers(), student.num_hidden_layers()),
        ];
        for (what, teacher, student) in sizes {
            if teacher != student {
                return Err(HybridError::Unequal { what, teacher, student });
            }
        }
        let layers = student.num_hidden_layers();
        let mut config = student.clone();
        for layer in new.iter() {
            for (model, config) in [("teacher", teacher), ("student", student)] {
                let found = match config.blocks.get(layer) {
                    Some(BlockKind::Attention) => continue,
                    Some(BlockKind::Mamba) => "a Mamba block already",
                    Some(BlockKind::Identity) => "left out",
                    None => return Err(HybridError::NoSuchLayer { layer, layers }),
                };
                return Err(HybridError::NotAttention { layer, model, found });
            }
            config.blocks[layer] = BlockKind::Mamba;
        }
        let mamba = shape.mamba(teacher, student)?;
        if !new.is_empty() {
            config.family = Family::AprielH;
            config.mamba = Some(mamba.clone());
        }
        config.validate()?;
        let mixer = Mixer::new(teacher, mamba, init, seed)?;
        Ok(Conversion { config, new: new.clone(), mixer })
    }

    /// The hybrid's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The layers whose mixers are new.
    pub fn new_layers(&self) -> &LayerSet {
        &self.new
    }

    /// Whether a tensor is of a new mixer; every other one is the student's own.
    pub fn is_new(&self, tensor: &TensorSpec) -> bool {
        tensor.mixer && tensor.layer.is_some_and(|layer| self.new.contains(layer))
    }

    /// The values of a tensor of a new mixer, row-major. `teacher` reads a tensor of the original model by name; what is
    /// fresh is drawn from a stream of the tensor's own, so that no layer's values depend on which others are new.
    ///
    /// # Errors
    /// When the teacher's tensor cannot be read, or has another size than its configuration says.
    pub fn tensor<E>(&self, tensor: &TensorSpec, teacher: impl Fn(&str) -> Result<Vec<f32>, E>) -> Result<Vec<f32>, E>
    where
        E: From<HybridError>,
    {
        self.mixer.tensor(tensor, &teacher)
    }
}
