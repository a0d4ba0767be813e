//! What can be wrong with a checkpoint, or with writing one.

use std::path::{Path, PathBuf};

use crate::backend::DType;
use crate::model::config::ConfigError;

/// The result of this floor.
pub type Result<T> = std::result::Result<T, CheckpointError>;

/// Why whoever was asked for a tensor's values could not give them.
pub type ProviderError = Box<dyn std::error::Error + Send + Sync>;

/// A failure to read or to write a checkpoint; the text names the file and the tensor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
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
    /// The folder is not a checkpoint.
    #[error("{}: {what}", path.display())]
    NotACheckpoint {
        /// The folder.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
    },
    /// The configuration is not one that h1 takes.
    #[error("{}: {source}", path.display())]
    Config {
        /// The `config.json`.
        path: PathBuf,
        /// What is wrong.
        source: ConfigError,
    },
    /// A file is not what its name says.
    #[error("{}: {what}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A metadata value of a GGUF file that cannot be used.
    #[error("{}: metadata {key} is {found}, expected {expected}", path.display())]
    Metadata {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What it is.
        found: String,
        /// What it may be.
        expected: &'static str,
    },
    /// A tensor that the configuration asks for is not there.
    #[error("{}: tensor {tensor} is missing{}", path.display(), and_more(*more))]
    Missing {
        /// The folder or file.
        path: PathBuf,
        /// The first missing tensor.
        tensor: String,
        /// How many others are missing too.
        more: usize,
    },
    /// A tensor that the configuration does not know.
    #[error("{}: tensor {tensor} is not one of this configuration{}", path.display(), and_more(*more))]
    Unexpected {
        /// The file.
        path: PathBuf,
        /// The first such tensor.
        tensor: String,
        /// How many others there are.
        more: usize,
    },
    /// A tensor has another shape than the configuration says.
    #[error("{}: tensor {tensor} has shape {found:?}, expected {expected:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Sizes by the configuration.
        expected: Vec<usize>,
        /// Sizes in the file.
        found: Vec<usize>,
    },
    /// A tensor is stored as something else than asked for.
    #[error("{}: tensor {tensor} is stored as {found}, expected {expected}", path.display())]
    Storage {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What can be read here.
        expected: &'static str,
        /// What it is.
        found: &'static str,
    },
    /// A value that a checkpoint may not have.
    #[error("{}: tensor {tensor} has {value} at index {index}, expected {expected}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Place in row-major order.
        index: usize,
        /// The value.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
    /// A model on a hub that cannot be had.
    #[error("{model}: {what}")]
    Hub {
        /// Its name, as given.
        model: String,
        /// Why not.
        what: String,
    },
    /// The target of a write is already there.
    #[error("{} already exists", path.display())]
    Exists {
        /// The target.
        path: PathBuf,
    },
    /// A value is too large for the dtype to be written.
    #[error("tensor {tensor} has {value} at index {index}, which {dtype} cannot hold")]
    Overflow {
        /// The tensor.
        tensor: String,
        /// Place in row-major order.
        index: usize,
        /// The value.
        value: f32,
        /// The dtype.
        dtype: DType,
    },
    /// The values to be written are not as many as the shape says.
    #[error("tensor {tensor}: {found} values given, its shape has {expected}")]
    Length {
        /// The tensor.
        tensor: String,
        /// Values by the shape.
        expected: usize,
        /// Values given.
        found: usize,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] crate::backend::Error),
    /// The values to be written could not be had.
    #[error("tensor {tensor}: {source}")]
    Provider {
        /// The tensor.
        tensor: String,
        /// Why not.
        source: ProviderError,
    },
}

impl CheckpointError {
    /// For `map_err` after a call to the system.
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| CheckpointError::Io { action, path, source }
    }

    pub(super) fn malformed(path: &Path, what: impl Into<String>) -> Self {
        CheckpointError::Malformed { path: path.to_owned(), what: what.into() }
    }
}

fn and_more(more: usize) -> String {
    match more {
        0 => String::new(),
        more => format!(" (and {more} more)"),
    }
}
