//! Every op of h1, forward and backward, as a pure function over ndarray: the oracle that backends are held to.
//!
//! The formulas are written as they stand in their sources, in plain loops, generic over f32 and f64 ([`Real`]); nothing
//! here is fast. Two things set the layout of every op:
//!
//! - Activations are `[tokens, width]`. There is no batch axis and no padding: a list of [`Segment`]s says which rows belong
//!   to which sequence and how many tokens each sequence has already seen.
//! - Weights are stored `[out, in]`, as in Hugging Face checkpoints.
//!
//! A gradient `dx` has the shape of `x`. Functions panic when shapes disagree: callers check sizes above this crate, once
//! for all backends. Ops that ndarray spells out by itself (add, scale, fill, copy, cast) are not repeated here.

mod activation;
mod adamw;
mod attention;
mod conv1d;
mod embed;
mod head_loss;
mod linear;
mod neg_exp;
mod norm;
mod paged;
mod real;
mod rms_norm;
mod rope;
mod rows;
mod sample;
mod segment;
mod selective_scan;
mod swiglu;
#[cfg(test)]
mod testing;

pub use activation::{sigmoid, silu, silu_derivative, softplus, softplus_derivative};
pub use adamw::{AdamW, adamw};
pub use attention::{Attention, attention, attention_backward};
pub use conv1d::{Conv1d, Conv1dGradients, RepeatOrder, conv1d, conv1d_backward};
pub use embed::{embed, embed_backward};
pub use head_loss::{
    HeadLoss, LossWeights, RowLosses, RowStatistics, Temperature, head_loss_gradient, head_loss_statistics,
};
pub use linear::{linear, linear_backward};
pub use neg_exp::{neg_exp, neg_exp_backward};
pub use norm::{clip_factor, squared_norm};
pub use paged::{attention_paged, page_read, page_write};
pub use real::Real;
pub use rms_norm::{rms_norm, rms_norm_backward};
pub use rope::{Llama3Scaling, inv_freq, rope, rope_inverse};
pub use rows::{gather, scatter_add};
pub use sample::{argmax, sample};
pub use segment::{Segment, kv_starts};
pub use selective_scan::{ScanGradients, ScanInputs, selective_scan, selective_scan_backward};
pub use swiglu::{swiglu, swiglu_backward};
