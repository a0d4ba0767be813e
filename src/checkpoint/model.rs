//! Checkpoints to and from models on a device.

use std::borrow::Cow;
use std::path::Path;

use super::{Checkpoint, Result, SaveOptions, save, save_into};
use crate::backend::{DType, Device};
use crate::model::Model;
use crate::model::tensors::TensorSpec;

impl Checkpoint {
    /// The model on a device, its matrices stored as `dtype`, read tensor by tensor.
    ///
    /// # Errors
    /// When a value is infinite or no number, a file is cut, or the device has no room.
    pub fn load(&self, device: &Device, dtype: DType) -> Result<Model> {
        let model = Model::new(device, self.config().clone(), dtype)?;
        self.fill(&model)?;
        Ok(model)
    }

    /// Writes the checkpoint's values into a model whose every tensor it has.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape, a value is infinite or no number, or the device fails.
    pub fn fill(&self, model: &Model) -> Result<()> {
        for (id, parameter) in model.weights().table().iter() {
            let stored = self.stored(&parameter.spec.name)?;
            model.weights().write(model.device(), id, &stored.to_finite_f32()?.values)?;
        }
        Ok(())
    }
}

/// Opens a folder or a GGUF file and puts its model on a device.
///
/// # Errors
/// As [`Checkpoint::open`] and [`Checkpoint::load`].
pub fn load(device: &Device, path: &Path, dtype: DType) -> Result<Model> {
    Checkpoint::open(path)?.load(device, dtype)
}

/// Writes a model as the new folder `path`; it appears whole or not at all.
///
/// # Errors
/// As [`save`], or when the device was lost.
pub fn save_model(path: &Path, model: &Model, options: &SaveOptions<'_>) -> Result<()> {
    save(path, model.config(), options, |spec| read(model, spec))
}

/// As [`save_model`], into a folder that is there.
///
/// # Errors
/// As [`save_model`].
pub fn save_model_into(folder: &Path, model: &Model, options: &SaveOptions<'_>) -> Result<()> {
    save_into(folder, model.config(), options, |spec| read(model, spec))
}

fn read<'a>(model: &Model, spec: &TensorSpec) -> std::result::Result<Cow<'a, [f32]>, super::ProviderError> {
    let id = model.weights().table().find(&spec.name).ok_or_else(|| format!("the model has no {}", spec.name))?;
    Ok(Cow::Owned(model.weights().read(model.device(), id)?))
}
