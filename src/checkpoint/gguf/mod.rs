//! GGUF files: metadata and tensors, plain or quantised, mapped into memory.
//!
//! Source of the format: `docs/gguf.md` of ggml. A file is the word GGUF, a version, the numbers of tensors and of
//! metadata values; the metadata, each a key, a type and a value; the tensors' names, sizes (innermost first), types and
//! offsets; then, from a multiple of the alignment on, their values.

mod blocks;
mod cursor;
mod header;
mod model;
mod value;

use std::collections::HashMap;
use std::path::Path;

use self::cursor::Cursor;
pub(super) use blocks::decode as decode_blocks;
pub(super) use model::{hub_name, interleaved_heads, is_configuration, model_config};
pub use value::Kind;
use value::{Number, Stored, number};

use super::error::{CheckpointError, Result};
use super::tensor_file::{TensorFile, map_file};

/// A GGUF file whose header was checked. Values are read when they are asked for, by way of the page cache, so a file may be
/// larger than memory.
///
/// A getter gives `None` for a key that is not there, and an error for one of another type.
#[derive(Debug)]
pub struct GgufFile {
    file: TensorFile,
    metadata: HashMap<String, Stored>,
}

impl GgufFile {
    /// Opens and checks a file: every metadata value, and every tensor's type, sizes and range, which must lie in the file and
    /// in no other's. Memory is taken for the names alone.
    ///
    /// The file must not be changed while it is open.
    ///
    /// # Errors
    /// When it cannot be read, is not a whole GGUF file, or has a tensor of a type that h1 does not read.
    pub fn open(path: &Path) -> Result<Self> {
        let map = map_file(path)?;
        let (metadata, tensors) = header::parse(&map).map_err(|what| CheckpointError::malformed(path, what))?;
        Ok(GgufFile { file: TensorFile::of_parts(path, map, tensors), metadata })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Its tensors, under their names in the file; sizes outermost first.
    pub fn tensors(&self) -> &TensorFile {
        &self.file
    }

    pub(super) fn into_tensors(self) -> TensorFile {
        self.file
    }

    /// The metadata keys, in no order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    /// A string.
    ///
    /// # Errors
    /// When it is something else, or not UTF-8.
    pub fn get_str(&self, key: &str) -> Result<Option<&str>> {
        let Some((stored, bytes)) = self.single(key, "a string")? else { return Ok(None) };
        match (stored.kind, bytes.get(8..)) {
            (Kind::String, Some(text)) => self.text(key, text).map(Some),
            _ => Err(self.wrong(key, stored, "a string")),
        }
    }

    /// A whole number, of whatever width it is stored.
    ///
    /// # Errors
    /// When it is something else, below 0 or too large.
    pub fn get_u64(&self, key: &str) -> Result<Option<u64>> {
        const EXPECTED: &str = "a whole number, 0 or more";
        let Some((stored, bytes)) = self.single(key, EXPECTED)? else { return Ok(None) };
        match number(stored.kind, bytes) {
            Some(Number::Whole(value)) if stored.kind != Kind::Bool => {
                value.try_into().map(Some).map_err(|_| self.wrong_value(key, value, EXPECTED))
            }
            _ => Err(self.wrong(key, stored, EXPECTED)),
        }
    }

    /// A whole number that 32 bits hold, such as a token id.
    ///
    /// # Errors
    /// As [`GgufFile::get_u64`].
    pub fn get_u32(&self, key: &str) -> Result<Option<u32>> {
        let narrow = |value: u64| value.try_into().map_err(|_| self.wrong_value(key, value, "0 to 4294967295"));
        self.get_u64(key)?.map(narrow).transpose()
    }

    /// A floating-point number of either width.
    ///
    /// # Errors
    /// When it is something else.
    pub fn get_f64(&self, key: &str) -> Result<Option<f64>> {
        const EXPECTED: &str = "a floating-point number";
        let Some((stored, bytes)) = self.single(key, EXPECTED)? else { return Ok(None) };
        match number(stored.kind, bytes) {
            Some(Number::Real(value)) => Ok(Some(value)),
            _ => Err(self.wrong(key, stored, EXPECTED)),
        }
    }

    /// A flag.
    ///
    /// # Errors
    /// When it is something else.
    pub fn get_bool(&self, key: &str) -> Result<Option<bool>> {
        match self.single(key, "a flag")? {
            None => Ok(None),
            Some((Stored { kind: Kind::Bool, .. }, bytes)) => Ok(Some(bytes != [0])),
            Some((stored, _)) => Err(self.wrong(key, stored, "a flag")),
        }
    }

    /// An array of strings.
    ///
    /// # Errors
    /// When it is something else, or one is not UTF-8.
    pub fn get_array_str(&self, key: &str) -> Result<Option<Vec<&str>>> {
        let Some((stored, count, bytes)) = self.elements(key, "a list of strings")? else { return Ok(None) };
        if stored.kind != Kind::String {
            return Err(self.wrong(key, stored, "a list of strings"));
        }
        let mut cursor = Cursor::new(bytes);
        let next = |_| match cursor.string() {
            Ok(text) => self.text(key, text),
            Err(what) => Err(CheckpointError::malformed(self.path(), what)),
        };
        (0..count).map(next).collect::<Result<_>>().map(Some)
    }

    /// An array of floating-point numbers, rounded to f32.
    ///
    /// # Errors
    /// When it is something else.
    pub fn get_array_f32(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.array(key, "a list of floating-point numbers", |number| match number {
            Number::Real(value) => Some(value as f32),
            Number::Whole(_) => None,
        })
    }

    /// An array of whole numbers, such as the types of tokens.
    ///
    /// # Errors
    /// When it is something else, or one is too large.
    pub fn get_array_i32(&self, key: &str) -> Result<Option<Vec<i32>>> {
        self.array(key, "a list of whole numbers of 32 bits", |number| match number {
            Number::Whole(value) => value.try_into().ok(),
            Number::Real(_) => None,
        })
    }

    fn array<T>(
        &self,
        key: &str,
        expected: &'static str,
        convert: impl Fn(Number) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        let Some((stored, _, bytes)) = self.elements(key, expected)? else { return Ok(None) };
        let wrong = || self.wrong(key, stored, expected);
        let size = stored.kind.size().ok_or_else(wrong)?;
        let values = bytes.chunks_exact(size).map(|bytes| number(stored.kind, bytes).and_then(&convert));
        values.collect::<Option<_>>().map(Some).ok_or_else(wrong)
    }

    /// A value that is no array, and its bytes.
    fn single(&self, key: &str, expected: &'static str) -> Result<Option<(&Stored, &[u8])>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(stored) if stored.count.is_none() => Ok(Some((stored, &self.file.map()[stored.range.clone()]))),
            Some(stored) => Err(self.wrong(key, stored, expected)),
        }
    }

    /// An array, the number of its elements, and their bytes.
    fn elements(&self, key: &str, expected: &'static str) -> Result<Option<(&Stored, usize, &[u8])>> {
        let Some(stored) = self.metadata.get(key) else { return Ok(None) };
        match stored.count {
            Some(count) => Ok(Some((stored, count, &self.file.map()[stored.range.clone()]))),
            None => Err(self.wrong(key, stored, expected)),
        }
    }

    fn text<'a>(&self, key: &str, bytes: &'a [u8]) -> Result<&'a str> {
        std::str::from_utf8(bytes).map_err(|_| self.wrong_value(key, "bytes that are no UTF-8", "text"))
    }

    fn wrong(&self, key: &str, stored: &Stored, expected: &'static str) -> CheckpointError {
        match stored.count {
            None => self.wrong_value(key, stored.kind, expected),
            Some(count) => self.wrong_value(key, format!("a list of {count}, each {}", stored.kind), expected),
        }
    }

    fn wrong_value(&self, key: &str, found: impl std::fmt::Display, expected: &'static str) -> CheckpointError {
        let (path, key) = (self.path().to_owned(), key.to_owned());
        CheckpointError::Metadata { path, key, found: found.to_string(), expected }
    }
}
