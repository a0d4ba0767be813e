//! Losses, AdamW, the learning rate, the trainer.

mod error;
pub mod optimizer;
pub mod schedule;
pub mod teacher;
pub mod trainer;

pub use error::{Error, Result};
pub use trainer::Trainer;
