//! A checkpoint: a folder in Hugging Face form, `config.json` and safetensors files, or one GGUF file; configuration and tensors
//! held against each other.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::error::{CheckpointError, Result};
use super::gguf::{self, GgufFile};
use super::storage::Storage;
use super::tensor_file::{FLOATS, StoredTensor, Tensor, TensorFile};
use crate::backend::DType;
use crate::model::config::{BlockKind, ModelConfig};
use crate::model::tensors::{EMBED_TOKENS, INPUT_NORM, LM_HEAD, TensorSpec, layer_tensor};

/// No longer JSON beside the weights is read.
const LONGEST_JSON: u64 = 1 << 26;
pub(super) const WEIGHTS: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// What a checkpoint lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `config.json`, weights as safetensors, and the files of a tokenizer.
    Folder,
    /// All of it in one file.
    Gguf,
}

impl std::fmt::Display for Form {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Form::Folder => "folder in Hugging Face form",
            Form::Gguf => "GGUF file",
        })
    }
}

/// A checkpoint whose every tensor is there with the shape that its configuration says. Values are read tensor by
/// tensor, so it may be larger than memory.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    form: Form,
    config: ModelConfig,
    files: Vec<TensorFile>,
    sources: HashMap<String, Source>,
}

/// Where a tensor comes from.
#[derive(Debug)]
struct Source {
    file: usize,
    /// Its name there, which may be of an older spelling.
    name: String,
    /// The rows that are its own, when it was split from another.
    rows: Option<std::ops::Range<usize>>,
    shape: Vec<usize>,
    /// As in [`StoredTensor`].
    heads: Option<usize>,
}

impl Checkpoint {
    /// Opens the GGUF file `path`, or the folder `path`: `config.json`, and `model.safetensors` or the shards that its index
    /// lists.
    ///
    /// The rank of dt is read from the tensors, not the configuration, which often leaves it out. Mixers in the older
    /// spelling `mamba.*`, with the rows of dt at the end of `in_proj`, are read too.
    ///
    /// # Errors
    /// When a file is missing, cut or malformed, or a tensor is missing, unexpected, or of the wrong shape or dtype.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_file() {
            return Checkpoint::open_gguf(path);
        }
        let config = read_config(path)?;
        let (form, files) = (Form::Folder, open_files(path)?);
        let mut checkpoint = Checkpoint { path: path.to_owned(), form, config, files, sources: HashMap::new() };
        checkpoint.list_sources()?;
        checkpoint.read_older_mixers();
        checkpoint.read_dt_rank()?;
        checkpoint.check()?;
        Ok(checkpoint)
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        let file = GgufFile::open(path)?;
        let config = gguf::model_config(&file)?;
        let mut sources = HashMap::new();
        let names: Vec<&str> = file.tensors().names().filter(|name| !gguf::is_configuration(name)).collect();
        for name in names {
            let shape = file.tensors().tensor(name)?.shape.to_vec();
            let heads = gguf::interleaved_heads(&config, name);
            let known = gguf::hub_name(name).unwrap_or_else(|| name.to_owned());
            let source = Source { file: 0, name: name.to_owned(), rows: None, shape, heads };
            if sources.insert(known, source).is_some() {
                return Err(CheckpointError::malformed(path, format!("tensor {name} is there in two spellings")));
            }
        }
        let (form, files) = (Form::Gguf, vec![file.into_tensors()]);
        let checkpoint = Checkpoint { path: path.to_owned(), form, config, files, sources };
        checkpoint.check()?;
        Ok(checkpoint)
    }

    /// What it was opened from, and can be again.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What lies there.
    pub fn form(&self) -> Form {
        self.form
    }

    /// The configuration, with the rank of dt that the tensors have.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// How the embedding is stored; f32 for one that is quantised.
    pub fn dtype(&self) -> DType {
        match self.stored(EMBED_TOKENS).map(|tensor| tensor.storage) {
            Ok(Storage::Bf16) => DType::Bf16,
            Ok(Storage::F16) => DType::F16,
            Ok(Storage::F64) => DType::F64,
            _ => DType::F32,
        }
    }

    /// How the values are stored, and how many bytes each way takes, the most first.
    ///
    /// # Errors
    /// Not for a checkpoint that was opened.
    pub fn storages(&self) -> Result<Vec<(Storage, u64)>> {
        let mut storages: Vec<(Storage, u64)> = Vec::new();
        for spec in self.config.tensors() {
            let tensor = self.stored(&spec.name)?;
            match storages.iter_mut().find(|(storage, _)| *storage == tensor.storage) {
                Some((_, bytes)) => *bytes += tensor.bytes.len() as u64,
                None => storages.push((tensor.storage, tensor.bytes.len() as u64)),
            }
        }
        storages.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        Ok(storages)
    }

    /// The tensor of this name, one of [`ModelConfig::tensors`], as it lies in its file.
    ///
    /// # Errors
    /// When there is none.
    pub fn stored(&self, name: &str) -> Result<StoredTensor<'_>> {
        let source = self.sources.get(name).ok_or_else(|| self.missing(name, 0))?;
        let mut tensor = self.files[source.file].tensor(&source.name)?;
        if let Some(rows) = &source.rows {
            let row_bytes = source.shape[1..].iter().product::<usize>() * tensor.storage.block_bytes();
            tensor.bytes = &tensor.bytes[rows.start * row_bytes..rows.end * row_bytes];
        }
        tensor.shape = &source.shape;
        tensor.heads = source.heads;
        Ok(tensor)
    }

    /// The values of the tensor of this name, one of [`ModelConfig::tensors`].
    ///
    /// # Errors
    /// When there is none.
    pub fn read_f32(&self, name: &str) -> Result<Tensor> {
        self.stored(name)?.to_f32()
    }

    /// Looks at every value of every tensor.
    ///
    /// # Errors
    /// Names the first value that is infinite or no number.
    pub fn check_finite(&self) -> Result<()> {
        self.config.tensors().iter().try_for_each(|spec| self.stored(&spec.name)?.check_finite())
    }

    fn missing(&self, tensor: &str, more: usize) -> CheckpointError {
        let path = match &self.files[..] {
            [file] => file.path().to_owned(),
            _ => self.path.join(INDEX),
        };
        CheckpointError::Missing { path, tensor: tensor.to_owned(), more }
    }

    fn list_sources(&mut self) -> Result<()> {
        for (file, tensors) in self.files.iter().enumerate() {
            for name in tensors.names() {
                let shape = tensors.tensor(name)?.shape.to_vec();
                let source = Source { file, name: name.to_owned(), rows: None, shape, heads: None };
                if let Some(twin) = self.sources.insert(name.to_owned(), source) {
                    let twin = self.files[twin.file].path().display();
                    let what = format!("tensor {name} is in {twin} too");
                    return Err(CheckpointError::malformed(tensors.path(), what));
                }
            }
        }
        Ok(())
    }

    /// Gives `mamba.*` its name of today, and splits the rows of dt from `in_proj`.
    fn read_older_mixers(&mut self) {
        let Some(mamba) = &self.config.mamba else { return };
        for layer in self.config.layers_of(BlockKind::Mamba) {
            let (old, new) = (layer_tensor(layer, "mamba."), layer_tensor(layer, "mixer."));
            let names: Vec<String> = self.sources.keys().filter(|name| name.starts_with(&old)).cloned().collect();
            for name in names {
                let renamed = format!("{new}{}", &name[old.len()..]);
                if !self.sources.contains_key(&renamed)
                    && let Some(source) = self.sources.remove(&name)
                {
                    self.sources.insert(renamed, source);
                }
            }
            let rows = mamba.in_proj_rows();
            let dt_in_proj = format!("{new}dt_in_proj.weight");
            if !self.sources.contains_key(&dt_in_proj)
                && let Some(in_proj) = self.sources.get_mut(&format!("{new}in_proj.weight"))
                && let [all, width] = in_proj.shape[..]
                && all > rows
            {
                in_proj.rows = Some(0..rows);
                in_proj.shape = vec![rows, width];
                let (file, name, shape) = (in_proj.file, in_proj.name.clone(), vec![all - rows, width]);
                self.sources.insert(dt_in_proj, Source { file, name, rows: Some(rows..all), shape, heads: None });
            }
        }
    }

    fn read_dt_rank(&mut self) -> Result<()> {
        let Some(layer) = self.config.layers_of(BlockKind::Mamba).next() else { return Ok(()) };
        let stored = self.sources.get(&layer_tensor(layer, "mixer.dt_in_proj.weight")).map(|source| &source.shape[..]);
        if let (Some(mamba), Some([rank, _])) = (&mut self.config.mamba, stored) {
            mamba.dt_rank = *rank;
        }
        let path = || self.path.join("config.json");
        self.config.validate().map_err(|source| CheckpointError::Config { path: path(), source })
    }

    /// Holds the tensors against the configuration.
    fn check(&self) -> Result<()> {
        // Before the list of all tensors is made, which is long when the configuration claims many layers.
        let norms = self.config.blocks.iter().enumerate().filter(|(_, kind)| **kind != BlockKind::Identity);
        for norm in norms.map(|(layer, _)| layer_tensor(layer, INPUT_NORM)) {
            if !self.sources.contains_key(&norm) {
                return Err(self.missing(&norm, 0));
            }
        }
        let specs = self.config.tensors();
        let missing: Vec<&TensorSpec> = specs.iter().filter(|spec| !self.sources.contains_key(&spec.name)).collect();
        if let [first, more @ ..] = &missing[..] {
            return Err(self.missing(&first.name, more.len()));
        }
        for spec in &specs {
            let tensor = self.stored(&spec.name)?;
            if tensor.shape != spec.shape {
                return Err(CheckpointError::Shape {
                    path: tensor.path.to_owned(),
                    tensor: tensor.name.to_owned(),
                    expected: spec.shape.clone(),
                    found: tensor.shape.to_vec(),
                });
            }
            if !tensor.storage.is_float() {
                return Err(tensor.wrong_storage(FLOATS));
            }
        }
        self.check_unexpected(&specs)
    }

    fn check_unexpected(&self, specs: &[TensorSpec]) -> Result<()> {
        let known: std::collections::HashSet<&str> = specs.iter().map(|spec| &spec.name[..]).collect();
        let skipped: Vec<String> =
            self.config.layers_of(BlockKind::Identity).map(|layer| layer_tensor(layer, "")).collect();
        let mut unexpected: Vec<&String> = Vec::new();
        for name in self.sources.keys().filter(|name| !known.contains(&name[..])) {
            // A block may be switched off in the configuration alone, and old versions saved the rotary frequencies.
            let ignored =
                name.ends_with(".rotary_emb.inv_freq") || skipped.iter().any(|prefix| name.starts_with(prefix));
            if name == LM_HEAD {
                self.check_tied_head()?;
            } else if !ignored {
                unexpected.push(name);
            }
        }
        unexpected.sort_unstable();
        match unexpected[..] {
            [] => Ok(()),
            [first, ref more @ ..] => {
                let path = self.stored(first)?.path.to_owned();
                Err(CheckpointError::Unexpected { path, tensor: first.clone(), more: more.len() })
            }
        }
    }

    /// A tied model may bring its head along, if it is the embedding.
    fn check_tied_head(&self) -> Result<()> {
        let (head, embedding) = (self.stored(LM_HEAD)?, self.stored(EMBED_TOKENS)?);
        if (head.storage, head.shape, head.bytes) == (embedding.storage, embedding.shape, embedding.bytes) {
            return Ok(());
        }
        let what = format!("tie_word_embeddings is true, but tensor {LM_HEAD} differs from {EMBED_TOKENS}");
        Err(CheckpointError::malformed(head.path, what))
    }
}

/// The configuration of the checkpoint folder or GGUF file `path`.
///
/// # Errors
/// When there is none, or h1 does not take it.
pub fn read_config(path: &Path) -> Result<ModelConfig> {
    if path.is_file() {
        return gguf::model_config(&GgufFile::open(path)?);
    }
    let file = path.join("config.json");
    if !path.is_dir() {
        let what = if path.exists() { "neither a folder nor a file" } else { "no such folder or file" };
        return Err(CheckpointError::NotACheckpoint { path: path.to_owned(), what });
    }
    if !file.exists() {
        let what = "not a checkpoint: it has no config.json";
        return Err(CheckpointError::NotACheckpoint { path: path.to_owned(), what });
    }
    let text = read_json_text(&file)?;
    ModelConfig::from_json(&text).map_err(|source| CheckpointError::Config { path: file, source })
}

fn read_json_text(path: &Path) -> Result<String> {
    let size = std::fs::metadata(path).map_err(CheckpointError::io("open", path))?.len();
    if size > LONGEST_JSON {
        return Err(CheckpointError::malformed(path, format!("{size} bytes are too many for a JSON file")));
    }
    std::fs::read_to_string(path).map_err(CheckpointError::io("read", path))
}

fn open_files(folder: &Path) -> Result<Vec<TensorFile>> {
    let weights = folder.join(WEIGHTS);
    if weights.exists() {
        return Ok(vec![TensorFile::open(&weights)?]);
    }
    let index = folder.join(INDEX);
    if !index.exists() {
        let what = "no weights: neither model.safetensors nor model.safetensors.index.json is there";
        return Err(CheckpointError::NotACheckpoint { path: folder.to_owned(), what });
    }
    let placed = read_index(&index)?;
    let mut names: Vec<&String> = placed.iter().map(|(_, file)| file).collect();
    names.sort_unstable();
    names.dedup();
    let files = names.iter().map(|name| TensorFile::open(&folder.join(name))).collect::<Result<Vec<_>>>()?;
    for (tensor, file) in &placed {
        let file = names.binary_search(&file).map(|at| &files[at]);
        if let Ok(file) = file
            && file.get(tensor).is_none()
        {
            let what = format!("tensor {tensor} should be in {}, but is not", file.path().display());
            return Err(CheckpointError::malformed(&index, what));
        }
    }
    Ok(files)
}

/// The tensors that an index lists, and the file of each.
pub(super) fn read_index(path: &Path) -> Result<Vec<(String, String)>> {
    let malformed = |what: String| CheckpointError::malformed(path, what);
    let document: Value =
        serde_json::from_str(&read_json_text(path)?).map_err(|error| malformed(format!("not JSON: {error}")))?;
    let placed = document.get("weight_map").and_then(Value::as_object);
    let placed = placed.ok_or_else(|| malformed("it has no object `weight_map`".to_owned()))?;
    let files = placed.iter().map(|(tensor, file)| match file.as_str() {
        Some(file) if is_file_name(file) => Ok((tensor.clone(), file.to_owned())),
        _ => Err(malformed(format!("`weight_map` places tensor {tensor} in {file}, expected the name of a file"))),
    });
    files.collect()
}

/// Whether it names a file in the same folder.
fn is_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
}
