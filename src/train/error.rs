//! What can go wrong in a run of training.

use std::path::{Path, PathBuf};

use crate::backend;
use crate::checkpoint::CheckpointError;
use crate::report::metrics::MetricsError;
use crate::text::arithmetic::ArithmeticError;
use crate::text::cache::LoadError;
use crate::text::packing::PackingError;
use crate::text::tokenizer::TokenizerError;

/// The result of this floor.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a run could not be started, continued or finished.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device failed, or has no room.
    #[error(transparent)]
    Backend(#[from] backend::Error),
    /// A checkpoint could not be read or written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The data cannot be packed, or are not those of the checkpoint.
    #[error(transparent)]
    Packing(#[from] PackingError),
    /// Metrics could not be written.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// A data set could not be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Problems could not be made.
    #[error(transparent)]
    Arithmetic(#[from] ArithmeticError),
    /// A text could not be turned into tokens.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// What looks on at a run failed.
    #[error(transparent)]
    Observer(Box<dyn std::error::Error + Send + Sync>),
    /// The system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The disk is too small for what is about to be written.
    #[error("{what} need {needed} bytes in {}, which has {available} left", path.display())]
    DiskTooSmall {
        /// What takes the room.
        what: &'static str,
        /// Bytes asked for.
        needed: u64,
        /// Bytes left.
        available: u64,
        /// Where.
        path: PathBuf,
    },
    /// A checkpoint could not be written; what was there before still is.
    #[error("the checkpoint of step {step} could not be written ({}); --resume goes on from there when there is room", kept(*.latest))]
    NotSaved {
        /// The step.
        step: u64,
        /// The latest complete checkpoint, if there is one.
        latest: Option<u64>,
        /// Why not.
        source: Box<Error>,
    },
    /// Steps whose loss or gradient norm is no number.
    #[error(
        "the loss or the gradient norm was not finite in {in_a_row} steps in a row, the last of them step {step}: their \
         updates were left out; a lower learning rate or a longer warm-up may help"
    )]
    Diverged {
        /// The last of them.
        step: u64,
        /// How many.
        in_a_row: u64,
    },
    /// Another process has the run.
    #[error("{} is in use by another process", path.display())]
    Locked {
        /// The run's folder.
        path: PathBuf,
    },
    /// A run is already there.
    #[error("{} already holds a run: --resume continues it, another --out starts a new one", path.display())]
    Exists {
        /// The run's folder.
        path: PathBuf,
    },
    /// A folder of something else.
    #[error("{} is not empty and holds no run", path.display())]
    NoRun {
        /// The folder.
        path: PathBuf,
    },
    /// The configuration is not that of the run.
    #[error("{} was started with another configuration: {difference}", path.display())]
    OtherConfiguration {
        /// The run's folder.
        path: PathBuf,
        /// The first difference.
        difference: String,
    },
    /// A file of a run is not what it should be.
    #[error("{}: {what}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A configuration that cannot be.
    #[error("{0}")]
    Configuration(String),
}

fn kept(latest: Option<u64>) -> String {
    latest.map_or_else(|| "there is none before it".into(), |step| format!("that of step {step} is still there"))
}

impl Error {
    /// For `map_err` after a call to the system.
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Error::Io { action, path, source }
    }

    pub(super) fn malformed(path: &Path, what: impl ToString) -> Self {
        Error::Malformed { path: path.to_owned(), what: what.to_string() }
    }
}
