//! What a checkpoint of training holds beside the model: masters and moments by name, row-major, and how far it is.

use std::borrow::Cow;
use std::path::Path;

use super::error::{Error, Result};
use super::optimizer::Kept;
use super::trainer::{Progress, Trainer};
use crate::backend::{DType, HostSlice, View};
use crate::checkpoint::{self, NewTensor, SHARD_BYTES, SaveOptions, TensorFile, write_tensors};
use crate::model::{Model, Part};

/// What the files of masters and moments are called before their number.
const TRAINING: &str = "training";

/// A tensor to be kept, and where it lies on the device.
fn kept(trainer: &Trainer) -> Result<Vec<(NewTensor, View)>> {
    let (weights, optimizer) = (trainer.model().weights(), trainer.optimizer());
    let rounded = weights.part(Part::Matrices).dtype != DType::F32;
    let mut tensors = Vec::new();
    for kept in Kept::ALL {
        for (id, parameter) in weights.table().iter() {
            let view = match optimizer.kept(weights, id, kept)? {
                // Vectors are f32 on the device, but not in the folder of a model in less than that.
                None if kept == Kept::Master && rounded && parameter.part == Part::Vectors => Some(weights.view(id)?),
                view => view,
            };
            let name = || format!("{}{}", kept.prefix(), parameter.spec.name);
            let new = || NewTensor { name: name(), shape: parameter.spec.shape.clone(), dtype: DType::F32 };
            tensors.extend(view.map(|view| (new(), view)));
        }
    }
    Ok(tensors)
}

/// How a model's matrices are stored.
pub(super) fn dtype_of(model: &Model) -> DType {
    model.weights().part(Part::Matrices).dtype
}

impl Trainer {
    /// Writes the model, and all that [`Self::restore`] needs but for [`Self::progress`], into a folder that is there.
    /// `tokenizer` is the folder whose tokenizer files go with it.
    ///
    /// # Errors
    /// When a weight is not a number, the device was lost, or the system refuses.
    pub fn save_into(&self, folder: &Path, tokenizer: Option<&Path>) -> Result<()> {
        let options = SaveOptions { copy_from: tokenizer, ..SaveOptions::new(dtype_of(self.model())) };
        checkpoint::save_model_into(folder, self.model(), &options)?;
        let tensors = kept(self)?;
        let mut shards: Vec<(usize, Vec<&(NewTensor, View)>)> = Vec::new();
        for tensor in &tensors {
            let bytes = tensor.0.bytes();
            match shards.last_mut() {
                Some((size, shard)) if *size + bytes <= SHARD_BYTES => {
                    *size += bytes;
                    shard.push(tensor);
                }
                _ => shards.push((bytes, vec![tensor])),
            }
        }
        for (at, (_, shard)) in shards.iter().enumerate() {
            let name = match shards.len() {
                1 => format!("{TRAINING}.safetensors"),
                count => format!("{TRAINING}-{:05}-of-{count:05}.safetensors", at + 1),
            };
            let new: Vec<NewTensor> = shard.iter().map(|(tensor, _)| tensor.clone()).collect();
            write_tensors(&folder.join(name), &new, |place| {
                Ok(Cow::Owned(self.device().read(shard[place].1)?.wait()?))
            })?;
        }
        Ok(())
    }

    /// Goes on where the checkpoint in `folder` was written: this trainer was made of its model, with the same options.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape.
    pub fn restore(&mut self, folder: &Path, progress: Progress) -> Result<()> {
        let files = training_files(folder)?;
        for (tensor, view) in kept(self)? {
            let stored = files.iter().find_map(|file| file.get(&tensor.name)).ok_or_else(|| {
                let what = format!("tensor {} is missing; was it trained with other options?", tensor.name);
                Error::malformed(folder, what)
            })?;
            if stored.shape != tensor.shape {
                let what = format!("tensor {} has shape {:?}, expected {:?}", tensor.name, stored.shape, tensor.shape);
                return Err(Error::malformed(stored.path, what));
            }
            self.device().write(HostSlice::F32(&stored.to_f32()?.values), view)?;
        }
        self.set_progress(progress);
        Ok(())
    }
}

fn training_files(folder: &Path) -> Result<Vec<TensorFile>> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with(TRAINING) && name.ends_with(".safetensors") {
            paths.push(path);
        }
    }
    paths.sort_unstable();
    paths.iter().map(|path| Ok(TensorFile::open(path)?)).collect()
}
