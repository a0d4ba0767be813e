//! Configuration, parameters, layers with their backward, the cache.

mod ahead;
mod attention;
mod block;
pub mod cache;
mod call;
pub mod config;
pub mod decoder;
pub mod head;
mod mamba;
mod mlp;
pub mod parameters;
mod probe;
mod scratch;
pub mod tensors;
pub mod weights;

pub use ahead::compile_ahead;
pub use block::BlockSaved;
pub use cache::Cache;
pub use call::Skip;
pub use decoder::{Activations, Keep, Model};
pub use head::{FinalNorm, Logits, LossHead, LossKind, Targets, TeacherRows};
pub use mamba::MambaSaved;
pub use parameters::{Parameter, ParameterId, ParameterTable, Part, Space};
pub use probe::Probe;
pub use scratch::{Column, Rows};
pub use weights::Gradients;
