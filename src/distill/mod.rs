//! The paper's procedure over the floors below: which layers matter, conversion and distillation stage after stage.

pub mod config;
pub mod cost;
mod error;
pub mod ground;
pub mod importance;
mod piece;
pub mod placement;
pub mod plan;
mod stages;
pub mod student;
pub mod table;
pub mod watch;

pub use error::{Error, Result};
pub use stages::{Setup, distill};
