//! The paper's procedure over the floors below: which layers matter, conversion and distillation stage after stage.

mod error;
pub mod placement;
pub mod student;

pub use error::{Error, Result};
