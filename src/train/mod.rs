//! Losses, AdamW, the learning rate, the trainer; the folder of a run and the stretch of training in it.

pub mod config;
mod error;
mod fresh;
pub mod group;
pub mod job;
mod micro_batch;
pub mod optimizer;
mod recordings;
pub mod run;
pub mod schedule;
pub mod session;
pub mod settings;
mod state;
pub mod teacher;
pub mod trainer;

pub use error::{Error, Result};
pub use fresh::fresh;
pub(crate) use micro_batch::filled_up;
pub use run::Run;
pub use trainer::Trainer;
