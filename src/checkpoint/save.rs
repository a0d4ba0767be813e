//! Writes a checkpoint folder that `AutoModelForCausalLM.from_pretrained` and the published classes load.

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::atomic::{NewFolder, write_bytes, write_file};
use super::error::{CheckpointError, ProviderError, Result};
use super::write::{NewTensor, write_tensors};
use crate::backend::DType;
use crate::model::config::ModelConfig;
use crate::model::tensors::TensorSpec;

/// Bytes of a shard's values unless said otherwise, as in transformers.
pub const SHARD_BYTES: usize = 5_000_000_000;

/// What a tokenizer, its template and the defaults of generation lie in.
pub(super) const COPIED: [&str; 11] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
];

/// How a checkpoint is written.
#[derive(Clone, Copy, Debug)]
pub struct SaveOptions<'a> {
    /// How every tensor is stored.
    pub dtype: DType,
    /// A file has no more bytes of values than this, unless one tensor has.
    pub max_shard_bytes: usize,
    /// The folder whose tokenizer and generation files are copied.
    pub copy_from: Option<&'a Path>,
}

impl SaveOptions<'_> {
    /// Shards as transformers makes them, and no other folder's files.
    pub fn new(dtype: DType) -> Self {
        SaveOptions { dtype, max_shard_bytes: SHARD_BYTES, copy_from: None }
    }
}

/// Writes the new folder `path`; it appears whole or not at all. `values` is asked once for each of
/// [`ModelConfig::tensors`], in that order, and gives its values in row-major order.
///
/// # Errors
/// When `path` is already there, values cannot be had or do not fit the shape or the dtype, or the system refuses.
pub fn save<'a>(
    path: &Path,
    config: &ModelConfig,
    options: &SaveOptions<'_>,
    values: impl FnMut(&TensorSpec) -> std::result::Result<Cow<'a, [f32]>, ProviderError>,
) -> Result<()> {
    let folder = NewFolder::create(path)?;
    save_into(folder.path(), config, options, values)?;
    folder.finish()
}

/// As [`save`], into a folder that is there: for one that holds more than the checkpoint.
///
/// # Errors
/// As [`save`], but for the folder being there.
pub fn save_into<'a>(
    folder: &Path,
    config: &ModelConfig,
    options: &SaveOptions<'_>,
    mut values: impl FnMut(&TensorSpec) -> std::result::Result<Cow<'a, [f32]>, ProviderError>,
) -> Result<()> {
    let config_path = folder.join("config.json");
    let invalid = |source| CheckpointError::Config { path: config_path.clone(), source };
    config.validate().map_err(invalid)?;
    write_json(&config_path, &config.to_json(options.dtype))?;

    let specs = config.tensors();
    let tensors: Vec<NewTensor> = specs.iter().map(|spec| new_tensor(spec, options.dtype)).collect();
    let shards = shards(&tensors, options.max_shard_bytes);
    let mut places = Map::new();
    let mut first = 0;
    for (at, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", at + 1),
        };
        write_tensors(&folder.join(&name), shard, |place| values(&specs[first + place]))?;
        first += shard.len();
        places.extend(shard.iter().map(|tensor| (tensor.name.clone(), json!(name))));
    }
    if shards.len() > 1 {
        places.sort_keys();
        let total: usize = tensors.iter().map(NewTensor::bytes).sum();
        let index = json!({"metadata": {"total_size": total}, "weight_map": places});
        write_json(&folder.join("model.safetensors.index.json"), &index)?;
    }
    if let Some(source) = options.copy_from {
        copy_files(source, folder, config)?;
    }
    write_generation_config(folder, config)
}

fn new_tensor(spec: &TensorSpec, dtype: DType) -> NewTensor {
    NewTensor { name: spec.name.clone(), shape: spec.shape.clone(), dtype }
}

/// Cuts the list into runs of at most `most` bytes, or of one tensor.
fn shards(tensors: &[NewTensor], most: usize) -> Vec<&[NewTensor]> {
    let mut shards = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (at, tensor) in tensors.iter().enumerate() {
        if at > start && bytes + tensor.bytes() > most {
            shards.push(&tensors[start..at]);
            (start, bytes) = (at, 0);
        }
        bytes += tensor.bytes();
    }
    shards.push(&tensors[start..]);
    shards
}

fn write_json(path: &Path, document: &Value) -> Result<()> {
    write_bytes(path, format!("{document:#}\n").as_bytes())
}

fn copy_files(source: &Path, folder: &Path, config: &ModelConfig) -> Result<()> {
    let mut files: Vec<PathBuf> = COPIED.iter().map(|name| source.join(name)).collect();
    // Classes that `auto_map` of the configuration names.
    if config.extra.contains_key("auto_map") {
        for entry in fs::read_dir(source).map_err(CheckpointError::io("read", source))? {
            let path = entry.map_err(CheckpointError::io("read", source))?.path();
            if path.extension().is_some_and(|extension| extension == "py") {
                files.push(path);
            }
        }
    }
    for from in files.iter().filter(|file| file.is_file()) {
        let Some(name) = from.file_name() else { continue };
        // Not `fs::copy`: a source that may only be read would make a copy that may only be read.
        let mut reader = fs::File::open(from).map_err(CheckpointError::io("open", from))?;
        write_file(&folder.join(name), |to| {
            std::io::copy(&mut reader, to).map(|_| ()).map_err(CheckpointError::io("copy", from))
        })?;
    }
    Ok(())
}

/// Says how a text starts and ends, unless a file that was copied does.
fn write_generation_config(folder: &Path, config: &ModelConfig) -> Result<()> {
    let path = folder.join("generation_config.json");
    if config.eos_token_ids.is_empty() || path.exists() {
        return Ok(());
    }
    let mut document = json!({"_from_model_config": true, "eos_token_id": config.eos_json()});
    if let Some(bos) = config.bos_token_id {
        document["bos_token_id"] = json!(bos);
    }
    write_json(&path, &document)
}
