//! What a model takes: FLOP of a token, bytes of its training.
//!
//! Sizes mirror the buffers of [`Activations`](crate::model::Activations), [`LossHead`](crate::model::LossHead) and the
//! trainer; a product of `[tokens, in]` and `[out, in]` counts as 2 FLOP a weight and token.

use serde::Serialize;

use crate::backend::DType;
use crate::model::config::{BlockKind, ModelConfig};
use crate::model::decoder::trained_as;
use crate::model::head::chunk_rows;
use crate::model::tensors::Role;
use crate::train::optimizer::Trained;

/// FLOP of one token's forward pass with `keys` keys on average before it in its sequence: the products, the head
/// included; scores and weighted values of attention; the scan and the convolution.
pub fn forward_flop(config: &ModelConfig, keys: f64) -> f64 {
    let products: usize = config.tensors().iter().filter(|t| t.role == Role::Matrix).map(|t| t.len()).sum();
    let tied = if config.tie_word_embeddings { config.vocab_size * config.hidden_size } else { 0 };
    let attention = 4.0 * config.query_width() as f64 * keys;
    // Six operations a state: two products for the decay and the input, a sum, an exponential, a product and a sum.
    let scan = config.mamba.as_ref().map_or(0.0, |mamba| {
        6.0 * (mamba.d_inner * mamba.d_state) as f64 + 2.0 * (mamba.conv_channels() * mamba.d_conv) as f64
    });
    let mixers = config.layers_of(BlockKind::Attention).count() as f64 * attention
        + config.layers_of(BlockKind::Mamba).count() as f64 * scan;
    2.0 * (products + tied) as f64 + mixers
}

/// FLOP of one token of distillation: the teacher's forward, and of the student forward, backward (twice a forward),
/// and with `recompute` the blocks' forward once more.
pub fn distillation_flop(teacher: &ModelConfig, student: &ModelConfig, keys: f64, recompute: bool) -> f64 {
    let head = 2.0 * (student.vocab_size * student.hidden_size) as f64;
    let forward = forward_flop(student, keys);
    let again = if recompute { forward - head } else { 0.0 };
    forward_flop(teacher, keys) + 3.0 * forward + again
}

/// Bytes of the device that a step of distillation needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// The teacher's weights.
    pub teacher: u64,
    /// The student's weights as stored, and in f32 where that is not how they are stored.
    pub student: u64,
    /// Gradients, f32.
    pub gradients: u64,
    /// Both moments of what trains, f32.
    pub moments: u64,
    /// Activations of both models, kept for backward or not, and the memory of backward.
    pub activations: u64,
    /// Chunks of both models' logits, and the rows before them.
    pub head: u64,
}

impl Memory {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.teacher + self.student + self.gradients + self.moments + self.activations + self.head
    }

    /// What is left for each of `devices` that share out weights, gradients and moments; every one has its own tokens.
    pub fn shared(&self, devices: usize) -> u64 {
        let state = self.teacher + self.student + self.gradients + self.moments;
        state.div_ceil(devices.max(1) as u64) + self.activations + self.head
    }
}

/// How a step is held in memory.
#[derive(Clone, Copy, Debug)]
pub struct StepShape {
    /// Tokens of a micro-batch.
    pub tokens: usize,
    /// How weights are stored.
    pub dtype: DType,
    /// How the activations of a forward pass are.
    pub activations: DType,
    /// Whether backward computes blocks again.
    pub recompute: bool,
    /// Which parameters train.
    pub trained: Trained,
    /// Tokens between two states that the scan keeps.
    pub scan_chunk: usize,
    /// Values of a chunk of logits.
    pub chunk_values: usize,
}

/// The memory of a distillation step.
pub fn memory(teacher: &ModelConfig, student: &ModelConfig, step: StepShape) -> Memory {
    let (size, tokens) = (step.dtype.size() as u64, step.tokens as u64);
    let (forward, training) = (step.activations.size() as u64, trained_as(step.activations).size() as u64);
    let parameters = student.parameter_count();
    let specs = student.tensors();
    let mixer = |name: &str| name.contains(".mixer.");
    let trained: u64 = match step.trained {
        Trained::All => parameters,
        Trained::Mixers => specs.iter().filter(|t| mixer(&t.name)).map(|t| t.len() as u64).sum(),
    };
    let masters = if step.dtype == DType::F32 { 0 } else { 4 * trained };
    let forward_only = |config: &ModelConfig| tokens * forward * (config.hidden_size + shared_width(config)) as u64;
    let layers = student.blocks.len();
    let saved = match step.recompute {
        true => shared_width(student),
        false => student.blocks.iter().map(|kind| base_width(student) + mixer_width(student, *kind)).sum(),
    };
    let states = student.mamba.as_ref().map_or(0, |mamba| {
        let kept = if step.recompute { 1 } else { student.layers_of(BlockKind::Mamba).count() };
        kept as u64 * 4 * mamba.ssm_state() as u64 * tokens.div_ceil(step.scan_chunk.max(1) as u64)
    });
    // The residual stream before each block and after the last, what blocks keep, and two streams and a block of gradients.
    let backward = (layers + 1 + 2) * student.hidden_size + saved + shared_width(student);
    let chunk = chunk_rows(step.chunk_values, student.vocab_size, step.tokens) as u64;
    let (student_rows, teacher_rows) = (4 * student.hidden_size as u64, 2 * teacher.hidden_size as u64);
    Memory {
        teacher: teacher.parameter_count() * size,
        student: parameters * size + masters,
        gradients: 4 * parameters,
        moments: 8 * trained,
        activations: forward_only(teacher) + tokens * training * backward as u64 + states,
        head: 4 * (2 * chunk * student.vocab_size as u64 + tokens * (student_rows + teacher_rows)),
    }
}

/// Values a token that every block keeps: two normed inputs, the stream between, the MLP's three.
fn base_width(config: &ModelConfig) -> usize {
    3 * config.hidden_size + 3 * config.intermediate_size
}

/// Values a token that a mixer of this kind keeps.
fn mixer_width(config: &ModelConfig, kind: BlockKind) -> usize {
    match (kind, &config.mamba) {
        (BlockKind::Attention, _) => {
            2 * config.query_width() + 2 * config.key_value_width() + config.num_attention_heads
        }
        (BlockKind::Mamba, Some(mamba)) => mamba.in_proj_rows() + mamba.dt_rank + 3 * mamba.d_inner,
        _ => 0,
    }
}

/// Values a token of the memory that all blocks share: one block, with a mixer of each kind that there is.
fn shared_width(config: &ModelConfig) -> usize {
    let kinds = [BlockKind::Attention, BlockKind::Mamba].into_iter().filter(|kind| config.blocks.contains(kind));
    base_width(config) + kinds.map(|kind| mixer_width(config, kind)).sum::<usize>()
}

/// Bytes of the largest tensor in f32: what the host holds of a checkpoint at a time.
pub fn largest_tensor(config: &ModelConfig) -> u64 {
    config.tensors().iter().map(|tensor| 4 * tensor.len() as u64).max().unwrap_or_default()
}
