//! Reads and writes checkpoints: knows names and dtypes, not maths.
//!
//! [`Checkpoint`] is a folder in Hugging Face form or a GGUF file, held against its configuration; [`save`] writes one that the
//! published PyTorch classes load. Below them, [`TensorFile`] reads one safetensors file,
//! [`gguf::GgufFile`] one GGUF file, and [`write_tensors`] writes
//! one, and [`NewFolder`] makes what is written appear whole or not at all.

mod atomic;
mod codec;
mod error;
mod folder;
pub mod gguf;
mod header;
mod hub;
mod model;
mod save;
mod storage;
mod tensor_file;
mod write;

pub use atomic::{NewFolder, write_file};
pub use error::{CheckpointError, ProviderError, Result};
pub use folder::{Checkpoint, Form, read_config};
pub use hub::{Hub, locate};
pub use model::{load, save_model, save_model_into};
pub use save::{SHARD_BYTES, SaveOptions, save, save_into};
pub use storage::Storage;
pub use tensor_file::{StoredTensor, Tensor, TensorFile};
pub use write::{NewTensor, write_tensors};
