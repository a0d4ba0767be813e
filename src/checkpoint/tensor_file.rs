//! One safetensors file, mapped into memory, and its tensors as numbers.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::codec;
use super::error::{CheckpointError, Result};
use super::header::{Entry, parse};
use super::storage::Storage;

/// What can be decoded.
pub(super) const FLOATS: &str = "floating-point numbers";
const FINITE: &str = "a finite number";

/// A tensor on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor<T = f32> {
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Values in row-major order.
    pub values: Vec<T>,
}

/// A tensor as it lies in a file.
#[derive(Clone, Copy, Debug)]
pub struct StoredTensor<'a> {
    /// The file.
    pub path: &'a Path,
    /// Its name there.
    pub name: &'a str,
    /// How the values are stored.
    pub storage: Storage,
    /// Sizes, outermost first.
    pub shape: &'a [usize],
    /// The values, row-major, little-endian; quantised ones in blocks.
    pub bytes: &'a [u8],
    /// Set where the rows of each of so many heads lie as GGUF interleaves them for its RoPE: first row of the first half,
    /// first of the second half, second of the first half, and so on. Decoding undoes it. The heads divide the rows into even
    /// numbers.
    pub heads: Option<usize>,
}

/// A safetensors file whose header was checked. The values are read when they are asked for, by way of the page cache,
/// so a file may be larger than memory.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
    tensors: HashMap<String, Entry>,
}

impl TensorFile {
    /// Opens and checks a file: the header's length, every tensor's dtype, shape and range, and that the ranges cover
    /// the file without gap or overlap. Memory is taken for the header alone.
    ///
    /// The file must not be changed while it is open.
    ///
    /// # Errors
    /// When it cannot be read, or is not a whole safetensors file.
    pub fn open(path: &Path) -> Result<Self> {
        let map = map_file(path)?;
        let tensors = parse(&map).map_err(|what| CheckpointError::malformed(path, what))?;
        Ok(TensorFile::of_parts(path, map, tensors))
    }

    /// A file whose header was read by its caller; every entry lies in the map.
    pub(super) fn of_parts(path: &Path, map: Mmap, tensors: HashMap<String, Entry>) -> Self {
        TensorFile { path: path.to_owned(), map, tensors }
    }

    pub(super) fn map(&self) -> &[u8] {
        &self.map
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of its tensors, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The tensor of this name, if there is one.
    pub fn get(&self, name: &str) -> Option<StoredTensor<'_>> {
        let (name, entry) = self.tensors.get_key_value(name)?;
        let bytes = &self.map[entry.start..entry.end];
        Some(StoredTensor { path: &self.path, name, storage: entry.storage, shape: &entry.shape, bytes, heads: None })
    }

    /// The tensor of this name.
    ///
    /// # Errors
    /// When there is none.
    pub fn tensor(&self, name: &str) -> Result<StoredTensor<'_>> {
        let missing = || CheckpointError::Missing { path: self.path.clone(), tensor: name.to_owned(), more: 0 };
        self.get(name).ok_or_else(missing)
    }
}

/// Maps a file into memory; it must not be changed meanwhile.
pub(super) fn map_file(path: &Path) -> Result<Mmap> {
    let kind = std::fs::metadata(path).map_err(CheckpointError::io("open", path))?;
    if !kind.is_file() {
        return Err(CheckpointError::malformed(path, "not a file"));
    }
    let file = File::open(path).map_err(CheckpointError::io("open", path))?;
    // SAFETY: the map is only read, and as bytes, of which every value is valid. That nobody shortens or rewrites the file
    // meanwhile is asked of the caller; the writers of this crate replace files, never change them.
    unsafe { Mmap::map(&file) }.map_err(CheckpointError::io("map", path))
}

impl StoredTensor<'_> {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.storage.block_bytes() * self.storage.block_len()
    }

    /// Whether it has no value.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The values from `first` on, as many as `out` takes, as f32.
    ///
    /// # Errors
    /// When they are not floating-point numbers, or there are not so many.
    pub fn decode(&self, first: usize, out: &mut [f32]) -> Result<()> {
        let end = first.saturating_add(out.len());
        if end > self.len() {
            let (expected, found) = (self.len(), end);
            return Err(CheckpointError::Length { tensor: self.name.to_owned(), expected, found });
        }
        if !self.storage.is_float() {
            return Err(self.wrong_storage(FLOATS));
        }
        match self.heads {
            None => self.decode_run(first, out),
            Some(heads) => self.decode_rows(heads, first, out),
        }
        Ok(())
    }

    /// Values as they follow each other in the file; blocks are decoded whole, and the first and last may be used in part.
    fn decode_run(&self, mut first: usize, mut out: &mut [f32]) {
        const LONGEST_BLOCK: usize = 256;
        let (len, size) = (self.storage.block_len(), self.storage.block_bytes());
        while !out.is_empty() {
            let (block, skipped, whole) = (first / len, first % len, out.len() / len);
            let taken = if skipped == 0 && whole > 0 {
                codec::decode(self.storage, &self.bytes[block * size..][..whole * size], &mut out[..whole * len]);
                whole * len
            } else {
                let mut values = [0.0; LONGEST_BLOCK];
                codec::decode(self.storage, &self.bytes[block * size..][..size], &mut values[..len]);
                let taken = out.len().min(len - skipped);
                out[..taken].copy_from_slice(&values[skipped..][..taken]);
                taken
            };
            first += taken;
            out = &mut out[taken..];
        }
    }

    /// Row by row, from where the file keeps each: row `2·j + h` of a head there is row `h · half + j` of the tensor.
    fn decode_rows(&self, heads: usize, mut first: usize, mut out: &mut [f32]) {
        let (rows, width) = (self.shape[0], self.len() / self.shape[0]);
        let head = rows / heads;
        while !out.is_empty() {
            let (row, col) = (first / width, first % width);
            let (start, within) = (row / head * head, row % head);
            let stored = start + 2 * (within % (head / 2)) + within / (head / 2);
            let taken = out.len().min(width - col);
            self.decode_run(stored * width + col, &mut out[..taken]);
            first += taken;
            out = &mut out[taken..];
        }
    }

    /// All values as f32.
    ///
    /// # Errors
    /// When they are not floating-point numbers.
    pub fn to_f32(&self) -> Result<Tensor> {
        let mut values = vec![0.0; self.len()];
        self.decode(0, &mut values)?;
        Ok(Tensor { shape: self.shape.to_vec(), values })
    }

    /// All values as f32, none of them infinite or no number.
    ///
    /// # Errors
    /// Names the first value that is; or they are not floating-point numbers.
    pub fn to_finite_f32(&self) -> Result<Tensor> {
        let tensor = self.to_f32()?;
        match tensor.values.iter().position(|value| !value.is_finite()) {
            None => Ok(tensor),
            Some(at) => Err(self.wrong_value(at, tensor.values[at], FINITE)),
        }
    }

    /// All values as u32, of any whole-number storage: token ids, lengths, masks.
    ///
    /// # Errors
    /// When they are floating-point numbers, or one is below 0 or too large.
    pub fn to_u32(&self) -> Result<Tensor<u32>> {
        let wide = |bytes: &[u8]| -> Option<i128> {
            Some(match (self.storage, bytes) {
                (Storage::Bool | Storage::U8, [byte]) => i128::from(*byte),
                (Storage::I8, [byte]) => i128::from(*byte as i8),
                (Storage::U16, bytes) => i128::from(u16::from_le_bytes(bytes.try_into().ok()?)),
                (Storage::I16, bytes) => i128::from(i16::from_le_bytes(bytes.try_into().ok()?)),
                (Storage::U32, bytes) => i128::from(u32::from_le_bytes(bytes.try_into().ok()?)),
                (Storage::I32, bytes) => i128::from(i32::from_le_bytes(bytes.try_into().ok()?)),
                (Storage::U64, bytes) => i128::from(u64::from_le_bytes(bytes.try_into().ok()?)),
                (Storage::I64, bytes) => i128::from(i64::from_le_bytes(bytes.try_into().ok()?)),
                _ => return None,
            })
        };
        let values = self.bytes.chunks_exact(self.storage.block_bytes()).enumerate().map(|(index, bytes)| {
            let value = wide(bytes).ok_or_else(|| self.wrong_storage("whole numbers"))?;
            u32::try_from(value).map_err(|_| self.wrong_value(index, value, "0 to 4294967295"))
        });
        Ok(Tensor { shape: self.shape.to_vec(), values: values.collect::<Result<_>>()? })
    }

    /// Looks at every value.
    ///
    /// # Errors
    /// Names the first that is infinite or no number; or they are not floating-point numbers.
    pub fn check_finite(&self) -> Result<()> {
        const BLOCK: usize = 4096;
        let mut block = [0.0; BLOCK];
        for first in (0..self.len()).step_by(BLOCK) {
            let block = &mut block[..BLOCK.min(self.len() - first)];
            self.decode(first, block)?;
            if let Some(at) = block.iter().position(|value| !value.is_finite()) {
                return Err(self.wrong_value(first + at, block[at], FINITE));
            }
        }
        Ok(())
    }

    pub(super) fn wrong_storage(&self, expected: &'static str) -> CheckpointError {
        let (path, tensor) = (self.path.to_owned(), self.name.to_owned());
        CheckpointError::Storage { path, tensor, expected, found: self.storage.name() }
    }

    fn wrong_value(&self, index: usize, value: impl std::fmt::Display, expected: &'static str) -> CheckpointError {
        let (path, tensor) = (self.path.to_owned(), self.name.to_owned());
        CheckpointError::Value { path, tensor, index, value: value.to_string(), expected }
    }
}
