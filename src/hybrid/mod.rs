//! Conversion of weights: which blocks become Mamba, and what their mixers start from.
//!
//! A [`Conversion`] is a hybrid's configuration and, tensor by tensor, where its values come from: the model that is
//! converted, or a mixer made from the teacher's attention. [`fit()`] then fits the new mixers to that attention.

mod convert;
mod fit;
mod layers;
mod linalg;
mod mixer;
#[cfg(test)]
mod tests;

pub use convert::{Conversion, HybridError, Init, MixerShape};
pub use fit::{DT_RANGES, DtShare, FitBatch, FitOptions, LayerFit, fit};
pub use layers::LayerSet;
pub use linalg::{NotPositive, solve_positive};
