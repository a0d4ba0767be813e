//! The student as it stands before training: the weights of the model before it, and new mixers.

use super::Result;
use crate::backend::{DType, Device, Segments};
use crate::checkpoint::Checkpoint;
use crate::hybrid::{Conversion, FitBatch};
use crate::model::Model;
use crate::text::packing::{Batch, Batches};

/// The hybrid of a conversion on a device: new mixers from the attention of `teacher`, every other tensor from `student`.
///
/// # Errors
/// When a tensor cannot be read, or the device has no room.
pub fn assemble(
    device: &Device,
    conversion: &Conversion,
    (teacher, student): (&Checkpoint, &Checkpoint),
    dtype: DType,
) -> Result<Model> {
    let model = Model::new(device, conversion.config().clone(), dtype)?;
    for (id, parameter) in model.weights().table().iter() {
        model.weights().write(device, id, &tensor(conversion, teacher, student, &parameter.spec)?)?;
    }
    Ok(model)
}

/// One tensor of the hybrid, row-major.
///
/// # Errors
/// When it cannot be read, or a value is infinite or no number.
pub fn tensor(
    conversion: &Conversion,
    teacher: &Checkpoint,
    student: &Checkpoint,
    spec: &crate::model::tensors::TensorSpec,
) -> Result<Vec<f32>> {
    let read = |checkpoint: &Checkpoint, name: &str| Ok(checkpoint.stored(name)?.to_finite_f32()?.values);
    match conversion.is_new(spec) {
        true => conversion.tensor(spec, |name| read(teacher, name)),
        false => read(student, &spec.name),
    }
}

/// The segments of a batch, one a document.
pub(super) fn segments_of(batch: &Batch) -> Result<Segments> {
    Ok(Segments::documents(batch.segments.iter().map(|segment| segment.len))?)
}

/// Batches of `tokens` tokens or a little more in all, to fit mixers to.
///
/// # Errors
/// When there are more tokens in a batch than a row index can count.
pub fn fit_batches(batches: &mut Batches, tokens: usize) -> Result<Vec<FitBatch>> {
    let (mut taken, mut count, mut batch) = (Vec::new(), 0, Batch::default());
    while count < tokens {
        batches.next_into(&mut batch);
        count += batch.tokens();
        taken.push(FitBatch { ids: batch.ids.clone(), segments: segments_of(&batch)? });
    }
    Ok(taken)
}
