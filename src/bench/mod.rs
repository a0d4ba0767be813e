//! Measuring: whole models, training steps and single ops, beside the limits of the machine that they are held against.
//!
//! A time is the best of several: what is not the program's own (other processes, a clock that turns down) only ever adds.

pub mod card;
mod clock;
pub mod kernels;
pub mod roofline;
pub mod shapes;
pub mod throughput;
pub mod train;
pub mod yardstick;

pub use clock::Clock;

/// Why something could not be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device failed, or has no room.
    #[error(transparent)]
    Backend(#[from] crate::backend::Error),
    /// A training step failed.
    #[error(transparent)]
    Train(#[from] crate::train::Error),
    /// Decoding failed.
    #[error(transparent)]
    Generate(#[from] crate::generate::Error),
    /// A shape cannot have so many Mamba layers.
    #[error(transparent)]
    Hybrid(#[from] crate::hybrid::HybridError),
    /// Threads of the yardstick could not be started.
    #[error("cannot start threads: {0}")]
    Threads(String),
    /// A number that makes no sense.
    #[error("{0}")]
    Options(String),
}

/// The result of a measurement.
pub type Result<T> = std::result::Result<T, Error>;
