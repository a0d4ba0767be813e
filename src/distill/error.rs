//! What can keep a distillation from starting, going on or ending.

use std::path::{Path, PathBuf};

use crate::report::metrics::MetricsError;
use crate::report::plot::PlotError;
use crate::text::cache::LoadError;
use crate::text::packing::PackingError;
use crate::text::tokenizer::TokenizerError;
use crate::{backend, checkpoint, eval, hybrid, train};

/// The result of this floor.
pub type Result<T> = std::result::Result<T, Error>;

/// Why; the text says what was expected and where.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device failed, or has no room.
    #[error(transparent)]
    Backend(#[from] backend::Error),
    /// A checkpoint could not be read or written.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::CheckpointError),
    /// A model cannot be converted.
    #[error(transparent)]
    Hybrid(#[from] hybrid::HybridError),
    /// Training failed.
    #[error(transparent)]
    Train(#[from] train::Error),
    /// A model could not be scored.
    #[error(transparent)]
    Eval(#[from] eval::Error),
    /// A data set could not be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A text could not be turned into tokens.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Documents could not be packed.
    #[error(transparent)]
    Packing(#[from] PackingError),
    /// The metrics could not be written or read.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// A plot could not be drawn.
    #[error(transparent)]
    Plot(#[from] PlotError),
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
