//! Writes a safetensors file, one tensor in memory at a time.

use std::borrow::Cow;
use std::io::Write;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::atomic::write_file;
use super::codec;
use super::error::{CheckpointError, ProviderError, Result};
use super::storage::Storage;
use crate::backend::DType;

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewTensor {
    /// Its name.
    pub name: String,
    /// Its sizes, outermost first.
    pub shape: Vec<usize>,
    /// How it is to be stored.
    pub dtype: DType,
}

impl NewTensor {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes in the file.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype.size()
    }

    fn storage(&self) -> Storage {
        match self.dtype {
            DType::F32 => Storage::F32,
            DType::Bf16 => Storage::Bf16,
            DType::F16 => Storage::F16,
            DType::F64 => Storage::F64,
            DType::U32 => Storage::U32,
        }
    }
}

/// Writes `tensors` to the file `path` in the order given, with the metadata of a file written by torch. `values` is
/// asked once for each by its place, in that order, and gives its values in row-major order. The file appears whole or
/// not at all.
///
/// # Errors
/// When values cannot be had, are not as many as the shape says or too large for the dtype, or the system refuses.
pub fn write_tensors<'a>(
    path: &Path,
    tensors: &[NewTensor],
    mut values: impl FnMut(usize) -> std::result::Result<Cow<'a, [f32]>, ProviderError>,
) -> Result<()> {
    write_file(path, |file| {
        let write =
            |file: &mut dyn Write, bytes: &[u8]| file.write_all(bytes).map_err(CheckpointError::io("write", path));
        write(file, &header(tensors))?;
        for (at, tensor) in tensors.iter().enumerate() {
            let name = || tensor.name.clone();
            let values = values(at).map_err(|source| CheckpointError::Provider { tensor: name(), source })?;
            let (expected, found) = (tensor.len(), values.len());
            if expected != found {
                return Err(CheckpointError::Length { tensor: name(), expected, found });
            }
            write_values(tensor, &values, |bytes| write(file, bytes))?;
        }
        Ok(())
    })
}

fn write_values(tensor: &NewTensor, values: &[f32], mut write: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    const BLOCK: usize = 1 << 18;
    let mut bytes = Vec::new();
    for (block, values) in values.chunks(BLOCK).enumerate() {
        bytes.clear();
        codec::encode(tensor.dtype, values, &mut bytes).map_err(|too_large| CheckpointError::Overflow {
            tensor: tensor.name.clone(),
            index: block * BLOCK + too_large.index,
            value: values[too_large.index],
            dtype: tensor.dtype,
        })?;
        write(&bytes)?;
    }
    Ok(())
}

/// The length of the header and the header, padded with spaces so that the values start at a multiple of eight bytes.
fn header(tensors: &[NewTensor]) -> Vec<u8> {
    let mut entries = Map::new();
    entries.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.bytes();
        let entry = json!({"dtype": tensor.storage().name(), "shape": tensor.shape, "data_offsets": [start, end]});
        entries.insert(tensor.name.clone(), entry);
        start = end;
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);
    header
}
