//! What a device must compile for a model, compiled before it is needed.

use super::cache::Cache;
use super::decoder::{Activations, Keep, Model};
use super::head::{FinalNorm, Logits};
use super::scratch::Column;
use crate::backend::ops::Sample;
use crate::backend::{DType, Result, Segments};

/// Rows of the calls that kernels are chosen for: one token, a few, and parts of prompts.
const CALLS: [usize; 5] = [1, 4, 32, 512, 2048];

/// Compiles the kernels of forward passes with a cache and without, and of the choice of a token, where the device has any to
/// compile; `progress` hears how many of how many are done.
///
/// # Errors
/// When the device cannot run the model.
pub fn compile_ahead(model: &Model, progress: impl FnMut(usize, usize)) -> Result<()> {
    model.device().compile_ahead(|| CALLS.into_iter().try_for_each(|rows| call(model, rows)), progress)
}

fn call(model: &Model, rows: usize) -> Result<()> {
    let device = model.device();
    let (ids, chosen) = (vec![0; rows], [rows as u32 - 1]);
    let segments = Segments::documents([rows])?;
    let mut activations = Activations::new(model, Keep::Nothing, rows, 1)?;
    let mut cache = Cache::new(model, 1, rows, rows)?;
    let (norm, logits) = (FinalNorm::new(model, 1)?, Logits::new(model, 1)?);
    for cache in [None, Some(&mut cache)] {
        model.forward(&mut activations, &ids, &segments, cache, None)?;
    }
    let logits = logits.forward(model, norm.forward(model, activations.output()?, &chosen)?)?;
    let column = |dtype| Column::new(device, dtype, 1);
    let (temperatures, uniforms, out) = (column(DType::F32)?, column(DType::F32)?, column(DType::U32)?);
    let (temperatures, uniforms, out) = (temperatures.of(1)?, uniforms.of(1)?, out.of(1)?);
    device.sample(&Sample { logits, temperatures, uniforms, out })
}
